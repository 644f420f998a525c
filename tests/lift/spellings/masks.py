"""Biases and masks, computed, given, and written in place."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tests.lift.forms import (
    CHANNELS,
    HEADS,
    QUERIES,
    Table,
    attend,
    dot,
    flat,
    heads,
    merged,
)

TABLE = Table()
row = TABLE.row

LOWEST = torch.finfo(torch.float32).min
CAUSAL = torch.ones(16, 16, dtype=torch.bool).tril()


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
    score="s + embedding[i, j, h]",
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
def causal_within_sequences_counted_from_positions(q, k, v):
    positions = torch.arange(q.shape[1])[None]
    steps = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1)
    sequence = (steps != 1).cumsum(-1)
    same = sequence[:, None, :, None] == sequence[:, None, None, :]
    n = torch.arange(q.shape[1])
    return F.scaled_dot_product_attention(heads(q), heads(k), heads(v), same & (n[None] <= n[:, None]), scale=0.5)


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


# --- slices of a tensor written in place --------------------------------------------------------------------


@row(score="0.5·s", mask="j ≠ 0")
def first_key_hidden_in_place(q, k, v):
    logits = dot(heads(q), heads(k)) * 0.5
    logits[..., 0] = -torch.inf
    return attend(logits, heads(v))


@row(score="0.5·s", mask="j ≤ i")
def keys_hidden_where_a_map_says_in_place(q, k, v):
    n = q.shape[1]
    logits = dot(heads(q), heads(k)) * 0.5
    logits[:, :, torch.ones(n, n, dtype=torch.bool).triu(1)] = -torch.inf
    return attend(logits, heads(v))


@row(score="0.5·s", mask="visible[b, i, j]")
def keys_hidden_where_a_whole_map_says_in_place(q, k, v, visible):
    logits = dot(heads(q), heads(k)) * 0.5
    logits[~visible[:, None].expand_as(logits)] = -torch.inf
    return attend(logits, heads(v))


@row(score="0.5·s", mask="keep[b, j]")
def keys_hidden_where_truth_says_in_a_transposed_view(q, k, v, keep):
    logits = dot(heads(q), heads(k)) * 0.5
    logits.permute(0, 3, 1, 2)[~keep] = -torch.inf
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
