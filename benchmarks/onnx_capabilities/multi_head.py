"""What is tried of ``com.microsoft``'s ``MultiHeadAttention``, ``Attention`` and ``QAttention``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.onnx_capabilities.attempt import MICROSOFT, Attempt, Case, Results, attempted, draw
from benchmarks.onnx_capabilities.formulas import attention, flat, heads, positions_visible, rotary

HEADS, CHANNELS = 4, 16
BIAS_SHAPES = {
    "[1, 1, I, J]": (False, False),
    "[1, H, I, J]": (False, True),
    "[B, 1, I, J]": (True, False),
    "[B, H, I, J]": (True, True),
}
BATCH = 2


def _bias(
    shape: str, new: int, total: int, dtype: torch.dtype, empty: float, holes: bool = False
) -> torch.Tensor:
    by_row, by_head = BIAS_SHAPES[shape]
    made = draw("bias", BATCH if by_row else 1, HEADS if by_head else 1, new, total, dtype=dtype, scale=2.0)
    if empty:
        made[:, :, new // 2] = empty
    if holes:
        made[..., 1::3] = -math.inf
    return made


def _padding(form: str, new: int, total: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A mask input and ``[B, 1, 1|I, J]`` of the keys that are seen through it."""
    last = torch.tensor([total, max(1, total * 2 // 3)])
    first = torch.tensor([0, total // 3])
    places = torch.arange(total)
    if not form:
        return None, None
    if form == "[B]":
        return last.int(), (places < last[:, None])[:, None, None]
    if form == "[2B]":
        seen = (places < last[:, None]) & (places >= first[:, None])
        return torch.cat([last, first]).int(), seen[:, None, None]
    if form == "[3B + 2]":
        ends = torch.arange(BATCH + 1) * new, torch.arange(BATCH + 1) * total
        return torch.cat([last, *ends]).int(), (places < last[:, None])[:, None, None]
    if form == "[B, J]":
        seen = (places < last[:, None]) & (places % 4 != 2)  # never the first, so that no row sees nothing
        return seen.int(), seen[:, None, None]
    seen = draw("seen", BATCH, new, total) > -0.5
    seen[..., 0] = True
    return seen.int(), seen[:, None]


def multi_head(
    dtype: torch.dtype,
    length: int,
    *,
    keys: int = 0,
    queries: int = 0,
    past: int = 0,
    value_channels: int = 0,
    scale: float | None = None,
    causal: bool = False,
    bias: str = "",
    empty: float = 0.0,
    holes: bool = False,
    gives: str = "mean",
    padding: str = "",
    projection: bool = False,
    packed: str = "",
    split: bool = False,
    filled: float = 0.0,
    tap: bool = False,
) -> Case:
    """One call of MultiHeadAttention.

    Args:
        dtype: of the operands; length: queries, or cached keys where ``past`` is set.
        keys: how many more keys than queries; queries: behind the cache.
        bias: shape of attention_bias; empty: a number that all of a row's biases are; gives: what such a row becomes;
            holes: some are -inf.
        padding: form of key_padding_mask; filled: mask_filter_value.
        projection: a bias of the projections.
        packed: ``qkv`` or ``kv`` in one tensor; split: keys and values ``[B, H, J, D]``.
        tap: the weights are a result.
    """
    new = queries or (1 if past else length)
    before = length if past else 0
    coming = new + keys
    total, wide = before + coming, value_channels or CHANNELS
    q = draw("query", BATCH, new, HEADS * CHANNELS, dtype=dtype, scale=2.0)
    k = draw("key", BATCH, coming, HEADS * CHANNELS, dtype=dtype)
    v = draw("value", BATCH, coming, HEADS * wide, dtype=dtype)
    cached = [draw(f"past {side}", BATCH, HEADS, before, CHANNELS, dtype=dtype) for side in "kv"]
    added = _bias(bias, new, total, dtype, empty, holes) if bias else None
    sums = draw("projection", HEADS * (2 * CHANNELS + wide), dtype=dtype) if projection else None
    mask, seen = _padding(padding, new, total)

    def reference(as_dtype: torch.dtype) -> Results:
        parts = [q.to(as_dtype), k.to(as_dtype), v.to(as_dtype)]
        if sums is not None:
            widths = [HEADS * CHANNELS, HEADS * CHANNELS, HEADS * wide]
            parts = [part + more for part, more in zip(parts, sums.to(as_dtype).split(widths), strict=True)]
        query, key, value = (heads(part, HEADS) for part in parts)
        whole = [torch.cat([old.to(as_dtype), x], 2) if past else x
                 for old, x in zip(cached, (key, value), strict=True)]  # fmt: skip
        visible = seen
        if causal:
            ahead = positions_visible(new, total, causal=True)[None, None]
            visible = ahead if seen is None else ahead & seen
        if filled:  # a finite number is added to the logits, it does not take their place
            more = torch.zeros(BATCH, 1, new, total).masked_fill(~(visible if visible is not None else
                torch.ones(1, dtype=torch.bool)), filled)  # fmt: skip
            made = attention(query, *whole, scale=scale, bias=more)
        else:
            made = attention(query, *whole, scale=scale, bias=added, visible=visible)
        out = flat(made.out)
        if empty == -math.inf and gives == "NaN":
            out = out.clone()
            out[:, new // 2] = math.nan
        present: Results = whole if past else ([None, None] if tap else [])
        return [out, *present, made.weights] if tap else [out, *present]

    first: list[torch.Tensor | None] = [q, k, v]
    if packed == "qkv":
        first = [torch.stack([part.unflatten(-1, (HEADS, CHANNELS)) for part in (q, k, v)], 3), None, None]
    elif packed == "kv":
        first = [q, torch.stack([part.unflatten(-1, (HEADS, CHANNELS)) for part in (k, v)], 3), None]
    elif split:
        first = [q, heads(k, HEADS).contiguous(), heads(v, HEADS).contiguous()]
    attributes: dict[str, Any] = {"num_heads": HEADS}
    if scale is not None:
        attributes["scale"] = scale
    if causal:
        attributes["unidirectional"] = 1
    if filled:
        attributes["mask_filter_value"] = filled
    inputs = [*first, sums, mask, added, *(cached if past else [None, None])]
    return Case(inputs, attributes, reference, max(total, CHANNELS))


def packed_attention(
    dtype: torch.dtype,
    length: int,
    *,
    past: int = 0,
    causal: bool = False,
    bias: str = "",
    padding: str = "",
    scale: float | None = None,
    filled: float = 0.0,
    projection: bool = True,
    value_channels: int = 0,
    turned: bool = False,
    quantised: str = "",
) -> Case:
    """One call of ``Attention``, which multiplies by the packed weights itself, or of ``QAttention``.

    Args:
        dtype: of the operands; length: positions, or cached ones where ``past`` is set.
        padding: form of mask_index; bias: shape of attention_bias; filled: mask_filter_value.
        projection: with a bias of the projections; turned: rotary positions.
        quantised: ``uint8`` or ``int8``, what the states of QAttention are; ``columns`` for a scale of each.
    """
    new, before, inner = (1 if past else length), (length if past else 0), 24
    channels = 32 if turned else CHANNELS
    wide, total = value_channels or channels, new + before
    widths = [HEADS * channels, HEADS * channels, HEADS * wide]
    x = draw("states", BATCH, new, inner, dtype=dtype)
    weights = draw("weights", inner, sum(widths), dtype=dtype, scale=inner**-0.5)
    sums = draw("projection", sum(widths), dtype=dtype) if projection else None
    old = draw("past", 2, BATCH, HEADS, before, channels, dtype=dtype) if past else None
    added = _bias(bias, new, total, dtype, 0.0) if bias else None
    mask, seen = _padding(padding, new, total)
    signed = "int8" in quantised.split()
    scales: list[torch.Tensor] = []
    zeros: list[torch.Tensor] = []
    if quantised:
        columns = "columns" in quantised
        scales = [torch.tensor(0.03), (0.01 + 0.001 * draw("s", sum(widths)).abs()) if columns else torch.tensor(0.01)]
        zeros = [torch.tensor(3 if signed else 130), torch.tensor(0)]
        least, largest = (-128, 127) if signed else (0, 255)
        kind = torch.int8 if signed else torch.uint8
        x = (draw("states", BATCH, new, inner) / scales[0] + zeros[0]).round().clamp(least, largest).to(kind)
        weights = (draw("w", inner, sum(widths)) * 40).round().clamp(-127, 127).to(torch.int8)
        scales = [scale.to(dtype) for scale in scales]

    def reference(as_dtype: torch.dtype) -> Results:
        if quantised:
            states = (x.to(as_dtype) - zeros[0]) * scales[0].to(as_dtype)
            kernel = weights.to(as_dtype) * scales[1].to(as_dtype)
        else:
            states, kernel = x.to(as_dtype), weights.to(as_dtype)
        product = states @ kernel + (sums.to(as_dtype) if sums is not None else 0)
        query, key, value = (heads(part, HEADS) for part in product.split(widths, -1))
        if turned:
            cos, sin = _turns(before, new, channels)
            query, key = rotary(query, cos, sin), rotary(key, cos, sin)
        whole = [torch.cat([old[n].to(as_dtype), part], 2) if old is not None else part
                 for n, part in enumerate((key, value))]  # fmt: skip
        visible = positions_visible(new, total, causal=True)[None, None] if causal else None
        more = added
        if filled:
            hidden = ~seen if seen is not None else torch.zeros(1, dtype=torch.bool)
            more = torch.zeros(BATCH, 1, new, total).masked_fill(hidden, filled)
        elif seen is not None:
            visible = seen if visible is None else visible & seen
        made = attention(query, *whole, scale=scale, bias=more, visible=visible)
        return [flat(made.out), torch.stack(whole)] if past else [flat(made.out)]

    attributes: dict[str, Any] = {"num_heads": HEADS}
    if causal:
        attributes["unidirectional"] = 1
    if scale is not None:
        attributes["scale"] = scale
    if filled:
        attributes["mask_filter_value"] = filled
    if value_channels:
        attributes["qkv_hidden_sizes"] = widths
    if turned:
        attributes |= {"do_rotary": 1, "rotary_embedding_dim": channels}
    if quantised:
        points = [zeros[0].to(x.dtype), zeros[1].to(torch.int8).expand(scales[1].shape).contiguous()]
        inputs = [x, weights, sums, *scales, mask, *points, old]
        return Case(inputs, attributes, reference, max(total, inner), constants=frozenset({1, 2}))
    inputs = [x, weights, sums, mask, old, added]
    return Case(inputs, attributes, reference, max(total, inner), constants=frozenset({1, 2} if projection else {1}))


def _turns(before: int, new: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The angles that the operator has within: base 10000."""
    places = torch.arange(before, before + new, dtype=torch.float64)[:, None]
    angles = places * 10000.0 ** (-torch.arange(channels // 2, dtype=torch.float64) / (channels // 2))
    return torch.cos(angles), torch.sin(angles)


def attempts() -> Iterator[Attempt]:
    """All of them."""
    row = partial(attempted, multi_head, MICROSOFT, "MultiHeadAttention")
    yield row("queries, keys and values")
    yield row("more keys than queries", keys=5)
    yield row("other value than key channels", value_channels=32)
    yield row("keys and values [B, H, J, D]", keys=5, split=True)
    yield row("packed query, key and value", packed="qkv")
    yield row("packed key and value", packed="kv")
    yield row("scale", {}, scale=0.75)
    yield row("bias of the projections", {}, projection=True)
    yield row("unidirectional", {}, causal=True)
    yield row("unidirectional behind a cache", {"past": 1, "queries": 40}, causal=True)
    for shape in BIAS_SHAPES:
        yield row(f"attention_bias {shape}", {}, bias=shape)
    yield row("attention_bias with more keys than queries", {"keys": 5}, bias="[B, H, I, J]")
    yield row("attention_bias of -inf for some keys", {"bias": "[B, 1, I, J]"}, holes=True)
    yield row("attention_bias of -inf for a whole row: NaN", {}, bias="[B, 1, I, J]", empty=-math.inf, gives="NaN")
    yield row("attention_bias of -inf for a whole row: zero", {}, bias="[B, 1, I, J]", empty=-math.inf)
    large = ("float32", "bfloat16")  # float16 holds no such numbers
    for told, number in (("-3.4e38", -3.3895313892515355e38), ("-2^100", -(2.0**100))):
        feature = f"attention_bias of {told} for a whole row: the mean"
        yield row(feature, {}, dtypes=large, bias="[B, 1, I, J]", empty=number)
    for form in ("[B]", "[3B + 2]", "[B, J]", "[B, I, J]"):
        yield row(f"key_padding_mask {form}", {}, padding=form)
    yield row("key_padding_mask [B, J] behind a cache", {"past": 1}, padding="[B, J]")
    yield row("mask_filter_value", {"padding": "[B, J]"}, padding="[B, J]", filled=-1.5)
    yield row("a step behind a cache", past=1)
    yield row("several queries behind a cache", past=1, queries=40)
    yield row("attention_bias behind a cache", {"past": 1, "queries": 40}, bias="[B, H, I, J]")

    def packed(operator: str, feature: str, base: dict[str, Any] | None = None, **options: Any) -> Attempt:
        without = partial(packed_attention, **base) if base is not None else None
        make = partial(packed_attention, **{**(base or {}), **options})
        halves = ("float32", "float16", "bfloat16") if operator == "Attention" else ("float32", "float16")
        return Attempt(MICROSOFT, operator, feature, make, without, dtypes=halves)

    yield packed("Attention", "packed weights and bias")
    yield packed("Attention", "no bias of the projections", {}, projection=False)
    yield packed("Attention", "scale", {}, scale=0.75)
    yield packed("Attention", "other value than key channels", value_channels=32)
    yield packed("Attention", "unidirectional", {}, causal=True)
    for form in ("[B]", "[2B]", "[3B + 2]", "[B, J]", "[B, I, J]"):
        yield packed("Attention", f"mask_index {form}", {}, padding=form)
    yield packed("Attention", "mask_index [B, J] and unidirectional", {"causal": True}, padding="[B, J]")
    yield packed("Attention", "mask_filter_value", {"padding": "[B, J]"}, padding="[B, J]", filled=-1.5)
    for shape in BIAS_SHAPES:
        yield packed("Attention", f"attention_bias {shape}", {}, bias=shape)
    yield packed("Attention", "a step behind a cache", past=1)
    yield packed("Attention", "rotary", {"turned": False}, turned=True)
    for kind in ("uint8", "int8", "uint8 columns"):
        told = kind.replace(" columns", ", a scale of each column")
        yield packed("QAttention", f"states in {told}", quantised=kind)
    yield packed("QAttention", "unidirectional", {"quantised": "uint8"}, causal=True)
    yield packed("QAttention", "scale", {"quantised": "uint8"}, scale=0.75)
    for form in ("[B]", "[2B]", "[B, J]"):
        yield packed("QAttention", f"mask_index {form}", {"quantised": "uint8"}, padding=form)
    yield packed("QAttention", "a step behind a cache", quantised="uint8", past=1)
    yield packed("QAttention", "rotary", {"quantised": "uint8"}, quantised="uint8", turned=True)
