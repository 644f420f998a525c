"""Elements of small tensors of an ONNX graph, as expressions.

Exported graphs compute their shapes: ``Shape → Gather → Unsqueeze → Concat → Reshape``, and their pads as tables of two
columns that are flipped and transposed. Every such small value is known here as expressions over the symbolic
sizes, so that a reshape in a model with dynamic axes has an index map like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from attncompile.frontends.graph import (
    Indices,
)
from attncompile.frontends.onnx_sizes import nonnegative
from attncompile.ir import Expr, Kind, simplify
from attncompile.ir.expr import ONE, ZERO, Const, apply
from attncompile.ir.operators import OPERATORS
from attncompile.ir.types import element_kind

LONGEST = 64
"""Elements beyond which a tensor is data, not a shape."""

# fmt: off
DTYPE_NAMES: dict[ir.DataType, str] = {
    ir.DataType.DOUBLE: "float64", ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16", ir.DataType.FLOAT8E4M3FN: "float8_e4m3", ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32", ir.DataType.INT8: "int8", ir.DataType.UINT8: "uint8",
    ir.DataType.BOOL: "bool",
}
# fmt: on
"""ONNX element types that a Spec can name."""


def dtype_name(dtype: ir.DataType) -> str:
    """The dtype's name in a Spec; of a type that a Spec cannot name (int16, 4 bits, strings) one of its kind."""
    return DTYPE_NAMES.get(dtype, "int64" if dtype.is_integer() else "float32")


@dataclass(frozen=True)
class Known:
    """The elements of a tensor.

    Attributes:
        dims: its shape; empty for one item.
        items: its elements, the last axis fastest.
        dtype: its dtype, a key of :data:`attncompile.ir.types.DTYPES`.
    """

    dims: tuple[int, ...]
    items: tuple[Expr, ...]
    dtype: str = "int64"

    @classmethod
    def of(cls, array: np.ndarray[Any, Any], dtype: str) -> Known | None:
        """The elements of an array of expressions, unless they are too many."""
        if array.size > LONGEST:
            return None
        return cls(array.shape, tuple(array.reshape(-1)), dtype)

    @property
    def array(self) -> np.ndarray[Any, Any]:
        """The elements as an array of expressions."""
        found = np.empty(len(self.items), dtype=object)
        found[:] = self.items
        return found.reshape(self.dims)

    @property
    def rank(self) -> int:
        """How many axes it has."""
        return len(self.dims)

    @property
    def shape(self) -> Indices:
        """Its shape."""
        return tuple(Const(size) for size in self.dims)

    def cast(self, dtype: str) -> Known:
        """The elements in another dtype."""
        return Known(self.dims, tuple(as_kind(item, element_kind(dtype)) for item in self.items), dtype)

    def integers(self) -> tuple[int, ...] | None:
        """The elements as numbers, or ``None`` when one is symbolic or no integer."""
        found = [item.value for item in self.items if isinstance(item, Const) and item.kind is Kind.INT]
        return tuple(int(value) for value in found) if len(found) == len(self.items) else None


def scalar(item: Expr, dtype: str = "int64") -> Known:
    """One element without axes."""
    return Known((), (item,), dtype)


def vector(items: Sequence[Expr], dtype: str = "int64") -> Known:
    """Elements along one axis."""
    return Known((len(items),), tuple(items), dtype)


# Each rule takes the known inputs of a node (None for one that is unknown or absent) and its attributes, and
# gives the known output, or None. A rule may raise ValueError or IndexError for a malformed node.

Attributes = Mapping[str, object]
Inputs = Sequence[Known | None]
Rule = Callable[[Inputs, Attributes], "Known | None"]


def typed(operator: str, *values: Expr) -> Expr | None:
    """The operator on elements, or ``None`` where the language has no such operation on their kinds."""
    if operator == "div" and all(value.kind is Kind.INT for value in values):
        # ONNX truncates toward zero, which is the floor where nothing is negative or nothing is left over
        exact = simplify(apply("mod", *values)) == ZERO
        if not exact and not (nonnegative(values[0]) and nonnegative(values[1] - 1)):
            return None
        operator = "floordiv"
    row = OPERATORS[operator]
    return simplify(apply(operator, *values)) if row.result([value.kind for value in values]) is not None else None


def elementwise(operator: str, truth: bool = False) -> Rule:
    """A pointwise operation on known operands, broadcast."""

    def rule(inputs: Inputs, attributes: Attributes) -> Known | None:
        operands = [operand for operand in inputs if operand is not None]
        if len(operands) < len(inputs) or not operands:
            return None
        columns = np.broadcast_arrays(*(operand.array for operand in operands))
        if columns[0].size > LONGEST:
            return None
        rows = zip(*(column.reshape(-1) for column in columns), strict=True)
        items = [typed(operator, *elements) for elements in rows]
        found = tuple(item for item in items if item is not None)
        dtype = "bool" if truth else operands[1 if operator == "where" else 0].dtype
        return Known(columns[0].shape, found, dtype) if len(found) == len(items) else None

    return rule


def _integers(inputs: Inputs, number: int, attributes: Attributes, name: str) -> tuple[int, ...] | None:
    """Integers that older operator sets take as an attribute, and newer ones as an input; ``None`` where unknown."""
    written = attributes.get(name)
    if isinstance(written, Sequence):
        return tuple(written)
    given = inputs[number] if number < len(inputs) else None
    return given.integers() if given is not None else None


def _axes(inputs: Inputs, number: int, attributes: Attributes) -> tuple[int, ...] | None:
    """The axes that a node names; empty where it names none, ``None`` where they are not known."""
    if len(inputs) <= number and "axes" not in attributes:
        return ()
    return _integers(inputs, number, attributes, "axes")


def _integer(attributes: Attributes, name: str, default: int) -> int:
    value = attributes.get(name, default)
    return value if isinstance(value, int) else default


def _gather(inputs: Inputs, attributes: Attributes) -> Known | None:
    data, positions = inputs[:2]
    numbers = positions.integers() if positions is not None else None
    if data is None or positions is None or numbers is None or not data.rank:
        return None
    taken = np.array(numbers, dtype=int).reshape(positions.dims)
    found = np.take(data.array, taken, _integer(attributes, "axis", 0))
    return Known.of(np.asarray(found, dtype=object), data.dtype)


def _concatenate(inputs: Inputs, attributes: Attributes) -> Known | None:
    parts = [part for part in inputs if part is not None and part.rank]
    if len(parts) < len(inputs):
        return None
    return Known.of(np.concatenate([part.array for part in parts], _integer(attributes, "axis", 0)), parts[0].dtype)


def _slice(inputs: Inputs, attributes: Attributes) -> Known | None:
    data = inputs[0]
    starts, ends = _integers(inputs, 1, attributes, "starts"), _integers(inputs, 2, attributes, "ends")
    axes, steps = _axes(inputs, 3, attributes), _integers(inputs, 4, {}, "") if len(inputs) > 4 else ()
    if data is None or not data.rank or starts is None or ends is None or axes is None or steps is None:
        return None
    taken = [slice(None)] * data.rank
    for axis, start, end, step in zip(
        axes or range(len(starts)), starts, ends, steps or [1] * len(starts), strict=True
    ):
        # Python would count an end far before the first element from the other side
        stop = None if step < 0 and end < -data.dims[axis] else end
        taken[axis] = slice(start, stop, step)
    return Known.of(data.array[tuple(taken)], data.dtype)


def _unsqueezed(inputs: Inputs, attributes: Attributes) -> Known | None:
    data, axes = inputs[0], _axes(inputs, 1, attributes)
    return Known.of(np.expand_dims(data.array, axes), data.dtype) if data is not None and axes else None


def _squeezed(inputs: Inputs, attributes: Attributes) -> Known | None:
    data, axes = inputs[0], _axes(inputs, 1, attributes)
    if data is None or axes is None:
        return None
    return Known.of(np.squeeze(data.array, axes or None), data.dtype)


def _reshaped(inputs: Inputs, attributes: Attributes) -> Known | None:
    data, target = inputs[0], _integers(inputs, 1, attributes, "shape")
    if data is None or target is None:
        return None
    kept = [data.dims[n] if size == 0 and not attributes.get("allowzero") else size for n, size in enumerate(target)]
    return Known.of(data.array.reshape(kept), data.dtype)


def _flattened(inputs: Inputs, attributes: Attributes) -> Known | None:
    data, axis = inputs[0], _integer(attributes, "axis", 1)
    if data is None:
        return None
    axis = axis + data.rank if axis < 0 else axis
    return Known.of(data.array.reshape(math.prod(data.dims[:axis]), -1), data.dtype)


def _transposed(inputs: Inputs, attributes: Attributes) -> Known | None:
    data = inputs[0]
    if data is None:
        return None
    order = attributes.get("perm")
    return Known.of(np.transpose(data.array, order if isinstance(order, Sequence) else None), data.dtype)


def _same(inputs: Inputs, attributes: Attributes) -> Known | None:
    return inputs[0]


def _filled(inputs: Inputs, attributes: Attributes) -> Known | None:
    shape = inputs[0].integers() if inputs[0] is not None else None
    if shape is None or math.prod(shape) > LONGEST:
        return None
    value = attributes.get("value")
    tensor = known_tensor(value) if isinstance(value, ir.TensorProtocol) else vector([Const(0.0)], "float32")
    return tensor and Known(shape, tensor.items * math.prod(shape), tensor.dtype)


def _expanded(inputs: Inputs, attributes: Attributes) -> Known | None:
    data, shape = inputs[0], inputs[1].integers() if inputs[1] is not None else None
    if data is None or shape is None:
        return None
    sizes = np.broadcast_shapes(data.dims, shape)
    return Known.of(np.broadcast_to(data.array, sizes), data.dtype) if math.prod(sizes) <= LONGEST else None


def _range(inputs: Inputs, attributes: Attributes) -> Known | None:
    numbers = [operand.integers() if operand is not None else None for operand in inputs]
    if any(number is None for number in numbers) or inputs[0] is None:
        return None
    values = range(*(number[0] for number in numbers if number is not None))
    return vector([Const(n) for n in values], inputs[0].dtype) if len(values) <= LONGEST else None


def _one_hot(inputs: Inputs, attributes: Attributes) -> Known | None:
    chosen, depth, values = inputs[0], inputs[1], inputs[2]
    numbers = chosen.integers() if chosen is not None else None
    count = depth.integers() if depth is not None else None
    if chosen is None or numbers is None or count is None or values is None or len(numbers) * count[0] > LONGEST:
        return None
    off, on = values.items
    places = [n % count[0] if -count[0] <= n < count[0] else -1 for n in numbers]
    items = [on if place == here else off for place in places for here in range(count[0])]
    array = Known((*chosen.dims, count[0]), tuple(items), values.dtype).array
    axis = _integer(attributes, "axis", -1)
    return Known.of(np.moveaxis(array, -1, axis), values.dtype)


def _reduced(operator: str, start: Expr | None) -> Rule:
    def rule(inputs: Inputs, attributes: Attributes) -> Known | None:
        data, axes = inputs[0], _axes(inputs, 1, attributes)
        if data is None or axes is None or not data.items:
            return None
        if not axes and attributes.get("noop_with_empty_axes"):
            return data
        summed = {axis % max(data.rank, 1) for axis in axes} or set(range(data.rank))
        kept = [axis for axis in range(data.rank) if axis not in summed]
        rows = data.array.transpose([*kept, *sorted(summed & set(range(data.rank)))])
        flat = rows.reshape(math.prod(data.dims[n] for n in kept), -1)
        first = [start] if start is not None else []
        items = tuple(simplify(apply(operator, *row, *first)) for row in flat)
        sizes = [1 if n in summed else size for n, size in enumerate(data.dims)]
        dims = sizes if _integer(attributes, "keepdims", 1) else [data.dims[n] for n in kept]
        return Known(tuple(dims), items, data.dtype)

    return rule


def _cast(inputs: Inputs, attributes: Attributes) -> Known | None:
    target = attributes.get("to")
    dtype = DTYPE_NAMES.get(ir.DataType(target)) if isinstance(target, int) else None
    return inputs[0].cast(dtype) if inputs[0] is not None and dtype is not None else None


def _quantised(inputs: Inputs, attributes: Attributes) -> Known | None:
    """The code of one known number."""
    numbers, scale, zero = [*inputs, None][:3]
    if numbers is None or scale is None or zero is None or zero.dtype not in ("int8", "uint8"):
        return None
    items = [item for known in (numbers, scale, zero) for item in known.items]
    if len(items) > 3 or not all(isinstance(item, Const) for item in items):
        return None
    number, step, shift = (np.float32(item.value) for item in items if isinstance(item, Const))
    lowest = -128 if zero.dtype == "int8" else 0
    with np.errstate(all="ignore"):  # more than float32 holds is the last code too
        code = np.clip(np.rint(number / step) + shift, lowest, lowest + 255)
    return Known(numbers.dims, (Const(int(code)),), zero.dtype)


def _dequantised(inputs: Inputs, attributes: Attributes) -> Known | None:
    """The number that one known code stands for."""
    codes, scale, zero = [*inputs, None][:3]
    if codes is None or scale is None or (zero is None and len(inputs) > 2):
        return None
    zeros = zero if zero is not None else Known((), (ZERO,))
    if not len(codes.items) == len(scale.items) == len(zeros.items) == 1:
        return None
    (code,), (step,), (shift,) = codes.cast("int64").items, scale.items, zeros.cast("int64").items
    return Known(codes.dims, (simplify(as_kind(code - shift, Kind.FLOAT) * step),), scale.dtype)


def _modulo(inputs: Inputs, attributes: Attributes) -> Known | None:
    return None if attributes.get("fmod", 0) else elementwise("mod")(inputs, attributes)


def as_kind(item: Expr, kind: Kind) -> Expr:
    """An element in another kind, as casts of tensors do it."""
    if item.kind is kind:
        return item
    if kind is Kind.BOOL:
        return simplify(apply("ne", item, ZERO if item.kind is Kind.INT else Const(0.0)))
    return simplify(apply("float" if kind is Kind.FLOAT else "int", item))


# fmt: off
RULES: dict[str, Rule] = {
    **{name: elementwise(operator) for name, operator in {
        "Add": "add", "Mul": "mul", "Div": "div", "Min": "min", "Max": "max", "Abs": "abs", "Sqrt": "sqrt",
        "Floor": "floor", "Ceil": "ceil", "Pow": "pow", "Where": "where", "Sum": "add"}.items()},
    **{name: elementwise(operator, True) for name, operator in {
        "Equal": "eq", "Less": "lt", "LessOrEqual": "le", "Greater": "gt", "GreaterOrEqual": "ge",
        "And": "and",
        "Or": "or", "Xor": "ne", "Not": "not"}.items()},
    "Gather": _gather, "Concat": _concatenate, "Slice": _slice, "Unsqueeze": _unsqueezed,
    "Squeeze": _squeezed, "Reshape": _reshaped, "Flatten": _flattened, "Transpose": _transposed,
    "Identity": _same, "Cast": _cast, "DequantizeLinear": _dequantised,
    "QuantizeLinear": _quantised, "OneHot": _one_hot,
    "ConstantOfShape": _filled, "Expand": _expanded, "Range": _range, "Mod": _modulo,
    "ReduceProd": _reduced("mul", ONE),
    "ReduceSum": _reduced("add", ZERO), "ReduceMax": _reduced("max", None), "ReduceMin": _reduced("min",
    None),
}
# fmt: on
"""ONNX operator to the elements of its result; subtraction, negation and shapes are in
:func:`known_value`."""


def known_value(operator: str, inputs: Inputs, attributes: Attributes) -> Known | None:
    """The elements that a node gives, where they are known."""
    try:
        if operator == "Sub" and len(inputs) == 2:
            negative = RULES["Mul"]([scalar(Const(-1)), inputs[1]], {})
            return RULES["Add"]([inputs[0], negative], {})
        if operator == "Neg":
            found = RULES["Mul"]([scalar(Const(-1)), *inputs], {})
            return found and inputs[0] and Known(found.dims, found.items, inputs[0].dtype)
        rule = RULES.get(operator)
        return rule(inputs, attributes) if rule is not None and inputs else None
    except (ValueError, IndexError, TypeError):
        return None  # a malformed node gives nothing that is known


def known_tensor(tensor: ir.TensorProtocol) -> Known | None:
    """The elements of a small constant; of one with several axes only where they are integers, such as pads."""
    dtype = DTYPE_NAMES.get(tensor.dtype)
    if dtype is None or tensor.size > LONGEST:
        return None
    if len(tensor.shape) > 1 and element_kind(dtype) is Kind.FLOAT:
        return None
    kind = {Kind.BOOL: bool, Kind.INT: int, Kind.FLOAT: float}[element_kind(dtype)]
    items = tuple(Const(kind(n)) for n in tensor.numpy().reshape(-1))
    return Known(tuple(int(size) for size in tensor.shape.numpy()), items, dtype)


def known_shape(shape: Indices, start: int = 0, end: int | None = None) -> Known:
    """What ``Shape`` gives."""
    return vector(tuple(shape)[slice(start, end)])
