"""A language model whose cache is one buffer for past and present, as generators keep it.

``logits, buffers = f(input_ids, attention_mask, buffers)`` on ``N`` new tokens behind ``P`` cached ones. A buffer
``[B, G, C, D]`` has room for ``C ≥ P + N`` positions: its first ``P`` are cached, the call fills the ``N`` behind them,
and what lies further on means nothing. A runtime that is given one piece of memory for the buffer that goes in and the
one that comes out writes the new keys and values alone; where they are two, the rest is copied.

Such a model computes less than one whose cache is concatenated (:mod:`attncompile.frontends.cached`), and says so: all
positions of a row are tokens. Rows with padding, wherever it lies, give NaN instead of something that looks right.
Positions are counted from the number of cached tokens and are no input.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attncompile.frontends.cached import (
    ALL_LOGITS,
    PRESENT,
    CachedDecoder,
    CachedModel,
    Past,
    filled_cache,
    kept,
    require_equal_steps,
    with_cache,
)
from attncompile.frontends.checkpoint import OpenedModel
from attncompile.frontends.errors import InputError
from attncompile.frontends.example_inputs import Padding

ROOM = 11
"""Positions behind the last key in the buffers of examples."""

UNUSED = 7.0
"""What lies there: a number that would be noticed if it were read."""

LEAVE_OUT = "leave --shared-buffer (in Python shared_buffer=True) out"
"""What helps where a model has no cache at all."""

SEPARATE = f"{LEAVE_OUT}: past and present are then two tensors"
"""What helps where a model cannot keep its cache in one buffer."""


class SharedDecoder(CachedDecoder):
    """A decoder of transformers on buffers for its cache."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        past_key_values: Past = (),
    ) -> dict[str, torch.Tensor]:
        """Logits ``[B, N, vocabulary]``, or of the last token, and the buffers after the call, by name.

        Args:
            input_ids: ``[B, N]`` int64.
            attention_mask: ``[B, P + N]`` int64, all 1; a row with a 0 gives NaN.
            position_ids: none: they are counted.
            past_key_values: the buffers, ``[B, G, C, D]``.
        """
        total, length = attention_mask.shape[1], input_ids.shape[1]
        past, room = total - length, past_key_values[0]["key"].shape[2]
        torch._check(past >= 0)
        torch._check(total <= room)
        for layer in past_key_values:
            for tensor in layer.values():  # an export learns from this what would otherwise be sizes of their own
                torch._check(tensor.shape[2] == room)
        first = [{side: tensor[:, :, :past] for side, tensor in layer.items()} for layer in past_key_values]
        cache = filled_cache(first)
        embedded = self.inner.get_input_embeddings()(input_ids)  # type: ignore[operator]
        whole = (attention_mask != 0).all(dim=1)[:, None, None]
        embedded = embedded + torch.where(whole, 0.0, math.nan).to(embedded.dtype)
        counted = torch.arange(past, total, device=input_ids.device)[None]
        given = {"position_ids": counted} if self.positions else {}
        seen = attention_mask[:, past:]
        found = self.logits(seen, inputs_embeds=embedded, past_key_values=cache, use_cache=True, **given)
        for number, (pair, layer) in enumerate(zip(kept(cache), past_key_values, strict=True)):
            for (side, buffer), made in zip(layer.items(), pair, strict=True):
                found[f"{PRESENT}{number}.{side}"] = torch.cat([made, buffer[:, :, total:]], dim=2)
        return found


@dataclass(frozen=True)
class SharedModel(CachedModel):
    """An opened decoder on buffers for its cache; ``model`` is a :class:`SharedDecoder`."""

    @property
    def shared(self) -> bool:
        """Whether past and present are one buffer."""
        return True

    def takes(self, batch: int, past: int, length: int) -> bool:
        """One row, one token, or an empty cache: what operators on a buffer were found to compute."""
        return batch == 1 or length == 1 or not past

    def example_call(self, batch: int, length: int, padding: Padding | None, past: int) -> dict[str, Any]:
        """Tokens of an example, the first of them cached, none of them padding."""
        assert self.opened is not None
        return self.arguments(self.opened.example(batch, past + length, padding="none")[1]["input_ids"], past=past)

    def arguments(self, ids: torch.Tensor, mask: torch.Tensor | None = None, past: int = 0) -> dict[str, Any]:
        """The call for tokens ``[B, P + N]`` of which the first ``past`` are cached, with some room behind them.

        Args:
            ids: int64; mask: 0 for padding, ``[B, P + N]``; none when not given.
            past: how many of them come before the call.
        """
        mask = torch.ones_like(ids) if mask is None else mask
        buffers: Past = [
            {
                side: torch.full((ids.shape[0], heads, ids.shape[1] + ROOM, channels), UNUSED, dtype=self.dtype)
                for side, (heads, channels) in zip(("key", "value"), layer, strict=True)
            }
            for layer in self.widths
        ]
        if past:
            with torch.no_grad():
                results = self.model(**self._behind(ids[:, :past], mask[:, :past], buffers))
            buffers = [
                {side: results[f"{PRESENT}{number}.{side}"] for side in ("key", "value")}
                for number in range(len(self.widths))
            ]
        return self._behind(ids[:, past:], mask, buffers)

    def _behind(self, ids: torch.Tensor, mask: torch.Tensor, buffers: Past) -> dict[str, Any]:
        # contiguous: an export looks at strides too, and would take a part of a longer row for a case of its own
        return {"input_ids": ids.contiguous(), "attention_mask": mask.contiguous(), "past_key_values": buffers}

    def axes(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[int, str], ...]:
        """Names of the axes that vary, for each tensor of a call in order."""
        heads = [{0: "batch", 2: "capacity"}] * (2 * len(self.widths))
        return ({0: "batch", 1: "length"}, {0: "batch", 1: "total"}, *heads)


def with_shared_buffer(opened: OpenedModel, *, last: bool = False) -> SharedModel:
    """A model that generates, with one buffer for past and present of each layer's keys, and of its values.

    Args:
        opened: the model; last: whether only the logits of each row's last token are computed.

    Raises:
        InputError: when it has no cache as :func:`attncompile.frontends.cached.with_cache` has it, or does not start
            from embedded tokens.
    """
    try:
        cached = with_cache(opened, last=last)
    except InputError as error:  # without the option a model that generates gets what cache it can have, others none
        advice = ALL_LOGITS if error.advice == ALL_LOGITS else LEAVE_OUT
        raise InputError(error.what, opened.name, advice) from error
    if "inputs_embeds" not in inspect.signature(opened.model.forward).parameters:
        reason = f"{type(opened.model).__name__} takes no inputs_embeds, so rows with padding could not be told"
        raise InputError(reason, opened.name, SEPARATE)
    made = SharedModel(
        "torch",
        opened.name,
        opened.path,
        SharedDecoder(opened.model, positions=cached.model.positions, last=last).eval(),
        config=opened.config,
        notes=opened.notes,
        opened=opened,
        widths=cached.widths,
    )
    ids = opened.example(2, 9, padding="none")[1]["input_ids"]
    with torch.no_grad():
        at_once = cached.model(**cached.arguments(ids))["logits"][:, -1]
        try:
            stepped = made.model(**made.arguments(ids, past=8))["logits"][:, -1]
        except Exception as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"it does not run on a buffer for its cache ({said})", opened.name, SEPARATE) from error
    require_equal_steps(at_once, stepped, opened.name, SEPARATE)
    return made


__all__ = ["SharedDecoder", "SharedModel", "with_shared_buffer"]
