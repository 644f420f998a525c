"""Ways to write one attention over keys and values in pieces: one softmax whose weights are sliced and multiplied with
different values.

Rows state what :data:`tests.lift.spellings.SPELLINGS` rows state; those that must not be taken for one attention are in
:data:`NOT_ONE`.
"""

from __future__ import annotations

import torch

from tests.lift.forms import BLOCKS, CHANNELS, HEADS, PAST, Table, dot, heads, merged

SPLIT = Table()
row = SPLIT.row

LOCAL_AND_PAST = {"k": "[B,6,I + P0,4]", "v": "[B,6,I + P0,4]"}


def scores_of(q, *keys):
    """Scores of one query and several groups of keys, one behind the other."""
    return torch.cat([dot(heads(q), heads(key)) for key in keys], -1) * 0.5


@row(score="0.5·s", **LOCAL_AND_PAST)
def two_pieces(q, k_past, v_past, k, v):
    weights = torch.softmax(scores_of(q, k_past, k), -1)
    past = k_past.shape[1]
    return merged(weights[..., :past] @ heads(v_past) + weights[..., past:] @ heads(v))


@row(score="0.5·s", **LOCAL_AND_PAST)
def added_in_another_order(q, k_past, v_past, k, v):
    weights = torch.softmax(scores_of(q, k_past, k), -1)
    out = weights[..., k_past.shape[1] :] @ heads(v)
    return merged(out + weights[..., : k_past.shape[1]] @ heads(v_past))


@row(score="0.5·s", **LOCAL_AND_PAST)
def heads_merged_before_the_sum(q, k_past, v_past, k, v):
    weights = torch.softmax(scores_of(q, k_past, k), -1)
    past = k_past.shape[1]
    return merged(weights[..., :past] @ heads(v_past)) + merged(weights[..., past:] @ heads(v))


@row(score="0.5·s", q="[B,6,I,4]")
def three_pieces_by_split(q, k, v, k_past, v_past, memory):
    weights = torch.softmax(scores_of(q, k_past, k, memory), -1)
    first, middle, last = weights.split([k_past.shape[1], k.shape[1], memory.shape[1]], -1)
    return merged(middle @ heads(v) + last @ heads(memory) + first @ heads(v_past))


@row(score="0.5·s", v="[B,6,14,4]")
def two_pieces_by_chunk(q, k, v):
    first, second = torch.softmax(scores_of(q, k, v), -1).chunk(2, -1)
    return merged(first @ heads(v) + second @ heads(k))


@row(score="0.5·s", k="[B,6,I,4]", v="[B,6,I,4]")
def slices_of_one_tensor(q, k, v):
    weights = torch.softmax(dot(heads(q), heads(k)) * 0.5, -1)
    return merged(weights[..., :3] @ heads(v)[:, :, :3] + weights[..., 3:] @ heads(v)[:, :, 3:])


@row(score="0.5·s", **LOCAL_AND_PAST)
def einsum_in_two_layouts(q, k_past, v_past, k, v):
    apart = [x.view(*x.shape[:2], HEADS, CHANNELS) for x in (q, k_past, v_past, k, v)]
    query, key_past, value_past, key, value = apart
    past = torch.einsum("bqhd,bkhd->bhqk", query, key_past)
    here = torch.einsum("bihc,bhjc->bhij", query, key.transpose(1, 2))
    weights = torch.softmax(torch.cat([past, here], -1) * 0.5, -1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights[..., : k_past.shape[1]], value_past)
    return (out + torch.einsum("bhqk,bkhd->bqhd", weights[..., k_past.shape[1] :], value)).flatten(2)


@row(score="0.5·s", **LOCAL_AND_PAST)
def one_piece_by_bmm(q, k_past, v_past, k, v):
    def flat(x):
        return heads(x).reshape(-1, x.shape[1], CHANNELS)

    past = torch.bmm(flat(q), flat(k_past).transpose(1, 2)).view(q.shape[0], HEADS, q.shape[1], k_past.shape[1])
    weights = torch.softmax(torch.cat([past, dot(heads(q), heads(k))], -1) * 0.5, -1)
    out = torch.bmm(weights[..., : k_past.shape[1]].flatten(0, 1), flat(v_past))
    return merged(out.view(q.shape[0], HEADS, q.shape[1], -1) + weights[..., k_past.shape[1] :] @ heads(v))


@row(score="0.5·s", mask="j < P0 or documents[b, j − P0] = documents[b, i]", **LOCAL_AND_PAST)
def one_piece_masked(q, k_past, v_past, k, v, documents):
    here = dot(heads(q), heads(k)) * 0.5
    other = documents[:, None, :, None] != documents[:, None, None, :]
    scores = torch.cat([dot(heads(q), heads(k_past)) * 0.5, here.masked_fill(other, -torch.inf)], -1)
    weights = torch.softmax(scores, -1)
    past = k_past.shape[1]
    return merged(weights[..., :past] @ heads(v_past) + weights[..., past:] @ heads(v))


@row(score="where(j ≥ P0, 0.5·s, 0.25·s)", **LOCAL_AND_PAST)
def pieces_scaled_apart(q, k_past, v_past, k, v):
    scores = torch.cat([dot(heads(q) * 0.25, heads(k_past)), dot(heads(q) * 0.5, heads(k))], -1)
    weights = torch.softmax(scores, -1)
    past = k_past.shape[1]
    return merged(weights[..., :past] @ heads(v_past) + weights[..., past:] @ heads(v))


@row(score="0.5·s", q="[B,3,4,4]", v="[B,3,P0 + 4,4]")
def global_and_local_in_blocks(blocks, k_past, v_past):
    query = heads(blocks).unflatten(2, (BLOCKS, 4))
    everywhere = torch.einsum("BHNKF,BHGF->BHNKG", query, heads(k_past))
    inside = torch.einsum("BHNKF,BHNXF->BHNKX", query, query)
    weights = torch.softmax(torch.cat([everywhere, inside], -1) * 0.5, -1)
    past = k_past.shape[1]
    out = torch.einsum("BHNKG,BHGF->BHNKF", weights[..., :past], heads(v_past))
    out = out + torch.einsum("BHNKX,BHNXF->BHNKF", weights[..., past:], query)
    return out.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)


@row(score="0.5·s", **LOCAL_AND_PAST)
def softmax_by_hand(q, k_past, v_past, k, v):
    scores = scores_of(q, k_past, k)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)
    past = k_past.shape[1]
    return merged(weights[..., :past] @ heads(v_past) + weights[..., past:] @ heads(v))


@row(score="0.5·s", **LOCAL_AND_PAST)
def divided_after_the_sum(q, k_past, v_past, k, v):
    scores = scores_of(q, k_past, k)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    past = k_past.shape[1]
    out = weights[..., :past] @ heads(v_past) + weights[..., past:] @ heads(v)
    return merged(out / weights.sum(-1, keepdim=True))


@row({"sink": torch.linspace(-1, 1, HEADS)}, score="0.5·s", sink="sink[h]", **LOCAL_AND_PAST)
def sink_behind_the_pieces(q, k_past, v_past, k, v, sink):
    column = sink[None, :, None, None].expand(q.shape[0], -1, q.shape[1], 1)
    weights = torch.softmax(torch.cat([scores_of(q, k_past, k), column], -1), -1)
    past = k_past.shape[1]
    return merged(weights[..., :past] @ heads(v_past) + weights[..., past:-1] @ heads(v))


@row({"memory_keys": torch.randn(1, HEADS, PAST, CHANNELS)}, score="0.5·s", k="[B,6,I + 5,4]")
def learned_keys_for_all(q, k, v, memory_keys):
    scores = torch.cat([dot(heads(q), memory_keys), dot(heads(q), heads(k))], -1) * 0.5
    weights = torch.softmax(scores, -1)
    return merged(weights[..., :PAST] @ memory_keys + weights[..., PAST:] @ heads(v))


@row(score="0.5·s", **LOCAL_AND_PAST)
def values_in_one_tensor(q, k_past, v_past, k, v):
    weights = torch.softmax(scores_of(q, k_past, k), -1)
    return merged(weights @ torch.cat([heads(v_past), heads(v)], 2))


@row(score="0.5·s", **LOCAL_AND_PAST)
def keys_in_one_tensor(q, k_past, v_past, k, v):
    weights = torch.softmax(dot(heads(q), torch.cat([heads(k_past), heads(k)], 2)) * 0.5, -1)
    past = k_past.shape[1]
    return merged(weights[..., :past] @ heads(v_past) + weights[..., past:] @ heads(v))


@row(score="0.5·s", weight="where(j ≥ P0, w, 2.0·w)", **LOCAL_AND_PAST)
def one_piece_doubled(q, k_past, v_past, k, v):
    weights = torch.softmax(scores_of(q, k_past, k), -1)
    past = k_past.shape[1]
    return merged(2 * (weights[..., :past] @ heads(v_past)) + weights[..., past:] @ heads(v))


@row(score="0.5·s", weight="where(j ≥ P0, −w, w)", **LOCAL_AND_PAST)
def one_piece_subtracted(q, k_past, v_past, k, v):
    weights = torch.softmax(scores_of(q, k_past, k), -1)
    past = k_past.shape[1]
    return merged(weights[..., :past] @ heads(v_past) - weights[..., past:] @ heads(v))


@row(score="0.5·s", status="observed", reason="needed outside", **LOCAL_AND_PAST)
def one_piece_returned(q, k_past, v_past, k, v):
    weights = torch.softmax(scores_of(q, k_past, k), -1)
    past = k_past.shape[1]
    return merged(weights[..., :past] @ heads(v_past) + weights[..., past:] @ heads(v)), weights[..., :past]


NOT_ONE = Table()
miss = NOT_ONE.row


@miss(kind="partial-normaliser")
def overlapping_pieces(q, k, v):
    weights = torch.softmax(dot(heads(q), heads(k)) * 0.5, -1)
    return merged(weights[..., :-2] @ heads(v)[:, :, :-2] + weights[..., 2:] @ heads(v)[:, :, 2:])


@miss(kind="partial-normaliser")
def gap_between_the_pieces(q, k_past, v_past, k, v):
    weights = torch.softmax(scores_of(q, k_past, k), -1)
    past = k_past.shape[1]
    return merged(weights[..., :past] @ heads(v_past) + weights[..., past + 1 :] @ heads(v)[:, :, 1:])


@miss(kind="partial-normaliser")
def one_piece_dropped(q, k_past, k, v):
    weights = torch.softmax(scores_of(q, k_past, k), -1)
    return merged(weights[..., k_past.shape[1] :] @ heads(v))


@miss(kind="partial-normaliser", sites=2)
def pieces_of_two_softmaxes(q, k_past, v_past, k, v):
    past = k_past.shape[1]
    first = torch.softmax(scores_of(q, k_past, k), -1)
    second = torch.softmax(scores_of(q, k_past, k) * 2, -1)
    return merged(first[..., :past] @ heads(v_past) + second[..., past:] @ heads(v))


@miss(kind="partial-normaliser")
def something_else_in_the_sum(q, k_past, v_past, k, v):
    weights = torch.softmax(scores_of(q, k_past, k), -1)
    past = k_past.shape[1]
    return merged((weights[..., :past] @ heads(v_past)) * (weights[..., past:] @ heads(v)))


@miss(kind="partial-normaliser")
def pieces_swapped_in_one_of_two(q, k, v, memory):
    weights = torch.softmax(scores_of(q, k, memory), -1)
    here = k.shape[1]
    return merged(weights[..., :here] @ heads(v)), merged(weights[..., here:] @ heads(memory))


@miss(kind="operand-layout")
def queries_that_differ(q, k_past, v_past, k, v):
    scores = torch.cat([dot(heads(q.flip(1)), heads(k_past)), dot(heads(q), heads(k))], -1)
    weights = torch.softmax(scores, -1)
    past = k_past.shape[1]
    return merged(weights[..., :past] @ heads(v_past) + weights[..., past:] @ heads(v))
