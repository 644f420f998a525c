"""ONNX Runtime's attention calls that hold their projections, defined in operators of the standard.

``Attention`` and ``QAttention`` of com.microsoft are what ONNX Runtime's optimiser for transformers and its quantiser
make of BERT-like models: one product with the weights of queries, keys and values side by side, in floats or in whole
numbers, and the attention of its three parts. With ``n`` heads of ``D`` channels, positions ``i`` of ``S`` queries and
``j`` of ``T = P + S`` keys (``P`` of them past)::

    Attention:   x·W + bias
    QAttention:  ((x − x_zero)·(W − W_zero)) · (x_scale · W_scale) + bias      codes; W_scale and W_zero per column, too
    s = scale · q·k + filter(mask) + attention_bias,   the lowest number where unidirectional and j > P + i
    y = softmax(s) · v

``filter`` is 0 where the mask says that a key is seen, and ``mask_filter_value`` elsewhere. A mask is ``[B, T]`` or
``[B, S, T]`` (positive: seen), the number of seen keys of each row ``[B]``, or these and then the first seen ones
``[2B]``; ``[B, 1]`` hides nothing. Rounding apart, this is the kernel of ONNX Runtime's CPU
(contrib_ops/cpu/bert/attention.cc, quantization/attention_quant.cc); the tests compare it with that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch

from attncompile.frontends.graph import Info
from attncompile.frontends.onnx_builder import AttentionRefused
from attncompile.frontends.onnx_known import DTYPE_NAMES
from attncompile.ir.expr import ONE, Const
from attncompile.ir.types import DTYPES

CONTRIB = "com.microsoft"
PROJECTED = frozenset({"Attention", "QAttention"})
"""The calls of com.microsoft that are defined here."""
AXES_INPUT_OPSET = 13
"""The opset from which on ``Unsqueeze`` takes its axes as an input."""
LOWEST_OPSET = 11
"""The opset that brought ``Range``; the definitions are written in operators of this one and later."""

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

# fmt: off
INPUTS: Mapping[str, tuple[str, ...]] = {
    "Attention": ("input", "weight", "bias", "mask_index", "past", "attention_bias", "past_sequence_length"),
    "QAttention": ("input", "weight", "bias", "input_scale", "weight_scale", "mask_index", "input_zero_point",
                   "weight_zero_point", "past"),
}
# fmt: on


def is_projected(node: ir.Node) -> bool:
    """Whether a node is a call that is defined here."""
    return node.domain == CONTRIB and node.op_type in PROJECTED


def definition(call: ir.Node, opset: int, infos: Mapping[str, Info]) -> ir.Function:
    """The function that stands for a call, with its inputs and outputs.

    Args:
        call: the call. opset: what the body is written in. infos: shapes of its inputs.

    Raises:
        AttentionRefused: for a call that is not defined here, with the reason.
    """
    if opset < LOWEST_OPSET:
        raise AttentionRefused(f"its definition needs opset {LOWEST_OPSET}, and the model is at {opset}")
    given = Call.of(call, infos)
    body = _Body(opset, _path(call))
    formal = {name: ir.Value(name=name) for name in INPUTS[call.op_type][: len(call.inputs)]}
    present = len(call.outputs) > 1
    outputs = _attention(body, given, {name: formal[name] for name in given.names}, present)
    graph = ir.Graph(list(formal.values()), outputs, nodes=body.nodes, opset_imports={"": opset})
    return ir.Function("", call.op_type, graph=graph, attributes=())


def _path(call: ir.Node) -> str:
    """The name of a call, in the module that its result says where its name says none."""
    name, (module, slash, _) = call.name or call.op_type, (call.outputs[0].name or "").rpartition("/")
    return name if "/" in name else f"{module}{slash}{name}"


@dataclass(frozen=True)
class Call:
    """What a call says.

    Attributes:
        operator: its name. names: of the inputs that it has.
        heads: how many. widths: channels of all heads of queries, keys and values.
        dtype: of its floats. mask: how many axes its mask has, 0 where it hides nothing.
    """

    operator: str
    names: tuple[str, ...]
    heads: int
    widths: tuple[int, int, int]
    scale: float
    filtered: float
    causal: bool
    dtype: ir.DataType
    mask: int

    @classmethod
    def of(cls, call: ir.Node, infos: Mapping[str, Info]) -> Call:
        """Read a call. Raises AttentionRefused for one that is not defined."""
        known, quantised = INPUTS[call.op_type], call.op_type == "QAttention"
        if len(call.inputs) > len(known) or not 1 <= len(call.outputs) <= 2:
            raise AttentionRefused(f"it has {len(call.inputs)} inputs and {len(call.outputs)} outputs")
        values = {n: v for n, v in zip(known, call.inputs, strict=False) if v is not None and v.name}
        for name in ("do_rotary", "past_present_share_buffer"):
            if _number(call, name, 0):
                raise AttentionRefused(f"its attribute {name} is set")
        if "past_sequence_length" in values:
            raise AttentionRefused("it updates a cache in place (past_sequence_length)")
        for name in known[: 5 if quantised else 2]:
            if name not in values:
                raise AttentionRefused(f"it has no {name}")
        heads = int(_number(call, "num_heads", 0))
        widths = _widths(call, infos.get(values["weight"].name or ""), heads)
        mask = _mask(values.get("mask_index"), infos)
        names = tuple(name for name in values if name != "mask_index" or mask)
        return cls(
            call.op_type, names, heads, widths,
            float(_number(call, "scale", 0) or 1.0 / math.sqrt(widths[0] // heads)),
            float(_number(call, "mask_filter_value", -10000.0)),
            bool(_number(call, "unidirectional", 0)),
            # sums of whole numbers are beyond float16
            _floats(values["input_scale" if quantised else "weight"], infos, FLOATS[:1] if quantised else FLOATS), mask,
        )  # fmt: skip


def _number(call: ir.Node, name: str, default: float) -> float:
    attribute = call.attributes.get(name)
    if attribute is None:
        return default
    if attribute.type not in (ir.AttributeType.INT, ir.AttributeType.FLOAT) or attribute.is_ref():
        raise AttentionRefused(f"its attribute {name} is no number")
    return float(attribute.value) if attribute.type is ir.AttributeType.FLOAT else int(attribute.value)


def _floats(value: ir.Value, infos: Mapping[str, Info], allowed: Sequence[ir.DataType]) -> ir.DataType:
    """The type of a call's numbers, which is that of one of its inputs."""
    info = infos.get(value.name or "")
    found = next((dtype for dtype in allowed if info is not None and DTYPE_NAMES[dtype] == info.dtype), None)
    if found is None:
        names = " or ".join(DTYPE_NAMES[dtype] for dtype in allowed)
        kind = info.dtype if info is not None else "of unknown type"
        raise AttentionRefused(f"{value.name} is {kind}, where it should be {names}")
    return found


def _widths(call: ir.Node, weight: Info | None, heads: int) -> tuple[int, int, int]:
    """Channels of all heads of queries, keys and values."""
    written = call.attributes.get("qkv_hidden_sizes")
    if written is not None and written.type is ir.AttributeType.INTS and len(written.value) == 3:
        found = [int(size) for size in written.value]
    elif weight is not None and len(weight.shape) == 2 and isinstance(weight.shape[1], Const):
        third, rest = divmod(int(weight.shape[1].value), 3)
        found = [third, third, third + rest]
    else:
        raise AttentionRefused("the shape of its weights is not known")
    if heads <= 0 or any(size <= 0 or size % heads for size in found) or found[0] != found[1]:
        raise AttentionRefused(f"its channels ({found[0]}, {found[1]}, {found[2]}) are no multiples of {heads} heads")
    return found[0], found[1], found[2]


def _mask(mask: ir.Value | None, infos: Mapping[str, Info]) -> int:
    """How many axes a mask has, 0 where it hides nothing."""
    if mask is None:
        return 0
    info = infos.get(mask.name or "")
    if info is None:
        raise AttentionRefused("it is not known how many axes its mask has")
    shape = info.shape
    if not 1 <= len(shape) <= 3:
        raise AttentionRefused(f"its mask has {len(shape)} axes")
    return 0 if len(shape) == 2 and shape[1] == ONE else len(shape)


@dataclass
class _Body:
    """The nodes of a definition while it is written."""

    opset: int
    name: str
    nodes: list[ir.Node] = field(default_factory=list)

    def __call__(
        self, operator: str, *inputs: ir.Value | None, **attributes: int | Sequence[int] | ir.TensorProtocol
    ) -> ir.Value:
        """One more node; its output."""
        place = len(self.nodes)
        made = ir.node(
            operator, list(inputs), attributes, outputs=[ir.Value(name=f"{operator}_{place}")],
            name=f"{self.name}.{operator}_{place}",
        )  # fmt: skip
        self.nodes.append(made)
        return made.outputs[0]

    def constant(self, value: float | Sequence[int], dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        return self("Constant", value=ir.tensor(np.array(value, dtype.numpy()), dtype))

    def unsqueezed(self, value: ir.Value, *axes: int) -> ir.Value:
        if self.opset < AXES_INPUT_OPSET:
            return self("Unsqueeze", value, axes=list(axes))
        return self("Unsqueeze", value, self.constant(axes))

    def sliced(self, value: ir.Value, start: ir.Value | int, end: ir.Value | int, axis: int) -> ir.Value:
        ends = [self.constant([each]) if isinstance(each, int) else each for each in (start, end)]
        return self("Slice", value, *ends, self.constant([axis]))

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """The size of an axis, as a tensor of one axis."""
        return self("Gather", self("Shape", value), self.constant([axis]), axis=0)


def _attention(
    body: _Body, call: Call, given: Mapping[str, ir.Value], present: bool
) -> list[ir.Value]:
    """The attention, and present keys and values."""
    q, k, v = _projections(body, call, given)
    if "past" in given:
        k, v = (
            body("Concat", body("Gather", given["past"], body.constant(n), axis=0), new, axis=2)
            for n, new in enumerate((k, v))
        )
    scores = body("MatMul", q, body("Transpose", k, perm=[0, 1, 3, 2]))
    scores = body("Mul", scores, body.constant(call.scale, call.dtype))
    if call.mask:
        scores = body("Add", scores, _filter(body, call, given["mask_index"], given["input"], k))
    if "attention_bias" in given:
        scores = body("Add", scores, given["attention_bias"])
    if call.causal:
        lowest = torch.finfo(DTYPES[DTYPE_NAMES[call.dtype]]).min
        scores = body("Where", _later(body, q, k), body.constant(lowest, call.dtype), scores)
    attended = body("MatMul", body("Softmax", scores, axis=-1), v)
    rows = body("Transpose", attended, perm=[0, 2, 1, 3])
    outputs = [body("Reshape", rows, body.constant([0, 0, call.widths[2]]))]
    if present:
        outputs.append(body("Concat", body.unsqueezed(k, 0), body.unsqueezed(v, 0), axis=0))
    return outputs


def _projections(body: _Body, call: Call, given: Mapping[str, ir.Value]) -> list[ir.Value]:
    """Queries, keys and values ``[B, n, S, D]``."""
    if call.operator == "QAttention":
        zeros = given.get("input_zero_point"), given.get("weight_zero_point")
        whole = body("MatMulInteger", given["input"], given["weight"], *zeros)
        scales = body("Mul", given["input_scale"], given["weight_scale"])
        product = body("Mul", body("Cast", whole, to=ir.DataType.FLOAT.value), scales)
    else:
        product = body("MatMul", given["input"], given["weight"])
    if "bias" in given:
        product = body("Add", product, given["bias"])
    made, start = [], 0
    for width in call.widths:
        part = body.sliced(product, start, start + width, 2)
        rows = body("Reshape", part, body.constant([0, 0, call.heads, width // call.heads]))
        made.append(body("Transpose", rows, perm=[0, 2, 1, 3]))
        start += width
    return made


def _filter(body: _Body, call: Call, mask: ir.Value, states: ir.Value, keys: ir.Value) -> ir.Value:
    """What a mask adds to the scores ``[B, n, S, T]``."""
    if call.mask == 1:
        seen = _within(body, mask, body.size(states, 0), body.size(keys, 2))
    else:
        seen = body("Greater", mask, body.constant(0, ir.DataType.INT32))
        if "past" in call.names:  # its keys are then as many as past and new ones, whatever the model calls that
            positions = _range(body, body.constant([0]), body.size(keys, 2))
            seen = body("Gather", seen, positions, axis=call.mask - 1)
    seen = body.unsqueezed(seen, *([1] if call.mask == 3 else [1, 2]))
    return body("Where", seen, body.constant(0.0, call.dtype), body.constant(call.filtered, call.dtype))


def _within(body: _Body, ends: ir.Value, rows: ir.Value, keys: ir.Value) -> ir.Value:
    """Which keys ``[B, T]`` lie before the end of their row, and not before its start where a second half says one."""
    bounds = body("Concat", ends, body("Expand", body.constant(0, ir.DataType.INT32), rows), axis=0)
    positions = _range(body, body.constant([0]), keys, ir.DataType.INT32)
    first = body.sliced(bounds, body.constant([0]), rows, 0)
    second = body.sliced(bounds, rows, body("Add", rows, rows), 0)
    before = body("Less", positions, body.unsqueezed(first, 1))
    return body("And", before, body("Not", body("Less", positions, body.unsqueezed(second, 1))))


def _later(body: _Body, queries: ir.Value, keys: ir.Value) -> ir.Value:
    """Which keys ``[S, T]`` come after a query; the queries are the last of them."""
    count, total = body.size(queries, 2), body.size(keys, 2)
    past = body("Sub", total, count)
    rows = body.unsqueezed(_range(body, past, total), 1)
    return body("Greater", _range(body, body.constant([0]), total), rows)


def _range(body: _Body, start: ir.Value, end: ir.Value, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
    """The whole numbers from a start to an end, which are tensors of one element."""
    ends = [body("Reshape", each, body.constant([])) for each in (start, end)]
    made = body("Range", *ends, body.constant(1))
    return made if dtype is ir.DataType.INT64 else body("Cast", made, to=dtype.value)


__all__ = ["PROJECTED", "Call", "definition", "is_projected"]
