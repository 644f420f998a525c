"""Rows that surely see a key, and fills that swallow what they are added to."""

from __future__ import annotations

import pytest
import torch

from attncompile.ir import parse_expr
from attncompile.ir.rows import absorbing, never_empty
from attncompile.ir.sample import example_sizes, random_tensors, symbolic_sizes
from tests.cases import BY_NAME


@pytest.mark.parametrize(("row", "proven"), [
    ("full", True),
    ("causal", True),
    ("window", True),
    ("sink-window", True),
    ("window-symmetric", True),
    ("prefix", True),
    ("documents", True),  # every position is in its own document
    ("cache", True),
    ("causal-first-rows", True),
    ("causal-last-rows", False),  # with fewer keys than queries the first queries see nothing
    ("padding", False),
    ("dilated", False),
    ("empty-rows-nan", False),
])
def test_never_empty(row: str, proven: bool) -> None:
    spec = BY_NAME[row].spec
    attend = spec.attend()
    assert attend is not None
    assert never_empty(attend, spec.types()) == proven
    assert not (proven and BY_NAME[row].empty_rows)


@pytest.mark.parametrize(("fill", "swallows"), [
    ("−inf", False),  # not finite
    ("−3.4028234663852886e+38", True),
    ("0.25·s − 3.4028234663852886e+38", True),
    ("−1e12", True),
    ("−1e9", False),
    ("0.25·s − 10000.0", False),
    ("3.4e38", False),
])
def test_absorbing(fill: str, swallows: bool) -> None:
    assert absorbing(parse_expr(fill)) == swallows
    score = torch.tensor([-1e4, 3.0, 1e4])
    if swallows:
        lowest = parse_expr(fill.removeprefix("0.25·s ").replace("− ", "−"))
        assert float(str(lowest).replace("−", "-")) < 0
        value = torch.tensor(float(str(lowest).replace("−", "-")))
        assert torch.equal(score + value, value.expand(3))


def test_sample_sizes_differ_and_seeds_repeat() -> None:
    spec = BY_NAME["cache"].spec
    assert set(symbolic_sizes(spec)) == {"B", "I", "P"}
    sizes = example_sizes(spec)
    assert sizes["B"] == 2 and len(set(sizes.values())) == 3
    one, two = random_tensors(spec, sizes, 3), random_tensors(spec, sizes, 3)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["q"], random_tensors(spec, sizes, 4)["q"])
