"""How far products of e4m3 numbers may move a result: what the sums of matrix units lose, and weights near an edge.

A weight is rounded to e4m3 from a number that a kernel knows up to the error of its logit. Where that error reaches
the middle between two e4m3 numbers, the kernel may take the other one; everywhere else it takes the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from attncompile.ir import Quantize, Spec
from attncompile.ir.derivative import derivative
from attncompile.ir.e4m3 import HEADROOM
from attncompile.ir.evaluate import evaluate
from attncompile.ir.expr import SCORE
from attncompile.ir.types import bind_sizes
from tests.cases import Case


@dataclass(frozen=True)
class ZeroCase(Case):
    """A row whose operands are zero in the first head and in the first half of their positions."""

    def tensors(self, seed: int = 0, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        made = super().tensors(seed, dtype)
        for tensor in made.values():
            if tensor.dim() == 4:
                tensor[:, :1] = 0
                tensor[:, :, : tensor.shape[2] // 2] = 0
        return made


MATRIX_UNIT = 2.0**-13
"""Relative error of each sum of 32 products of e4m3 numbers in the matrix units of compute capability 8.9 and 9.0:
about 14 bits are kept (DeepSeek-V3, arXiv:2412.19437, section 3.3.2)."""
TERMS = 32
"""Products that such a unit sums at once."""


def narrow_slack(spec: Spec, tensors: dict[str, torch.Tensor]) -> float:
    """Largest absolute error of an output that this allows; 0 for a Spec without e4m3.

    With ``δ_j`` the error of a logit in base 2: each weight changes by a factor of at most ``2^δ_j``, and by one step
    of e4m3 where that takes it over an edge. The error of a logit is that of its sum of products, times the slope of
    the score there.
    """
    attend = spec.attend()
    steps = [step for step in spec.operations if isinstance(step, Quantize)]
    if attend is None or not any(step.dtype == "float8_e4m3" for step in steps):
        return 0.0
    sizes = bind_sizes({value.name: value.type for value in spec.inputs}, tensors)
    known = dict(tensors)
    for step in steps:
        known.update(step.reference(known, sizes, torch.float64))
    on_gpu = next(iter(tensors.values())).is_cuda
    single = torch.finfo(torch.float32).eps
    query, key, value = (known[name].double() for name in (attend.query, attend.key, attend.value))
    heads = attend.kv_heads(query.shape[1], query.device, sizes)
    key, value = key[:, heads], value[:, heads].abs()
    rounded = {step.out: step.dtype for step in steps}
    unit = MATRIX_UNIT if on_gpu and rounded.get(attend.query) == "float8_e4m3" else single
    sums = torch.einsum("bhid,bhjd->bhij", query.abs(), key.abs())
    logits = attend.logits(known, sizes, torch.float64)
    exponents = logits * math.log2(math.e)
    finite = torch.where(exponents.isfinite(), exponents, 0.0)
    blocks = math.ceil(query.shape[3] / TERMS) + 2
    products = torch.einsum("bhid,bhjd->bhij", query, key)
    slope = evaluate(derivative(attend.score, SCORE), attend.environment(known, sizes, torch.float64, score=products))
    moved = slope.abs() * math.log2(math.e) * sums * unit * blocks + 4 * single * finite.abs()
    share = torch.softmax(logits, dim=-1).nan_to_num(0.0)
    change = 2 * math.log(2) * moved * share
    if attend.norm.weights:
        rounding = next(step for step in steps if step.out == attend.value)
        powers = torch.log2(rounding.parts(known[rounding.tensor].double())[1])
        change += _steps_near_an_edge(exponents, moved, int(powers.max() - powers.min())) * share
        sum_unit = MATRIX_UNIT if on_gpu else single
        change += sum_unit * (math.ceil(key.shape[2] / TERMS) + 2) * share
    visible = torch.where(exponents.isfinite(), moved, 0.0)
    return max(float(torch.einsum("bhij,bhje->bhie", change, value).max()), float(visible.max()) * math.log(2))


def _steps_near_an_edge(exponents: torch.Tensor, moved: torch.Tensor, spread: int) -> torch.Tensor:
    """Relative size of a step of e4m3 for weights that an error of their exponent may take over an edge, else 0.

    Args:
        exponents: logits in base 2.
        moved: their error.
        spread: by how many powers of two the scales of the values differ. They join the weights before these are
            rounded, so that where steps no longer shrink, below 2^−6, depends on them.
    """
    peak = exponents.amax(dim=-1, keepdim=True).ceil()
    weights = torch.exp2(exponents - torch.where(peak.isfinite(), peak, 0.0) + HEADROOM)
    _, power = torch.frexp(weights)
    step = torch.ldexp(torch.ones_like(weights), power.clamp(min=spread - 5) - 4)
    place = weights / step
    distance = (place - place.floor() - 0.5).abs()
    near = (distance <= place * math.log(2) * moved) | (power < spread - 5)
    return torch.where(near & (weights > 0), step / weights.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
