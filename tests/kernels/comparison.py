"""Comparing a kernel with its Spec: poisoned memory, and a tolerance that is derived.

The yardstick is the Spec's reference in float64 on the very inputs of the kernel. A kernel may be as far from
it as the plain computation in the kernel's dtype is, plus the rounding of its own sums.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from attncompile.codegen.triton.structure import logits
from attncompile.ir import Position, Quantize, Spec
from attncompile.ir.evaluate import evaluate
from attncompile.ir.expr import TRUE
from attncompile.ir.prologue import input_behind
from attncompile.ir.types import bind_sizes
from tests.cases import Case
from tests.kernels.narrow import narrow_slack


@dataclass(frozen=True)
class Outcome:
    """Largest absolute error of one output, and what is allowed."""

    output: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # NaN fails


def spread(tensor: torch.Tensor, axis_gap: int) -> torch.Tensor:
    """The same values with poison between elements of the last axis (``axis_gap`` > 1) or between rows."""
    if tensor.dim() == 0 or tensor.numel() == 0:
        return tensor
    poison: Any = math.nan if tensor.is_floating_point() else True if tensor.dtype == torch.bool else 77
    *leading, last = tensor.shape
    room = torch.full([*leading, last * axis_gap + 3], poison, dtype=tensor.dtype, device=tensor.device)
    view = room[..., 1 : 1 + last * axis_gap : axis_gap]
    return view.copy_(tensor)


def poisoned_inputs(spec: Spec, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Non-contiguous inputs in order, every other one stored as ``[b,i,h,d]``, as models do."""
    made = []
    for number, value in enumerate(spec.inputs):
        tensor = tensors[value.name]
        if tensor.dim() == 4 and number % 2 == 0:
            made.append(spread(tensor.transpose(1, 2).contiguous(), 1 + number % 4 // 2).transpose(1, 2))
        else:
            made.append(spread(tensor, 1 + number % 2))
    return made


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` gives NaN (integers: 77), so that what a kernel fails to write shows."""
    plain = torch.empty

    def empty(*arguments: Any, **options: Any) -> torch.Tensor:
        made = plain(*arguments, **options)
        return made.fill_(math.nan if made.is_floating_point() else 77)

    with mock.patch.object(torch, "empty", empty):
        yield


def rows_with_keys(spec: Spec, tensors: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Rows ``[b,h,i]`` of a softmax with a visible key; ``None`` where every row is to be compared."""
    attend = spec.attend()
    others = [step for step in spec.operations if not isinstance(step, (Quantize, Position))]
    if attend is None or attend.norm.kind != "softmax" or len(others) > 1:
        return None
    if logits(attend)[1] == TRUE:
        return None
    attend = dataclasses.replace(attend, query=input_behind(spec, attend.query), key=input_behind(spec, attend.key))
    sizes = _sizes(spec, tensors)
    environment = attend.environment(tensors, sizes, torch.float64)
    query, key = tensors[attend.query], tensors[attend.key]
    shape = (*query.shape[:3], key.shape[2])
    return evaluate(attend.mask, environment).expand(shape).any(-1)


def aligned_inputs(spec: Spec, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Non-contiguous inputs as :func:`poisoned_inputs`, but each row of an operand begins at 16 bytes."""
    made = poisoned_inputs(spec, tensors)
    attend = spec.attend()
    operands = () if attend is None else (attend.query, attend.key, attend.value)
    for number, value in enumerate(spec.inputs):
        if value.name in operands:
            tensor = tensors[value.name]
            stored = tensor.transpose(1, 2) if number % 2 == 0 else tensor
            room = torch.full([*stored.shape[:3], stored.shape[3] // 8 * 8 + 24], math.nan).to(tensor)
            view = room[..., 8 : 8 + stored.shape[3]].copy_(stored)
            made[number] = view.transpose(1, 2) if number % 2 == 0 else view
    return made


def compare(
    case: Case,
    run: Callable[..., Any],
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    place: Callable[[Spec, dict[str, torch.Tensor]], list[torch.Tensor]] = poisoned_inputs,
) -> list[Outcome]:
    """Run a kernel on a row's inputs, with poison around them, and measure each output.

    Rows without a visible key must be zeros (a log-sum-exp: −∞). ``place`` lays the inputs out in memory.
    """
    spec = case.spec
    tensors = {name: tensor.to(device) for name, tensor in case.tensors(seed, dtype).items()}
    with poisoned_memory():
        got = run(*place(spec, tensors))
    return measured(spec, tensors, got, dtype)


def measured(
    spec: Spec, tensors: dict[str, torch.Tensor], got: torch.Tensor | Sequence[torch.Tensor], dtype: torch.dtype
) -> list[Outcome]:
    """How far a kernel's outputs on these inputs are from the reference, and how far they may be.

    Args:
        got: the outputs in the order of the Spec.
        dtype: what the kernel computes in.
    """
    outputs = (got,) if isinstance(got, torch.Tensor) else got
    exact = spec.interpret(tensors, torch.float64)
    plain = spec.interpret(tensors, dtype)
    shown = rows_with_keys(spec, tensors)
    narrow = narrow_slack(spec, tensors)
    attend = spec.attend()
    taps = attend.taps if attend else ()  # these say themselves what a row without keys gives
    sizes = _sizes(spec, tensors)
    made = []
    for name, output, best, eager in zip(spec.outputs, outputs, exact, plain, strict=True):
        assert output.shape == best.shape, f"{name} is {tuple(output.shape)}, should be {tuple(best.shape)}"
        best, eager = best.clone(), eager.double()
        if shown is not None and name not in taps:
            empty = ~shown.reshape(*shown.shape, *[1] * (best.dim() - 3)).expand_as(best)
            best[empty] = 0.0 if best.dim() == 4 else -math.inf
            eager = torch.where(empty, best, eager)
        allowed = distance(eager, best) + slack(spec, sizes, dtype, output.dtype, best) + narrow
        if attend is not None and name == attend.mass:
            allowed += _exponents(spec, tensors) * max(1.0, float(best.max()))
        made.append(Outcome(name, distance(output, best), allowed))
    return made


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest absolute difference; equal infinities are no distance, a NaN is NaN."""
    left = left.double()
    return float(torch.where(left == right, 0.0, (left - right).abs()).max()) if left.numel() else 0.0


def slack(
    spec: Spec, sizes: Mapping[str, int], dtype: torch.dtype, stored: torch.dtype, best: torch.Tensor
) -> float:
    """Rounding that the order of summation and storing the result may add: √terms · eps · size."""
    terms = max([sizes.get("J", 1), sizes.get("I", 1), *(_constant_channels(spec))])
    finite = best[best.isfinite()]
    size = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    return math.sqrt(terms) * max(torch.finfo(dtype).eps, torch.finfo(stored).eps) * size


def _exponents(spec: Spec, tensors: dict[str, torch.Tensor]) -> float:
    """How far off, relatively, a weight ``exp(logit − lse)`` is: as far as its exponent in float32."""
    attend = spec.attend()
    assert attend is not None
    logits = attend.logits(tensors, _sizes(spec, tensors), torch.float64).logsumexp(-1)
    finite = logits[logits.isfinite()]  # none where no row sees a key
    return torch.finfo(torch.float32).eps * float(finite.abs().max()) if finite.numel() else 0.0


def _sizes(spec: Spec, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return dict(bind_sizes({value.name: value.type for value in spec.inputs}, tensors))


def _constant_channels(spec: Spec) -> list[int]:
    return [
        int(str(value.type.sizes[-1]))
        for value in spec.inputs
        if value.type.sizes and str(value.type.sizes[-1]).isdigit()
    ]
