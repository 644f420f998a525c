"""The Spec operator: shapes without data, tracing, export, gradients; on the CPU through the reference."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator, Sequence

import pytest
import torch

from attncompile.kernels import operators
from tests.cases import BY_NAME, CASES, Case
from tests.kernels.decode_cases import DECODE_BY_NAME

GRADIENTS = (
    "causal",
    "gqa",
    "additive-bias",
    "head-mask",
    "sigmoid",
    "log-sum-exp",
    "scan",
    "scan-lengths",
    "value-channels",
    "softcap",
)


@pytest.fixture(autouse=True)
def _on_the_cpu(registrations: None) -> Iterator[None]:
    operators.use_reference("cpu")
    yield
    operators._say_recomputed.cache_clear()


def inputs(case: Case, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    tensors = case.tensors(dtype=dtype)
    return [tensors[value.name] for value in case.spec.inputs]


@pytest.mark.parametrize("operator", ["run", "infer"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fake_results_are_like_real_ones(case: Case, operator: str) -> None:
    torch.library.opcheck(
        getattr(torch.ops.attncompile, operator).default,
        (str(case.spec), inputs(case)),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_the_reference(name: str) -> None:
    case = BY_NAME[name]
    given = [t.requires_grad_() if t.is_floating_point() else t for t in inputs(case, torch.float64)]
    real = [t for t in given if t.is_floating_point()]
    found = operators.run(case.spec, *given)
    outputs = (found,) if isinstance(found, torch.Tensor) else found
    weights = [torch.randn_like(o) for o in outputs]
    got = torch.autograd.grad([(o * w).sum() for o, w in zip(outputs, weights, strict=True)], real)
    named = {v.name: t for v, t in zip(case.spec.inputs, given, strict=True)}
    exact = case.spec.interpret(named, torch.float64)
    expected = torch.autograd.grad([(o * w).sum() for o, w in zip(exact, weights, strict=True)], real)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_pass_rows_without_keys() -> None:
    case = BY_NAME["empty-rows-nan"]
    given = [t.requires_grad_() if t.is_floating_point() else t for t in inputs(case)]
    found = operators.run(case.spec, *given)
    assert isinstance(found, torch.Tensor)
    found.backward(torch.ones_like(found))
    for tensor in given:
        if tensor.is_floating_point():
            assert tensor.grad is not None and bool(tensor.grad.isfinite().all())


def test_an_unused_result_needs_no_gradient() -> None:
    case = BY_NAME["log-sum-exp"]
    given = [t.requires_grad_() for t in inputs(case)]
    out, _ = operators.run(case.spec, *given)
    out.sum().backward()
    assert given[0].grad is not None


def test_rounding_passes_gradients_through() -> None:
    case = BY_NAME["int8"]
    given = [t.requires_grad_() for t in inputs(case)]
    found = operators.run(case.spec, *given)
    assert isinstance(found, torch.Tensor)
    found.square().sum().backward()
    assert all(t.grad is not None and float(t.grad.abs().sum()) > 0 for t in given)


def test_compiles_whole_with_any_length() -> None:
    run = operators.bind(BY_NAME["gqa"].spec)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def model(*tensors: torch.Tensor) -> torch.Tensor:
        found = run(*tensors)
        assert isinstance(found, torch.Tensor)
        return found.transpose(1, 2).flatten(2) * 2

    for length in (13, 29):
        given = [torch.randn(2, heads, length, 16, requires_grad=True) for heads in (6, 2, 2)]
        found = model(*given)
        exact = run(*given)
        assert isinstance(exact, torch.Tensor)
        torch.testing.assert_close(found, exact.transpose(1, 2).flatten(2) * 2)
        found.sum().backward()
        assert given[0].grad is not None


def _with_backward(seen: list[tuple[str, int]]) -> None:
    """Register a backward for the CPU that says what it was asked, and computes it by the reference."""

    def backward(text: str) -> operators.Backward:
        def run(
            wanted: tuple[str, ...],
            gradients: Sequence[torch.Tensor],
            inputs: Sequence[torch.Tensor],
            outputs: Sequence[torch.Tensor],
        ) -> list[torch.Tensor | None]:
            seen.append((",".join(wanted), len(outputs)))
            return operators._recomputed(operators.parsed(text), gradients, inputs)

        return run

    operators.register("cpu", operators._reference, backward)


@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
def test_a_backward_of_the_device_gets_the_log_sum_exp_and_what_is_wanted(compiled: bool) -> None:
    seen: list[tuple[str, int]] = []
    _with_backward(seen)
    run = operators.bind(BY_NAME["gqa"].spec)

    def model(*tensors: torch.Tensor) -> torch.Tensor:
        found = run(*tensors)
        assert isinstance(found, torch.Tensor)
        return found * 2

    called = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager") if compiled else model
    query, key, value = (torch.randn(2, heads, 13, 16) for heads in (6, 2, 2))
    query.requires_grad_()
    value.requires_grad_()
    called(query, key, value).square().sum().backward()
    assert seen == [("q,v", 2)]
    assert query.grad is not None and value.grad is not None and key.grad is None
    with torch.no_grad():
        assert called(query, key, value).shape == (2, 6, 13, 16)


def test_why_gradients_are_recomputed() -> None:
    spec = BY_NAME["scan"].spec
    assert "no backward kernels for cpu" in (operators.why_recomputed(spec, "cpu") or "")
    operators.register("cpu", operators._reference, lambda text: "it is a scan")
    assert operators.why_recomputed(spec, "cpu") == "it is a scan"
    given = [t.requires_grad_() for t in inputs(BY_NAME["scan"])]
    found = operators.run(spec, *given)
    assert isinstance(found, torch.Tensor)
    with pytest.warns(UserWarning, match="computed by its reference.*it is a scan"):
        found.sum().backward()


def test_exports() -> None:
    case = BY_NAME["padding"]
    run = operators.bind(case.spec)

    class Model(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            found = run(*tensors)
            assert isinstance(found, torch.Tensor)
            return found

    given = tuple(inputs(case))
    program = torch.export.export(Model(), given)
    torch.testing.assert_close(program.module()(*given), Model()(*given))


def test_a_wrong_number_of_tensors_is_named() -> None:
    with pytest.raises(ValueError, match="takes 3 tensors"):
        operators.run(BY_NAME["causal"].spec, torch.zeros(1, 4, 2, 16))


def test_a_device_without_implementation_is_named() -> None:
    operators._implementations.pop("cpu")
    operators._resolved.cache_clear()
    with pytest.raises(RuntimeError, match="nothing computes Specs on cpu"):
        operators.run(BY_NAME["causal"].spec, *inputs(BY_NAME["causal"]))


def test_the_operator_s_argument_is_one_line_and_pickles() -> None:
    """Inductor prints it into a line of the code it generates, and pickles what it compiles for its cache."""
    spec = BY_NAME["causal"].spec
    bound = operators.bind(spec)
    assert "\n" not in bound.text and operators.parsed(bound.text).fingerprint() == spec.fingerprint()
    assert pickle.loads(pickle.dumps(bound)) == bound


def test_codes_are_no_real_numbers_wherever_they_stand_among_the_inputs() -> None:
    case = DECODE_BY_NAME["float8"]
    codes_first = sorted(case.spec.inputs, key=lambda value: value.type.dtype != "float8_e4m3")
    spec = dataclasses.replace(case.spec, inputs=tuple(codes_first))
    tensors = case.tensors(dtype=torch.float32)
    given = [tensors[value.name].requires_grad_(value.name == "q") for value in spec.inputs]
    assert given[0].dtype is torch.float8_e4m3fn
    found = operators.run(spec, *given)
    assert isinstance(found, torch.Tensor)
    (expected,) = spec.interpret(tensors, torch.float32)
    assert torch.allclose(found, expected, rtol=0, atol=64 * torch.finfo(torch.float32).eps)
    (gradient,) = torch.autograd.grad(found.sum(), [given[[v.name for v in spec.inputs].index("q")]])
    assert bool(gradient.isfinite().all()) and bool(gradient.any())
