"""What the encoder of an encoder-decoder reads: under which name, and how many steps of it make how many positions."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationMixin

PROBED = (16, 32)
"""Positions, about, of the two inputs by which an encoder's steps are counted."""


@dataclass(frozen=True)
class Steps:
    """Steps of an input that make positions of an encoder: ``stride`` for each, and ``more`` for all together."""

    stride: int
    more: int = 0

    def of(self, positions: int) -> int:
        """How many steps make so many positions."""
        return self.stride * positions + self.more


def encoder_input(model: Any) -> str:
    """The name of what an encoder-decoder encodes.

    It is what its own ``generate`` begins with, where it has one of its own; else what the model calls its main input,
    or, where that is a name for whatever its encoder takes, what the encoder calls so.
    """
    forward = inspect.signature(model.forward).parameters
    main = str(getattr(model, "main_input_name", "input_ids"))
    generate = getattr(model, "generate", None)
    if generate is not None and getattr(generate, "__func__", None) is not GenerationMixin.generate:
        first = next(iter(inspect.signature(generate).parameters), main)
        if first in forward:
            return first
    # as transformers does it: inputs of an encoder that is a model of its own have that one's name
    encoder = getattr(model, "encoder", None)
    named = getattr(encoder, "main_input_name", main)
    return str(named) if named in forward else main


def steps_of(model: Any, main: str, made: Callable[[int], torch.Tensor]) -> Steps:
    """How many steps of an input make a position, counted on two inputs; found once for a model.

    Args:
        model: an encoder-decoder; main: the input's name; made: makes one of ``[1, steps, …]``.
    """
    known = _FOUND.get(model)
    if known is None:
        known = _FOUND[model] = _counted(model, main, made)
    return known


_FOUND: MutableMapping[Any, Steps] = weakref.WeakKeyDictionary()


def _counted(model: Any, main: str, made: Callable[[int], torch.Tensor]) -> Steps:
    # convolutions side by side are counted twice by this, so it is an upper bound
    guess = convolved_stride(model, (torch.nn.Conv1d, torch.nn.Conv2d))
    tried = [positions * guess for positions in PROBED]
    first = torch.zeros(1, 1, dtype=torch.int64)
    try:
        with torch.no_grad():
            given = [model(**{main: made(steps)}, decoder_input_ids=first) for steps in tried]
        few, many = (result.encoder_last_hidden_state.shape[1] for result in given)
    except Exception:  # it does not run so, whatever the reason; who calls it with real inputs will say why
        return Steps(guess)
    if many <= few:
        return Steps(guess)
    stride = max(1, (tried[1] - tried[0]) // (many - few))
    return Steps(stride, max(0, tried[0] - few * stride))


Convolution = type[torch.nn.Conv1d] | type[torch.nn.Conv2d]


def convolved_stride(model: Any, kinds: tuple[Convolution, ...] = (torch.nn.Conv1d,)) -> int:
    """The strides of a model's convolutions together."""
    return math.prod(module.stride[0] for module in model.modules() if isinstance(module, kinds))


__all__ = ["Steps", "convolved_stride", "encoder_input", "steps_of"]
