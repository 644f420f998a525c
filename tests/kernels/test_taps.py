"""What kernels tell of the weights without storing them, in Triton's interpreter beside the reference in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attncompile.codegen.gluon import why_not_spec as why_not_gluon
from attncompile.codegen.pytorch import lower as lower_to_pytorch
from attncompile.codegen.pytorch import why_not as why_not_pytorch
from attncompile.codegen.triton import generate, load
from attncompile.codegen.triton.structure import why_not_spec
from attncompile.ir import parse_spec, print_spec
from attncompile.kernels import operators
from attncompile.passes import parse_passes, run_passes
from tests.cases import Case
from tests.kernels.comparison import compare
from tests.kernels.interpreter import Interpreter
from tests.kernels.taps_cases import TAPS, TAPS_BY_NAME

FORMS = (
    *((name, "float32", True) for name in TAPS_BY_NAME),
    *((name, "float16", True) for name in ("taps-causal", "taps-sinks", "taps-edited")),
    ("taps-documents", "float32", False),
)


@pytest.mark.parametrize("name, dtype, small", FORMS)
def test_taps(name: str, dtype: str, small: bool, interpreter: Interpreter) -> None:
    answer = interpreter.ask(case=name, dtype=dtype, small=small)
    assert "failure" not in answer, answer.get("failure")
    assert all(passed for *_, passed in answer["outcomes"]), answer["outcomes"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("row", TAPS, ids=lambda row: row.name)
def test_on_a_gpu(row: Case, dtype: torch.dtype) -> None:
    for sizes in ({}, {"B": 1, "I": 1, "J": 1}, {"B": 1, "I": 300, "J": 700}):
        case = dataclasses.replace(row, sizes={**row.sizes, **sizes})
        for outcome in compare(case, load(generate(case.spec)), dtype, "cuda"):
            assert outcome.passed, (case.sizes, outcome)


def test_definitions_by_hand() -> None:
    """Three keys with logits 0, ln 2 and −∞ for the first query, nothing visible for the second."""
    spec = parse_spec(
        "x   attend  q[B,1,I,1]  k,v[B,1,J,1]  float64\n  score  s\n  mask   shown[i, j]\n  norm   softmax (float64)\n"
        "  peak   highest\n  entropy spread\n  mass   got\n  given  shown[I,J]:bool\n  gives  highest, spread, got"
    )
    log = torch.log(torch.tensor(2.0, dtype=torch.float64))
    key = torch.tensor([0.0, float(log), 5.0], dtype=torch.float64).view(1, 1, 3, 1)
    shown = torch.tensor([[True, True, False], [False, False, False]])
    query = torch.ones(1, 1, 2, 1, dtype=torch.float64)
    tensors = {"q": query, "k": key, "v": key, "shown": shown}
    highest, spread, got = spec.interpret(tensors, torch.float64)
    third = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64) / 3
    assert torch.equal(highest, torch.tensor([[[log, -torch.inf]]], dtype=torch.float64))
    entropy = -(third[:2] * third[:2].log()).sum()
    torch.testing.assert_close(spread, torch.stack([entropy, torch.zeros_like(entropy)]).view(1, 1, 2))
    torch.testing.assert_close(got, third.view(1, 1, 3))


def test_printed_form_reads_back() -> None:
    for row in TAPS:
        assert parse_spec(print_spec(row.spec)) == row.spec


def test_what_is_not_wanted_is_not_computed() -> None:
    source = generate(TAPS_BY_NAME["taps-mass-alone"].spec).source
    assert "column_mass" in source and "moment" not in source and "peaks" not in source
    source = generate(TAPS_BY_NAME["taps-with-lse"].spec).source
    assert "column_mass" not in source and "moment" in source and "peaks" not in source


def test_who_refuses() -> None:
    spec = TAPS_BY_NAME["taps-causal"].spec
    assert why_not_spec(spec) is None
    assert "highest, spread, got would take registers" in (why_not_gluon(spec) or "")
    for operator in ("sdpa", "flex", "blockwise"):
        assert "highest, spread, got" in (why_not_pytorch(spec, "cpu", operator) or ""), operator
    lowering = lower_to_pytorch(spec, "cpu")
    assert lowering.operator == "reference"
    given = dataclasses.replace(TAPS_BY_NAME["taps-causal"], sizes={"B": 1, "I": 5, "J": 7})
    found = lowering.run(*given.tensors(0, torch.bfloat16).values())
    assert [each.dtype for each in found] == [torch.bfloat16, *[torch.float32] * 3]
    smoothed = run_passes(spec, parse_passes("quantize.int8"))
    assert not smoothed.applied and "moves the peak" in str(smoothed.refused)
    rounded = run_passes(spec, parse_passes("quantize.int8(smooth=false)"))
    assert rounded.applied and "of one attend alone" in (why_not_spec(rounded.spec) or "")
    with pytest.raises(ValueError, match="only a softmax whose weights are not rounded has taps"):
        parse_spec("x   attend  q,k,v[B,2,I,8]  float32\n  score  s\n  norm   relu (float32)\n  mass   got")


def test_taps_have_no_gradient(registrations: None) -> None:
    operators.use_reference("cpu")
    spec = TAPS_BY_NAME["taps-causal"].spec
    case = dataclasses.replace(TAPS_BY_NAME["taps-causal"], sizes={"B": 1, "I": 5, "J": 7})
    tensors = [tensor.requires_grad_() for tensor in case.tensors(0, torch.float32).values()]
    out, _, _, got = operators.run(spec, *tensors)
    torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    with pytest.raises(RuntimeError, match="has no gradient: detach it"):
        torch.autograd.grad(got.sum(), tensors)
