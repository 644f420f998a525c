"""Masks as conditions on the digits of a key's place in its block: the product gives what the mask says."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attncompile.codegen.gluon import generate
from attncompile.codegen.gluon.generate import HopperModule
from attncompile.codegen.triton.moved import regrouped_parts
from attncompile.ir import parse_spec
from attncompile.ir.evaluate import Environment, evaluate
from tests.kernels.neighbourhood_cases import NEIGHBOURHOODS, NEIGHBOURHOODS_BY_NAME, Neighbourhood


def _extreme(function: Any) -> Any:
    return lambda one, other: function(torch.as_tensor(one), torch.as_tensor(other))


LANGUAGE = SimpleNamespace(
    maximum=_extreme(torch.maximum),
    minimum=_extreme(torch.minimum),
    where=torch.where,
    abs=torch.abs,
)
"""What the conditions call, on tensors."""


def hidden(module: HopperModule, i: torch.Tensor, start: int, keys: int) -> torch.Tensor:
    """For each query and key of a block, how many digits of the key's place the mask hides from the query."""
    assert module.skeleton.digits is not None
    found = torch.zeros(len(i), keys, dtype=torch.int64)
    place = torch.arange(keys)
    for number, digit in enumerate(module.skeleton.digits.digits):
        namespace: dict[str, Any] = {"gl": LANGUAGE}
        exec(digit.allowed.source().replace("@triton.jit\n", ""), namespace)
        value = place // digit.divisor % digit.count
        known = {"i": i[:, None], "start": start, "digit": value[None, :], "b": 0, "h": 0}
        shown = namespace[f"allowed_{number}"](*(known[name] for name in digit.allowed.parameters))
        found += ~shown.expand(len(i), keys)
    return found


@pytest.mark.parametrize("row", NEIGHBOURHOODS, ids=lambda row: row.name)
def test_no_digit_hides_a_key_exactly_where_the_mask_shows_it(row: Neighbourhood) -> None:
    module = generate(row.moved(128, 128), in_place=True)
    parts = regrouped_parts(row.moved(128, 128))
    assert parts is not None
    attend = parts.attention.attend()
    assert attend is not None
    if module.skeleton.digits is None:
        assert module.skeleton.visible is not None
        return
    assert module.skeleton.visible is None
    queries, tokens = (int(str(parts.attention.types()[name].sizes[2])) for name in (attend.query, attend.key))
    keys, i = module.skeleton.tile.keys, torch.arange(queries)
    for start in range(0, tokens, keys):
        grid = {"i": i[:, None], "j": torch.arange(start, start + keys)[None, :]}
        shown = evaluate(attend.mask, Environment(grid, {})).expand(queries, keys)
        same = bool(torch.equal(hidden(module, i, start, keys) == 0, shown))
        assert same, (row.name, start)


def test_rows_of_zeros_and_ones() -> None:
    module = generate(NEIGHBOURHOODS_BY_NAME["plane"].moved(128, 128))
    digits = module.skeleton.digits
    assert digits is not None
    assert [(each.divisor, each.count) for each in digits.digits] == [(1, 8), (8, 16)]
    assert digits.columns == 32
    assert "DIGITS = gl.constexpr(32)" in module.source
    assert re.search(r"\(column == place % 8\) \| \(column == place // 8 % 16 \+ 8\)", module.source)


@pytest.mark.parametrize(
    "mask",
    (
        "j ≤ i and (j < 4 or j > i − 90 or j // 128 = 2)",  # no digit
        "j % 16 ≤ i % 16 or j // 16 % 8 ≤ i // 16",  # no conjunction
        "j % 16 + j // 16 % 8 ≤ i % 16",  # two digits in one condition
        "j % 64 ≤ i % 64",  # too many values
        "j % 16 ≤ last[i]",  # reads a tensor
    ),
)
def test_masks_that_know_keys_otherwise(mask: str) -> None:
    lines = ["x   attend  q,k,v[1,2,512,64]  bfloat16", "score  0.125·s", f"mask   {mask}", "norm   softmax (float32)"]
    lines += ["given  last[I]:int32"] if "last" in mask else []
    skeleton = generate(parse_spec("\n  ".join(lines))).skeleton
    assert skeleton.digits is None and skeleton.visible is not None


def test_a_score_of_its_own_keeps_the_mask() -> None:
    module = generate(NEIGHBOURHOODS_BY_NAME["line-bias"].moved(128, 128))
    assert module.skeleton.digits is None and module.skeleton.visible is not None
