"""Generated gradients against autograd in float64: in Triton's interpreter, on a GPU, and compiled ahead of time."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
import torch

from attncompile.codegen.triton.backward import generate_backward, why_not_backward
from attncompile.ir import parse_spec
from tests.cases import Case
from tests.kernels.backward_cases import BACKWARD_BY_NAME, BACKWARD_CASES
from tests.kernels.interpreter import Interpreter

USUAL_TILES = ("causal-long", "channels-72-40", "sink-logits", "slopes", "window-documents")
TABLES = ("learned-bias", "far-loads", "slopes-by-group")
THROUGH_OPERATOR = ("causal", "sink-logits", "additive-bias", "log-sum-exp", "sigmoid", "empty-rows-nan", "slopes")
SHAPES = ("causal", "sink-lse", "slopes", "learned-bias", "key-bias", "relu", "head-mask")

compiles = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"), reason="TRITON_INTERPRET replaces the compiler"
)


def check(answer: dict[str, object]) -> None:
    assert "failure" not in answer, answer["failure"]
    outcomes = answer["outcomes"]
    assert isinstance(outcomes, list) and outcomes
    for name, error, limit, passed in outcomes:
        assert passed, f"the gradient of {name} is off by {error:.3g}, allowed is {limit:.3g}"


@pytest.mark.parametrize("case", BACKWARD_CASES, ids=lambda case: case.name)
def test_float32_in_many_small_blocks(case: Case, interpreter: Interpreter) -> None:
    check(interpreter.ask(case=case.name, dtype="float32", small=True, gradients="kernels"))


@pytest.mark.parametrize("name", TABLES)
def test_tables_in_a_fixed_order(name: str, interpreter: Interpreter) -> None:
    check(interpreter.ask(case=name, dtype="float32", small=True, gradients="kernels", deterministic=True))


@pytest.mark.parametrize("dtype", ("float32", "float16"))  # the interpreter cannot multiply bfloat16
@pytest.mark.parametrize("name", USUAL_TILES)
def test_usual_blocks(name: str, dtype: str, interpreter: Interpreter) -> None:
    check(interpreter.ask(case=name, dtype=dtype, small=False, gradients="kernels"))


@pytest.mark.parametrize("name", THROUGH_OPERATOR)
def test_autograd_uses_the_kernels(name: str, interpreter: Interpreter) -> None:
    check(interpreter.ask(case=name, dtype="float32", small=False, gradients="operator"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", BACKWARD_CASES, ids=lambda case: case.name)
def test_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    from tests.kernels.backward import compare_backward

    for outcome in compare_backward(case, dtype, "cuda"):
        assert outcome.passed, f"{outcome.output} is off by {outcome.error:.3g}, allowed is {outcome.limit:.3g}"


@pytest.fixture
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCOMPILE_CACHE", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", f"{tmp_path}/compiled")


@compiles
@pytest.mark.usefixtures("_cache")
@pytest.mark.parametrize("name", SHAPES)
def test_compiles_for_sm_90(name: str) -> None:
    pytest.importorskip("triton")
    from attncompile.codegen.triton.ahead import TARGETS, compile_ahead

    target = next(target for target in TARGETS if target.arch == 90)
    for kernel in compile_ahead(generate_backward(BACKWARD_BY_NAME[name].spec), target, "bfloat16"):
        assert kernel.texts["cubin"]
        assert kernel.spills in (0, None), f"{kernel.kernel} keeps {kernel.spills} bytes on the stack"


@compiles
@pytest.mark.usefixtures("_cache")
@pytest.mark.parametrize("arch", (80, "gfx942"), ids=str)
def test_compiles_for_other_gpus(arch: int | str) -> None:
    pytest.importorskip("triton")
    from attncompile.codegen.triton.ahead import TARGETS, compile_ahead

    target = next(target for target in TARGETS if target.arch == arch)
    for name in ("slopes", "learned-bias"):
        for kernel in compile_ahead(generate_backward(BACKWARD_BY_NAME[name].spec), target, "float16"):
            assert kernel.texts["cubin" if target.backend == "cuda" else "hsaco"]
            assert kernel.shared <= (65536 if target.backend == "hip" else 163840)


@compiles
@pytest.mark.usefixtures("_cache")
@pytest.mark.parametrize("arch", (90, "gfx942"), ids=str)
@pytest.mark.parametrize("channels", (64, 128))
def test_common_head_sizes_stay_in_registers(channels: int, arch: int | str) -> None:
    """A few scalars of the prologue may lie on the stack; no tile does."""
    pytest.importorskip("triton")
    from attncompile.codegen.triton.ahead import TARGETS, compile_ahead

    spec = parse_spec(
        f"x   attend  q,k,v[B,16,I,{channels}]  bfloat16\n  score  0.125·s\n  mask   j ≤ i\n  norm   softmax (float32)"
    )
    target = next(target for target in TARGETS if target.arch == arch)
    for kernel in compile_ahead(generate_backward(spec), target, "bfloat16"):
        assert kernel.spills is None or kernel.spills <= 64
        assert kernel.shared <= (64 if target.backend == "hip" else 227) * 1024


def test_the_same_spec_gives_the_same_module() -> None:
    spec = BACKWARD_BY_NAME["sink-logits"].spec
    assert generate_backward(spec) == generate_backward(spec)


def test_gradients_that_nobody_wants_cost_nothing() -> None:
    spec = BACKWARD_BY_NAME["additive-bias"].spec
    only = generate_backward(spec, ("q",))
    assert [kernel.name for kernel in only.kernels] == ["prepare", "query_gradient"]
    assert "No gradient is computed of k, v, bias" in only.source
    assert [kernel.name for kernel in generate_backward(spec, ("v",)).kernels] == ["prepare", "key_value_gradient"]
    assert [kernel.name for kernel in generate_backward(spec, ("bias",)).kernels] == [
        "prepare",
        "bias_gradient_of_pairs",
    ]
    every = generate_backward(spec)
    assert [kernel.name for kernel in every.kernels][2:] == ["key_value_gradient", "bias_gradient_of_pairs"]


@pytest.mark.parametrize("case", BACKWARD_CASES, ids=lambda case: case.name)
def test_modules_are_python_within_the_width(case: Case) -> None:
    module = generate_backward(case.spec)
    tree = ast.parse(module.source)
    assert "∂logit/∂s" in (ast.get_docstring(tree) or "")
    code = module.source.splitlines()[tree.body[0].end_lineno :]  # the docstring has the Spec as it is printed
    assert not [line for line in code if len(line) > 120]


@pytest.mark.parametrize(
    ("name", "reason"), (("scan", "backward kernels are generated for one attend"), ("weight-edit", "not linear in w"))
)
def test_what_has_no_kernels_says_why(name: str, reason: str) -> None:
    from tests.cases import BY_NAME

    spec = BY_NAME[name].spec
    assert reason in (why_not_backward(spec) or "")
    with pytest.raises(ValueError, match="no backward kernels"):
        generate_backward(spec)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
@pytest.mark.parametrize("mask", ("true", "j ≤ i", "j ≤ i and j > i − 200"))
def test_training_on_a_gpu(mask: str, compiled: bool) -> None:
    """Forward and backward through the operator, as a model calls it, beside float64."""
    from attncompile.codegen.triton import lower
    from tests.kernels.backward import reference_gradients

    spec = parse_spec(
        f"x   attend  q,k,v[B,4,I,64]  bfloat16\n  score  0.125·s\n  mask   {mask}\n  norm   softmax (float32)"
    )
    run = lower(spec, "cuda").run
    generator = torch.Generator("cuda").manual_seed(0)
    stored = [torch.randn(2, 300, 4, 64, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(4)]
    query, key, value, given = (tensor.transpose(1, 2) for tensor in stored)
    tensors = {"q": query, "k": key, "v": value}
    leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
    called = torch.compile(lambda *operands: run(*operands) * 1.0, fullgraph=True) if compiled else run
    called(*leaves).backward(given)
    exact = reference_gradients(spec, tensors, [given], torch.float64)
    for name, leaf in zip(exact, leaves, strict=True):
        assert leaf.grad is not None
        error = float((leaf.grad.double() - exact[name]).norm() / exact[name].norm())
        assert error < 4 * torch.finfo(torch.bfloat16).eps, f"the gradient of {name} is off by {error:.3g}"
