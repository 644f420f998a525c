"""Where queries, keys and values come from: packed projections, positions, caches, other sequences."""

from __future__ import annotations

import math

import torch

from tests.lift.forms import (
    CHANNELS,
    GROUPS,
    HEADS,
    WIDTH,
    Table,
    attend,
    dot,
    heads,
    repeated,
    split_heads,
)

TABLE = Table()
row = TABLE.row

LOWEST = torch.finfo(torch.float32).min


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
