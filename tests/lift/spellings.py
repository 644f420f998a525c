"""Ways in which people write attention, and what each of them says.

A row states the canonical score, mask, KV head and so on of every site that its function holds. The functions
are written as published models write them; sizes are tiny.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tests.lift.forms import CHANNELS, GROUPS, HEADS, QUERIES, WIDTH, Table, attend, dot, heads, merged

SPELLINGS = Table()
row = SPELLINGS.row

LOWEST = torch.finfo(torch.float32).min
CAUSAL = torch.ones(16, 16, dtype=torch.bool).tril()


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


def flat(x, count=HEADS):
    """``[B·H, N, D]``."""
    return heads(x, count).reshape(-1, x.shape[1], CHANNELS)


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


def split_heads(x, count=HEADS):
    """``[B, N, H, D]``."""
    return x.view(x.shape[0], x.shape[1], count, CHANNELS)


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


def repeated(x, times):
    """As transformers repeats key and value heads."""
    b, g, n, d = x.shape
    return x[:, :, None].expand(b, g, times, n, d).reshape(b, g * times, n, d)


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


@row(score="0.5·s", q="[B,1,6·J,4]", k="[B,1,J,4]")
def one_key_head_as_longer_rows(q, k_one, v_one):
    b, n, _ = q.shape
    query = q.view(b, n * HEADS, CHANNELS)
    weights = torch.softmax((query @ k_one.transpose(1, 2)).view(b, n, HEADS, n) * 0.5, -1)
    return (weights.view(b, n * HEADS, n) @ v_one).view(b, n, -1)


# --- where queries, keys and values come from ---------------------------------------------------------------


@row({"packed": torch.nn.Linear(WIDTH, 3 * WIDTH)}, score="0.5·s", block=("project",) * 3)
def packed_chunk(x, packed):
    query, key, value = (heads(part) for part in packed(x).chunk(3, dim=-1))
    return attend(dot(query, key) * 0.5, value)


@row({"packed": torch.nn.Linear(WIDTH, 3 * WIDTH)}, score="0.5·s")
def packed_split(x, packed):
    query, key, value = (heads(part) for part in packed(x).split(WIDTH, dim=2))
    return attend(dot(query, key) * 0.5, value)


@row({"packed": torch.nn.Linear(WIDTH, 3 * WIDTH)}, score="0.5·s")
def packed_unbind(x, packed):
    query, key, value = (
        packed(x).view(x.shape[0], x.shape[1], 3, HEADS, CHANNELS).permute(2, 0, 3, 1, 4).unbind(0)
    )
    return attend(dot(query, key) * 0.5, value)


@row({"packed": torch.nn.Linear(WIDTH, 3 * WIDTH)}, score="0.5·s")
def packed_per_head(x, packed):
    mixed = packed(x).view(x.shape[0], x.shape[1], HEADS, 3 * CHANNELS)
    query, key, value = (part.transpose(1, 2) for part in mixed.chunk(3, dim=-1))
    return attend(dot(query, key) * 0.5, value)


@row({"packed": torch.nn.Linear(WIDTH, WIDTH + 2 * GROUPS * CHANNELS)}, score="0.5·s", kv_head="h // 3")
def packed_grouped_slices(x, packed):
    mixed = packed(x)
    few = GROUPS * CHANNELS
    key, value = heads(mixed[..., WIDTH : WIDTH + few], GROUPS), heads(mixed[..., WIDTH + few :], GROUPS)
    return attend(dot(heads(mixed[..., :WIDTH]), repeated(key, 3)) * 0.5, repeated(value, 3))


@row({"query": torch.nn.Linear(WIDTH, WIDTH), "norm": torch.nn.LayerNorm(CHANNELS)}, score="0.5·s", block=("project",))
def norm_of_queries_and_keys(x, k, v, query, norm):
    return attend(dot(norm(heads(query(x))), norm(heads(k))) * 0.5, heads(v))


def rotated_halves(x):
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


@row({"frequency": 0.1 ** torch.arange(2)}, score="0.5·s", block=("position half", "position half"))
def rotary_halves(q, k, v, frequency):
    angle = (torch.arange(q.shape[1])[:, None] * frequency).repeat(1, 2)
    cos, sin = angle.cos(), angle.sin()
    query, key = (heads(x) * cos + rotated_halves(heads(x)) * sin for x in (q, k))
    return attend(dot(query, key) * 0.5, heads(v))


@row({"frequency": 0.1 ** torch.arange(2)}, score="0.5·s", block=("position half", "position half"))
def rotary_halves_of_position_ids(q, k, v, positions, frequency):
    angle = positions[:, :, None].float() * frequency
    angle = torch.cat([angle, angle], -1)[:, None]
    query, key = (heads(x) * angle.cos() + rotated_halves(heads(x)) * angle.sin() for x in (q, k))
    return attend(dot(query, key) * 0.5, heads(v))


@row(
    {"frequency": 0.1 ** torch.arange(2)},
    score="0.5·s",
    block=("position interleaved", "position interleaved"),
)
def rotary_interleaved(q, k, v, frequency):
    angle = (torch.arange(q.shape[1])[:, None] * frequency).repeat_interleave(2, 1)

    def rotate(x):
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * angle.cos() + turned * angle.sin()

    return attend(dot(rotate(heads(q)), rotate(heads(k))) * 0.5, heads(v))


@row(
    {"frequency": 0.1 ** torch.arange(2)}, score="0.5·s", block=("position half", "position half"), rotated=4
)
def rotary_of_some_channels(q, k, v, frequency):
    angle = (torch.arange(q.shape[1])[:, None] * frequency).repeat(1, 2)

    def rotate(x):
        turned, rest = x[..., :4], x[..., 4:]
        return torch.cat([turned * angle.cos() + rotated_halves(turned) * angle.sin(), rest], -1)

    return attend(dot(rotate(heads(q, 3)), rotate(heads(k, 3))) * 0.5, heads(v, 3))


@row({"frequency": 0.1 ** torch.arange(2)}, score="0.5·s", block=("position half", "position half"))
def rotary_halves_written_apart(q, k, v, frequency):
    angle = torch.arange(q.shape[1])[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()

    def rotate(x):
        first, second = x[..., :2], x[..., 2:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    return attend(dot(rotate(heads(q)), rotate(heads(k))) * 0.5, heads(v))


@row({"frequency": 0.1 ** torch.arange(2)}, score="0.5·s")
def rotary_as_complex_numbers(q, k, v, frequency):
    angle = torch.arange(q.shape[1])[:, None] * frequency
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotate(x):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], 2, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    return attend(dot(rotate(heads(q)), rotate(heads(k))) * 0.5, heads(v))


@row(score="0.5·s", q="[B,6,I,4]", k="[B,6,J,4]")
def cross_attention(q, memory):
    return attend(dot(heads(q), heads(memory)) * 0.5, heads(memory))


@row(score="0.5·s", mask="keep_memory[b, j]", q="[B,6,I,4]", k="[B,6,J,4]")
def cross_attention_with_padding(q, memory, keep_memory):
    logits = dot(heads(q), heads(memory)) * 0.5
    return attend(logits.masked_fill(~keep_memory[:, None, None], -torch.inf), heads(memory))


@row(score="0.5·s", mask="j ≤ i + J − I", q="[B,6,I,4]", k="[B,6,J,4]")
def cache_concatenated(q, k, v, k_past, v_past):
    key, value = torch.cat([heads(k_past), heads(k)], 2), torch.cat([heads(v_past), heads(v)], 2)
    past = k_past.shape[1]
    hidden = torch.arange(key.shape[2])[None] > torch.arange(q.shape[1])[:, None] + past
    return attend((dot(heads(q), key) * 0.5).masked_fill(hidden, -torch.inf), value)


@row(score="0.5·s", q="[B,6,1,4]", k="[B,6,J,4]")
def one_token_decode(one, k_past, v_past):
    return attend(dot(heads(one), heads(k_past)) * 0.5, heads(v_past))


@row(score="0.5·s", mask="j < length[b]")
def one_token_decode_of_static_cache(one, k_past, v_past, length):
    visible = torch.arange(k_past.shape[1])[None] < length[:, None]
    logits = (dot(heads(one), heads(k_past)) * 0.5).masked_fill(~visible[:, None, None], LOWEST)
    return attend(logits, heads(v_past))


@row(score="0.5·s", mask="j ≤ positions[b, i]")
def static_cache_scattered(q, k, v, k_static, v_static, positions):
    key, value = heads(k_static).clone(), heads(v_static).clone()
    place = positions[0]
    key, value = key.index_copy(2, place, heads(k)), value.index_copy(2, place, heads(v))
    hidden = torch.arange(key.shape[2])[None, None] > positions[:, :, None]
    return attend((dot(heads(q), key) * 0.5).masked_fill(hidden[:, None], LOWEST), value)


@row(score="0.5·s", q="[B,6,1,4]", k="[B,6,J,4]")
def one_query_without_its_axis(one, k_past, v_past):
    query = one.view(-1, HEADS, CHANNELS)
    weights = torch.softmax(torch.einsum("bhd,bkhd->bhk", query, split_heads(k_past)) * 0.5, -1)
    return torch.einsum("bhk,bkhd->bhd", weights, split_heads(v_past))


@row({"latents": torch.nn.Parameter(torch.randn(3, WIDTH))}, score="0.5·s", q="[B,6,3,4]")
def learned_queries(memory, latents):
    return attend(dot(heads(latents.expand(memory.shape[0], -1, -1)), heads(memory)) * 0.5, heads(memory))


@row({"seed": torch.nn.Parameter(torch.randn(WIDTH))}, score="0.20412414523193154·s", q="[B,1,1,24]")
def pooling_by_one_learned_query(memory, seed):
    weights = torch.softmax(torch.einsum("c,bnc->bn", seed, memory) / math.sqrt(WIDTH), -1)
    return torch.einsum("bn,bnc->bc", weights, memory)


# --- biases -------------------------------------------------------------------------------------------------


@row({"slopes": torch.rand(HEADS)}, score="0.5·s − slopes[h]·abs(j − i)")
def alibi_in_the_graph(q, k, v, slopes):
    n = torch.arange(q.shape[1])
    distance = (n[None] - n[:, None]).abs()
    return attend(dot(heads(q), heads(k)) * 0.5 - slopes[:, None, None] * distance, heads(v))


@row({"alibi": torch.randn(1, HEADS, 16, 16)}, score="0.5·s + alibi[0, h, i, j]")
def alibi_as_sliced_buffer(q, k, v, alibi):
    n = q.shape[1]
    return attend(dot(heads(q), heads(k)) * 0.5 + alibi[:, :, :n, :n], heads(v))


@row({"bias": torch.nn.Parameter(torch.randn(1, HEADS, QUERIES, QUERIES))}, score="0.5·s + bias[0, h, i, j]")
def bias_parameter_of_fixed_size(q, k, v, bias):
    return attend(dot(heads(q), heads(k)) * 0.5 + bias, heads(v))


@row({"table": torch.nn.Embedding(32, HEADS)}, score="s + table.weight[min(31, abs(j − i)), h]")
def distance_buckets_through_embedding(q, k, v, table):
    n = torch.arange(q.shape[1])
    buckets = (n[None] - n[:, None]).abs().clamp(max=31)
    return attend(dot(heads(q), heads(k)) + table(buckets).permute(2, 0, 1)[None], heads(v))


@row(
    {"table": torch.nn.Embedding(32, HEADS)},
    score="s + table.weight[where(abs(j − i) ≥ 8, min(15, to_2[i, j] + 8), abs(j − i)) + where(j > i, 16, 0), h]",
)
def buckets_as_t5_makes_them(q, k, v, table):
    n = torch.arange(q.shape[1])
    distance = n[None] - n[:, None]
    side, distance = (distance > 0).long() * 16, distance.abs()
    far = 8 + (torch.log(distance.float() / 8) / math.log(128 / 8) * 8).long()
    far = torch.min(far, torch.full_like(far, 15))
    buckets = side + torch.where(distance < 8, distance, far)
    return attend(dot(heads(q), heads(k)) + table(buckets).permute(2, 0, 1)[None], heads(v))


@row({"relative": torch.randn(32, CHANNELS)}, score="0.5·s + 0.5·einsum[b, h, i, i − j + 15]")
def second_product_with_relative_positions(q, k, v, relative):
    n = torch.arange(q.shape[1])
    places = (n[:, None] - n[None] + 15).expand(q.shape[0], HEADS, -1, -1)
    further = torch.einsum("bhid,rd->bhir", heads(q), relative).gather(-1, places)
    return attend((dot(heads(q), heads(k)) + further) * 0.5, heads(v))


@row(
    {"table": torch.randn(49, HEADS), "places": torch.randint(0, 49, (QUERIES, QUERIES))},
    score="0.5·s + table[places[i, j], h]",
)
def window_bias_table_as_swin_reads_it(q, k, v, table, places):
    bias = table[places.view(-1)].view(QUERIES, QUERIES, -1).permute(2, 0, 1).contiguous()
    return attend(dot(heads(q) * 0.5, heads(k)) + bias.unsqueeze(0), heads(v))


@row(
    {"first": torch.randn(HEADS, 16, 16), "second": torch.randn(16, 16)},
    score="0.5·s + first[h, i, j] + second[i, j]",
)
def two_biases(q, k, v, first, second):
    n = q.shape[1]
    return attend(dot(heads(q), heads(k)) * 0.5 + first[:, :n, :n] + second[:n, :n], heads(v))


@row(score="0.5·s + where(visible[b, i, j], 0.5, 0.0)")
def bias_inside_the_scale(q, k, v, visible):
    return attend((dot(heads(q), heads(k)) + visible[:, None].float()) * 0.5, heads(v))


# --- masks --------------------------------------------------------------------------------------------------


@row(score="0.5·s", mask="j ≤ i")
def causal_by_comparing_positions(q, k, v):
    n = torch.arange(q.shape[1])
    logits = dot(heads(q), heads(k)) * 0.5
    return attend(torch.where(n[None] <= n[:, None], logits, -torch.inf), heads(v))


@row(score="0.5·s", mask="j ≤ i")
def causal_by_full_and_triu(q, k, v):
    n = q.shape[1]
    mask = torch.full((n, n), -torch.inf).triu(1)
    return attend(dot(heads(q), heads(k)) * 0.5 + mask, heads(v))


@row(score="0.5·s", mask="j ≤ i")
def causal_by_tril_of_ones(q, k, v):
    n = q.shape[1]
    mask = torch.tril(torch.ones(n, n))
    return attend((dot(heads(q), heads(k)) * 0.5).masked_fill(mask == 0, -torch.inf), heads(v))


@row({"causal": CAUSAL}, score="0.5·s", mask="causal[i, j]")
def causal_buffer_sliced(q, k, v, causal):
    n = q.shape[1]
    return attend((dot(heads(q), heads(k)) * 0.5).masked_fill(~causal[:n, :n], -torch.inf), heads(v))


@row({"causal": CAUSAL[None, None].float()}, score="0.5·s", mask="causal[0, 0, i, j] ≠ 0.0", fill="−10000.0")
def causal_buffer_as_gpt2_wrote_it(q, k, v, causal):
    n = q.shape[1]
    logits = dot(heads(q), heads(k)) * 0.5
    return attend(torch.where(causal[:, :, :n, :n] != 0, logits, torch.tensor(-1e4)), heads(v))


# that the buffer holds zeros and ones is a fact about data: the expression stays as it is
@row(
    {"causal": CAUSAL[None, None].float()},
    score="0.5·s·causal[0, 0, i, j] + 10000.0·causal[0, 0, i, j] − 10000.0",
)
def causal_by_arithmetic_of_a_buffer(q, k, v, causal):
    n = q.shape[1]
    mask = causal[:, :, :n, :n]
    return attend(dot(heads(q), heads(k)) * 0.5 * mask - 1e4 * (1 - mask), heads(v))


@row(score="0.5·s", mask="j ≤ i", fill="−3.4028234663852886e+38")
def causal_with_lowest_number(q, k, v):
    n = torch.arange(q.shape[1])
    mask = torch.zeros(q.shape[1], q.shape[1]).masked_fill(n[None] > n[:, None], LOWEST)
    return attend(dot(heads(q), heads(k)) * 0.5 + mask, heads(v))


@row(score="0.5·s", mask="j ≤ i and j > i − 3")
def sliding_window(q, k, v):
    n = torch.arange(q.shape[1])
    distance = n[:, None] - n[None]
    mask = (distance >= 0) & (distance < 3)
    return attend((dot(heads(q), heads(k)) * 0.5).masked_fill(~mask, -torch.inf), heads(v))


@row(score="0.5·s", mask="abs(i − j) < 3")
def local_window_on_both_sides(q, k, v):
    n = torch.arange(q.shape[1])
    far = (n[:, None] - n[None]).abs() > 2
    return attend((dot(heads(q), heads(k)) * 0.5).masked_fill(far, -torch.inf), heads(v))


@row(score="0.5·s", mask="j ≤ i or j < 4")
def prefix_of_fixed_length(q, k, v):
    n = torch.arange(q.shape[1])
    visible = (n[None] <= n[:, None]) | (n[None] < 4)
    return attend((dot(heads(q), heads(k)) * 0.5).masked_fill(~visible, -torch.inf), heads(v))


@row(score="0.5·s", mask="j ≤ i or j < length[b]")
def prefix_of_given_length(q, k, v, length):
    n = torch.arange(q.shape[1])
    visible = (n[None] <= n[:, None])[None] | (n[None, None] < length[:, None, None])
    return attend((dot(heads(q), heads(k)) * 0.5).masked_fill(~visible[:, None], -torch.inf), heads(v))


@row(score="0.5·s", mask="documents[b, j] = documents[b, i]")
def documents_apart(q, k, v, documents):
    same = documents[:, :, None] == documents[:, None, :]
    return attend((dot(heads(q), heads(k)) * 0.5).masked_fill(~same[:, None], -torch.inf), heads(v))


@row(score="0.5·s", mask="j ≤ i and j // 3 = i // 3")
def chunked(q, k, v):
    n = torch.arange(q.shape[1])
    visible = (n[:, None] // 3 == n[None] // 3) & (n[None] <= n[:, None])
    return attend((dot(heads(q), heads(k)) * 0.5).masked_fill(~visible, -torch.inf), heads(v))


@row(score="0.5·s", mask="j ≤ i and (i + j) % 2 = 0")
def dilated(q, k, v):
    n = torch.arange(q.shape[1])
    distance = n[:, None] - n[None]
    visible = (distance >= 0) & (distance % 2 == 0)
    return attend((dot(heads(q), heads(k)) * 0.5).masked_fill(~visible, -torch.inf), heads(v))


@row(score="0.5·s", mask="abs(i // 3 − j // 3) < 2 and abs(i % 3 − j % 3) < 2")
def neighbourhood_in_two_dimensions(q, k, v):
    n = torch.arange(q.shape[1])
    row, column = n // 3, n % 3
    near = ((row[:, None] - row[None]).abs() <= 1) & ((column[:, None] - column[None]).abs() <= 1)
    return attend((dot(heads(q), heads(k)) * 0.5).masked_fill(~near, -torch.inf), heads(v))


@row(score="0.5·s", mask="j ≤ i and padding[b, j] ≠ 0")
def attention_mask_and_causal_as_truth_values(q, k, v, padding):
    n = torch.arange(q.shape[1])
    visible = (n[None] <= n[:, None])[None, None] & padding[:, None, None, :].bool()
    return attend((dot(heads(q), heads(k)) * 0.5).masked_fill(~visible, LOWEST), heads(v))


@row(score="0.5·s", mask="j ≤ i and documents[b, j] = documents[b, i]")
def documents_apart_and_causal(q, k, v, documents):
    n = torch.arange(q.shape[1])
    same = (documents[:, :, None] == documents[:, None]) & (n[None] <= n[:, None])
    return merged(
        F.scaled_dot_product_attention(heads(q), heads(k), heads(v), attn_mask=same[:, None])
    )


# as above: that the mask is 0 or 1 is known of no integer tensor
@row(score="0.5·s + 10000·padding[b, j] − 10000.0")
def bert_extended_mask(q, k, v, padding):
    mask = (1.0 - padding[:, None, None, :].float()) * -10000.0
    return attend(dot(heads(q), heads(k)) / 2 + mask, heads(v))


@row(score="0.5·s", mask="j ≤ i and padding[b, j] ≠ 0")
def padding_and_causal_summed(q, k, v, padding):
    n = q.shape[1]
    causal = torch.full((n, n), -torch.inf).triu(1)
    hidden = torch.zeros(padding.shape).masked_fill(padding == 0, -torch.inf)
    return attend(dot(heads(q), heads(k)) * 0.5 + causal + hidden[:, None, None], heads(v))


@row(score="0.5·s", mask="visible[b, i, j]")
def given_mask(q, k, v, visible):
    return attend((dot(heads(q), heads(k)) * 0.5).masked_fill(visible[:, None].logical_not(), -1e9), heads(v))


@row(score="0.5·s", mask="keep[b, i] and keep[b, j]")
def padding_of_queries_and_keys(q, k, v, keep):
    pairs = keep[:, :, None] & keep[:, None, :]
    return attend((dot(heads(q), heads(k)) * 0.5).masked_fill(~pairs[:, None], -torch.inf), heads(v))


@row(score="0.5·s", mask="keep[b, j]", weight="where(keep[b, i], w, 0.0)")
def weights_of_padded_queries_set_to_zero(q, k, v, keep):
    logits = (dot(heads(q), heads(k)) * 0.5).masked_fill(~keep[:, None, None, :], LOWEST)
    weights = torch.softmax(logits, -1).masked_fill(~keep[:, None, :, None], 0.0)
    return merged(weights @ heads(v))


# --- the weights --------------------------------------------------------------------------------------------


@row({"head_mask": torch.rand(HEADS)}, score="0.5·s", weight="w·head_mask[h]")
def head_mask_on_weights(q, k, v, head_mask):
    weights = torch.softmax(dot(heads(q), heads(k)) * 0.5, -1) * head_mask[None, :, None, None]
    return merged(weights @ heads(v))


@row(score="0.5·s", mask="visible[b, i, j]", weight="where(visible[b, i, j], w, 0.0)")
def empty_rows_set_to_zero(q, k, v, visible):
    visible = visible[:, None]
    weights = torch.softmax((dot(heads(q), heads(k)) * 0.5).masked_fill(~visible, -torch.inf), -1)
    return merged(torch.where(visible, weights, 0.0) @ heads(v))


@row(score="0.5·s", weight="w^3")
def weights_cubed(q, k, v):
    return merged(torch.softmax(dot(heads(q), heads(k)) * 0.5, -1) ** 3 @ heads(v))


@row({"dropout": torch.nn.Dropout(0.1)}, score="0.5·s")
def dropout_in_evaluation(q, k, v, dropout):
    return merged(dropout(torch.softmax(dot(heads(q), heads(k)) * 0.5, -1)) @ heads(v))


@row(score="0.5·s", status="observed", reason="the model returns it")
def weights_returned(q, k, v):
    weights = torch.softmax(dot(heads(q), heads(k)) * 0.5, -1)
    return merged(weights @ heads(v)), weights


@row(score="0.5·s", status="observed", reason="mean reads it")
def weights_read_elsewhere(q, k, v):
    weights = torch.softmax(dot(heads(q), heads(k)) * 0.5, -1)
    return merged(weights @ heads(v)), weights.mean(1)


@row(score="0.5·s", mask="j ≤ i")
def changed_in_place(q, k, v):
    n = torch.arange(q.shape[1])
    logits = dot(heads(q), heads(k))
    logits *= 0.5
    logits.masked_fill_(n[None] > n[:, None], -torch.inf)
    return attend(logits, heads(v))


# nothing may read the queries from before the change, so the operand is what the change leaves
@row({"packed": torch.nn.Linear(WIDTH, WIDTH)}, score="s")
def queries_scaled_in_place(x, k, v, packed):
    query = packed(x)
    query *= 0.5
    return attend(dot(heads(query), heads(k)), heads(v))


@row(score="0.5·s + where(j = 0, where(i < 1, 2.0, 1.0), where(j ≥ 1 or i < 1, 0.0, −1.0))")
def mask_written_in_slices(q, k, v):
    n = q.shape[1]
    mask = torch.zeros(n, n)
    mask[1:, :1] = -1.0
    mask[:, 0] += 2.0
    return attend(dot(heads(q), heads(k)) * 0.5 + mask, heads(v))


# --- softmax written by hand --------------------------------------------------------------------------------


@row(score="0.5·s")
def softmax_by_hand(q, k, v):
    logits = dot(heads(q), heads(k)) * 0.5
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    return merged(weights / weights.sum(-1, keepdim=True) @ heads(v))


@row(score="0.5·s", mask="j ≤ i")
def softmax_by_hand_without_maximum(q, k, v):
    n = torch.arange(q.shape[1])
    weights = (dot(heads(q), heads(k)) * 0.5).masked_fill(n[None] > n[:, None], -torch.inf).exp()
    return merged(weights / weights.sum(-1, keepdim=True) @ heads(v))


@row(score="0.5·s", mask="keep[b, j]")
def hidden_after_the_exponential(q, k, v, keep):
    logits = dot(heads(q), heads(k)) * 0.5
    weights = torch.exp(logits - logits.max(dim=-1, keepdim=True).values) * keep[:, None, None]
    return merged(weights / weights.sum(-1, keepdim=True) @ heads(v))


@row(score="0.5·s", norm="softmax (float32)")
def maximum_subtracted_before_softmax(q, k, v):
    logits = dot(heads(q), heads(k)) * 0.5
    return attend(logits - logits.amax(-1, keepdim=True).detach(), heads(v))


@row(score="0.5·s", norm="sigmoid (float32)", mask="j ≤ i")
def sigmoid_attention(q, k, v):
    n = torch.arange(q.shape[1])
    logits = (dot(heads(q), heads(k)) * 0.5).masked_fill(n[None] > n[:, None], -torch.inf)
    return merged(torch.sigmoid(logits) @ heads(v))


@row(score="0.5·s", norm="relu (float32)")
def relu_attention(q, k, v):
    return merged(torch.relu(dot(heads(q), heads(k)) * 0.5) @ heads(v))


@row(score="0.5·s", norm="softmax (float32)")
def divided_after_the_values(q, k, v):
    logits = dot(heads(q), heads(k)) * 0.5
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    return merged((weights @ heads(v)) / weights.sum(-1, keepdim=True))


@row(score="0.5·s", mask="j ≤ i")
def divided_after_the_values_in_another_layout(q, k, v):
    n = torch.arange(q.shape[1])
    logits = torch.einsum("bqhd,bkhd->bhqk", split_heads(q), split_heads(k)) * 0.5
    logits = logits.masked_fill(n[None] > n[:, None], -torch.inf)
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    out = torch.einsum("bhqk,bkhd->bqhd", weights, split_heads(v))
    return (out * (1.0 / weights.sum(-1)).transpose(1, 2)[..., None]).flatten(2)


@row(score="0.5·s", sink="−13.815510557964274")
def small_number_added_to_the_sum(q, k, v):
    weights = torch.exp(dot(heads(q), heads(k)) * 0.5)
    return merged(weights / (weights.sum(-1, keepdim=True) + 1e-6) @ heads(v))


@row(score="0.5·s", sink="0.0")
def softmax_plus_one(q, k, v):
    weights = torch.exp(dot(heads(q), heads(k)) * 0.5)
    return merged(weights / (1 + weights.sum(-1, keepdim=True)) @ heads(v))


@row(score="0.5·s", sink="0.0")
def softmax_plus_one_less_the_maximum(q, k, v):
    logits = dot(heads(q), heads(k)) * 0.5
    largest = logits.max(dim=-1, keepdim=True).values
    weights = torch.exp(logits - largest)
    return merged(weights / (torch.exp(-largest) + weights.sum(-1, keepdim=True)) @ heads(v))


@row(score="0.5·s", sink="0.0", mask="j ≤ i")
def softmax_plus_one_less_a_maximum_of_at_least_zero(q, k, v):
    n = torch.arange(q.shape[1])
    logits = (dot(heads(q), heads(k)) * 0.5).masked_fill(n[None] > n[:, None], -torch.inf)
    largest = logits.amax(-1, keepdim=True).clamp(min=0)
    weights = torch.exp(logits - largest)
    return merged(weights / (weights.sum(-1, keepdim=True) + torch.exp(-largest)) @ heads(v))


@row(score="0.5·s")
def exponential_less_the_log_of_the_sum(q, k, v):
    logits = dot(heads(q), heads(k)) * 0.5
    return merged(torch.exp(logits - torch.logsumexp(logits, -1, keepdim=True)) @ heads(v))


@row(score="0.5·s")
def exponential_less_the_log_of_the_sum_by_hand(q, k, v):
    logits = dot(heads(q), heads(k)) * 0.5
    largest = logits.amax(-1, keepdim=True)
    total = largest + torch.log(torch.exp(logits - largest).sum(-1, keepdim=True))
    return merged(torch.exp(logits - total) @ heads(v))


@row(score="0.5·s", mask="j ≤ i")
def softmax_in_base_two(q, k, v):
    n = torch.arange(q.shape[1])
    logits = (dot(heads(q), heads(k)) * (0.5 / math.log(2))).masked_fill(n[None] > n[:, None], -torch.inf)
    weights = torch.exp2(logits - logits.amax(-1, keepdim=True))
    return merged((weights / weights.sum(-1, keepdim=True)) @ heads(v))


@row(score="0.5·s")
def softmax_of_a_transposed_map(q, k, v):
    logits = (dot(heads(q), heads(k)) * 0.5).transpose(-1, -2)
    return merged(torch.softmax(logits, -2).transpose(-1, -2) @ heads(v))


# --- other normalisers --------------------------------------------------------------------------------------


@row(score="max(0.0, 0.5·s)", norm="sum (float32)")
def relu_divided_by_its_sum(q, k, v):
    weights = torch.relu(dot(heads(q), heads(k)) * 0.5)
    return merged(weights / weights.sum(-1, keepdim=True) @ heads(v))


@row(score="max(0.0, 0.5·s)", mask="j ≤ i", fill="0.0", norm="sum (float32)", divisor="max(1e-06, t)")
def relu_divided_by_its_sum_but_never_by_zero(q, k, v):
    n = torch.arange(q.shape[1])
    weights = torch.relu((dot(heads(q), heads(k)) * 0.5).masked_fill(n[None] > n[:, None], -torch.inf))
    return merged(weights / weights.sum(-1, keepdim=True).clamp(min=1e-6) @ heads(v))


@row(score="0.25·s·s", norm="sum (float32)", divisor="t + 1e-06")
def squares_divided_by_their_sum(q, k, v):
    weights = (dot(heads(q), heads(k)) * 0.5) ** 2
    return merged(weights / (weights.sum(-1, keepdim=True) + 1e-6) @ heads(v))


@row(score="exp(0.5·s)", norm="sum (float32)", divisor="max(1e-06, t)")
def exponentials_divided_by_at_least_something(q, k, v):
    weights = torch.exp(dot(heads(q), heads(k)) * 0.5)
    return merged(weights / weights.sum(-1, keepdim=True).clamp_min(1e-6) @ heads(v))


@row(score="0.5·s", norm="l1 (float32)", divisor="max(1.0, t)")
def signed_weights_divided_by_their_absolute_sum(q, k, v):
    weights = dot(heads(q), heads(k)) * 0.5
    return merged(weights / weights.abs().sum(-1, keepdim=True).clamp(min=1.0) @ heads(v))


@row(score="max(0.0, 0.5·s)", norm="sum (float32)", divisor="t + 0.001")
def relu_divided_after_the_values(q, k, v):
    weights = torch.relu(dot(heads(q), heads(k)) * 0.5)
    return merged((weights @ heads(v)) / (weights.sum(-1, keepdim=True) + 1e-3))


@row(score="s", weight="0.25·w·w", norm="relu (float32)")
def squared_relu(q, k, v):
    return merged((torch.clamp(dot(heads(q), heads(k)), min=0) * 0.5).square() @ heads(v))


# --- linear attention in parallel form ----------------------------------------------------------------------


@row(score="s", mask="j ≤ i", fill="0.0", norm="none (float32)")
def linear_attention_in_parallel_form(q, k, v):
    query, key = (F.elu(heads(x)) + 1 for x in (q, k))
    return merged(dot(query, key).tril() @ heads(v))


@row(score="s", mask="j ≤ i", fill="0.0", norm="sum (float32)", divisor="t + 1e-06")
def linear_attention_in_parallel_form_normalised(q, k, v):
    query, key = (F.elu(heads(x)) + 1 for x in (q, k))
    n = torch.arange(q.shape[1])
    weights = dot(query, key) * (n[None] <= n[:, None])
    return merged((weights @ heads(v)) / (weights.sum(-1, keepdim=True) + 1e-6))


@row(score="s", norm="sum (float32)")
def linear_attention_over_all_keys_normalised(q, k, v):
    query, key = (torch.relu(heads(x)) + 0.1 for x in (q, k))
    weights = torch.einsum("bhid,bhjd->bhij", query, key)
    return merged(torch.einsum("bhij,bhjd->bhid", weights / weights.sum(-1, keepdim=True), heads(v)))


@row(
    {"decay": torch.rand(HEADS)},
    score="0.5·s·decay[h]^(i − j)",
    mask="j ≤ i",
    fill="0.0",
    norm="l1 (float32)",
    divisor="max(1.0, t)",
)
def retention_in_parallel_form(q, k, v, decay):
    n = torch.arange(q.shape[1])
    distance = n[:, None] - n[None]
    powers = torch.where(distance >= 0, decay[:, None, None] ** distance, 0.0)
    weights = dot(heads(q), heads(k)) * 0.5 * powers
    return merged(weights / weights.detach().abs().sum(-1, keepdim=True).clamp(min=1.0) @ heads(v))


@row(score="0.5·s")
def exponential_of_log_softmax(q, k, v):
    return merged(F.log_softmax(dot(heads(q), heads(k)) * 0.5, -1).exp() @ heads(v))


# --- sinks: keys without a value ------------------------------------------------------------------------------


SINKS = {"sinks": torch.nn.Parameter(torch.randn(HEADS))}


@row(SINKS, score="0.5·s", sink="sinks[h]")
def sink_column(q, k, v, sinks):
    logits = dot(heads(q), heads(k)) * 0.5
    column = sinks[None, :, None, None].expand(q.shape[0], -1, q.shape[1], 1)
    return merged(torch.softmax(torch.cat([logits, column], -1), -1)[..., :-1] @ heads(v))


@row(SINKS, score="0.5·s", sink="sinks[h]", mask="j ≤ i")
def sink_column_less_the_maximum(q, k, v, sinks):
    ahead = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    logits = (dot(heads(q), heads(k)) * 0.5).masked_fill(ahead, float("-inf"))
    column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[1], -1)
    combined = torch.cat([logits, column], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    return merged(torch.softmax(combined, -1)[..., :-1] @ heads(v))


@row(SINKS, score="0.5·s", sink="sinks[h]")
def sink_column_in_front(q, k, v, sinks):
    logits = dot(heads(q), heads(k)) * 0.5
    column = sinks[None, :, None, None].expand(q.shape[0], -1, q.shape[1], 1)
    return merged(torch.softmax(torch.cat([column, logits], -1), -1)[..., 1:] @ heads(v))


@row(score="0.5·s", sink="0.0")
def softmax_with_a_padded_zero(q, k, v):
    logits = F.pad(dot(heads(q), heads(k)) * 0.5, (1, 0))
    return merged(torch.softmax(logits, -1)[..., 1:] @ heads(v))


@row(SINKS, score="0.5·s", sink="sinks[h]")
def sink_as_a_sigmoid_of_the_log_sum(q, k, v, sinks):
    logits = dot(heads(q), heads(k)) * 0.5
    out = torch.softmax(logits, -1) @ heads(v)
    share = torch.sigmoid(torch.logsumexp(logits, -1) - sinks[:, None])
    return merged(out * share[..., None])


@row(SINKS, score="0.5·s", sink="sinks[h]", mask="j ≤ i")
def sink_as_a_change_of_the_log_sum(q, k, v, sinks):
    n = torch.arange(q.shape[1])
    logits = (dot(heads(q), heads(k)) * 0.5).masked_fill(n[None] > n[:, None], -torch.inf)
    largest = logits.amax(-1, keepdim=True)
    exponentials = torch.exp(logits - largest)
    total = exponentials.sum(-1, keepdim=True)
    lse = torch.log(total) + largest
    combined = torch.log(torch.exp(lse) + torch.exp(sinks[:, None, None]))
    out = (exponentials / total) @ heads(v)
    return (out.transpose(1, 2) * torch.exp(lse - combined).transpose(1, 2)).flatten(2)


@row(SINKS, score="0.5·s", sink="sinks[h]")
def sink_added_to_the_sum(q, k, v, sinks):
    logits = dot(heads(q), heads(k)) * 0.5
    sink = sinks[:, None, None]
    largest = torch.maximum(logits.amax(-1, keepdim=True), sink)
    weights = torch.exp(logits - largest)
    return merged(weights / (weights.sum(-1, keepdim=True) + torch.exp(sink - largest)) @ heads(v))


# --- the log-sum-exp as a second result -----------------------------------------------------------------------


@row(score="0.5·s", lse="lse")
def log_sum_exp_returned(q, k, v):
    logits = dot(heads(q), heads(k)) * 0.5
    return merged(torch.softmax(logits, -1) @ heads(v)), torch.logsumexp(logits, -1)


@row(score="0.5·s", mask="j ≤ i", lse="lse")
def log_sum_exp_by_hand_returned(q, k, v):
    n = torch.arange(q.shape[1])
    logits = (dot(heads(q), heads(k)) * 0.5).masked_fill(n[None] > n[:, None], -torch.inf)
    largest = logits.amax(-1, keepdim=True)
    weights = torch.exp(logits - largest)
    total = weights.sum(-1, keepdim=True)
    return merged((weights @ heads(v)) / total), (largest + total.log()).squeeze(-1)


@row(SINKS, score="0.5·s", sink="sinks[h]", lse="lse")
def log_sum_exp_with_a_sink_returned(q, k, v, sinks):
    column = sinks[None, :, None, None].expand(q.shape[0], -1, q.shape[1], 1)
    logits = torch.cat([dot(heads(q), heads(k)) * 0.5, column], -1)
    return merged(torch.softmax(logits, -1)[..., :-1] @ heads(v)), logits.logsumexp(-1)


@row(score="0.5·s", lse="lse", sites=2)
def parts_merged_by_their_log_sums(q, k, v, k_past, v_past):
    parts = []
    for key, value in ((k, v), (k_past, v_past)):
        logits = dot(heads(q), heads(key)) * 0.5
        parts.append((torch.softmax(logits, -1) @ heads(value), torch.logsumexp(logits, -1, keepdim=True)))
    (first, first_sum), (second, second_sum) = parts
    share = torch.sigmoid(first_sum - second_sum)
    return merged(first * share + second * (1 - share))


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


# --- slices of a tensor written in place --------------------------------------------------------------------


@row(score="0.5·s", mask="j ≠ 0")
def first_key_hidden_in_place(q, k, v):
    logits = dot(heads(q), heads(k)) * 0.5
    logits[..., 0] = -torch.inf
    return attend(logits, heads(v))


@row(score="0.5·s", mask="j ≠ i")
def diagonal_hidden_in_place(q, k, v):
    logits = dot(heads(q), heads(k)) * 0.5
    logits.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
    return attend(logits, heads(v))


@row(score="where(j ≥ 3, s, 0.5·s)")
def scores_copied_in_parts_into_an_empty_buffer(q, k, v):
    logits = dot(heads(q), heads(k))
    buffer = logits.new_empty(logits.shape)
    buffer[..., :3] = logits[..., :3] * 0.5
    buffer[..., 3:] = logits[..., 3:]
    return attend(buffer, heads(v))


@row(score="s", mask="keep[b, j]")
def masked_through_a_view_of_rank_four(q, k, v, keep):
    b, n = keep.shape
    logits = torch.bmm(flat(q), flat(k).transpose(1, 2))
    logits.view(b, HEADS, n, n).masked_fill_(~keep[:, None, None, :], -torch.inf)
    return torch.bmm(torch.softmax(logits, -1), flat(v))


@row(score="0.5·s", mask="(j < 1 or i ≠ 0) and (j < 2 or i ≠ 1) and (j < 3 or i ≠ 2)")
def mask_of_rows_written_one_by_one(q, k, v):
    n = q.shape[1]
    hidden = torch.zeros(16, 16, dtype=torch.bool)
    for number in range(3):
        hidden[number, number + 1 :] = True
    return attend((dot(heads(q), heads(k)) * 0.5).masked_fill(hidden[:n, :n], -torch.inf), heads(v))


@row(score="0.5·s")
def rotated_into_an_empty_buffer(q, k, v):
    source = heads(q)
    rotated = torch.empty_like(source)
    rotated[..., ::2] = -source[..., 1::2]
    rotated[..., 1::2] = source[..., ::2]
    return attend(dot(rotated, heads(k)) * 0.5, heads(v))


@row(score="0.5·s", mask="i // 4 ≠ 0 or j // 4 ≠ 1")
def one_block_of_a_mask_of_blocks(q, k, v):
    n = q.shape[1]
    mask = torch.ones(16, 16, dtype=torch.bool)
    mask.view(4, 4, 4, 4)[0, :, 1].fill_(False)
    logits = dot(heads(q), heads(k)) * 0.5
    return attend(logits.masked_fill(~mask[:n, :n], -torch.inf), heads(v))


@row(score="0.5·s")
def result_copied_into_a_buffer(q, k, v):
    out = torch.empty_like(q)
    out[:, :3] = v[:, :3]
    out[:, 3:] = attend(dot(heads(q), heads(k)) * 0.5, heads(v))[:, 3:]
    return out
