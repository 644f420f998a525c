"""Comparing generated gradients with autograd through the reference in float64."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from attncompile.codegen.triton import generate, load
from attncompile.codegen.triton.backward import generate_backward
from attncompile.codegen.triton.cache import load_module
from attncompile.codegen.triton.generate import GeneratedModule
from attncompile.ir import Spec
from attncompile.kernels.operators import with_log_sum_exp
from tests.cases import Case
from tests.kernels.comparison import Outcome, distance, poisoned_inputs, poisoned_memory, rows_with_keys, spread

Tensors = dict[str, torch.Tensor]


@contextlib.contextmanager
def poisoned_results() -> Iterator[None]:
    """``torch.empty`` and ``torch.empty_like`` give NaN, so that what a kernel fails to write shows."""
    plain = torch.empty_like

    def empty_like(*arguments: Any, **options: Any) -> torch.Tensor:
        made = plain(*arguments, **options)
        return made.fill_(math.nan if made.is_floating_point() else 77)

    with poisoned_memory(), mock.patch.object(torch, "empty_like", empty_like):
        yield


def reference_gradients(spec: Spec, tensors: Tensors, given: list[torch.Tensor], dtype: torch.dtype) -> Tensors:
    """Gradients of the real inputs by autograd; rows without a visible key count for nothing."""
    attend = spec.attend()
    assert attend is not None
    # a softmax of nothing but −∞ has a gradient of NaN; zeros have none
    norm = dataclasses.replace(attend.norm, empty="zero")
    spec = dataclasses.replace(spec, operations=(dataclasses.replace(attend, norm=norm),))
    shown = rows_with_keys(spec, tensors)
    leaves = {n: t.to(dtype).requires_grad_() if t.is_floating_point() else t for n, t in tensors.items()}
    real = [name for name, tensor in leaves.items() if tensor.requires_grad]
    outputs = spec.interpret(leaves, dtype)
    weighted = []
    for output, gradient in zip(outputs, given, strict=True):
        gradient = gradient.to(output.dtype)
        if shown is not None and gradient.dim() == 4:
            gradient = torch.where(shown[..., None], gradient, 0.0)
        weighted.append(gradient)
    found = torch.autograd.grad(outputs, [leaves[n] for n in real], weighted, allow_unused=True)
    return {
        name: torch.zeros_like(leaves[name]) if gradient is None else gradient
        for name, gradient in zip(real, found, strict=True)
    }


def compare_backward(
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    tiles: tuple[int, int, int, int] | None = None,
    *,
    make: Callable[[Spec], GeneratedModule] = generate_backward,
    place: Callable[[Spec, Tensors], list[torch.Tensor]] = poisoned_inputs,
) -> list[Outcome]:
    """Run forward and backward kernels on a row's inputs, with poison around them, and measure each gradient.

    Args:
        case: the row.
        dtype: of the real inputs.
        device: where to run.
        tiles: blocks, warps and stages instead of the usual ones.
        make: the module with the gradients of a Spec.
        place: lays the inputs out in memory.
    """
    spec = case.spec
    tensors = {name: tensor.to(device) for name, tensor in case.tensors(0, dtype).items()}
    training = with_log_sum_exp(spec)
    backward = load_module(make(spec))
    tables = [table for name, table in vars(backward).items() if name.startswith("TILES_")]
    usual = [dict(table) for table in tables]
    inputs = place(spec, tensors)
    generator = torch.Generator().manual_seed(1)
    with poisoned_results():
        made = _tuple(load(generate(training))(*inputs))
        given = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in made[: len(spec.outputs)]]
        given = [g.to(device=device, dtype=o.dtype) for g, o in zip(given, made, strict=False)]
        results = dict(zip(training.outputs, made, strict=True))
        try:
            for table in tables:
                if tiles:
                    table[dtype] = tiles
            got = backward.attend_backward(*arguments(training, spec, given, results), *inputs)
        finally:
            for table, before in zip(tables, usual, strict=True):
                table.update(before)
    return measured_gradients(spec, tensors, given, got, dtype, results.get(training.attend().lse))


def measured_gradients(
    spec: Spec,
    tensors: Tensors,
    given: list[torch.Tensor],
    got: Sequence[torch.Tensor | None],
    dtype: torch.dtype,
    lse: torch.Tensor | None,
) -> list[Outcome]:
    """How far gradients are from the reference in float64, and how far they may be.

    Args:
        spec: what was differentiated.
        tensors: its inputs by name.
        given: gradients of its outputs.
        got: what a kernel gives for each input; ``None`` for those that are not real.
        dtype: of the real inputs.
        lse: log-sum-exp that the kernel made its weights from, if it did.
    """
    exact = reference_gradients(spec, tensors, given, torch.float64)
    plain = reference_gradients(spec, tensors, given, dtype)
    outcomes = []
    for value, gradient in zip(spec.inputs, got, strict=True):
        if value.name not in exact:
            assert gradient is None, f"{value.name} is no real tensor, but has a gradient"
            continue
        best = exact[value.name]
        assert gradient.shape == best.shape and gradient.dtype == tensors[value.name].dtype
        allowed = distance(plain[value.name], best) + slack(
            spec, tensors, given[0], dtype, value.name, best, lse
        )
        outcomes.append(Outcome(value.name, distance(gradient, best), allowed))
    return outcomes


def compare_operator(case: Case, dtype: torch.dtype) -> list[Outcome]:
    """Gradients by ``backward()`` through the operator, with the kernels registered for this device.

    Half of what could be differentiated is not: its gradient must not be computed.
    """
    from attncompile.codegen.triton.lower import backward_implementation
    from attncompile.kernels import operators

    operators.register("cpu", lambda text: load(generate(operators.parsed(text))), backward_implementation)
    spec = case.spec
    tensors = case.tensors(0, dtype)
    inputs = {name: tensor.clone() for name, tensor in tensors.items()}
    real = [name for name, tensor in inputs.items() if tensor.is_floating_point()]
    wanted = real[::2]
    for name in wanted:
        inputs[name].requires_grad_()
    outputs = _tuple(operators.run(spec, *inputs.values()))
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    assert len(outputs) == len(spec.outputs), "the log-sum-exp of training must not show"
    with poisoned_results():
        torch.autograd.backward(outputs, given)
    exact = reference_gradients(spec, tensors, given, torch.float64)
    plain = reference_gradients(spec, tensors, given, dtype)
    outcomes = []
    for name in real:
        gradient = inputs[name].grad
        assert (gradient is None) == (name not in wanted), f"{name} is wanted: {name in wanted}"
        if gradient is not None:
            allowed = slack(spec, tensors, given[0], dtype, name, exact[name], None)
            allowed += distance(plain[name], exact[name])
            outcomes.append(Outcome(name, distance(gradient, exact[name]), allowed))
    return outcomes


def arguments(training: Spec, spec: Spec, given: list[torch.Tensor], results: Tensors) -> list[torch.Tensor]:
    """What ``attend_backward`` takes before the inputs, with poison between rows."""
    attend = training.attend()
    assert attend is not None
    gradients = dict(zip(spec.outputs, given, strict=True))
    first = [spread(gradients[attend.out], 2), *([gradients[attend.lse]] if attend.lse in gradients else [])]
    return [*first, *([results[attend.out], results[attend.lse]] if attend.lse else [])]


def slack(
    spec: Spec,
    tensors: Tensors,
    given: torch.Tensor,
    dtype: torch.dtype,
    name: str,
    best: torch.Tensor,
    lse: torch.Tensor | None,
) -> float:
    """Rounding that another order of summation may add: √terms · eps · size; and that of weights made from ``lse``.

    The gradient of a logit is ``w · (p − δ)`` with ``w`` at most 1 and ``p`` and ``δ`` at most the largest
    ``|grad_out · v|``: what is rounded has that size, even where the sum is small. A captured element adds up as many
    terms as positions load it. A weight ``exp(logit − lse)`` is as far off, relatively, as its float32 exponent.
    """
    attend = spec.attend()
    assert attend is not None
    value = tensors[attend.value].detach().double()
    heads = attend.kv_heads(given.shape[1], value.device, {})
    products = torch.einsum("bhie,bhje->bhij", given.double(), value[:, heads]).abs()
    if products.numel() == 0:
        return 0.0
    terms = max(*products.shape[2:], best.shape[-1])
    if name not in (attend.query, attend.key, attend.value):
        terms = max(terms, products.numel() // best.numel())
    size = max(1.0, float(products.max()), float(best.abs().max()))
    allowed = math.sqrt(terms) * torch.finfo(dtype).eps * size
    if lse is not None and bool((finite := lse[lse.isfinite()].abs()).numel()):
        allowed += torch.finfo(torch.float32).eps * float(finite.max()) * size
    return allowed


def _tuple(found: Any) -> tuple[torch.Tensor, ...]:
    return (found,) if isinstance(found, torch.Tensor) else tuple(found)
