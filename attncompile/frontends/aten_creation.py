"""ATen operations whose elements depend on their position alone: constants, ranges, triangles."""

from __future__ import annotations

from typing import Any

from attncompile.frontends import movement
from attncompile.frontends.aten_builder import Builder, Row, Unstated, as_dtype
from attncompile.frontends.graph import Cast, Fill, Info, Iota
from attncompile.ir import Expr, Kind
from attncompile.ir.expr import ONE, ZERO, Const


def _fill(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    name = str(b.node.target)
    if "full" in name:
        value = b.number(args[-1] if "full_like" not in name else args[1])
    elif "scalar_tensor" in name:
        value = b.number(args[0])
    else:
        value = Const(1 if "ones" in name else 0)
    return b.emit(Fill(b.name(), as_dtype(value, b.out.dtype)), b.out)


def _arange(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    numbers = [b.number(a) for a in args]
    start: Expr = ZERO
    step: Expr = ONE
    if len(numbers) >= 2:
        start = numbers[0]
    if len(numbers) >= 3:
        step = numbers[2]
    if start.kind is not Kind.INT or step.kind is not Kind.INT:
        return _steps(b, start, step)
    made = b.emit(Iota(b.name(), start, step), Info(b.out.shape, "int64"))
    return made if b.out.dtype == "int64" else b.emit(Cast(b.name(), made, b.out.dtype), b.out)


def _steps(b: Builder, start: Expr, step: Expr) -> str:
    """``start + step · n`` in real numbers."""
    place = b.index_along(0, b.out.shape)
    return b.pointwise("add", start, b.pointwise("mul", step, place))


def _linspace(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    start, end, count = b.number(args[0]), b.number(args[1]), b.out.shape[0]
    if not b.out.dtype.startswith(("float", "bfloat")):
        raise Unstated
    if not all(isinstance(number, Const) for number in (start, end, count)):
        raise Unstated
    first, last, steps = (float(number.value) for number in (start, end, count) if isinstance(number, Const))
    return _steps(b, Const(first), Const((last - first) / max(steps - 1, 1)))


def _eye(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    shape = b.out.shape
    equal = b.pointwise("eq", b.index_along(0, shape), b.index_along(1, shape), dtype="bool")
    return b.emit(Cast(b.name(), equal, b.out.dtype), b.out)


def _triangle(keep_lower: bool) -> Row:
    def row(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
        source = b.tensor(args[0])
        diagonal = b.number(kwargs.get("diagonal", args[1] if len(args) > 1 else 0))
        shape = b.shape(source)
        rows, columns = b.index_along(len(shape) - 2, shape), b.index_along(len(shape) - 1, shape)
        edge = b.pointwise("add", rows, diagonal, dtype="int64")
        kept = b.pointwise("le" if keep_lower else "ge", columns, edge, dtype="bool")
        zero = Const(False) if b.out.dtype == "bool" else Const(0) if b.out.dtype.startswith("int") else Const(0.0)
        return b.pointwise("where", kept, source, zero)

    return row


def _replaced(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    """``x.copy_(y)`` and ``x.fill_(c)``: what ``x`` held is of no interest."""
    value = b.operand(args[1])
    if isinstance(value, Expr):
        return b.emit(Fill(b.name(), as_dtype(value, b.out.dtype)), b.out)
    if b.info(value).dtype != b.out.dtype:
        value = b.emit(Cast(b.name(), value, b.out.dtype), Info(b.shape(value), b.out.dtype))
    return b.move(value, movement.broadcast(b.shape(value), b.out.shape), "copy", b.out.shape)


def _zeroed(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    return b.emit(Fill(b.name(), as_dtype(ZERO, b.out.dtype)), b.out)


CREATION: dict[str, Row] = {
    "zeros": _fill,
    "ones": _fill,
    "full": _fill,
    "new_zeros": _fill,
    "new_ones": _fill,
    "new_full": _fill,
    "zeros_like": _fill,
    "ones_like": _fill,
    "full_like": _fill,
    "scalar_tensor": _fill,
    "fill": _replaced,
    "zero": _zeroed,
    "copy": _replaced,
    "arange": _arange,
    "linspace": _linspace,
    "eye": _eye,
    "tril": _triangle(True),
    "triu": _triangle(False),
}
"""Operations whose elements depend on their position, or replace what was there."""
