"""Rows all of whose logits are low: numbers that are added hide every key, one more than another perhaps.

What is added to the scores of such a row is ``m_j``, and ``M = max m_j`` is far below any score. A softmax does not
notice if ``M`` is taken off; arithmetic does, which loses digits beside it, and the backward pass of fused kernels,
which computes the weights again from a log-sum-exp in which ``M`` has swallowed ``ln J`` (PyTorch 2.11, CPU). So
``m − M`` is added in place of ``m``, in float64 until ``M`` is gone: a bias beside −1e9 keeps its digits.

Where ``M`` is so low that it swallows the scores too, the weights are those of ``m − M`` alone, but a sum passes
gradients on to what rounding has swallowed: with weights ``p`` and ``dp_j = dout · v_j``, the scores get
``ds_j = p_j · (dp_j − Σ p · dp)``. A query ``q − q``, whose second term has no gradient, has scores of 0 and the
gradient ``Σ_j ds_j k_j`` of the true one; keys get theirs, ``ds_j q``, from a second call in which they are ``k − k``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attncompile.codegen.pytorch.form import NEGLIGIBLE, AdditiveForm
from attncompile.codegen.pytorch.grid import Map
from attncompile.codegen.pytorch.sdpa import Operands, as_stored, attend_added, edited, read_operands
from attncompile.codegen.pytorch.tracing import being_traced
from attncompile.ir import Attend
from attncompile.ir.evaluate import evaluate
from attncompile.ir.expr import TRUE

LOW = NEGLIGIBLE / 2
"""Rows that get no higher number are low: the smallest number that hides, and a bias beside it."""


@dataclass(frozen=True)
class LowRows:
    """The rows of a call that are low.

    Attributes:
        low: which rows: ``[b,h,i,1]``, broadcastable, as all of these are.
        swallowed: those among them in which the scores are swallowed.
        added: ``m − M`` in low rows and 0 in others: ``[b,h,i,j]``.
    """

    low: torch.Tensor
    swallowed: torch.Tensor
    added: torch.Tensor


def find_low_rows(form: AdditiveForm, where: Map, dtype: torch.dtype) -> LowRows:
    """The low rows of a call.

    Args:
        form: of the site; its fill is −∞, or what is added to the score (``shifted``).
        where: the map of this call.
        dtype: of the arithmetic, at least float32.
    """
    numbers = added_numbers(form, where, dtype)
    highest = numbers.detach().amax(-1, keepdim=True)
    low = (highest <= LOW) & highest.isfinite()
    swallowed = low & (highest <= NEGLIGIBLE / torch.finfo(dtype).eps)
    exact = added_numbers(form, where, torch.float64)
    above = (exact - exact.detach().amax(-1, keepdim=True)).to(dtype)
    zero = torch.zeros((), dtype=dtype, device=numbers.device)
    added = torch.where(swallowed, numbers - highest, torch.where(low, above, zero))
    return LowRows(low, swallowed, added)


def added_numbers(form: AdditiveForm, where: Map, dtype: torch.dtype) -> torch.Tensor:
    """``m``: what is added to the scaled scores, ``[b,h,i,j]``, broadcastable, as the model adds it up in a dtype."""
    environment = where.environment(dtype)
    _, _, queries, keys = where.extents
    mask = form.mask_at(queries, keys)
    added = torch.zeros((), dtype=dtype, device=where.device)
    if form.bias is not None:
        added = evaluate(as_stored(form.bias, form, where), environment)
    if mask != TRUE:
        fill = evaluate(as_stored(form.masked, form, where), environment)
        added = torch.where(evaluate(mask, environment), added, fill)
    added = added.to(dtype).reshape([1] * (4 - added.dim()) + list(added.shape))
    return added.expand(*added.shape[:3], keys)


def attend_low(attend: Attend, form: AdditiveForm, where: Map, rows: LowRows) -> torch.Tensor:
    """The result ``[b,h,i,e]`` in low rows, in the dtype of what is added to them; of no meaning in others."""
    found, dtype = read_operands(attend, form, where), rows.added.dtype
    query, key, value = (tensor.to(dtype) for tensor in (found.query, found.key, found.value))
    silent = torch.where(rows.swallowed, query - query.detach(), query)
    out = attend_added(Operands(silent, key, value), form, rows.added)
    looked_at = rows.added.device.type == "cpu" and not being_traced(rows.added)
    if not looked_at or bool(rows.swallowed.any()):
        heard = torch.where(rows.swallowed, query.detach(), torch.zeros_like(query))
        passing = Operands(heard, key - key.detach(), value.detach())
        passed = attend_added(passing, form, rows.added.detach())
        out = out + (passed - passed.detach())
    return edited(out, form, where)


__all__ = ["LowRows", "added_numbers", "attend_low", "find_low_rows"]
