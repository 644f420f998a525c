"""What is tried of ``com.microsoft.GroupQueryAttention``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.onnx_capabilities.attempt import MICROSOFT, Attempt, Case, Results, attempted, draw
from benchmarks.onnx_capabilities.formulas import (
    attention,
    flat,
    heads,
    positions_visible,
    root_mean_square,
    rotary,
    tables,
)

HEADS, GROUPS = 4, 2
EPSILON = 1e-6
BIAS_SHAPES = {
    "[1, 1, I, J]": (False, False),
    "[1, H, I, J]": (False, True),
    "[B, 1, I, J]": (True, False),
    "[B, H, I, J]": (True, True),
}


def call(
    dtype: torch.dtype,
    length: int,
    *,
    batch: int = 2,
    past: int = 0,
    queries: int = 0,
    channels: int = 16,
    value_channels: int = 0,
    groups: int = GROUPS,
    room: int = 0,
    shared: bool = False,
    ragged: bool = False,
    scale: float | None = None,
    cap: float = 0.0,
    window: int = 0,
    sink: bool = False,
    smooth: bool = False,
    bias: str = "",
    empty: float = 0.0,
    holes: float = 0.0,
    without_past: bool = False,
    turned: str = "",
    positions: bool = False,
    packed: bool = False,
    norm: bool = False,
    quantised: str = "",
    causal: bool = True,
    tap: int = 0,
) -> Case:
    """One call.

    Args:
        dtype: of the operands; length: queries, or keys that are cached where ``past`` is set.
        past: 1 for a cache of ``length`` keys; queries: behind it.
        room: further positions of the cache's buffer behind what is cached; shared: written in place.
        ragged: rows of different lengths, padded on the right.
        smooth: a logit 0 more in the normaliser; sink: one of each head.
        bias: shape of the bias; empty: a number that all of a row's biases are; holes: a number that some are.
        without_past: a cache is given that holds nothing.
        turned: ``half`` or ``interleaved`` rotary positions; positions: given as an input.
        quantised: how the cache is, such as ``int8 PER_TENSOR``.
        tap: which stage of the map is a result, 1 before the softmax, 2 after it.
    """
    new = queries or (1 if past else length)
    before = length if past else 0
    total = before + new
    wide = value_channels or channels
    q = draw("query", batch, new, HEADS * channels, dtype=dtype, scale=2.0)
    k = draw("key", batch, new, groups * channels, dtype=dtype)
    v = draw("value", batch, new, groups * wide, dtype=dtype)
    cached = [
        draw(f"past {side}", batch, groups, before, size, dtype=dtype) for side, size in (("k", channels), ("v", wide))
    ]
    counts = torch.tensor([total, *([max(1, total // 2)] if ragged and batch > 1 else [total] * (batch - 1))])
    added = _bias(bias, batch, new, total, dtype, empty, holes) if bias else None
    sinks = draw("sink", HEADS, dtype=dtype).abs() + 6 if sink else None
    cos, sin = (table.to(dtype) for table in tables(total + 3, channels))
    ids = torch.arange(new)[None].repeat(batch, 1) * 2 % (total + 3) if positions else None
    weights = [1 + 0.5 * draw(f"norm {side}", channels, dtype=dtype) for side in "qk"] if norm else [None, None]
    scales = _scales(quantised, groups, channels)
    stored = [_stored(side, scales, number, quantised) for number, side in enumerate(cached)] if quantised else cached
    buffers = [torch.cat([side, side.new_zeros(batch, groups, new + room, side.shape[-1])], 2) if room else side
               for side in stored]  # fmt: skip

    def reference(as_dtype: torch.dtype) -> Results:
        query, key = heads(q.to(as_dtype), HEADS), heads(k.to(as_dtype), groups)
        value = heads(v.to(as_dtype), groups)
        if weights[0] is not None and weights[1] is not None:
            query = root_mean_square(query, weights[0], EPSILON)
            key = root_mean_square(key, weights[1], EPSILON)
        if turned:
            at = ids if ids is not None else (before + torch.arange(new)).expand(batch, new)
            query, key = (
                rotary(x, cos[at], sin[at], interleaved=turned == "interleaved") for x in (query, key)
            )
        if quantised:
            rounded = [_stored(x.to(torch.float32), scales, number, quantised) for number, x in enumerate((key, value))]
            whole = [
                _restored(torch.cat([old, x], 2), scales[number], quantised).to(as_dtype)
                for number, (old, x) in enumerate(zip(stored, rounded, strict=True))
            ]
            present: Results = [torch.cat([old, x], 2) for old, x in zip(stored, rounded, strict=True)]
        else:
            whole = [torch.cat([old.to(as_dtype), x], 2) for old, x in zip(cached, (key, value), strict=True)]
            present = whole
        seen = positions_visible(new, total, causal=causal, window=window)[None, None]
        if ragged:
            seen = seen & (torch.arange(total) < counts[:, None])[:, None, None]
        zero = torch.zeros(HEADS, dtype=as_dtype) if smooth else None
        made = attention(
            query, *whole, scale=scale, cap=cap, bias=added, visible=seen,
            sink=sinks if sinks is not None else zero,
        )  # fmt: skip
        out, taps = flat(made.out), [made.masked, made.weights]
        if ragged:  # what the operator gives for a row of padding is its own business
            out = out[:1]
        if room:
            present = [torch.cat([side, side.new_zeros(batch, groups, room, side.shape[-1])], 2) for side in present
                       if side is not None]  # fmt: skip
        results: list[torch.Tensor | None] = [out, *present]
        return [*results, taps[tap - 1]] if tap else results

    inputs: list[torch.Tensor | None] = [
        *([torch.cat([q, k, v], -1), None, None] if packed else [q, k, v]),
        *(buffers if past or without_past else [None, None]),
        (counts - 1).int(),
        torch.tensor(total, dtype=torch.int32),
        *([cos, sin] if turned else [None, None]),
        ids,
        added,
        sinks,
        *(scales if quantised else [None, None]),
        *weights,
    ]
    attributes: dict[str, Any] = {"num_heads": HEADS, "kv_num_heads": groups}
    optional = {
        "scale": scale, "softcap": cap, "local_window_size": window, "smooth_softmax": int(smooth),
        "do_rotary": int(bool(turned)), "rotary_interleaved": int(turned == "interleaved"), "qk_output": tap,
        "qk_norm_epsilon": EPSILON if norm else 0.0,
    }  # fmt: skip
    attributes |= {name: given for name, given in optional.items() if given}
    if not causal:
        attributes["causal"] = 0
    if quantised:
        kind, granularity = quantised.split()
        attributes |= {"k_quant_type": granularity, "v_quant_type": granularity}
        attributes["kv_cache_bit_width"] = 8 if kind == "int8" else 4
    return Case(
        inputs, attributes, reference, max(total, channels), shared={1: 3, 2: 4} if shared else {},
        judged={0: slice(0, 1)} if ragged else {},
    )  # fmt: skip


def _bias(
    shape: str, batch: int, new: int, total: int, dtype: torch.dtype, empty: float, holes: float
) -> torch.Tensor:
    by_row, by_head = BIAS_SHAPES[shape]
    made = draw("bias", batch if by_row else 1, HEADS if by_head else 1, new, total, dtype=dtype, scale=2.0)
    if empty:
        made[:, :, new // 2] = empty
    if holes:  # never the first key, which all see
        made[..., 1::3] = holes
    return made


def _scales(quantised: str, groups: int, channels: int) -> list[torch.Tensor]:
    """Scales of keys and values: one, or one of each channel."""
    largest = 127.0 if "int8" in quantised else 7.0
    if "PER_CHANNEL" in quantised:
        return [(4.0 + 0.1 * draw(f"scale {side}", 1, groups, 1, channels).abs()) / largest for side in "kv"]
    return [torch.tensor([number / largest]) for number in (4.0, 4.5)]


def _stored(x: torch.Tensor, scales: list[torch.Tensor], number: int, quantised: str) -> torch.Tensor:
    """Rounded to integers; two of four bits in a byte, the even channel in the lower half, 8 standing for 0."""
    least, largest = (-128, 127) if "int8" in quantised else (-8, 7)
    whole = torch.round(x.float() / scales[number]).clamp(least, largest)
    if "int8" in quantised:
        return whole.to(torch.int8)
    parts = (whole + 8).to(torch.uint8)
    return parts[..., 0::2] | (parts[..., 1::2] << 4)


def _restored(stored: torch.Tensor, scale: torch.Tensor, quantised: str) -> torch.Tensor:
    if "int8" in quantised:
        return stored.double() * scale.double()
    parts = torch.stack([stored & 15, stored >> 4], -1).flatten(-2)
    return (parts.double() - 8) * scale.double()


def attempts() -> Iterator[Attempt]:
    """All of them."""
    row = partial(attempted, call, MICROSOFT, "GroupQueryAttention")
    step, several = {"past": 1}, {"past": 1, "batch": 1, "queries": 40}
    yield row("a prompt")
    yield row("a prompt, rows of different lengths", ragged=True)
    yield row("as many KV heads as query heads", groups=HEADS)
    yield row("a prompt with an empty cache", without_past=True)
    yield row("a step behind a cache", past=1)
    yield row("several queries behind a cache, one row", **several)
    yield row("several queries behind a cache, several rows", past=1, queries=40)
    yield row("a cache with room behind it", past=1, room=6)
    yield row("a cache written in place", past=1, room=6, shared=True)
    yield row("channels that are no multiple of 8", channels=12)
    yield row("other value than key channels", value_channels=32)
    yield row("scale", {}, scale=0.75)
    yield row("window", {}, window=4)
    yield row("window behind a cache", step, window=4)
    yield row("window, several queries behind a cache", several, window=4)
    yield row("softcap", {}, cap=0.5)
    yield row("softcap behind a cache", step, cap=0.5)
    yield row("softcap and window", {"window": 4}, cap=0.5)
    yield row("sink of each head", {}, sink=True)
    yield row("sink of each head behind a cache", step, sink=True)
    yield row("sink of each head and window", {"window": 4}, sink=True)
    yield row("smooth_softmax", {}, smooth=True)
    for shape in BIAS_SHAPES:
        yield row(f"attention_bias {shape}", {}, bias=shape)
    for shape in BIAS_SHAPES:
        yield row(f"attention_bias {shape} behind a cache", step, bias=shape)
    yield row("attention_bias and softcap", {"cap": 0.5}, bias="[B, H, I, J]")
    yield row("attention_bias and sink", {"bias": "[B, H, I, J]"}, sink=True)
    yield row("attention_bias and window", {"bias": "[B, H, I, J]"}, window=4)
    yield row("attention_bias of -inf for some keys", {"bias": "[B, 1, I, J]"}, holes=-math.inf)
    yield row("attention_bias of -inf for a whole row: zero", {}, bias="[B, 1, I, J]", empty=-math.inf)
    hidden: dict[str, Any] = {"bias": "[B, 1, I, J]", "empty": -math.inf, "holes": -math.inf}
    yield row("attention_bias of -inf for a whole row, and sink: zero", hidden, sink=True)
    capped: dict[str, Any] = {"bias": "[B, 1, I, J]", "cap": 0.5}
    yield row("attention_bias of -2^100 for some keys, and softcap", capped, holes=-(2.0**100))
    yield row("packed query, key and value", packed=True)
    yield row("packed query, key and value behind a cache", past=1, packed=True)
    yield row("rotary", {}, turned="half")
    yield row("rotary behind a cache", step, turned="half")
    yield row("rotary, interleaved", {"turned": "half"}, turned="interleaved")
    yield row("rotary with position_ids", {"turned": "half"}, turned="half", positions=True)
    yield row("rotary with position_ids behind a cache", {"past": 1, "turned": "half"}, positions=True)
    yield row("rotary, packed", {"packed": True}, packed=True, turned="half")
    yield row("norm of queries and keys", {}, norm=True)
    yield row("norm of queries and keys, and rotary", {"turned": "half"}, turned="half", norm=True)
    yield row("norm of queries and keys behind a cache", step, norm=True)
    both: dict[str, Any] = {"past": 1, "packed": True, "turned": "half"}
    yield row("norm of queries and keys, rotary, packed, behind a cache", both, norm=True)
    yield row("causal = 0", {}, causal=False)
    for kind in ("int8 PER_TENSOR", "int8 PER_CHANNEL", "int4 PER_TENSOR", "int4 PER_CHANNEL"):
        yield row(f"cache in {kind}", past=1, quantised=kind)
    for kind in ("int8 PER_CHANNEL", "int4 PER_CHANNEL"):
        yield row(f"a prompt with an empty cache, cache in {kind}", without_past=True, quantised=kind)
        yield row(f"a step behind a cache, cache in {kind}", past=1, batch=3, quantised=kind)
        yield row(f"several queries behind a cache, one row, cache in {kind}", **several, quantised=kind)
        yield row(f"a cache written in place, cache in {kind}", past=1, room=6, shared=True, quantised=kind)
        narrow: dict[str, Any] = {**several, "quantised": kind}
        yield row(f"window, cache in {kind}", narrow, window=4)
        yield row(f"softcap, cache in {kind}", narrow, cap=0.5)
        yield row(f"sink of each head, cache in {kind}", narrow, sink=True)
        yield row(f"attention_bias, cache in {kind}", narrow, bias="[1, H, I, J]")
        yield row(f"packed query, key and value, cache in {kind}", **narrow, packed=True)
        yield row(f"rotary, cache in {kind}", narrow, turned="half")
    yield row("map before the softmax as a result", past=1, tap=1)
    yield row("map after the softmax as a result", past=1, tap=2)
