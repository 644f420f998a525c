"""Canonical form of expressions.

Integer arithmetic is brought into polynomial form, integer comparisons are solved for one symbol (the key position
first), truth values are flattened, and constants are folded. A law holds for all values of its type: none turns NaN or
infinity into something finite, so ``x - x`` and ``0 * x`` fold for integers only. Real sums and products are reordered
and their constants folded, so real arithmetic is preserved up to rounding, overflow on the way, and the sign of zero.
The canonical form is defined wherever the expression is (an integer divided by 0 has no value).

Laws that need a bound (``(b*H + h) // H`` is ``b``) prove it from the extents of the index symbols.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import (
    FALSE,
    TRUE,
    Apply,
    Const,
    Expr,
    Index,
    Load,
    Number,
    Order,
    Score,
    Weight,
    apply,
    walk,
)
from attncompile.ir.operators import OPERATORS, Kind, real
from attncompile.ir.polynomial import (
    Monomial,
    Polynomial,
    constant,
    constant_value,
    from_polynomial,
    monomial_order,
    negated,
    plus,
    polynomial,
    single,
    split,
    times,
    without,
)
from attncompile.ir.prove import Prover

__all__ = ["Simplifier", "polynomial", "simplify", "sort_key"]

_SOLVE_ORDER = ("j", "i", "h", "g", "b", "d", "e")
_NEGATED = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}
_MIRRORED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq", "ne": "ne"}
_SMALLEST, _LARGEST = 2.0**-126, 2.0**126
"""Range in which a constant and its reciprocal are normal numbers in float32."""
_WHOLE = 2.0**53
"""Real numbers below this are exact integers where they have no fraction."""


def sort_key(expr: Expr) -> Order:
    """Key of the total order that canonical forms use: simple before compound, then by name."""
    return expr.order


@dataclass(frozen=True)
class Simplifier:
    """Simplifies under assumptions about symbols.

    Attributes:
        extents: index name to the size of its axis, so that ``0 <= index < size`` may be used.
    """

    extents: Mapping[str, Expr] = field(default_factory=dict)
    _known: dict[Expr, Expr] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def _prover(self) -> Prover:
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
            return _positive_zero(node)
        if not isinstance(node, Apply):
            return node
        for law in (_fold_constants, _push_into_where, _uncast):
            rewritten = law(node)
            if rewritten is not None:
                return rewritten
        return _LAWS[node.operator](self, node) if node.operator in _LAWS else node

    def nonnegative(self, expr: Expr) -> bool:
        """Whether the integer expression is proven to be at least zero."""
        return self._prover.nonnegative(polynomial(self(expr)))

    def implied(self, poly: Polynomial) -> bool:
        """Whether the integer polynomial is proven to be at least zero."""
        return self._prover.nonnegative(poly)

    def divide(self, dividend: Expr, divisor: Expr) -> tuple[Expr, Expr] | None:
        """Quotient and remainder of a floor division, where they can be proven without the operators themselves."""
        by = single(polynomial(divisor))
        if by is None:
            return None
        quotient, rest = split(polynomial(dividend), *by)
        return (from_polynomial(quotient), from_polynomial(rest)) if self._is_remainder(rest, by) else None

    def _is_remainder(self, poly: Polynomial, by: tuple[Monomial, int]) -> bool:
        """Whether ``0 ≤ poly < divisor``."""
        mono, factor = by
        prover = self._prover.assuming_positive(mono)
        return prover.nonnegative(poly) and prover.nonnegative(
            plus({mono: factor}, negated(poly), constant(-1))
        )

    def common_factor(
        self, poly: Polynomial, by: tuple[Monomial, int]
    ) -> tuple[Polynomial, Polynomial, Polynomial] | None:
        """``f, y, r`` with ``poly = f·y + r``, ``0 ≤ r < f`` and ``f`` a proper part of the divisor; the largest such."""
        mono, factor = by
        candidates = set()
        for term, value in poly.items():
            shared = _shared(term, mono)
            candidates.add((shared, math.gcd(value, factor)))
        for shared, common in sorted(
            candidates, key=lambda c: (len(c[0]), c[1], monomial_order(c[0])), reverse=True
        ):
            if (shared, common) in (by, ((), 1)):
                continue
            quotient, rest = split(poly, shared, common)
            if self._is_remainder(rest, (shared, common)):
                return {shared: common}, quotient, rest
        return None

    # Remainders are differences, x % k = x - k·(x // k): written so, sums of them cancel; then they are folded again.

    def settle(self, poly: Polynomial) -> Polynomial:
        """The polynomial with its floor divisions and remainders cancelled against each other."""
        if not any(
            isinstance(atom, Apply) and atom.operator in ("mod", "floordiv") for mono in poly for atom in mono
        ):
            return poly
        return self._with_remainders(self._without_remainders(poly))

    def _without_remainders(self, poly: Polynomial) -> Polynomial:
        result: Polynomial = {}
        for mono, value in poly.items():
            product = constant(value)
            for atom in mono:
                product = times(product, self._as_difference(atom))
            result = plus(result, product)
        return result

    def _as_difference(self, atom: Expr) -> Polynomial:
        match atom:
            case Apply("mod", (dividend, divisor)):
                whole = times(polynomial(divisor), polynomial(self(dividend // divisor)))
                return self._without_remainders(plus(polynomial(dividend), negated(whole)))
        return {(atom,): 1}

    def _with_remainders(self, poly: Polynomial) -> Polynomial:
        for mono in sorted(poly, key=monomial_order):
            for atom in mono:
                if not (isinstance(atom, Apply) and atom.operator == "floordiv"):
                    continue
                for inner, by in self._dividends(atom, poly):
                    folded = self._folded(poly, mono, atom, inner, by)
                    if folded is not None:
                        return self._with_remainders(folded)
        return poly

    def _dividends(self, atom: Apply, poly: Polynomial) -> list[tuple[Expr, tuple[Monomial, int]]]:
        """Ways to read ``x // K`` as ``y // k``: as it stands, and as ``(x // a) // (K / a)`` for an ``x // a`` at hand."""
        dividend, divisor = atom.arguments
        by = single(polynomial(divisor))
        if by is None:
            return []
        found = [(dividend, by)]
        for other in sorted({a for mono in poly for a in mono}, key=sort_key):
            match other:
                case Apply("floordiv", (same, part)) if same == dividend and other != atom:
                    smaller = single(polynomial(part))
                    quotient = None if smaller is None else _divided(by, smaller)
                    if quotient is not None:
                        found.append((other, quotient))
        return found

    def _folded(
        self, poly: Polynomial, mono: Monomial, atom: Expr, inner: Expr, by: tuple[Monomial, int]
    ) -> Polynomial | None:
        """``c·m·inner - c·m·k·(inner // k)``, if the polynomial holds it, becomes ``c·m·(inner % k)``."""
        outer = without(mono, (atom,)) or ()
        factor = _divided((outer, -poly[mono]), by)
        if factor is None:
            return None
        scale: Polynomial = {factor[0]: factor[1]}
        whole = times(scale, self._without_remainders(polynomial(inner)))
        if not whole or any(poly.get(term, 0) * value < value * value for term, value in whole.items()):
            return None
        remainder = polynomial(self(inner % from_polynomial({by[0]: by[1]})))
        if not any(isinstance(a, Apply) and a.operator == "mod" for m in remainder for a in m):
            return None
        return plus(poly, negated(whole), {mono: -poly[mono]}, times(scale, remainder))


def _divided(term: tuple[Monomial, int], by: tuple[Monomial, int]) -> tuple[Monomial, int] | None:
    mono = without(term[0], by[0])
    return None if mono is None or term[1] % by[1] else (mono, term[1] // by[1])


def _shared(left: Monomial, right: Monomial) -> Monomial:
    rest, shared = list(left), []
    for atom in right:
        if atom in rest:
            rest.remove(atom)
            shared.append(atom)
    return tuple(shared)


# Laws. Each takes the simplifier and a node with canonical arguments, and returns an equal expression.


def _positive_zero(node: Const) -> Const:
    return Const(0.0) if isinstance(node.value, float) and node.value == 0 else node


_WHOLE_NUMBERS: dict[str, Callable[..., int]] = {
    "add": lambda *values: sum(values),
    "mul": lambda *values: math.prod(values),
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "min": min,
    "max": max,
    "abs": abs,
}


def _fold_constants(node: Apply) -> Expr | None:
    values = [argument.value for argument in node.arguments if isinstance(argument, Const)]
    if len(values) < len(node.arguments) or node.operator == "where":
        return None
    if node.operator in ("floordiv", "mod") and not values[1]:
        return None
    if node.result is Kind.INT and node.operator in _WHOLE_NUMBERS:
        return Const(_WHOLE_NUMBERS[node.operator](*values))
    if any(
        abs(value) >= _WHOLE if isinstance(value, int) else node.operator == "int" and not abs(value) < _WHOLE
        for value in values
    ):
        return None  # not the same number in every dtype
    value = evaluate(node, Environment()).item()
    return _positive_zero(Const(float(value) if node.result is Kind.FLOAT else value))


def _push_into_where(node: Apply) -> Expr | None:
    """``f(where(c, 1, 0), 2)`` with constants everywhere is ``where(c, f(1, 2), f(0, 2))``."""
    if node.operator in ("where", "and", "or", "not"):
        return None
    choices = [n for n, a in enumerate(node.arguments) if isinstance(a, Apply) and a.operator == "where"]
    if len(choices) != 1 or not all(
        isinstance(a, Const) for n, a in enumerate(node.arguments) if n not in choices
    ):
        return None
    place = choices[0]
    condition, *values = node.arguments[place].children
    if not all(isinstance(value, Const) for value in values):
        return None
    if node.operator in ("floordiv", "mod") and (place == 1 or node.arguments[1] == Const(0)):
        return None  # a division by zero on the side not taken

    def over(value: Expr) -> Expr:
        return apply(node.operator, *node.arguments[:place], value, *node.arguments[place + 1 :])

    return apply("where", condition, *(over(value) for value in values))


def _uncast(node: Apply) -> Expr | None:
    """Real functions take integers as they are: ``exp(float(i))`` is ``exp(i)``."""
    arguments = [
        a.children[0] if isinstance(a, Apply) and a.operator == "float" else a for a in node.arguments
    ]
    if OPERATORS[node.operator].result is not real or arguments == list(node.arguments):
        return None
    return apply(node.operator, *arguments)


def _real(expr: Expr) -> Expr:
    """The expression as a real number."""
    if expr.kind is not Kind.INT:
        return expr
    return Const(float(expr.value)) if isinstance(expr, Const) else apply("float", expr)


def _as_whole(expr: Expr) -> Expr | None:
    """The integer expression that a real one is, if it is one."""
    match expr:
        case Apply("float", (inner,)) if inner.kind is Kind.INT:
            return inner
        case Const(float(value)) if value.is_integer() and abs(value) < _WHOLE:
            return Const(int(value))
    return expr if expr.kind is Kind.INT else None


def _term_key(term: Expr) -> tuple[bool, Order]:
    return not any(isinstance(node, Score | Weight) for node in walk(term)), sort_key(term)


def _sum_of(constants: list[float]) -> list[float]:
    """The constants of a sum, added where that is no overflow."""
    special = [value for value in constants if not math.isfinite(value)]
    total = sum(special) if special else sum(sorted(constants, key=abs))
    if math.isfinite(total) or special:
        return [] if total == 0 else [total]
    return sorted(constants)


def _product_of(constants: list[float]) -> list[float]:
    """The constants of a product, multiplied where that neither overflows nor loses a factor to underflow."""
    total = math.prod(constants)
    if not all(math.isfinite(value) for value in constants):
        # the size of a finite factor does not matter beside an infinite one, only its sign
        total = math.prod(math.copysign(1.0, v) if math.isfinite(v) and v else v for v in constants)
    elif not math.isfinite(total) or (total == 0 and 0 not in constants):
        return sorted(constants)
    return [] if total == 1 else [0.0 if total == 0 else total]


def _law_add(simplifier: Simplifier, node: Apply) -> Expr:
    if node.result is Kind.INT:
        return from_polynomial(simplifier.settle(polynomial(node)))
    whole: Polynomial = {}
    constants: list[float] = []
    terms: list[Expr] = []
    for argument in node.arguments:
        integer = _as_whole(argument)
        if isinstance(argument, Const):
            constants.append(float(argument.value))
        elif integer is not None:
            whole = plus(whole, polynomial(integer))
        else:
            terms.append(argument)
    if () in whole:
        constants.append(float(whole.pop(())))
    terms.sort(key=_term_key)
    folded: list[Expr] = [Const(value) for value in _sum_of(constants)]
    if not terms and len(folded) <= 1:
        number = _as_whole(folded[0]) if folded else Const(0)
        if number is not None:
            return _real(from_polynomial(simplifier.settle(plus(whole, polynomial(number)))))
    parts = [*terms, *([from_polynomial(simplifier.settle(whole))] if whole else []), *folded]
    return _real(apply("add", *parts))


def _law_mul(simplifier: Simplifier, node: Apply) -> Expr:
    if node.result is Kind.INT:
        return from_polynomial(simplifier.settle(polynomial(node)))
    whole = constant(1)
    constants: list[float] = []
    factors: list[Expr] = []
    for argument in node.arguments:
        integer = _as_whole(argument)
        if isinstance(argument, Const):
            constants.append(float(argument.value))
        elif integer is not None:
            whole = times(whole, polynomial(integer))
        else:
            factors.append(argument)
    whole = simplifier.settle(whole)
    if whole:
        # slope · (2·i - 2·j) is -2 · slope · (j - i)
        lead = min(whole, key=_lead_key)
        content = math.gcd(*whole.values()) * (1 if whole[lead] > 0 else -1)
        whole = {mono: value // content for mono, value in whole.items()}
        constants.append(float(content))
    else:
        constants.append(0.0)
    folded = _product_of(constants)
    factors.sort(key=_term_key)
    if constant_value(whole) is None:
        factors.append(from_polynomial(whole))
    if not any(factor.kind is Kind.FLOAT for factor in factors) and len(folded) <= 1:
        number = _as_whole(Const(folded[0])) if folded else Const(1)
        if number is not None:
            return _real(from_polynomial(times(whole, polynomial(number)) if factors else polynomial(number)))
    if folded == [-1.0] and any(factor.kind is Kind.FLOAT for factor in factors):
        return apply("mul", -1, *factors) if not _sums(factors) else _distributed(Const(-1), factors[0])
    if len(folded) == 1 and folded[0] != 0 and math.isfinite(folded[0]) and _sums(factors):
        return _distributed(Const(folded[0]), factors[0])
    return _real(
        apply("mul", *(Const(value) for value in folded), *factors) if folded or factors else Const(1.0)
    )


def _sums(factors: list[Expr]) -> bool:
    """Whether the factors are one real sum, over which a constant is distributed."""
    return (
        len(factors) == 1
        and factors[0].kind is Kind.FLOAT
        and (isinstance(factors[0], Apply) and factors[0].operator == "add")
    )


def _distributed(factor: Const, total: Expr) -> Expr:
    return apply(
        "add",
        *(apply("mul", factor, term if term.kind is Kind.FLOAT else _real(term)) for term in total.children),
    )


def _law_div(simplifier: Simplifier, node: Apply) -> Expr:
    left, right = node.arguments
    factor, rest = _constant_factor(right)
    if factor is not None and _SMALLEST <= abs(factor) <= _LARGEST:
        return apply("mul", 1.0 / factor, left if rest is None else apply("div", left, rest))
    factor, rest = _constant_factor(left)
    if factor is not None and factor not in (0, 1) and math.isfinite(factor):
        return apply("mul", factor, apply("div", 1.0 if rest is None else rest, right))
    match right:
        case Apply("sqrt", (square,)):
            return apply("mul", left, apply("rsqrt", square))
        case Apply("rsqrt", (square,)):
            return apply("mul", left, apply("sqrt", square))
    return node


def _constant_factor(expr: Expr) -> tuple[float | None, Expr | None]:
    """``c`` and ``x`` of ``c·x``; no ``x`` for a constant, no ``c`` for anything else."""
    match expr:
        case Const(value):
            return float(value), None
        case Apply("mul", (Const(value), *rest)) if not any(isinstance(factor, Const) for factor in rest):
            return float(value), _real(apply("mul", *rest))
    return None, expr


def _law_floordiv(simplifier: Simplifier, node: Apply) -> Expr:
    dividend, divisor = node.arguments
    by = single(polynomial(divisor))
    if by is None:
        return node
    poly = polynomial(dividend)
    quotient, rest = split(poly, *by)
    if simplifier._is_remainder(rest, by):
        return from_polynomial(quotient)
    if quotient:
        return from_polynomial(quotient) + from_polynomial(rest) // divisor
    parts = simplifier.common_factor(poly, by)
    if parts is not None:
        factor, inner, _ = parts
        ((mono, value),) = factor.items()
        smaller = _divided(by, (mono, value))
        assert smaller is not None, "the factor is part of the divisor"
        return from_polynomial(inner) // from_polynomial({smaller[0]: smaller[1]})
    match dividend:
        case Apply("floordiv", (inner_dividend, inner_divisor)) if single(polynomial(inner_divisor)):
            return inner_dividend // (inner_divisor * divisor)
        case Apply("mod", (inner_dividend, inner_divisor)):
            larger = single(polynomial(inner_divisor))
            smaller = None if larger is None else _divided(larger, by)
            if smaller is not None:
                return (inner_dividend // divisor) % from_polynomial({smaller[0]: smaller[1]})
    return node


def _law_mod(simplifier: Simplifier, node: Apply) -> Expr:
    dividend, divisor = node.arguments
    by = single(polynomial(divisor))
    if by is None:
        return node
    poly = polynomial(dividend)
    quotient, rest = split(poly, *by)
    if simplifier._is_remainder(rest, by):
        return from_polynomial(rest)
    if quotient:
        return from_polynomial(rest) % divisor
    parts = simplifier.common_factor(poly, by)
    if parts is not None:
        factor, inner, left = parts
        ((mono, value),) = factor.items()
        smaller = _divided(by, (mono, value))
        assert smaller is not None, "the factor is part of the divisor"
        return from_polynomial(factor) * (
            from_polynomial(inner) % from_polynomial({smaller[0]: smaller[1]})
        ) + (from_polynomial(left))
    reduced = _without_multiples(poly, by)
    return node if reduced == poly else from_polynomial(reduced) % divisor


def _without_multiples(poly: Polynomial, by: tuple[Monomial, int]) -> Polynomial:
    """``x % k`` inside a remainder by a part of ``k`` is ``x``."""
    result: Polynomial = {}
    for mono, value in poly.items():
        product = constant(value)
        for atom in mono:
            inner: Polynomial = {(atom,): 1}
            match atom:
                case Apply("mod", (dividend, divisor)):
                    larger = single(polynomial(divisor))
                    if larger is not None and _divided(larger, by) is not None:
                        inner = polynomial(dividend)
            product = times(product, inner)
        result = plus(result, product)
    return result


def _law_pow(simplifier: Simplifier, node: Apply) -> Expr:
    base, exponent = node.arguments
    if not isinstance(exponent, Const):
        return node
    match exponent.value:
        case 0:
            return Const(1.0)
        case 1:
            return _real(base)
        case 2:
            return _real(apply("mul", base, base))
        case -1:
            return apply("div", 1.0, base)
        case 0.5 if base.kind is Kind.INT:  # for real bases they differ at -inf
            return apply("sqrt", base)
        case -0.5 if base.kind is Kind.INT:
            return apply("rsqrt", base)
    return node


def _law_compare(simplifier: Simplifier, node: Apply) -> Expr:
    left, right = node.arguments
    if left.kind is Kind.BOOL:
        for one, other in ((left, right), (right, left)):
            if isinstance(other, Const):
                return one if bool(other.value) == (node.operator == "eq") else apply("not", one)
        return node if sort_key(left) <= sort_key(right) else apply(node.operator, right, left)
    whole = _as_whole(left), _as_whole(right)
    if whole[0] is not None and whole[1] is not None:
        return _compare_integers(simplifier, node.operator, whole[0], whole[1])
    if isinstance(left, Const) or (sort_key(right) < sort_key(left) and not isinstance(right, Const)):
        return apply(_MIRRORED[node.operator], right, left)
    if whole[0] is not None:
        return _compare_with_fraction(node.operator, whole[0], right)
    if left.kind is Kind.FLOAT and whole[1] is not None and not isinstance(right, Const):
        return node if whole[1] == right else apply(node.operator, left, whole[1])
    return node if not isinstance(right, Const) else apply(node.operator, left, _real(right))


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


def _lead_key(mono: Monomial) -> tuple[bool, int, list[tuple[int, Order]]]:
    """Order in which comparisons are solved: for an index alone before products, ``j`` first, the constant never."""

    def rank(atom: Expr) -> tuple[int, Order]:
        inside = [
            _SOLVE_ORDER.index(n.name) for n in walk(atom) if isinstance(n, Index) and n.name in _SOLVE_ORDER
        ]
        compound = 0 if isinstance(atom, Index) else len(_SOLVE_ORDER) + 1
        return compound + min(inside, default=len(_SOLVE_ORDER)), sort_key(atom)

    return not mono, len(mono), [rank(atom) for atom in mono]


def _compare_integers(simplifier: Simplifier, operator: str, left: Expr, right: Expr) -> Expr:
    if operator in ("gt", "ge"):
        left, right, operator = right, left, _MIRRORED[operator]
    # left <= right is slack >= 0
    slack = simplifier.settle(plus(polynomial(right), negated(polynomial(left))))
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
    if simplifier.implied(slack):
        return TRUE
    if simplifier.implied(plus(negated(slack), constant(-1))):
        return FALSE
    lead = min(slack, key=_lead_key)
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
    if simplifier.implied(plus(slack, below)) or simplifier.implied(plus(negated(slack), below)):
        return Const(differ)
    lead = min(slack, key=_lead_key)
    rest = {mono: value for mono, value in slack.items() if mono != lead}
    return apply(
        "ne" if differ else "eq",
        from_polynomial({lead: abs(slack[lead])}),
        from_polynomial(negated(rest) if slack[lead] > 0 else rest),
    )


def _slack(part: Expr) -> Polynomial | None:
    """The integer polynomial that is at least 0 exactly where the part holds, if the part is an integer inequality."""
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
            if simplifier.implied(
                plus(negated(total), constant(-1)) if conjunction else plus(total, constant(1))
            ):
                return absorbing
            # part implies other
            if simplifier.implied(plus(wider, negated(slack))):
                parts.remove(other if conjunction else part)
    return apply(node.operator, *sorted(parts, key=_mask_key)) if parts else neutral


def _mask_key(part: Expr) -> tuple[bool, bool, Order]:
    loads = any(isinstance(node, Load) for node in walk(part))
    return loads, isinstance(part, Apply) and part.operator != "le", sort_key(part)


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
        then, otherwise = _real(then), _real(otherwise)
    if isinstance(condition, Const):
        return then if condition.value else otherwise
    if then == otherwise:
        return then
    if node.result is Kind.BOOL:
        opposite = apply("not", condition)
        for branch, either, one in ((then, condition, otherwise), (otherwise, opposite, then)):
            if isinstance(branch, Const):
                return apply("or", either, one) if branch.value else apply("and", apply("not", either), one)
    # the constant, or the smaller one, comes last: a mask reads where(visible, score, fill)
    opposite = simplifier(apply("not", condition))
    if (_branch_key(then), _mask_key(condition)) > (_branch_key(otherwise), _mask_key(opposite)):
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


def _branch_key(branch: Expr) -> tuple[bool, float]:
    if not isinstance(branch, Const):
        return False, 0.0
    return True, math.inf if branch.value != branch.value else -branch.value


def _law_float(simplifier: Simplifier, node: Apply) -> Expr:
    (argument,) = node.arguments
    if argument.kind is Kind.FLOAT:
        return argument
    return apply("where", argument, 1.0, 0.0) if argument.kind is Kind.BOOL else node


def _law_int(simplifier: Simplifier, node: Apply) -> Expr:
    (argument,) = node.arguments
    if argument.kind is Kind.BOOL:
        return apply("where", argument, 1, 0)
    whole = _as_whole(argument)
    return node if whole is None else whole


def _law_rounding(simplifier: Simplifier, node: Apply) -> Expr:
    whole = _as_whole(node.arguments[0])
    return node if whole is None else _real(whole)


def _law_extremum(simplifier: Simplifier, node: Apply) -> Expr:
    parts = [_real(part) if node.result is Kind.FLOAT else part for part in dict.fromkeys(node.arguments)]
    parts = _one_constant(sorted(dict.fromkeys(parts), key=sort_key), min if node.operator == "min" else max)
    if node.result is Kind.INT:
        sign = 1 if node.operator == "min" else -1
        for part in list(parts):
            others = [other for other in parts if other != part]
            if any(
                simplifier.implied(times(constant(sign), plus(polynomial(part), negated(polynomial(other)))))
                for other in others
            ):
                parts = others
    return apply(node.operator, *parts)


def _one_constant(parts: list[Expr], choose: Callable[[Iterable[Number]], Number]) -> list[Expr]:
    numbers = [part.value for part in parts if isinstance(part, Const)]
    if len(numbers) < 2:
        return parts
    # NaN wins over every number
    chosen = next((value for value in numbers if value != value), choose(numbers))
    return [Const(chosen), *(part for part in parts if not isinstance(part, Const))]


_LAWS: dict[str, Callable[[Simplifier, Apply], Expr]] = {
    "add": _law_add,
    "mul": _law_mul,
    "div": _law_div,
    "floordiv": _law_floordiv,
    "mod": _law_mod,
    "pow": _law_pow,
    "lt": _law_compare,
    "le": _law_compare,
    "gt": _law_compare,
    "ge": _law_compare,
    "eq": _law_compare,
    "ne": _law_compare,
    "and": _law_logic,
    "or": _law_logic,
    "not": _law_not,
    "where": _law_where,
    "float": _law_float,
    "int": _law_int,
    "floor": _law_rounding,
    "ceil": _law_rounding,
    "round": _law_rounding,
    "min": _law_extremum,
    "max": _law_extremum,
}


def simplify(expr: Expr, extents: Mapping[str, Expr] | None = None) -> Expr:
    """The canonical form of an expression.

    Args:
        expr: any expression.
        extents: index name to axis size; lets the simplifier use ``0 <= index < size``.
    """
    return Simplifier(extents or {})(expr)
