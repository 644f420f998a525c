"""What a conversion is tried on: fresh calls with padding at several lengths, and running text."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attncompile.codegen.onnx.choose import largest_prompt_threshold
from attncompile.convert.providers import kernels_of
from attncompile.frontends.cached import PRESENT, Generating
from attncompile.frontends.checkpoint import OpenedModel
from attncompile.frontends.errors import InputError
from attncompile.frontends.example_inputs import has_cache, onnx_arguments
from attncompile.frontends.positions import positions_of

SHAPES = ((1, 9), (3, 33), (2, 70))
"""Batch and length of the calls on which a result is compared with the original; all but the first have padding."""

BEYOND = 12
"""Tokens by which the longest call of a model with its cache is longer than every length from which on an operator may
be chosen that shorter prompts do not get."""

LONGEST = largest_prompt_threshold() + BEYOND
"""Tokens of that call for a model of which nothing else is known."""

FILE_SHAPES = ((3, 0, 33), (3, 5, 1))
"""Batch, cached positions and length of further calls of an ONNX file with a cache: the prompts and steps of several
rows, which operators take that refuse several tokens of several rows behind a cache."""

CACHED_SHAPES = ((1, 0, 9), (3, 0, 33), (1, 12, 7), (3, 33, 5), (1, 0, LONGEST), (2, 70, 1), (1, 64, 1))
"""Batch, cached positions and length of the calls for a model with its cache: prompts, continuations and steps."""

TEXT_MODULES = (
    "pdb",
    "statistics",
    "argparse",
    "csv",
    "unittest",
    "heapq",
    "doctest",
    "subprocess",
    "ast",
    "random",
    "typing",
)
"""Modules of the standard library whose documentation serves as running text: English that every machine has."""


@dataclass(frozen=True)
class Call:
    """One call of a model.

    Attributes:
        args, kwargs: its arguments.
        what: in a few words, for reports.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    what: str

    def kept(self) -> torch.Tensor | None:
        """Which positions are no padding: bool ``[batch, length]``, ``None`` without a padding mask."""
        mask, ids = self._mask(), self.kwargs.get("input_ids")
        if mask is None or not isinstance(ids, torch.Tensor) or "past_key_values" not in self.kwargs:
            return mask
        return mask[:, mask.shape[1] - ids.shape[1] :]  # the mask of a call with a cache begins with what is cached

    def judged(self, name: str, output: torch.Tensor) -> torch.Tensor:
        """The part of an output that does not belong to padding.

        Args:
            name: of the output; output: ``[batch, length, …]``, or cached ``[batch, heads, past + length, …]``, in a
                buffer with room behind that, which means nothing. Positions that are fewer than what a mask speaks of
                (of frames of sound) are judged all.
        """
        mask = self._mask()
        if not name.startswith(PRESENT) or mask is None or output.shape[2] < mask.shape[1]:
            return without_padding(output, self.kept())
        output = output[:, :, : mask.shape[1]]
        if not mask.all():
            return output.transpose(1, 2)[mask]
        return without_padding(output, self.kept())

    def _mask(self) -> torch.Tensor | None:
        mask = self.kwargs.get("attention_mask")
        if self.kwargs.get("decoder_input_ids") is not None or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return None
        return mask.bool()


def calls(opened: OpenedModel, seed_shift: int = 0, provider: str | None = None) -> tuple[Call, ...]:
    """Calls at several batch sizes and lengths, the last row padded; prompts and steps for a model with a cache.

    Args:
        opened: the model.
        seed_shift: added to the lengths, so that a later verification sees inputs that the conversion did not.
        provider: for which operators are chosen; any, unless given.

    Raises:
        InputError: when no inputs can be derived for the model.
    """
    if isinstance(opened, Generating):
        return tuple(_cached_calls(opened, seed_shift, longest_prompt(opened, provider)))
    made: list[Call] = []
    for batch, length in SHAPES:
        try:
            args, kwargs = opened.example(batch, length + seed_shift)
        except InputError:
            if made or (batch, length) != SHAPES[0]:
                continue  # a model with fewer positions, or fixed sizes
            args, kwargs = opened.example()
        made.append(Call(args, kwargs, f"batch {batch}, length {length + seed_shift}"))
    if opened.kind == "onnx" and opened.given is None and has_cache(opened.model):
        return (*(_file_call(opened, *sizes, seed_shift) for sizes in FILE_SHAPES), *made)
    return tuple(made)


def _file_call(opened: OpenedModel, batch: int, past: int, length: int, shift: int) -> Call:
    """A prompt, or a step behind more keys where the lengths are shifted."""
    length, past = (length, past + shift) if past else (length + shift, 0)
    args, kwargs = onnx_arguments(opened.model, batch, length, "right", past)
    return Call(args, kwargs, f"batch {batch}, length {length} behind {past}")


def longest_prompt(opened: Generating, provider: str | None = None) -> int:
    """Tokens of the longest call of a model with its cache: for such a prompt an operator may be chosen that short ones
    do not get. What depends on the square of it, or on the vocabulary, is most of what a comparison needs of memory.

    Args:
        opened: the model; provider: for which operators are chosen; any, unless given.
    """
    kernels = None if provider is None else kernels_of(provider)
    return largest_prompt_threshold(kernels, opened.grouped) + BEYOND


def _cached_calls(opened: Generating, shift: int, longest: int) -> Iterator[Call]:
    """Calls of a model with a cache: as many as fit into its positions, the longest shortened to them."""
    positions = positions_of(opened.config) or math.inf
    for batch, past, length in CACHED_SHAPES:
        prompt, more = ((longest if length == LONGEST else length) + shift, 0) if not past else (length, past + shift)
        if length == LONGEST and prompt > positions:
            prompt = max(1, int(positions) - shift)  # again another length where a later verification shifts it
        if prompt + more > positions or not opened.takes(batch, more, prompt):
            continue
        args, kwargs = opened.example(batch, prompt, past=more)
        yield Call(args, kwargs, f"batch {batch}, length {prompt} behind {more}")


def running_text() -> str:
    """Some thirty thousand characters of English prose and code."""
    documents = (inspect.getdoc(importlib.import_module(name)) or "" for name in TEXT_MODULES)
    return "\n\n".join(documents)


def text_call(opened: OpenedModel, length: int = 512) -> Call | None:
    """A call on running text, without padding; ``None`` for a model without tokenizer or token inputs."""
    found = text_calls(opened, running_text(), length, 1)
    return found[0] if found else None


def text_calls(opened: OpenedModel, text: str, length: int, count: int) -> tuple[Call, ...]:
    """Calls on pieces of a text that follow on each other, one row each and without padding.

    Args:
        opened: the model; none are made for one without tokenizer or token inputs.
        text: what to read; length: tokens of a piece, fewer for a model with fewer positions.
        count: of pieces at most; the last one may be shorter, but not shorter than two tokens.
    """
    if opened.tokenizer is None:
        return ()
    try:
        args, kwargs = opened.example(1, 9)
    except InputError:
        return ()
    if not isinstance(kwargs.get("input_ids"), torch.Tensor):
        return ()
    length = min(length, positions_of(opened.config) or length)
    ids = torch.tensor([opened.tokenizer(text, truncation=False, verbose=False)["input_ids"]], dtype=torch.int64)
    pieces = [piece for piece in ids.split(length, dim=1)[:count] if piece.shape[1] > 1]
    return tuple(_reading(opened, args, kwargs, piece.contiguous()) for piece in pieces)


def _reading(opened: OpenedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any], ids: torch.Tensor) -> Call:
    """The call that reads token ids ``[1, length]``."""
    if isinstance(opened, Generating):
        return Call((), opened.of_tokens(ids), f"{ids.shape[1]} tokens of text")
    if opened.kind == "onnx":  # with positions as many as tokens, and nothing cached
        args, kwargs = onnx_arguments(opened.model, 1, ids.shape[1], "none", 0)
    kwargs = {**kwargs, "input_ids": ids}
    for name in ("attention_mask", "token_type_ids"):
        if name in kwargs:
            kwargs[name] = torch.ones_like(ids) if name == "attention_mask" else torch.zeros_like(ids)
    return Call(args, kwargs, f"{ids.shape[1]} tokens of text")


def named_outputs(result: Any) -> dict[str, torch.Tensor]:
    """The float tensors among a model's results, by name or number; caches are left out."""
    if isinstance(result, torch.Tensor):
        return {"output": result}
    pairs = (
        result.items() if hasattr(result, "items") else enumerate(result if isinstance(result, tuple | list) else ())
    )
    return {str(name): value for name, value in pairs if isinstance(value, torch.Tensor) and value.is_floating_point()}


def without_padding(output: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """The part of an output ``[batch, length, …]`` that does not belong to padded positions."""
    if kept is None or output.dim() < 2 or output.shape[:2] != kept.shape or bool(kept.all()):
        return output  # no copy of what may be large
    return output[kept]
