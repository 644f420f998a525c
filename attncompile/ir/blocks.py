"""Block maps: which tiles of the attention map a mask leaves visible, found without materialising the map.

Two readings of one mask: :func:`block_map` classifies every tile by interval analysis (any mask), and
:func:`key_bounds` gives closed-form limits of the visible keys per query where the mask compares ``j`` with
an expression of the query position (causal, window, prefix), which is what a kernel's loop bounds are made
of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from attncompile.ir.boxes import Boxes, Sight
from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import Apply, Expr, Index, Load, conjunction, conjuncts, symbols, walk
from attncompile.ir.intervals import Interval, Visibility
from attncompile.ir.operators import Kind
from attncompile.ir.simplify import simplify

KEY = Index("j")


@dataclass(frozen=True)
class BlockMap:
    """Visibility per tile.

    Attributes:
        visibility: int8 ``[query blocks, key blocks]`` of :class:`Visibility`.
        block_query, block_key: tile sizes in positions.
        query_length, key_length: sizes of the attention map.
    """

    visibility: np.ndarray[Any, np.dtype[np.int8]]
    block_query: int
    block_key: int
    query_length: int
    key_length: int

    @property
    def visited(self) -> float:
        """Share of the tiles that a block-sparse kernel has to visit."""
        return float(np.mean(self.visibility != Visibility.NONE)) if self.visibility.size else 0.0


def _edges(length: int, block: int) -> tuple[Any, Any]:
    starts = np.arange(0, length, block, dtype=float)
    return starts, np.minimum(starts + block, length) - 1


_STRIP = 1 << 15
"""Tiles that are classified at a time, so that memory does not grow with the square of the length."""


def block_map(
    mask: Expr,
    query_length: int,
    key_length: int,
    *,
    block_query: int = 128,
    block_key: int = 128,
    ranges: Mapping[str, Interval] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> BlockMap:
    """Classify every tile of an attention map.

    Exact for masks of integer comparisons (causal, window, prefix, chunked, dilated, neighbourhoods and what
    they are combined to), and for what they load when the tensors are given. Only the result holds something
    for every tile; nothing holds anything for every position.

    Args:
        mask: truth value over ``b h i j``; what it loads counts as unknown unless ``ranges`` or ``tensors``
            say more.
        query_length, key_length: sizes ``I`` and ``J``.
        block_query, block_key: tile sizes in positions.
        ranges: ranges of other symbols and of tensor elements.
        tensors: values of tensors that the mask loads; ``b`` and ``h`` then need a range of one number.

    Raises:
        ValueError: for sizes below 1, or when the expression is no mask.
    """
    for name, value in (
        ("query_length", query_length),
        ("key_length", key_length),
        ("block_query", block_query),
        ("block_key", block_key),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    query_low, query_high = _edges(query_length, block_query)
    key_low, key_high = _edges(key_length, block_key)
    sight = Sight(mask, _given(query_length, key_length, ranges), tensors)
    visibility = np.empty((len(query_low), len(key_low)), dtype=np.int8)
    height = max(1, _STRIP // len(key_low))
    for top in range(0, len(query_low), height):
        low, high = query_low[top : top + height], query_high[top : top + height]
        queries, keys = Interval(low[:, None], high[:, None]), Interval(key_low[None, :], key_high[None, :])
        strip = np.array(np.broadcast_to(sight.classify(queries, keys), (len(low), len(key_low))))
        rows, columns = np.nonzero(strip == Visibility.MIXED)
        tiles = Boxes(np.arange(len(rows)), low[rows], high[rows], key_low[columns], key_high[columns])
        strip[rows, columns] = _resolve(sight, tiles)
        visibility[top : top + height] = strip
    return BlockMap(visibility, block_query, block_key, query_length, key_length)


def _given(queries: int, keys: int, ranges: Mapping[str, Interval] | None) -> dict[str, Interval]:
    return {"I": Interval(queries, queries), "J": Interval(keys, keys), **(ranges or {})}


_PROBES = (
    (0.0, 0.0),
    (0.0, 1.0),
    (1.0, 0.0),
    (1.0, 1.0),
    (0.5, 0.5),
    (0.38, 0.62),
    (0.76, 0.24),
    (0.15, 0.85),
    (0.53, 0.47),
    (0.91, 0.09),
    (0.29, 0.71),
    (0.67, 0.33),
)
"""Where a tile is looked at first: fractions of its query and key range."""
_MOST_BOXES = 1 << 18
"""Boxes of one tile beyond which it stays mixed."""
_AT_ONCE = 4
"""Boxes of one tile that are cut at a time."""


def _rank(tile: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """How many boxes of the same tile come before each."""
    order = np.argsort(tile, kind="stable")
    in_order = tile[order]
    starts = np.flatnonzero(np.concatenate([[True], in_order[1:] != in_order[:-1]]))[: len(in_order)]
    rank = np.empty(len(tile), dtype=np.int64)
    rank[order] = np.arange(len(tile)) - np.repeat(starts, np.diff([*starts, len(tile)]))
    return rank


def _resolve(sight: Sight, tiles: Boxes) -> np.ndarray[Any, np.dtype[np.int8]]:
    """Visibility of tiles that their own bounds leave undecided; ``tiles.tile`` counts them.

    A tile is mixed once a position of it is found that is not visible and one that is not hidden; otherwise
    it is cut into boxes until each is decided. A position that stays undecided (its mask loads a tensor)
    counts as both.
    """
    not_hidden, not_visible = np.zeros(len(tiles), dtype=bool), np.zeros(len(tiles), dtype=bool)

    def note(boxes: Boxes, found: np.ndarray[Any, Any]) -> None:
        points = boxes.are_points
        not_hidden[boxes.tile[(found == Visibility.ALL) | (points & (found == Visibility.MIXED))]] = True
        not_visible[boxes.tile[(found == Visibility.NONE) | (points & (found == Visibility.MIXED))]] = True

    for query, key in _PROBES:
        points = tiles[~(not_hidden & not_visible)].point(query, key)
        if len(points):
            note(points, sight.in_boxes(points))
    groups = [tiles[~(not_hidden & not_visible)]]
    seen = 0
    while groups:
        boxes = groups.pop()
        boxes = boxes[~(not_hidden & not_visible)[boxes.tile]]
        if not len(boxes):
            continue
        seen += len(boxes)
        if seen > _MOST_BOXES * max(1, len(tiles)):
            not_hidden[boxes.tile] = not_visible[boxes.tile] = True
            continue
        boxes = boxes.halves()
        found = sight.in_boxes(boxes)
        note(boxes, found)
        boxes = boxes[(found == Visibility.MIXED) & ~boxes.are_points]
        first = _rank(boxes.tile) < _AT_ONCE
        groups += [boxes[~first], boxes[first]]  # depth first: one position of each kind is enough
    visible, hidden = not_hidden & ~not_visible, not_visible & ~not_hidden
    return np.where(visible, Visibility.ALL, np.where(hidden, Visibility.NONE, Visibility.MIXED)).astype(np.int8)


@dataclass(frozen=True)
class Share:
    """How much of an attention map is visible.

    Attributes:
        value: between 0 and 1.
        exact: whether every undecided position was looked at; otherwise a fixed random choice of boxes stands
            for all.
    """

    value: float
    exact: bool


_SMALLEST = 16
"""Side of the boxes whose positions are looked at one by one."""
_GRID = 64
"""Tiles along each side that counting starts from."""
_COUNTED, _CHOSEN = 1 << 18, 1 << 16
"""Undecided boxes up to which all are cut further, and how many are chosen of more."""


def density(
    mask: Expr,
    query_length: int,
    key_length: int,
    *,
    sizes: Mapping[str, int] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    at: Mapping[str, int] | None = None,
) -> float:
    """The value of :func:`visible_share`."""
    return visible_share(mask, query_length, key_length, sizes=sizes, tensors=tensors, at=at).value


def visible_share(
    mask: Expr,
    query_length: int,
    key_length: int,
    *,
    sizes: Mapping[str, int] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    at: Mapping[str, int] | None = None,
) -> Share:
    """Share of visible positions in the map of one batch row and head.

    Boxes that intervals decide are counted whole, the others are cut until they are small enough to look at
    each position. Where there are too many of those (a dilated mask of a million tokens), a choice of them is
    looked at, and the share is an estimate.

    Args:
        mask: truth value over ``b h i j``; parts that load a tensor count as visible when ``tensors`` lacks
            it, so the result is then an upper bound.
        query_length, key_length: sizes ``I`` and ``J``.
        sizes: values of other sizes.
        tensors: values of tensors that the mask loads.
        at: batch row ``b`` and head ``h``; 0 each when left out.
    """
    known = tensors or {}
    parts = [
        p for p in conjuncts(simplify(mask)) if all(node.tensor in known for node in walk(p) if isinstance(node, Load))
    ]
    if not parts:
        return Share(1.0, True)
    whole = conjunction(parts)
    names = {s.name for s in symbols(whole) if isinstance(s, Index)} - {"i", "j"}
    others = {name: (at or {}).get(name, 0) for name in sorted(names)}
    numbers = {**(sizes or {}), **others}
    ranges = {name: Interval(value, value) for name, value in numbers.items()}
    sight = Sight(whole, _given(query_length, key_length, ranges), known)
    environment = Environment(
        indices={name: torch.full((1, 1, 1), value) for name, value in others.items()},
        sizes={"I": query_length, "J": key_length, **(sizes or {})},
        tensors=known,
    )
    count, weight, exact = 0.0, 1.0, True
    boxes = _starting_boxes(query_length, key_length)
    chosen = np.random.default_rng(0)
    while len(boxes):
        found = sight.in_boxes(boxes)
        count += weight * float(boxes[found == Visibility.ALL].positions.sum())
        boxes = boxes[found == Visibility.MIXED]
        small = boxes.positions <= _SMALLEST**2
        for part in boxes[small].parts():
            count += weight * _visible_positions(whole, part, environment)
        boxes = boxes[~small]
        if len(boxes) > _COUNTED:
            exact = False
            kept = np.sort(chosen.choice(len(boxes), _CHOSEN, replace=False))
            weight *= float(boxes.positions.sum() / boxes[kept].positions.sum())
            boxes = boxes[kept]
        boxes = boxes.halves()
    return Share(min(count / (query_length * key_length), 1.0), exact)


def _starting_boxes(queries: int, keys: int) -> Boxes:
    side = max(_SMALLEST, math.ceil(max(queries, keys) / _GRID))
    query_low, query_high = _edges(queries, side)
    key_low, key_high = _edges(keys, side)
    rows, columns = (part.reshape(-1) for part in np.indices((len(query_low), len(key_low))))
    return Boxes(np.arange(len(rows)), query_low[rows], query_high[rows], key_low[columns], key_high[columns])


def _visible_positions(mask: Expr, boxes: Boxes, environment: Environment) -> int:
    """How many positions of small boxes the mask leaves visible."""
    if not len(boxes):
        return 0

    def line(low: Any, high: Any) -> tuple[torch.Tensor, torch.Tensor]:
        start, last = torch.from_numpy(low).long()[:, None], torch.from_numpy(high).long()[:, None]
        positions = start + torch.arange(int((high - low).max()) + 1)[None, :]
        return positions, positions <= last

    i, query_inside = line(boxes.query_low, boxes.query_high)
    j, key_inside = line(boxes.key_low, boxes.key_high)
    grid = {**environment.indices, "i": i[:, :, None], "j": j[:, None, :]}
    seen = evaluate(mask, replace(environment, indices=grid))
    return int((seen & query_inside[:, :, None] & key_inside[:, None, :]).sum())


@dataclass(frozen=True)
class KeyBounds:
    """Limits of the visible keys, as expressions without ``j``.

    Attributes:
        lower: every visible key has ``j ≥ e`` for each ``e``.
        upper: every visible key has ``j < e`` for each ``e``.
        rest: the parts of the mask that give no such limit.
    """

    lower: tuple[Expr, ...]
    upper: tuple[Expr, ...]
    rest: tuple[Expr, ...]


def key_bounds(mask: Expr) -> KeyBounds:
    """Split a mask into closed-form limits of ``j`` and the rest.

    Only parts that compare ``j`` itself with an integer expression free of ``j`` and of loads become limits.
    """
    lower: list[Expr] = []
    upper: list[Expr] = []
    rest: list[Expr] = []
    for part in conjuncts(simplify(mask)):
        match part:
            case Apply("lt" | "le" | "gt" | "ge" | "eq" as operator, (Index("j"), limit)) if _is_limit(limit):
                if operator in ("ge", "gt", "eq"):
                    lower.append(simplify(limit + 1) if operator == "gt" else limit)
                if operator in ("lt", "le", "eq"):
                    upper.append(limit if operator == "lt" else simplify(limit + 1))
            case _:
                rest.append(part)
    return KeyBounds(tuple(lower), tuple(upper), tuple(rest))


def _is_limit(expr: Expr) -> bool:
    return expr.kind is Kind.INT and not any(node == KEY or isinstance(node, Load) for node in walk(expr))
