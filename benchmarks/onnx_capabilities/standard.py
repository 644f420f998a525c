"""What is tried of the standard's ``Attention``, in each of its versions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.onnx_capabilities.attempt import DTYPES, Attempt, Case, Results, attempted, draw
from benchmarks.onnx_capabilities.formulas import attention, flat, positions_visible

HEADS, BATCH, CHANNELS = 4, 2, 16
VERSIONS = (23, 24, 25)
ABOVE_LOWEST = -3.4028232635611926e38
"""The float32 next to the lowest."""

MASK_SHAPES = {
    "[I, J]": lambda new, total: (new, total),
    "[1, 1, I, J]": lambda new, total: (1, 1, new, total),
    "[B, 1, I, J]": lambda new, total: (BATCH, 1, new, total),
    "[1, H, I, J]": lambda new, total: (1, HEADS, new, total),
    "[B, H, I, J]": lambda new, total: (BATCH, HEADS, new, total),
    "[B, 1, 1, J]": lambda new, total: (BATCH, 1, 1, total),
}


def call(
    dtype: torch.dtype,
    length: int,
    *,
    flat_heads: bool = True,
    groups: int = HEADS,
    keys: int = 0,
    queries: int = 0,
    past: int = 0,
    value_channels: int = 0,
    scale: float | None = None,
    cap: float = 0.0,
    causal: bool = False,
    mask: str = "",
    boolean: bool = False,
    empty: float = 0.0,
    holes: bool = False,
    shorter: int = 0,
    tap: int = -1,
    lengths: bool = False,
    precision: int = 0,
    left: int = -1,
    right: int = -1,
) -> Case:
    """One call.

    Args:
        dtype: of the operands; length: queries, or cached keys where ``past`` is set.
        flat_heads: operands ``[B, S, H·D]`` rather than ``[B, H, S, D]``.
        keys: how many more keys than queries; queries: behind the cache.
        mask: shape of attn_mask, with truth values where ``boolean``; empty: a number that all of a row's are (no
            truth among them); holes: some are -inf; shorter: keys that it leaves out at the end.
        tap: which stage of the map is a result; lengths: nonpad_kv_seqlen; precision: of the softmax.
        left, right: keys that a window reaches to either side.
    """
    new = queries or (1 if past else length)
    before = length if past else 0
    coming, wide = new + keys, value_channels or CHANNELS
    total = before + coming
    q = draw("query", BATCH, HEADS, new, CHANNELS, dtype=dtype, scale=2.0)
    k = draw("key", BATCH, groups, coming, CHANNELS, dtype=dtype)
    v = draw("value", BATCH, groups, coming, wide, dtype=dtype)
    sizes = (("k", CHANNELS), ("v", wide))
    cached = [draw(f"past {side}", BATCH, groups, before, size, dtype=dtype) for side, size in sizes]
    given = _mask(mask, new, total, dtype, boolean=boolean, empty=empty, holes=holes) if mask else None
    counts = torch.tensor([total, max(1, total * 2 // 3)]) if lengths else None
    if given is not None and shorter:
        given = given[..., : total - shorter].contiguous()

    def reference(as_dtype: torch.dtype) -> Results:
        whole = [torch.cat([old.to(as_dtype), x.to(as_dtype)], 2) for old, x in zip(cached, (k, v), strict=True)]
        visible, bias = None, None
        if given is not None:
            padded = given
            if shorter:
                rest = given.new_full((*given.shape[:-1], shorter), False if boolean else -math.inf)
                padded = torch.cat([given, rest], -1)
            visible, bias = (padded, None) if boolean else (None, padded)
        if causal:
            offset = before if counts is None else 0
            ahead = positions_visible(new, total, causal=True, past=offset)[None, None]
            if counts is not None:
                i, j = torch.arange(new)[:, None], torch.arange(total)
                ahead = (j <= i + (counts - new)[:, None, None])[:, None]
            visible = ahead if visible is None else visible & ahead
        if left >= 0 or right >= 0:
            apart = before + torch.arange(new)[:, None] - torch.arange(total)
            near = ((apart <= left) if left >= 0 else True) & ((-apart <= right) if right >= 0 else True)
            visible = near if visible is None else visible & near
        if counts is not None:
            real = (torch.arange(total) < counts[:, None])[:, None, None]
            visible = real if visible is None else visible & real
        made = attention(q.to(as_dtype), *whole, scale=scale, cap=cap, bias=bias, visible=visible)
        out = flat(made.out) if flat_heads else made.out
        taps = (made.raw, made.capped, made.masked, made.weights)
        present: list[torch.Tensor | None] = list(whole) if past else ([None, None] if tap >= 0 else [])
        return [out, *present, taps[tap]] if tap >= 0 else [out, *present]

    operands = [flat(x).contiguous() if flat_heads else x for x in (q, k, v)]
    attributes: dict[str, Any] = {"q_num_heads": HEADS, "kv_num_heads": groups} if flat_heads else {}
    optional = {"scale": scale, "softcap": cap, "is_causal": int(causal), "softmax_precision": precision}
    attributes |= {name: number for name, number in optional.items() if number}
    attributes |= {f"{side}_window_size": size for side, size in (("left", left), ("right", right)) if size >= 0}
    if tap >= 0:
        attributes["qk_matmul_output_mode"] = tap
    inputs = [*operands, given, *(cached if past else [None, None]), counts]
    return Case(inputs, attributes, reference, max(total, CHANNELS))


def _mask(
    shape: str, new: int, total: int, dtype: torch.dtype, *, boolean: bool, empty: float, holes: bool
) -> torch.Tensor:
    made = draw("mask", *MASK_SHAPES[shape](new, total), dtype=dtype)
    if boolean:
        seen = made > -0.5
        seen[..., 0] = True
        if empty:
            seen[..., new // 2, :] = False
        return seen
    if empty:
        made[..., new // 2, :] = empty
    if holes:
        made[..., 1::3] = -math.inf
    return made


def attempts() -> Iterator[Attempt]:
    """All of them."""
    for version in VERSIONS:
        yield from _of(version)


def _of(version: int) -> Iterator[Attempt]:
    row = partial(attempted, call, "", "Attention", opset=version, dtypes=(*DTYPES, "float64"))
    yield row("operands [B, S, H·D]")
    yield row("operands [B, H, S, D]", flat_heads=False)
    yield row("fewer KV heads", groups=2)
    yield row("fewer KV heads, operands [B, H, S, D]", groups=2, flat_heads=False)
    yield row("more keys than queries", keys=5)
    yield row("other value than key channels", value_channels=32)
    yield row("scale", {}, scale=0.75)
    yield row("softcap", {}, cap=0.5)
    yield row("is_causal", {}, causal=True)
    yield row("is_causal with more keys than queries", {"keys": 5}, causal=True)
    for shape in MASK_SHAPES:
        yield row(f"boolean mask {shape}", {}, mask=shape, boolean=True)
    for shape in MASK_SHAPES:
        yield row(f"additive mask {shape}", {}, mask=shape)
    yield row("boolean mask with more keys than queries", {"keys": 5}, mask="[B, 1, I, J]", boolean=True)
    yield row("additive mask with more keys than queries", {"keys": 5}, mask="[B, 1, I, J]")
    yield row("boolean mask and fewer KV heads", {"groups": 2}, mask="[B, 1, I, J]", boolean=True)
    yield row("additive mask and fewer KV heads", {"groups": 2}, mask="[B, H, I, J]")
    yield row("boolean mask and is_causal", {"causal": True}, mask="[B, 1, I, J]", boolean=True)
    yield row("additive mask and is_causal", {"causal": True}, mask="[B, 1, I, J]")
    yield row("additive mask and softcap", {"cap": 0.5}, mask="[B, 1, I, J]")
    yield row("boolean mask and softcap", {"mask": "[B, 1, I, J]", "boolean": True}, cap=0.5)
    large = ("float32", "bfloat16", "float64")  # float16 holds no such number
    capped: dict[str, Any] = {"mask": "[B, 1, I, J]", "cap": 0.5}
    yield row("boolean mask and softcap, nothing seen in a row: zero", capped, boolean=True, empty=-1.0)
    yield row("additive mask and softcap, -2^100 for a whole row: the mean", capped, dtypes=large, empty=-(2.0**100))
    yield row("additive mask of the number above the lowest for a whole row: the mean", {}, dtypes=("float32",),
              mask="[B, 1, I, J]", empty=ABOVE_LOWEST)  # fmt: skip
    yield row("boolean mask, nothing seen in a row: zero", {}, mask="[B, 1, I, J]", boolean=True, empty=-1.0)
    yield row("additive mask of -inf for some keys", {"mask": "[B, 1, I, J]"}, holes=True)
    yield row("additive mask of -inf for a whole row: zero", {}, mask="[B, 1, I, J]", empty=-math.inf)
    mean = "additive mask of -2^100 for a whole row: the mean"
    yield row(mean, {}, dtypes=large, mask="[B, 1, I, J]", empty=-(2.0**100))
    yield row("boolean mask shorter than the keys", {}, mask="[B, 1, I, J]", boolean=True, shorter=3)
    yield row("additive mask shorter than the keys", {}, mask="[B, 1, I, J]", shorter=3)
    yield row("a step behind a cache", past=1)
    yield row("several queries behind a cache", past=1, queries=40)
    yield row("behind a cache, fewer KV heads", past=1, queries=40, groups=2)
    yield row("is_causal behind a cache", {"past": 1, "queries": 40}, causal=True)
    yield row("additive mask behind a cache", {"past": 1, "queries": 40}, mask="[B, 1, I, J]")
    yield row("softmax in float32", precision=1)
    for mode, what in enumerate(("the raw product", "after the soft cap", "with the mask", "the weights")):
        yield row(f"map as a result: {what}", tap=mode, mask="[B, 1, I, J]", cap=0.5)
    if version >= 24:
        yield row("nonpad_kv_seqlen", {}, lengths=True)
        yield row("nonpad_kv_seqlen and is_causal", {"lengths": True, "keys": 20}, causal=True)
    if version >= 25:
        yield row("left_window_size", {}, left=3)
        yield row("right_window_size", {}, right=3)
        yield row("left_window_size and is_causal", {"causal": True}, left=3)
