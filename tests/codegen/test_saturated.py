"""Relative biases that are one number far from the diagonal, in kernels for Hopper GPUs, run on a CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from attncompile.codegen.gluon import generate, slower
from attncompile.codegen.triton.saturated import Saturated
from attncompile.ir.expr import Size
from tests.cases import Case
from tests.codegen.hopper_on_cpu import run_on_cpu
from tests.kernels.comparison import measured

CAUSAL, WINDOW = "j ≤ i", "j ≤ i and j > i − 3000"
BY_HEAD = "table[h, max(0, min(i − j, 70))]"


def _case(bias: str, mask: str, sizes: str, given: str = "table[2,71]:float32", length: int = 390) -> Case:
    text = (
        f"x   attend  q[B,2,I,16]  k,v[B,2,{sizes},16]  bfloat16\n  score  0.25·s + {bias}\n  mask   {mask}\n"
        f"  norm   softmax (float32)\n  given  {given}"
    )
    return Case("x", text, {"B": 2, "I": length, "J": length})


@pytest.mark.parametrize(
    "bias, mask, given, far",
    [
        (BY_HEAD, CAUSAL, "table[2,71]:float32", "table[h, 70]"),
        (BY_HEAD, WINDOW, "table[2,71]:float32", "table[h, 70]"),
        ("table[max(−40, j − i) + 40]", CAUSAL, "table[41]:float32", "table[0]"),
        ("table[h, min(max(j − i, −64), 64) + 64]", CAUSAL, "table[2,129]:float32", "table[h, 0]"),
        ("table[h, min(i // 16 − j // 16, 9)]", CAUSAL, "table[2,10]:float32", "table[h, 9]"),
        (BY_HEAD, "true", "table[2,71]:float32", "table[h, 70]"),
        ("table[h, min(max(j − i, −64), 64) + 64]", "true", "table[2,129]:float32", "table[h, 0]"),
        ("table[h, max(0, min(i − j, 1500))]", "true", "table[2,1501]:float32", None),
        (BY_HEAD, "j ≤ i and j > i − 128", "table[2,71]:float32", None),
        ("table[h, max(0, i − j)]", CAUSAL, "table[2,I]:float32", None),
        (BY_HEAD, "j ≤ i and kept[b, j]", "table[2,71]:float32  kept[B,I]:bool", None),
    ],
)
def test_what_is_one_number_far_away(bias: str, mask: str, given: str, far: str | None) -> None:
    lines = given.replace("  ", "\n  given  ")
    spec = _case(bias, mask, "I", lines).spec
    attend = spec.attend()
    assert attend is not None
    found = Saturated.of(attend.score, attend.mask, Size("I"), Size("I"))
    assert (found and str(found.score)) == (far and f"0.25·s + {far}")
    assert (slower(spec) is None) == (far is not None)


def test_queries_behind_a_cache() -> None:
    case = _case("table[h, max(0, min(i + J − I − j, 70))]", "j ≤ i + J − I", "J")
    case = Case("x", case.text, {"B": 1, "I": 130, "J": 517})
    module = generate(case.spec)
    assert module.skeleton.far_score is not None
    tensors = {n: t.to(torch.bfloat16) if n in "qkv" else t for n, t in case.tensors(3).items()}
    found = run_on_cpu(module, list(tensors.values()))
    assert all(outcome.passed for outcome in measured(case.spec, tensors, found, torch.bfloat16))


@pytest.mark.parametrize("mask", ["j ≤ i and h > 0", "j ≤ i + B"])
def test_masks_whose_share_no_length_tells(mask: str) -> None:
    attend = _case(BY_HEAD, mask, "I").spec.attend()
    assert attend is not None and Saturated.of(attend.score, attend.mask, Size("I"), Size("I")) is None


def test_an_element_of_a_key_is_no_bias_of_pairs() -> None:
    spec = _case("table[h, j]", CAUSAL, "I", "table[2,I]:float32").spec
    attend = spec.attend()
    assert attend is not None and slower(spec) is None
    assert Saturated.of(attend.score, attend.mask, Size("I"), Size("I")) is None


@pytest.mark.parametrize("length", [390, 129, 64, 7])
@pytest.mark.parametrize(
    "bias, mask, given",
    [
        (BY_HEAD, CAUSAL, "table[2,71]:float32"),
        ("table[max(−40, j − i) + 40]", WINDOW, "table[41]:bfloat16"),
        ("table[h, min(i // 16 − j // 16, 9)]", CAUSAL, "table[2,10]:float32"),
    ],
)
def test_values_near_and_far(bias: str, mask: str, given: str, length: int) -> None:
    case = _case(bias, mask, "I", given, length)
    module = generate(case.spec)
    assert module.skeleton.far_score is not None and not {"i", "j"} & set(module.skeleton.far_score.parameters)
    tensors = {n: t.to(torch.bfloat16) if n in "qkv" else t for n, t in case.tensors(3).items()}
    found = run_on_cpu(module, list(tensors.values()))
    assert all(outcome.passed for outcome in measured(case.spec, tensors, found, torch.bfloat16))


def test_far_blocks_are_those_without_a_near_pair() -> None:
    """The last far key lies 70 before the first query of the tile."""
    spec = _case(BY_HEAD, CAUSAL, "I").spec
    attend = spec.attend()
    assert attend is not None
    found = Saturated.of(attend.score, attend.mask, Size("I"), Size("I"))
    assert found is not None and found.found.full is not None
    assert (str(found.found.full.start), str(found.found.full.stop)) == ("0", "row_first − 69"), "before that key"
    assert (str(found.found.main.start), str(found.found.main.stop)) == ("0", "row_last + 1")
