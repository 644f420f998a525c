"""Masks that know a key of a block by the digits of its place: what the axes of a box of a grid are."""

from __future__ import annotations

from attncompile.codegen.gluon.cells import START
from attncompile.codegen.gluon.columns import COLUMN, FAR, NEAR, block_digit
from attncompile.codegen.triton.expressions import Scope
from attncompile.codegen.triton.module import function_of
from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import Apply, Const, Expr, Index, Load, conjunction, conjuncts, substitute, walk
from attncompile.ir.simplify import simplify
from attncompile.kernels.hopper_digits import MOST, Digit, KeyDigits

DIGIT = Index("digit")


def digits_of(mask: Expr, keys: int, scope: Scope) -> KeyDigits | None:
    """The mask as conditions on single digits of a key's place in its block, or ``None`` where it is no such thing.

    Args:
        mask: truth value over ``b h i j``.
        keys: of a block, which begins at a multiple of them.
        scope: of the conditions' source: names of ``b h i``, ``start`` and ``digit``.
    """
    found: dict[tuple[int, int], list[Expr]] = {}
    rest: list[Expr] = []
    for part in conjuncts(mask):
        if any(isinstance(node, Load) for node in walk(part)):
            return None
        replaced, digits = _digits(part, keys)
        condition = simplify(substitute(part, replaced))
        if COLUMN in set(walk(condition)) or len(digits) > 1:
            return None
        (found.setdefault(digits.pop(), []) if digits else rest).append(condition)
    if not found or sum(count for _, count in found) > MOST:
        return None
    ordered = sorted(found.items())
    ordered[0][1].extend(rest)
    return KeyDigits(
        tuple(
            Digit(*digit, function_of(f"allowed_{number}", conjunction(conditions), scope))
            for number, (digit, conditions) in enumerate(ordered)
        )
    )


def _digits(expr: Expr, keys: int) -> tuple[dict[Expr, Expr], set[tuple[int, int]]]:
    """What stands for quotients and remainders of ``j``, and the digits, by divisor and count, that these read."""
    parts = block_digit(expr, keys)
    if parts is None:
        replaced: dict[Expr, Expr] = {}
        digits: set[tuple[int, int]] = set()
        for child in expr.children:
            inner, read = _digits(child, keys)
            replaced |= inner
            digits |= read
        return replaced, digits
    near = Const(0) if _period(expr) and keys % _period(expr) == 0 else substitute(parts[0], {NEAR: START})
    if FAR not in set(walk(parts[1])):
        return {expr: near}, set()
    digit = _read(parts[1], keys)
    return ({expr: near + DIGIT}, {digit}) if digit else ({}, set())


def _period(node: Expr) -> int:
    """After how many keys a remainder begins anew; 0 for what is no remainder."""
    match node:
        case Apply("mod", (Index(), Const(count))):
            return int(count)
        case Apply("mod", (Apply("floordiv", (Index(), Const(divisor))), Const(count))):
            return int(divisor) * int(count)
    return 0


def _read(far: Expr, keys: int) -> tuple[int, int] | None:
    """Divisor and count of the digit of a place that an expression over it is, or ``None``."""
    values = [int(evaluate(substitute(far, {FAR: Const(place)}), Environment({}, {}))) for place in range(keys)]
    count = max(values) + 1
    divisor = next((place for place, value in enumerate(values) if value), keys)
    right = values == [place // divisor % count for place in range(keys)]
    return (divisor, count) if right and count > 1 else None


__all__ = ["DIGIT", "digits_of"]
