"""Keys without a value, and the log-sum-exp as a second result."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.lift.forms import (
    HEADS,
    Table,
    dot,
    heads,
    merged,
)

TABLE = Table()
row = TABLE.row



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
