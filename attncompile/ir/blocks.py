"""Block maps: which tiles of the attention map a mask leaves visible, found without materialising the map.

Two readings of one mask: :func:`block_map` classifies every tile by interval analysis (any mask), and
:func:`key_bounds` gives closed-form limits of the visible keys per query where the mask compares ``j`` with
an expression of the query position (causal, window, prefix), which is what a kernel's loop bounds are made
of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import Apply, Expr, Index, Load, conjunction, conjuncts, symbols, walk
from attncompile.ir.intervals import Interval, Visibility, classify
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


def block_map(
    mask: Expr,
    query_length: int,
    key_length: int,
    *,
    block_query: int = 128,
    block_key: int = 128,
    ranges: Mapping[str, Interval] | None = None,
) -> BlockMap:
    """Classify every tile of an attention map.

    Args:
        mask: truth value over ``b h i j``; what it loads counts as unknown unless ``ranges`` says more.
        query_length, key_length: sizes ``I`` and ``J``.
        block_query, block_key: tile sizes in positions.
        ranges: ranges of other symbols and of tensor elements.

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
    given = {
        "I": Interval(query_length, query_length),
        "J": Interval(key_length, key_length),
        **(ranges or {}),
    }
    box = {
        **given,
        "i": Interval(query_low[:, None], query_high[:, None]),
        "j": Interval(key_low[None, :], key_high[None, :]),
    }
    mask = simplify(mask)
    visibility = np.array(np.broadcast_to(classify(mask, box), (len(query_low), len(key_low))))
    rows, columns = np.nonzero(visibility == Visibility.MIXED)
    tiles = _Boxes(
        np.arange(len(rows)), query_low[rows], query_high[rows], key_low[columns], key_high[columns]
    )
    visibility[rows, columns] = _resolve(mask, tiles, given)
    return BlockMap(visibility, block_query, block_key, query_length, key_length)


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
"""Boxes in hand beyond which undecided tiles stay mixed."""


@dataclass(frozen=True)
class _Boxes:
    """Boxes of positions, first and last, each part of a tile."""

    tile: np.ndarray[Any, Any]
    query_low: np.ndarray[Any, Any]
    query_high: np.ndarray[Any, Any]
    key_low: np.ndarray[Any, Any]
    key_high: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.tile)

    def __getitem__(self, which: np.ndarray[Any, Any]) -> _Boxes:
        return _Boxes(*(getattr(self, f.name)[which] for f in fields(self)))

    @property
    def are_points(self) -> np.ndarray[Any, Any]:
        """Which boxes are one position."""
        points: np.ndarray[Any, Any] = (self.query_low == self.query_high) & (self.key_low == self.key_high)
        return points

    def classified(self, mask: Expr, given: Mapping[str, Interval]) -> np.ndarray[Any, Any]:
        """Visibility of the mask in each box."""
        queries, keys = Interval(self.query_low, self.query_high), Interval(self.key_low, self.key_high)
        return np.broadcast_to(classify(mask, {**given, "i": queries, "j": keys}), len(self))

    def point(self, query: float, key: float) -> _Boxes:
        """The position at these fractions of each box."""
        i = np.round(self.query_low + query * (self.query_high - self.query_low))
        j = np.round(self.key_low + key * (self.key_high - self.key_low))
        return _Boxes(self.tile, i, i, j, j)

    def halves(self) -> _Boxes:
        """Each box cut in two across its longer side."""
        tall = self.query_high - self.query_low >= self.key_high - self.key_low
        middle_query = np.floor((self.query_low + self.query_high) / 2)
        middle_key = np.floor((self.key_low + self.key_high) / 2)
        first = (
            self.tile,
            self.query_low,
            np.where(tall, middle_query, self.query_high),
            self.key_low,
            np.where(tall, self.key_high, middle_key),
        )
        second = (
            self.tile,
            np.where(tall, middle_query + 1, self.query_low),
            self.query_high,
            np.where(tall, self.key_low, middle_key + 1),
            self.key_high,
        )
        return _Boxes(*(np.concatenate(sides) for sides in zip(first, second, strict=True)))


def _resolve(mask: Expr, tiles: _Boxes, given: Mapping[str, Interval]) -> np.ndarray[Any, np.dtype[np.int8]]:
    """Visibility of tiles that their own bounds leave undecided.

    A tile is mixed once a position of it is found that is not visible and one that is not hidden; otherwise
    it is cut into boxes until each is decided. A position that stays undecided (its mask loads a tensor)
    counts as both.
    """
    not_hidden, not_visible = np.zeros(len(tiles), dtype=bool), np.zeros(len(tiles), dtype=bool)

    def note(boxes: _Boxes, found: np.ndarray[Any, Any]) -> None:
        points = boxes.are_points
        not_hidden[boxes.tile[(found == Visibility.ALL) | (points & (found == Visibility.MIXED))]] = True
        not_visible[boxes.tile[(found == Visibility.NONE) | (points & (found == Visibility.MIXED))]] = True

    for query, key in _PROBES:
        points = tiles[~(not_hidden & not_visible)].point(query, key)
        if len(points):
            note(points, points.classified(mask, given))
    boxes = tiles[~(not_hidden & not_visible)]
    while len(boxes) and 2 * len(boxes) <= _MOST_BOXES:
        boxes = boxes.halves()
        found = boxes.classified(mask, given)
        note(boxes, found)
        boxes = boxes[(found == Visibility.MIXED) & ~boxes.are_points]
        boxes = boxes[~(not_hidden & not_visible)[boxes.tile]]
    not_hidden[boxes.tile] = not_visible[boxes.tile] = True
    visible, hidden = not_hidden & ~not_visible, not_visible & ~not_hidden
    return np.where(visible, Visibility.ALL, np.where(hidden, Visibility.NONE, Visibility.MIXED)).astype(
        np.int8
    )


def density(
    mask: Expr,
    query_length: int,
    key_length: int,
    *,
    sizes: Mapping[str, int] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> float:
    """Share of visible positions in the map of one batch row and head.

    Parts of the mask that load a tensor count as visible when ``tensors`` lacks it, so the result is then an
    upper bound. Only tiles that intervals leave undecided are evaluated, one row of tiles at a time; nothing
    of size ``I × J`` is kept.
    """
    known = tensors or {}
    parts = [
        p
        for p in conjuncts(simplify(mask))
        if all(node.tensor in known for node in walk(p) if isinstance(node, Load))
    ]
    if not parts:
        return 1.0
    whole = conjunction(parts)
    ranges = {name: Interval(value, value) for name, value in (sizes or {}).items()}
    names = {s.name for s in symbols(whole) if isinstance(s, Index)} - {"i", "j"}
    ranges |= {name: Interval(0, 0) for name in names}
    tiles = block_map(whole, query_length, key_length, ranges=ranges)
    count = 0
    for row, visibility in enumerate(tiles.visibility):
        i = _positions(np.array([row]), tiles.block_query, query_length)
        count += len(i) * len(
            _positions(np.flatnonzero(visibility == Visibility.ALL), tiles.block_key, key_length)
        )
        j = _positions(np.flatnonzero(visibility == Visibility.MIXED), tiles.block_key, key_length)
        environment = Environment(
            indices={
                "i": i[:, None],
                "j": j[None, :],
                **{name: torch.zeros((1, 1), dtype=torch.int64) for name in names},
            },
            sizes={"I": query_length, "J": key_length, **(sizes or {})},
            tensors=known,
        )
        if len(j):
            count += int(evaluate(whole, environment).expand(len(i), len(j)).sum())
    return count / (query_length * key_length)


def _positions(tiles: np.ndarray[Any, Any], block: int, length: int) -> torch.Tensor:
    """The positions that some tiles cover: int64, in order."""
    covered = (tiles[:, None] * block + np.arange(block)[None, :]).reshape(-1)
    return torch.from_numpy(covered[covered < length])


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


def picture(mask: Expr, query_length: int, key_length: int, *, columns: int = 32) -> str:
    """A small picture of the mask: full blocks where all is visible, light where part is, blank where none
    is.

    A character stands for twice as many queries as keys, as characters are twice as high as wide.
    """
    block = max(1, math.ceil(max(query_length, key_length) / columns))
    tiles = block_map(mask, query_length, key_length, block_query=2 * block, block_key=block).visibility
    return "\n".join("".join(" ░█"[tile] for tile in row) for row in tiles)
