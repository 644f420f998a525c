"""Kernels against the reference in float64: on the CPU in Triton's interpreter, on a GPU compiled."""

from __future__ import annotations

import pytest
import torch

from attncompile.codegen.triton import generate, load
from attncompile.codegen.triton.structure import why_not_spec
from tests.cases import Case
from tests.kernels.cases import ALL_CASES, ROTATED
from tests.kernels.comparison import compare
from tests.kernels.interpreter import Interpreter
from tests.kernels.neighbourhood_cases import NEIGHBOURHOODS, Neighbourhood
from tests.kernels.rotary import wrong_codes

LOWERED = tuple(case for case in ALL_CASES if why_not_spec(case.spec) is None)
USUAL_TILES = ("full", "causal-long", "channels-72-40", "grouped-everything", "scan", "scan-lengths")


def check(answer: dict[str, object]) -> None:
    assert "failure" not in answer, answer["failure"]
    outcomes = answer["outcomes"]
    assert isinstance(outcomes, list) and outcomes
    for output, error, limit, passed in outcomes:
        assert passed, f"{output} is off by {error:.3g}, allowed is {limit:.3g}"


@pytest.mark.parametrize("case", LOWERED, ids=lambda case: case.name)
def test_float32_in_many_small_blocks(case: Case, interpreter: Interpreter) -> None:
    check(interpreter.ask(case=case.name, dtype="float32", small=True))


@pytest.mark.parametrize("dtype", ("float32", "float16"))  # the interpreter cannot multiply bfloat16
@pytest.mark.parametrize("name", USUAL_TILES)
def test_usual_blocks(name: str, dtype: str, interpreter: Interpreter) -> None:
    check(interpreter.ask(case=name, dtype=dtype, small=False))


@pytest.mark.parametrize("name", ("fp8", "fp8-grouped", "int8-fp8-sinks", "int8", "rotated", "rotated-interleaved"))
def test_zero_blocks(name: str, interpreter: Interpreter) -> None:
    """A block of zeros has no largest element that could be its scale; nothing is NaN all the same."""
    check(interpreter.ask(case=name, dtype="float32", small=True, zeros=True))


def check_codes(found: object) -> None:
    """No code is another than the definition's, unless rounding decides, and it decides hardly anywhere."""
    assert isinstance(found, list) and len(found) == 2
    for each in found:
        assert each["wrong"] == 0 and each["moving"] < 2e-3, each


@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
@pytest.mark.parametrize("case", ROTATED, ids=lambda case: case.name)
def test_codes_of_rotated_tensors(case: Case, dtype: str, interpreter: Interpreter) -> None:
    answer = interpreter.ask(case=case.name, dtype=dtype, codes=True)
    assert "failure" not in answer, answer["failure"]
    check_codes(answer["codes"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", ROTATED, ids=lambda case: case.name)
def test_codes_of_rotated_tensors_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    check_codes(wrong_codes(case, dtype, "cuda"))


@pytest.mark.parametrize("row", NEIGHBOURHOODS, ids=lambda row: row.name)
def test_tokens_moved_into_boxes(row: Neighbourhood, interpreter: Interpreter) -> None:
    check(interpreter.ask(case=row.name, dtype="float32", boxes=[64, 32]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", LOWERED, ids=lambda case: case.name)
def test_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    for outcome in compare(case, load(generate(case.spec)), dtype, "cuda"):
        assert outcome.passed, (
            f"{outcome.output} is off by {outcome.error:.3g}, allowed is {outcome.limit:.3g}"
        )
