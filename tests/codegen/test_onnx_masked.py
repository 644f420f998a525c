"""Masks where operators differ: written as a sum, beside a soft cap, beside sinks, in rows that see no key at all."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from attncompile.codegen.onnx.capabilities import Capability, rows_for
from attncompile.codegen.onnx.choose import choose
from attncompile.convert.onnx_sites import long_draws
from attncompile.ir import Spec, parse_spec
from attncompile.verify import DRAWS, check_site
from tests.codegen.test_onnx_operators import run

LOWEST = 3.4028234663852886e38
NORM = "  norm   softmax (float32)\n"
PADDED = f"  fill   −{LOWEST}\n{NORM}  given  attention_mask[B,I]:int64\n"
HEAD = "site   attend  q[B,4,I,16]  k,v[B,2,I,16]  float32\n"
SHARED = "  kv_head h // 2\n"

SPECS = {
    "a sum": "site   attend  q,k,v[B,4,I,16]  float32\n"
    f"  score  0.25·s + {LOWEST}·(attention_mask[b, j] − 1)\n{NORM}  given  attention_mask[B,I]:int64\n",
    "a sum, fewer KV heads": f"{HEAD}  score  0.25·s + {LOWEST}·(attention_mask[b, j] − 1)\n{SHARED}{NORM}"
    "  given  attention_mask[B,I]:int64\n",
    "soft cap": f"{HEAD}  score  5·tanh(0.25·s / 5)\n  mask   attention_mask[b, j] ≠ 0\n{SHARED}{PADDED}",
    "soft cap, causal": f"{HEAD}  score  5·tanh(0.25·s / 5)\n  mask   j ≤ i and attention_mask[b, j] ≠ 0\n"
    f"{SHARED}{PADDED}",
    "soft cap, causal, zero": f"{HEAD}  score  5·tanh(0.25·s / 5)\n  mask   j ≤ i and attention_mask[b, j] ≠ 0\n"
    f"{SHARED}  norm   softmax (float32), empty rows zero\n  given  attention_mask[B,I]:int64\n",
    "sinks": f"{HEAD}  score  0.25·s\n  mask   j ≤ i and attention_mask[b, j] ≠ 0\n  sink   sinks[h]\n{SHARED}"
    f"{PADDED}  given  sinks[4]:float32\n",
    "weights times a constant": f"{HEAD}  score  0.25·s\n  mask   j ≤ i and attention_mask[b, j] ≠ 0\n"
    f"  weight 0.75·w\n{SHARED}{PADDED}",
}
OPERATORS = {
    "a sum": {"Attention", "MultiHeadAttention"},
    "a sum, fewer KV heads": {"Attention"},
    "soft cap": {"Attention"},
    "soft cap, causal": {"Attention", "GroupQueryAttention"},
    "soft cap, causal, zero": {"Attention", "GroupQueryAttention"},
    "sinks": {"GroupQueryAttention"},
    "weights times a constant": {"Attention", "GroupQueryAttention"},
}

SUM = f"0.25·s + {LOWEST}·(attention_mask[b, j] − 1)"
GIVEN = "  given  attention_mask[B,I]:int64\n"
TWICE = {
    "fill as a sum": f"  score  {SUM}\n  mask   j ≤ i\n  fill   {SUM} − {LOWEST}\n{NORM}{GIVEN}",
    "fill of minus infinity": f"  score  {SUM}\n  mask   j ≤ i\n{NORM}{GIVEN}",
    "fill of the lowest": f"  score  {SUM}\n  mask   j ≤ i\n  fill   −{LOWEST}\n{NORM}{GIVEN}",
    "two sums": f"  score  {SUM} + {LOWEST}·(second[b, j] − 1)\n{NORM}{GIVEN}  given  second[B,I]:int64\n",
    "a sum of two": f"  score  0.25·s + {LOWEST}·(attention_mask[b, j] + second[b, j] − 2)\n{NORM}{GIVEN}"
    "  given  second[B,I]:int64\n",
    "a sum and a condition": f"  score  {SUM} + where(j ≤ i, 0.0, −{LOWEST})\n{NORM}{GIVEN}",
}
"""Masks written as sums beside a second mask, by how that is written."""


@pytest.mark.parametrize("name", TWICE)
def test_a_mask_as_a_sum_beside_another_is_left_to_plain_operators(name: str) -> None:
    """In rows that see no key, keys that both hide weigh less than keys that one hides, and operators lose that."""
    spec = parse_spec(f"site   attend  q,k,v[B,4,I,16]  float32\n{TWICE[name]}")
    beyond = {row.operator: row.beyond(spec) for row in rows_for(spec)}
    assert {operator for operator, reason in beyond.items() if reason is None} == {"decomposition"}
    assert choose(spec, prefer="fused").row.operator == "decomposition"


def test_a_condition_of_two_masks_is_one_mask() -> None:
    bias = f"where(j ≤ i and attention_mask[b, j] ≠ 0, 0.0, −{LOWEST})"
    spec = parse_spec(f"site   attend  q,k,v[B,4,I,16]  float32\n  score  0.25·s + {bias}\n{NORM}{GIVEN}")
    assert choose(spec, prefer="fused").row.operator in {"Attention", "MultiHeadAttention"}


def in_order(spec: Spec, row: Capability, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    named = {value.name: tensor for value, tensor in zip(spec.inputs, tensors, strict=True)}
    return tuple(run(spec, row, named, flat=False))


@pytest.mark.parametrize("name", SPECS)
def test_every_operator_that_takes_it_computes_it(name: str) -> None:
    spec = parse_spec(SPECS[name])
    rows = [row for row in rows_for(spec) if row.why_not(spec, version="1.31", opset=23) is None]
    assert {row.operator for row in rows} == OPERATORS[name] | {"decomposition"}
    assert choose(spec, prefer="fused").row.operator in OPERATORS[name]
    short = [draw for draw in (*DRAWS, *long_draws("")) if draw.length <= max(one.length for one in DRAWS)]
    for row in rows:
        found = check_site(name, spec, partial(in_order, spec, row), operator=row.operator, draws=short)
        assert found.passed, (row.operator, [case for case in found.cases if not case.passed])


def test_older_versions_that_cap_behind_the_mask_are_not_asked() -> None:
    spec = parse_spec(SPECS["soft cap"])
    assert choose(spec, prefer="fused", version="1.26").row.operator == "decomposition"


def test_one_fused_operator_is_one() -> None:
    """Two switched by length are for those who ask for the fastest."""
    spec: Spec = parse_spec(
        "site   attend  q,k,v[B,4,I,16]  float32\n  score  0.25·s\n  mask   j ≤ i\n  norm   softmax (float32)\n"
    )
    assert " keys, else " in choose(spec).row.operator
    assert choose(spec, prefer="fused").row.operator in {row.operator for row in rows_for(spec)}
