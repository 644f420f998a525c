"""What is tried of ``LinearAttention``, in both domains, and of ``com.microsoft.SparseAttention``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.onnx_capabilities.attempt import MICROSOFT, Attempt, Case, Results, attempted, draw
from benchmarks.onnx_capabilities.formulas import attention, flat, heads, rotary, scan, tables

BATCH, HEADS, CHANNELS = 2, 4, 16
BLOCK = 16


def linear(
    dtype: torch.dtype,
    length: int,
    *,
    rule: str = "linear",
    groups: int = HEADS,
    value_channels: int = 0,
    by_channel: bool = False,
    state: bool = False,
    scale: float = 0.0,
    chunk: int = 0,
    step: bool = False,
) -> Case:
    """One call of LinearAttention.

    Args:
        dtype: of the operands; length: steps; step: a single one.
        rule: of the update; by_channel: a decay of each key channel; state: one from before; chunk: chunk_size.
    """
    steps, wide = 1 if step else length, value_channels or CHANNELS
    q = draw("query", BATCH, steps, HEADS * CHANNELS, dtype=dtype)
    k = torch.nn.functional.normalize(draw("key", BATCH, steps, groups, CHANNELS), dim=-1).flatten(2).to(dtype)
    v = draw("value", BATCH, steps, groups * wide, dtype=dtype)
    decay = -draw("decay", BATCH, steps, groups * (CHANNELS if by_channel else 1)).abs().to(dtype) * 0.3
    rate = torch.sigmoid(draw("rate", BATCH, steps, groups)).to(dtype)
    held = draw("state", BATCH, groups, CHANNELS, wide, dtype=dtype) if state else None
    gated, delta = "gated" in rule, "delta" in rule

    def reference(as_dtype: torch.dtype) -> Results:
        query, key, value = (heads(x.to(as_dtype), n) for x, n in ((q, HEADS), (k, groups), (v, groups)))
        made = scan(
            query, key, value,
            scale=scale or CHANNELS**-0.5,
            decay=heads(decay.to(as_dtype), groups) if gated else None,
            rate=heads(rate.to(as_dtype), groups) if delta else None,
            state=held,
        )  # fmt: skip
        return [flat(made[0]), made[1]]

    attributes: dict[str, Any] = {"q_num_heads": HEADS, "kv_num_heads": groups, "update_rule": rule}
    attributes |= {name: number for name, number in (("scale", scale), ("chunk_size", chunk)) if number}
    inputs = [q, k, v, held, decay if gated else None, rate if delta else None]
    return Case(inputs, attributes, reference, max(steps, CHANNELS))


def sparse(
    dtype: torch.dtype,
    length: int,
    *,
    layouts: int = 1,
    past: int = 0,
    whole: bool = False,
    packed: bool = False,
    turned: str = "",
    scale: float | None = None,
    shared: bool = True,
) -> Case:
    """One call of SparseAttention.

    Args:
        dtype: of the operands; length: queries, or cached keys where ``past`` is set.
        layouts: of blocks, taken in turns by the heads; whole: all blocks seen.
        turned: rotary positions; shared: the cache is written in place.
    """
    groups = 2
    new, before = (1 if past else length), (length if past else 0)
    total = new + before
    blocks = math.ceil(total / BLOCK)
    room = blocks * BLOCK
    q = draw("query", BATCH, new, HEADS * CHANNELS, dtype=dtype)
    k, v = (draw(side, BATCH, new, groups * CHANNELS, dtype=dtype) for side in ("key", "value"))
    cached = [draw(f"past {side}", BATCH, groups, before, CHANNELS, dtype=dtype) for side in "kv"]
    cos, sin = (table.to(dtype) for table in tables(room, CHANNELS))
    seen = torch.zeros(layouts, blocks, blocks, dtype=torch.bool)
    for layout in range(layouts):
        for row in range(blocks):
            for column in range(row + 1):
                seen[layout, row, column] = whole or row == column or (row + column + layout) % 2 == 1
    rows = torch.zeros(layouts, blocks + 1, dtype=torch.int32)
    rows[:, 1:] = seen.sum(2).cumsum(1)
    columns = torch.full((layouts, int(rows.max())), -1, dtype=torch.int32)
    for layout in range(layouts):
        listed = seen[layout].nonzero()[:, 1].int()
        columns[layout, : len(listed)] = listed

    def reference(as_dtype: torch.dtype) -> Results:
        query, key, value = (heads(x.to(as_dtype), n) for x, n in ((q, HEADS), (k, groups), (v, groups)))
        if turned:
            at = torch.arange(before, total)
            query, key = (rotary(x, cos[at], sin[at], interleaved=turned == "interleaved") for x in (query, key))
        all_keys, all_values = (
            torch.cat([old.to(as_dtype), x], 2) for old, x in zip(cached, (key, value), strict=True)
        )
        i, j = torch.arange(before, total)[:, None], torch.arange(total)
        visible = (j <= i) & seen[torch.arange(HEADS) % layouts][:, i // BLOCK, j // BLOCK]
        made = attention(query, all_keys, all_values, scale=scale, visible=visible[None])
        rest = all_keys.new_zeros(BATCH, groups, room - total, CHANNELS)
        return [flat(made.out), torch.cat([all_keys, rest], 2), torch.cat([all_values, rest], 2)]

    buffers = [torch.cat([old, old.new_zeros(BATCH, groups, room - before, CHANNELS)], 2) for old in cached]
    first = [torch.cat([q, k, v], -1), None, None] if packed else [q, k, v]
    inputs = [
        *first,
        *buffers,
        rows,
        columns,
        torch.tensor([total], dtype=torch.int32),
        torch.full((BATCH,), total, dtype=torch.int32),
        *([cos, sin] if turned else []),
    ]
    attributes: dict[str, Any] = {"num_heads": HEADS, "kv_num_heads": groups, "sparse_block_size": BLOCK}
    if scale is not None:
        attributes["scale"] = scale
    if turned:
        attributes |= {"do_rotary": 1, "rotary_interleaved": int(turned == "interleaved")}
    places = {1: 3, 2: 4} if shared else {}
    return Case(inputs, attributes, reference, max(total, CHANNELS), shared=places)


def attempts() -> Iterator[Attempt]:
    """All of them."""
    for domain, opset in ((MICROSOFT, 18), ("", 27)):
        row = partial(attempted, linear, domain, "LinearAttention", opset=opset)
        yield row("linear", rule="linear")
        yield row("gated", {}, rule="gated")
        yield row("gated, a decay of each channel", rule="gated", by_channel=True)
        yield row("delta", {}, rule="delta")
        yield row("gated_delta", {"rule": "delta"}, rule="gated_delta")
        yield row("fewer KV heads", rule="gated", groups=2)
        yield row("other value than key channels", rule="gated", value_channels=32)
        yield row("scale", {"rule": "gated"}, scale=0.75)
        yield row("past_state", {"rule": "gated"}, state=True)
        yield row("a step from a past_state", {"rule": "gated_delta", "step": True}, state=True)
        yield row("chunk_size", rule="gated_delta", chunk=16)

    block_sparse = partial(attempted, sparse, MICROSOFT, "SparseAttention")
    yield block_sparse("all blocks", whole=True)
    yield block_sparse("a layout of blocks")
    yield block_sparse("layouts in turns", layouts=2)
    yield block_sparse("a step behind a cache", past=1)
    yield block_sparse("a cache in another buffer", past=1, shared=False)
    yield block_sparse("packed query, key and value", packed=True)
    yield block_sparse("scale", {}, scale=0.75)
    yield block_sparse("rotary", {}, turned="half")
    yield block_sparse("rotary, interleaved", {"turned": "half"}, turned="interleaved")
