"""ATen operations of corresponding elements, conversions among them."""

from __future__ import annotations

from typing import Any

from attncompile.frontends import movement
from attncompile.frontends.aten_builder import Builder, Row, Unstated
from attncompile.frontends.graph import Cast
from attncompile.ir import simplify
from attncompile.ir.expr import ONE, ZERO, Const, apply


def _plain(operation: str) -> Row:
    """A pointwise operation whose arguments are its operands."""

    def row(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
        return b.pointwise(operation, *(b.operand(a) for a in args))

    return row


def _add(sign: int) -> Row:
    def row(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
        left, right = b.operand(args[0]), b.operand(args[1])
        factor = b.number(kwargs.get("alpha", args[2] if len(args) > 2 else 1))
        weight = simplify(apply("mul", sign, factor))
        if weight != ONE:
            right = (
                b.pointwise("mul", weight, right) if isinstance(right, str) else simplify(apply("mul", weight, right))
            )
        return b.pointwise("add", left, right)

    return row


def _reverse_subtract(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    return _add(-1)(b, [args[1], args[0], *args[2:]], kwargs)


def _divide(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    mode = kwargs.get("rounding_mode")
    left, right = b.operand(args[0]), b.operand(args[1])
    if mode is None:
        return b.pointwise("div", left, right)
    if mode != "floor" or not b.out.dtype.startswith("int"):
        raise Unstated
    return b.pointwise("floordiv", left, right)


def _integer(operation: str) -> Row:
    """An operation that the language has for integers only."""

    def row(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
        if not b.out.dtype.startswith("int"):
            raise Unstated
        return b.pointwise(operation, *(b.operand(a) for a in args))

    return row


def _truth(operation: str) -> Row:
    """Bitwise operations of truth values; of integers they stay opaque."""

    def row(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
        if b.out.dtype != "bool":
            raise Unstated
        operands = [b.operand(a) for a in args]
        asked = [
            o
            if (b.info(o).dtype == "bool" if isinstance(o, str) else o.kind.value == "bool")
            else b.pointwise("ne", o, ZERO, dtype="bool")
            for o in operands
        ]
        return b.pointwise(operation, *asked)

    return row


def _masked_fill(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    return b.pointwise("where", b.operand(args[1]), b.operand(args[2]), b.operand(args[0]))


def _clamp(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    low = kwargs.get("min", args[1] if len(args) > 1 else None)
    high = kwargs.get("max", args[2] if len(args) > 2 else None)
    value = b.tensor(args[0])
    if low is not None:
        value = b.pointwise("max", value, b.operand(low))
    if high is not None:
        value = b.pointwise("min", value, b.operand(high))
    return value


def _clamp_max(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    return b.pointwise("min", b.tensor(args[0]), b.operand(args[1]))


def _relu(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    zero = Const(0.0) if b.out.dtype.startswith(("float", "bfloat")) else ZERO
    return b.pointwise("max", b.tensor(args[0]), zero)


def _negate(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    return b.pointwise("mul", Const(-1), b.tensor(args[0]))


def _reciprocal(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    return b.pointwise("div", Const(1.0), b.tensor(args[0]))


def _convert(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    if b.info(source).dtype == b.out.dtype:
        return b.move(source, movement.identity, "same", b.shape(source))
    return b.emit(Cast(b.name(), source, b.out.dtype), b.out)


_POINTWISE = {
    "mul": "mul",
    "exp": "exp",
    "exp2": "exp2",
    "log": "log",
    "log2": "log2",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "sqrt": "sqrt",
    "rsqrt": "rsqrt",
    "abs": "abs",
    "pow": "pow",
    "minimum": "min",
    "maximum": "max",
    "where": "where",
    "lt": "lt",
    "le": "le",
    "gt": "gt",
    "ge": "ge",
    "eq": "eq",
    "ne": "ne",
    "sin": "sin",
    "cos": "cos",
    "erf": "erf",
    "floor": "floor",
    "ceil": "ceil",
    "round": "round",
    "true_divide": "div",
    "greater": "gt",
    "less": "lt",
    "greater_equal": "ge",
    "less_equal": "le",
    "not_equal": "ne",
    "multiply": "mul",
    "absolute": "abs",
    "special_expit": "sigmoid",
}


POINTWISE: dict[str, Row] = {
    **{name: _plain(operation) for name, operation in _POINTWISE.items()},
    "add": _add(1),
    "sub": _add(-1),
    "subtract": _add(-1),
    "rsub": _reverse_subtract,
    "div": _divide,
    "divide": _divide,
    "neg": _negate,
    "negative": _negate,
    "reciprocal": _reciprocal,
    "floor_divide": _integer("floordiv"),
    "remainder": _integer("mod"),
    "bitwise_and": _truth("and"),
    "__and__": _truth("and"),
    "logical_and": _truth("and"),
    "bitwise_or": _truth("or"),
    "__or__": _truth("or"),
    "logical_or": _truth("or"),
    "bitwise_not": _truth("not"),
    "logical_not": _truth("not"),
    "bitwise_xor": _truth("ne"),
    "__xor__": _truth("ne"),
    "logical_xor": _truth("ne"),
    "masked_fill": _masked_fill,
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp_max,
    "relu": _relu,
    "to": _convert,
    "_to_copy": _convert,
    "type_as": _convert,
}
"""Operations of corresponding elements."""
