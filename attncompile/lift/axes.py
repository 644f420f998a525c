"""Which axis of the output is which: queries, batch and heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attncompile.frontends.graph import Indices
from attncompile.ir import Expr, Index, simplify
from attncompile.ir.expr import ONE, ZERO, Apply, Const, symbols, walk
from attncompile.lift.operands import Operand

BATCH, HEAD, QUERY, KEY, CHANNEL, VALUE_CHANNEL = (Index(name) for name in "bhijde")


def query_axis(candidates: Sequence[Index], extents: Mapping[str, Expr], at_anchor: Indices) -> Index | None:
    """Which axis of the output counts the queries; ``None`` for a single query whose axis has been dropped.

    Where keys are shared by all heads, heads and queries are alike and either would do: the queries are as many as
    the keys, or of symbolic number, or next to the keys in the weights. What the weights count together with batch or
    heads, beside an axis of size 1, are more heads of a single query.
    """
    if ZERO in at_anchor:
        candidates = [y for y in candidates if not (_is_part(y, at_anchor) and isinstance(extents[y.name], Const))]
    if not candidates:
        return None
    by_key = next((n for n, x in enumerate(at_anchor) if x == KEY), len(at_anchor))

    def rank(axis: Index) -> tuple[bool, bool, int]:
        size = extents[axis.name]
        apart = min((abs(by_key - n) for n, x in enumerate(at_anchor) if axis in symbols(x)), default=len(at_anchor))
        return size != extents["j"], isinstance(size, Const), apart

    return min(candidates, key=rank)


def _is_part(axis: Index, at_anchor: Indices) -> bool:
    """Whether an axis is one of several that make an index."""
    read = ({symbol for symbol in symbols(index) if isinstance(symbol, Index)} for index in at_anchor)
    return any({axis} < found for found in read)


def batch_and_heads(
    batch: Sequence[Index], extents: Mapping[str, Expr], operands: Sequence[Operand], query: Index | None = None
) -> tuple[dict[Expr, Expr], dict[str, Expr]]:
    """Write the batch-like output axes in terms of ``b`` and ``h``.

    Args:
        batch: the axes, outermost first.
        extents: their sizes.
        operands: what tells how one axis of both is divided.
        query: the axis of the queries: where it stands between batch-like axes, those before it are the batch (of rows
            and blocks of a sequence, say), those behind it the heads.
    """
    if not batch:
        return {}, {"b": ONE, "h": ONE}
    if len(batch) == 1:
        (only,) = batch
        size = extents[only.name]
        for operand in operands:
            for index in operand.indices:
                for node in walk(index):
                    match node:
                        case Apply("floordiv" | "mod", (found, heads)) if found == only and heads != ONE:
                            count = simplify(size // heads)
                            if simplify(count * heads) == simplify(size):
                                return {only: BATCH * heads + HEAD}, {"b": count, "h": heads}
        return {only: BATCH}, {"b": size, "h": ONE}
    before = [axis for axis in batch if query is not None and _number(axis) < _number(query)]
    symbolic = [axis for axis in batch if not isinstance(extents[axis.name], Const)]
    outer = before if 1 < len(before) < len(batch) else symbolic if len(symbolic) == 1 else list(batch[:1])
    inner = [axis for axis in batch if axis not in outer]
    first, rows = digits(BATCH, outer, extents)
    second, heads = digits(HEAD, inner, extents)
    return {**first, **second}, {"b": rows, "h": heads}


def _number(axis: Index) -> int:
    """The place of an output axis ``y0``, ``y1``, …"""
    return int(axis.name[1:])


def digits(symbol: Index, axes: Sequence[Index], extents: Mapping[str, Expr]) -> tuple[dict[Expr, Expr], Expr]:
    """Each of several axes as a digit of one index, outermost first, and the size of that index."""
    renaming: dict[Expr, Expr] = {}
    below: Expr = ONE
    for axis in reversed(axes):
        size = extents[axis.name]
        renaming[axis] = simplify(symbol // below if axis is axes[0] else (symbol // below) % size)
        below = simplify(below * size)
    return renaming, below
