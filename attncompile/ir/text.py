"""The printed form of expressions, and its parser.

``parse_expr(print_expr(e))`` is ``e`` for expressions in canonical form. The parser also takes the ASCII
spellings ``<= >= != == * -``. Index symbols start in lower case, sizes in upper case; ``s`` is the raw score,
``w`` the weight, ``t`` the total; a name followed by ``[`` is a load, a name followed by ``(`` an operator.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from attncompile.ir.expr import (
    SCORE,
    TOTAL,
    WEIGHT,
    Apply,
    Const,
    Expr,
    Index,
    Load,
    Number,
    Score,
    Size,
    Total,
    Weight,
    apply,
)
from attncompile.ir.operators import OPERATORS, Kind

ATOM, PRODUCT, SUM = 10, 6, 5

Parsed = TypeVar("Parsed")


def _number(value: Number, digits: int | None) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if math.isnan(value):
            return "nan"
        text = (
            "inf" if math.isinf(value) else repr(abs(value)) if digits is None else f"{abs(value):.{digits}g}"
        )
        return ("−" if math.copysign(1.0, value) < 0 else "") + text
    return ("−" if value < 0 else "") + str(abs(value))


def print_expr(expr: Expr, digits: int | None = None) -> str:
    """The expression as text.

    Args:
        expr: the expression.
        digits: significant digits of real constants; ``None`` prints them exactly, so that they parse back.
    """
    return _print(expr, digits)[0]


def _print(expr: Expr, digits: int | None) -> tuple[str, int]:
    """Text and the precedence of its outermost operator."""

    def wrapped(child: Expr, at_least: int) -> str:
        text, precedence = _print(child, digits)
        return text if precedence >= at_least else f"({text})"

    def first(child: Expr, at_least: int) -> str:
        # an integer sum or product inside a real one keeps its parentheses: they are two operations
        same = isinstance(child, Apply) and isinstance(expr, Apply) and child.operator == expr.operator
        return wrapped(child, at_least + (same and child.kind is not expr.kind))

    match expr:
        case Const(value):
            return _number(value, digits), ATOM
        case Index(name) | Size(name):
            return name, ATOM
        case Score():
            return "s", ATOM
        case Weight():
            return "w", ATOM
        case Total():
            return "t", ATOM
        case Load(tensor, indices):
            return f"{tensor}[{', '.join(print_expr(index, digits) for index in indices)}]", ATOM
        case Apply("add", arguments):
            text = first(arguments[0], SUM)
            for argument in arguments[1:]:
                term = wrapped(argument, SUM + 1)
                text += f" − {term[1:]}" if term.startswith("−") else f" + {term}"
            return text, SUM
        case Apply("mul", (Const(int(-1)), *rest)) if not isinstance(rest[0], Const):
            return "−" + "·".join(
                [first(rest[0], PRODUCT), *(wrapped(r, PRODUCT + 1) for r in rest[1:])]
            ), PRODUCT
        case Apply("not", (argument,)):
            return f"not {wrapped(argument, OPERATORS['not'].precedence)}", OPERATORS["not"].precedence
        case Apply(operator, arguments):
            row = OPERATORS[operator]
            if not row.symbol:
                return f"{operator}({', '.join(print_expr(a, digits) for a in arguments)})", ATOM
            symbol = row.symbol if row.symbol in ("·", "^") else f" {row.symbol} "
            repeats = operator == "pow" or row.precedence == OPERATORS["lt"].precedence
            head = first(arguments[0], row.precedence + repeats)
            if head.startswith("−") and operator in ("div", "floordiv", "mod", "pow"):
                head = f"({head})"  # a leading minus binds the whole product
            return symbol.join(
                [head, *(wrapped(a, row.precedence + 1) for a in arguments[1:])]
            ), row.precedence
    raise ValueError(f"cannot print {expr!r}")


_TOKEN = re.compile(
    r"(?P<number>(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?)"
    r"|(?P<name>[A-Za-z_][\w.]*)"
    r"|(?P<symbol>//|<=|>=|!=|==|[-+−*·/%^()\[\],<>≤≥=≠])"
    r"|(?P<space>\s+)"
)
_SPELLINGS = {"<=": "≤", ">=": "≥", "!=": "≠", "==": "=", "*": "·", "-": "−"}
_BY_SYMBOL = {row.symbol: row.name for row in OPERATORS.values() if row.symbol}
_CONSTANTS = {"true": True, "false": False, "inf": math.inf, "nan": math.nan}
_SYMBOLS: dict[str, Expr] = {"s": SCORE, "w": WEIGHT, "t": TOTAL}
_WORDS = ("and", "or", "not")


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    column: int

    def __str__(self) -> str:
        return repr(self.text) if self.text else "the end"


def _tokens(text: str) -> list[_Token]:
    found: list[_Token] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _failure(f"cannot read {text[position]!r}", text, position)
        kind, token = match.lastgroup or "", match.group()
        if kind != "space":
            kind = "symbol" if token in _WORDS else kind
            found.append(_Token(kind, _SPELLINGS.get(token, token), position))
        position = match.end()
    return [*found, _Token("end", "", len(text))]


def _failure(what: str, text: str, column: int) -> ValueError:
    return ValueError(f"{what} at column {column + 1} of {text!r}")


class _Parser:
    """Recursive descent, one method per precedence."""

    def __init__(self, text: str, tensors: Mapping[str, Kind]) -> None:
        self.text, self.tensors = text, tensors
        self.tokens = _tokens(text)
        self.position = 0

    @property
    def next(self) -> _Token:
        return self.tokens[self.position]

    def fail(self, what: str, token: _Token) -> ValueError:
        return _failure(what, self.text, token.column)

    def take(self) -> _Token:
        token = self.next
        self.position += token.kind != "end"
        return token

    def accept(self, *symbols: str) -> _Token | None:
        return self.take() if self.next.kind == "symbol" and self.next.text in symbols else None

    def expect(self, symbol: str) -> None:
        if self.accept(symbol) is None:
            raise self.fail(f"expected {symbol!r}, found {self.next}", self.next)

    def typed(self, at: _Token, operator: str, *arguments: Expr | Number) -> Expr:
        try:
            return apply(operator, *arguments)
        except ValueError as error:
            raise self.fail(str(error), at) from None

    def chain(self, operator: str, operand: Callable[[], Expr]) -> Expr:
        parts, at = [operand()], self.next
        while self.accept(operator):
            parts.append(operand())
        return self.typed(at, operator, *parts) if len(parts) > 1 else parts[0]

    def disjunction(self) -> Expr:
        return self.chain("or", self.conjunction)

    def conjunction(self) -> Expr:
        return self.chain("and", self.negation)

    def negation(self) -> Expr:
        at = self.accept("not")
        return self.typed(at, "not", self.negation()) if at else self.comparison()

    def comparison(self) -> Expr:
        left = self.sum()
        at = self.accept("<", "≤", ">", "≥", "=", "≠")
        return self.typed(at, _BY_SYMBOL[at.text], left, self.sum()) if at else left

    def sum(self) -> Expr:
        terms, first = [self.product()], self.next
        while at := self.accept("+", "−"):
            term = self.product()
            terms.append(self.negated(term, at) if at.text == "−" else term)
        return self.typed(first, "add", *terms) if len(terms) > 1 else terms[0]

    def product(self) -> Expr:
        minus = self.accept("−")
        factors, first = [self.power()], self.next
        while at := self.accept("·", "/", "//", "%"):
            factor = self.power()
            if at.text == "·":
                factors.append(factor)
            else:
                left = self.typed(first, "mul", *factors) if len(factors) > 1 else factors[0]
                factors = [self.typed(at, _BY_SYMBOL[at.text], left, factor)]
        result = self.typed(first, "mul", *factors) if len(factors) > 1 else factors[0]
        return self.negated(result, minus) if minus else result

    def power(self) -> Expr:
        if minus := self.accept("−"):
            return self.negated(self.power(), minus)
        base = self.atom()
        at = self.accept("^")
        return self.typed(at, "pow", base, self.exponent()) if at else base

    def exponent(self) -> Expr:
        minus = self.accept("−")
        return self.negated(self.exponent(), minus) if minus else self.atom()

    def atom(self) -> Expr:
        token = self.take()
        if token.text == "(":
            inner = self.disjunction()
            self.expect(")")
            return inner
        if token.kind == "number":
            return Const(float(token.text) if any(c in token.text for c in ".eE") else int(token.text))
        if token.kind != "name":
            raise self.fail(f"expected a value, found {token}", token)
        if token.text in _CONSTANTS:
            return Const(_CONSTANTS[token.text])
        if self.accept("["):
            if token.text not in self.tensors:
                raise self.fail(f"unknown tensor {token}; the known ones are {sorted(self.tensors)}", token)
            return Load(token.text, self.arguments("]"), self.tensors[token.text])
        if self.accept("("):
            return self.typed(token, token.text, *self.arguments(")"))
        if token.text in _SYMBOLS:
            return _SYMBOLS[token.text]
        try:
            return Size(token.text) if token.text[0].isupper() else Index(token.text)
        except ValueError as error:
            raise self.fail(str(error), token) from None

    def arguments(self, closing: str) -> tuple[Expr, ...]:
        if self.accept(closing):
            return ()
        parts = self.items()
        self.expect(closing)
        return parts

    def items(self) -> tuple[Expr, ...]:
        parts = [self.disjunction()]
        while self.accept(","):
            parts.append(self.disjunction())
        return tuple(parts)

    def negated(self, term: Expr, at: _Token) -> Expr:
        match term:
            case Const(value) if not isinstance(value, bool):
                return Const(-value)
            case Apply("mul", (Const(value), *rest)):
                return self.typed(at, "mul", -value, *rest)
        return self.typed(at, "mul", -1, term)

    def whole(self, rule: Callable[[], Parsed]) -> Parsed:
        """What the rule reads, which must be all of the text."""
        try:
            result = rule()
        except RecursionError:
            raise self.fail("nested too deeply", self.next) from None
        if self.next.kind != "end":
            raise self.fail(f"unexpected {self.next}", self.next)
        return result


def parse_expr(text: str, tensors: Mapping[str, Kind] | None = None) -> Expr:
    """Read an expression back from text.

    Args:
        text: the printed form, for example ``"j ≤ i and attention_mask[b, j] ≠ 0"``.
        tensors: the kind of every tensor that may be loaded.

    Raises:
        ValueError: with the column, for text that is no expression or does not type-check.
    """
    parser = _Parser(text, tensors or {})
    return parser.whole(parser.disjunction)


def parse_exprs(text: str, tensors: Mapping[str, Kind] | None = None) -> tuple[Expr, ...]:
    """Read expressions separated by commas; none from an empty text.

    Raises:
        ValueError: as :func:`parse_expr`.
    """
    parser = _Parser(text, tensors or {})
    return parser.whole(parser.items) if text.strip() else ()
