"""Masks that are added to the scores: a row that sees hidden keys alone is zeros or a mean, never anything else.

Exponents are a product with log2(e) minus the row's greatest one, in one instruction on a GPU: beside a number of 1e10
what that instruction does not round is more than any weight holds. The interpreter rounds, so only a card shows that.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from attncompile.codegen.gluon import generate as generate_hopper
from attncompile.codegen.triton import generate
from attncompile.codegen.triton.cache import load, load_module
from attncompile.codegen.triton.lower import on_hopper
from attncompile.ir import Spec
from tests.codegen.hopper_on_cpu import run_on_cpu
from tests.kernels.hiding import BY_KEY, BY_PAIR, NUMBERS, errors, hiding_spec
from tests.kernels.interpreter import Interpreter

PLACES = {"key": BY_KEY, "pair": BY_PAIR}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("queries", (70, 3))
@pytest.mark.parametrize("place", PLACES)
def test_plain_kernels(place: str, queries: int, number: str, interpreter: Interpreter) -> None:
    """Three queries are those of the decode kernel."""
    answer = interpreter.ask(hiding=PLACES[place], number=number, queries=queries, dtype="float16")
    assert answer == {"wrong": []}, answer


@pytest.mark.parametrize("number", NUMBERS)
def test_a_sum_that_is_scaled(number: str, interpreter: Interpreter) -> None:
    answer = interpreter.ask(hiding=BY_KEY, score="0.001·(s + {0})", number=number, queries=40, dtype="float16")
    assert answer == {"wrong": []}, answer


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("place", PLACES)
def test_the_hopper_kernel(place: str, number: str) -> None:
    spec = hiding_spec(PLACES[place])
    module = generate_hopper(spec)
    assert not errors(spec, lambda *tensors: run_on_cpu(module, tensors), float(number), torch.bfloat16)


def test_scores_that_hide_nothing_are_left_alone() -> None:
    """No instruction where every score is a real one: numbers of heads and rows, small constants."""
    for score in ("0.125·s + exp2(−0.5·h)·float(j − i)", "0.125·s·bias[b, i]", "0.125·s − 10000.0"):
        spec = hiding_spec(("", "bias[B,J]:float32"), score)
        assert all("logits * 1.17" not in make(spec).source for make in (generate, generate_hopper))


@pytest.mark.gpu
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_on_a_gpu(place: str, dtype: torch.dtype, number: str) -> None:
    def wrong(spec: Spec, make: object) -> list[str]:
        return errors(spec, load(make(spec)), float(number), dtype, "cuda")  # type: ignore[operator]

    for channels in (32, 64, 128):
        spec = hiding_spec(PLACES[place], channels=channels)
        assert not wrong(spec, generate), channels
        if dtype != torch.float32 and on_hopper(torch.device("cuda")):
            assert not wrong(spec, generate_hopper), channels
        module = load_module(generate(spec))
        with mock.patch.multiple(module, LEAST_TILES=1, LONG_CACHE=0):
            assert not errors(spec, module.attend, float(number), dtype, "cuda", queries=3), channels
