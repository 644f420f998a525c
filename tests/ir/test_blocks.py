from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from attncompile.ir.blocks import block_map, density, key_bounds, picture
from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import Expr, Load, symbols, walk
from attncompile.ir.intervals import Interval, Visibility
from attncompile.ir.operators import Kind
from attncompile.ir.simplify import simplify
from attncompile.ir.text import parse_expr
from tests.ir.expressions import Size, defined, environment, expressions
from tests.ir.masks import MASKS, dense, named

SHAPES = [
    (24, 24, 8, 8),
    (24, 24, 6, 6),
    (23, 17, 8, 4),
    (1, 19, 8, 8),
    (19, 1, 8, 8),
    (13, 29, 5, 7),
    (16, 16, 16, 16),
    (9, 9, 1, 1),
    (30, 30, 12, 9),
]


def tiles_of(visible: torch.Tensor, block_query: int, block_key: int) -> np.ndarray:
    """The block map by looking at every position."""
    queries, keys = visible.shape
    return np.array(
        [
            [
                {
                    (True, True): Visibility.ALL,
                    (False, True): Visibility.MIXED,
                    (False, False): Visibility.NONE,
                }[bool(tile.all()), bool(tile.any())]
                for tile in (
                    visible[i : i + block_query, j : j + block_key] for j in range(0, keys, block_key)
                )
            ]
            for i in range(0, queries, block_query)
        ]
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", MASKS)
def test_the_block_map_is_exact(name: str, shape: tuple[int, int, int, int]) -> None:
    queries, keys, block_query, block_key = shape
    found = block_map(named(name), queries, keys, block_query=block_query, block_key=block_key)
    expected = tiles_of(dense(named(name), queries, keys), block_query, block_key)
    assert found.visibility.tolist() == expected.tolist()
    assert found.visited == pytest.approx((expected != Visibility.NONE).mean())


@given(
    expressions(Kind.BOOL),
    st.tuples(*[st.integers(1, 20)] * 2),
    st.tuples(*[st.integers(1, 8)] * 2),
    st.integers(0, 999),
)
def test_no_hidden_block_is_visible_and_no_visible_block_masked(
    mask: Expr, lengths: tuple[int, int], blocks: tuple[int, int], seed: int
) -> None:
    given = environment(seed, special=False)
    grid = torch.arange(lengths[0])[:, None], torch.arange(lengths[1])[None, :]
    values = Environment(
        {**{name: torch.tensor(1) for name in "bhd"}, "i": grid[0], "j": grid[1]},
        {**given.sizes, "I": lengths[0], "J": lengths[1]},
        given.tensors,
        torch.tensor(0.5),
        torch.tensor(0.25),
    )
    assume(defined(mask, values))
    ranges = {name: Interval(1, 1) for name in "bhd"} | {
        name: Interval(size, size) for name, size in given.sizes.items() if name not in "IJ"
    }
    found = block_map(mask, *lengths, block_query=blocks[0], block_key=blocks[1], ranges=ranges).visibility
    expected = tiles_of(evaluate(mask, values).expand(lengths), *blocks)
    assert ((found == expected) | (found == Visibility.MIXED)).all()
    if not any(isinstance(node, Load) or node.kind is Kind.FLOAT for node in walk(simplify(mask))):
        assert (found == expected).all()


DRAWN = {
    "j ≤ i": """
        █···
        ██··
        ███·
        ████""",
    "j ≤ i and j > i − 2": """
        █···
        ██··
        ·██·
        ··██""",
    "j ≤ i and (j < 1 or j > i − 2)": """
        █···
        ██··
        ███·
        █·██""",
    "j < 2 or j ≤ i": """
        ██··
        ██··
        ███·
        ████""",
    "j % 2 = i % 2": """
        █·█·
        ·█·█
        █·█·
        ·█·█""",
    "i // 2 = j // 2": """
        ██··
        ██··
        ··██
        ··██""",
    "j ≤ i + J − I − 1": """
        ····
        █···
        ██··
        ███·""",
    "i ≠ 1": """
        ████
        ····
        ████
        ████""",
}


@pytest.mark.parametrize("text", DRAWN)
def test_masks_drawn_by_hand(text: str) -> None:
    rows = DRAWN[text].split()
    expected = [[Visibility.ALL if sign == "█" else Visibility.NONE for sign in row] for row in rows]
    mask = parse_expr(text)
    assert block_map(mask, 4, 4, block_query=1, block_key=1).visibility.tolist() == expected
    assert dense(mask, 4, 4).tolist() == [[sign == "█" for sign in row] for row in rows]
    assert density(mask, 4, 4) == sum(row.count("█") for row in rows) / 16


def test_what_a_mask_loads_is_unknown_unless_its_range_is_given() -> None:
    mask = parse_expr("j ≤ i and keep[b, j]", {"keep": Kind.BOOL})
    assert block_map(mask, 8, 8, block_query=4, block_key=4).visibility.tolist() == [[1, 0], [1, 1]]
    known = block_map(mask, 8, 8, block_query=4, block_key=4, ranges={"keep": Interval(1, 1)})
    assert known.visibility.tolist() == [[1, 0], [2, 1]]


def test_long_maps_are_decided_without_their_positions() -> None:
    tiles = block_map(
        parse_expr("j ≤ i and (j > i − 4096 or j < 4)"), 1 << 20, 1 << 20, block_query=4096, block_key=4096
    )
    assert (tiles.visibility == Visibility.MIXED).sum() == 256 + 255 + 254  # diagonal, window's edge, sinks


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", MASKS)
def test_key_bounds_limit_exactly_what_they_state(name: str, shape: tuple[int, int, int, int]) -> None:
    queries, keys, *_ = shape
    limits = key_bounds(named(name))
    j = torch.arange(keys)[None, :]

    def value(limit: Expr) -> torch.Tensor:
        grid = {"i": torch.arange(queries)[:, None]}
        return evaluate(limit, Environment(grid, {"I": queries, "J": keys}))

    visible = torch.ones(queries, keys, dtype=torch.bool)
    for limit in limits.lower:
        visible = visible & (j >= value(limit))
    for limit in limits.upper:
        visible = visible & (j < value(limit))
    for part in limits.rest:
        visible = visible & dense(part, queries, keys)
    assert torch.equal(visible, dense(named(name), queries, keys))


LIMITS = [
    ("j ≤ i", [], ["i + 1"], []),
    ("not (j > i) and i − j < 16", ["i − 15"], ["i + 1"], []),
    ("j = i + 2", ["i + 2"], ["i + 3"], []),
    ("j < J − P and j ≥ 3", ["3"], ["J − P"], []),
    ("2·j ≤ i", [], [], ["2·j ≤ i"]),
    ("j < length[b] and j ≤ i", [], ["i + 1"], ["j < length[b]"]),
    ("j·j ≤ i", [], [], ["i ≥ j·j"]),
    ("j // 8 ≤ i // 8", [], ["8·(i // 8) + 8"], []),
    ("j < 4 or j ≤ i", [], [], ["j ≤ i or j < 4"]),
]


@pytest.mark.parametrize(("text", "lower", "upper", "rest"), LIMITS, ids=[text for text, *_ in LIMITS])
def test_key_bounds_in_closed_form(text: str, lower: list[str], upper: list[str], rest: list[str]) -> None:
    limits = key_bounds(parse_expr(text, {"length": Kind.INT}))
    assert [[str(e) for e in group] for group in (limits.lower, limits.upper, limits.rest)] == [
        lower,
        upper,
        rest,
    ]


@pytest.mark.parametrize(
    "shape", [(24, 24), (300, 200), (1, 40), (513, 129)], ids=lambda shape: "x".join(map(str, shape))
)
@pytest.mark.parametrize("name", MASKS)
def test_density_counts_the_visible_positions(name: str, shape: tuple[int, int]) -> None:
    assert density(named(name), *shape) == pytest.approx(float(dense(named(name), *shape).double().mean()))


def test_density_with_tensors_sizes_and_heads() -> None:
    kinds = {"keep": Kind.BOOL, "document": Kind.INT}
    keep = torch.rand(1, 200) < 0.5
    mask = parse_expr("j ≤ i and keep[b, j] and j > i − W and j ≥ h", kinds)
    assert Size("W") in symbols(mask)
    causal_window = dense(parse_expr("j ≤ i and j > i − 9"), 200, 200)
    assert density(mask, 200, 200, sizes={"W": 9}) == pytest.approx(float(causal_window.double().mean()))
    exact = density(mask, 200, 200, sizes={"W": 9}, tensors={"keep": keep})
    assert exact == pytest.approx(float((causal_window & keep).double().mean()))
    assert density(parse_expr("keep[b, j]", kinds), 10, 10) == 1.0


def test_picture() -> None:
    assert picture(parse_expr("j ≤ i"), 16, 16, columns=8).splitlines() == [
        "░░      ",
        "██░░    ",
        "████░░  ",
        "██████░░",
    ]
    assert picture(parse_expr("true"), 1, 1) == "█"


BAD_SIZES = [
    ({"query_length": 0}, "query_length must be at least 1, got 0"),
    ({"key_length": -1}, "key_length must be at least 1, got -1"),
    ({"block_query": 0}, "block_query must be at least 1, got 0"),
    ({"block_key": 0}, "block_key must be at least 1, got 0"),
]


@pytest.mark.parametrize(("change", "message"), BAD_SIZES)
def test_sizes_are_checked(change: dict[str, int], message: str) -> None:
    sizes = {"query_length": 4, "key_length": 4, "block_query": 2, "block_key": 2} | change
    with pytest.raises(ValueError, match=message):
        block_map(parse_expr("j ≤ i"), **sizes)


def test_only_a_mask_has_a_map() -> None:
    with pytest.raises(ValueError, match="j is int, not a mask"):
        block_map(parse_expr("j"), 4, 4)
