"""Laws of comparisons, truth values and choices."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from attncompile.ir.expr import FALSE, TRUE, Apply, Const, Expr, Index, Load, apply, substitute, walk
from attncompile.ir.laws import Law
from attncompile.ir.laws.constants import as_real, as_whole
from attncompile.ir.laws.division import settle
from attncompile.ir.laws.order import lead_key, mask_key
from attncompile.ir.operators import Kind
from attncompile.ir.polynomial import (
    Polynomial,
    constant,
    constant_value,
    from_polynomial,
    negated,
    plus,
    polynomial,
    single,
)

if TYPE_CHECKING:
    from attncompile.ir.simplify import Simplifier

_NEGATED = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}
_MIRRORED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq", "ne": "ne"}


def _law_compare(simplifier: Simplifier, node: Apply) -> Expr:
    left, right = node.arguments
    if left.kind is Kind.BOOL:
        for one, other in ((left, right), (right, left)):
            if isinstance(other, Const):
                return one if bool(other.value) == (node.operator == "eq") else apply("not", one)
        return node if left.order <= right.order else apply(node.operator, right, left)
    whole = as_whole(left), as_whole(right)
    if whole[0] is not None and whole[1] is not None:
        return _compare_integers(simplifier, node.operator, whole[0], whole[1])
    if isinstance(left, Const) or (right.order < left.order and not isinstance(right, Const)):
        return apply(_MIRRORED[node.operator], right, left)
    if whole[0] is not None:
        return _compare_with_fraction(node.operator, whole[0], right)
    if left.kind is Kind.FLOAT and whole[1] is not None and not isinstance(right, Const):
        return node if whole[1] == right else apply(node.operator, left, whole[1])
    return node if not isinstance(right, Const) else apply(node.operator, left, as_real(right))


def _compare_with_fraction(operator: str, left: Expr, right: Expr) -> Expr:
    """An integer compared with a real number that is none."""
    if not isinstance(right, Const):
        return apply(operator, left, right)
    value = float(right.value)
    if not math.isfinite(value):
        return Const(
            {"lt": value > 0, "le": value > 0, "gt": value < 0, "ge": value < 0}.get(
                operator, operator == "ne"
            )
        )
    if operator in ("eq", "ne"):
        return Const(operator == "ne") if not value.is_integer() else apply(operator, left, int(value))
    return apply(operator, left, math.ceil(value) if operator in ("lt", "ge") else math.floor(value))


def _compare_integers(simplifier: Simplifier, operator: str, left: Expr, right: Expr) -> Expr:
    if operator in ("gt", "ge"):
        left, right, operator = right, left, _MIRRORED[operator]
    # left <= right is slack >= 0
    slack = settle(simplifier, plus(polynomial(right), negated(polynomial(left))))
    if operator in ("eq", "ne"):
        return _equal_integers(simplifier, operator == "ne", slack)
    if operator == "lt":
        slack = plus(slack, constant(-1))
    # the constant rounds down: slack is an integer
    divisor = math.gcd(*(value for mono, value in slack.items() if mono)) or 1
    slack = plus({mono: value // divisor for mono, value in slack.items()})
    number = constant_value(slack)
    if number is not None:
        return Const(number >= 0)
    if simplifier.prover.nonnegative(slack):
        return TRUE
    if simplifier.prover.nonnegative(plus(negated(slack), constant(-1))):
        return FALSE
    lead = min(slack, key=lead_key)
    rest = {mono: value for mono, value in slack.items() if mono != lead}
    match lead:
        case (Apply("floordiv", (dividend, by)),) if abs(slack[lead]) == 1 and single(polynomial(by)):
            # x // k <= r is x < k·(r + 1), x // k >= -r is x >= -k·r
            if slack[lead] < 0:
                return dividend < by * from_polynomial(plus(rest, constant(1)))
            return dividend >= by * from_polynomial(negated(rest))
    head, number = from_polynomial({lead: abs(slack[lead])}), rest.get((), 0)
    if slack[lead] < 0:  # head <= rest
        if number == -1 or not any(rest):
            return head < from_polynomial(plus(rest, constant(1)))
        return head <= from_polynomial(rest)
    bound = negated(rest)  # head >= bound
    return (
        head >= from_polynomial(bound)
        if number == 0 or not any(bound)
        else (head > from_polynomial(plus(bound, constant(-1))))
    )


def _equal_integers(simplifier: Simplifier, differ: bool, slack: Polynomial) -> Expr:
    divisor = math.gcd(*(value for mono, value in slack.items() if mono)) or 1
    if slack.get((), 0) % divisor:
        return Const(differ)
    slack = {mono: value // divisor for mono, value in slack.items()}
    number = constant_value(slack)
    if number is not None:
        return Const((number == 0) != differ)
    below = constant(-1)
    if simplifier.prover.nonnegative(plus(slack, below)) or simplifier.prover.nonnegative(
        plus(negated(slack), below)
    ):
        return Const(differ)
    lead = min(slack, key=lead_key)
    rest = {mono: value for mono, value in slack.items() if mono != lead}
    return apply(
        "ne" if differ else "eq",
        from_polynomial({lead: abs(slack[lead])}),
        from_polynomial(negated(rest) if slack[lead] > 0 else rest),
    )


def _slack(part: Expr) -> Polynomial | None:
    """The polynomial that is at least 0 exactly where the part holds, if that is an integer inequality."""
    match part:
        case Apply("lt" | "le" | "gt" | "ge" as operator, (left, right)) if (
            left.kind is right.kind is Kind.INT
        ):
            difference = plus(polynomial(right), negated(polynomial(left)))
            if operator in ("gt", "ge"):
                difference = negated(difference)
            return plus(difference, constant(-1)) if operator in ("lt", "gt") else difference
    return None


def _law_logic(simplifier: Simplifier, node: Apply) -> Expr:
    conjunction = node.operator == "and"
    neutral, absorbing, dual = Const(conjunction), Const(not conjunction), "or" if conjunction else "and"
    parts = [part for part in dict.fromkeys(node.arguments) if part != neutral]
    if absorbing in parts or any(simplifier(apply("not", part)) in parts for part in parts):
        return absorbing
    # a and (a or b) is a
    parts = [
        p
        for p in parts
        if not (isinstance(p, Apply) and p.operator == dual and set(p.arguments) & set(parts))
    ]
    slacks = {part: slack for part in parts if (slack := _slack(part)) is not None}
    for part, slack in slacks.items():
        for other, wider in slacks.items():
            if part == other or part not in parts or other not in parts:
                continue
            # both cannot hold: slack + wider < 0; one must: slack + wider >= -1
            total = plus(slack, wider)
            if simplifier.prover.nonnegative(
                plus(negated(total), constant(-1)) if conjunction else plus(total, constant(1))
            ):
                return absorbing
            # part implies other
            if simplifier.prover.nonnegative(plus(wider, negated(slack))):
                parts.remove(other if conjunction else part)
    return apply(node.operator, *sorted(parts, key=mask_key)) if parts else neutral


def _law_not(simplifier: Simplifier, node: Apply) -> Expr:
    match node.arguments[0]:
        case Apply("not", (inner,)):
            return inner
        case Apply(operator, (left, right)) if operator in ("eq", "ne") or (
            operator in _NEGATED
            and left.kind is Kind.INT
            and right.kind is Kind.INT  # NaN is on neither side
        ):
            return apply(_NEGATED[operator], left, right)
        case Apply("and" | "or" as operator, parts):
            return apply("or" if operator == "and" else "and", *(apply("not", part) for part in parts))
    return node


def _law_where(simplifier: Simplifier, node: Apply) -> Expr:
    condition, then, otherwise = node.arguments
    if node.result is Kind.FLOAT:
        then, otherwise = as_real(then), as_real(otherwise)
    if isinstance(condition, Const):
        return then if condition.value else otherwise
    then = substitute(then, _told(condition, "and", "eq"))
    otherwise = substitute(otherwise, _told(condition, "or", "ne"))
    if then == otherwise:
        return then
    alike = _alike_at_the_border(simplifier, condition, then, otherwise)
    if alike is not None:
        return alike
    if node.result is Kind.BOOL:
        opposite = apply("not", condition)
        for branch, either, one in ((then, condition, otherwise), (otherwise, opposite, then)):
            if isinstance(branch, Const):
                return apply("or", either, one) if branch.value else apply("and", apply("not", either), one)
    # the constant, or the smaller one, comes last: a mask reads where(visible, score, fill)
    opposite = simplifier(apply("not", condition))
    if (_branch_key(then), mask_key(condition)) > (_branch_key(otherwise), mask_key(opposite)):
        return apply("where", opposite, otherwise, then)
    match then:
        case Apply("where", (inner, first, _)) if inner == condition:
            return apply("where", condition, first, otherwise)
        case Apply("where", (inner, first, second)) if second == otherwise:
            return apply("where", apply("and", condition, inner), first, otherwise)
    match otherwise:
        case Apply("where", (inner, _, second)) if inner == condition:
            return apply("where", condition, then, second)
        case Apply("where", (inner, first, second)) if first == then:
            return apply("where", apply("or", condition, inner), then, second)
    return apply("where", condition, then, otherwise)


def _alike_at_the_border(simplifier: Simplifier, condition: Expr, then: Expr, otherwise: Expr) -> Expr | None:
    """The branch that also says what the other does: ``where(i ≥ 1, i − 1, −1)`` is ``i − 1``, since ``i ≥ 0``.

    The other branch is taken for one value of a symbol only, and for that both say the same.
    """
    for holds, branch, other in ((condition, then, otherwise), (simplifier(apply("not", condition)), otherwise, then)):
        slack = _slack(holds)
        # at least 0 because it holds, at most 0 because of what is known of the symbols
        if slack is None or not simplifier.prover.nonnegative(negated(slack)):
            continue
        for symbol in (mono[0] for mono, value in slack.items() if len(mono) == 1 and abs(value) == 1):
            rest = from_polynomial({m: v * -slack[(symbol,)] for m, v in slack.items() if m != (symbol,)})
            if isinstance(symbol, Index) and symbol not in walk(rest):
                told: dict[Expr, Expr] = {symbol: rest}
                if simplifier(substitute(branch, told)) == simplifier(substitute(other, told)):
                    return other
    return None


def _told(condition: Expr, joined: str, compared: str) -> dict[Expr, Expr]:
    """The loaded numbers that a condition, or its opposite, says are constants."""
    parts = condition.children if isinstance(condition, Apply) and condition.operator == joined else (condition,)
    found: dict[Expr, Expr] = {}
    for part in parts:
        match part:
            case Apply(operator, (Load() as loaded, Const() as value)) if operator == compared:
                found[loaded] = value
    return found


def _branch_key(branch: Expr) -> tuple[bool, float]:
    if not isinstance(branch, Const):
        return False, 0.0
    return True, math.inf if branch.value != branch.value else -branch.value


LAWS: dict[str, Law] = {
    **dict.fromkeys(_NEGATED, _law_compare),
    "and": _law_logic,
    "or": _law_logic,
    "not": _law_not,
    "where": _law_where,
}
