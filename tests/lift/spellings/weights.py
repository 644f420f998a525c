"""What is done to the weights, softmax written by hand, and other normalisers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tests.lift.forms import (
    HEADS,
    WIDTH,
    Table,
    attend,
    dot,
    heads,
    merged,
    split_heads,
)

TABLE = Table()
row = TABLE.row



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
