"""Canonical form of expressions.

Integer arithmetic is brought into polynomial form, integer comparisons are solved for one symbol (the key position
first), truth values are flattened, and constants are folded. Every law holds for all values of its type: no law turns
``NaN`` or infinity into something finite, so ``x - x`` and ``0 * x`` fold for integers only. Real sums and products are
reordered, so real arithmetic is preserved up to rounding and the sign of zero.

Laws that need a bound (``(b*H + h) // H`` is ``b``) prove it from the extents of the index symbols.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from attncompile.ir.expr import (
    FALSE,
    TRUE,
    Apply,
    Const,
    Expr,
    Index,
    Load,
    Number,
    Score,
    Size,
    Weight,
    apply,
)
from attncompile.ir.operators import OPERATORS, Kind

Monomial = tuple[Expr, ...]
Polynomial = dict[Monomial, int]
"""Integer polynomial: product of atoms (sorted) to coefficient; the empty product is the constant."""

_SOLVE_ORDER = ("j", "i", "h", "g", "b", "d", "e")
_NEGATED = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}
_MIRRORED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq", "ne": "ne"}


def sort_key(expr: Expr) -> tuple[int, str]:
    """A total order of expressions: simple before compound, then by text."""
    rank = {Const: 0, Index: 1, Size: 2, Score: 3, Weight: 3, Load: 4, Apply: 5}[type(expr)]
    return rank, repr(expr)


@dataclass(frozen=True)
class Simplifier:
    """Simplifies under assumptions about symbols.

    Attributes:
        extents: index name to the size of its axis, so that ``0 <= index < size`` may be used. Sizes are at least 1.
    """

    extents: Mapping[str, Expr] = field(default_factory=dict)
    _known: dict[Expr, Expr] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, expr: Expr) -> Expr:
        """The canonical form."""
        known = self._known.get(expr)
        if known is not None:
            return known
        children = tuple(self(child) for child in expr.children)
        node = expr if children == expr.children else expr.with_children(children)
        result = self._law(node) if isinstance(node, Apply) else node
        # a law builds new nodes from canonical children; once more reaches the fixed point
        if result != node:
            result = self(result)
        self._known[expr] = result
        self._known[result] = result
        return result

    def _law(self, node: Apply) -> Expr:
        folded = _fold_constants(node)
        if folded is not None:
            return folded
        hoisted = _push_into_where(node)
        if hoisted is not None:
            return hoisted
        law = _LAWS.get(node.operator)
        return law(self, node) if law else node

    # Integer arithmetic

    def nonnegative(self, expr: Expr) -> bool:
        """Whether the integer expression is proven to be at least zero."""
        return self.polynomial_nonnegative(polynomial(self(expr)))

    def polynomial_nonnegative(self, poly: Polynomial) -> bool:
        """Whether the polynomial is proven at least zero: each index is moved to its worse end, sizes count from 1."""
        indices = sorted(
            {a for mono in poly for a in mono if isinstance(a, Index) and a.name in self.extents}, key=sort_key
        )
        for symbol in indices:
            # linear in the index, with coefficients of one sign: the minimum is at an end
            coefficient: Polynomial = {}
            rest: Polynomial = {}
            for mono, value in poly.items():
                if symbol in mono:
                    reduced = list(mono)
                    reduced.remove(symbol)
                    if symbol in reduced:
                        return False
                    coefficient[tuple(reduced)] = value
                else:
                    rest[mono] = value
            if self._sizes_nonnegative(coefficient):
                poly = rest
            elif self._sizes_nonnegative({m: -v for m, v in coefficient.items()}):
                last = _add(polynomial(self.extents[symbol.name]), {(): -1})
                poly = _add(rest, _multiply(coefficient, last))
            else:
                return False
        return self._sizes_nonnegative(poly)

    def _sizes_nonnegative(self, poly: Polynomial) -> bool:
        """Substitute ``size = 1 + size'`` with ``size' >= 0``; all coefficients must then be non-negative."""
        expanded: Polynomial = {}
        for mono, value in poly.items():
            product: Polynomial = {(): value}
            for atom in mono:
                if isinstance(atom, Size):
                    product = _multiply(product, {(atom,): 1, (): 1})
                elif isinstance(atom, Index) or (isinstance(atom, Apply) and self._atom_nonnegative(atom)):
                    product = _multiply(product, {(atom,): 1})
                else:
                    return False
            expanded = _add(expanded, product)
        return all(value >= 0 for value in expanded.values())

    def _atom_nonnegative(self, atom: Apply) -> bool:
        if atom.operator in ("floordiv", "mod"):
            positive = self.nonnegative(atom.arguments[1] - 1)
            return positive and (atom.operator == "mod" or self.nonnegative(atom.arguments[0]))
        return False

    def divide(self, dividend: Expr, divisor: Expr) -> tuple[Expr, Expr] | None:
        """Quotient and remainder of a floor division, where they can be proven without the operators themselves."""
        terms, by = polynomial(dividend), polynomial(divisor)
        if len(by) != 1:
            return None
        ((mono, factor),) = by.items()
        if factor <= 0 or not all(isinstance(atom, Size) for atom in mono):
            return None
        quotient: Polynomial = {}
        rest: Polynomial = {}
        for term, value in terms.items():
            reduced = _without(term, mono)
            if reduced is not None and value % factor == 0:
                quotient[reduced] = value // factor
            elif reduced is not None and not reduced and not mono:
                quotient[()] = value // factor
                rest[()] = value % factor
            else:
                rest[term] = value
        rest = {m: v for m, v in rest.items() if v}
        below = _add(by, {m: -v for m, v in _add(rest, {(): 1}).items()})
        if self.polynomial_nonnegative(rest) and self.polynomial_nonnegative(below):
            return from_polynomial(quotient), from_polynomial(rest)
        return None


def _multiply(left: Polynomial, right: Polynomial) -> Polynomial:
    result: Polynomial = {}
    for m, a in left.items():
        for n, b in right.items():
            key = tuple(sorted(m + n, key=sort_key))
            result[key] = result.get(key, 0) + a * b
    return {m: v for m, v in result.items() if v}


def _add(left: Polynomial, right: Polynomial) -> Polynomial:
    result = dict(left)
    for m, v in right.items():
        result[m] = result.get(m, 0) + v
    return {m: v for m, v in result.items() if v}


def _without(term: Monomial, factor: Monomial) -> Monomial | None:
    rest = list(term)
    for atom in factor:
        if atom not in rest:
            return None
        rest.remove(atom)
    return tuple(rest)


def polynomial(expr: Expr) -> Polynomial:
    """An integer expression as a polynomial over its non-arithmetic parts.

    Raises:
        ValueError: when the expression is not an integer.
    """
    if expr.kind is not Kind.INT:
        raise ValueError(f"{expr} is {expr.kind}, not an integer expression")
    match expr:
        case Const(value):
            return {(): int(value)} if value else {}
        case Apply("add", arguments):
            result: Polynomial = {}
            for argument in arguments:
                result = _add(result, polynomial(argument))
            return result
        case Apply("mul", arguments):
            result = {(): 1}
            for argument in arguments:
                result = _multiply(result, polynomial(argument))
            return result
    return {(expr,): 1}


def from_polynomial(poly: Polynomial) -> Expr:
    """The expression of a polynomial: terms by descending order, the constant last."""

    def term_key(mono: Monomial) -> tuple[bool, bool, list[tuple[int, str]]]:
        return not mono, poly[mono] < 0, [sort_key(atom) for atom in mono]

    terms: list[Expr] = []
    for mono in sorted(poly, key=term_key):
        value = poly[mono]
        if not mono:
            terms.append(Const(value))
        elif value == 1:
            terms.append(apply("mul", *mono) if len(mono) > 1 else mono[0])
        else:
            terms.append(apply("mul", value, *mono))
    return apply("add", *terms) if terms else Const(0)


# Laws. Each takes the simplifier and a node with canonical arguments, and returns an equal expression.


def _constant_value(operator: str, values: list[Number]) -> Number:
    tensors = [torch.tensor(v, dtype=torch.bool if isinstance(v, bool) else torch.int64 if isinstance(v, int)
                            else torch.float64) for v in values]
    return OPERATORS[operator].torch(*tensors).item()  # type: ignore[no-any-return]


def _fold_constants(node: Apply) -> Expr | None:
    if not all(isinstance(argument, Const) for argument in node.arguments):
        return None
    values = [argument.value for argument in node.arguments if isinstance(argument, Const)]
    if node.operator in ("floordiv", "mod") and values[1] == 0:
        return None
    if node.operator == "add" and node.result is Kind.INT:
        return Const(sum(int(v) for v in values))
    if node.operator == "mul" and node.result is Kind.INT:
        return Const(math.prod(int(v) for v in values))
    if node.operator == "where":
        return node.arguments[1] if values[0] else node.arguments[2]
    if node.operator == "int" and isinstance(values[0], float) and not math.isfinite(values[0]):
        return None
    value = _constant_value(node.operator, values)
    return Const(bool(value) if node.result is Kind.BOOL else int(value) if node.result is Kind.INT else float(value))


def _push_into_where(node: Apply) -> Expr | None:
    """``f(where(c, 1, 0), 2)`` with constants everywhere is ``where(c, f(1, 2), f(0, 2))``."""
    if node.operator in ("where", "and", "or", "not"):
        return None
    choices = [a for a in node.arguments if isinstance(a, Apply) and a.operator == "where"]
    if len(choices) != 1 or not all(isinstance(a, Const) for a in node.arguments if a is not choices[0]):
        return None
    condition, then, otherwise = choices[0].arguments
    if not (isinstance(then, Const) and isinstance(otherwise, Const)):
        return None

    def over(value: Expr) -> Expr:
        return apply(node.operator, *(value if a is choices[0] else a for a in node.arguments))

    return apply("where", condition, over(then), over(otherwise))


def _join_division(poly: Polynomial) -> Polynomial:
    """``k·(x // k) + x % k`` is ``x``."""
    for mono, value in poly.items():
        for atom in mono:
            if not (isinstance(atom, Apply) and atom.operator == "mod"):
                continue
            dividend, divisor = atom.arguments
            others = list(mono)
            others.remove(atom)
            whole: Polynomial = {tuple(others): value}
            whole = _multiply(_multiply(whole, polynomial(divisor)), {(apply("floordiv", dividend, divisor),): 1})
            if len(whole) == 1 and all(poly.get(m) == v for m, v in whole.items()):
                rest = {m: v for m, v in poly.items() if m != mono and m not in whole}
                return _join_division(_add(rest, _multiply({tuple(others): value}, polynomial(dividend))))
    return poly


def _law_add(simplifier: Simplifier, node: Apply) -> Expr:
    if node.result is Kind.INT:
        return from_polynomial(_join_division(polynomial(node)))
    constant = math.fsum(float(a.value) for a in node.arguments if isinstance(a, Const))
    if any(isinstance(a, Const) and not math.isfinite(a.value) for a in node.arguments):
        constant = sum(float(a.value) for a in node.arguments if isinstance(a, Const))
    rest = sorted((a for a in node.arguments if not isinstance(a, Const)), key=_term_key)
    if constant != 0:
        rest.append(Const(constant))
    return _real(apply("add", *rest))


def _term_key(term: Expr) -> tuple[bool, tuple[int, str]]:
    reads_score = any(isinstance(n, Score | Weight) for n in _nodes(term))
    return not reads_score, sort_key(term)


def _nodes(expr: Expr) -> list[Expr]:
    return [expr, *(n for child in expr.children for n in _nodes(child))]


def _real(expr: Expr) -> Expr:
    """Keep the kind of a real expression whose only remaining part is an integer."""
    if expr.kind is not Kind.INT:
        return expr
    return Const(float(expr.value)) if isinstance(expr, Const) else apply("float", expr)


def _law_mul(simplifier: Simplifier, node: Apply) -> Expr:
    if node.result is Kind.INT:
        return from_polynomial(polynomial(node))
    constant = 1.0
    for argument in node.arguments:
        if isinstance(argument, Const):
            constant *= float(argument.value)
    rest = sorted((a for a in node.arguments if not isinstance(a, Const)), key=_term_key)
    if not rest:
        return Const(constant)
    if constant != 1.0:
        rest.insert(0, Const(constant))
    return _real(apply("mul", *rest))


def _law_div(simplifier: Simplifier, node: Apply) -> Expr:
    left, right = node.arguments
    if isinstance(right, Const) and right.value != 0 and math.isfinite(right.value):
        return apply("mul", 1.0 / float(right.value), left)
    return node


def _law_floordiv(simplifier: Simplifier, node: Apply) -> Expr:
    dividend, divisor = node.arguments
    divided = simplifier.divide(dividend, divisor)
    if divided is not None:
        return divided[0]
    match node.arguments:
        case (Apply("floordiv", (inner, Const(first))), Const(second)) if first > 0 and second > 0:
            return apply("floordiv", inner, first * second)
    return node


def _law_mod(simplifier: Simplifier, node: Apply) -> Expr:
    dividend, divisor = node.arguments
    divided = simplifier.divide(dividend, divisor)
    if divided is not None:
        return divided[1]
    if isinstance(divisor, Const) and divisor.value > 0:
        # drop whole multiples of the divisor
        reduced = {m: v % divisor.value if m else v % divisor.value for m, v in polynomial(dividend).items()}
        rebuilt = from_polynomial({m: int(v) for m, v in reduced.items() if v})
        if rebuilt != dividend:
            return apply("mod", rebuilt, divisor)
    return node


def _law_pow(simplifier: Simplifier, node: Apply) -> Expr:
    base, exponent = node.arguments
    if isinstance(exponent, Const) and exponent.value == 1:
        return _real(base)
    if isinstance(exponent, Const) and exponent.value == 2:
        return _real(apply("mul", base, base))
    return node


def _law_compare(simplifier: Simplifier, node: Apply) -> Expr:
    left, right = node.arguments
    if left.kind is Kind.INT and right.kind is Kind.INT:
        return _compare_integers(simplifier, node.operator, left, right)
    if left.kind is Kind.BOOL:
        for one, other in ((left, right), (right, left)):
            if isinstance(other, Const):
                return one if bool(other.value) == (node.operator == "eq") else apply("not", one)
    if isinstance(left, Const) or (sort_key(right) < sort_key(left) and not isinstance(right, Const)):
        return apply(_MIRRORED[node.operator], right, left)
    return node


def _solve_rank(expr: Expr) -> tuple[int, tuple[int, str]]:
    name = expr.name if isinstance(expr, Index) else ""
    rank = _SOLVE_ORDER.index(name) if name in _SOLVE_ORDER else len(_SOLVE_ORDER) + (not isinstance(expr, Index))
    return rank, sort_key(expr)


def _compare_integers(simplifier: Simplifier, operator: str, left: Expr, right: Expr) -> Expr:
    if operator in ("gt", "ge"):
        left, right, operator = right, left, _MIRRORED[operator]
    # left <= right is slack >= 0
    slack = polynomial(right - left)
    if operator == "lt":
        slack = _add(slack, {(): -1})
    divisor = math.gcd(*(abs(v) for m, v in slack.items() if m))
    if operator in ("eq", "ne"):
        if divisor > 1:
            if slack.get((), 0) % divisor:
                return Const(operator == "ne")
            slack = {m: v // divisor for m, v in slack.items()}
        if not any(slack):
            return Const((slack.get((), 0) == 0) == (operator == "eq"))
        minus = {m: -v for m, v in slack.items()}
        if simplifier.polynomial_nonnegative(_add(slack, {(): -1})) or simplifier.polynomial_nonnegative(
            _add(minus, {(): -1})
        ):
            return Const(operator == "ne")
    else:
        if divisor > 1:
            slack = {m: v // divisor for m, v in slack.items()}  # the constant rounds down: slack is an integer
        slack = {m: v for m, v in slack.items() if v}
        if not any(slack):
            return Const(slack.get((), 0) >= 0)
        if simplifier.polynomial_nonnegative(slack):
            return TRUE
        if simplifier.polynomial_nonnegative({m: -v for m, v in _add(slack, {(): 1}).items()}):
            return FALSE
    lead = min((m for m in slack if m), key=lambda m: (len(m), [_solve_rank(a) for a in m]))
    coefficient = slack[lead]
    rest = {m: v for m, v in slack.items() if m != lead}
    if operator in ("eq", "ne"):
        sign = -1 if coefficient > 0 else 1
        return apply(operator, from_polynomial({lead: abs(coefficient)}), from_polynomial(
            {m: sign * v for m, v in rest.items()}))
    if coefficient < 0:
        # |c|·lead <= rest
        head = from_polynomial({lead: -coefficient})
        if rest.get((), 0) == -1 or not any(rest):
            return apply("lt", head, from_polynomial(_add(rest, {(): 1})))
        return apply("le", head, from_polynomial(rest))
    # c·lead >= -rest
    head, bound = from_polynomial({lead: coefficient}), {m: -v for m, v in rest.items()}
    if bound.get((), 0) == 0 or not any(bound):
        return apply("ge", head, from_polynomial(bound))
    return apply("gt", head, from_polynomial(_add(bound, {(): -1})))


def _law_logic(simplifier: Simplifier, node: Apply) -> Expr:
    absorbing = Const(node.operator == "or")
    parts = sorted(dict.fromkeys(a for a in node.arguments if a != Const(node.operator == "and")), key=_mask_key)
    if absorbing in parts:
        return absorbing
    for part in parts:
        if simplifier(apply("not", part)) in parts and _total(part):
            return absorbing
    return apply(node.operator, *parts) if parts else Const(node.operator == "and")


def _total(part: Expr) -> bool:
    """Whether a truth value and its negation exclude each other in the canonical form (no NaN between them)."""
    return not any(n.kind is Kind.FLOAT for n in _nodes(part))


def _mask_key(part: Expr) -> tuple[bool, bool, tuple[int, str]]:
    nodes = _nodes(part)
    return any(isinstance(n, Load) for n in nodes), isinstance(part, Apply) and part.operator != "le", sort_key(part)


def _law_not(simplifier: Simplifier, node: Apply) -> Expr:
    match node.arguments[0]:
        case Apply("not", (inner,)):
            return inner
        case Apply(operator, (left, right)) if operator in ("eq", "ne") or (
            operator in _NEGATED and left.kind is Kind.INT and right.kind is Kind.INT
        ):
            return apply(_NEGATED[operator], left, right)
        case Apply("and" | "or" as operator, parts):
            return apply("or" if operator == "and" else "and", *(apply("not", p) for p in parts))
    return node


def _law_where(simplifier: Simplifier, node: Apply) -> Expr:
    condition, then, otherwise = node.arguments
    if isinstance(condition, Const):
        chosen = then if condition.value else otherwise
        return chosen if chosen.kind is node.result else _real(chosen)
    if then == otherwise:
        return then
    if node.result is Kind.BOOL:
        if isinstance(then, Const):
            return apply("or", condition, otherwise) if then.value else apply(
                "and", apply("not", condition), otherwise)
        if isinstance(otherwise, Const):
            return apply("or", apply("not", condition), then) if otherwise.value else apply("and", condition, then)
    if isinstance(condition, Apply) and condition.operator == "not":
        return apply("where", condition.arguments[0], otherwise, then)
    match then:
        case Apply("where", (inner, first, _)) if inner == condition:
            return apply("where", condition, first, otherwise)
    match otherwise:
        case Apply("where", (inner, _, second)) if inner == condition:
            return apply("where", condition, then, second)
    return node


def _law_float(simplifier: Simplifier, node: Apply) -> Expr:
    (argument,) = node.arguments
    if argument.kind is Kind.FLOAT:
        return argument
    if argument.kind is Kind.BOOL:
        return apply("where", argument, 1.0, 0.0)
    return node


def _law_int(simplifier: Simplifier, node: Apply) -> Expr:
    (argument,) = node.arguments
    if argument.kind is Kind.INT:
        return argument
    if argument.kind is Kind.BOOL:
        return apply("where", argument, 1, 0)
    match argument:
        case Apply("float", (inner,)) if inner.kind is Kind.INT:
            return inner
    return node


def _law_extremum(simplifier: Simplifier, node: Apply) -> Expr:
    parts = sorted(dict.fromkeys(node.arguments), key=sort_key)
    if node.result is Kind.INT and len(parts) > 1:
        kept = list(parts)
        for part in parts:
            for other in kept:
                smaller, larger = (other, part) if node.operator == "min" else (part, other)
                if part != other and part in kept and simplifier.nonnegative(larger - smaller):
                    kept.remove(part)
                    break
        parts = kept
    return _real(apply(node.operator, *parts)) if node.result is Kind.FLOAT else apply(node.operator, *parts)


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
