"""ONNX operators that act on each element alone."""

from __future__ import annotations

import math
from dataclasses import replace

import onnx_ir as ir

from attncompile.frontends.graph import (
    Fill,
    Linear,
)
from attncompile.frontends.onnx_builder import Builder, Row, Unstated, is_float
from attncompile.frontends.onnx_known import DTYPE_NAMES
from attncompile.ir.expr import ZERO, Const


def _plain(operator: str, dtype: str | None = None) -> Row:
    """A pointwise operator whose inputs are its operands."""

    def row(b: Builder) -> str:
        return b.pointwise(operator, *b.tensors(), dtype=dtype)

    return row


def _real(operator: str) -> Row:
    """An operator that the language has for real numbers only."""

    def row(b: Builder) -> str:
        if not is_float(b, b.tensor()):
            raise Unstated
        return b.pointwise(operator, *b.tensors())

    return row


def _add(b: Builder) -> str:
    """A sum; of a product with a matrix and a constant vector it is that product with its bias."""
    for product_with, bias in (b.tensors(), b.tensors()[::-1]):
        linear = b.producer.get(product_with)
        if (
            isinstance(linear, Linear)
            and linear.bias is None
            and bias in b.constants
            and (b.shape(bias) == b.shape(product_with)[-1:])
        ):
            return b.emit(
                lambda name, of=linear, add=bias: replace(of, output=name, bias=add),  # type: ignore[misc]
                b.shape(product_with),
                b.dtype(product_with),
            )
    return b.pointwise("add", *b.tensors())


def _subtract(b: Builder) -> str:
    left, right = b.tensors()
    return b.pointwise("add", left, b.pointwise("mul", b.number(-1, right), right))


def _divide(b: Builder) -> str:
    left, right = b.tensors()
    if is_float(b, left):
        return b.pointwise("div", left, right)
    # integers truncate toward zero
    whole = b.pointwise("floordiv", b.pointwise("abs", left), b.pointwise("abs", right))
    opposite = b.pointwise(
        "ne",
        b.pointwise("lt", left, ZERO, dtype="bool"),
        b.pointwise("lt", right, ZERO, dtype="bool"),
        dtype="bool",
    )
    return b.pointwise("where", opposite, b.pointwise("mul", Const(-1), whole), whole)


def _modulo(b: Builder) -> str:
    left, right = b.tensors()
    if is_float(b, left) or b.attribute("fmod", 0):
        raise Unstated
    return b.pointwise("mod", left, right)


def _negate(b: Builder) -> str:
    return b.pointwise("mul", b.number(-1, b.tensor()), b.tensor())


def _reciprocal(b: Builder) -> str:
    return b.pointwise("div", Const(1.0), b.tensor())


def _power(b: Builder) -> str:
    base, exponent = b.tensors()
    if not is_float(b, base):
        raise Unstated
    return b.pointwise("pow", base, exponent)


def _clip(b: Builder) -> str:
    value = b.tensor()
    for number, (name, operator) in enumerate((("min", "max"), ("max", "min")), start=1):
        written = b.attribute(name)
        if written is not None:
            value = b.pointwise(operator, value, Const(float(written)))
        elif b.input(number) is not None:
            value = b.pointwise(operator, value, b.tensor(number))
    return value


def _relu(b: Builder) -> str:
    return b.pointwise("max", b.tensor(), b.number(0, b.tensor()))


def _is_nan(b: Builder) -> str:
    """Only NaN differs from itself."""
    return b.pointwise("ne", b.tensor(), b.tensor(), dtype="bool")


def _is_infinite(b: Builder) -> str:
    value = b.tensor()
    signs = [sign for sign, name in ((1, "detect_positive"), (-1, "detect_negative")) if b.attribute(name, 1)]
    if not signs or not is_float(b, value):
        raise Unstated
    found = [b.pointwise("eq", value, Const(sign * math.inf), dtype="bool") for sign in signs]
    return b.pointwise("or", *found, dtype="bool")


def _where(b: Builder) -> str:
    return b.pointwise("where", *b.tensors())


def _mean(b: Builder) -> str:
    operands = b.tensors()
    return b.pointwise("mul", b.pointwise("add", *operands), Const(1.0 / len(operands)))


def _cast(b: Builder) -> str:
    dtype = DTYPE_NAMES.get(ir.DataType(b.attribute("to")))
    if dtype is None:
        raise Unstated
    return b.cast(b.tensor(), dtype)


def _cast_like(b: Builder) -> str:
    return b.cast(b.tensor(), b.dtype(b.tensor(1)))


def _dropout(b: Builder) -> str:
    if b.position:
        if b.input(2) is not None and b.scalar(2) != Const(False):
            raise Unstated
        return b.emit(lambda name: Fill(name, Const(True)), b.shape(b.tensor()), "bool")
    training = b.opset >= 12 and b.input(2) is not None and b.scalar(2) != Const(False)
    # before opset 7 an attribute says whether this is a test run
    if training or (b.opset < 7 and not b.attribute("is_test", 0)):
        raise Unstated
    return b.same(b.tensor())


# fmt: off
_OPERATORS = {"Mul": "mul", "Sum": "add", "Min": "min", "Max": "max", "Abs": "abs"}
_REAL = {"Exp": "exp", "Log": "log", "Tanh": "tanh", "Sigmoid": "sigmoid", "Erf": "erf", "Sqrt": "sqrt", "Sin": "sin",
         "Cos": "cos", "Floor": "floor", "Ceil": "ceil", "Round": "round"}
_TRUTH = {"Equal": "eq", "Less": "lt", "LessOrEqual": "le", "Greater": "gt", "GreaterOrEqual": "ge", "And": "and",
          "Or": "or", "Xor": "ne", "Not": "not"}

POINTWISE: dict[str, Row] = {
    **{name: _plain(operator) for name, operator in _OPERATORS.items()},
    **{name: _real(operator) for name, operator in _REAL.items()},
    **{name: _plain(operator, "bool") for name, operator in _TRUTH.items()},
    "Add": _add, "Sub": _subtract, "Div": _divide, "Mod": _modulo, "Neg": _negate, "Reciprocal": _reciprocal,
    "Pow": _power, "Clip": _clip, "Relu": _relu, "Mean": _mean, "Where": _where, "IsNaN": _is_nan,
    "IsInf": _is_infinite, "Cast": _cast, "CastLike": _cast_like, "Dropout": _dropout,
}
# fmt: on
"""Their rows; :mod:`attncompile.frontends.onnx_rows` has all."""
