"""ONNX operators that move elements, or put tensors beside each other."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from attncompile.frontends import movement
from attncompile.frontends.graph import (
    Concatenate,
    Fill,
    Indices,
)
from attncompile.frontends.onnx_builder import Builder, Row, Unstated, axis_of
from attncompile.frontends.onnx_sizes import (
    broadcast_shapes,
    nonnegative,
    product,
    quotient,
    slice_range,
)
from attncompile.ir import Expr, simplify
from attncompile.ir.expr import ONE, ZERO, Apply, Const, apply, walk


def _identity(b: Builder) -> str:
    return b.same(b.tensor())


def _transpose(b: Builder) -> str:
    source = b.tensor()
    order = b.attribute("perm") or list(reversed(range(len(b.shape(source)))))
    shape = tuple(b.shape(source)[axis] for axis in order)
    return b.move(source, movement.permute(order), "permute", shape)


def _reshape(b: Builder) -> str:
    source = b.tensor()
    shape = b.shape(source)
    written = b.attribute("shape")
    asked = [Const(n) for n in written] if written is not None else list(b.elements(1))
    target: list[Expr] = []
    for axis, size in enumerate(asked):
        if size == ZERO and not b.attribute("allowzero", 0):
            if axis >= len(shape):
                raise Unstated
            size = shape[axis]
        target.append(size)
    if Const(-1) in target:
        place = target.index(Const(-1))
        target[place] = quotient(shape, [size for axis, size in enumerate(target) if axis != place])
    return b.reshape(source, tuple(simplify(size) for size in target))


def _flatten(b: Builder) -> str:
    source = b.tensor()
    shape, axis = b.shape(source), b.attribute("axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    return b.reshape(source, (product(shape[:axis]), product(shape[axis:])))


def _squeeze(b: Builder) -> str:
    source = b.tensor()
    shape = b.shape(source)
    asked = b.listed("axes", 1)
    if asked is None:
        axes = [axis for axis, size in enumerate(shape) if size == ONE]
        if any(not isinstance(size, Const) for size in shape):
            raise Unstated  # whether a symbolic axis goes is only known when the model runs
    else:
        axes = [axis_of(axis, len(shape)) for axis in asked]
    kept = tuple(size for axis, size in enumerate(shape) if axis not in axes)
    return b.move(source, movement.squeeze(axes), "squeeze", kept)


def _unsqueeze(b: Builder) -> str:
    source = b.tensor()
    asked = b.listed("axes", 1)
    if asked is None:
        raise Unstated
    rank = len(b.shape(source)) + len(asked)
    axes = {axis_of(axis, rank) for axis in asked}
    sizes = iter(b.shape(source))
    shape = tuple(ONE if axis in axes else next(sizes) for axis in range(rank))
    return b.move(source, movement.unsqueeze(sorted(axes)), "unsqueeze", shape)


def _expand(b: Builder) -> str:
    source = b.tensor()
    shape = broadcast_shapes([b.shape(source), b.elements(1)], b.sizes)
    return b.move(source, movement.broadcast(b.shape(source), shape), "expand", shape)


def _tile(b: Builder) -> str:
    source = b.tensor()
    shape = b.shape(source)
    repeats = b.elements(1)

    def index_map(indices: Indices) -> Indices:
        return tuple(
            index if times == ONE else ZERO if size == ONE else apply("mod", index, size)
            for index, times, size in zip(indices, repeats, shape, strict=True)
        )

    target = tuple(simplify(size * times) for size, times in zip(shape, repeats, strict=True))
    return b.move(source, index_map, "repeat", target)


def _slice(b: Builder) -> str:
    source = b.tensor()
    shape = list(b.shape(source))
    starts: Sequence[Expr]
    ends: Sequence[Expr]
    if b.opset < 10:
        starts, ends = (tuple(Const(n) for n in b.attribute(name)) for name in ("starts", "ends"))
        axes, steps = b.attribute("axes"), None
    else:
        starts, ends = b.elements(1), b.elements(2)
        axes = b.integers(3) if b.input(3) is not None else None
        steps = b.integers(4) if b.input(4) is not None else None
    value = source
    for number, axis in enumerate(axes if axes is not None else range(len(starts))):
        axis = axis_of(axis, len(shape))
        step = steps[number] if steps is not None else 1
        first, shape[axis] = slice_range(shape[axis], starts[number], ends[number], step)
        shape[axis] = _unclamped(b, axis, shape[axis])
        value = b.move(value, movement.slices(axis, first, step), "slice", tuple(shape))
    return value


def _unclamped(b: Builder, axis: int, length: Expr) -> Expr:
    """The length of a slice of which it is not proven that its ends lie in the axis, as the model declares it.

    ``max(min(total − length, capacity), 0)`` is ``total − length`` in a model that says so. A false word of it does not
    pass the proof of a site that rests on it: the region's own shapes are those of its nodes.
    """
    clamped = any(isinstance(part, Apply) and part.operator in ("min", "max") for part in walk(length))
    declared = b.node.outputs[b.position].shape if clamped else None
    dim = declared[axis] if declared is not None and axis < len(declared) else None
    text = dim.value if isinstance(dim, ir.SymbolicDim) else None
    found = b.sizes.stated(text) if text else None
    return length if found is None else found


def _split(b: Builder) -> str:
    source = b.tensor()
    shape = b.shape(source)
    axis = axis_of(b.attribute("axis", 0), len(shape))
    parts: tuple[Expr, ...]
    written = b.attribute("split")
    if written is not None:
        parts = tuple(Const(n) for n in written)
    elif b.input(1) is not None:
        parts = b.elements(1)
    else:
        count = b.attribute("num_outputs", len(b.node.outputs))
        part = simplify((shape[axis] + (count - 1)) // count)
        parts = (*[part] * (count - 1), simplify(shape[axis] - part * (count - 1)))
    start = simplify(apply("add", ZERO, *parts[: b.position]))
    target = (*shape[:axis], parts[b.position], *shape[axis + 1 :])
    return b.move(source, movement.slices(axis, start, 1), "slice", target)


def _concatenate(b: Builder) -> str:
    parts = b.tensors()
    shapes = [b.shape(part) for part in parts]
    axis = axis_of(b.attribute("axis", 1), len(shapes[0]))
    if any(len(shape) != len(shapes[0]) for shape in shapes):
        raise Unstated
    target: list[Expr] = []
    for n in range(len(shapes[0])):
        if n == axis:
            target.append(simplify(apply("add", *(shape[n] for shape in shapes), ZERO)))
        else:
            for shape in shapes[1:]:
                b.sizes.prove_equal(shapes[0][n], shape[n])
            target.append(next((shape[n] for shape in shapes if isinstance(shape[n], Const)), shapes[0][n]))
    return b.emit(lambda name: Concatenate(name, tuple(parts), axis), tuple(target), b.dtype(parts[0]))


def _pad(b: Builder) -> str:
    """Padding with a constant, axis by axis."""
    value = b.tensor()
    shape = list(b.shape(value))
    amounts = [Const(n) for n in b.attribute("pads")] if b.opset < 11 else list(b.elements(1))
    axes = b.integers(3) if b.opset >= 18 and b.input(3) is not None else tuple(range(len(shape)))
    filler: Expr = b.number(b.attribute("value", 0.0), value)
    if b.opset >= 11 and b.input(2) is not None:
        filler = b.scalar(2)
    if any(amount != ZERO for amount in amounts) and b.attribute("mode", "constant") != "constant":
        raise Unstated
    for axis, before, after in zip(axes, amounts[: len(axes)], amounts[len(axes) :], strict=True):
        axis = axis_of(axis, len(shape))
        parts = [value]
        for place, amount in ((0, before), (1, after)):
            if amount == ZERO:
                continue
            if not nonnegative(amount):
                raise Unstated  # a negative amount cuts
            edge = (*shape[:axis], amount, *shape[axis + 1 :])
            parts.insert(place * len(parts), b.emit(lambda name: Fill(name, filler), edge, b.dtype(value)))
        if len(parts) > 1:
            shape[axis] = simplify(shape[axis] + before + after)
            value = b.emit(
                lambda name, joined=tuple(parts), along=axis: Concatenate(name, joined, along),  # type: ignore[misc]
                tuple(shape),
                b.dtype(value),
            )
    return value


# fmt: off
MOVEMENT: dict[str, Row] = {
    "Identity": _identity, "Transpose": _transpose, "Reshape": _reshape, "Flatten": _flatten, "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze, "Expand": _expand, "Tile": _tile, "Slice": _slice, "Split": _split,
    "Concat": _concatenate, "Pad": _pad,
}
# fmt: on
"""Their rows; :mod:`attncompile.frontends.onnx_rows` has all."""
