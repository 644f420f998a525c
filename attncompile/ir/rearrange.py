"""Attention over a grid with its tokens in another order: the same function, with fewer tiles of the map to visit.

The grid is read off the mask: ``i // 128`` and ``i % 128`` are coordinates. Queries and keys are moved so that a tile
is a box of the grid, the mask is composed with the new order, and the results are moved back. That the order is one
(every token has a place of its own) is looked at for every token, see
:func:`attncompile.ir.tiling.why_not_rearranged`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from attncompile.ir.attend import Attend
from attncompile.ir.blocks import block_map
from attncompile.ir.expr import Apply, Const, Expr, Index, conjunction, conjuncts, rewrite, substitute, symbols, walk
from attncompile.ir.intervals import Interval, Visibility, bounds
from attncompile.ir.neighbourhood import raster_coordinates
from attncompile.ir.operators import Kind
from attncompile.ir.polynomial import constant, from_polynomial, plus, polynomial
from attncompile.ir.regroup import Regroup
from attncompile.ir.simplify import simplify
from attncompile.ir.spec import Spec
from attncompile.ir.tiling import SLOT, Tiling, why_not_rearranged

QUERY, KEY = Index("i"), Index("j")

GAIN = 0.8
"""Visited pairs, as a share of those in raster order, from which on another order pays."""

COPIED_KEYS = 600
"""Keys that a query must be spared for copies to pay, by a model. To read and write a token of query, key, value and
result takes 16 bytes for each channel of 16 bits, and a visited key 4 operations; both take as long at 150 operations
a byte, about what GPUs of compute capability 8 and 9 reach in attention and in copies."""

MOST_AXES = 3

MOST_TILES = 1 << 20
"""Tiles of a map in raster order that are looked at."""


@dataclass(frozen=True)
class Grid:
    """A mask over the coordinates of a grid.

    Attributes:
        sizes: of the axes, the outermost first.
        axes: for each axis the part of the mask that compares its coordinates alone, over ``query`` and ``key``.
    """

    sizes: tuple[int, ...]
    axes: tuple[Expr, ...]


def coordinate(side: str, axis: int) -> Index:
    """Symbol of a coordinate; ``side`` is ``query`` or ``key``."""
    return Index(f"{side}_{axis}")


def coordinates_in(expr: Expr, sizes: Sequence[int]) -> Expr:
    """The expression with ``i`` and ``j`` written by their coordinates."""
    extents: dict[str, Expr] = {}
    values: dict[Expr, Expr] = {}
    for symbol, side in ((QUERY, "query"), (KEY, "key")):
        number: Expr = Const(0)
        for axis, size in enumerate(sizes):
            number = number * size + coordinate(side, axis)
            extents[coordinate(side, axis).name] = Const(size)
        values[symbol] = number
    ranges = {name: Interval(0, int(size.value) - 1) for name, size in extents.items() if isinstance(size, Const)}
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes) - 1)]

    def apart(node: Expr) -> Expr | None:
        """``128·x + y ≤ 128·z + 255``, which holds where ``x ≤ z + 1`` does for ``y`` below 128, says so."""
        if not (isinstance(node, Apply) and node.operator in ("le", "lt", "ge", "gt")):
            return None
        left, right = node.arguments
        if not left.kind is right.kind is Kind.INT:
            return None
        upwards = node.operator in ("le", "lt")
        poly = polynomial(left - right if upwards else right - left)
        if node.operator in ("lt", "gt"):
            poly = plus(poly, constant(1))
        for stride in strides:  # poly ≤ 0, with poly = stride·quotient + rest
            quotient = {mono: value // stride for mono, value in poly.items() if mono == () or value % stride == 0}
            rest = plus(poly, {mono: -stride * value for mono, value in quotient.items()})
            found = bounds(from_polynomial(rest), ranges)
            least, most = -math.floor(-float(found.low) / stride), -math.floor(-float(found.high) / stride)
            if any(quotient) and any(rest) and least == most:
                return simplify(from_polynomial(plus(quotient, constant(least))) <= 0, extents)
        return None

    return rewrite(simplify(substitute(expr, values), extents), apart)


def read_grid(mask: Expr, tokens: int) -> Grid | None:
    """The grid over whose coordinates a mask is made, or ``None`` when it shows none of two or three axes.

    Args:
        mask: truth value over ``i j``, both of which count the same tokens in raster order.
        tokens: how many there are.
    """
    strides = {1}
    for node in walk(simplify(mask)):
        match node:
            case Apply("floordiv" | "mod", (dividend, Const(divisor))) if divisor > 1:
                step = 1
                if isinstance(dividend, Apply) and dividend.operator == "floordiv":
                    dividend, by = dividend.arguments
                    step = int(by.value) if isinstance(by, Const) else 0
                if dividend in (QUERY, KEY) and step:
                    strides |= {step, int(divisor) * step}
    inner = sorted(stride for stride in strides if 1 < stride < tokens)
    chains = [
        (1, *chosen)
        for count in range(1, MOST_AXES)
        for chosen in _choices(inner, count)
        if all(outer % stride == 0 for stride, outer in itertools.pairwise((*chosen, tokens)))
    ]
    found = [_over(mask, chain, tokens) for chain in chains]
    return max(found, key=_apartness, default=None)


def _choices(strides: list[int], count: int) -> Iterator[tuple[int, ...]]:
    return itertools.combinations(strides, count)


def _over(mask: Expr, strides: tuple[int, ...], tokens: int) -> Grid:
    """The mask over the grid whose axes have these strides, the innermost first."""
    sizes = tuple(outer // inner for inner, outer in itertools.pairwise([*strides, tokens]))[::-1]
    parts: list[list[Expr]] = [[] for _ in sizes]
    for part in conjuncts(coordinates_in(mask, sizes)):
        found = {node.name for node in symbols(part) if isinstance(node, Index)}
        for axis in range(len(sizes)):
            if found <= {coordinate("query", axis).name, coordinate("key", axis).name}:
                parts[axis].append(part)
    return Grid(sizes, tuple(conjunction(each) for each in parts))


def _apartness(grid: Grid) -> tuple[int, int, int]:
    """How many parts of a mask compare coordinates of one axis, how many axes have some, and how many there are."""
    counts = [len(conjuncts(mask)) for mask in grid.axes]
    return sum(counts), sum(count > 0 for count in counts), len(counts)


@functools.lru_cache(maxsize=4096)
def visited_pairs(mask: Expr, size: int, dilation: int, queries: int, keys: int) -> int:
    """Pairs of positions of one axis in the tiles that have to be visited.

    Args:
        mask: over ``query_…`` and ``key_…`` of this axis.
        size: positions of the axis.
        dilation: positions with equal remainders come together.
        queries, keys: sides of a tile.
    """
    sides = {"query": (QUERY, queries), "key": (KEY, keys)}
    values: dict[Expr, Expr] = {}
    inside: list[Expr] = []
    lengths: dict[str, int] = {}
    for node in symbols(mask):
        assert isinstance(node, Index)
        symbol, side = sides[node.name.rpartition("_")[0]]
        values[node] = Tiling((size,), (side,), (dilation,)).coordinates(symbol)[0]
    for name, (symbol, side) in sides.items():
        tiling = Tiling((size,), (side,), (dilation,))
        lengths[name] = tiling.slots
        inside += tiling.inside(symbol)
    extents: dict[str, Expr] = {"i": Const(lengths["query"]), "j": Const(lengths["key"])}
    composed = simplify(conjunction([substitute(mask, values), *inside]), extents)
    found = block_map(composed, lengths["query"], lengths["key"], block_query=queries, block_key=keys)
    return int((found.visibility != Visibility.NONE).sum()) * queries * keys


def visited_in_raster_order(grid: Grid, queries: int, keys: int) -> int:
    """Pairs in the tiles that have to be visited where a tile is a run of tokens, as :func:`visited_pairs` counts them.

    Of very long maps the tiles of some queries in the middle stand for all.
    """
    tokens = math.prod(grid.sizes)
    rows = math.ceil(tokens / queries)
    looked_at = min(rows, max(1, MOST_TILES * keys // tokens))
    first = (rows - looked_at) // 2 * queries
    length = min(looked_at * queries, tokens - first)
    values: dict[Expr, Expr] = {}
    for symbol, side in ((QUERY + first if first else QUERY, "query"), (KEY, "key")):
        places = raster_coordinates(symbol, grid.sizes)
        values |= {coordinate(side, axis): place for axis, place in enumerate(places)}
    mask = conjunction([substitute(each, values) for each in grid.axes])
    found = block_map(mask, length, tokens, block_query=queries, block_key=keys)
    tiles = int((found.visibility != Visibility.NONE).sum())
    return tiles * rows // math.ceil(length / queries) * queries * keys


def boxes(places: int, sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Boxes of so many places, a power of two, with a power of two along each axis."""
    if len(sizes) == 1:
        yield (places,)
        return
    for power in range(places.bit_length()):
        if (1 << power) < 2 * sizes[0]:
            for rest in boxes(places >> power, sizes[1:]):
                yield (1 << power, *rest)


def dilations(mask: Expr, size: int) -> tuple[int, ...]:
    """Steps that the positions of one axis may be grouped by, 1 first."""
    found = {
        int(node.arguments[1].value)
        for node in walk(mask)
        if isinstance(node, Apply) and node.operator in ("mod", "floordiv") and isinstance(node.arguments[1], Const)
    }
    return (1, *sorted(step for step in found if 1 < step <= size // 2))


@dataclass(frozen=True)
class Arrangement:
    """Orders for queries and keys.

    Attributes:
        queries, keys: the orders.
        visited: pairs of the map in tiles that are visited, where every axis counts alone.
    """

    queries: Tiling
    keys: Tiling
    visited: int


def arrangements(grid: Grid, queries: int, keys: int) -> Iterator[Arrangement]:
    """Orders whose tiles are boxes of so many queries and keys.

    Args:
        grid: with the mask of each axis.
        queries, keys: places of a tile, powers of two.
    """
    for axis_steps in itertools.product(*(dilations(m, n) for m, n in zip(grid.axes, grid.sizes, strict=True))):
        for query_box in boxes(queries, grid.sizes):
            for key_box in boxes(keys, grid.sizes):
                sides = zip(grid.axes, grid.sizes, axis_steps, query_box, key_box, strict=True)
                visited = math.prod(visited_pairs(*each) for each in sides)
                yield Arrangement(
                    Tiling(grid.sizes, query_box, axis_steps), Tiling(grid.sizes, key_box, axis_steps), visited
                )


def best_arrangement(grid: Grid, queries: int, keys: int) -> Arrangement:
    """The order that leaves the fewest pairs to visit; of equal ones that without dilation, with long last sides."""
    return min(
        arrangements(grid, queries, keys),
        key=lambda each: (each.visited, math.prod(each.queries.dilation), -each.keys.box[-1], -each.queries.box[-1]),
    )


def why_not_regrouped(spec: Spec) -> str | None:
    """Why the tokens of a Spec have no other order that leaves fewer tiles, or ``None`` where there may be one."""
    attend = spec.attend()
    if attend is None or len(spec.operations) != 1:
        return "it is not one attention alone"
    if attend.lse:
        return "it gives the log-sum-exp in the order of the tokens"
    if attend.taps:
        return f"it gives {', '.join(attend.taps)} in the order of the tokens"
    types = spec.types()
    lengths = {simplify(types[name].sizes[2]) for name in (attend.query, attend.key)}
    length = next(iter(lengths))
    if len(lengths) > 1 or not isinstance(length, Const):
        return f"its lengths are {', '.join(sorted(map(str, lengths)))}, not one number"
    if read_grid(attend.mask, int(length.value)) is None:
        return f"its mask {attend.mask} shows no grid of two or three axes"
    return None


@functools.lru_cache(maxsize=256)
def regrouped(spec: Spec, queries: int = 128, keys: int = 128, copied: bool = True) -> Spec | None:
    """The Spec with its tokens in boxes of a grid, or ``None`` where that would not leave much fewer tiles to visit.

    ``out = back(attend(move(q), move(k), move(v)))`` with ``mask'(i, j) = mask(token(i), token(j))`` for places that
    hold a token; score and sink likewise.

    Args:
        spec: one attention; nothing happens where :func:`why_not_regrouped` has a reason.
        queries, keys: places of a tile.
        copied: whether tokens are copied to their places and back, which has to be made up for.
    """
    if why_not_regrouped(spec):
        return None
    _, grid = _grid_of(spec)
    found = best_arrangement(grid, queries, keys)
    before = visited_in_raster_order(grid, queries, keys)
    if found.visited > GAIN * before:
        return None
    if copied and before - found.visited < COPIED_KEYS * found.queries.tokens:
        return None
    return arranged(spec, found)


def _grid_of(spec: Spec) -> tuple[Attend, Grid]:
    attend = spec.attend()
    assert attend is not None
    grid = read_grid(attend.mask, int(str(simplify(spec.types()[attend.query].sizes[2]))))
    assert grid is not None
    return attend, grid


def arranged(spec: Spec, found: Arrangement) -> Spec:
    """The Spec in a given order of the tokens of its grid.

    Raises:
        ValueError: when there is no such order for it, or an order loses a token or places one twice.
    """
    reason = why_not_regrouped(spec)
    if reason:
        raise ValueError(f"the tokens of {spec.name} cannot be moved: {reason}")
    attend, _ = _grid_of(spec)
    for tiling in (found.queries, found.keys):
        reason = why_not_rearranged(tiling.token(SLOT), tiling.slot(SLOT), tiling.tokens, tiling.slots)
        if reason:
            raise ValueError(f"{spec.name}: tokens cannot be moved to {tiling}: {reason}")
    sizes = found.queries.grid
    extents: dict[str, Expr] = {"i": Const(found.queries.slots), "j": Const(found.keys.slots)}
    values: dict[Expr, Expr] = {}
    for side, tiling, symbol in (("query", found.queries, QUERY), ("key", found.keys, KEY)):
        for axis, place in enumerate(tiling.coordinates(symbol)):
            values[coordinate(side, axis)] = place

    def composed(expr: Expr) -> Expr:
        return simplify(substitute(coordinates_in(expr, sizes), values), extents)

    names = {name: _fresh(f"{name}_boxes", spec) for name in (attend.query, attend.key, attend.value, attend.out)}
    changed = dataclasses.replace(
        attend,
        query=names[attend.query],
        key=names[attend.key],
        value=names[attend.value],
        score=composed(attend.score),
        mask=simplify(conjunction([composed(attend.mask), *found.keys.inside(KEY)]), extents),
        sink=composed(attend.sink),
        weight=composed(attend.weight),
        out=names[attend.out],
    )
    moves = {attend.query: found.queries, attend.key: found.keys, attend.value: found.keys}
    before = tuple(
        Regroup(name, tiling.token(SLOT), Const(tiling.slots), names[name]) for name, tiling in moves.items()
    )
    back = Regroup(names[attend.out], found.queries.slot(SLOT), Const(found.queries.tokens), attend.out)
    return dataclasses.replace(spec, operations=(*before, changed, back)).verify()


def _fresh(name: str, spec: Spec) -> str:
    known = spec.types()
    while name in known:
        name += "_"
    return name


__all__ = ["Arrangement", "Grid", "arranged", "best_arrangement", "read_grid", "regrouped",
           "visited_in_raster_order", "why_not_regrouped"]  # fmt: skip
