"""The ways in which people train: checkpoints, accumulation, frozen parameters, autocast, several processes."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attncompile
from attncompile import backend
from attncompile.backend import FallbackWarning
from attncompile.codegen.lowering import Lowering
from attncompile.ir import Spec
from attncompile.kernels import operators
from attncompile.verify import derive_tolerance, require_within
from tests.backend.test_backend import small_llama, tokens

Gradients = dict[str, torch.Tensor]
LENGTHS = (9, 10)
"""Of the calls of a step."""


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_of(run: Callable[..., Any], length: int) -> torch.Tensor:
    """The mean square of what a decoder gives for the tokens that are there."""
    call = tokens(2, length, "right")
    return (run(**call).logits * call["attention_mask"][..., None]).square().mean()


def gradients(
    run: Callable[..., Any],
    model: nn.Module,
    lengths: tuple[int, ...] = LENGTHS[:1],
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Gradients:
    """Gradients by parameter, summed over calls of these lengths."""
    model.zero_grad()
    for length in lengths:
        with around():
            loss = loss_of(run, length)
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def require_equal(found: Gradients, eager: Gradients, exact: Gradients, dtype: torch.dtype = torch.float32) -> None:
    """As near to float64 as eager is, but for one sum more over the tokens."""
    assert found.keys() == eager.keys() == exact.keys()
    for name, reference in exact.items():
        terms = sum(2 * length for length in LENGTHS)
        tolerance = derive_tolerance(reference, eager[name].to(dtype), terms)
        require_within(found[name], reference, tolerance.bound, name)


def rewritten(compiled: Callable[..., Any]) -> bool:
    """Whether every site that was found is computed by an operator."""
    sites = attncompile.explain(compiled).sites
    return bool(sites) and all(site.operator != "original" for site in sites)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks(reentrant: bool) -> None:
    model = small_llama().train()
    wide = copy.deepcopy(model).double()
    exact, eager = gradients(wide, wide), gradients(model, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    compiled = attncompile.compile(model, rest="eager")
    require_equal(gradients(compiled, model), eager, exact)
    assert rewritten(compiled) and len(attncompile.explain(compiled).sites) == 2


def test_accumulated_gradients() -> None:
    model = small_llama().train()
    wide = copy.deepcopy(model).double()
    compiled = attncompile.compile(model, rest="eager")
    require_equal(
        gradients(compiled, model, LENGTHS), gradients(model, model, LENGTHS), gradients(wide, wide, LENGTHS)
    )
    assert rewritten(compiled)


@pytest.mark.parametrize("frozen", [("q_proj",), ("v_proj",), ("embed", "norm", "q_proj", "k_proj", "v_proj")])
def test_frozen_parameters(frozen: tuple[str, ...]) -> None:
    model = small_llama().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    wide = copy.deepcopy(model).double()
    compiled = attncompile.compile(model, rest="eager")
    require_equal(gradients(compiled, model), gradients(model, model), gradients(wide, wide))
    assert rewritten(compiled)


@pytest.mark.parametrize("attention", ["eager", pytest.param("sdpa", marks=pytest.mark.slow)])
def test_autocast_to_bfloat16(attention: str) -> None:
    def around() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    model = small_llama(attention).train()
    wide = copy.deepcopy(model).double()
    compiled = attncompile.compile(model, rest="eager")
    found = gradients(compiled, model, around=around)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    require_equal(found, gradients(model, model, around=around), gradients(wide, wide), torch.bfloat16)
    assert rewritten(compiled)


def test_autocast_holds_for_operators_that_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[torch.dtype, ...]] = set()
    natives: list[torch.dtype] = []

    def chosen(spec: Spec, device: str) -> Lowering:
        def run(*tensors: torch.Tensor) -> torch.Tensor:
            operands = [t for t in tensors if t.is_floating_point() and t.dim() == 4]
            seen.add(tuple(tensor.dtype for tensor in operands))
            with torch.autocast("cpu", enabled=False):
                out = operators.run(spec, *tensors)
            assert isinstance(out, torch.Tensor)
            natives.append(out.dtype)
            return out

        return Lowering("test", "kernel", "", None, run)

    monkeypatch.setattr(backend, "choose_lowering", chosen)
    model = small_llama().train()
    compiled = attncompile.compile(model, rest="eager")
    eager = gradients(model, model, around=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    found = gradients(compiled, model, around=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    wide = copy.deepcopy(model).double()
    require_equal(found, eager, gradients(wide, wide), torch.bfloat16)
    assert seen == {(torch.bfloat16,) * 3} and set(natives) == {torch.bfloat16}
    seen.clear()
    torch._dynamo.reset()
    gradients(attncompile.compile(model, rest="eager"), model)
    assert seen == {(torch.float32,) * 3}


def test_inference_before_training_and_between() -> None:
    model = small_llama().eval()
    wide = copy.deepcopy(model).double()
    compiled = attncompile.compile(model, rest="eager")
    call = tokens(2, 9, "right")
    kept = call["attention_mask"].bool()
    for _ in range(2):
        with torch.inference_mode():
            exact, eager, found = (run(**call).logits[kept] for run in (wide, model, compiled))
            require_within(found, exact, derive_tolerance(exact, eager, model.config.hidden_size).bound, "logits")
        require_equal(gradients(compiled, model), gradients(model, model), gradients(wide, wide))
    assert rewritten(compiled)


def test_gradients_of_gradients_are_refused() -> None:
    model = small_llama().train()
    compiled = attncompile.compile(model, rest="eager")
    first = torch.autograd.grad(loss_of(compiled, 9), list(model.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
        torch.stack([gradient.square().sum() for gradient in first]).sum().backward()


def test_a_compiled_function_that_differentiates_inside_says_so() -> None:
    model = small_llama().train()
    parameters = dict(model.named_parameters())

    call = tokens(2, 9, "right")

    def loss(given: Gradients) -> torch.Tensor:
        return torch.func.functional_call(model, given, (), call).logits.square().mean()

    expected = torch.func.grad(loss)(parameters)
    compiled = attncompile.compile(torch.func.grad(loss), rest="eager")
    with pytest.warns(FallbackWarning, match=r"grad of torch\.func"):
        found = compiled(parameters)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    (compilation,) = attncompile.explain(compiled).compilations
    assert not compilation.sites and "grad of torch.func" in compilation.said[0]


class Tripled(torch.autograd.Function):
    """Squares, and says that the derivative is three times what it is."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x.clone())
        ctx.factor = factor
        return x * x, x + 1

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> tuple[torch.Tensor, None]:
        return given[0] * ctx.saved_tensors[0] * ctx.factor + given[1], None


def with_own_gradients(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention between functions with gradients of their own, one of whose operands is written to afterwards."""
    squared, more = Tripled.apply(query, 6.0)
    key = key * 1
    keys, _ = Tripled.apply(key, 3.0)
    key.add_(1)
    return torch.softmax(squared @ keys.transpose(-1, -2), dim=-1) @ value * more.sum() + key.sum()


@pytest.mark.parametrize(
    ("rest", "dynamic"),
    [
        ("eager", False),
        ("eager", True),
        ("inductor", False),
        pytest.param("inductor", True, marks=pytest.mark.slow),
    ],
)
def test_functions_with_gradients_of_their_own_keep_them(rest: str, dynamic: bool) -> None:
    operands = [torch.randn(2, 2, 5, 8) for _ in range(3)]
    compiled = attncompile.compile(with_own_gradients, rest=rest, dynamic=dynamic)

    def of(run: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        given = [operand.to(dtype).requires_grad_() for operand in operands]
        run(*given).square().sum().backward()
        return [tensor.grad for tensor in given if tensor.grad is not None]

    exact, eager = of(with_own_gradients, torch.float64), of(with_own_gradients, torch.float32)
    for found, wide, plain in zip(of(compiled, torch.float32), exact, eager, strict=True):
        require_within(found, wide, derive_tolerance(wide, plain, operands[0].numel()).bound, "gradient")
    assert rewritten(compiled)


def hidden_by_index(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Scores that are hidden where a map says, in place, as much research code does."""
    logits = query @ key.transpose(-1, -2)
    logits *= 0.3
    logits[:, :, torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)] = -torch.inf
    return torch.softmax(logits, dim=-1) @ value


@pytest.mark.parametrize("dynamic", [False, True])
def test_scores_that_are_written_through_a_view_train(dynamic: bool) -> None:
    """Autograd then makes their views again, of tensors that exist only in the trace; nothing reads those."""
    operands = [torch.randn(2, 2, 5, 8) for _ in range(3)]
    compiled = attncompile.compile(hidden_by_index, rest="eager", dynamic=dynamic)

    def of(run: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        given = [operand.to(dtype).requires_grad_() for operand in operands]
        # a view, as of a projection
        run(*(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in given)).square().sum().backward()
        return [tensor.grad for tensor in given if tensor.grad is not None]

    exact, eager = of(hidden_by_index, torch.float64), of(hidden_by_index, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        given = of(compiled, torch.float32)
    for found, wide, plain in zip(given, exact, eager, strict=True):
        require_within(found, wide, derive_tolerance(wide, plain, operands[0].numel()).bound, "gradient")
    assert rewritten(compiled)


class Clipped(nn.Module):
    """Clips a weight in place before it is used, as Gemma 3n does in training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.project.weight.data.clamp_(-0.1, 0.1)
        y = self.project(x)
        return torch.softmax(y @ y.transpose(-1, -2), dim=-1) @ y


def test_memory_that_no_graph_holds_is_said_and_written() -> None:
    model, other, x = Clipped(), Clipped(), torch.randn(2, 5, 8)
    compiled = attncompile.compile(model, rest="eager")
    with pytest.warns(FallbackWarning, match=r"clamp_ works on memory .*such as that of x.data \(at .*data.clamp_"):
        found = compiled(x)
    torch.testing.assert_close(found, other(x))
    assert torch.equal(model.project.weight, other.project.weight) and model.project.weight.abs().max() <= 0.1


# --- several processes ----------------------------------------------------------------------------------------


def work(rank: int, store: str, results: Any) -> None:
    """One of two processes: a step on its own tokens, with the model compiled before and after it is wrapped."""
    torch.set_num_threads(1)
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 4000  # so that so small a model has several buckets
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    wrap = torch.nn.parallel.DistributedDataParallel
    for order in ("compiled, then wrapped", "wrapped, then compiled"):
        torch._dynamo.reset()
        model = small_llama().train()
        if order == "compiled, then wrapped":
            compiled = attncompile.compile(model, rest="eager")
            run: Callable[..., Any] = wrap(compiled, bucket_cap_mb=0.005)
        else:
            run = compiled = attncompile.compile(wrap(model, bucket_cap_mb=0.005), rest="eager")
        found = gradients(run, model, (LENGTHS[rank],))
        results.put((rank, order, rewritten(compiled), {name: value.tolist() for name, value in found.items()}))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_get_the_mean_of_their_gradients() -> None:
    processes = multiprocessing.get_context("spawn")
    results = processes.Queue()
    with tempfile.TemporaryDirectory() as folder:
        started = [
            processes.Process(target=work, args=(rank, str(Path(folder) / "store"), results)) for rank in range(2)
        ]
        for process in started:
            process.start()
        found = [results.get(timeout=300) for _ in range(4)]
        for process in started:
            process.join(timeout=60)
    model = small_llama().train()
    wide = copy.deepcopy(model).double()
    eager, exact = (
        {name: gradient / 2 for name, gradient in gradients(one, one, LENGTHS[:2]).items()} for one in (model, wide)
    )
    for _, _, every, given in found:
        assert every
        require_equal({name: torch.tensor(value) for name, value in given.items()}, eager, exact)
    assert {(rank, order) for rank, order, _, _ in found} == {
        (rank, order) for rank in range(2) for order in ("compiled, then wrapped", "wrapped, then compiled")
    }


def test_passes_that_do_not_serve_training_are_left_out_of_it() -> None:
    """Rounding has no gradient that anybody wants: where gradients are recorded nothing is rounded, with a warning."""
    model, exact = small_llama("sdpa"), small_llama("sdpa").double()
    compiled = attncompile.compile(model, passes="quantize.int8", rest="eager", dynamic=False)
    with pytest.warns(FallbackWarning, match=r"quantize.int8 does not apply .* call it under torch.no_grad"):
        found = gradients(compiled, model)
    plain = small_llama("sdpa")
    require_equal(found, gradients(plain, plain), gradients(exact, exact))
    with torch.no_grad():
        compiled(**tokens(2, 12))
    assert "pass quantize.int8\n" in str(attncompile.explain(compiled))
