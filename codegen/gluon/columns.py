"""Expressions over the columns of a WGMMA accumulator, split so that most of the work is done once for a row.

A thread holds the columns ``8n + c + 2·(lane % 4)`` of a block. With ``j = near + far`` only ``near``, which holds the
block's start and the lane's part, differs between threads; ``far`` is a literal for each register. A comparison
``j ≤ i`` written as ``i − near ≥ far`` takes one instruction for a score, and ``slope·(j − i)`` written as
``slope·(near − i) + slope·far`` one multiply-add, where the plain forms take five or six.

``near`` and ``far`` have no bit of the place in a block in common. So a coordinate such as ``j // 16 % 8``, where a
block holds whole turns of it, is ``near // 16 % 8 + far // 16 % 8``, and the second of these is a literal again.
"""

from __future__ import annotations

from attncompile.codegen.triton.expressions import takes_reals
from attncompile.ir.expr import SCORE, Apply, Const, Expr, Index, apply, walk
from attncompile.ir.operators import Kind
from attncompile.ir.polynomial import Polynomial, constant_value, from_polynomial, plus, polynomial, times
from attncompile.ir.polynomial import constant as number

COLUMN, NEAR, FAR = Index("j"), Index("near"), Index("far")

_MIRRORED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}
_STEPS = ("floor", "ceil", "round", "int", *_MIRRORED)
"""Operators whose value jumps: the last bit of their argument matters."""


def fold_columns(expr: Expr, exact: bool = False, keys: int = 1) -> Expr:
    """The expression with ``j`` split in comparisons of integers and where an integer becomes a real number.

    Both read ``near + far`` for ``j``; indices of loads keep ``j``. Sums are reordered as the simplifier does.

    Args:
        expr: over ``b h i j`` and ``s``.
        exact: whether real products must round as written.
        keys: of a block, which begins at a multiple of them; 1 where nothing is known.
    """
    if not isinstance(expr, Apply):
        return expr
    operator, arguments = expr.operator, expr.arguments
    if operator in _MIRRORED and all(argument.kind is Kind.INT for argument in arguments):
        return _comparison(operator, arguments[0], arguments[1], keys) or expr
    exact = exact or operator in _STEPS
    if operator == "float":
        return _real(arguments[0], exact, keys)
    converted = takes_reals(operator, arguments, expr.result)
    parts = [
        _real(a, exact, keys) if converted and a.kind is Kind.INT else fold_columns(a, exact, keys) for a in arguments
    ]
    if operator == "mul" and expr.result is Kind.FLOAT and not exact:
        return _product(parts)
    return apply(operator, *(_windows(parts) if operator == "and" else parts))


def _windows(parts: list[Expr]) -> list[Expr]:
    """Parts of a conjunction in which ``low ≤ x`` and ``x ≤ low + c`` are ``|2·x − (2·low + c)| ≤ c``.

    Every part of a mask costs a selection for each score, and a coordinate ``x`` takes few values.
    """
    kept: list[Expr] = []
    lows: dict[Expr, tuple[Expr, Expr]] = {}
    for part in parts:
        found = _limit(part)
        if found and not found[0]:
            lows.setdefault(found[1], (found[2], part))
    used: set[Expr] = set()
    for part in parts:
        found = _limit(part)
        if not (found and found[0] and found[1] in lows):
            continue
        low, other = lows[found[1]]
        width = constant_value(polynomial(found[2] - low))
        if width is None or width < 0 or other in used:
            continue
        middle = from_polynomial(plus(times(number(2), polynomial(low)), number(width)))
        kept.append(apply("le", apply("abs", found[1] * 2 - middle), width))
        used |= {part, other}
    return [*(part for part in parts if part not in used), *kept]


def _limit(part: Expr) -> tuple[bool, Expr, Expr] | None:
    """Whether a comparison limits a coordinate from above, the coordinate, and its limit."""
    match part:
        case Apply("le" | "lt" | "ge" | "gt" as operator, (rest, varying)) if _reads_far(varying) and varying != FAR:
            above = operator in ("ge", "gt")
            strict = {"lt": 1, "gt": -1}.get(operator, 0)
            return above, varying, rest + strict if strict else rest
    return None


def block_digit(atom: Expr, keys: int) -> tuple[Expr, Expr] | None:
    """``near`` and ``far`` part of a coordinate of ``j``, or ``None`` where it is no such sum.

    Args:
        atom: a quotient or a remainder.
        keys: of a block, which begins at a multiple of them.
    """

    def whole(divisor: int) -> bool:
        """Whether a block has whole turns of so many keys, or is one part of one."""
        return divisor > 0 and ((divisor & (divisor - 1) == 0 and keys % divisor == 0) or divisor % keys == 0)

    if keys % 8:  # nothing is known of where a block begins
        return None
    match atom:
        case Apply("floordiv" as operator, (Index("j"), Const(divisor))) if whole(int(divisor)):
            pass
        case Apply("mod" as operator, (Index("j"), Const(divisor))) if whole(int(divisor)):
            if divisor % keys == 0:
                return NEAR % int(divisor), FAR
        case Apply("mod", (Apply("floordiv", (Index("j"), Const(inner))), Const(divisor))) if whole(int(inner)):
            if inner % keys == 0:
                return NEAR // int(inner) % int(divisor), Const(0)
            turns = int(divisor) & (int(divisor) - 1) == 0 and keys % (inner * divisor) == 0
            return (NEAR // int(inner) % int(divisor), FAR // int(inner) % int(divisor)) if turns else None
        case _:
            return None
    far = Const(0) if divisor % keys == 0 else apply(operator, FAR, divisor)
    return apply(operator, NEAR, divisor), far


def _split(expr: Expr, keys: int) -> tuple[Expr, Expr] | None:
    """``rest`` and ``varying`` with ``expr = rest + varying``, the second a sum over ``far``.

    ``None`` where the expression is no such sum, or does not depend on ``j``.
    """
    rest: Polynomial = {}
    varying: Polynomial = {}
    reads = False
    for monomial, value in polynomial(expr).items():
        if not any(node == COLUMN for atom in monomial for node in walk(atom)):
            rest = plus(rest, {monomial: value})
            continue
        reads = True
        alone = len(monomial) == 1
        parts = (NEAR, FAR) if monomial == (COLUMN,) else block_digit(monomial[0], keys) if alone else None
        if parts is None:
            return None
        rest = plus(rest, times(number(value), polynomial(parts[0])))
        varying = plus(varying, times(number(value), polynomial(parts[1])))
    return (from_polynomial(rest), from_polynomial(varying)) if reads else None


def _comparison(operator: str, left: Expr, right: Expr, keys: int) -> Expr | None:
    """The comparison with the queries and ``near`` on the left, ``far`` alone on the right."""
    found = _split(left - right, keys)
    if found is None:
        return None
    rest, varying = found
    falling = any(value < 0 for value in polynomial(varying).values())
    if falling:  # rest − f ⋚ 0
        return apply(operator, rest, from_polynomial(times(number(-1), polynomial(varying))))
    return apply(_MIRRORED[operator], from_polynomial(times(number(-1), polynomial(rest))), varying)


def _real(expr: Expr, exact: bool, keys: int) -> Expr:
    """An integer expression as a real number: exact, since positions stay below 2^24."""
    if isinstance(expr, Const):
        return Const(float(expr.value))
    if expr.kind is not Kind.INT:
        return apply("float", fold_columns(expr, exact, keys))
    if isinstance(expr, Apply) and expr.operator == "abs":
        return apply("abs", _real(expr.arguments[0], exact, keys))
    found = _split(expr, keys)
    if found is None:
        return apply("float", fold_columns(expr, exact, keys))
    rest, varying = found
    terms = []
    for monomial, factor in polynomial(varying).items():
        atom = apply("float", from_polynomial({monomial: 1}))
        terms.append(atom if factor == 1 else apply("mul", float(factor), atom))
    return apply("add", apply("float", rest), *terms)


def _product(parts: list[Expr]) -> Expr:
    """A product; factors that are the same for a whole row are multiplied into a sum that ends in ``far``."""
    sums = [part for part in parts if isinstance(part, Apply) and part.operator == "add" and _reads_far(part)]
    others = [part for part in parts if part not in sums]
    if len(sums) != 1 or len(parts) != len(others) + 1 or any(map(_varies, others)):
        return apply("mul", *parts)
    terms = sums[0].children
    near = [term for term in terms if not _reads_far(term)]
    far = [term for term in terms if _reads_far(term)]
    return apply("add", apply("mul", *others, apply("add", *near)), *(apply("mul", *others, term) for term in far))


def _reads_far(expr: Expr) -> bool:
    return any(node == FAR for node in walk(expr))


def _varies(expr: Expr) -> bool:
    """Whether the value differs between the columns of a row."""
    return any(node in (COLUMN, NEAR, FAR, SCORE) for node in walk(expr))


__all__ = ["FAR", "NEAR", "block_digit", "fold_columns"]
