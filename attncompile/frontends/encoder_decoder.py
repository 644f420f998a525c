"""An encoder-decoder as the two functions that generation calls: the encoder once, the decoder for every step.

- ``hidden, mask, cross = encoder(inputs)``: the encoder's states, its own mask of them where it makes one (of sound,
  which has more frames than positions), and what the decoder's cross-attention makes of them, keys and values of every
  layer. They are the same for every step, so they are computed here.
- ``logits, present = decoder(input_ids, encoder_attention_mask, past, cross)``: ``N`` new tokens behind ``P`` cached
  ones, for a prompt (``P = 0``) and for every step after it.

Both are the model's own code: the first lets the decoder fill its cache from the states and keeps the half that depends
on nothing else; the second gives the decoder a filled cache. The names are those of Optimum.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from attncompile.frontends.cached import (
    ADVICE,
    PRESENT,
    Generating,
    Past,
    TensorFunction,
    Widths,
    empty_past,
    filled_cache,
    kept,
    require_equal_steps,
    why_no_cache,
    widths_of,
)
from attncompile.frontends.capture import fixes_axes
from attncompile.frontends.checkpoint import OpenedModel
from attncompile.frontends.errors import CaptureError, InputError
from attncompile.frontends.example_inputs import Arguments, Padding

SIDES = ("key", "value")
MASK = "attention_mask"
ENCODED = ("input_ids", "input_features", "input_values", "pixel_values", "flattened_patches")
"""What encoders read: tokens, sound, pictures."""
OF_DECODER = ("decoder_input_ids", "use_cache")
"""Arguments of a whole model that its encoder does not take."""

BothPasts = Sequence[Mapping[str, Mapping[str, torch.Tensor]]]
"""For each layer ``decoder`` (self-attention, ``[B, G, P, D]``) and ``encoder`` (cross-attention, ``[B, G, S, D]``), of
both ``key`` and ``value``."""


class Encoding(TensorFunction):
    """The encoder, with the keys and values of the decoder's cross-attention."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        flattened_patches: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Hidden states ``[B, S, C]``, and keys and values ``[B, G, S, D]`` of every layer of the decoder, by name.

        The mask ``[B, S]`` int64 that the encoder gives with its states comes between them.

        Args:
            input_ids, input_features, input_values, pixel_values, flattened_patches: what the encoder reads, one of
                them; attention_mask: 0 for padding, for a model whose encoder takes one.
        """
        named = {
            "input_ids": input_ids,
            "input_features": input_features,
            "input_values": input_values,
            "pixel_values": pixel_values,
            "flattened_patches": flattened_patches,
            "attention_mask": attention_mask,
        }
        inputs = {name: tensor for name, tensor in named.items() if tensor is not None}
        encoded, cache = encoded_by(self.inner, inputs)
        found = {"last_hidden_state": encoded["last_hidden_state"]}
        if encoded.get(MASK) is not None:
            found[f"encoder_{MASK}"] = encoded[MASK].to(torch.int64)
        for number, pair in enumerate(kept(cache.cross_attention_cache)):
            found |= {f"{PRESENT}{number}.encoder.{side}": tensor for side, tensor in zip(SIDES, pair, strict=True)}
        return found


def encoded_by(
    model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], ids: torch.Tensor | None = None
) -> tuple[ModelOutput, EncoderDecoderCache]:
    """What a model's encoder gives in a call of the whole model, and the caches that its decoder fills then.

    The whole model is called, because that is where its inputs become those of its encoder (pictures among tokens,
    features that are embedded already).

    Args:
        model: an encoder-decoder of transformers; inputs: of its encoder.
        ids: of the decoder, one token in each row unless given; what else it makes of them is not asked for.
    """
    heard: list[ModelOutput] = []
    encoder = model.get_encoder()  # type: ignore[operator]
    listening = encoder.register_forward_hook(lambda module, args, given: heard.append(given))
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    if ids is None:
        some = next(iter(inputs.values()))
        ids = torch.zeros(some.shape[0], 1, dtype=torch.int64, device=some.device)
    try:
        result = model(**inputs, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
    finally:
        listening.remove()
    if heard and isinstance(heard[-1], ModelOutput) and "last_hidden_state" in heard[-1]:
        return heard[-1], cache
    return BaseModelOutput(last_hidden_state=result.encoder_last_hidden_state), cache


class Decoding(TensorFunction):
    """The decoder behind both caches.

    Attributes:
        outputs: the type in which the model passes its encoder's results.
        channels: of the encoder's hidden states.
        masked: whether a mask is one of these results; it is the model's own argument otherwise.
    """

    def __init__(self, inner: torch.nn.Module, outputs: type[ModelOutput], channels: int, *, masked: bool) -> None:
        super().__init__(inner)
        self.outputs = outputs
        self.channels = channels
        self.masked = masked

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: BothPasts,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Logits ``[B, N, vocabulary]`` and what self-attention has cached afterwards, by name.

        Args:
            input_ids: ``[B, N]`` int64.
            past_key_values: what is cached; encoder_attention_mask: int64, 0 for padding, for a model whose encoder
                takes one: ``[B, S]`` where the encoder gives it, else as the encoder takes it.
        """
        first = past_key_values[0]
        past, source = (first[name]["key"].shape[2] for name in ("decoder", "encoder"))
        for layer in past_key_values:
            for name, size in (("decoder", past), ("encoder", source)):
                for tensor in layer[name].values():  # an export would otherwise take them for sizes of their own
                    torch._check(tensor.shape[2] == size)
        cache = EncoderDecoderCache(
            *(filled_cache([dict(layer[name]) for layer in past_key_values]) for name in ("decoder", "encoder"))
        )
        # nobody reads the states any more, but models look at their shape
        states = first["encoder"]["key"].new_zeros(input_ids.shape[0], source, self.channels)
        mask = {} if encoder_attention_mask is None else {MASK: encoder_attention_mask}
        result = self.inner(
            encoder_outputs=self.outputs(last_hidden_state=states, **(mask if self.masked else {})),
            decoder_input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
            **({} if self.masked else mask),
        )
        found = {"logits": result.logits}
        for number, pair in enumerate(kept(cache.self_attention_cache)):
            found |= {f"{PRESENT}{number}.decoder.{side}": tensor for side, tensor in zip(SIDES, pair, strict=True)}
        return found


@dataclass(frozen=True)
class EncoderModel(OpenedModel):
    """The encoder of an opened model; ``model`` is an :class:`Encoding`.

    Attributes:
        opened: the model as it was opened.
    """

    opened: OpenedModel | None = None

    @property
    def scope(self) -> str:
        """Path of the model of transformers in the one that is exported; names are told without it."""
        return "inner."

    def example(self, batch: int = 2, length: int | None = None, *, padding: Padding | None = None) -> Arguments:
        """What the encoder takes of the whole model's arguments."""
        assert self.opened is not None
        return (), of_encoder(self.opened.example(batch, length, padding=padding)[1])


@dataclass(frozen=True)
class DecoderModel(Generating):
    """The decoder of an opened model with both caches; ``model`` is a :class:`Decoding`.

    Attributes:
        encoder: what makes the cross-attention's keys and values.
        cross: their widths.
        source: how many positions the encoder always gives; ``None`` where that follows from its input.
    """

    encoder: EncoderModel | None = None
    cross: Widths = ()
    source: int | None = None

    def example_call(self, batch: int, length: int, padding: Padding | None, past: int) -> dict[str, Any]:
        """Tokens of an example behind an encoded input of about half the length."""
        assert self.opened is not None
        ids = self.opened.example(batch, past + length)[1]["decoder_input_ids"]
        return self.behind(ids, self._encoder_inputs(batch, 4 + (past + length) // 2, padding), past)

    def of_tokens(self, ids: torch.Tensor, past: int = 0) -> dict[str, Any]:
        """The call for tokens behind the encoded input of an example, the first ``past`` of them cached."""
        return self.behind(ids, self._encoder_inputs(ids.shape[0], 4 + ids.shape[1] // 2, None), past)

    def behind(self, ids: torch.Tensor, inputs: Mapping[str, torch.Tensor], past: int = 0) -> dict[str, Any]:
        """The call for tokens ``[B, P + N]``, of which the first ``past`` are cached, behind an encoder's input."""
        assert self.encoder is not None
        with torch.no_grad():
            cross = self.encoder.model(**inputs)
            own = empty_past(self.widths, ids.shape[0], self.dtype)
            if past:
                own = grown(self.model(**decoder_call(ids[:, :past], inputs, own, cross)), len(self.widths))
        return decoder_call(ids[:, past:], inputs, own, cross)

    def _encoder_inputs(self, batch: int, length: int, padding: Padding | None) -> Mapping[str, torch.Tensor]:
        assert self.encoder is not None
        return self.encoder.example(batch, length, padding=padding)[1]

    def axes(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[int, str], ...]:
        """Names of the axes that vary, for each tensor of a call in order."""
        varies, masks = {} if self.source is not None else {2: "encoder_length"}, []
        mask = kwargs.get("encoder_attention_mask")
        if mask is not None:
            positions = kwargs["past_key_values"][0]["encoder"]["key"].shape[2]
            masks = [{0: "batch", 1: "encoder_length" if mask.shape[1] == positions else "encoder_input_length"}]
        layer = [{0: "batch", 2: "past"}] * 2 + [{0: "batch", **varies}] * 2
        return ({0: "batch", 1: "length"}, *masks, *(layer * len(self.widths)))


def decoder_call(
    ids: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
    own: Past,
    cross: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    """The call of the decoder for tokens ``[B, N]``.

    Args:
        ids: int64; inputs: of the encoder; own: what self-attention has cached.
        cross: the encoder's results, by name; a mask among them says what is padding, else that of the inputs.
    """
    name = f"encoder_{MASK}"
    given = cross.get(name, inputs.get(MASK))
    mask = {} if given is None else {name: given}
    past = [
        {"decoder": dict(layer), "encoder": {side: cross[f"{PRESENT}{number}.encoder.{side}"] for side in SIDES}}
        for number, layer in enumerate(own)
    ]
    # contiguous: an export looks at strides too, and would take a part of a longer row for a case of its own
    return {"input_ids": ids.contiguous(), **mask, "past_key_values": past}


def grown(results: Mapping[str, torch.Tensor], layers: int) -> Past:
    """What self-attention has cached after a call of the decoder with these results."""
    return [{side: results[f"{PRESENT}{number}.decoder.{side}"] for side in SIDES} for number in range(layers)]


def of_encoder(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What an encoder takes of the arguments of its whole model."""
    return {name: value for name, value in kwargs.items() if name not in OF_DECODER}


def encodes_and_decodes(opened: OpenedModel) -> bool:
    """Whether a model is an encoder-decoder of transformers."""
    return bool(getattr(getattr(opened.model, "config", None), "is_encoder_decoder", False))


def _encoder(opened: OpenedModel) -> EncoderModel:
    """The encoder, with its mask unless that would fix how long its inputs are: a note says so then."""
    masked = _encoder_with(opened)
    kwargs = masked.example()[1]
    # rows of tokens are padded as a rule; of sound a row can be encoded by itself
    if MASK not in kwargs or "input_ids" in kwargs or not _fixes_sizes(masked):
        return masked
    note = (
        "its encoder is converted without its mask, with which it would take inputs of one length only: give it rows "
        "of one length, or one row at a time"
    )
    bare = _encoder_with(replace(opened, notes=(*opened.notes, note), without=opened.without | {MASK}))
    return masked if _fixes_sizes(bare) else bare


def _encoder_with(opened: OpenedModel) -> EncoderModel:
    """The encoder, of the inputs that an example has; a note names others."""
    taken = inspect.signature(opened.model.forward).parameters
    given = of_encoder(opened.example(2, 7)[1])
    others = [name for name in ENCODED if name in taken and name not in given]
    notes = opened.notes
    if others:
        note = f"its encoder takes {', '.join(given)}; what the model makes of {', '.join(others)} is not in it"
        notes = (*notes, note)
    model = Encoding(opened.model).eval()
    return EncoderModel("torch", opened.name, opened.path, model, config=opened.config, notes=notes, opened=opened)


def _fixes_sizes(encoder: EncoderModel) -> bool:
    """Whether an export fixes a size that should vary, or cannot be made."""
    args, kwargs = encoder.example()
    try:
        return fixes_axes(encoder.model, kwargs, encoder.axes(args, kwargs))
    except CaptureError:
        return True


def with_cross_cache(opened: OpenedModel) -> tuple[EncoderModel, DecoderModel]:
    """Encoder and decoder of a model that generates, with its caches as arguments and results.

    Raises:
        InputError: when it does not generate, or its layers keep something else than the keys and values of every
            position.
    """
    reason = why_no_cache(opened, {"past_key_values", "encoder_outputs", "decoder_input_ids"})
    if reason is not None:
        raise InputError(f"it has no cache to convert with: {reason}", opened.name, ADVICE)
    encoder = _encoder(opened)
    opened = encoder.opened or opened
    kwargs = opened.example(2, 7)[1]
    inputs, longer, ids = of_encoder(kwargs), encoder.example(2, 11)[1], kwargs["decoder_input_ids"]
    with torch.no_grad():
        try:
            encoded, cache = encoded_by(opened.model, inputs, ids)
            sources = [encoder.model(**some)["last_hidden_state"].shape[1] for some in (inputs, longer)]
        except Exception as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"it does not run with a cache ({said})", opened.name, ADVICE) from error
    try:
        widths = widths_of(cache.self_attention_cache, 7)
        cross = widths_of(cache.cross_attention_cache, sources[0])
    except LookupError as error:
        raise InputError(error.args[0], opened.name, ADVICE) from error
    if len(widths) != len(cross):
        reason = f"{len(widths)} of its layers attend to themselves and {len(cross)} to the encoder"
        raise InputError(reason, opened.name, ADVICE)
    decoder = DecoderModel(
        "torch",
        opened.name,
        opened.path,
        Decoding(
            opened.model, type(encoded), encoded["last_hidden_state"].shape[-1], masked=encoded.get(MASK) is not None
        ).eval(),
        config=opened.config,
        opened=opened,
        widths=widths,
        encoder=encoder,
        cross=cross,
        source=sources[0] if sources[0] == sources[1] else None,
    )
    with torch.no_grad():
        at_once = opened.model(**kwargs).logits[:, -1]
        stepped = decoder.model(**decoder.behind(ids, inputs, 6))["logits"][:, -1]
    require_equal_steps(at_once, stepped, opened.name)
    return encoder, decoder


__all__ = [
    "DecoderModel",
    "Decoding",
    "EncoderModel",
    "Encoding",
    "decoder_call",
    "encodes_and_decodes",
    "grown",
    "of_encoder",
    "with_cross_cache",
]
