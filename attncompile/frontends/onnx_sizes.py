"""Sizes and small integer tensors of an ONNX graph, as expressions.

Exported graphs compute their shapes: ``Shape → Gather → Unsqueeze → Concat → Reshape``. Every such value of rank 0 or 1
is known here as a tuple of expressions over the symbolic sizes, so that a reshape in a model with dynamic axes has an
index map like any other.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from attncompile.frontends.graph import Indices
from attncompile.ir import Expr, Kind, Size, simplify
from attncompile.ir.expr import ONE, ZERO, Const, apply, walk
from attncompile.ir.operators import OPERATORS
from attncompile.ir.simplify import Simplifier
from attncompile.ir.types import element_kind

LONGEST = 64
"""Elements beyond which a tensor is data, not a shape."""

TO_THE_END = 2**31 - 1
"""A slice end at or beyond this means the end of the axis (exporters write the largest int32 or int64)."""

DTYPE_NAMES: dict[ir.DataType, str] = {
    ir.DataType.DOUBLE: "float64", ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16", ir.DataType.FLOAT8E4M3FN: "float8_e4m3", ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32", ir.DataType.INT8: "int8", ir.DataType.UINT8: "uint8", ir.DataType.BOOL: "bool",
}
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


@dataclass
class SizeNames:
    """The symbolic sizes of one model, and what is known of which of them are equal.

    Attributes:
        display: size name to the name that the model gives it.
    """

    display: dict[str, str] = field(default_factory=dict)
    _by_text: dict[str, Size] = field(default_factory=dict)
    _proven: dict[Size, Size] = field(default_factory=dict)
    _meets: list[tuple[Expr, Expr]] = field(default_factory=list)
    _declared: set[str] = field(default_factory=set)

    def declare(self, text: str) -> None:
        """Note a name that stands for itself in expressions such as ``past + new``."""
        self._declared.add(text)

    def symbol(self, text: str) -> Size:
        """The size of a name; one that is proven equal to an earlier one is that one."""
        if text not in self._by_text:
            plain = re.sub(r"\W", "_", text).strip("_") or "size"
            name = plain[0].upper() + plain[1:] if plain[0].isalpha() else f"Size_{plain}"
            while name in self.display:
                name += "_"
            self.display[name] = text
            self._by_text[text] = Size(name)
        return self._representative(self._by_text[text])

    def _representative(self, size: Size) -> Size:
        while size in self._proven:
            size = self._proven[size]
        return size

    def expression(self, text: str, declared_only: bool = False) -> Expr:
        """A dimension as models and shape inference write it: ``batch``, ``2*s0 + 1``, ``floor(seq/2)``.

        Text that is no such expression is one symbol, and so is, with ``declared_only``, one over names that the model
        does not declare by themselves (``batch-size`` is a name, not a difference).
        """
        if text in self._declared:
            return self.symbol(text)
        try:
            tree = ast.parse(text.strip(), mode="eval").body
            names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            if declared_only and not isinstance(tree, ast.Name) and not names - _FUNCTIONS <= self._declared:
                return self.symbol(text)
            return simplify(self._read(tree))
        except (SyntaxError, _Unreadable):
            return self.symbol(text)

    def _read(self, tree: ast.expr) -> Expr:
        match tree:
            case ast.Name(name):
                return self.symbol(name)
            case ast.Constant(int() as value) if not isinstance(value, bool):
                return Const(value)
            case ast.UnaryOp(ast.USub(), operand):
                return -self._read(operand)
            case ast.BinOp(left, ast.Pow(), ast.Constant(int() as power)) if 0 < power < 5:
                return apply("mul", *[self._read(left)] * power, 1)
            case ast.BinOp(left, operator, right) if type(operator) in _ARITHMETIC:
                return _ARITHMETIC[type(operator)](self._read(left), self._read(right))
            case ast.Call(ast.Name("floor" | "int"), [inner]):
                return self._read(inner)
            case ast.Call(ast.Name("ceiling"), [ast.BinOp(left, ast.Div(), right)]):
                return -((-self._read(left)) // self._read(right))
            case ast.Call(ast.Name(name), arguments) if name in _CALLS:
                return apply(_CALLS[name], *(self._read(a) for a in arguments))
        raise _Unreadable

    def prove_equal(self, left: Expr, right: Expr) -> None:
        """Note two sizes that the graph cannot run without being equal; the earlier name stays."""
        if isinstance(left, Size) and isinstance(right, Size):
            first, second = self._representative(left), self._representative(right)
            if first != second:
                order = list(self.display)
                first, second = sorted((first, second), key=lambda size: order.index(size.name))
                self._proven[second] = first
        self.meet(left, right)

    @property
    def merged(self) -> int:
        """How many names turned out to be other names."""
        return len(self._proven)

    def meet(self, left: Expr, right: Expr) -> None:
        """Note two sizes that are broadcast against each other: equal when the model runs, unless one is 1."""
        if left != right and ONE not in (left, right):
            self._meets.append((left, right))

    def hints(self) -> dict[str, int]:
        """A small size for every symbol: distinct, but one for symbols that meet, and that of a constant they meet."""
        group = {name: name for name in self.display}

        def root(name: str) -> str:
            while group[name] != name:
                name = group[name]
            return name

        fixed: dict[str, int] = {}
        for left, right in self._meets:
            if isinstance(left, Size) and isinstance(right, Size):
                group[root(right.name)] = root(left.name)
        for pair in self._meets:
            for one, other in (pair, pair[::-1]):
                if isinstance(one, Size) and isinstance(other, Const):
                    fixed[root(one.name)] = int(other.value)
        roots = list(dict.fromkeys(root(name) for name in group))
        chosen = {name: fixed.get(name, number) for name, number in zip(roots, _hint_numbers(len(roots)), strict=True)}
        return {name: chosen[root(name)] for name in group}


def _hint_numbers(count: int) -> list[int]:
    """The first odd primes, so that products of sizes do not coincide either."""
    found: list[int] = []
    number = 3
    while len(found) < count:
        if all(number % prime for prime in found):
            found.append(number)
        number += 2
    return found


class _Unreadable(Exception):
    """The text is no arithmetic over sizes."""


_ARITHMETIC: dict[type[ast.operator], Callable[[Expr, Expr], Expr]] = {
    ast.Add: lambda x, y: x + y, ast.Sub: lambda x, y: x - y, ast.Mult: lambda x, y: x * y,
    ast.FloorDiv: lambda x, y: x // y, ast.Div: lambda x, y: x // y, ast.Mod: lambda x, y: x % y,
}
_CALLS = {"Max": "max", "max": "max", "Min": "min", "min": "min", "Mod": "mod", "FloorDiv": "floordiv"}
_FUNCTIONS = {*_CALLS, "floor", "int", "ceiling"}


def broadcast_shapes(shapes: Sequence[Indices], sizes: SizeNames | None = None) -> Indices:
    """The broadcast of shapes. Of several sizes that are not the constant 1 (they agree when the model runs) the
    simplest is taken: a constant, then a symbol, then the rest; ``sizes`` takes note of them."""
    rank = max((len(shape) for shape in shapes), default=0)
    result: list[Expr] = []
    for axis in range(rank):
        found = [shape[axis - rank + len(shape)] for shape in shapes if axis - rank + len(shape) >= 0]
        larger = list(dict.fromkeys(size for size in found if size != ONE)) or [ONE]
        for other in larger[1:]:
            if sizes is not None:
                sizes.meet(larger[0], other)
        result.append(min(larger, key=lambda size: 0 if isinstance(size, Const) else 1 if isinstance(size, Size) else 2))
    return tuple(result)


def product(shape: Sequence[Expr]) -> Expr:
    """Number of elements."""
    return simplify(apply("mul", ONE, *shape)) if shape else ONE


def quotient(whole: Sequence[Expr], parts: Sequence[Expr]) -> Expr:
    """``∏ whole / ∏ parts``, which is exact in a valid reshape; equal factors cancel before the division."""
    above, below = list(whole), []
    for part in parts:
        if part in above:
            above.remove(part)
        else:
            below.append(part)
    return simplify(product(above) // product(below)) if below else product(above)


_PROVER = Simplifier({})


def nonnegative(expr: Expr) -> bool:
    """Whether an integer expression over sizes (each at least 1) is proven to be at least zero."""
    return _PROVER.nonnegative(expr)


def slice_range(size: Expr, start: Expr, end: Expr, step: int) -> tuple[Expr, Expr]:
    """First position and length of a slice, after ONNX's clamping into the axis.

    Raises:
        ValueError: for a step other than a positive number or −1 over the whole axis.
    """
    if step == -1:
        whole = _number(start) in (-1, None) or _number(start) >= TO_THE_END
        if not whole or _number(end) is None or _number(end) > -TO_THE_END or (
            _number(start) is None and simplify(start) != simplify(size - 1)
        ):
            raise ValueError("only a slice with step −1 over the whole axis is stated")
        return simplify(size - 1), size
    if step < 1:
        raise ValueError(f"a slice with step {step} is not stated")
    first, last = _clamped(size, start), _clamped(size, end)
    length = simplify(last - first) if step == 1 else simplify((last - first + (step - 1)) // step)
    return first, length if nonnegative(length) else simplify(apply("max", length, 0))


def _number(expr: Expr) -> float:
    return float(expr.value) if isinstance(expr, Const) else math.nan


def _clamped(size: Expr, position: Expr) -> Expr:
    """A slice bound inside ``0 … size``, counted from the end when it is negative."""
    if isinstance(position, Const):
        if position.value >= TO_THE_END:
            return size
        if position.value < 0:
            position = simplify(size + position)
    elif nonnegative(-1 - position):
        position = simplify(size + position)
    if not nonnegative(position):
        position = apply("max", position, 0)
    return simplify(position if nonnegative(size - position) else apply("min", position, size))


# Values. Each rule takes the known inputs of a node (None for one that is unknown or absent) and its attributes, and
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
    return simplify(apply(operator, *values)) if row.result([value.kind for value in values]) is not None else None


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
    given: list[tuple[int, ...] | None] = []
    for place, name in enumerate(("starts", "ends", "axes", "steps"), start=1):
        operand = inputs[place] if place < len(inputs) else None
        written = attributes.get(name)
        given.append(tuple(written) if written is not None else operand.integers() if operand is not None else None)  # type: ignore[arg-type]
    starts, ends, axes, steps = given
    missing = any(operand is None for operand in inputs[1:3])
    if data is None or not data.rank or starts is None or ends is None or (missing and "starts" not in attributes):
        return None
    if len(starts) != 1 or (axes is not None and axes not in ((0,), (-1,))):
        return None
    return Known(1, data.items[starts[0] : ends[0] : steps[0] if steps else 1], data.dtype)


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
    tensor = known_tensor(value) if isinstance(value, ir.TensorProtocol) else Known(1, (Const(0.0),), "float32")
    return tensor and Known(len(shape), tensor.items * math.prod(shape), tensor.dtype)


def _expanded(inputs: Sequence[Known | None], attributes: Attributes) -> Known | None:
    data, shape = inputs[0], inputs[1].integers() if inputs[1] is not None else None
    if data is None or shape is None or len(shape) != 1 or len(data.items) not in (1, shape[0]) or shape[0] > LONGEST:
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


RULES: dict[str, Rule] = {
    **{name: elementwise(operator) for name, operator in {
        "Add": "add", "Mul": "mul", "Div": "div", "Min": "min", "Max": "max", "Abs": "abs", "Sqrt": "sqrt",
        "Floor": "floor", "Ceil": "ceil", "Pow": "pow", "Where": "where", "Sum": "add"}.items()},
    **{name: elementwise(operator, True) for name, operator in {
        "Equal": "eq", "Less": "lt", "LessOrEqual": "le", "Greater": "gt", "GreaterOrEqual": "ge", "And": "and",
        "Or": "or", "Xor": "ne", "Not": "not"}.items()},
    "Gather": _gather, "Concat": _concatenate, "Slice": _slice, "Unsqueeze": _rank_changed(1),
    "Squeeze": _rank_changed(0), "Reshape": _rank_changed(None), "Identity": _same, "Cast": _cast,
    "ConstantOfShape": _filled, "Expand": _expanded, "Range": _range, "Mod": _modulo, "ReduceProd": _reduced("mul", ONE),
    "ReduceSum": _reduced("add", ZERO), "ReduceMax": _reduced("max", None), "ReduceMin": _reduced("min", None),
}
"""ONNX operator to the elements of its result; subtraction, negation and shapes are in :func:`known_value`."""


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


def reads_sizes(known: Known) -> bool:
    """Whether an element depends on a symbolic size."""
    return any(isinstance(node, Size) for item in known.items for node in walk(item))


# What the rules of the adapter do not cover is asked of shape inference, once, and only when it is needed.


@dataclass
class Inference:
    """Shapes and dtypes as the model declares them, or as shape inference finds them."""

    model: ir.Model
    sizes: SizeNames
    _inferred: dict[str, onnx.TypeProto] | None = None

    def of(self, value: ir.Value) -> tuple[Indices | None, str | None]:
        """Shape and dtype of a value, each ``None`` where unknown."""
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            return None, None  # sequences and optional values have a shape of their elements, not of themselves
        dtype = DTYPE_NAMES.get(value.dtype) if value.dtype is not None else None
        if value.shape is not None and dtype is not None:
            return tuple(self._declared(d, value.name or "", n) for n, d in enumerate(value.shape)), dtype
        if self._inferred is None:
            self._inferred = infer_types(self.model)
        found = self._inferred.get(value.name or "")
        if found is None or not found.HasField("tensor_type"):
            return None, dtype
        dtype = DTYPE_NAMES.get(ir.DataType(found.tensor_type.elem_type))
        if not found.tensor_type.HasField("shape"):
            return None, dtype
        dims = found.tensor_type.shape.dim
        return tuple(
            Const(dim.dim_value) if dim.HasField("dim_value")
            else self.sizes.expression(dim.dim_param) if dim.dim_param
            else self.sizes.symbol(f"{value.name}_dim_{n}") for n, dim in enumerate(dims)
        ), dtype

    def _declared(self, dim: int | ir.SymbolicDim, value: str, axis: int) -> Expr:
        if isinstance(dim, int):
            return Const(dim)
        return self.sizes.symbol(f"{value}_dim_{axis}") if dim.value is None else self.sizes.expression(str(dim.value))


def infer_types(model: ir.Model) -> dict[str, onnx.TypeProto]:
    """Types of the values by ONNX Runtime's symbolic shape inference, or by ONNX's where that fails.

    Large initialisers take part as inputs: only their types matter, and a model may be too large for one message.
    """
    light = model.clone()
    for name, value in list(light.graph.initializers.items()):
        if value.const_value is not None and value.const_value.size > LONGEST:
            del light.graph.initializers[name]
            value.const_value = None
            if value not in light.graph.inputs:
                light.graph.inputs.append(value)
    proto = ir.to_proto(light)
    try:
        from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

        inferred = SymbolicShapeInference.infer_shapes(proto, auto_merge=True)
    except Exception:  # it raises whatever its handlers of single operators raise
        try:
            inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        except onnx.shape_inference.InferenceError:
            return {}
    return {info.name: info.type for info in (*inferred.graph.value_info, *inferred.graph.output)}
