"""The printed form of expressions, and its parser.

``parse_expr(print_expr(e))`` is ``e`` for expressions in canonical form. The parser also takes the ASCII spellings
``<= >= != == * -``. Index symbols start in lower case, sizes in upper case; ``s`` is the raw score, ``w`` the weight;
a name followed by ``[`` is a load, a name followed by ``(`` an operator.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from attncompile.ir.expr import (
    SCORE,
    WEIGHT,
    Apply,
    Const,
    Expr,
    Index,
    Load,
    Score,
    Size,
    Weight,
    apply,
)
from attncompile.ir.operators import OPERATORS, Kind

ATOM, PRODUCT, SUM = 10, 6, 5


def _number(value: bool | int | float, digits: int | None) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if math.isnan(value):
            return "nan"
        text = "inf" if math.isinf(value) else repr(abs(value)) if digits is None else f"{abs(value):.{digits}g}"
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

    match expr:
        case Const(value):
            return _number(value, digits), ATOM
        case Index(name) | Size(name):
            return name, ATOM
        case Score():
            return "s", ATOM
        case Weight():
            return "w", ATOM
        case Load(tensor, indices):
            return f"{tensor}[{', '.join(print_expr(index, digits) for index in indices)}]", ATOM
        case Apply("add", arguments):
            text = wrapped(arguments[0], SUM)
            for argument in arguments[1:]:
                term = wrapped(argument, SUM + 1)
                text += f" − {term[1:]}" if term.startswith("−") else f" + {term}"
            return text, SUM
        case Apply("mul", (Const(-1), *rest)) if rest and not any(isinstance(r, Const) for r in rest[:1]):
            first = wrapped(rest[0], PRODUCT if len(rest) == 1 else PRODUCT + 1)
            return "−" + "·".join([first, *(wrapped(r, PRODUCT + 1) for r in rest[1:])]), PRODUCT
        case Apply("not", (argument,)):
            return f"not {wrapped(argument, OPERATORS['not'].precedence)}", OPERATORS["not"].precedence
        case Apply(operator, arguments):
            row = OPERATORS[operator]
            if not row.symbol:
                return f"{operator}({', '.join(print_expr(a, digits) for a in arguments)})", ATOM
            symbol = row.symbol if row.symbol in ("·", "^") else f" {row.symbol} "
            first_at_least = row.precedence + (row.precedence == OPERATORS["lt"].precedence or operator == "pow")
            parts = [wrapped(arguments[0], first_at_least), *(wrapped(a, row.precedence + 1) for a in arguments[1:])]
            if parts[0].startswith("−") and operator in ("div", "floordiv", "mod"):
                parts[0] = f"({parts[0]})"  # a leading minus binds the whole product
            return symbol.join(parts), row.precedence
    raise ValueError(f"cannot print {expr!r}")


_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?)"
    r"|(?P<name>[A-Za-z_][\w.]*)"
    r"|(?P<symbol>//|<=|>=|!=|==|[-+−*·/%^()\[\],<>≤≥=≠]))"
)
_SPELLINGS = {"<=": "≤", ">=": "≥", "!=": "≠", "==": "=", "*": "·", "-": "−"}
_BY_SYMBOL = {row.symbol: row.name for row in OPERATORS.values() if row.symbol}
_CONSTANTS = {"true": True, "false": False, "inf": math.inf, "nan": math.nan}


@dataclass
class _Parser:
    text: str
    tensors: Mapping[str, Kind]
    position: int = 0

    def fail(self, what: str) -> ValueError:
        return ValueError(f"{what} at column {self.position + 1} of {self.text!r}")

    def peek(self) -> tuple[str, str]:
        match = _TOKEN.match(self.text, self.position)
        if match is None:
            if self.text[self.position :].strip():
                raise self.fail(f"cannot read {self.text[self.position :].strip()[0]!r}")
            return "end", ""
        kind = match.lastgroup or ""
        token = match.group(kind)
        return kind, _SPELLINGS.get(token, token)

    def take(self) -> tuple[str, str]:
        token = self.peek()
        match = _TOKEN.match(self.text, self.position)
        self.position = match.end() if match else len(self.text)
        return token

    def accept(self, *symbols: str) -> str | None:
        _, token = self.peek()
        if token in symbols:
            self.take()
            return token
        return None

    def expect(self, symbol: str) -> None:
        if self.accept(symbol) is None:
            raise self.fail(f"expected {symbol!r}, found {self.peek()[1] or 'the end'!r}")

    def chain(self, operator: str, word: str, operand: str) -> Expr:
        parts = [getattr(self, operand)()]
        while self.accept(word):
            parts.append(getattr(self, operand)())
        return apply(operator, *parts) if len(parts) > 1 else parts[0]

    def disjunction(self) -> Expr:
        return self.chain("or", "or", "conjunction")

    def conjunction(self) -> Expr:
        return self.chain("and", "and", "negation")

    def negation(self) -> Expr:
        if self.accept("not"):
            return apply("not", self.negation())
        return self.comparison()

    def comparison(self) -> Expr:
        left = self.sum()
        symbol = self.accept("<", "≤", ">", "≥", "=", "≠")
        return apply(_BY_SYMBOL[symbol], left, self.sum()) if symbol else left

    def sum(self) -> Expr:
        terms = [self.product()]
        while symbol := self.accept("+", "−"):
            term = self.product()
            terms.append(_negated(term) if symbol == "−" else term)
        return apply("add", *terms) if len(terms) > 1 else terms[0]

    def product(self) -> Expr:
        negative = bool(self.accept("−"))
        result = self.power()
        while symbol := self.accept("·", "/", "//", "%"):
            result = apply(_BY_SYMBOL[symbol], result, self.power())
        return _negated(result) if negative else result

    def power(self) -> Expr:
        base = self.factor()
        return apply("pow", base, self.factor()) if self.accept("^") else base

    def factor(self) -> Expr:
        kind, token = self.take()
        if token == "−":
            return _negated(self.factor())
        if token == "(":
            inner = self.disjunction()
            self.expect(")")
            return inner
        if kind == "number":
            return Const(float(token) if any(c in token for c in ".eE") else int(token))
        if kind != "name":
            raise self.fail(f"expected a value, found {token or 'the end'!r}")
        if token in _CONSTANTS:
            return Const(_CONSTANTS[token])
        if self.accept("["):
            indices = self.arguments("]")
            if token not in self.tensors:
                raise self.fail(f"unknown tensor {token!r}; the known ones are {sorted(self.tensors)}")
            return Load(token, indices, self.tensors[token])
        if self.accept("("):
            return apply(token, *self.arguments(")"))
        if token in ("s", "w"):
            return SCORE if token == "s" else WEIGHT
        return Size(token) if token[0].isupper() else Index(token)

    def arguments(self, closing: str) -> tuple[Expr, ...]:
        if self.accept(closing):
            return ()
        parts = [self.disjunction()]
        while self.accept(","):
            parts.append(self.disjunction())
        self.expect(closing)
        return tuple(parts)


def _negated(term: Expr) -> Expr:
    match term:
        case Const(value) if not isinstance(value, bool):
            return Const(-value)
        case Apply("mul", (Const(value), *rest)) if not isinstance(value, bool):
            return apply("mul", -value, *rest)
    return apply("mul", -1.0 if term.kind is Kind.FLOAT else -1, term)  # as the simplifier writes it


def parse_expr(text: str, tensors: Mapping[str, Kind] | None = None) -> Expr:
    """Read an expression back from text.

    Args:
        text: the printed form, for example ``"j ≤ i and attention_mask[b, j] ≠ 0"``.
        tensors: the kind of every tensor that may be loaded.

    Raises:
        ValueError: with the column, for text that is no expression or does not type-check.
    """
    parser = _Parser(text, tensors or {})
    expr = parser.disjunction()
    if parser.peek()[0] != "end":
        raise parser.fail(f"unexpected {parser.peek()[1]!r}")
    return expr
