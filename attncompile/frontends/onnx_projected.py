"""ONNX Runtime's attention calls that hold their projections, defined in operators of the standard.

``Attention`` and ``QAttention`` of com.microsoft are what ONNX Runtime's optimiser for transformers and its quantiser
make of BERT-like models: one product with the weights of queries, keys and values side by side, in floats or in whole
numbers, and the attention of its three parts, as :mod:`attncompile.frontends.onnx_scores` has it::

    Attention:   x·W + bias
    QAttention:  ((x − x_zero)·(W − W_zero)) · (x_scale · W_scale) + bias      codes; W_scale and W_zero per column, too

Rounding apart, this is the kernel of ONNX Runtime's CPU (contrib_ops/cpu/bert/attention.cc,
quantization/attention_quant.cc); the tests compare it with that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from attncompile.frontends.graph import Info
from attncompile.frontends.onnx_builder import AttentionRefused
from attncompile.frontends.onnx_scores import FLOATS, Body, Operands, Rules, attended, number_of, values_of
from attncompile.ir.expr import Const

PROJECTED = frozenset({"Attention", "QAttention"})
"""The calls of com.microsoft that are defined here."""

# fmt: off
INPUTS: Mapping[str, tuple[str, ...]] = {
    "Attention": ("input", "weight", "bias", "mask_index", "past", "attention_bias", "past_sequence_length"),
    "QAttention": ("input", "weight", "bias", "input_scale", "weight_scale", "mask_index", "input_zero_point",
                   "weight_zero_point", "past"),
}
# fmt: on


@dataclass(frozen=True)
class Call:
    """What a call says.

    Attributes:
        operator: its name. names: of the inputs that it has. outputs: how many it has.
        widths: channels of all heads of queries, keys and values. rules: of its attention.
    """

    operator: str
    names: tuple[str, ...]
    outputs: int
    widths: tuple[int, int, int]
    rules: Rules

    @classmethod
    def of(cls, call: ir.Node, infos: Mapping[str, Info]) -> Call:
        """Read a call. Raises AttentionRefused for one that is not defined."""
        known, quantised = INPUTS[call.op_type], call.op_type == "QAttention"
        values = values_of(call, known)
        for name in ("do_rotary", "past_present_share_buffer"):
            if number_of(call, name, 0):
                raise AttentionRefused(f"its attribute {name} is set")
        if "past_sequence_length" in values:
            raise AttentionRefused("it updates a cache in place (past_sequence_length)")
        for name in known[: 5 if quantised else 2]:
            if name not in values:
                raise AttentionRefused(f"it has no {name}")
        heads = int(number_of(call, "num_heads", 0))
        widths = _widths(call, infos.get(values["weight"].name or ""), heads)
        # sums of whole numbers are beyond float16
        floats = values["input_scale" if quantised else "weight"], FLOATS[:1] if quantised else FLOATS
        rules = Rules.of(call, heads, (widths[0], widths[2]), floats, values.get("mask_index"), infos)
        return cls(call.op_type, tuple(values), len(call.outputs), widths, rules)

    def written(self, body: Body, given: Mapping[str, ir.Value]) -> list[ir.Value]:
        """The call's outputs: the attention and, where it has a second one, all keys and values ``[2, B, n, T, D]``."""
        past = None
        if "past" in given:
            keys, values = (body("Gather", given["past"], body.constant(number), axis=0) for number in (0, 1))
            past = keys, values
        query, key, value = _projections(body, self, given)
        operands = Operands(query, key, value, past, given.get("mask_index"), given.get("attention_bias"))
        out, keys, values = attended(body, self.rules, operands)
        if self.outputs == 1:
            return [out]
        return [out, body("Concat", body.unsqueezed(keys, 0), body.unsqueezed(values, 0), axis=0)]


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


def _projections(body: Body, call: Call, given: Mapping[str, ir.Value]) -> list[ir.Value]:
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
    made, start, heads = [], 0, call.rules.heads
    for width in call.widths:
        made.append(body.split(body.sliced(product, start, start + width, 2), heads, width // heads))
        start += width
    return made


__all__ = ["INPUTS", "PROJECTED", "Call"]
