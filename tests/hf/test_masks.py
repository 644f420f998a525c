"""Masks as expressions: what transformers' functions and others say, and what is computed instead of being guessed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import masking_utils as masks

from attncompile.hf import StatedMask, attention_forward, explain, forget, stated_mask
from attncompile.verify import derive_tolerance, require_within

BATCH, QUERIES, KEYS, HEADS, WIDTH = 2, 5, 9, 3, 8

BLOCKS = torch.tensor([[-1, 0, 0, 1, 1, 1, -1, 2, 2], [0, 0, 0, 0, -1, -1, 3, 3, 3]])
PACKED = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2], [0, 0, 0, 0, 0, 1, 1, 1, 2]])
POSITIONS = torch.tensor([[0, 1, 0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1, 2, 0]])
PADDING = torch.tensor([[True] * 9, [False] * 3 + [True] * 6])


def asymmetric(batch: Any, head: Any, query: Any, key: Any) -> Any:
    distance = query - key
    return ((distance >= 0) & (distance < 4)) | ((distance < 0) & (-distance < 2))


def chunked(batch: Any, head: Any, query: Any, key: Any) -> Any:
    ahead = torch.div(query, 3, rounding_mode="trunc") - torch.div(key, 3, rounding_mode="trunc")
    return (ahead >= 0) & (ahead <= 1)


def chosen(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return torch.where(query % 2 == 0, key <= query, torch.logical_not(key > 2))


def between(batch: Any, head: Any, query: Any, key: Any) -> Any:
    near = key - query < torch.tensor(2, dtype=torch.int32)
    return (key >= torch.tensor(1)) & near | (torch.tensor(True) & (key < 1))


def behind_a_mark(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (key >= torch.tensor(2)) | BLOCKS[batch, key].ne(1).to(torch.bool)


PACKED_SEQUENCES: list[tuple[Callable[..., Any], str]] = []
if hasattr(masks, "packed_sequence_compatibility_function"):  # transformers 5.17 does not have it yet
    window = masks.sliding_window_causal_mask_function(2)
    PACKED_SEQUENCES.append((masks.packed_sequence_compatibility_function(window, POSITIONS, PACKED), ""))

STATED: list[tuple[Callable[..., Any], str]] = [
    (masks.causal_mask_function, "j ≤ i"),
    (masks.bidirectional_mask_function, "true"),
    (masks.sliding_window_causal_mask_function(4), "j ≤ i and j > i − 4"),
    (masks.sliding_window_bidirectional_mask_function(3), ""),
    (masks.chunked_causal_mask_function(3, torch.tensor([0, 2])), ""),
    (masks.or_masks(masks.causal_mask_function, masks.blockwise_overlay(BLOCKS)), ""),
    (masks.and_masks(masks.causal_mask_function, masks.packed_sequence_mask_function(PACKED)), ""),
    *PACKED_SEQUENCES,
    (asymmetric, ""),
    (chunked, ""),
    (chosen, ""),
    (between, ""),
]

COMPUTED: list[tuple[Callable[..., Any], str]] = [
    (lambda b, h, i, j: (i.float() - j) < 2.5, "asks a position for float"),
    (lambda b, h, i, j: BLOCKS[b, (j + 1) % 9] == BLOCKS[b, i], "something else than a position"),
    (lambda b, h, i, j: torch.sin(i - j) > 0, "calls sin"),
    (lambda b, h, i, j: (i & 1) == (j & 1), "joins the bits"),
    (lambda b, h, i, j: torch.tensor([0.5] * 9)[j] < i, "neither integers nor truth values"),
    (behind_a_mark, "asks a position for ne"),
]
"""Functions that say more than terms can, and what they do."""


def call(function: Callable[..., Any], queries: int, offset: Any, padding: torch.Tensor | None) -> dict[str, Any]:
    """The arguments of a mask interface."""
    return {
        "batch_size": BATCH,
        "q_length": queries,
        "kv_length": KEYS,
        "q_offset": offset,
        "mask_function": function,
        "attention_mask": padding,
    }


def require_equal(mask: Any, visible: torch.Tensor, queries: int) -> None:
    """Attention with the mask is that with a map of truth values."""
    layer = torch.nn.Identity()
    query, key, value = (torch.randn(BATCH, HEADS, n, WIDTH) for n in (queries, KEYS, KEYS))
    found = attention_forward(layer, query, key, value, mask)[0].transpose(1, 2)
    plain = F.scaled_dot_product_attention(query, key, value, visible)
    truth = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), visible)
    shown = visible.any(-1).expand(BATCH, HEADS, queries)
    tolerance = derive_tolerance(truth[shown], plain[shown], KEYS)
    require_within(found[shown], truth[shown], tolerance.bound, "attention with the mask")


@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize("start", ["nothing", "a past", "a tensor"])
@pytest.mark.parametrize("number", range(len(STATED)))
def test_stated(number: int, start: str, padding: torch.Tensor | None) -> None:
    function, text = STATED[number]
    queries = KEYS if start == "nothing" else QUERIES
    offset = {"nothing": 0, "a past": KEYS - QUERIES, "a tensor": torch.tensor(3)}[start]
    arguments = call(function, queries, offset, padding)
    mask = stated_mask(**arguments)
    assert isinstance(mask, StatedMask) and not mask.reason
    visible = masks.sdpa_mask(**arguments, allow_is_causal_skip=False)
    require_equal(mask, visible, queries)
    if text and start == "nothing":
        forget()
        layer = torch.nn.Identity()
        operands = (torch.randn(BATCH, HEADS, KEYS, WIDTH) for _ in range(3))
        attention_forward(layer, *operands, mask)
        (site,) = explain(layer).sites
        assert site.spec is not None
        attend = site.spec.attend()
        assert attend is not None
        parts = [text] if padding is None or text != "true" else []
        assert str(attend.mask) == " and ".join([*parts, *([] if padding is None else ["attention_mask[b, j]"])])


@pytest.mark.parametrize("number", range(len(COMPUTED)))
def test_what_has_no_term_is_computed_and_said(number: int) -> None:
    function, what = COMPUTED[number]
    arguments = call(function, KEYS, 0, PADDING)
    mask = stated_mask(**arguments, use_vmap=False)
    assert isinstance(mask, StatedMask) and what in mask.reason
    require_equal(mask, masks.sdpa_mask(**arguments, allow_is_causal_skip=False), KEYS)


def test_the_end_of_a_tensor_is_no_element() -> None:
    """An expression would read the last one, where the function raises."""
    short = BLOCKS[:, :7]
    with pytest.raises(IndexError):
        stated_mask(**call(masks.blockwise_overlay(short), KEYS, 0, None))


def test_keys_that_begin_later() -> None:
    """A cache of the last tokens alone: the padding is that of all tokens."""
    padding = torch.ones(BATCH, 14, dtype=torch.bool)
    padding[1, :7] = False
    arguments = call(masks.sliding_window_causal_mask_function(4), QUERIES, 9, padding) | {"kv_offset": 5}
    mask = stated_mask(**arguments)
    assert isinstance(mask, StatedMask) and not mask.reason
    require_equal(mask, masks.sdpa_mask(**arguments, allow_is_causal_skip=False), QUERIES)
    blocks = torch.arange(14).expand(2, 14) // 3
    arguments = call(masks.blockwise_overlay(blocks), QUERIES, 9, padding) | {"kv_offset": 5}
    require_equal(stated_mask(**arguments), masks.sdpa_mask(**arguments, allow_is_causal_skip=False), QUERIES)


def test_a_counter_that_goes_on_does_not_move_the_mask() -> None:
    """A static cache adds to its length in place before the layer attends."""
    counter = torch.tensor(3)
    arguments = call(masks.causal_mask_function, QUERIES, counter, None)
    mask, visible = stated_mask(**arguments), masks.sdpa_mask(**arguments, allow_is_causal_skip=False)
    counter.add_(QUERIES)
    require_equal(mask, visible, QUERIES)


def test_computing_with_a_mask_gives_the_map() -> None:
    arguments = call(masks.causal_mask_function, KEYS, 0, PADDING)
    mask, visible = stated_mask(**arguments), masks.sdpa_mask(**arguments, allow_is_causal_skip=False)
    assert isinstance(mask, StatedMask)
    assert (mask.shape, mask.ndim, mask.dtype) == (visible.shape, 4, torch.bool)
    computed = [
        (mask[:, :, :, :4], visible[:, :, :, :4]),
        (~mask, ~visible),
        (mask & PADDING[:, None, None], visible & PADDING[:, None, None]),
        (torch.where(mask, 0.0, -1.0), torch.where(visible, 0.0, -1.0)),
        (torch.cat([mask, mask], -1), torch.cat([visible, visible], -1)),
        (mask.to(torch.float32), visible.to(torch.float32)),
        (mask.logical_not(), visible.logical_not()),
        (torch.ones(KEYS).masked_fill(~mask, 0.0), torch.ones(KEYS).masked_fill(~visible, 0.0)),
    ]
    for one, other in computed:
        assert torch.equal(one, other)
    require_equal(mask[:, :, -QUERIES:], visible[:, :, -QUERIES:], QUERIES)


@pytest.mark.parametrize("shape", [(BATCH, 1, KEYS, KEYS), (1, HEADS, KEYS, KEYS), (BATCH, 1, 1, KEYS)])
def test_a_map_of_the_users_own(shape: tuple[int, ...]) -> None:
    visible = torch.rand(shape) > 0.3
    visible[..., 0] = True
    require_equal(visible, visible.expand(-1, -1, KEYS, -1), KEYS)
    added = torch.zeros(shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    require_equal(added, visible.expand(-1, -1, KEYS, -1), KEYS)
