"""ONNX Runtime's ``MultiHeadAttention`` with more than three tensors to compare, defined in operators of the standard.

What ONNX Runtime's optimiser makes of decoders and of diffusion models: the bias of the projections inside the call,
past keys and values, operands packed into one tensor. What :mod:`attncompile.frontends.onnx_scores` says is done with::

    query [B, S, n·D]                key [B, L, n·D], value [B, L, n·E]        or both [B, n, L, D], as a cache has them
    query [B, S, n, 3, D]            queries, keys and values in one
    query [B, S, n·D]                key [B, L, n, 2, D]: keys and values in one
    bias  [2·n·D + n·E]              added to queries, keys and values before they are heads

Rounding apart, this is the kernel of ONNX Runtime's CPU (contrib_ops/cpu/bert/multihead_attention.cc), with which the
tests compare it; packed operands, which only its CUDA kernels take, by the documentation of the operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from attncompile.frontends.graph import Info
from attncompile.frontends.onnx_builder import AttentionRefused
from attncompile.frontends.onnx_scores import FLOATS, Body, Operands, Rules, attended, number_of, values_of
from attncompile.ir.expr import Const

MULTI_HEAD = "MultiHeadAttention"
INPUTS = (
    "query", "key", "value", "bias", "key_padding_mask", "attention_bias", "past_key", "past_value",
    "past_sequence_length", "cache_indirection",
)  # fmt: skip


def is_plain(call: ir.Node, infos: Mapping[str, Info]) -> bool:
    """Whether a call compares three tensors under a mask ``[B, T]`` and makes nothing but the attention of them."""
    given = {name for name, value in zip(INPUTS, call.inputs, strict=False) if value is not None and value.name}
    if not {"query", "key", "value"} <= given <= {"query", "key", "value", "key_padding_mask", "attention_bias"}:
        return False
    if any(output.uses() or output.is_graph_output() for output in call.outputs[1:]):
        return False
    mask = infos.get(call.inputs[4].name or "") if "key_padding_mask" in given and call.inputs[4] is not None else None
    return mask is None or len(mask.shape) == 2


@dataclass(frozen=True)
class Call:
    """What a call says.

    Attributes:
        axes: how many queries, keys and values have; 0 for those that are packed with another.
        outputs: how many the call has.
        channels: of a head of queries and keys, and of values.
        rules: of its attention.
    """

    axes: tuple[int, int, int]
    outputs: int
    channels: tuple[int, int]
    rules: Rules

    @classmethod
    def of(cls, call: ir.Node, infos: Mapping[str, Info]) -> Call:
        """Read a call. Raises AttentionRefused for one that is not defined."""
        values = values_of(call, INPUTS)
        for name in ("past_sequence_length", "cache_indirection"):
            if name in values:
                raise AttentionRefused(f"it updates a cache in place ({name})")
        if len(call.outputs) > 3 and (call.outputs[3].uses() or call.outputs[3].is_graph_output()):
            raise AttentionRefused(f"its output {call.outputs[3].name} is read, too")
        if ("past_key" in values) != ("past_value" in values) or "query" not in values:
            raise AttentionRefused("it has a past key and no past value, or no query, or the other way round")
        heads = int(number_of(call, "num_heads", 0))
        if heads <= 0:
            raise AttentionRefused(f"its number of heads is {heads}")
        axes, channels = _operands(values, infos, heads)
        if "bias" in values and axes != (3, 3, 3):
            raise AttentionRefused("it has a bias for operands that are packed, or heads already")
        if "past_key" in values and axes[1] == 4:
            raise AttentionRefused("it has past keys beside keys that are a cache")
        if "past_key" in values and len(call.outputs) < 3:
            # the kernel reads past keys from what it writes there, and without that beyond the end of the new ones
            raise AttentionRefused("it has past keys, and no outputs for the present ones")
        _require_causal_squares(call, values, infos)
        widths = heads * channels[0], heads * channels[1]
        rules = Rules.of(call, heads, widths, (values["query"], FLOATS), values.get("key_padding_mask"), infos)
        if rules.mask == 1:
            _require_row_lengths(values, infos)
        return cls(axes, len(call.outputs), channels, rules)

    def written(self, body: Body, given: Mapping[str, ir.Value]) -> list[ir.Value]:
        """The call's outputs: the attention, and all keys and values ``[B, n, T, D]``."""
        query, key, value = self._heads(body, given)
        past = (given["past_key"], given["past_value"]) if "past_key" in given else None
        operands = Operands(query, key, value, past, given.get("key_padding_mask"), given.get("attention_bias"))
        made = attended(body, self.rules, operands)
        outputs = [value if value.producer() is not None else body("Identity", value) for value in made]
        outputs += [body("Identity", outputs[0])] * (self.outputs - len(outputs))  # one that nobody reads
        return outputs[: self.outputs]

    def _heads(self, body: Body, given: Mapping[str, ir.Value]) -> list[ir.Value]:
        """Queries, keys and values ``[B, n, S, D]``."""
        made, start = [], 0
        for name, axes, channels in zip(INPUTS, self.axes, (*self.channels[:1], *self.channels), strict=False):
            if axes == 4:
                made.append(given[name])
            elif axes == 3:
                rows, width = given[name], self.rules.heads * channels
                if "bias" in given:
                    rows = body("Add", rows, body.sliced(given["bias"], start, start + width, 0))
                    start += width
                made.append(body.split(rows, self.rules.heads, channels))
            elif axes == 5:
                first = len(made)
                for number in range(3 - first):
                    part = body("Gather", given[name], body.constant(number), axis=3)
                    made.append(body("Transpose", part, perm=[0, 2, 1, 3]))
        return made


def _require_causal_squares(call: ir.Node, values: Mapping[str, ir.Value], infos: Mapping[str, Info]) -> None:
    """Raises AttentionRefused for a causal call over keys of another sequence, of which the kernel makes what it likes:
    one query sees all keys, and several see some that come later.
    """
    if not number_of(call, "unidirectional", 0) or "key" not in values:
        return
    query, key = (infos.get(values[name].name or "") for name in ("query", "key"))
    if query is None or key is None or query.shape[1] != key.shape[-2 if len(key.shape) == 4 else 1]:
        raise AttentionRefused("it is causal, and its queries and keys are not known to be equally many")


def _require_row_lengths(values: Mapping[str, ir.Value], infos: Mapping[str, Info]) -> None:
    """Raises AttentionRefused for a mask of one axis that is not known to have one number for each row: kernels for
    CUDA also take lengths and starts one behind the other, ``[3·B + 2]``.
    """
    mask, query = (infos[values[name].name or ""] for name in ("key_padding_mask", "query"))
    if mask.shape[0] != query.shape[0]:
        raise AttentionRefused(f"its mask has {mask.shape[0]} numbers for {query.shape[0]} rows")


def _operands(
    values: Mapping[str, ir.Value], infos: Mapping[str, Info], heads: int
) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """How many axes queries, keys and values have, and the channels of a head of keys, and of values."""
    shapes = {}
    for name in INPUTS[:3]:
        if name in values:
            info = infos.get(values[name].name or "")
            if info is None:
                raise AttentionRefused(f"the shape of its {name} is not known")
            shapes[name] = info.shape
    axes = len(shapes["query"]), len(shapes.get("key", ())), len(shapes.get("value", ()))
    if axes not in _LAYOUTS:
        raise AttentionRefused(f"its operands have {', '.join(map(str, axes))} axes")
    channels = []
    for name, shape in shapes.items():
        last = shape[-1]
        count = 1 if len(shape) > 3 else heads
        if not isinstance(last, Const) or int(last.value) % count:
            raise AttentionRefused(f"the channels of its {name} ({last}) are no multiple of {heads} heads")
        channels.append(int(last.value) // count)
    if "key" in shapes and channels[0] != channels[1]:
        raise AttentionRefused(f"its queries have {channels[0]} channels a head, its keys {channels[1]}")
    return axes, (channels[0], channels[-1])


_LAYOUTS = ((3, 3, 3), (3, 4, 4), (3, 5, 0), (5, 0, 0))


__all__ = ["INPUTS", "MULTI_HEAD", "Call", "is_plain"]
