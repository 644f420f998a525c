"""Whether some conditions cover all elements: each is a conjunction such as "the element lies inside this slice"."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attncompile.ir import Expr
from attncompile.ir.expr import Apply, Const, apply
from attncompile.ir.simplify import Simplifier

_PERIOD = 16
"""Largest step of a slice whose other positions are gone through one by one."""

_PIECES = 256
"""Pieces of what is left out that are looked at."""


def covers(simplifier: Simplifier, conditions: Sequence[Sequence[Expr]]) -> bool:
    """Whether every element satisfies at least one conjunction.

    What a conjunction leaves out is divided into pieces, one per condition of it: the condition fails and those before
    it hold. The rest has to cover each of them.

    Args:
        simplifier: knows the extents of the indices.
        conditions: the conjunctions; an empty one is always satisfied.

    Returns:
        False too where there are more pieces than :data:`_PIECES`: their number may double with every conjunction.
    """
    waiting: list[tuple[Sequence[Sequence[Expr]], list[Expr]]] = [(conditions, [])]
    for _ in range(_PIECES):
        if not waiting:
            return True
        left, given = waiting.pop()
        if given and _impossible(simplifier, given):
            continue
        if not left:
            return False
        for condition in left[0]:
            waiting += ((left[1:], [*given, failed]) for failed in _failures(simplifier, condition))
            given = [*given, condition]
    return False


def _impossible(simplifier: Simplifier, given: Sequence[Expr]) -> bool:
    remainders: dict[Expr, Expr] = {}
    for condition in given:
        match condition:
            case Apply("eq", (Apply("mod", (_, Const())) as left, Const() as right)):
                if remainders.setdefault(left, right) != right:
                    return True
    return simplifier(apply("and", *given)) == Const(False)


def _failures(simplifier: Simplifier, condition: Expr) -> Iterator[Expr]:
    """Conditions of which exactly one holds wherever this one fails."""
    match condition:
        case Apply("eq", (Apply("mod", (_, Const(int(period)))) as left, Const(int(remainder)))) if (
            0 < period <= _PERIOD
        ):
            yield from (apply("eq", left, Const(n)) for n in range(period) if n != remainder)
        case Apply("eq", (left, right)):
            yield simplifier(apply("lt", left, right))
            yield simplifier(apply("gt", left, right))
        case _:
            yield simplifier(apply("not", condition))


__all__ = ["covers"]
