"""Canonical form of expressions.

Integer arithmetic is brought into polynomial form, integer comparisons are solved for one symbol (the key
position first), truth values are flattened, and constants are folded. A law holds for all values of its type:
none turns NaN or infinity into something finite, so ``x - x`` and ``0 * x`` fold for integers only. Real sums
and products are reordered and their constants folded, so real arithmetic is preserved up to rounding,
overflow on the way, and the sign of zero. The canonical form is defined wherever the expression is (an
integer divided by 0 has no value).

Laws that need a bound (``(b*H + h) // H`` is ``b``) prove it from the extents of the index symbols.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from attncompile.ir.expr import Apply, Const, Expr
from attncompile.ir.laws import Law, arithmetic, division, logic
from attncompile.ir.laws.constants import fold_constants, positive_zero, push_into_where, without_casts
from attncompile.ir.polynomial import polynomial
from attncompile.ir.prove import Prover

__all__ = ["Simplifier", "polynomial", "simplify"]

_LAWS: dict[str, Law] = {**arithmetic.LAWS, **division.LAWS, **logic.LAWS}


@dataclass(frozen=True)
class Simplifier:
    """Simplifies under assumptions about symbols.

    Attributes:
        extents: index name to the size of its axis, so that ``0 <= index < size`` may be used.
    """

    extents: Mapping[str, Expr] = field(default_factory=dict)
    _known: dict[Expr, Expr] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def prover(self) -> Prover:
        """What is known about the symbols."""
        return Prover.of(self.extents)

    def __call__(self, expr: Expr) -> Expr:
        """The canonical form."""
        known, waiting = self._known, [expr]
        while waiting:
            node = waiting[-1]
            missing = [child for child in node.children if child not in known] if node not in known else []
            waiting.extend(missing)
            if not missing:
                waiting.pop()
                if node not in known:
                    known[node] = self._settled(node)
        return known[expr]

    def _settled(self, expr: Expr) -> Expr:
        children = tuple(self._known[child] for child in expr.children)
        node = expr if children == expr.children else expr.with_children(children)
        result = self._law(node)
        # a law builds new nodes from canonical children; once more reaches the fixed point
        result = node if result == node else self(result)
        self._known[result] = result
        return result

    def _law(self, node: Expr) -> Expr:
        if isinstance(node, Const):
            return positive_zero(node)
        if not isinstance(node, Apply):
            return node
        for law in (fold_constants, push_into_where, without_casts):
            rewritten = law(node)
            if rewritten is not None:
                return rewritten
        return _LAWS[node.operator](self, node) if node.operator in _LAWS else node

    def nonnegative(self, expr: Expr) -> bool:
        """Whether the integer expression is proven to be at least zero."""
        return self.prover.nonnegative(polynomial(self(expr)))


REMEMBERED = 20_000
"""Canonical forms without assumptions that a thread keeps: the layers of a model ask for the same ones."""

_SHARED = threading.local()


def simplify(expr: Expr, extents: Mapping[str, Expr] | None = None) -> Expr:
    """The canonical form of an expression.

    Args:
        expr: any expression.
        extents: index name to axis size; lets the simplifier use ``0 <= index < size``.
    """
    if extents:
        return Simplifier(extents)(expr)
    known: Simplifier | None = getattr(_SHARED, "simplifier", None)
    if known is None or len(known._known) > REMEMBERED:
        known = _SHARED.simplifier = Simplifier({})
    return known(expr)
