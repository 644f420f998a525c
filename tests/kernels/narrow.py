"""How far products of e4m3 numbers may move a result: what the sums of matrix units lose, and weights near an edge.

A weight is rounded to e4m3 from a number that a kernel knows up to the error of its logit. Where that error reaches
the middle between two e4m3 numbers, the kernel may take the other one; everywhere else it takes the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from attncompile.ir import Position, Quantize, Spec
from attncompile.ir.derivative import derivative
from attncompile.ir.e4m3 import HEADROOM, LARGEST
from attncompile.ir.evaluate import Environment, evaluate, index_grid
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
    """Largest absolute error of an output that this allows; 0 for a Spec without e4m3 and without a rotary map.

    With ``δ_j`` the error of a logit in base 2: each weight changes by a factor of at most ``2^δ_j``, and by one step
    of e4m3 where that takes it over an edge. The error of a logit is that of its sum of products, times the slope of
    the score there. Codes of a rotated tensor are made of numbers that the kernel knows up to their own rounding:
    see :func:`moved_codes`.
    """
    attend = spec.attend()
    steps = [step for step in spec.operations if isinstance(step, Quantize)]
    rotated = {step.out: step for step in spec.operations if isinstance(step, Position)}
    if attend is None or not (rotated or any(step.dtype == "float8_e4m3" for step in steps)):
        return 0.0
    sizes = bind_sizes({value.name: value.type for value in spec.inputs}, tensors)
    known = dict(tensors)
    for operation in spec.operations:
        if operation is not attend:
            known.update(operation.reference(known, sizes, torch.float64))
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
    for step in (step for step in steps if step.tensor in rotated):
        apart = moved_codes(step, known[step.tensor], rotation_error(rotated[step.tensor], known, sizes))
        sides = (apart, key.abs()) if step.out == attend.query else (query.abs(), apart[:, heads])
        moved += slope.abs() * math.log2(math.e) * torch.einsum("bhid,bhjd->bhij", *sides)
    change = 2 * math.log(2) * moved * share
    if attend.norm.weights:
        rounding = next(step for step in steps if step.out == attend.value)
        powers = torch.log2(rounding.parts(known[rounding.tensor].double())[1])
        change += _steps_near_an_edge(exponents, moved, int(powers.max() - powers.min())) * share
        sum_unit = MATRIX_UNIT if on_gpu else single
        change += sum_unit * (math.ceil(key.shape[2] / TERMS) + 2) * share
    visible = torch.where(exponents.isfinite(), moved, 0.0)
    return max(float(torch.einsum("bhij,bhje->bhie", change, value).max()), float(visible.max()) * math.log(2))


def rotation_error(position: Position, known: dict[str, torch.Tensor], sizes: dict[str, int]) -> torch.Tensor:
    """How far a rotated element in float32 may be from the exact one: cos, sin, two products and their sum."""
    x = known[position.tensor].double()
    single = torch.finfo(torch.float32).eps
    grid = index_grid({"b": x.shape[0], "h": 1, "i": x.shape[2], "d": position.channels}, x.device)

    def angles(dtype: torch.dtype) -> list[torch.Tensor]:
        environment = Environment(grid, sizes, known, dtype=dtype, device=x.device)
        return [evaluate(expr, environment).double() for expr in (position.cos, position.sin)]

    (cos, sin), (single_cos, single_sin) = angles(torch.float64), angles(torch.float32)
    # what float32 makes of the expressions; another library's functions may be as far off again
    apart = 2 * max(float((single_cos - cos).abs().max()), float((single_sin - sin).abs().max()))
    rotated = x[..., : position.channels].abs()
    half = position.channels // 2
    partner = rotated.roll(half, -1) if position.convention == "half" else rotated.unflatten(-1, (half, 2)).flip(-1)
    partner = partner.reshape(rotated.shape)
    # with u = eps/2 each product is off by u of itself, and their sum by u of itself
    error = single * (rotated * cos.abs() + partner * sin.abs()) + apart * (rotated + partner)
    return torch.nn.functional.pad(error, (0, x.shape[3] - position.channels))


def moved_codes(step: Quantize, x: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """How far a rounded element may move when the element before rounding has this error.

    It moves by one step where the error reaches the middle between two numbers; in int8 also with the scale, in e4m3
    by a step everywhere in a block whose largest element is so near the end of the range that the scale may be another.
    """
    single = torch.finfo(torch.float32).eps
    if step.smooth:
        terms = math.ceil(math.log2(max(x.shape[2], 2))) + 2
        mean_error = error.mean(dim=2, keepdim=True) + terms * single * x.abs().mean(dim=2, keepdim=True)
        x, error = x - x.mean(dim=2, keepdim=True), error + mean_error + single * x.abs()
    plain = Quantize("x", step.dtype, step.block)
    scale = plain.parts(x)[1].repeat_interleave(step.block, dim=2)[:, :, : x.shape[2], None]
    largest = Quantize("x", "int8", step.block).parts(x.abs())[1].repeat_interleave(step.block, dim=2)
    largest = 127 * largest[:, :, : x.shape[2], None]
    share = error.amax(dim=(2, 3), keepdim=True) / largest.clamp(min=torch.finfo(torch.float64).tiny) + single
    divisor = torch.where(scale > 0, scale, 1.0)
    place = (x / divisor).abs()
    if step.dtype == "int8":
        unit = torch.ones_like(place)
        reach, with_scale = error / divisor + place * share, x.abs() * share
    else:
        unit = torch.ldexp(torch.ones_like(place), torch.frexp(place)[1].clamp(min=-5) - 4)
        end = largest / divisor
        other = ((end - LARGEST).abs() <= end * share) | ((end - LARGEST / 2).abs() <= end * share)
        reach, with_scale = error / divisor, torch.where(other, unit * divisor, 0.0)
    distance = (place / unit - (place / unit).floor() - 0.5).abs() * unit
    near = (distance <= reach) & (reach > 0)  # a tie of a number that is known exactly goes to even everywhere
    return torch.where(near & (scale > 0), unit * divisor, 0.0) + with_scale


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
