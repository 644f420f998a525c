"""Running text behind a cache: what a model with its cache reads in several calls, for judging a lossy result.

A budget is meant for text: tokens at random are further from what a model was trained on than any use of it. So the
paths that a prompt does not take are judged on text too: the rest of a piece behind its first half, single steps, and
rows with padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from attncompile.convert.calibration import Call
from attncompile.frontends.cached import CachedModel, Generating
from attncompile.frontends.checkpoint import OpenedModel

PADDED = 2
"""Pieces that are read with padding too, at most."""


def behind_caches(opened: OpenedModel, pieces: Sequence[Call]) -> tuple[Call, ...]:
    """The same text in more calls; none for a model without its cache.

    Args:
        opened: the model; pieces: calls that read one row of text at once, without padding.
    """
    if not isinstance(opened, Generating):
        return ()
    rows = [piece.kwargs["input_ids"] for piece in pieces]
    found = [call for ids in rows for call in _continued(opened, ids)]
    if isinstance(opened, CachedModel) and not opened.shared:
        found += [call for ids in rows[:PADDED] for call in _padded(opened, ids)]
    return tuple(found)


def _continued(opened: Generating, ids: torch.Tensor) -> Iterator[Call]:
    """The second half of a row ``[1, N]`` behind the first, the token between them, and the last one."""
    length = ids.shape[1]
    half = length // 2
    for past, end in dict.fromkeys(((half, length), (half, half + 1), (length - 1, length))):
        if past:
            yield Call((), opened.of_tokens(ids[:, :end], past), f"{end - past} tokens of text behind {past}")


def _padded(opened: CachedModel, ids: torch.Tensor) -> Iterator[Call]:
    """Both halves of a row as rows, the second with padding in front: at once, continued, and a step."""
    length = ids.shape[1] // 2
    if length < 4:  # fewer tokens than the parts below need
        return
    both, front = ids[:, : 2 * length].reshape(2, length), length // 4
    mask = torch.ones_like(both)
    mask[1, :front] = 0
    for past in (0, length // 2, length - 1):
        what = f"2×{length - past} tokens of text behind {past}, {front} of a row padding"
        yield Call((), opened.arguments(both, mask, past), what)


__all__ = ["behind_caches"]
