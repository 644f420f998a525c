"""Gradients of rows that see no key, in models that add their masks.

Such a model adds a finite number to hidden scores, so low that it swallows them: all logits of a row without a visible
key are that number, and every weight is ``1 / J``. The derivative of a sum does not know of rounding, and passes on to
the scores: with weights ``p`` and ``dp_j = dout · v_j``, ``ds_j = p_j · (dp_j − Σ p · dp)``. Where a Spec states the
mask, its fill is the number alone, and what computes it passes nothing on.

With equal weights these gradients need no map. Such a row is the mean of the values, and what it passes to the scores
is the gradient of ::

    c · q_i · (1/J Σ_j k_j ⊗ (v_j − mean v))        with v held constant

where ``c`` scales the scores: work and memory linear in the length. This term minus itself without its gradient is 0;
it and the mean take the place of the row. Rows that several numbers hide, or such as are loaded, are computed by
:mod:`attncompile.codegen.pytorch.low_rows`. A graph decides nothing from data, so it compiles and goes into CUDA
graphs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from attncompile.codegen.lowering import Lowering, Run
from attncompile.codegen.pytorch.choose import attention_map
from attncompile.codegen.pytorch.form import AdditiveForm, additive_form
from attncompile.codegen.pytorch.grid import Map
from attncompile.codegen.pytorch.low_rows import attend_low, find_low_rows
from attncompile.codegen.pytorch.sdpa import edited, empty_rows, read_operands
from attncompile.codegen.pytorch.tracing import being_traced
from attncompile.ir import NO_SINK, Attend, Refusal, RefusalError, Spec
from attncompile.ir.evaluate import evaluate
from attncompile.ir.expr import SCORE, TRUE, Const, loads, symbols
from attncompile.ir.rows import never_empty

PASSED = "a query whose keys are all hidden by added numbers passes gradients on as the model does"
"""What a lowering with these gradients says of itself."""


def may_be_empty(spec: Spec) -> bool:
    """Whether a query of a Spec's attention is not proven to see a key."""
    attend = spec.attend()
    return attend is not None and not never_empty(attend, spec.types())


def adds_fill(spec: Spec) -> bool:
    """Whether hidden scores of a softmax get more than one number added, or one beside a bias."""
    attend = spec.attend()
    if attend is None or not attend.norm.plain_softmax or attend.sink != NO_SINK or SCORE not in symbols(attend.fill):
        return False
    form = additive_form(attend, spec.types())
    return isinstance(form, Refusal) or form.bias is not None or not isinstance(form.masked, Const)


def why_not_passed(spec: Spec, numbers: bool = False) -> str | None:
    """Why these gradients are not computed, in one sentence, or ``None`` where they are.

    Args:
        spec: what the model computes.
        numbers: whether it loads numbers that may hide keys (:attr:`attncompile.lift.Site.numbers`).
    """
    attend = spec.attend()
    if attend is None:
        return "it has not exactly one attention operation"
    form = additive_form(attend, spec.types())
    if isinstance(form, Refusal):
        return str(form)
    if form.replaces and form.mask != TRUE and (form.fill == "constant" or (numbers and form.fill == "absorbing")):
        return f"some keys are hidden by numbers that are added, and others by {attend.fill} in place of the score"
    return None


def passing_gradients(spec: Spec, lowering: Lowering) -> Lowering:
    """A lowering whose rows without a key pass on gradients as if a number were added to each score.

    Nothing changes where no gradient is recorded; results of other rows never do.

    Args:
        spec: what the model computes: a mask whose fill stands for the sum of itself and the score, or numbers that are
            added to all scores.
        lowering: what computes it, or an approximation of it, from the same inputs.

    Raises:
        RefusalError: where these gradients are not computed.
    """
    problem = why_not_passed(spec)
    attend = spec.attend()
    if problem is not None or attend is None:
        raise RefusalError(Refusal("gradient", f"no gradients for rows without a key: {problem}"))
    form = additive_form(attend, spec.types())
    assert isinstance(form, AdditiveForm)
    rows = _low if form.fill != "absorbing" else _hidden
    run = functools.partial(_run, spec, attend, functools.partial(rows, attend, form), lowering.run)
    return dataclasses.replace(lowering, run=run, reason=f"{lowering.reason}; {PASSED}")


Rows = tuple[torch.Tensor, Callable[[], torch.Tensor]]
"""Which rows have another result, ``[b,h,i,1]`` and broadcastable, and what makes it, ``[b,h,i,e]``."""


def _run(
    spec: Spec, attend: Attend, rows_of: Callable[[Map], Rows], plain: Run, *tensors: torch.Tensor, **options: Any
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """The plain result, and where gradients are recorded the rows without a key in its place."""
    made = plain(*tensors, **options)
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return made
    rows, replaced = rows_of(
        attention_map(spec, attend, {v.name: tensor for v, tensor in zip(spec.inputs, tensors, strict=True)})
    )
    if rows.device.type == "cpu" and not being_traced(rows) and not bool(rows.any()):
        return made  # a look that costs nothing here: on a GPU it would wait for it
    results = [made] if isinstance(made, torch.Tensor) else list(made)
    place = spec.outputs.index(attend.out)
    results[place] = torch.where(rows, replaced().to(results[place].dtype), results[place])
    return results[0] if isinstance(made, torch.Tensor) else tuple(results)


def _low(attend: Attend, form: AdditiveForm, where: Map) -> Rows:
    """Rows that get low numbers added."""
    found = find_low_rows(form, where, _wide(form, where))
    return found.low, functools.partial(attend_low, attend, form, where, found)


def _hidden(attend: Attend, form: AdditiveForm, where: Map) -> Rows:
    """Rows all of whose scores the fill stands for."""
    return _hidden_rows(form, where), functools.partial(_equally_weighted, attend, form, where)


def _hidden_rows(form: AdditiveForm, where: Map) -> torch.Tensor:
    """Whether the mask hides all keys of a query: ``[b,h,i,1]``, broadcastable."""
    _, _, queries, keys = where.extents
    return empty_rows(form, form.mask_at(queries, keys), where)


def _wide(form: AdditiveForm, where: Map) -> torch.dtype:
    """The dtype of the arithmetic: at least float32."""
    found = [tensor.dtype for tensor in where.tensors.values() if tensor.is_floating_point()]
    return functools.reduce(torch.promote_types, found, torch.float32)


def _equally_weighted(attend: Attend, form: AdditiveForm, where: Map) -> torch.Tensor:
    """The mean of the values ``[b,h,i,e]``, with gradients as from scores that a number has swallowed."""
    operands, wide = read_operands(attend, form, where), _wide(form, where)
    query, key, value = (tensor.to(wide) for tensor in (operands.query, operands.key, operands.value))
    repeats = query.shape[1] // key.shape[1]
    mean = value.mean(2, keepdim=True)
    spread = (value - mean).detach() / value.shape[2]
    passed = form.scale * (query @ (key.mT @ spread).repeat_interleave(repeats, 1))
    nothing = passed - passed.detach()
    if form.bias is not None and any(where.tensors[load.tensor].requires_grad for load in loads(form.bias)):
        bias = evaluate(form.bias, where.environment(wide))
        bias = bias.reshape([1] * (4 - bias.dim()) + list(bias.shape)).expand(*query.shape[:3], key.shape[2])
        nothing = nothing + (bias - bias.detach()) @ spread.repeat_interleave(repeats, 1)
    return edited(mean.repeat_interleave(repeats, 1) + nothing, form, where)


__all__ = ["PASSED", "adds_fill", "may_be_empty", "passing_gradients", "why_not_passed"]
