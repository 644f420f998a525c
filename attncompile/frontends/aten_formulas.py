"""ATen operations of corresponding elements that are a formula in the operators of the language: one line each."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from attncompile.frontends import movement
from attncompile.frontends.aten_builder import Builder, Row, Unstated, arguments_of
from attncompile.frontends.graph import Cast, Fill
from attncompile.ir import Expr, Kind, Load
from attncompile.ir.expr import ONE, ZERO, Apply, Const, apply, where
from attncompile.ir.types import DTYPES, element_kind

_exp, _exp2, _log, _log2 = (partial(apply, name) for name in ("exp", "exp2", "log", "log2"))
_tanh, _sigmoid, _erf, _abs = (partial(apply, name) for name in ("tanh", "sigmoid", "erf", "abs"))
_floor, _ceil, _min, _max = (partial(apply, name) for name in ("floor", "ceil", "min", "max"))
_eq, _ne = (partial(apply, name) for name in ("eq", "ne"))
_INFINITY = Const(math.inf)
_MINUS_INFINITY = Const(-math.inf)


def _formula(write: Callable[..., Expr], *takes: Kind) -> Row:
    """What an operation computes, of its arguments in the order of its schema, those with a default included.

    A tensor argument stands for its element, a number for itself; anything else (a mode, ``None``) is given as it is.
    Tensors of other kinds than ``takes`` (any, when there is none) leave the operation opaque.
    """

    def row(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
        given: list[Any] = []
        tensors: dict[str, str] = {}
        for argument in arguments_of(b.node).values():
            operand = argument if argument is None or isinstance(argument, str) else b.operand(argument)
            if isinstance(operand, str) and not isinstance(argument, str):
                kind = element_kind(b.info(operand).dtype)
                if takes and kind not in takes:
                    raise Unstated
                symbol = Load(f"x{len(tensors)}", (), kind)
                tensors[symbol.tensor] = operand
                operand = symbol
            given.append(operand)
        return _emit(b, write(*given), tensors)

    return row


def _emit(b: Builder, stated: Expr, tensors: dict[str, str]) -> str:
    """The nodes of a formula, the last one in the native node's dtype."""
    made: dict[Expr, str | Expr] = {}

    def value(expr: Expr) -> str | Expr:
        if isinstance(expr, Load):
            return tensors[expr.tensor]
        if not isinstance(expr, Apply):
            return expr
        if expr not in made:
            parts = [value(argument) for argument in expr.arguments]
            kind = {Kind.BOOL: "bool", Kind.INT: "int64"}.get(expr.kind, b.out.dtype)
            if not any(isinstance(part, str) for part in parts):
                made[expr] = expr
            else:
                real = kind if element_kind(kind) is expr.kind else "float32"
                made[expr] = b.pointwise(expr.operator, *parts, dtype=real)
        return made[expr]

    found = value(stated)
    if isinstance(found, Expr):
        return b.emit(Fill(b.name(), found), b.out)
    if stated.kind is not element_kind(b.out.dtype):
        return b.emit(Cast(b.name(), found, b.out.dtype), b.out)
    return b.move(found, movement.identity, "same", b.shape(found)) if isinstance(stated, Load) else found


def _truncated(x: Expr) -> Expr:
    return where(x < 0, _ceil(x), _floor(x))


def _truncated_quotient(x: Expr, y: Expr) -> Expr:
    """The quotient of integers toward zero."""
    whole = _abs(x) // _abs(y)
    return where(_ne(x < 0, y < 0), -whole, whole)


def _softplus(x: Expr, beta: Expr, threshold: Expr) -> Expr:
    return where(beta * x > threshold, x, _log(1 + _exp(beta * x)) / beta)


def _gelu(x: Expr, approximate: str) -> Expr:
    if approximate == "none":
        return 0.5 * x * (1 + _erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + _tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def _log_of_sum(exp: Callable[[Expr], Expr], log: Callable[[Expr], Expr]) -> Callable[[Expr, Expr], Expr]:
    """``log(exp(x) + exp(y))`` without overflow; two equal infinities stay what they are."""

    def write(x: Expr, y: Expr) -> Expr:
        larger = _max(x, y)
        return where(_eq(_abs(larger), _INFINITY), larger, larger + log(1 + exp(_min(x, y) - larger)))

    return write


def _without_nan(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    """``nan_to_num``; an infinity without a replacement becomes the largest number of the dtype."""
    if not b.out.dtype.startswith(("float", "bfloat")):
        raise Unstated
    largest = torch.finfo(DTYPES[b.out.dtype]).max

    def write(x: Expr, nan: Expr | None, positive: Expr | None, negative: Expr | None) -> Expr:
        return where(
            _ne(x, x),
            nan or Const(0.0),
            where(
                _eq(x, _INFINITY),
                positive or Const(largest),
                where(_eq(x, _MINUS_INFINITY), negative or Const(-largest), x),
            ),
        )

    return _formula(write, Kind.FLOAT)(b, args, kwargs)


def _one_hot(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    """``one_hot(x, n)[..., c]`` is whether ``x[...]`` is ``c``."""
    classes = b.index_along(len(b.out.shape) - 1, b.out.shape)
    label = b.move(b.tensor(args[0]), movement.unsqueeze([len(b.out.shape) - 1]), "unsqueeze", (*b.out.shape[:-1], ONE))
    chosen = b.pointwise("eq", label, classes, dtype="bool")
    return b.emit(Cast(b.name(), chosen, b.out.dtype), b.out)


_REAL, _WHOLE = Kind.FLOAT, Kind.INT

FORMULAS: dict[str, Row] = {
    "square": _formula(lambda x: x * x, _REAL, _WHOLE),
    "positive": _formula(lambda x: x),
    "sign": _formula(lambda x: where(x > 0, ONE, where(x < 0, Const(-1), ZERO)), _REAL, _WHOLE),
    "sgn": _formula(lambda x: where(x > 0, ONE, where(x < 0, Const(-1), ZERO)), _REAL, _WHOLE),
    "trunc": _formula(_truncated, _REAL),
    "fix": _formula(_truncated, _REAL),
    "frac": _formula(lambda x: x - _truncated(x), _REAL),
    "log1p": _formula(lambda x: _log(1 + x), _REAL, _WHOLE),
    "expm1": _formula(lambda x: _exp(x) - 1, _REAL, _WHOLE),
    "log10": _formula(lambda x: _log(x) / math.log(10), _REAL, _WHOLE),
    "erfc": _formula(lambda x: 1 - _erf(x), _REAL, _WHOLE),
    "tan": _formula(lambda x: apply("sin", x) / apply("cos", x), _REAL, _WHOLE),
    "sinh": _formula(lambda x: (_exp(x) - _exp(-x)) / 2, _REAL, _WHOLE),
    "cosh": _formula(lambda x: (_exp(x) + _exp(-x)) / 2, _REAL, _WHOLE),
    "isnan": _formula(lambda x: _ne(x, x), _REAL),
    "isinf": _formula(lambda x: _eq(_abs(x), _INFINITY), _REAL),
    "isposinf": _formula(lambda x: _eq(x, _INFINITY), _REAL),
    "isneginf": _formula(lambda x: _eq(x, _MINUS_INFINITY), _REAL),
    "isfinite": _formula(lambda x: _abs(x) < _INFINITY, _REAL),
    "nan_to_num": _without_nan,
    "fmod": _formula(lambda x, y: x - y * _truncated_quotient(x, y), _WHOLE),
    "addcmul": _formula(lambda x, y, z, value: x + value * y * z, _REAL, _WHOLE),
    "addcdiv": _formula(lambda x, y, z, value: x + value * y / z, _REAL),
    "lerp": _formula(lambda x, y, weight: x + weight * (y - x), _REAL),
    "logaddexp": _formula(_log_of_sum(_exp, _log), _REAL),
    "logaddexp2": _formula(_log_of_sum(_exp2, _log2), _REAL),
    "threshold": _formula(lambda x, edge, value: where(x > edge, x, value), _REAL, _WHOLE),
    "softplus": _formula(_softplus, _REAL),
    "log_sigmoid": _formula(lambda x: _min(x, ZERO) - _log(1 + _exp(-_abs(x))), _REAL),
    "leaky_relu": _formula(lambda x, slope: where(x > 0, x, slope * x), _REAL),
    "elu": _formula(lambda x, alpha, s, t: s * where(x > 0, x, alpha * (_exp(t * x) - 1)), _REAL),
    "hardtanh": _formula(lambda x, low, high: _min(_max(x, low), high), _REAL, _WHOLE),
    "silu": _formula(lambda x: x * _sigmoid(x), _REAL),
    "gelu": _formula(_gelu, _REAL),
    "one_hot": _one_hot,
}
"""Operations of corresponding elements as formulas."""
