"""ONNX operators that read elements at computed places, or make tensors from positions."""

from __future__ import annotations

from attncompile.frontends import movement
from attncompile.frontends.graph import (
    Fill,
    IndexMap,
    Iota,
    Select,
)
from attncompile.frontends.onnx_builder import Builder, Row, Unstated, axis_of
from attncompile.frontends.onnx_known import known_tensor, scalar
from attncompile.ir import Kind, simplify
from attncompile.ir.expr import ZERO, Const

LARGEST_INDEX_LIST = 16
"""Constant positions of a ``Gather`` beyond which they are read from their tensor."""


def _gather(b: Builder) -> str:
    data, index = b.tensor(), b.tensor(1)
    shape, chosen = b.shape(data), b.shape(index)
    axis = axis_of(b.attribute("axis", 0), len(shape))
    target = (*shape[:axis], *chosen, *shape[axis + 1 :])
    known = b.known.get(index)
    if known is not None and known.rank == 0 and known.items[0].kind is Kind.INT:
        position = known.items[0]
        if isinstance(position, Const) and position.value < 0:
            position = simplify(shape[axis] + position)
        return b.move(data, movement.select(axis, position), "select", target)
    numbers = known.integers() if known is not None and known.rank == 1 else None
    if numbers and len(numbers) <= LARGEST_INDEX_LIST and min(numbers) >= 0:
        step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
        if all(n == numbers[0] + step * place for place, n in enumerate(numbers)):
            return b.move(data, movement.slices(axis, Const(numbers[0]), step), "slice", target)
    rank = len(chosen)
    positions = tuple(
        (index, _part(axis, axis + rank)) if a == axis else (None, _part(a if a < axis else a + rank - 1))
        for a in range(len(shape))
    )
    return b.emit(lambda name: Select(name, data, positions), target, b.dtype(data))


def _part(first: int, last: int | None = None) -> IndexMap:
    """Some of the indices."""
    return lambda indices: indices[first : first + 1 if last is None else last]


def _gather_elements(b: Builder) -> str:
    data, index = b.tensor(), b.tensor(1)
    axis = axis_of(b.attribute("axis", 0), len(b.shape(data)))
    positions = tuple((index, movement.identity) if a == axis else (None, _part(a)) for a in range(len(b.shape(data))))
    return b.emit(lambda name: Select(name, data, positions), b.shape(index), b.dtype(data))


def _gather_nd(b: Builder) -> str:
    """``data[indices[…, 0], indices[…, 1], …]`` behind ``batch_dims`` common axes."""
    data, index = b.tensor(), b.tensor(1)
    shape, chosen = b.shape(data), b.shape(index)
    batch = b.attribute("batch_dims", 0)
    if not isinstance(chosen[-1], Const):
        raise Unstated
    depth, outer = int(chosen[-1].value), len(chosen) - 1

    def from_tensor(place: int) -> IndexMap:
        return lambda indices: (*indices[:outer], Const(place))

    positions: list[tuple[str | None, IndexMap]] = []
    for axis in range(len(shape)):
        if axis < batch:
            positions.append((None, _part(axis)))
        elif axis < batch + depth:
            positions.append((index, from_tensor(axis - batch)))
        else:
            positions.append((None, _part(outer + axis - batch - depth)))
    target = (*chosen[:-1], *shape[batch + depth :])
    return b.emit(lambda name: Select(name, data, tuple(positions)), target, b.dtype(data))


def _range(b: Builder) -> str:
    start, limit, step = (b.scalar(number) for number in range(3))
    if (
        any(expr.kind is not Kind.INT for expr in (start, limit, step))
        or not isinstance(step, Const)
        or step.value == 0
    ):
        raise Unstated
    span = limit - start if step.value > 0 else start - limit
    length = simplify((span + (abs(int(step.value)) - 1)) // abs(int(step.value)))
    made = b.emit(lambda name: Iota(name, start, step), (length,), "int64")
    return b.cast(made, b.dtype(b.tensor())) if b.dtype(b.tensor()) != "int64" else made


def _constant_of_shape(b: Builder) -> str:
    value = b.attribute("value")
    known = known_tensor(value) if value is not None else scalar(Const(0.0), "float32")
    if known is None:
        raise Unstated
    return b.emit(lambda name: Fill(name, known.items[0]), b.elements(0), known.dtype)


def _triangle(b: Builder) -> str:
    source = b.tensor()
    shape = b.shape(source)
    diagonal = b.tensor(1) if b.input(1) is not None else ZERO
    rows, columns = b.index_along(len(shape) - 2, shape), b.index_along(len(shape) - 1, shape)
    edge = b.pointwise("add", rows, diagonal)
    kept = b.pointwise("ge" if b.attribute("upper", 1) else "le", columns, edge, dtype="bool")
    zero = b.number(0, source)
    return b.pointwise("where", kept, source, zero, dtype=b.dtype(source))


SELECTION: dict[str, Row] = {
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Range": _range,
    "ConstantOfShape": _constant_of_shape,
    "Trilu": _triangle,
}
"""Their rows; :mod:`attncompile.frontends.onnx_rows` has all."""
