"""``regroup.boxes``."""

from __future__ import annotations

import pytest

from attncompile.ir import Spec, parse_spec
from attncompile.ir.neighbourhood import neighbourhood
from attncompile.passes import parse_passes, run_passes


def grid_spec(grid: tuple[int, ...], window: tuple[int, ...], heads: int) -> Spec:
    tokens = 1
    for size in grid:
        tokens *= size
    return parse_spec(
        f"x   attend  q,k,v[1,{heads},{tokens},16]  float32\n  score  0.25·s\n"
        f"  mask   {neighbourhood(grid, window)}\n  norm   softmax (float32)"
    )


@pytest.mark.parametrize(
    ("grid", "window", "heads"),
    [((48, 96), (12, 12), 1), ((128, 128), (16, 16), 16)],
    ids=["evaluated", "by its law"],
)
def test_tokens_of_a_grid_are_moved_into_boxes(grid: tuple[int, ...], window: tuple[int, ...], heads: int) -> None:
    result = run_passes(grid_spec(grid, window, heads), parse_passes("regroup.boxes"))
    assert result.applied == ("regroup.boxes",) and not result.lossy
    assert [operation.keyword for operation in result.spec.operations].count("attend") == 1
    assert len(result.spec.operations) > 1


def test_a_mask_without_a_grid_is_refused() -> None:
    text = "x   attend  q,k,v[B,2,I,16]  float32\n  score  0.25·s\n  mask   j ≤ i\n  norm   softmax (float32)"
    spec = parse_spec(text)
    result = run_passes(spec, parse_passes("regroup.boxes"))
    assert result.spec == spec and len(result.refused) == 1
