"""Scales, layouts of the product of queries and keys, and heads that share keys."""

from __future__ import annotations

import math

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
    split_heads,
)

TABLE = Table()
row = TABLE.row



# --- the scale ----------------------------------------------------------------------------------------------


@row(score="s")
def no_scale(q, k, v):
    return attend(dot(heads(q), heads(k)), heads(v))


@row(score="0.5·s")
def scale_before_product(q, k, v):
    return attend(dot(heads(q) * 0.5, heads(k)), heads(v))


@row(score="0.5·s")
def scale_after_product(q, k, v):
    return attend(dot(heads(q), heads(k)) * CHANNELS**-0.5, heads(v))


@row(score="0.25·s")
def scale_split_over_both(q, k, v):
    scale = 0.5
    return attend(dot(heads(q) * scale, heads(k) * scale), heads(v))


@row(score="0.5·s")
def division_by_root(q, k, v):
    return attend(dot(heads(q), heads(k)) / math.sqrt(CHANNELS), heads(v))


@row(score="0.5·s")
def division_of_queries(q, k, v):
    return attend(dot(heads(q / math.sqrt(CHANNELS)), heads(k)), heads(v))


@row(score="0.5·s")
def division_of_keys_after_transpose(q, k, v):
    return attend(heads(q) @ (heads(k).transpose(-1, -2) / 2), heads(v))


@row({"temperature": torch.tensor(2.0)}, score="0.5·s")
def temperature_buffer(q, k, v, temperature):
    return attend(dot(heads(q), heads(k)) / temperature, heads(v))


@row({"scale": torch.nn.Parameter(torch.tensor([0.25]))}, score="0.25·s")
def learned_scale_of_one_element(q, k, v, scale):
    return attend(dot(heads(q) * scale, heads(k)), heads(v))


@row({"scale": torch.nn.Parameter(torch.rand(HEADS, 1, 1))}, score="s·scale[h, 0, 0]")
def learned_scale_per_head(q, k, v, scale):
    return attend(dot(heads(q), heads(k)) * scale, heads(v))


@row(
    {"logit_scale": torch.nn.Parameter(torch.rand(HEADS, 1, 1))},
    score="s·exp(min(4.605170185988092, logit_scale[h, 0, 0]))",
)
def clamped_logit_scale_of_cosines(q, k, v, logit_scale):
    cosine = dot(F.normalize(heads(q), dim=-1), F.normalize(heads(k), dim=-1))
    return attend(cosine * torch.clamp(logit_scale, max=math.log(100.0)).exp(), heads(v))


@row(score="0.5·s", norm="softmax (float32)")
def explicit_float32_softmax(q, k, v):
    weights = torch.softmax(dot(heads(q), heads(k)) * 0.5, dim=-1, dtype=torch.float32).to(q.dtype)
    return merged(F.dropout(weights, p=0.1, training=False) @ heads(v))


@row(score="0.5·s", norm="softmax (float64)")
def upcast_before_product(q, k, v):
    logits = dot(heads(q).double(), heads(k).double()) * 0.5
    return merged(F.softmax(logits, -1).to(v.dtype) @ heads(v))


@row(score="0.5·s")
def scale_by_size_of_tensor(q, k, v):
    query = heads(q)
    return attend(dot(query, heads(k)) / (query.size(-1) ** 0.5), heads(v))


@row(score="2.0·tanh(0.25·s)")
def softcap(q, k, v):
    return attend(torch.tanh(dot(heads(q), heads(k)) * 0.5 / 2.0) * 2.0, heads(v))


# --- layouts of the product ---------------------------------------------------------------------------------


@row(score="0.5·s")
def batched_matrices_of_rank_three(q, k, v):
    weights = torch.softmax(torch.bmm(flat(q) * 0.5, flat(k).transpose(1, 2)), -1)
    out = torch.bmm(weights, flat(v))
    return out.view(q.shape[0], HEADS, q.shape[1], CHANNELS).transpose(1, 2).reshape(q.shape)


@row(score="0.5·s", mask="keep[b, j]")
def rank_three_viewed_as_four_for_the_mask(q, k, v, keep):
    b, n = keep.shape
    logits = torch.bmm(flat(q) * 0.5, flat(k).transpose(1, 2)).view(b, HEADS, n, n)
    logits = logits.masked_fill(~keep[:, None, None, :], -torch.inf)
    weights = torch.softmax(logits.view(b * HEADS, n, n), -1)
    return torch.bmm(weights, flat(v))


@row({"alibi": torch.rand(HEADS)}, score="0.5·s + alibi[h]·(j − i)")
def baddbmm_with_alibi(q, k, v, alibi):
    n = torch.arange(q.shape[1])
    bias = alibi[:, None, None] * (n[None, :] - n[:, None])
    bias = bias[None].expand(q.shape[0], -1, -1, -1).reshape(-1, q.shape[1], q.shape[1])
    logits = torch.baddbmm(bias, flat(q), flat(k).transpose(1, 2), beta=1.0, alpha=0.5)
    return torch.bmm(torch.softmax(logits, -1), flat(v))


@row(score="0.5·s")
def baddbmm_that_ignores_its_input(q, k, v):
    empty = torch.empty(q.shape[0] * HEADS, q.shape[1], q.shape[1])
    logits = torch.baddbmm(empty, flat(q), flat(k).transpose(1, 2), beta=0, alpha=0.5)
    return torch.bmm(torch.softmax(logits, -1), flat(v))


@row(score="0.5·s")
def einsum_heads_last(q, k, v):
    logits = torch.einsum("bqhd,bkhd->bhqk", split_heads(q), split_heads(k)) * 0.5
    return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(logits, -1), split_heads(v)).flatten(2)


@row(score="0.5·s")
def einsum_other_letters(q, k, v):
    logits = torch.einsum("xyza,xwza->xzyw", split_heads(q), split_heads(k)) * 0.5
    return torch.einsum("xzyw,xwza->xyza", logits.softmax(3), split_heads(v))


@row(score="0.5·s")
def einsum_sequence_first(q, k, v):
    query, key, value = (split_heads(x).permute(1, 0, 2, 3) for x in (q, k, v))
    logits = torch.einsum("ibnd,jbnd->bnij", query, key) * 0.5
    return torch.einsum("bnij,jbnd->ibnd", torch.softmax(logits, -1), value)


@row(score="0.5·s")
def einsum_keys_before_queries(q, k, v):
    logits = torch.einsum("bkhd,bqhd->bkqh", split_heads(k), split_heads(q)) * 0.5
    return torch.einsum("bkhd,bkqh->bqhd", split_heads(v), torch.softmax(logits, 1))


@row(score="0.5·s")
def einsum_channels_first(q, k, v):
    query, key, value = (split_heads(x).permute(0, 2, 3, 1) for x in (q, k, v))
    weights = torch.softmax(torch.einsum("bhct,bhcs->bhts", query, key) * 0.5, -1)
    return torch.einsum("bhts,bhcs->bhct", weights, value)


@row(score="0.5·s")
def keys_times_queries(q, k, v):
    logits = heads(k) @ heads(q).transpose(-1, -2) * 0.5
    return merged(torch.softmax(logits, dim=-2).transpose(-1, -2) @ heads(v))


@row(score="0.5·s")
def values_on_the_left(q, k, v):
    weights = torch.softmax(dot(heads(q), heads(k)) * 0.5, -1)
    return heads(v).transpose(-1, -2) @ weights.transpose(-1, -2)


@row(score="0.5·s")
def output_permuted(q, k, v):
    return (torch.softmax(dot(heads(q), heads(k)) * 0.5, -1) @ heads(v)).permute(2, 0, 1, 3).contiguous()


@row(score="0.5·s", q="[6,1,I,4]")
def unbatched(q, k, v):
    query, key, value = (x[0].view(-1, HEADS, CHANNELS).transpose(0, 1) for x in (q, k, v))
    return torch.softmax(query @ key.transpose(-1, -2) * 0.5, -1) @ value


@row(score="0.20412414523193154·s", q="[B,1,I,24]")
def single_head(q, k, v):
    return torch.softmax(q @ k.transpose(1, 2) / math.sqrt(WIDTH), -1) @ v


@row(score="0.5·s")
def matrices_of_rank_five(q, k, v):
    query, key, value = (
        x.view(x.shape[0], x.shape[1], 2, 3, CHANNELS).permute(0, 2, 3, 1, 4) for x in (q, k, v)
    )
    return torch.softmax(query @ key.transpose(-1, -2) * 0.5, -1) @ value


@row(score="0.5·s")
def heads_before_batch(q, k, v):
    query, key, value = (split_heads(x).permute(2, 0, 1, 3) for x in (q, k, v))
    return torch.softmax(query @ key.transpose(-1, -2) * 0.5, -1) @ value


@row(score="0.5·s")
def product_by_broadcast_and_sum(q, k, v):
    logits = (heads(q)[:, :, :, None] * heads(k)[:, :, None]).sum(-1) * 0.5
    return attend(logits, heads(v))


# --- grouped heads ------------------------------------------------------------------------------------------


@row(score="0.5·s", kv_head="h // 3")
def grouped_expand_and_reshape(q, k_few, v_few):
    key, value = (repeated(heads(x, GROUPS), 3) for x in (k_few, v_few))
    return attend(dot(heads(q), key) * 0.5, value)


@row(score="0.5·s", kv_head="h // 3")
def grouped_repeat_interleave(q, k_few, v_few):
    key, value = (heads(x, GROUPS).repeat_interleave(3, dim=1) for x in (k_few, v_few))
    return attend(dot(heads(q), key) * 0.5, value)


@row(score="0.5·s", kv_head="h % 2")
def grouped_tiled(q, k_few, v_few):
    key, value = (heads(x, GROUPS).repeat(1, 3, 1, 1) for x in (k_few, v_few))
    return attend(dot(heads(q), key) * 0.5, value)


@row(score="0.5·s", kv_head="h // 3")
def grouped_by_broadcast_in_rank_five(q, k_few, v_few):
    b, n, _ = q.shape
    query = q.view(b, n, GROUPS, 3, CHANNELS).permute(0, 2, 3, 1, 4)
    key, value = (heads(x, GROUPS).unsqueeze(2) for x in (k_few, v_few))
    out = torch.softmax(query @ key.transpose(-1, -2) * 0.5, -1) @ value
    return out.permute(0, 3, 1, 2, 4).reshape(b, n, -1)


@row(score="0.5·s", kv_head="h // 3")
def grouped_einsum(q, k_few, v_few):
    b, n, _ = q.shape
    logits = (
        torch.einsum("bqgrd,bkgd->bgrqk", q.view(b, n, GROUPS, 3, CHANNELS), split_heads(k_few, GROUPS)) * 0.5
    )
    out = torch.einsum("bgrqk,bkgd->bqgrd", torch.softmax(logits, -1), split_heads(v_few, GROUPS))
    return out.reshape(b, n, -1)


@row(score="0.5·s", kv_head="0")
def one_key_head_by_broadcast(q, k_one, v_one):
    return attend(dot(heads(q), k_one[:, None]) * 0.5, v_one[:, None])


@row(score="0.5·s")
def values_shared_by_heads(q, k, v_one):
    return attend(dot(heads(q), heads(k)) * 0.5, v_one[:, None])


@row(score="0.5·s", kv_head="0")
def one_key_head_einsum(q, k_one, v_one):
    logits = torch.einsum("bqhd,bkd->bhqk", split_heads(q), k_one) * 0.5
    return torch.einsum("bhqk,bkd->bqhd", torch.softmax(logits, -1), v_one)


@row(score="0.5·s", kv_head="0", q="[B,6,I,4]", k="[B,1,I,4]")
def one_key_head_as_longer_rows(q, k_one, v_one):
    b, n, _ = q.shape
    query = q.view(b, n * HEADS, CHANNELS)
    weights = torch.softmax((query @ k_one.transpose(1, 2)).view(b, n, HEADS, n) * 0.5, -1)
    return (weights.view(b, n * HEADS, n) @ v_one).view(b, n, -1)
