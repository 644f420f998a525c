"""Which key blocks a tile visits where the mask gives no limits in closed form: documents, padding, blocks, dilation.

A small kernel runs before the attention. It knows the least and the greatest element of each tensor that the mask
loads, for the queries of a tile and for the keys of a block; interval analysis over these says of every block whether
some query may see some key of it, and whether every query sees every key. Loads by ``i`` or ``j`` alone take part, and
those of a mask that is given for blocks (:mod:`attncompile.codegen.gluon.cells`); what else a mask loads leaves it
undecided.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from attncompile.codegen.gluon.cells import cell, few
from attncompile.codegen.triton.expressions import Scope, print_triton
from attncompile.codegen.triton.visits import (
    KEY_FIRST,
    KEY_LAST,
    ROW_FIRST,
    ROW_LAST,
    certain,
    possible,
    visits,
)
from attncompile.ir.expr import FALSE, TRUE, Expr, Index, Load, apply, substitute, symbols, walk
from attncompile.ir.operators import Kind
from attncompile.ir.simplify import simplify
from attncompile.ir.types import TensorType
from attncompile.kernels.hopper import HopperTile
from attncompile.kernels.hopper_marks import Cells, Extreme, MarkBlocks


@dataclass(frozen=True)
class _Seen:
    """A load, and the index symbol that stands for its element; ``axis`` is ``i``, ``j`` or ``ij``."""

    load: Load
    symbol: Index
    axis: str
    cells: Cells | None = None


def marks(
    mask: Expr,
    queries: Expr,
    keys: Expr,
    tensors: Mapping[str, str],
    sizes: Mapping[str, str],
    types: Mapping[str, TensorType],
    extents: Mapping[str, Expr],
    tile: HopperTile,
) -> MarkBlocks | None:
    """The kernel that lists key blocks, or ``None`` where limits in closed form do as well.

    Args:
        mask: truth value over ``b h i j``.
        queries, keys: sizes of the map.
        tensors, sizes: identifiers of captured tensors and of sizes.
        types: of the captured tensors.
        extents: index name to axis size.
        tile: how the work is divided.
    """
    found = visits(mask, queries, keys)
    seen = _loads(mask, tile)
    replaced = substitute(mask, {each.load: _element(each) for each in seen})
    ranges = {"i": (ROW_FIRST, ROW_LAST), "j": (KEY_FIRST, KEY_LAST)}
    ranges |= {each.symbol.name: (_bound("low", each), _bound("high", each)) for each in seen}
    some, every = (simplify(rule(replaced, ranges)) for rule in (possible, certain))
    closed = found.test == TRUE and (found.full is not None or every == FALSE) and not _moves(some, seen)
    if mask == TRUE or closed:
        return None
    names = {name: name for name in ("b", "h", "row_first", "row_last", "key_first", "key_last")}
    names |= {bound.name: bound.name for each in seen for bound in (_bound("low", each), _bound("high", each))}
    inside = {"row_first": queries, "row_last": queries, "key_first": keys, "key_last": keys}
    block = Scope(names, sizes, tensors, types, {**extents, **inside})
    extremes = []
    numbers: Counter[str] = Counter()
    for number, each in enumerate(seen):
        positions = {name: f"{name}_cell_{number}" if each.cells else name for name in "ij"}
        pairs = Scope({"b": "b", "h": "h", **positions}, sizes, tensors, types, extents)
        printed = print_triton(each.load, pairs, numbers)
        value = f"tl.cast({printed.value}, tl.int32)" if each.load.element is Kind.BOOL else printed.value
        low, high = _bound("low", each).name, _bound("high", each).name
        extremes.append(Extreme(each.axis, printed.lines, value, low, high, each.cells))
    lines: list[str] = []

    def text(expr: Expr) -> str:
        printed = print_triton(expr, block, numbers)
        lines.extend(printed.lines)
        return printed.value

    first, last = (found.first or found.main).start, found.main.stop
    limits = text(first), text(last)
    limit_lines, lines = tuple(lines), []
    whole = "key_first < 0" if every == FALSE else text(every)
    whole_lines, lines = tuple(lines), []
    part = "key_first >= 0" if some == TRUE else text(some)
    found_marks = MarkBlocks(
        by_head=any(node == Index("h") for node in walk(mask)),
        extremes=tuple(extremes),
        limits=limits,
        limit_lines=limit_lines,
        possible_lines=tuple(lines),
        possible=part,
        certain_lines=whole_lines,
        certain=whole,
    )
    # these exist twice, for Triton and for Gluon, under one name
    return None if "floor_" in found_marks.texts() else found_marks


def _loads(mask: Expr, tile: HopperTile) -> list[_Seen]:
    """Loads of integers and truth values by ``i`` or by ``j``, with ``b`` and ``h``, or by few cells of both."""
    found: list[_Seen] = []
    for load in dict.fromkeys(node for node in walk(mask) if isinstance(node, Load)):
        axes = "".join(name for name in "ij" if Index(name) in symbols(load))
        nested = any(isinstance(inner, Load) for index in load.indices for inner in walk(index))
        if not axes or nested or load.element not in (Kind.INT, Kind.BOOL):
            continue
        cells = None
        if axes == "ij":
            counts = few(load, tile)
            if counts is None:
                continue
            cells = Cells(len(found), cell(load, "i"), cell(load, "j"), *counts)
        found.append(_Seen(load, Index(f"element_{len(found)}"), axes, cells))
    return found


def _element(seen: _Seen) -> Expr:
    return apply("ne", seen.symbol, 0) if seen.load.element is Kind.BOOL else seen.symbol


def _bound(side: str, seen: _Seen) -> Index:
    return Index(f"{side}_{seen.symbol.name}")


def _moves(expr: Expr, seen: list[_Seen]) -> bool:
    """Whether what tensors hold decides."""
    bounds = {_bound(side, each) for side in ("low", "high") for each in seen}
    return any(node in bounds for node in walk(expr))
