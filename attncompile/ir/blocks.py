"""Block maps: which tiles of the attention map a mask leaves visible, found without materialising the map.

Two readings of one mask: :func:`block_map` classifies every tile by interval analysis (any mask), and
:func:`key_bounds` gives closed-form limits of the visible keys per query where the mask compares ``j`` with an
expression of the query position (causal, window, prefix), which is what a kernel's loop bounds are made of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch

from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import Apply, Const, Expr, Index, Load, conjuncts, symbols, walk
from attncompile.ir.intervals import Interval, Visibility, classify
from attncompile.ir.operators import Kind
from attncompile.ir.simplify import simplify

KEY, QUERY = Index("j"), Index("i")


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
    for name, value in (("query_length", query_length), ("key_length", key_length), ("block_query", block_query),
                        ("block_key", block_key)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    query_low, query_high = _edges(query_length, block_query)
    key_low, key_high = _edges(key_length, block_key)
    given = {"I": Interval(query_length, query_length), "J": Interval(key_length, key_length), **(ranges or {})}
    box = {**given, "i": Interval(query_low[:, None], query_high[:, None]),
           "j": Interval(key_low[None, :], key_high[None, :])}
    visibility = np.broadcast_to(classify(simplify(mask), box), (len(query_low), len(key_low)))
    return BlockMap(np.ascontiguousarray(visibility), block_query, block_key, query_length, key_length)


def density(
    mask: Expr,
    query_length: int,
    key_length: int,
    *,
    sizes: Mapping[str, int] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> float:
    """Share of visible positions in the map of one batch row and head.

    Parts of the mask that load a tensor count as visible when ``tensors`` lacks it, so the result is then an upper
    bound. Only tiles that intervals leave undecided are evaluated, one row of tiles at a time; nothing of size ``I × J``
    is kept.
    """
    known = tensors or {}
    parts = [p for p in conjuncts(simplify(mask)) if all(
        node.tensor in known for node in walk(p) if isinstance(node, Load))]
    if not parts:
        return 1.0
    whole = reduce(lambda left, right: left & right, parts)
    ranges = {name: Interval(value, value) for name, value in (sizes or {}).items()}
    names = {s.name for s in symbols(whole) if isinstance(s, Index)} - {"i", "j"}
    ranges |= {name: Interval(0, 0) for name in names}
    tiles = block_map(whole, query_length, key_length, ranges=ranges)
    count = 0
    for row, visibility in enumerate(tiles.visibility):
        i = _positions(np.array([row]), tiles.block_query, query_length)
        count += len(i) * len(_positions(np.flatnonzero(visibility == Visibility.ALL), tiles.block_key, key_length))
        j = _positions(np.flatnonzero(visibility == Visibility.MIXED), tiles.block_key, key_length)
        environment = Environment(
            indices={"i": i[:, None], "j": j[None, :], **{name: torch.zeros((1, 1), dtype=torch.int64) for name in names}},
            sizes={"I": query_length, "J": key_length, **(sizes or {})}, tensors=known,
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
            case Apply("lt" | "le" | "gt" | "ge" as operator, (Index("j"), limit)) if (
                limit.kind is Kind.INT and KEY not in symbols(limit)
                and not any(isinstance(node, Load) for node in walk(limit))
            ):
                if operator == "lt":
                    upper.append(limit)
                elif operator == "le":
                    upper.append(simplify(limit + 1))
                elif operator == "ge":
                    lower.append(limit)
                else:
                    lower.append(simplify(limit + 1))
            case Apply("eq", (Index("j"), limit)) if limit.kind is Kind.INT and KEY not in symbols(limit) and not any(
                isinstance(node, Load) for node in walk(limit)
            ):
                lower.append(limit)
                upper.append(simplify(limit + 1))
            case _:
                rest.append(part)
    return KeyBounds(tuple(lower), tuple(upper), tuple(rest))


def picture(mask: Expr, query_length: int, key_length: int, *, columns: int = 32) -> str:
    """A small picture of the mask in half blocks: full where all is visible, light where part is, blank where none is."""
    block = max(1, math.ceil(max(query_length, key_length) / columns))
    tiles = block_map(mask, query_length, key_length, block_query=2 * block, block_key=block).visibility
    return "\n".join("".join(" ░█"[tile] for tile in row) for row in tiles)


def sliding_window(size: int, sinks: int = 0) -> Expr:
    """Visible keys of a causal sliding window: ``i - size < j ≤ i``, and the first ``sinks`` keys.

    Args:
        size: keys kept per query, the query's own position included (at least 1).
        sinks: leading positions that stay visible to every later query.

    Raises:
        ValueError: for a size below 1 or a negative number of sinks.
    """
    if size < 1 or sinks < 0:
        raise ValueError(f"a window needs size ≥ 1 and sinks ≥ 0, got size={size}, sinks={sinks}")
    inside = KEY > QUERY - size
    return simplify(inside | (KEY < Const(sinks))) if sinks else simplify(inside)
