"""Two axes of the attention in one of its products: heads that share a key folded into the queries, above all.

One product for all heads of a key reads the key once. Its queries are then as many as heads and positions together, and
only the normaliser in between has both apart. To a mask or a window they are not alike, so the Spec has them apart too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from attncompile.frontends.graph import Indices
from attncompile.ir import Expr, Index, simplify
from attncompile.ir.expr import ZERO, Apply, Const, walk
from attncompile.ir.simplify import polynomial


@dataclass(frozen=True)
class Fold:
    """An axis that holds two.

    Attributes:
        axis: the axis; count: how many groups it has, size: how many elements each of them.
    """

    axis: Index
    count: Expr
    size: Expr


def find_fold(axes: Collection[Index], extents: Mapping[str, Expr], at_anchor: Indices) -> Fold | None:
    """The first of some axes that the element of the normaliser reads in groups of a size which divides it.

    Args:
        axes: that may be folded; extents: their sizes.
        at_anchor: the element of the normaliser that one of the product is made of.
    """
    for index in at_anchor:
        for node in walk(index):
            match node:
                case Apply("floordiv" | "mod", (Index() as axis, size)) if axis in axes:
                    count = _quotient(extents[axis.name], size)
                    if count is not None:
                        return Fold(axis, count, size)
    return None


def unfolded(fold: Fold, axes: tuple[Index, ...], extents: Mapping[str, Expr]) -> tuple[dict[Expr, Expr], list[Expr]]:
    """The axes over those of the same elements with a fold apart, and the sizes of these, which are ``y0``, ``y1``, …

    Args:
        fold: one of the axes; axes: all of them, outermost first; extents: their sizes.
    """
    meaning: dict[Expr, Expr] = {}
    sizes: list[Expr] = []
    for axis in axes:
        if axis == fold.axis:
            meaning[axis] = Index(f"y{len(sizes)}") * fold.size + Index(f"y{len(sizes) + 1}")
            sizes += [fold.count, fold.size]
        else:
            meaning[axis] = Index(f"y{len(sizes)}")
            sizes.append(extents[axis.name])
    return meaning, sizes


def _quotient(whole: Expr, part: Expr) -> Expr | None:
    """``whole / part`` where that is a number, or divides without a rest by what is simplified; else ``None``."""
    monomial, factor = next(iter(polynomial(part).items()), ((), 1))
    times, rest = divmod(polynomial(whole).get(monomial, 0), factor)
    candidates: list[Expr] = [simplify(whole // part)] if rest else [Const(times), simplify(whole // part)]
    return next((count for count in candidates if simplify(count * part - whole) == ZERO), None)


__all__ = ["Fold", "find_fold", "unfolded"]
