"""Neighbourhood masks against the definition by loops, and the order of tokens in boxes: its law and what it saves."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attncompile.ir import parse_spec, print_spec
from attncompile.ir.blocks import block_map
from attncompile.ir.expr import TRUE, Index, conjunction, conjuncts
from attncompile.ir.intervals import Visibility
from attncompile.ir.neighbourhood import neighbourhood
from attncompile.ir.rearrange import (
    arranged,
    arrangements,
    best_arrangement,
    read_grid,
    regrouped,
    visited_in_raster_order,
    why_not_regrouped,
)
from attncompile.ir.text import parse_expr
from attncompile.ir.tiling import SLOT, Tiling, read_tiling, why_not_rearranged
from tests.ir.masks import dense
from tests.kernels.neighbourhood_cases import NEIGHBOURHOODS, Neighbourhood


def window(position: int, length: int, size: int, dilation: int, stride: int, causal: bool) -> set[int]:
    """The keys that a query sees along one axis, one by one."""
    line = list(range(position % dilation, length, dilation))
    own = line.index(position)
    size = min(size, max(1, length // dilation))
    if causal:
        last = min(own // stride * stride + stride - 1, len(line) - 1)
        return {line[other] for other in range(max(0, last - size + 1), own + 1)}
    leader = min(own // stride * stride + stride // 2, len(line) - 1)
    start = leader - size // 2
    while start + size > len(line):
        start -= 1
    start = max(start, 0)
    return set(line[start : start + size])


axis = st.tuples(
    st.integers(1, 9), st.integers(1, 10), st.integers(1, 3), st.integers(1, 4), st.booleans()
).map(lambda drawn: (drawn[0], drawn[1], min(drawn[2], drawn[0]), *drawn[3:]))


@settings(max_examples=60, deadline=None)
@given(axes=st.lists(axis, min_size=1, max_size=3))
def test_a_mask_is_a_window_along_every_axis(axes: list[tuple[int, int, int, int, bool]]) -> None:
    grid, sizes, dilation, stride, causal = (tuple(each) for each in zip(*axes, strict=True))
    total = math.prod(grid)
    found = dense(neighbourhood(grid, sizes, dilation=dilation, stride=stride, causal=causal), total, total)
    tokens = list(itertools.product(*map(range, grid)))
    for row, query in enumerate(tokens):
        seen = [window(*each) for each in zip(query, grid, sizes, dilation, stride, causal, strict=True)]
        wanted = [all(place in line for place, line in zip(key, seen, strict=True)) for key in tokens]
        assert found[row].tolist() == wanted, query


@pytest.mark.parametrize(
    "options, said",
    (
        ({"window": (3,)}, "one entry for each of the 2 axes"),
        ({"window": (3, 0)}, "no number below 1"),
        ({"window": (3, 3), "dilation": (7, 1)}, "dilation 7 of axis 0 exceeds its 6 positions"),
    ),
)
def test_wrong_options_are_named(options: dict[str, tuple[int, ...]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        neighbourhood((6, 5), **options)


sides = st.sampled_from((1, 2, 4, 8))
tilings = st.lists(st.tuples(st.integers(1, 12), sides, st.integers(1, 3)), min_size=1, max_size=3).map(
    lambda drawn: Tiling(*(tuple(each) for each in zip(*drawn, strict=True)))
)


@settings(max_examples=100, deadline=None)
@given(tiling=tilings)
def test_every_token_has_a_place_of_its_own(tiling: Tiling) -> None:
    token, slot = tiling.token(SLOT), tiling.slot(SLOT)
    assert why_not_rearranged(token, slot, tiling.tokens, tiling.slots) is None
    found = read_tiling(token, tiling.tokens, tiling.slots, math.prod(tiling.box))
    if found is not None:  # another name for the same order
        assert torch.equal(_values(found.token(SLOT), tiling.slots), _values(token, tiling.slots))


def _values(expr: object, length: int) -> torch.Tensor:
    return dense(parse_expr(f"({expr}) = j", {}), length, length).long().argmax(1)


ORDERS = (Tiling((16, 24), (8, 16)), Tiling((6, 20, 12), (2, 8, 8)), Tiling((17, 23), (4, 32)))


@pytest.mark.parametrize("tiling", ORDERS)
def test_boxes_are_read_off_an_order(tiling: Tiling) -> None:
    assert read_tiling(tiling.token(SLOT), tiling.tokens, tiling.slots, math.prod(tiling.box)) == tiling


@pytest.mark.parametrize(
    "token, slot, said",
    (
        ("i // 2", "i", "token 0 of 8 stands at 2 of 8 places"),
        ("7 − i", "i", "does not say where"),
        ("i % 4 + 8·(i // 4)", "i", "token 4 of 8 stands at 0 of 8 places"),
    ),
)
def test_what_loses_a_token_is_refused(token: str, slot: str, said: str) -> None:
    assert said in (why_not_rearranged(parse_expr(token, {}), parse_expr(slot, {}), 8, 8) or "")


@pytest.mark.parametrize("places", ((16, 16), (32, 8)))
@pytest.mark.parametrize("row", NEIGHBOURHOODS, ids=lambda row: row.name)
def test_moving_tokens_keeps_the_function(row: Neighbourhood, places: tuple[int, int]) -> None:
    moved = row.moved(*places)
    assert [each.keyword for each in moved.operations] == ["regroup"] * 3 + ["attend", "regroup"]
    assert parse_spec(print_spec(moved)).fingerprint() == moved.fingerprint()
    tensors = row.case.tensors(0, torch.float64)
    for before, after in zip(row.case.spec.interpret(tensors), moved.interpret(tensors), strict=True):
        torch.testing.assert_close(after, before)


@pytest.mark.parametrize("row", NEIGHBOURHOODS, ids=lambda row: row.name)
def test_visits_are_counted_axis_by_axis(row: Neighbourhood) -> None:
    spec = row.case.spec
    attend = spec.attend()
    assert attend is not None
    grid = read_grid(attend.mask, math.prod(row.grid))
    assert grid is not None and math.prod(grid.sizes) == math.prod(row.grid)
    for order in list(itertools.islice(arrangements(grid, 16, 8), 0, None, 17)):
        inner = arranged(spec, order).attend()
        assert inner is not None
        places = order.queries.slots, order.keys.slots
        # a place without a query would see what its coordinates say
        mask = conjunction([inner.mask, *order.queries.inside(SLOT)])
        tiles = block_map(mask, *places, block_query=16, block_key=8).visibility != Visibility.NONE
        apart = len(conjuncts(attend.mask)) == sum(len(conjuncts(each)) for each in grid.axes)
        assert tiles.sum() * 16 * 8 == order.visited if apart else tiles.sum() * 16 * 8 <= order.visited


def test_visits_in_raster_order_are_those_of_the_mask() -> None:
    for sizes, window in (((10, 13), (3, 4)), ((6, 7, 5), (3, 3, 3)), ((16, 48), (5, 9))):
        mask, tokens = neighbourhood(sizes, window), math.prod(sizes)
        grid = read_grid(mask, tokens)
        assert grid is not None
        exact = block_map(mask, tokens, tokens, block_query=16, block_key=8)
        found = visited_in_raster_order(grid, 16, 8)
        assert found == int((exact.visibility != Visibility.NONE).sum()) * 16 * 8
    # of a long map some rows stand for all
    grid = read_grid(neighbourhood((4096, 64), (9, 9)), 1 << 18)
    assert grid is not None
    assert 9 * 64 <= visited_in_raster_order(grid, 128, 128) / (1 << 18) <= 12 * 64


def test_boxes_leave_less_to_visit() -> None:
    mask = neighbourhood((64, 64), (9, 9))
    text = f"x   attend  q,k,v[B,2,4096,16]  bfloat16\n  score  s\n  mask   {mask}\n  norm   softmax (float32)"
    spec = parse_spec(text)
    moved = regrouped(spec, 64, 64, copied=False)
    assert regrouped(spec, 64, 64) is None  # copies would take longer
    assert moved is not None
    attend = moved.attend()
    assert attend is not None
    raster, boxes = (block_map(each, 4096, 4096, block_query=64, block_key=64).visited for each in (mask, attend.mask))
    assert boxes < 0.8 * raster


@pytest.mark.parametrize(
    "text, said",
    (
        ("q,k,v[B,2,I,16]|j ≤ i", "not one number"),
        ("q,k,v[B,2,64,16]|j ≤ i", "shows no grid"),
        ("q[B,2,64,16]  k,v[B,2,32,16]|j // 8 ≤ i // 8", "not one number"),
    ),
)
def test_what_has_no_grid_stays(text: str, said: str) -> None:
    operands, mask = text.split("|")
    spec = parse_spec(f"x   attend  {operands}  bfloat16\n  score  s\n  mask   {mask}\n  norm   softmax (float32)")
    assert said in (why_not_regrouped(spec) or "") and regrouped(spec) is None


def test_a_log_sum_exp_stays_in_its_order() -> None:
    spec = NEIGHBOURHOODS[0].case.spec
    attend = spec.attend()
    assert attend is not None
    changed = dataclasses.replace(attend, lse="lse")
    with pytest.raises(ValueError, match="log-sum-exp"):
        grid = read_grid(attend.mask, 384)
        assert grid is not None
        arranged(dataclasses.replace(spec, operations=(changed,)), best_arrangement(grid, 16, 16))


def test_a_grid_without_windows_is_none() -> None:
    assert read_grid(TRUE, 64) is None
    assert read_grid(parse_expr("j ≤ i", {}), 64) is None
    grid = read_grid(parse_expr("i // 8 = j // 8", {}), 64)
    assert grid is not None and grid.sizes == (8, 8) and Index("key_1") not in grid.axes
