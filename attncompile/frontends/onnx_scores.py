"""Attention behind a call's queries, keys and values, spelled out in operators of the ONNX standard.

With ``n`` heads of ``D`` channels, ``S`` queries at ``i`` and ``T = P + L`` keys at ``j``, of which ``P`` are past::

    s = scale · q·k + filter(mask) + attention_bias,   the lowest number where unidirectional and j > P + i
    y = softmax(s) · v

``filter`` is 0 where the mask says that a key is seen, and ``mask_filter_value`` elsewhere. A mask is ``[B, T]`` or
``[B, S, T]`` (positive: seen), the number of seen keys of each row ``[B]``, or these and then the first seen ones
``[2B]``; ``[B, 1]`` hides nothing. Rounding apart, this is what kernels of ONNX Runtime's CPU have in common
(contrib_ops/cpu/bert/attention_cpu_base.h); the tests compare it with them.
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
from attncompile.ir.expr import ONE
from attncompile.ir.types import DTYPES

AXES_INPUT_OPSET = 13
"""The opset from which on ``Unsqueeze`` takes its axes as an input."""
LOWEST_OPSET = 11
"""The opset that brought ``Range``; the definitions are written in operators of this one and later."""

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Rules:
    """What a call says of its attention.

    Attributes:
        heads: how many. width: channels of all heads of the values.
        scale: factor of the scores. filtered: what a hidden key's score gets. causal: whether later keys are hidden.
        dtype: of its floats. mask: how many axes its mask has, 0 where it hides nothing.
    """

    heads: int
    width: int
    scale: float
    filtered: float
    causal: bool
    dtype: ir.DataType
    mask: int

    @classmethod
    def of(
        cls, call: ir.Node, heads: int, widths: tuple[int, int], floats: tuple[ir.Value, Sequence[ir.DataType]],
        mask: ir.Value | None, infos: Mapping[str, Info],
    ) -> Rules:  # fmt: skip
        """Read the attributes of a call.

        Args:
            call: the call. heads: how many. widths: channels of all heads of queries, and of values.
            floats: the input whose type the call's numbers have, and the types that it may have.
            mask: which keys are seen. infos: shapes and types of the call's inputs.

        Raises:
            AttentionRefused: for a call that is not defined.
        """
        scale = float(number_of(call, "scale", 0) or 1.0 / math.sqrt(widths[0] // heads))
        filtered, causal = number_of(call, "mask_filter_value", -10000.0), number_of(call, "unidirectional", 0)
        return cls(
            heads, widths[1], scale, float(filtered), bool(causal), floats_of(*floats, infos),
            _axes_of_mask(mask, infos),
        )  # fmt: skip


def number_of(call: ir.Node, name: str, default: float) -> float:
    """An attribute that is a number. Raises AttentionRefused where it is something else."""
    attribute = call.attributes.get(name)
    if attribute is None:
        return default
    if attribute.type not in (ir.AttributeType.INT, ir.AttributeType.FLOAT) or attribute.is_ref():
        raise AttentionRefused(f"its attribute {name} is no number")
    return float(attribute.value) if attribute.type is ir.AttributeType.FLOAT else int(attribute.value)


def values_of(call: ir.Node, names: Sequence[str]) -> dict[str, ir.Value]:
    """The inputs that a call has, by the name of their place. Raises AttentionRefused for more than there are names."""
    if len(call.inputs) > len(names):
        raise AttentionRefused(f"it has {len(call.inputs)} inputs and {len(call.outputs)} outputs")
    return {n: v for n, v in zip(names, call.inputs, strict=False) if v is not None and v.name}


def floats_of(value: ir.Value, allowed: Sequence[ir.DataType], infos: Mapping[str, Info]) -> ir.DataType:
    """The type of a call's numbers, which is that of one of its inputs. Raises AttentionRefused for one not allowed."""
    info = infos.get(value.name or "")
    found = next((dtype for dtype in allowed if info is not None and DTYPE_NAMES[dtype] == info.dtype), None)
    if found is None:
        names = " or ".join(DTYPE_NAMES[dtype] for dtype in allowed)
        kind = info.dtype if info is not None else "of unknown type"
        raise AttentionRefused(f"{value.name} is {kind}, where it should be {names}")
    return found


def _axes_of_mask(mask: ir.Value | None, infos: Mapping[str, Info]) -> int:
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
class Body:
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

    def constant(self, value: float | Sequence[float], dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        """A scalar, or a tensor of one axis."""
        return self("Constant", value=ir.tensor(np.array(value, dtype.numpy()), dtype))

    def unsqueezed(self, value: ir.Value, *axes: int) -> ir.Value:
        """The value with axes of size 1 at these places."""
        if self.opset < AXES_INPUT_OPSET:
            return self("Unsqueeze", value, axes=list(axes))
        return self("Unsqueeze", value, self.constant(axes))

    def sliced(self, value: ir.Value, start: ir.Value | int, end: ir.Value | int, axis: int) -> ir.Value:
        """A part of an axis."""
        ends = [self.constant([each]) if isinstance(each, int) else each for each in (start, end)]
        return self("Slice", value, *ends, self.constant([axis]))

    def split(self, rows: ir.Value, heads: int, channels: int) -> ir.Value:
        """``[B, S, n·D]`` as ``[B, n, S, D]``."""
        return self("Transpose", self("Reshape", rows, self.constant([0, 0, heads, channels])), perm=[0, 2, 1, 3])

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """The size of an axis, as a tensor of one axis."""
        return self("Gather", self("Shape", value), self.constant([axis]), axis=0)

    def range(self, start: ir.Value, end: ir.Value, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        """The whole numbers from a start to an end, which are tensors of one element."""
        ends = [self("Reshape", each, self.constant([])) for each in (start, end)]
        made = self("Range", *ends, self.constant(1))
        return made if dtype is ir.DataType.INT64 else self("Cast", made, to=dtype.value)


@dataclass(frozen=True)
class Operands:
    """What the attention of a call computes with.

    Attributes:
        query, key, value: ``[B, n, S, D]``, the last two without what is past.
        past: keys and values ``[B, n, P, D]`` of the calls before.
        mask: which keys are seen. bias: what is added to the scores ``[B, n, S, T]``, with axes of 1.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    past: tuple[ir.Value, ir.Value] | None = None
    mask: ir.Value | None = None
    bias: ir.Value | None = None


def attended(body: Body, rules: Rules, given: Operands) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The attention ``[B, S, n·E]``, and all keys and values ``[B, n, T, D]``."""
    q, k, v = given.query, given.key, given.value
    if given.past is not None:
        k, v = (body("Concat", old, new, axis=2) for old, new in zip(given.past, (k, v), strict=True))
    scores = body("MatMul", q, body("Transpose", k, perm=[0, 1, 3, 2]))
    scores = body("Mul", scores, body.constant(rules.scale, rules.dtype))
    if given.mask is not None and rules.mask:
        scores = body("Add", scores, _filter(body, rules, given, k))
    if given.bias is not None:
        scores = body("Add", scores, _over_keys(body, given, given.bias, 3, k))
    if rules.causal:
        lowest = torch.finfo(DTYPES[DTYPE_NAMES[rules.dtype]]).min
        scores = body("Where", _later(body, given, k), body.constant(lowest, rules.dtype), scores)
    rows = body("Transpose", body("MatMul", body("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
    return body("Reshape", rows, body.constant([0, 0, rules.width])), k, v


def _filter(body: Body, rules: Rules, given: Operands, keys: ir.Value) -> ir.Value:
    """What a mask adds to the scores ``[B, n, S, T]``."""
    assert given.mask is not None
    if rules.mask == 1:
        seen = _within(body, given.mask, body.size(given.query, 0), body.size(keys, 2))
    else:
        seen = body("Greater", given.mask, body.constant(0, ir.DataType.INT32))
        seen = _over_keys(body, given, seen, rules.mask - 1, keys)
    seen = body.unsqueezed(seen, *([1] if rules.mask == 3 else [1, 2]))
    return body("Where", seen, body.constant(0.0, rules.dtype), body.constant(rules.filtered, rules.dtype))


def _over_keys(body: Body, given: Operands, value: ir.Value, axis: int, keys: ir.Value) -> ir.Value:
    """A tensor whose axis of keys has, with past ones, their total number, whatever the model calls that."""
    if given.past is None:
        return value
    return body("Gather", value, body.range(body.constant([0]), body.size(keys, 2)), axis=axis)


def _within(body: Body, ends: ir.Value, rows: ir.Value, keys: ir.Value) -> ir.Value:
    """Which keys ``[B, T]`` lie before the end of their row, and not before its start where a second half says one."""
    bounds = body("Concat", ends, body("Expand", body.constant(0, ir.DataType.INT32), rows), axis=0)
    positions = body.range(body.constant([0]), keys, ir.DataType.INT32)
    first = body.sliced(bounds, body.constant([0]), rows, 0)
    second = body.sliced(bounds, rows, body("Add", rows, rows), 0)
    before = body("Less", positions, body.unsqueezed(first, 1))
    return body("And", before, body("Not", body("Less", positions, body.unsqueezed(second, 1))))


def _later(body: Body, given: Operands, keys: ir.Value) -> ir.Value:
    """Which keys ``[S, T]`` come after a query; the first query is where the first new key is."""
    total = body.size(keys, 2)
    past = body("Sub", total, body.size(given.key, 2))
    rows = body.unsqueezed(body.range(past, body("Add", past, body.size(given.query, 2))), 1)
    return body("Greater", body.range(body.constant([0]), total), rows)


__all__ = ["FLOATS", "LOWEST_OPSET", "Body", "Operands", "Rules", "attended", "floats_of", "number_of", "values_of"]
