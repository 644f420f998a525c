"""ONNX Runtime's ``GroupQueryAttention``, defined in operators of the standard.

What the model builder of onnxruntime-genai writes for language models, and this compiler too: causal attention of ``n``
query heads that share ``G`` heads of keys, behind a cache, with rotary positions inside the call. Row ``b`` has
``total[b] = seqlens_k[b] + 1`` keys, of which the ``S`` queries brought the last ones::

    query [B, S, n·D], key and value [B, S, G·D]          or query [B, S, (n + 2·G)·D], all in one
    past[b]  = max(0, total[b] − S)                       0 in a prompt, whatever the cache has room for
    own[b,i] = past[b] + i                                where query i is among the keys
    key j    = past_key[b, :, j]  for j < past[b],        the new key j − past[b] behind these
    s        = scale · q·k;  softcap · tanh(s / softcap);  + attention_bias
    seen       j ≤ own[b, i],  j > own[b, i] − local_window_size;   j < total[b] where causal = 0
    y        = softmax(s) · v, with one more logit in the sum for a sink of each head, or 0 for smooth_softmax

Rotary angles are those of ``own``, or of ``position_ids``, of which a prompt reads the first element alone and counts
on from there. All keys and values are outputs, of as many positions as the past ones have, or
``total_sequence_length`` if that is more.

This is the kernel of ONNX Runtime's CPU (contrib_ops/cpu/bert/group_query_attention.cc) but for rounding, with which
the tests compare it, and for what it leaves to chance: the outputs of queries of a padded prompt behind their row's
length, and keys and values behind that. Here they are what the formulas say for the first, and repeat the last new key
for the second, so that nothing that was never written is multiplied by a weight of zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from attncompile.frontends.graph import Info
from attncompile.frontends.onnx_builder import AttentionRefused
from attncompile.frontends.onnx_cache import Cache, Positions, joined, positions_of, within
from attncompile.frontends.onnx_scores import FLOATS, Body, floats_of, number_of, values_of
from attncompile.frontends.onnx_turns import Turn, turned
from attncompile.ir.expr import Const

GROUP_QUERY = "GroupQueryAttention"
INPUTS = (
    "query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache",
    "position_ids", "attention_bias", "head_sink", "k_scale", "v_scale", "q_norm_weight", "k_norm_weight",
)  # fmt: skip
OPSET = 12
"""The operator set that brought ``GatherND`` behind common axes, and ``Max`` of whole numbers."""

_NEEDED = ("query", "seqlens_k", "total_sequence_length")
_REFUSED = {
    "k_scale": "a cache in integers",
    "v_scale": "a cache in integers",
    "q_norm_weight": "a norm of queries and keys, which ONNX Runtime's CPU does not know",
    "k_norm_weight": "a norm of queries and keys, which ONNX Runtime's CPU does not know",
}
_PAIRS = (("key", "value"), ("past_key", "past_value"), ("cos_cache", "sin_cache"))


@dataclass(frozen=True)
class Call:
    """What a call says.

    Attributes:
        heads, groups: of queries, and of keys. channels: of each.
        outputs: how many the call has. packed: whether queries, keys and values are one tensor.
        scale: of the scores. cap: their soft cap, 0 without one. window: keys that a query sees, ``None`` for all.
        causal: whether later keys are hidden. smooth: whether a logit 0 joins the sum.
        turn: how queries and keys are turned by their positions. dtype: of its floats.
    """

    heads: int
    groups: int
    channels: int
    outputs: int
    packed: bool
    scale: float
    cap: float
    window: int | None
    causal: bool
    smooth: bool
    turn: Turn | None
    dtype: ir.DataType

    @classmethod
    def of(cls, call: ir.Node, infos: Mapping[str, Info]) -> Call:
        """Read a call. Raises AttentionRefused for one that is not defined."""
        values = values_of(call, INPUTS)
        _require_defined(call, values)
        heads, groups = (int(number_of(call, name, 0)) for name in ("num_heads", "kv_num_heads"))
        channels = _channels(values, infos, heads, groups)
        window, causal = int(number_of(call, "local_window_size", -1)), bool(number_of(call, "causal", 1))
        if window == 0:
            raise AttentionRefused("it has a window of no keys (local_window_size = 0)")
        if window > 0 and not causal:
            raise AttentionRefused("it has a window and is not causal")
        return cls(
            heads, groups, channels, len(call.outputs), "key" not in values,
            scale=float(number_of(call, "scale", 0) or 1.0 / math.sqrt(channels)),
            cap=float(number_of(call, "softcap", 0)), window=window if window > 0 else None, causal=causal,
            smooth=number_of(call, "smooth_softmax", 0) > 0, turn=_turn(call, values, infos, channels),
            dtype=floats_of(values["query"], FLOATS, infos),
        )  # fmt: skip

    def written(self, body: Body, given: Mapping[str, ir.Value]) -> list[ir.Value]:
        """The call's outputs: the attention, and all keys and values ``[B, G, T, D]``."""
        query, key, value = self._heads(body, given)
        cache = Cache.of(body, given)
        positions = positions_of(body, cache, query)
        if self.turn is not None:
            query, key = (turned(body, self.turn, each, positions, cache, given) for each in (query, key))
        present = [key, value]
        if cache.past is not None:
            present = joined(body, cache, positions, present)
        key, value = within(body, cache, present) if cache.past is not None else present
        weights = self._weights(body, query, key, positions, given)
        rows = body("MatMul", weights, self._shared(body, value))
        width = body.constant([0, 0, self.heads * self.channels])
        out = body("Reshape", body("Transpose", rows, perm=[0, 2, 1, 3]), width)
        outputs = [out, *(body("Identity", each) for each in present), body("Identity", out)]  # the last nobody reads
        return outputs[: self.outputs]

    def _heads(self, body: Body, given: Mapping[str, ir.Value]) -> list[ir.Value]:
        """Queries ``[B, n, S, D]``, keys and values ``[B, G, S, D]``."""
        counts = (self.heads, self.groups, self.groups)
        if not self.packed:
            return [body.split(given[name], n, self.channels) for name, n in zip(INPUTS, counts, strict=False)]
        made, start = [], 0
        for count in counts:
            end = start + count * self.channels
            made.append(body.split(body.sliced(given["query"], start, end, 2), count, self.channels))
            start = end
        return made

    def _shared(self, body: Body, keys: ir.Value) -> ir.Value:
        """Keys or values ``[B, G, T, D]`` for every query head ``[B, n, T, D]``."""
        shares = self.heads // self.groups
        if shares == 1:
            return keys
        spread = body("Expand", body.unsqueezed(keys, 2), body.constant([1, 1, shares, 1, 1]))
        return body("Reshape", spread, body.constant([0, self.heads, -1, self.channels]))

    def _weights(
        self, body: Body, query: ir.Value, keys: ir.Value, positions: Positions, given: Mapping[str, ir.Value]
    ) -> ir.Value:
        """The weights ``[B, n, S, T]``."""
        scores = body("MatMul", query, body("Transpose", self._shared(body, keys), perm=[0, 1, 3, 2]))
        scores = body("Mul", scores, body.constant(self.scale, self.dtype))
        if self.cap:
            cap = body.constant(self.cap, self.dtype)
            scores = body("Mul", body("Tanh", body("Div", scores, cap)), cap)
        if "attention_bias" in given:
            bias, places = given["attention_bias"], body.range(body.constant([0]), body.size(keys, 2))
            scores = body("Add", scores, body("Gather", bias, places, axis=3))  # so many, whatever the model calls that
        seen = body.unsqueezed(self._seen(body, keys, positions), 1)
        scores = body("Where", seen, scores, body.constant(-math.inf, self.dtype))
        if self.smooth or "head_sink" in given:
            return self._with_sink(body, scores, given.get("head_sink"))
        weights = body("Softmax", scores, axis=-1)
        if self.cap and "attention_bias" in given:
            return weights  # of a row whose biases are all −inf the kernel then makes NaN
        return body("Where", body("IsNaN", weights), body.constant(0.0, self.dtype), weights)

    def _seen(self, body: Body, keys: ir.Value, positions: Positions) -> ir.Value:
        """Which keys ``[B, S, T]`` a query sees."""
        places = body.range(body.constant([0]), body.size(keys, 2))
        if not self.causal:
            return body.unsqueezed(body("Not", body("Greater", places, body.unsqueezed(positions.last, 1))), 1)
        own = body.unsqueezed(positions.own, 2)
        seen = body("Not", body("Greater", places, own))
        if self.window is None:
            return seen
        return body("And", seen, body("Greater", places, body("Sub", own, body.constant(self.window))))

    def _with_sink(self, body: Body, scores: ir.Value, sink: ir.Value | None) -> ir.Value:
        """The weights of scores ``[B, n, S, T]``, and of a logit that no value belongs to."""
        logit = body.constant([0.0], self.dtype) if sink is None else sink
        logit = body("Reshape", logit, body.constant([1, -1, 1, 1]))
        sizes = [body.size(scores, 0), body.constant([self.heads]), body.size(scores, 2), body.constant([1])]
        column = body("Expand", logit, body("Concat", *sizes, axis=0))
        return body.sliced(body("Softmax", body("Concat", scores, column, axis=-1), axis=-1), 0, -1, 3)


def _require_defined(call: ir.Node, values: Mapping[str, ir.Value]) -> None:
    """Raises AttentionRefused for inputs, outputs and attributes without a definition."""
    for name in _NEEDED:
        if name not in values:
            raise AttentionRefused(f"it has no {name}")
    for name, what in _REFUSED.items():
        if name in values:
            raise AttentionRefused(f"it has {what} ({name})")
    for name in ("k_quant_type", "v_quant_type"):
        attribute = call.attributes.get(name)
        if attribute is not None and attribute.value != "NONE":
            raise AttentionRefused(f"its attribute {name} says that its cache is in integers")
    for name in ("kv_cache_bit_width", "qk_output", "sliding_window_cache"):
        if number_of(call, name, 0):
            raise AttentionRefused(f"its attribute {name} is set")
    for one, other in _PAIRS:
        if (one in values) != (other in values):
            present, missing = (one, other) if one in values else (other, one)
            raise AttentionRefused(f"it has {present} and no {missing}")
    if len(call.outputs) > 3 and (call.outputs[3].uses() or call.outputs[3].is_graph_output()):
        raise AttentionRefused(f"its output {call.outputs[3].name} is read, too")
    if "past_key" in values and not _has_present(call):
        raise AttentionRefused("it has past keys, and no outputs for the present ones")


def _has_present(call: ir.Node) -> bool:
    """Whether all keys and values are outputs. Without them the kernel reads past keys from memory of its own."""
    return len(call.outputs) > 2 and all(output.name for output in call.outputs[1:3])


def _channels(values: Mapping[str, ir.Value], infos: Mapping[str, Info], heads: int, groups: int) -> int:
    """The channels of a head. Raises AttentionRefused where they are no whole number, or not those of the keys."""
    if heads <= 0 or groups <= 0 or heads % groups:
        raise AttentionRefused(f"it has {heads} query heads, which {groups} heads of keys do not share evenly")
    packed, found = "key" not in values, set[int]()
    for name, count in zip(INPUTS, (heads + 2 * groups if packed else heads, groups, groups), strict=False):
        if name not in values:
            continue
        info = infos.get(values[name].name or "")
        if info is None:
            raise AttentionRefused(f"the shape of its {name} is not known")
        if len(info.shape) != 3:
            raise AttentionRefused(f"its {name} has {len(info.shape)} axes, where it should have 3")
        last = info.shape[2]
        if not isinstance(last, Const) or int(last.value) % count:
            raise AttentionRefused(f"the channels of its {name} ({last}) are no multiple of {count} heads")
        found.add(int(last.value) // count)
    if len(found) > 1:
        raise AttentionRefused(f"its queries, keys and values have {sorted(found)} channels a head")
    return found.pop()


def _turn(call: ir.Node, values: Mapping[str, ir.Value], infos: Mapping[str, Info], channels: int) -> Turn | None:
    """How a call turns queries and keys, ``None`` where it does not. Raises AttentionRefused for unknown angles."""
    if not number_of(call, "do_rotary", 0):
        return None
    if "cos_cache" not in values:
        raise AttentionRefused("its attribute do_rotary is set, and it has no angles (cos_cache, sin_cache)")
    info = infos.get(values["cos_cache"].name or "")
    half = info.shape[-1] if info is not None and len(info.shape) == 2 else None
    if not isinstance(half, Const) or not 0 < 2 * int(half.value) <= channels:
        raise AttentionRefused(f"its angles are of {half} channels, where a head has {channels}")
    return Turn(channels, int(half.value), bool(number_of(call, "rotary_interleaved", 0)))


__all__ = ["GROUP_QUERY", "INPUTS", "OPSET", "Call"]
