"""Elements of small tensors of an ONNX graph, as expressions.

Exported graphs compute their shapes: ``Shape → Gather → Unsqueeze → Concat → Reshape``. Every such value of
rank 0 or 1 is known here as a tuple of expressions over the symbolic sizes, so that a reshape in a model with
dynamic axes has an index map like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Known:
    """The elements of a tensor of rank 0 or 1.

    Attributes:
        rank: 0 (one item) or 1.
        items: its elements.
        dtype: its dtype, a key of :data:`attncompile.ir.types.DTYPES`.
    """

    rank: int
    items: tuple[Expr, ...]
    dtype: str = "int64"

    @property
    def shape(self) -> Indices:
        """Its shape."""
        return (Const(len(self.items)),) if self.rank else ()

    def cast(self, dtype: str) -> Known:
        """The elements in another dtype."""
        return Known(self.rank, tuple(as_kind(item, element_kind(dtype)) for item in self.items), dtype)

    def integers(self) -> tuple[int, ...] | None:
        """The elements as numbers, or ``None`` when one is symbolic or no integer."""
        found = [item.value for item in self.items if isinstance(item, Const) and item.kind is Kind.INT]
        return tuple(int(value) for value in found) if len(found) == len(self.items) else None


# Each rule takes the known inputs of a node (None for one that is unknown or absent) and its attributes, and
# gives the known output, or None.

Attributes = Mapping[str, object]
Rule = Callable[[Sequence[Known | None], Attributes], "Known | None"]


def typed(operator: str, *values: Expr) -> Expr | None:
    """The operator on elements, or ``None`` where the language has no such operation on their kinds."""
    if operator == "div" and all(value.kind is Kind.INT for value in values):
        # ONNX truncates toward zero, which is the floor where nothing is negative
        if not (nonnegative(values[0]) and nonnegative(values[1] - 1)):
            return None
        operator = "floordiv"
    row = OPERATORS[operator]
    return (
        simplify(apply(operator, *values))
        if row.result([value.kind for value in values]) is not None
        else None
    )


def elementwise(operator: str, truth: bool = False) -> Rule:
    """A pointwise operation on known operands."""

    def rule(inputs: Sequence[Known | None], attributes: Attributes) -> Known | None:
        operands = [operand for operand in inputs if operand is not None]
        if len(operands) < len(inputs) or not operands:
            return None
        rank = max(operand.rank for operand in operands)
        length = max((len(o.items) for o in operands), default=1)
        if any(len(o.items) not in (1, length) for o in operands) or any(not o.items for o in operands):
            return None
        columns = [o.items if len(o.items) == length else o.items * length for o in operands]
        items = [typed(operator, *elements) for elements in zip(*columns, strict=True)]
        found = [item for item in items if item is not None]
        dtype = "bool" if truth else operands[1 if operator == "where" else 0].dtype
        return Known(rank, tuple(found), dtype) if len(found) == len(items) else None

    return rule


def _gather(inputs: Sequence[Known | None], attributes: Attributes) -> Known | None:
    data, positions = inputs[:2]
    numbers = positions.integers() if positions is not None else None
    if data is None or positions is None or numbers is None or not data.rank:
        return None
    if any(not -len(data.items) <= n < len(data.items) for n in numbers):
        return None
    return Known(positions.rank, tuple(data.items[n] for n in numbers), data.dtype)


def _concatenate(inputs: Sequence[Known | None], attributes: Attributes) -> Known | None:
    parts = [part for part in inputs if part is not None and part.rank == 1]
    if len(parts) < len(inputs):
        return None
    return Known(1, tuple(item for part in parts for item in part.items), parts[0].dtype)


def _slice(inputs: Sequence[Known | None], attributes: Attributes) -> Known | None:
    data = inputs[0]
    # starts, ends and steps; there is only one axis
    bounds = [attributes.get(name) for name in ("starts", "ends")]
    if bounds[0] is None:
        numbers = [operand.integers() if operand is not None else None for operand in inputs[1:]]
        if any(number is None for number in numbers):
            return None
        bounds = [*numbers[:2], *numbers[3:]]
    if data is None or not data.rank:
        return None
    first = [bound[0] for bound in bounds if isinstance(bound, Sequence) and len(bound) == 1]
    return Known(1, data.items[slice(*first)], data.dtype) if len(first) == len(bounds) else None


def _rank_changed(rank: int | None) -> Rule:
    def rule(inputs: Sequence[Known | None], attributes: Attributes) -> Known | None:
        data = inputs[0]
        if data is None:
            return None
        if rank is None:
            target = inputs[1]
            if target is None or len(target.items) > 1:
                return None
            return Known(len(target.items), data.items, data.dtype)
        if rank == 0 and len(data.items) != 1:
            return None
        return Known(rank, data.items, data.dtype) if data.rank != rank else None

    return rule


def _same(inputs: Sequence[Known | None], attributes: Attributes) -> Known | None:
    return inputs[0]


def _filled(inputs: Sequence[Known | None], attributes: Attributes) -> Known | None:
    shape = inputs[0].integers() if inputs[0] is not None else None
    if shape is None or len(shape) > 1 or math.prod(shape) > LONGEST:
        return None
    value = attributes.get("value")
    tensor = (
        known_tensor(value) if isinstance(value, ir.TensorProtocol) else Known(1, (Const(0.0),), "float32")
    )
    return tensor and Known(len(shape), tensor.items * math.prod(shape), tensor.dtype)


def _expanded(inputs: Sequence[Known | None], attributes: Attributes) -> Known | None:
    data, shape = inputs[0], inputs[1].integers() if inputs[1] is not None else None
    if (
        data is None
        or shape is None
        or len(shape) != 1
        or len(data.items) not in (1, shape[0])
        or shape[0] > LONGEST
    ):
        return None
    return Known(1, data.items if len(data.items) == shape[0] else data.items * shape[0], data.dtype)


def _range(inputs: Sequence[Known | None], attributes: Attributes) -> Known | None:
    numbers = [operand.integers() if operand is not None else None for operand in inputs]
    if any(number is None for number in numbers) or inputs[0] is None:
        return None
    values = range(*(number[0] for number in numbers if number is not None))
    return Known(1, tuple(Const(n) for n in values), inputs[0].dtype) if len(values) <= LONGEST else None


def _reduced(operator: str, start: Expr | None) -> Rule:
    def rule(inputs: Sequence[Known | None], attributes: Attributes) -> Known | None:
        data = inputs[0]
        if data is None or not data.items or (len(inputs) > 1 and inputs[1] is None):
            return None
        item = simplify(apply(operator, *data.items, *([start] if start is not None else [])))
        return Known(1 if attributes.get("keepdims", 1) and data.rank else 0, (item,), data.dtype)

    return rule


def _cast(inputs: Sequence[Known | None], attributes: Attributes) -> Known | None:
    target = attributes.get("to")
    dtype = DTYPE_NAMES.get(ir.DataType(target)) if isinstance(target, int) else None
    return inputs[0].cast(dtype) if inputs[0] is not None and dtype is not None else None


def _modulo(inputs: Sequence[Known | None], attributes: Attributes) -> Known | None:
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
    "Gather": _gather, "Concat": _concatenate, "Slice": _slice, "Unsqueeze": _rank_changed(1),
    "Squeeze": _rank_changed(0), "Reshape": _rank_changed(None), "Identity": _same, "Cast": _cast,
    "ConstantOfShape": _filled, "Expand": _expanded, "Range": _range, "Mod": _modulo,
    "ReduceProd": _reduced("mul", ONE),
    "ReduceSum": _reduced("add", ZERO), "ReduceMax": _reduced("max", None), "ReduceMin": _reduced("min",
    None),
}
# fmt: on
"""ONNX operator to the elements of its result; subtraction, negation and shapes are in
:func:`known_value`."""


def known_value(operator: str, inputs: Sequence[Known | None], attributes: Attributes) -> Known | None:
    """The elements that a node gives, where they are known."""
    if operator == "Sub" and len(inputs) == 2:
        negative = RULES["Mul"]([Known(0, (Const(-1),)), inputs[1]], {})
        added = RULES["Add"]([inputs[0], negative], {})
        return added
    if operator == "Neg":
        found = RULES["Mul"]([Known(0, (Const(-1),)), *inputs], {})
        return found and inputs[0] and Known(found.rank, found.items, inputs[0].dtype)
    rule = RULES.get(operator)
    return rule(inputs, attributes) if rule is not None and inputs else None


def known_tensor(tensor: ir.TensorProtocol) -> Known | None:
    """The elements of a small constant of rank 0 or 1."""
    dtype = DTYPE_NAMES.get(tensor.dtype)
    if dtype is None or len(tensor.shape) > 1 or tensor.size > LONGEST:
        return None
    kind = {Kind.BOOL: bool, Kind.INT: int, Kind.FLOAT: float}[element_kind(dtype)]
    return Known(len(tensor.shape), tuple(Const(kind(n)) for n in tensor.numpy().reshape(-1)), dtype)


def known_shape(shape: Indices, start: int = 0, end: int | None = None) -> Known:
    """What ``Shape`` gives."""
    return Known(1, tuple(shape)[slice(start, end)])
