"""ONNX operators that run over axes: softmax, sums, maxima."""

from __future__ import annotations

from typing import Literal

from attncompile.frontends import movement
from attncompile.frontends.graph import (
    CumulativeSum,
    Indices,
    Pointwise,
    Reduce,
    Softmax,
)
from attncompile.frontends.onnx_builder import Builder, Row, Unstated, axis_of, is_float
from attncompile.frontends.onnx_sizes import (
    product,
)
from attncompile.ir.expr import ONE, Const


def _softmax(b: Builder) -> str:
    source = b.tensor()
    shape = b.shape(source)
    axis = axis_of(b.attribute("axis", -1 if b.opset >= 13 else 1), len(shape))
    dtype = b.dtype(source)
    if b.opset >= 13 or axis == len(shape) - 1:
        return b.emit(lambda name: Softmax(name, source, axis), shape, dtype)
    # before opset 13: over all axes from this one on, taken as one
    flat = b.reshape(source, (product(shape[:axis]), product(shape[axis:])))
    weights = b.emit(lambda name: Softmax(name, flat, 1), b.shape(flat), dtype)
    return b.reshape(weights, shape)


def _cumulative_sum(b: Builder) -> str:
    source, axes = b.tensor(), b.integers(1)
    if axes is None or len(axes) != 1:
        raise Unstated
    axis = axis_of(axes[0], len(b.shape(source)))
    exclusive, reverse = (bool(b.attribute(name, 0)) for name in ("exclusive", "reverse"))
    return b.emit(
        lambda name: CumulativeSum(name, source, axis, exclusive, reverse), b.shape(source), b.dtype(source)
    )


def _log_softmax(b: Builder) -> str:
    return b.pointwise("log", _softmax(b))


def reduced_axes(b: Builder) -> tuple[int, ...]:
    """The axes that a reduction runs over, in order."""
    rank = len(b.shape(b.tensor()))
    asked = b.listed("axes", 1)
    if not asked:
        return () if b.attribute("noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(sorted({axis_of(axis, rank) for axis in asked}))


def reduced_shape(b: Builder) -> Indices:
    """The shape that a reduction leaves."""
    shape, gone, keeps = b.shape(b.tensor()), reduced_axes(b), b.attribute("keepdims", 1)
    return tuple(ONE if axis in gone else size for axis, size in enumerate(shape) if keeps or axis not in gone)


def _reduce(operator: Literal["sum", "max"]) -> Row:
    """A sum or maximum over axes; the sum of a product of two tensors over one is their contraction."""

    def row(b: Builder) -> str:
        source, axes, keeps = b.tensor(), reduced_axes(b), bool(b.attribute("keepdims", 1))
        shape, target = b.shape(source), reduced_shape(b)
        if not axes:
            return b.same(source)
        if operator == "sum" and not is_float(b, source):
            raise Unstated
        factors = _factors(b, source) if operator == "sum" and len(axes) == 1 else None
        if factors is None:
            return b.emit(lambda name: Reduce(name, source, operator, axes, keeps), target, b.dtype(source))
        labels = tuple(f"axis{n}" for n in range(len(shape)))
        kept = tuple(label for axis, label in enumerate(labels) if axis not in axes)
        first, second = (labels[len(shape) - len(b.shape(factor)) :] for factor in factors)
        made = b.contract(*factors, (first, second, kept), broadcast=True)
        return b.move(made, movement.unsqueeze(axes), "unsqueeze", target) if keeps else made

    return row


def _log_sum_exp(b: Builder) -> str:
    """``max x + log Σ exp(x − max x)`` over one axis."""
    source, axes = b.tensor(), reduced_axes(b)
    if len(axes) != 1 or not is_float(b, source):
        raise Unstated
    shape, dtype = b.shape(source), b.dtype(source)
    row = (*shape[: axes[0]], ONE, *shape[axes[0] + 1 :])
    largest = b.emit(lambda name: Reduce(name, source, "max", axes, True), row, dtype)
    parts = b.pointwise("exp", b.pointwise("add", source, b.pointwise("mul", Const(-1.0), largest)))
    total = b.emit(lambda name: Reduce(name, parts, "sum", axes, True), row, dtype)
    found = b.pointwise("add", largest, b.pointwise("log", total))
    return found if b.attribute("keepdims", 1) else b.move(found, movement.squeeze(axes), "squeeze", reduced_shape(b))


def _factors(b: Builder, value: str) -> tuple[str, str] | None:
    """The two tensors whose outer product a value is: each lacks an axis, unlike scores and a mask of one head."""
    match b.producer.get(value):
        case Pointwise(_, "mul", (str(left), str(right))) if left != right:
            rank = len(b.shape(value))
            lacking = [len(b.shape(factor)) < rank or ONE in b.shape(factor) for factor in (left, right)]
            return (left, right) if all(lacking) else None
    return None


REDUCTION: dict[str, Row] = {
    "Softmax": _softmax,
    "LogSoftmax": _log_softmax,
    "ReduceSum": _reduce("sum"),
    "ReduceMax": _reduce("max"),
    "CumSum": _cumulative_sum,
    "ReduceLogSumExp": _log_sum_exp,
}
"""Their rows; :mod:`attncompile.frontends.onnx_rows` has all."""
