"""Fused calls and modules of torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.lift.forms import (
    CHANNELS,
    GROUPS,
    HEADS,
    WIDTH,
    Table,
    attend,
    dot,
    flat,
    heads,
    merged,
    repeated,
)

TABLE = Table()
row = TABLE.row



# --- fused calls --------------------------------------------------------------------------------------------


@row(score="0.5·s")
def fused(q, k, v):
    return merged(F.scaled_dot_product_attention(heads(q), heads(k), heads(v)))


@row(score="0.5·s", mask="j ≤ i")
def fused_causal(q, k, v):
    return merged(F.scaled_dot_product_attention(heads(q), heads(k), heads(v), is_causal=True))


@row(score="0.25·s", mask="keep[b, j]")
def fused_truth_mask_and_scale(q, k, v, keep):
    return merged(
        F.scaled_dot_product_attention(heads(q), heads(k), heads(v), keep[:, None, None], scale=0.25)
    )


@row({"bias": torch.randn(HEADS, 16, 16)}, score="0.5·s + bias[h, i, j]")
def fused_float_mask(q, k, v, bias):
    n = q.shape[1]
    return merged(F.scaled_dot_product_attention(heads(q), heads(k), heads(v), bias[None, :, :n, :n]))


@row(score="0.5·s", kv_head="h // 3", mask="j ≤ i")
def fused_grouped(q, k_few, v_few):
    out = F.scaled_dot_product_attention(
        heads(q), heads(k_few, GROUPS), heads(v_few, GROUPS), is_causal=True, enable_gqa=True
    )
    return merged(out)


@row(score="0.5·s", kv_head="h // 3")
def fused_after_repeat(q, k_few, v_few):
    key, value = (repeated(heads(x, GROUPS), 3) for x in (k_few, v_few))
    return merged(F.scaled_dot_product_attention(heads(q), key, value))


@row(score="0.20412414523193154·s", mask="j ≤ i")
def fused_of_rank_three(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@row(score="0.5·s")
def fused_of_rank_three_batch_and_heads(q, k, v):
    return F.scaled_dot_product_attention(flat(q), flat(k), flat(v))


@row(score="0.5·s", kv_head="h // 3")
def fused_of_rank_five(q, k_few, v_few):
    b, n, _ = q.shape
    query = q.view(b, n, GROUPS, 3, CHANNELS).permute(0, 2, 3, 1, 4)
    key, value = (heads(x, GROUPS).unsqueeze(2).expand(-1, -1, 3, -1, -1) for x in (k_few, v_few))
    return F.scaled_dot_product_attention(query, key, value)


@row(score="0.5·s", mask="j ≤ i", q="[B,6,I,4]", k="[B,6,J,4]")
def fused_causal_of_a_cross_attention(q, memory):
    return F.scaled_dot_product_attention(heads(q), heads(memory), heads(memory), is_causal=True)


# --- modules of torch ---------------------------------------------------------------------------------------


def _multihead():
    return torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)


@row({"attention": _multihead()}, score="0.5·s")
def module_without_weights(x, attention):
    return attention(x, x, x, need_weights=False)[0]


@row({"attention": _multihead()}, score="0.5·s", status="observed", reason="needed outside")
def module_with_weights(x, attention):
    return attention(x, x, x)


@row({"attention": _multihead()}, score="0.5·s", mask="keep[b, j]")
def module_with_padding(x, keep, attention):
    return attention(x, x, x, key_padding_mask=~keep, need_weights=False)[0]


@row({"layer": torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 8, batch_first=True)}, score="0.5·s")
def module_encoder_layer(x, layer):
    return layer(x)


@row({"layer": torch.nn.TransformerDecoderLayer(WIDTH, HEADS, 8, batch_first=True)}, score="0.5·s", sites=2)
def module_decoder_layer(x, memory, layer):
    return layer(x, memory)


@row(score="0.5·s", sites=3)
def three_sites(x):
    for _ in range(3):
        x = x + attend(dot(heads(x), heads(x)) * 0.5, heads(x))
    return x
