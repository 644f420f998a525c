"""A language model with its cache as arguments and results: one function for a prompt and for every step after it.

``logits, present = f(input_ids, attention_mask, position_ids, past)`` on ``N`` new tokens behind ``P`` cached ones. A
prompt is a call with ``P = 0``, a step of generation one with ``N = 1``, and any other ``N`` continues a conversation.
The names are those that ONNX Runtime's generators and Optimum use.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.cache_utils import DynamicCache, DynamicLayer

from attncompile.frontends.checkpoint import OpenedModel
from attncompile.frontends.errors import InputError
from attncompile.frontends.example_inputs import Arguments, Padding
from attncompile.frontends.positions import text_config

PRESENT = "present."
"""How the names of the results begin that hold keys and values, ``[B, G, P + N, D]``."""

EXAMPLE_PAST = 14
"""Cached positions of the example that a model is exported with."""

ADVICE = "pass --no-cache (in Python cache=False) to convert its forward pass"
"""What helps where a model has no cache to convert with."""

ALL_LOGITS = "leave --last-logits (in Python last_logits=True) out: it then computes those of every position"
"""What helps where a model cannot leave logits out."""

Past = Sequence[dict[str, torch.Tensor]]
"""``key`` and ``value`` of each layer, ``[B, G, P, D]``."""


class TensorFunction(torch.nn.Module):
    """A model of transformers, or a part of it, as a function of tensors alone.

    Attributes:
        inner: the model.
    """

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def set_attn_implementation(self, name: str) -> None:
        """Choose one of the model's own implementations of attention."""
        self.inner.set_attn_implementation(name)  # type: ignore[operator]


class CachedDecoder(TensorFunction):
    """A decoder of transformers with its cache.

    Attributes:
        positions: whether it takes ``position_ids``.
        last: whether it computes the logits of each row's last token alone, ``[B, 1, vocabulary]``.
    """

    def __init__(self, inner: torch.nn.Module, *, positions: bool, last: bool = False) -> None:
        super().__init__(inner)
        self.positions = positions
        self.last = last

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        past_key_values: Past = (),
    ) -> dict[str, torch.Tensor]:
        """Logits ``[B, N, vocabulary]``, or of the last token, and what is cached afterwards, by name.

        Args:
            input_ids: ``[B, N]`` int64.
            attention_mask: ``[B, P + N]`` int64, 0 for padding.
            position_ids: ``[B, N]`` int64, for a model that takes them.
            past_key_values: what is cached.
        """
        past = attention_mask.shape[1] - input_ids.shape[1]
        for layer in past_key_values:
            for tensor in layer.values():  # an export learns from this what would otherwise be sizes of their own
                torch._check(tensor.shape[2] == past)
        cache = filled_cache(past_key_values)
        given = {"position_ids": position_ids} if self.positions else {}
        seen = attention_mask[:, past:]
        found = self.logits(
            seen, input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **given
        )
        for number, (keys, values) in enumerate(kept(cache)):
            found[f"{PRESENT}{number}.key"], found[f"{PRESENT}{number}.value"] = keys, values
        return found

    def logits(self, seen: torch.Tensor, **given: Any) -> dict[str, torch.Tensor]:
        """The model's logits for a call, by name.

        Args:
            seen: ``[B, N]``, 0 for padding.
            given: the call; it fills the cache that it is given.
        """
        if not self.last:
            return {"logits": self.inner(**given).logits}
        head = self.inner.get_output_embeddings()  # type: ignore[operator]
        hook = head.register_forward_pre_hook(lambda _, states: (last_tokens(states[0], seen), *states[1:]))
        try:
            return {"logits": self.inner(**given).logits}
        finally:
            hook.remove()


def last_tokens(states: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Of states ``[B, N, C]`` those of each row's last token, ``[B, 1, C]``; of a row without one, the first.

    Args:
        states: hidden states; seen: ``[B, N]``, 0 for padding, which may lie on any side.
    """
    counted = torch.arange(1, seen.shape[1] + 1, device=seen.device)
    last = torch.where(seen != 0, counted, 0).argmax(dim=1)
    return states.gather(1, last[:, None, None].expand(-1, 1, states.shape[2]))


def filled_cache(layers: Past) -> DynamicCache:
    """A cache that holds these keys and values, without a copy."""
    cache = DynamicCache()
    cache.layers.extend(_layer(layer["key"], layer["value"]) for layer in layers)
    return cache


def _layer(keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    return layer


def kept(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of the layers that keep those of every position, and nothing else."""
    return [
        (layer.keys, layer.values)
        for layer in cache.layers
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None
    ]


Widths = tuple[tuple[tuple[int, int], tuple[int, int]], ...]
"""Heads and channels of the keys and of the values of each layer."""


def widths_of(cache: DynamicCache, positions: int) -> Widths:
    """The widths of a cache in which every layer keeps keys and values of so many positions, and nothing else.

    Raises:
        LookupError: when a layer keeps something else, saying so.
    """
    pairs = [pair for pair in kept(cache) if all(side.dim() == 4 and side.shape[2] == positions for side in pair)]
    if not pairs or len(pairs) < len(cache.layers):
        raise LookupError(f"of its {len(cache.layers)} layers {len(pairs)} keep keys and values of every position")
    return tuple(((keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3])) for keys, values in pairs)


def empty_past(widths: Widths, batch: int, dtype: torch.dtype) -> Past:
    """A cache of no positions."""
    return [
        {
            side: torch.zeros(batch, heads, 0, channels, dtype=dtype)
            for side, (heads, channels) in zip(("key", "value"), layer, strict=True)
        }
        for layer in widths
    ]


@dataclass(frozen=True)
class Generating(OpenedModel, ABC):
    """An opened model as the function that a generation calls: new tokens behind what is cached.

    ``model`` is a :class:`TensorFunction`.

    Attributes:
        opened: the model as it was opened.
        widths: of what grows with every call.
    """

    opened: OpenedModel | None = None
    widths: Widths = ()

    def example(
        self,
        batch: int = 2,
        length: int | None = None,
        *,
        padding: Padding | None = None,
        past: int = EXAMPLE_PAST,
    ) -> Arguments:
        """Arguments of one call of ``length`` tokens behind ``past`` ones, which the model itself has cached.

        Raises InputError as :meth:`OpenedModel.example` does.
        """
        length = self.usual_length(past) if length is None else length
        return (), self.example_call(batch, length, padding, past)

    @property
    def shared(self) -> bool:
        """Whether past and present are one buffer."""
        return False

    @property
    def grouped(self) -> bool | None:
        """Whether several query heads share a cached head, in every layer; ``None`` where that is not known, or not so
        in every layer alike.
        """
        heads = getattr(text_config(self.config), "num_attention_heads", None)
        found = {kept < heads for (kept, _), _ in self.widths} if isinstance(heads, int) else set()
        return found.pop() if len(found) == 1 else None

    def takes(self, batch: int, past: int, length: int) -> bool:
        """Whether such calls are the model's: rows, cached positions, and new tokens."""
        return True

    @abstractmethod
    def example_call(self, batch: int, length: int, padding: Padding | None, past: int) -> dict[str, Any]:
        """What :meth:`example` gives."""

    @abstractmethod
    def of_tokens(self, ids: torch.Tensor, past: int = 0) -> dict[str, Any]:
        """The call for tokens ``[B, P + N]`` without padding, of which the first ``past`` are cached."""

    @property
    def scope(self) -> str:
        """Path of the model of transformers in the one that is exported; names are told without it."""
        return "inner."

    @property
    def dtype(self) -> torch.dtype:
        """Of the cache: that of the model's parameters."""
        return next(parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())


@dataclass(frozen=True)
class CachedModel(Generating):
    """An opened decoder with its cache as arguments and results; ``model`` is a :class:`CachedDecoder`."""

    def example_call(self, batch: int, length: int, padding: Padding | None, past: int) -> dict[str, Any]:
        """Tokens of an example, the first of them cached."""
        assert self.opened is not None
        kwargs = self.opened.example(batch, past + length, padding=padding)[1]
        return self.arguments(kwargs["input_ids"], kwargs["attention_mask"], past)

    def of_tokens(self, ids: torch.Tensor, past: int = 0) -> dict[str, Any]:
        """The call for tokens without padding, of which the first ``past`` are cached."""
        return self.arguments(ids, past=past)

    def arguments(self, ids: torch.Tensor, mask: torch.Tensor | None = None, past: int = 0) -> dict[str, Any]:
        """The call for tokens ``[B, P + N]`` of which the first ``past`` are cached.

        Args:
            ids: int64; mask: 0 for padding, ``[B, P + N]``; none when not given.
            past: how many of them come before the call.
        """
        mask = torch.ones_like(ids) if mask is None else mask
        cached = empty_past(self.widths, ids.shape[0], self.dtype)
        if past:
            with torch.no_grad():
                results = self.model(**self._call(ids[:, :past], mask[:, :past], cached))
            cached = [
                {side: results[f"{PRESENT}{number}.{side}"] for side in ("key", "value")}
                for number in range(len(self.widths))
            ]
        return self._call(ids[:, past:], mask, cached)

    def _call(self, ids: torch.Tensor, mask: torch.Tensor, past: Past) -> dict[str, Any]:
        # contiguous: an export looks at strides too, and would take a part of a longer row for a case of its own
        call: dict[str, Any] = {"input_ids": ids.contiguous(), "attention_mask": mask.contiguous()}
        if self.model.positions:
            # as transformers counts them when it generates: padding does not count
            positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
            call["position_ids"] = positions[:, mask.shape[1] - ids.shape[1] :].contiguous()
        return call | {"past_key_values": past}

    def axes(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[int, str], ...]:
        """Names of the axes that vary, for each tensor of a call in order."""
        tokens = {0: "batch", 1: "length"}
        masks = {0: "batch", 1: "past + length"}
        heads = [{0: "batch", 2: "past"}] * (2 * len(self.widths))
        return (tokens, masks, *([tokens] if "position_ids" in kwargs else []), *heads)


def with_cache(opened: OpenedModel, *, last: bool = False) -> CachedModel:
    """A model that generates, with its cache as arguments and results.

    Args:
        opened: the model; last: whether only the logits of each row's last token are computed.

    Raises:
        InputError: when it is no decoder-only language model, keeps something else than the keys and values of every
            position, or has no output embedding that could be given less.
    """
    model = opened.model
    reason = _no_decoder(opened)
    if reason is not None:
        raise InputError(f"it has no cache to convert with: {reason}", opened.name, ADVICE)
    (_, kwargs), cache = opened.example(2, 7), DynamicCache()
    with torch.no_grad():
        try:
            model(**{**kwargs, "past_key_values": cache, "use_cache": True})
        except Exception as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"it does not run with a cache ({said})", opened.name, ADVICE) from error
    try:
        widths = widths_of(cache, 7)
    except LookupError as error:
        raise InputError(error.args[0], opened.name, ADVICE) from error
    positions = "position_ids" in inspect.signature(model.forward).parameters
    if last and model.get_output_embeddings() is None:
        raise InputError(f"{type(model).__name__} names no output embedding", opened.name, ALL_LOGITS)
    made = CachedModel(
        "torch",
        opened.name,
        opened.path,
        CachedDecoder(model, positions=positions, last=last).eval(),
        config=opened.config,
        notes=opened.notes,
        opened=opened,
        widths=widths,
    )
    _require_steps(made)
    return made


def why_no_cache(opened: OpenedModel, arguments: Set[str]) -> str | None:
    """Why a model is none of transformers that generates and takes these arguments of its forward."""
    model = opened.model
    if opened.kind != "torch" or opened.given is not None or not isinstance(model, transformers.PreTrainedModel):
        return "only a Hugging Face checkpoint says how its cache is passed"
    if not model.can_generate():
        return f"{type(model).__name__} does not generate"
    missing = arguments - set(inspect.signature(model.forward).parameters)
    return f"{type(model).__name__} takes no {' and no '.join(sorted(missing))}" if missing else None


def _no_decoder(opened: OpenedModel) -> str | None:
    """Why a model is no decoder-only language model of transformers."""
    reason = why_no_cache(opened, frozenset())
    if reason is None and opened.model.main_input_name != "input_ids":
        return f"{type(opened.model).__name__} does not generate from tokens alone"
    return reason or why_no_cache(opened, {"past_key_values", "attention_mask"})


def _require_steps(cached: CachedModel) -> None:
    """Raises InputError unless a step behind cached tokens gives what the whole sequence gives at once, and as many
    logits as are wanted.
    """
    assert cached.opened is not None
    # no padding: some models give NaN for queries that see no key
    ids = cached.opened.example(2, 9, padding="none")[1]["input_ids"]
    with torch.no_grad():
        at_once = cached.model(**cached.arguments(ids))["logits"]
        stepped = cached.model(**cached.arguments(ids, past=8))["logits"]
    if cached.model.last and at_once.shape[1] != 1:
        kind, count = type(cached.opened.model).__name__, at_once.shape[1]
        reason = f"{kind} gives the logits of {count} positions where its output embedding is given one"
        raise InputError(reason, cached.name, ALL_LOGITS)
    require_equal_steps(at_once[:, -1], stepped[:, -1], cached.name)


def require_equal_steps(at_once: torch.Tensor, stepped: torch.Tensor, name: str, advice: str = ADVICE) -> None:
    """Raises InputError, with the advice, unless a step's logits are those of the whole sequence.

    Judged by half of the digits of the model's dtype: rounding stays far below that, and a cache that is not read does
    not.
    """
    allowed = math.sqrt(torch.finfo(at_once.dtype).eps) * float(at_once.abs().max())
    apart = float((at_once - stepped).abs().max())
    if not apart <= allowed:
        reason = f"a step behind its cache gives other logits than the whole sequence does (by {apart:.2g})"
        raise InputError(reason, name, advice)


__all__ = [
    "ADVICE",
    "ALL_LOGITS",
    "EXAMPLE_PAST",
    "PRESENT",
    "CachedDecoder",
    "CachedModel",
    "Generating",
    "Past",
    "TensorFunction",
    "Widths",
    "empty_past",
    "filled_cache",
    "kept",
    "require_equal_steps",
    "why_no_cache",
    "widths_of",
    "with_cache",
]
