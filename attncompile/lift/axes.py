"""Which axis of the output is which: queries, batch and heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attncompile.frontends.graph import Indices
from attncompile.ir import Expr, Index, simplify
from attncompile.ir.expr import ONE, Apply, Const, symbols, walk
from attncompile.lift.operands import Operand

BATCH, HEAD, QUERY, KEY, CHANNEL, VALUE_CHANNEL = (Index(name) for name in "bhijde")


def query_axis(candidates: Sequence[Index], extents: Mapping[str, Expr], at_anchor: Indices) -> Index | None:
    """Which axis of the output counts the queries; ``None`` for a single query whose axis has been dropped.

    Where keys are shared by all heads, heads and queries are alike and either would do: the queries are as many as
    the keys, or of symbolic number, or next to the keys in the weights.
    """
    if not candidates:
        return None
    by_key = next((n for n, x in enumerate(at_anchor) if x == KEY), len(at_anchor))

    def rank(axis: Index) -> tuple[bool, bool, int]:
        size = extents[axis.name]
        apart = min((abs(by_key - n) for n, x in enumerate(at_anchor) if axis in symbols(x)), default=len(at_anchor))
        return size != extents["j"], isinstance(size, Const), apart

    return min(candidates, key=rank)


def batch_and_heads(
    batch: Sequence[Index], extents: Mapping[str, Expr], operands: Sequence[Operand]
) -> tuple[dict[Expr, Expr], dict[str, Expr]]:
    """Write the batch-like output axes in terms of ``b`` and ``h``."""
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
    symbolic = [axis for axis in batch if not isinstance(extents[axis.name], Const)]
    outer = symbolic[0] if len(symbolic) == 1 else batch[0]
    inner_axes = [axis for axis in batch if axis is not outer]
    renaming: dict[Expr, Expr] = {outer: BATCH}
    inner: Expr = ONE
    for axis in reversed(inner_axes):
        size = extents[axis.name]
        renaming[axis] = simplify((HEAD // inner) % size) if axis is not inner_axes[0] else simplify(HEAD // inner)
        inner = simplify(inner * size)
    return renaming, {"b": extents[outer.name], "h": inner}
