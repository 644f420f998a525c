"""What each ONNX operator does to elements: one row per operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import onnx_ir as ir

from attncompile.frontends import movement
from attncompile.frontends.graph import (
    Concatenate,
    Fill,
    IndexMap,
    Indices,
    Iota,
    Linear,
    Pointwise,
    Reduce,
    Select,
    Softmax,
)
from attncompile.frontends.onnx_attention import CALLS, CONTRIB_CALLS
from attncompile.frontends.onnx_builder import Builder, Row, Unstated, axis_of
from attncompile.frontends.onnx_known import DTYPE_NAMES, known_tensor, scalar
from attncompile.frontends.onnx_sizes import (
    broadcast_shapes,
    nonnegative,
    product,
    quotient,
    slice_range,
)
from attncompile.ir import Expr, Kind, simplify
from attncompile.ir.expr import ONE, ZERO, Const, apply
from attncompile.ir.types import element_kind

LARGEST_INDEX_LIST = 16
"""Constant positions of a ``Gather`` beyond which they are read from their tensor."""


def _is_float(b: Builder, value: str) -> bool:
    return element_kind(b.dtype(value)) is Kind.FLOAT


# Pointwise


def _plain(operator: str, dtype: str | None = None) -> Row:
    """A pointwise operator whose inputs are its operands."""

    def row(b: Builder) -> str:
        return b.pointwise(operator, *b.tensors(), dtype=dtype)

    return row


def _real(operator: str) -> Row:
    """An operator that the language has for real numbers only."""

    def row(b: Builder) -> str:
        if not _is_float(b, b.tensor()):
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
    if _is_float(b, left):
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
    if _is_float(b, left) or b.attribute("fmod", 0):
        raise Unstated
    return b.pointwise("mod", left, right)


def _negate(b: Builder) -> str:
    return b.pointwise("mul", b.number(-1, b.tensor()), b.tensor())


def _reciprocal(b: Builder) -> str:
    return b.pointwise("div", Const(1.0), b.tensor())


def _power(b: Builder) -> str:
    base, exponent = b.tensors()
    if not _is_float(b, base):
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
    if not signs or not _is_float(b, value):
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


# Movements


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
        value = b.move(value, movement.slices(axis, first, step), "slice", tuple(shape))
    return value


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


# Gathers


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


# Tensors from nothing


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


# Products


def _labels(count: int, offset: int = 0) -> tuple[str, ...]:
    return tuple(f"batch{n + offset}" for n in range(count))


def _matmul_labels(
    left: Indices, right: Indices, swap_left: bool = False, swap_right: bool = False
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Labels of NumPy's ``matmul``, whose batch axes broadcast right-aligned and whose vectors lack an
    axis."""
    batch = max(len(left), len(right), 2) - 2
    rows = ("row", "inner") if len(left) > 1 else ("inner",)
    columns = ("inner", "column") if len(right) > 1 else ("inner",)
    if not left or not right or (swap_left and len(left) < 2) or (swap_right and len(right) < 2):
        raise Unstated
    outer_left = _labels(max(len(left) - 2, 0), batch - max(len(left) - 2, 0))
    outer_right = _labels(max(len(right) - 2, 0), batch - max(len(right) - 2, 0))
    return (
        (*outer_left, *(reversed(rows) if swap_left else rows)),
        (*outer_right, *(reversed(columns) if swap_right else columns)),
        (*_labels(batch), *(["row"] if len(left) > 1 else []), *(["column"] if len(right) > 1 else [])),
    )


def _linear(b: Builder, source: str, weight: str, bias: str | None, transposed: bool) -> str:
    """A product with a constant matrix."""
    inputs, outputs = b.shape(weight) if transposed else reversed(b.shape(weight))
    b.sizes.prove_equal(b.shape(source)[-1], inputs)
    return b.emit(
        lambda name: Linear(name, source, weight, bias, transposed),
        (*b.shape(source)[:-1], outputs),
        b.dtype(source),
    )


def _matmul(b: Builder) -> str:
    left, right = b.tensors()
    if right in b.constants and left not in b.constants and len(b.shape(right)) == 2 and len(b.shape(left)) > 1:
        return _linear(b, left, right, None, True)
    return b.contract(left, right, _matmul_labels(b.shape(left), b.shape(right)))


def _fused_matmul(b: Builder) -> str:
    """com.microsoft ``FusedMatMul``: ``alpha · A' @ B'`` with the last two axes of each swapped on demand."""
    left, right = b.tensor(0), b.tensor(1)
    if b.attribute("transBatchA", 0) or b.attribute("transBatchB", 0):
        raise Unstated
    labels = _matmul_labels(
        b.shape(left), b.shape(right), bool(b.attribute("transA", 0)), bool(b.attribute("transB", 0))
    )
    alpha = float(b.attribute("alpha", 1.0))
    made = b.contract(left, right, labels)
    return made if alpha == 1.0 else b.pointwise("mul", Const(alpha), made)


def _gemm(b: Builder) -> str:
    left, right, added = b.tensor(0), b.tensor(1), b.input(2)
    swapped = bool(b.attribute("transA", 0)), bool(b.attribute("transB", 0))
    alpha, beta = float(b.attribute("alpha", 1.0)), float(b.attribute("beta", 1.0))
    plain = right in b.constants and left not in b.constants and not swapped[0] and alpha == 1.0
    if plain and (added is None or (beta == 1.0 and added in b.constants and len(b.shape(added)) == 1)):
        return _linear(b, left, right, added, not swapped[1])
    made = b.contract(left, right, _matmul_labels(b.shape(left), b.shape(right), *swapped))
    if alpha != 1.0:
        made = b.pointwise("mul", Const(alpha), made)
    if added is None:
        return made
    return b.pointwise("add", made, b.tensor(2) if beta == 1.0 else b.pointwise("mul", Const(beta), b.tensor(2)))


def _einsum(b: Builder) -> str:
    equation = b.attribute("equation").replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    tensors = b.tensors()
    if len(tensors) != len(terms):
        raise Unstated
    plain = [_einsum_term(term, len(b.shape(tensor))) for term, tensor in zip(terms, tensors, strict=True)]
    batch = max((sum(label.startswith("batch") for label in labels) for labels in plain), default=0)
    if not arrow:
        single = sorted(c for c in set(inputs) - {",", "."} if inputs.count(c) == 1)
        result = (*_labels(batch), *single)
    else:
        result = _einsum_term(output, len(output.replace("...", "")) + batch)
    aligned = [
        tuple(
            f"batch{int(label[5:]) + batch - sum(n.startswith('batch') for n in labels)}"
            if label.startswith("batch")
            else label
            for label in labels
        )
        for labels in plain
    ]
    if any(len(set(labels)) != len(labels) for labels in (*aligned, result)):
        raise Unstated
    if len(tensors) == 1:
        if set(result) != set(aligned[0]):
            raise Unstated
        order = [aligned[0].index(label) for label in result]
        shape = tuple(b.shape(tensors[0])[axis] for axis in order)
        return b.move(tensors[0], movement.permute(order), "permute", shape)
    if len(tensors) != 2:
        raise Unstated
    return b.contract(tensors[0], tensors[1], (*aligned, result))


def _einsum_term(term: str, rank: int) -> tuple[str, ...]:
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after)
    if "." in before + after or hidden < 0 or (hidden and not dots):
        raise Unstated
    return (*before, *_labels(hidden), *after)


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
        if operator == "sum" and not _is_float(b, source):
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
    if len(axes) != 1 or not _is_float(b, source):
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


# fmt: off
_POINTWISE = {"Mul": "mul", "Sum": "add", "Min": "min", "Max": "max", "Abs": "abs"}
_REAL = {"Exp": "exp", "Log": "log", "Tanh": "tanh", "Sigmoid": "sigmoid", "Erf": "erf", "Sqrt": "sqrt",
"Sin": "sin",
         "Cos": "cos", "Floor": "floor", "Ceil": "ceil", "Round": "round"}
_TRUTH = {"Equal": "eq", "Less": "lt", "LessOrEqual": "le", "Greater": "gt", "GreaterOrEqual": "ge",
"And": "and",
          "Or": "or", "Xor": "ne", "Not": "not"}

ROWS: dict[str, Row] = {
    **{name: _plain(operator) for name, operator in _POINTWISE.items()},
    **{name: _real(operator) for name, operator in _REAL.items()},
    **{name: _plain(operator, "bool") for name, operator in _TRUTH.items()},
    "Add": _add, "Sub": _subtract, "Div": _divide, "Mod": _modulo, "Neg": _negate, "Reciprocal": _reciprocal,
    "Pow": _power,
    "Clip": _clip, "Relu": _relu, "Mean": _mean, "Where": _where, "IsNaN": _is_nan, "IsInf": _is_infinite,
    "Cast": _cast, "CastLike": _cast_like, "Identity": _identity, "Dropout": _dropout,
    "Transpose": _transpose,
    "Reshape": _reshape, "Flatten": _flatten, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze, "Expand": _expand,
    "Tile": _tile, "Slice": _slice, "Split": _split, "Concat": _concatenate, "Pad": _pad, "Gather": _gather,
    "GatherElements": _gather_elements, "GatherND": _gather_nd, "Range": _range,
    "ConstantOfShape": _constant_of_shape,
    "Trilu": _triangle, "MatMul": _matmul, "Gemm": _gemm, "Einsum": _einsum, "Softmax": _softmax,
    "LogSoftmax": _log_softmax, "ReduceSum": _reduce("sum"), "ReduceMax": _reduce("max"),
    "ReduceLogSumExp": _log_sum_exp, **CALLS,
}
# fmt: on
"""Operators of the standard set."""
CONTRIB_ROWS: dict[str, Row] = {"FusedMatMul": _fused_matmul, "Trilu": _triangle, **CONTRIB_CALLS}
"""Operators of ONNX Runtime's own set (com.microsoft)."""

EVERY_OUTPUT = frozenset({"Split", "Dropout"})
"""Operators whose rows state every output; of the others only the first is stated."""


def rows_of(domain: str) -> Mapping[str, Row]:
    """The table of an operator set."""
    return {"": ROWS, "ai.onnx": ROWS, "com.microsoft": CONTRIB_ROWS}.get(domain, {})


# Shapes of what stays opaque

# fmt: off
SAME_SHAPE = frozenset({
    "LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization", "RMSNormalization", "GroupNormalization",
    "InstanceNormalization", "BatchNormalization", "LpNormalization", "MeanVarianceNormalization",
    "Gelu", "FastGelu", "BiasGelu", "QuickGelu", "Softplus", "Softsign", "Elu", "Selu", "Celu",
    "LeakyRelu", "PRelu", "HardSigmoid", "HardSwish", "Mish", "Swish", "ThresholdedRelu", "LogSoftmax",
    "Hardmax", "CumSum", "Sign", "Tan", "Sinh", "Cosh", "Asin", "Acos", "Atan", "ScatterND",
    "ScatterElements", "RotaryEmbedding", "Shrink", "BiasSoftmax",
})
# fmt: on
"""Operators whose first output has shape and dtype of the first input."""


def _quantized(b: Builder) -> tuple[Indices, str]:
    return b.shape(b.tensor()), b.dtype(b.tensor(2)) if b.input(2) is not None else "uint8"


def _dequantized(b: Builder) -> tuple[Indices, str]:
    return b.shape(b.tensor()), b.dtype(b.tensor(1))


def _dynamically_quantized(b: Builder) -> tuple[Indices, str]:
    return ((b.shape(b.tensor()), "uint8"), ((), "float32"), ((), "uint8"))[b.position]


def _integer_product(b: Builder) -> tuple[Indices, str]:
    left, right = b.shape(b.tensor(0)), b.shape(b.tensor(1))
    labels = _matmul_labels(left, right)
    sizes = {**dict(zip(labels[1], right, strict=True)), **dict(zip(labels[0], left, strict=True))}
    return tuple(sizes[label] for label in labels[2]), "int32"


def _reduction(b: Builder) -> tuple[Indices, str]:
    return reduced_shape(b), b.dtype(b.tensor())


# fmt: off
OPAQUE_SHAPES: dict[str, Callable[[Builder], tuple[Indices, str]]] = {
    "QuantizeLinear": _quantized, "DequantizeLinear": _dequantized,
    "DynamicQuantizeLinear": _dynamically_quantized,
    "MatMulInteger": _integer_product,
    **{f"Reduce{name}": _reduction for name in (
        "Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")},
}
# fmt: on
"""Shape and dtype of outputs that have no statement."""


def opaque_info(b: Builder) -> tuple[Indices, str]:
    """Shape and dtype of an output that stays opaque.

    Raises:
        Unstated: when no rule gives it.
    """
    if b.node.op_type in SAME_SHAPE and b.position == 0:
        return b.shape(b.tensor()), b.dtype(b.tensor())
    rule = OPAQUE_SHAPES.get(b.node.op_type)
    if rule is None:
        raise Unstated
    return rule(b)
