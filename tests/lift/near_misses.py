"""What looks like attention and must not be taken for something it is not.

A row says what happens: ``kind`` of the refusal, or the exact score, mask and weight, or that there is no
site at all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.lift.forms import HEADS, WIDTH, Table, attend, dot, heads, merged

NEAR_MISSES = Table()
row = NEAR_MISSES.row


def scores(q, k):
    return dot(heads(q), heads(k)) * 0.5


def weights_of(q, k):
    return torch.softmax(scores(q, k), -1)


# --- lifted as what they are --------------------------------------------------------------------------------


@row(score="0.5·s", key="index_select")
def keys_permuted_but_not_values(q, k, v):
    order = torch.arange(k.shape[1] - 1, -1, -1)
    return attend(dot(heads(q), heads(k).index_select(2, order)) * 0.5, heads(v))


@row(score="0.5·s", key="flip")
def keys_flipped(q, k, v):
    return attend(dot(heads(q), heads(k).flip(2)) * 0.5, heads(v))


@row(score="0.5·s", key="roll")
def keys_rolled(q, k, v):
    return attend(dot(heads(q), torch.roll(heads(k), 1, 2)) * 0.5, heads(v))


@row(score="0.5·s", mask="j ≤ i + 1")
def almost_causal(q, k, v):
    n = torch.arange(q.shape[1])
    return attend(scores(q, k).masked_fill(n[None] > n[:, None] + 1, -torch.inf), heads(v))


@row(score="0.5·s", mask="j < i")
def causal_without_the_diagonal(q, k, v):
    n = torch.arange(q.shape[1])
    return attend(scores(q, k).masked_fill(n[None] >= n[:, None], -torch.inf), heads(v))


@row(score="0.5·s", mask="j ≥ i")
def anticausal(q, k, v):
    n = torch.arange(q.shape[1])
    return attend(scores(q, k).masked_fill(n[None] < n[:, None], -torch.inf), heads(v))


@row(score="0.5·s", mask="i ≠ 2 or j ≠ 1")
def mask_with_one_hole(q, k, v):
    n = torch.arange(q.shape[1])
    return attend(scores(q, k).masked_fill((n[:, None] == 2) & (n[None] == 1), -torch.inf), heads(v))


@row(score="0.5·s + where(j ≤ i, 0.0, −20.0)")
def penalty_too_small_to_hide(q, k, v):
    n = torch.arange(q.shape[1])
    return attend(scores(q, k) - 20.0 * (n[None] > n[:, None]), heads(v))


@row(score="0.25·s·s")
def scores_squared(q, k, v):
    logits = scores(q, k)
    return attend(logits * logits, heads(v))


@row(score="0.5·s", weight="w·w")
def weights_squared(q, k, v):
    return merged(weights_of(q, k) ** 2 @ heads(v))


@row(score="0.5·s", weight="max(0.0, w − 0.1)")
def weights_thresholded(q, k, v):
    return merged(torch.relu(weights_of(q, k) - 0.1) @ heads(v))


@row(score="0.3·s")
def unusual_scale(q, k, v):
    return merged(F.scaled_dot_product_attention(heads(q), heads(k), heads(v), scale=0.3))


@row(status="observed", kind="escaping-value")
def scores_reused(q, k, v):
    logits = scores(q, k)
    return attend(logits, heads(v)), logits.amax(-1)


@row(status="observed", kind="escaping-value")
def weights_on_two_values(q, k, v):
    weights = weights_of(q, k)
    return merged(weights @ heads(v)) + merged(weights @ heads(q))


# --- refused ------------------------------------------------------------------------------------------------


@row(kind="wrong-axis")
def softmax_over_queries(q, k, v):
    return merged(torch.softmax(scores(q, k), -2) @ heads(v))


@row(kind="wrong-axis")
def softmax_over_heads(q, k, v):
    return merged(torch.softmax(scores(q, k), 1) @ heads(v))


@row(kind="uninterpreted-node")
def weights_rolled(q, k, v):
    return merged(torch.roll(weights_of(q, k), 1, -1) @ heads(v))


@row(kind="no-value-product")
def scores_alone(q, k):
    return weights_of(q, k)


@row(kind="uninterpreted-node")
def dropout_while_training(q, k, v):
    return merged(F.dropout(weights_of(q, k), 0.5, training=True) @ heads(v))


@row(kind="partial-normaliser")
def sink_that_is_a_score(q, k, v):
    logits = scores(q, k)
    return merged(torch.softmax(torch.cat([logits, logits[..., :1]], -1), -1)[..., :-1] @ heads(v))


@row(kind="partial-normaliser")
def first_key_dropped_after_softmax(q, k, v):
    return merged(weights_of(q, k)[..., 1:] @ heads(v)[:, :, 1:])


@row(kind="uninterpreted-node")
def scores_less_their_sorted(q, k, v):
    logits = scores(q, k)
    return attend(logits - torch.sort(logits, -1).values, heads(v))


@row(kind="uninterpreted-node")
def scores_summed_up(q, k, v):
    return attend(torch.cumsum(scores(q, k), -1), heads(v))


@row(kind="uninterpreted-node")
def double_softmax(q, k, v):
    return attend(weights_of(q, k), heads(v))


@row(kind="several-elements")
def scores_symmetrised(q, k, v):
    logits = scores(q, k)
    return attend(logits + logits.transpose(-1, -2), heads(v))


@row(kind="several-elements")
def weights_of_neighbours_added(q, k, v):
    weights = weights_of(q, k)
    return merged((weights + weights.flip(-1)) @ heads(v))


@row(kind="uninterpreted-node")
def weights_edited_by_scores_kept(q, k, v):
    logits = scores(q, k)
    weights = torch.softmax(logits, -1)
    kept = torch.topk(weights, 2, -1).values[..., -1:]
    return merged(torch.where(weights >= kept, weights, 0.0) @ heads(v))


@row(kind="weight-reads-score")
def weights_times_scores(q, k, v):
    logits = scores(q, k)
    return merged(torch.softmax(logits, -1) * logits @ heads(v))


@row({"mixing": torch.nn.Parameter(torch.randn(HEADS, HEADS))}, kind="mixed-scores")
def talking_heads(q, k, v, mixing):
    logits = torch.einsum("bhij,hg->bgij", scores(q, k), mixing)
    return attend(logits, heads(v))


@row({"mixing": torch.nn.Parameter(torch.randn(HEADS, HEADS))}, kind="wrong-axis")
def talking_weights(q, k, v, mixing):
    return merged(torch.einsum("bhij,hg->bgij", weights_of(q, k), mixing) @ heads(v))


@row(
    {"before": torch.nn.Linear(HEADS, HEADS), "behind": torch.nn.Linear(HEADS, HEADS, bias=False)},
    kind="mixed-scores",
)
def talking_heads_as_layers(q, k, v, before, behind):
    logits = before(scores(q, k).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    weights = behind(torch.softmax(logits, -1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return merged(weights @ heads(v))


@row(kind="not-a-product")
def weights_times_themselves(q, k):
    weights = weights_of(q, k)
    return weights @ weights


@row(kind="not-a-product")
def values_made_of_weights(q, k, v):
    weights = weights_of(q, k)
    return merged(weights @ (heads(v) * weights.sum(-1)[..., None]))


@row(kind="unknown-normaliser")
def small_number_added_below_the_maximum(q, k, v):
    logits = scores(q, k)
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    return merged(weights / (weights.sum(-1, keepdim=True) + 1e-6) @ heads(v))


@row(kind="unknown-normaliser")
def another_maximum_in_the_sink(q, k, v):
    logits = scores(q, k)
    largest = logits.amax(-1, keepdim=True)
    weights = torch.exp(logits - largest)
    return merged(weights / (weights.sum(-1, keepdim=True) + torch.exp(-2 * largest)) @ heads(v))


@row(kind="wrong-axis")
def divided_by_the_sum_over_queries(q, k, v):
    weights = torch.exp(scores(q, k))
    return merged(weights / weights.sum(-2, keepdim=True) @ heads(v))


@row(kind="unknown-normaliser")
def divided_by_the_sum_of_some_keys(q, k, v):
    weights = torch.exp(scores(q, k))
    return merged(weights / weights[..., 1:].sum(-1, keepdim=True) @ heads(v))


@row(kind="unknown-normaliser")
def divided_by_the_sum_of_other_weights(q, k, v):
    logits = scores(q, k)
    return merged(torch.exp(logits) / torch.exp(2 * logits).sum(-1, keepdim=True) @ heads(v))


@row(score="exp(0.5·s)", norm="sum (float32)", divisor="sqrt(t)")
def divided_by_the_root_of_the_sum(q, k, v):
    weights = torch.exp(scores(q, k))
    return merged(weights / weights.sum(-1, keepdim=True).sqrt() @ heads(v))


@row(kind="unknown-normaliser")
def divided_by_the_norm_of_the_row(q, k, v):
    weights = scores(q, k)
    return merged(weights / (weights * weights).sum(-1, keepdim=True).sqrt() @ heads(v))


@row(score="exp(0.5·s) / sum_1[b, h, i, 0]", norm="none (float32)")
def divided_by_the_sum_over_other_scores(q, k, v):
    weights = torch.exp(scores(q, k))
    return merged(weights / torch.exp(scores(k, q)).sum(-1, keepdim=True) @ heads(v))


@row(score="exp(0.5·s)", norm="none (float32)")
def exponentials_never_divided(q, k, v):
    return merged(torch.exp(scores(q, k)) @ heads(v))


@row(score="0.5·s", status="observed", kind="escaping-value")
def corrected_by_the_log_sum_of_other_scores(q, k, v):
    logits = scores(q, k)
    out = torch.softmax(logits, -1) @ heads(v)
    return merged(out * torch.sigmoid(torch.logsumexp(2 * logits, -1, keepdim=True)))


@row(score="0.5·s", mask="j ≤ i", status="observed", kind="escaping-value")
def log_sum_of_all_keys_beside_a_mask(q, k, v):
    n = torch.arange(q.shape[1])
    logits = scores(q, k)
    masked = logits.masked_fill(n[None] > n[:, None], -torch.inf)
    return attend(masked, heads(v)), torch.logsumexp(logits, -1)


@row(score="0.5·s", status="observed", kind="escaping-value")
def largest_weight_returned(q, k, v):
    weights = weights_of(q, k)
    return merged(weights @ heads(v)), weights.amax(-1)


@row(kind="rounded")
def scores_in_steps(q, k, v):
    return attend((torch.exp(scores(q, k)) * 8).long() / 8.0, heads(v))


@row(kind="unknown-normaliser")
def products_alone(q, k, v):
    return merged(scores(q, k) @ heads(v))


@row(kind="unknown-normaliser")
def products_times_a_number_per_query(q, k, v, keep):
    return merged((scores(q, k) * keep[:, None, :, None]) @ heads(v))


@row({"packed": torch.nn.Linear(WIDTH, WIDTH)}, sites=0)
def linear_attention_in_the_other_order(q, k, v, packed):
    query, key = torch.relu(heads(q)), torch.relu(heads(k))
    return packed(merged(query @ (key.transpose(-1, -2) @ heads(v))))


@row(score="0.5·s", weight="2.0·w", status="observed", kind="escaping-value")
def weights_changed_after_reading(q, k, v):
    weights = weights_of(q, k)
    early = weights.sum(-2)
    weights.mul_(2.0)
    return merged(weights @ heads(v)), early


@row(kind="several-elements")
def weights_changed_by_the_first_of_them(q, k, v):
    weights = weights_of(q, k)
    early = weights[..., :1] * 1.0
    weights.mul_(early)
    return merged(weights @ heads(v))


@row(status="observed", kind="escaping-value")
def maximum_of_a_column_subtracted(q, k, v):
    logits = scores(q, k)
    return attend(logits - logits.amax(-2, keepdim=True), heads(v))


@row(score="where(j ≠ 0, 0.5·s, 0.0)")
def scores_changed_through_a_view(q, k, v):
    logits = scores(q, k)
    logits[..., 0] = 0.0
    return attend(logits, heads(v))


@row({"packed": torch.nn.Linear(WIDTH, WIDTH)}, kind="overwritten")
def bias_changed_afterwards(q, k, v, packed):
    bias = packed(v)
    early = bias[..., 0]
    logits = scores(q, k) + early[:, None, None]
    bias.add_(1.0)
    return attend(logits, heads(v)), bias


@row({"packed": torch.nn.Linear(WIDTH, WIDTH)}, kind="operand-layout")
def keys_changed_afterwards(q, x, v, packed):
    key = packed(x)
    out = attend(scores(q, key), heads(v))
    key.mul_(2.0)
    return out, key


@row(kind="uninterpreted-node")
def numbers_added_where_a_map_says(q, k, v, visible):
    logits = scores(q, k)
    logits.index_put_((~visible[:, None].expand_as(logits),), torch.tensor(-1.0), accumulate=True)
    return attend(logits, heads(v))


@row(kind="unstated-attention")
def fused_with_dropout(q, k, v):
    return merged(F.scaled_dot_product_attention(heads(q), heads(k), heads(v), dropout_p=0.5))


# --- no attention -------------------------------------------------------------------------------------------


@row({"classify": torch.nn.Linear(WIDTH, 5)}, sites=0)
def classifier(x, classify):
    return torch.softmax(classify(x.mean(1)), -1)


@row({"classify": torch.nn.Parameter(torch.randn(WIDTH, 5))}, sites=0)
def classifier_written_as_a_product(x, classify):
    return torch.softmax(x @ classify, -1)


@row(
    {"router": torch.nn.Linear(WIDTH, 3), "experts": torch.nn.Parameter(torch.randn(3, WIDTH, WIDTH))},
    sites=0,
)
def router_of_experts(x, router, experts):
    share = torch.softmax(router(x), -1)
    return torch.einsum("bne,bned->bnd", share, torch.einsum("bnc,ecd->bned", x, experts))


@row(
    {
        "router": torch.nn.Parameter(torch.randn(WIDTH, 3)),
        "experts": torch.nn.Parameter(torch.randn(3, WIDTH, WIDTH)),
    },
    sites=0,
)
def router_written_as_a_product(x, router, experts):
    share = torch.softmax(x @ router, -1)
    return torch.einsum("bne,bned->bnd", share, torch.einsum("bnc,ecd->bned", x, experts))


@row({"router": torch.nn.Linear(WIDTH, 3), "experts": torch.nn.Linear(WIDTH, 3 * WIDTH)}, sites=1, score="0.5·s")
def router_of_what_attention_gives(q, k, v, router, experts):
    state = attend(scores(q, k), heads(v))
    share = torch.softmax(router(state), -1)
    return torch.einsum("bne,bned->bnd", share, experts(state).unflatten(-1, (3, WIDTH)))


@row({"down": torch.nn.Linear(WIDTH, 4), "up": torch.nn.Linear(4, WIDTH)}, sites=0)
def squeeze_and_excite(x, down, up):
    return x * torch.sigmoid(up(torch.relu(down(x.mean(1)))))[:, None]


@row({"rate": torch.nn.Linear(WIDTH, 1)}, sites=0)
def pooling_by_softmax(x, rate):
    return (torch.softmax(rate(x), 1) * x).sum(1)


@row({"gate": torch.nn.Linear(WIDTH, WIDTH), "up": torch.nn.Linear(WIDTH, WIDTH)}, sites=0)
def gated_layer(x, gate, up):
    return torch.sigmoid(gate(x)) * up(x)


@row({"frequency": 0.1 ** torch.arange(2)}, sites=1, score="0.5·s")
def rotary_angles_are_no_scores(q, k, v, positions, frequency):
    angle = (frequency[None, :, None] @ positions[:, None].float()).transpose(1, 2).repeat(1, 1, 2)[:, None]

    def rotate(x):
        first, second = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()

    return attend(dot(rotate(heads(q)), rotate(heads(k))) * 0.5, heads(v))


@row(sites=1, score="0.5·s")
def norms_are_no_scores(q, k, v):
    def unit(x):
        return x * torch.rsqrt((x * x.clone()).sum(-1, keepdim=True) + 1e-6)

    return attend(dot(unit(heads(q)), unit(heads(k))) * 0.5, heads(v))


# --- slices of a tensor written in place --------------------------------------------------------------------


@row(kind="operand-layout")
def scores_shifted_by_one_into_a_buffer(q, k, v):
    shifted = torch.zeros(q.shape[0], HEADS, q.shape[1], k.shape[1])
    shifted[..., 1:] = scores(q, k)[..., :-1]
    return attend(shifted, heads(v))


@row(score="0.5·s")
def scores_changed_after_they_were_read(q, k, v):
    logits = scores(q, k)
    out = attend(logits, heads(v))
    logits[..., 0] = -torch.inf
    return out


@row(score="0.5·s", mask="j ≥ 4 or j < 2")
def overlapping_writes(q, k, v):
    logits = scores(q, k)
    kept = logits[..., 4:].clone()
    logits[..., 2:] = -torch.inf
    logits[..., 4:] = kept
    return attend(logits, heads(v))


@row(score="0.5·s", mask="j < 2")
def overlapping_writes_in_the_other_order(q, k, v):
    logits = scores(q, k)
    kept = logits[..., 4:].clone()
    logits[..., 4:] = kept
    logits[..., 2:] = -torch.inf
    return attend(logits, heads(v))


@row(kind="uninterpreted-node")
def buffer_of_scores_with_a_part_never_written(q, k, v):
    logits = scores(q, k)
    buffer = torch.empty_like(logits)
    buffer[..., 1:] = logits[..., 1:]
    return attend(buffer, heads(v))


@row(kind="uninterpreted-node")
def scores_changed_through_overlapping_windows(q, k, v):
    logits = scores(q, k)
    logits.unfold(-1, 2, 1)[..., 0].add_(1.0)
    return attend(logits, heads(v))


@row(kind="several-elements")
def scores_of_neighbours_exchanged(q, k, v):
    logits = scores(q, k)
    exchanged = logits.clone()
    exchanged[..., 0] = logits[..., 1]
    exchanged[..., 1] = logits[..., 0]
    return attend(exchanged, heads(v))
