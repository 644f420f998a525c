"""What the Triton target can do, and the parts of a Spec it is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attncompile.codegen.triton.expressions import refusal
from attncompile.codegen.triton.moved import regrouped_parts
from attncompile.codegen.triton.storage import decode_reason, reads_storage, storage_reason
from attncompile.codegen.triton.tiles import LARGEST_HEAD, LARGEST_WIDE_HEAD
from attncompile.ir import NO_SINK, Attend, Position, Quantize, Scan, Spec, simplify
from attncompile.ir.attend import DIVIDING, HIDING_NOTHING
from attncompile.ir.expr import (
    SCORE,
    TRUE,
    WEIGHT,
    Apply,
    Const,
    Expr,
    Index,
    Size,
    Weight,
    apply,
    loads,
    substitute,
    symbols,
    walk,
    where,
)
from attncompile.ir.operators import Kind
from attncompile.ir.types import TensorType
from attncompile.kernels.dense import SWALLOWING
from attncompile.kernels.stored import piece

NEGLIGIBLE = -1e4
"""A masked logit this far below the scores has weight 0: in float32 exp(-10000) is 0."""

NARROWEST_PIECE = 16
"""Channels that matrix units take at least."""

REAL_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Dense:
    """An attention that the dense kernel computes.

    Attributes:
        attend: the operation.
        scale: constant positive factor of the logits, taken out of ``score``.
        score: logit divided by ``scale``.
        mask: what is visible; every other key has weight zero.
        edit: factor of the normalised weight, or ``None``.
        sink: logit of a key without a value, or ``None``.
        divisor: what the sum of the weights becomes before it divides them, or ``None`` where nothing is divided.
        query, key, value: types of the operands.
        rounding: how queries, keys and perhaps values are rounded, or ``None``.
    """

    attend: Attend
    scale: float
    score: Expr
    mask: Expr
    edit: Expr | None
    sink: Expr | None
    divisor: Expr | None
    query: TensorType
    key: TensorType
    value: TensorType
    rounding: Rounding | None


@dataclass(frozen=True)
class Rounding:
    """Operands that are rounded before they are multiplied.

    Attributes:
        query, key: to ``int8`` or ``float8_e4m3``, both to the same.
        value: to ``float8_e4m3``, as the weights then are too, or ``None``.
        rotations: rotary maps of inputs, whose results are queries or keys to be rounded.
    """

    query: Quantize
    key: Quantize
    value: Quantize | None
    rotations: tuple[Position, ...] = ()

    @property
    def steps(self) -> tuple[Quantize, ...]:
        """Those that there are, in the order query, key, value."""
        return (self.query, self.key, *((self.value,) if self.value else ()))

    def rotation(self, step: Quantize) -> Position | None:
        """The rotary map before a step, if there is one."""
        return next((position for position in self.rotations if position.out == step.tensor), None)

    def source(self, step: Quantize) -> str:
        """The input that a step rounds, perhaps behind a rotary map."""
        position = self.rotation(step)
        return position.tensor if position else step.tensor

    @property
    def e4m3(self) -> bool:
        """Whether anything is rounded to float8 e4m3."""
        return any(step.dtype == "float8_e4m3" for step in self.steps)


def operations_reason(spec: Spec) -> str | None:
    """Why the operations of the Spec have no kernel, or ``None``."""
    names = names_of(spec)
    if names == ["scan"] or names == ["attend"]:
        return None
    if reads_storage(spec):
        return storage_reason(spec)
    attend = spec.attend()
    if attend is not None and set(names) in ({"quantize", "attend"}, {"position", "quantize", "attend"}):
        return _rounding_reason(spec, attend)
    if attend is not None and set(names) == {"position", "attend"}:
        return (
            "the kernels that round queries and keys rotate them first, and here nothing is rounded: this Spec is "
            f"{', '.join(names)}"
        )
    return (
        f"there is a kernel for one attend, one attend with query and key quantized, one attend behind gather and "
        f"dequantize, one attend between regroups, and one scan; "
        f"this Spec is {', '.join(names)}"
    )


def _rounding_reason(spec: Spec, attend: Attend) -> str | None:
    """Why no kernel multiplies operands rounded like this, or ``None``."""
    rounded = {op.out: op for op in spec.operations if isinstance(op, Quantize)}
    pair, value = {attend.query, attend.key}, rounded.get(attend.value)
    if set(rounded) not in (pair, pair | {attend.value}) or attend.value in pair:
        return (
            f"the kernels round the query and the key of one attention, and perhaps its value; here "
            f"{', '.join(rounded)} are rounded, and {attend.query} and {attend.key} are multiplied"
        )
    rotated = {op.out: op for op in spec.operations if isinstance(op, Position)}
    reason = _rotary_reason(spec, attend, rotated)
    if reason:
        return reason
    if not {op.tensor for op in rounded.values()} - set(rotated) <= {given.name for given in spec.inputs}:
        return "the kernels round inputs of the Spec, not results of other operations"
    dtypes = [rounded[name].dtype for name in (attend.query, attend.key)]
    if dtypes[0] != dtypes[1]:
        return f"queries are rounded to {dtypes[0]} and keys to {dtypes[1]}; the kernels multiply one type"
    if value is not None and (value.dtype != "float8_e4m3" or value.smooth):
        how = f"{value.dtype}{', smoothed' if value.smooth else ''}"
        return f"values are rounded to {how}; the kernels take them in float8_e4m3, not smoothed"
    if value is not None and attend.weight != WEIGHT:
        return f"the kernel for float8_e4m3 weights has no edit of them such as {attend.weight}"
    return None


def _rotary_reason(spec: Spec, attend: Attend, rotated: Mapping[str, Position]) -> str | None:
    """Why the kernels that round do not rotate like this first, or ``None``."""
    if not rotated:
        return None
    given = {value.name for value in spec.inputs}
    read = [name for op in spec.operations for name in op.operands()]
    rounded = {op.out: op.tensor for op in spec.operations if isinstance(op, Quantize)}
    pair = [rounded[attend.query], rounded[attend.key]]
    for name, position in rotated.items():
        if position.tensor not in given:
            return f"the kernels rotate inputs of the Spec, {position.tensor} is none"
        if name not in pair or read.count(name) > 1 or name in spec.outputs:
            return f"the kernels rotate what becomes codes of queries or keys, {name} is read otherwise"
        reason = why_not_rotated(spec.types()[position.tensor], position)
        if reason:
            return reason
    return None


def why_not_rotated(kind: TensorType, position: Position) -> str | None:
    """Why the kernels that round do not rotate a tensor of this type first, or ``None``."""
    size = simplify(kind.sizes[3])
    if not isinstance(size, Const):
        return f"{position.tensor} has {size} channels; the kernels that rotate need a constant number"
    if position.channels == 0:
        return f"the rotary map of {position.tensor} rotates no channel; leave it out"
    return next(filter(None, (refusal(simplify(expr)) for expr in (position.cos, position.sin))), None)


def names_of(spec: Spec) -> list[str]:
    """What its operations are called, in order."""
    return [operation.keyword for operation in spec.operations]


def why_not_spec(spec: Spec) -> str | None:
    """Why there is no Triton kernel for the Spec, whatever the device, or ``None``."""
    moved = regrouped_parts(spec)
    if moved:
        return why_not_spec(moved.attention)
    reason = operations_reason(spec)
    if reason:
        return reason
    types = spec.types()
    attend, scan = spec.attend(), spec.scan()
    operation = attend or scan
    assert operation is not None  # operations_reason has seen to it
    if scan is not None and not scan.fixed:
        return "the steps of the scan differ (a gate, a rate or a state); the kernel takes a decay fixed by head"
    for name in (operation.query, operation.key, operation.value):
        found = types[name]
        if found.dtype not in REAL_DTYPES:
            return f"{name} is {found.dtype}; the kernels take {', '.join(REAL_DTYPES)}"
        channels = simplify(found.sizes[3])
        if not isinstance(channels, Const):
            return f"{name} has {channels} channels; the kernels need a constant number"
        if not 1 <= channels.value <= LARGEST_HEAD:
            reason = _why_not_wide(spec, int(channels.value))
            if reason:
                return f"{name} has {channels} channels; the kernels take 1 to {LARGEST_HEAD}, {reason}"
    if len({types[name].dtype for name in (operation.query, operation.key, operation.value)}) > 1:
        return "query, key and value differ in dtype"
    unknown = [name for name in spec.outputs if name not in operation.results()]
    if unknown:
        return f"the Spec gives {', '.join(unknown)}, which is no result of the {operation.keyword}"
    expressions: tuple[Expr, ...] = operation.expressions()
    if attend is not None:
        if attend.taps and names_of(spec) != ["attend"]:
            return f"the kernels give {', '.join(attend.taps)} of one attend alone"
        narrow = attend.value not in {value.name for value in spec.inputs} and not reads_storage(spec)
        if bool(attend.norm.weights) != narrow:
            given = ("as they are", "rounded")[narrow]
            return (
                f"the normaliser is {attend.norm} and values are {given}; the kernels multiply "
                "weights and values in one type"
            )
        if weight_factor(attend.weight) is None:
            return (
                f"the weight edit {attend.weight} is not linear in w: an online softmax knows the weight "
                "only up to a factor until the last key"
            )
        expressions = (*logits(attend)[:2], attend.sink, attend.divisor, attend.kv_head)
    for expr in (*expressions, *(size for value in spec.inputs for size in value.type.sizes)):
        reason = refusal(simplify(expr))
        if reason:
            return reason
    readable = {size.name for value in spec.inputs for size in value.type.sizes if isinstance(size, Size)}
    read = (operation, *(step for step in spec.operations if isinstance(step, Position)))
    stated = (expr for step in read for expr in step.expressions())
    for expr in (*stated, *(size for value in spec.inputs for size in value.type.sizes)):
        for node in walk(expr):
            if isinstance(node, Size) and node.name not in readable:
                return f"the size {node.name} in {expr} is not the size of any input's axis"
    return None


def _why_not_wide(spec: Spec, channels: int) -> str | None:
    """Why the kernel that cuts keys into parts and channels into pieces does not take so wide a head, or ``None``."""
    if not 1 <= channels <= LARGEST_WIDE_HEAD or piece(channels) < NARROWEST_PIECE:
        return f"or multiples of {NARROWEST_PIECE} up to {LARGEST_WIDE_HEAD} for softmax in parts of the keys"
    attend = spec.attend()
    if attend is None or any(operation.keyword != "attend" for operation in spec.operations):
        return "or more for one attend alone"
    types = spec.types()
    if simplify(types[attend.query].sizes[2]) == simplify(types[attend.key].sizes[2]):
        return "or more for few queries over a cache"
    return decode_reason(spec)


def is_wide(spec: Spec) -> bool:
    """Whether a head has more channels than the dense kernel takes."""
    attend = spec.attend()
    types = spec.types()
    widths = [simplify(types[name].sizes[3]) for name in (attend.query, attend.value)] if attend else []
    return any(isinstance(width, Const) and width.value > LARGEST_HEAD for width in widths)


def negligible(fill: Expr) -> bool:
    """Whether a masked position with this logit has weight 0: it is, or adds to the score, −10000 or less.

    Not where real numbers are read beside it, which may hide all that is visible: then both weigh.
    """
    match fill:
        case Const(value):
            return value <= NEGLIGIBLE
        case Apply("add", arguments):
            low = any(isinstance(a, Const) and a.value <= NEGLIGIBLE for a in arguments)
            return low and not any(load.element is Kind.FLOAT and Index("j") in symbols(load) for load in loads(fill))
    return False


def logits(attend: Attend) -> tuple[Expr, Expr]:
    """Score and mask such that what the mask hides has weight 0; a fill that counts joins the score."""
    fill = simplify(attend.fill)
    if attend.mask == TRUE or (fill == Const(0.0) if attend.norm.kind in HIDING_NOTHING else negligible(fill)):
        return simplify(attend.score), simplify(attend.mask)
    return simplify(where(attend.mask, attend.score, attend.fill)), TRUE


def weight_factor(weight: Expr) -> Expr | None:
    """``f`` such that the edit is ``w·f`` with ``f`` free of ``w``, or ``None`` when there is none."""

    def reads(expr: Expr) -> bool:
        return any(isinstance(node, Weight) for node in walk(expr))

    def factor(expr: Expr) -> Expr | None:
        match expr:
            case Weight():
                return Const(1.0)
            case Const(value) if value == 0:
                return Const(0.0)
            case Apply("mul", arguments):
                reading = [a for a in arguments if reads(a)]
                inner = factor(reading[0]) if len(reading) == 1 else None
                others = [a for a in arguments if not reads(a)]
                return None if inner is None else apply("mul", inner, *others) if others else inner
            case Apply("div", (left, right)) if not reads(right):
                inner = factor(left)
                return None if inner is None else apply("div", inner, right)
            case Apply("add", arguments):
                parts = [factor(a) for a in arguments]
                return None if None in parts else apply("add", *(p for p in parts if p is not None))
            case Apply("where", (condition, then, otherwise)) if not reads(condition):
                sides = factor(then), factor(otherwise)
                return None if sides[0] is None or sides[1] is None else where(condition, sides[0], sides[1])
        return None

    found = factor(simplify(weight))
    return None if found is None else simplify(found)


def dense(spec: Spec) -> Dense:
    """The parts of a Spec with one attention that :func:`why_not_spec` does not refuse."""
    attend = spec.attend()
    assert attend is not None
    types = spec.types()
    score, mask = logits(attend)
    scale = 1.0
    match score:
        case Apply("mul", (Const(value), *rest)) if 0 < value < float("inf"):
            scale, score = float(value), apply("mul", *rest)
            if score.kind is Kind.INT:
                score = apply("float", score)
    edit = None if attend.weight == WEIGHT else weight_factor(attend.weight)
    rounded = {op.out: op for op in spec.operations if isinstance(op, Quantize)}
    rounding = None
    if rounded:
        rotations = tuple(op for op in spec.operations if isinstance(op, Position))
        rounding = Rounding(rounded[attend.query], rounded[attend.key], rounded.get(attend.value), rotations)
    return Dense(
        attend,
        scale,
        score,
        mask,
        edit,
        None if attend.sink == NO_SINK else simplify(attend.sink),
        simplify(attend.divisor) if attend.norm.kind in DIVIDING else None,
        types[attend.query],
        types[attend.key],
        types[attend.value],
        rounding,
    )


def scan(spec: Spec) -> Scan:
    """The scan of a Spec that :func:`why_not_spec` does not refuse."""
    found = spec.scan()
    assert found is not None
    return found


def hides(parts: Dense) -> bool:
    """Whether some scores may be −∞ or so low that arithmetic ends: what is added hides keys."""
    if parts.attend.norm.kind != "softmax":
        return False
    loaded = any(load.element is Kind.FLOAT and Index("j") in symbols(load) for load in loads(parts.score))
    return loaded or any(isinstance(n, Const) and abs(n.value) >= SWALLOWING for n in walk(parts.score))


def gives_zeros(spec: Spec) -> bool:
    """Whether a row without any visible key, if there can be one, gives zeros here but not in the Spec."""
    attend = spec.attend()
    if attend is None or attend.norm.kind != "softmax" or logits(attend)[1] == TRUE:
        return False
    if attend.sink != NO_SINK and simplify(attend.fill) == Const(float("-inf")):
        return False  # the sink takes all the weight, here as there
    finite = simplify(attend.fill) != Const(float("-inf"))
    return (finite or attend.norm.empty == "nan") and not _sees_a_key(attend, spec.types())


def _sees_a_key(attend: Attend, types: Mapping[str, TensorType]) -> bool:
    """Whether every query is proven to see the first key, or the one at its own position."""
    queries, keys = types[attend.query].sizes[2], types[attend.key].sizes[2]
    extents = {"i": queries, "j": keys}
    certain = [Const(0), *([Index("i")] if simplify(queries) == simplify(keys) else [])]
    return any(simplify(substitute(attend.mask, {Index("j"): key}), extents) == TRUE for key in certain)


__all__ = [
    "SCORE",
    "Dense",
    "dense",
    "gives_zeros",
    "hides",
    "is_wide",
    "logits",
    "negligible",
    "operations_reason",
    "scan",
    "weight_factor",
    "why_not_spec",
]
