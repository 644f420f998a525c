from __future__ import annotations

import struct
import tracemalloc
import zlib
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from attncompile.ir.blocks import block_map, density, key_bounds, visible_share
from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import Expr, Load, symbols, walk
from attncompile.ir.intervals import Interval, Visibility
from attncompile.ir.operators import Kind
from attncompile.ir.picture import drawn_png, drawn_svg, drawn_text, mask_tiles, picture
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
                for tile in (visible[i : i + block_query, j : j + block_key] for j in range(0, keys, block_key))
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
    assert picture(parse_expr("true"), 1, 1) == "▀"
    assert picture(parse_expr("j ≤ i"), 5, 5, columns=5).splitlines() == ["█▄   ", "███▄ ", "▀▀▀▀▀"]


def test_a_picture_as_svg_and_png() -> None:
    tiles = mask_tiles(parse_expr("j ≤ i"), 12, 12, columns=6)
    assert drawn_text(tiles) == picture(parse_expr("j ≤ i"), 12, 12, columns=6)
    drawn = ElementTree.fromstring(drawn_svg(tiles, side=2))
    assert (drawn.get("width"), drawn.get("height")) == ("12", "12")
    assert len(drawn) == 1 + 6 + 5  # the ground, a light tile in every row, a dark run in all but the first
    shades = read_png(drawn_png(tiles, side=3))
    assert shades.shape == (18, 18)
    assert (shades[::3, ::3] == tiles).all() and (shades[2::3, 2::3] == tiles).all()


def read_png(data: bytes) -> np.ndarray:
    """The palette indices of a PNG of one byte a pixel without filters."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length]) == (zlib.crc32(kind + content),)
        chunks[kind] = content
        at += 12 + length
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 3, 0, 0, 0] and len(chunks[b"PLTE"]) == 9
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + width)
    assert not lines[:, 0].any()
    return lines[:, 1:]


LOADED = {
    "padding": "keep[b, j]",
    "causal padding": "j ≤ i and keep[b, j]",
    "numbers": "length[b] > j and j ≤ i",
    "documents": "document[b, i] = document[b, j]",
    "documents of pairs": "document[b, i // 2] = document[b, j] and j ≤ i",
    "matrix": "shown[i, j] and j > i − 9",
    "row of a head": "shown[h, j]",
}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", LOADED)
def test_the_block_map_is_exact_where_tensors_are_given(name: str, shape: tuple[int, int, int, int]) -> None:
    queries, keys, block_query, block_key = shape
    generator = torch.Generator().manual_seed(queries * keys)
    length = max(queries, keys)
    tensors = {
        "keep": torch.rand((2, length), generator=generator) < 0.7,
        "document": torch.randint(0, 4, (2, length), generator=generator).sort().values,
        "length": torch.tensor([3, keys - 2]),
        "shown": torch.rand((length, length), generator=generator) < 0.5,
    }
    kinds = {"keep": Kind.BOOL, "document": Kind.INT, "length": Kind.INT, "shown": Kind.BOOL}
    mask = parse_expr(LOADED[name], kinds)
    given = {"b": Interval(1, 1), "h": Interval(2, 2)}
    grid = {"i": torch.arange(queries)[:, None], "j": torch.arange(keys)[None, :]}
    values = Environment({**grid, "b": torch.tensor(1), "h": torch.tensor(2)}, {"I": queries, "J": keys}, tensors)
    visible = evaluate(mask, values).expand(queries, keys)
    found = block_map(mask, queries, keys, block_query=block_query, block_key=block_key, ranges=given, tensors=tensors)
    assert found.visibility.tolist() == tiles_of(visible, block_query, block_key).tolist()
    share = visible_share(mask, queries, keys, tensors=tensors, at={"b": 1, "h": 2})
    assert share.exact and share.value == pytest.approx(float(visible.double().mean()))


MILLION = 1 << 20
LONG = {
    "causal": "j ≤ i",
    "from the end": "j ≤ i + J − I",
    "window": "j ≤ i and j > i − 4096",
    "sinks and window": "j ≤ i and (j > i − 4096 or j < 4)",
    "prefix": "j < 5000 or j ≤ i",
    "documents": "j ≤ i and document[j] = document[i]",
    "padding": "keep[j]",
    "chunked": "i // 8192 = j // 8192 and j ≤ i",
    "dilated": "j ≤ i and (i − j) % 64 = 0",
    "two dimensions": "abs(i // 1024 − j // 1024) ≤ 3 and abs(i % 1024 − j % 1024) ≤ 3",
    "three dimensions": "abs(i // 16384 − j // 16384) ≤ 1 and abs(i // 128 % 128 − j // 128 % 128) ≤ 1 "
    "and abs(i % 128 − j % 128) ≤ 1",
}


@pytest.mark.parametrize("name", LONG)
def test_a_million_tokens(name: str) -> None:
    """Tiles of 4096 × 4096 positions hold what a closer look finds, and memory stays far below a map."""
    tensors = {"document": torch.arange(MILLION) // 3000, "keep": torch.arange(MILLION) < 700_000}
    mask = parse_expr(LONG[name], {"document": Kind.INT, "keep": Kind.BOOL})
    tracemalloc.start()
    tiles = block_map(mask, MILLION, MILLION, block_query=4096, block_key=4096, tensors=tensors).visibility
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 384 * 2**20
    generator = np.random.default_rng(0)
    for kind in np.unique(tiles):
        rows, columns = np.nonzero(tiles == kind)
        for n in generator.choice(len(rows), 1):
            i = 4096 * int(rows[n]) + torch.arange(4096)[:, None]
            j = 4096 * int(columns[n]) + torch.arange(4096)[None, :]
            environment = Environment({"i": i, "j": j}, {"I": MILLION, "J": MILLION}, tensors)
            seen = evaluate(mask, environment).expand(4096, 4096)
            assert kind == tiles_of(seen, 4096, 4096)[0, 0]


SHARES = {  # of a map of a million tokens, in closed form
    "causal": (MILLION + 1) / (2 * MILLION),
    "chunked": 8193 / (2 * MILLION),
    "padding": 700_000 / MILLION,
    "dilated": (MILLION / 64 + 1) / 2 / MILLION,
    "two dimensions": ((7 * 1024 - 12) / MILLION) ** 2,
}


@pytest.mark.parametrize("name", SHARES)
def test_shares_of_a_million_tokens(name: str) -> None:
    mask = parse_expr(LONG[name], {"keep": Kind.BOOL})
    share = visible_share(mask, MILLION, MILLION, tensors={"keep": torch.arange(MILLION) < 700_000})
    assert share.exact == (name not in ("dilated", "two dimensions"))
    assert share.value == pytest.approx(SHARES[name], rel=1e-9 if share.exact else 0.05)


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
