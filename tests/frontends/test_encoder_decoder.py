"""Encoder and decoder of a model, each as a function of tensors: together they are the model, call by call."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
import transformers

from attncompile.frontends.cached import empty_past
from attncompile.frontends.checkpoint import OpenedModel, open_model
from attncompile.frontends.encoder_decoder import (
    DecoderModel,
    EncoderModel,
    decoder_call,
    encodes_and_decodes,
    grown,
    with_cross_cache,
)
from attncompile.frontends.errors import InputError
from tests.small_encoder_decoders import SMALL, SMALL_SPEAKING, VOCABULARY, encoder_inputs, small


def opened(kind: str) -> OpenedModel:
    model = small(kind)
    model.set_attn_implementation("eager")
    return OpenedModel("torch", kind, Path(kind), model, config=model.config)


@functools.cache
def parts(kind: str) -> tuple[OpenedModel, EncoderModel, DecoderModel]:
    """A model, its encoder, and its decoder."""
    whole = opened(kind)
    return whole, *with_cross_cache(whole)


ALIKE = ("cohere_asr", "seamless_m4t_v2", "speech-encoder-decoder")
"""Kinds that take the ways of others (canary, seamless_m4t, speecht5)."""

UNSCALED = ("t5", "mt5", "pop2piano")
"""Kinds whose scores have no scale: roundings of large features in float32 become differences of any size."""


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in ALIKE else kind for kind in SMALL]
)
@pytest.mark.parametrize("lengths", [(1, 1, 1), (5, 1, 3), (2, 6)], ids=str)
def test_calls_behind_caches_are_the_whole_model(kind: str, lengths: tuple[int, ...]) -> None:
    whole, encoder, decoder = copy.deepcopy(parts(kind))
    dtype = torch.float64 if kind in UNSCALED else torch.float32
    whole.model.to(dtype)
    inputs = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in encoder_inputs(kind, 3, 13).items()
    }
    ids = torch.randint(3, VOCABULARY, (3, sum(lengths)))
    with torch.no_grad():
        expected = whole.model(**inputs, decoder_input_ids=ids).logits
        cross, past, found = encoder.model(**inputs), empty_past(decoder.widths, 3, dtype), []
        for tokens in ids.split(lengths, dim=1):
            results = decoder.model(**decoder_call(tokens, inputs, past, cross))
            past = grown(results, len(decoder.widths))
            found.append(results["logits"])
    # two orders of the same sums, of some hundred terms each; norms stay in float32 in either type
    allowed = 300**0.5 * float(torch.finfo(torch.float32).eps) * float(expected.abs().max())
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=allowed)


def test_names_and_axes_are_those_of_optimum() -> None:
    _, encoder, decoder = parts("bart")
    _, kwargs = decoder.example()
    sizes = [tensor.shape for layer in kwargs["past_key_values"] for side in layer.values() for tensor in side.values()]
    assert list(kwargs["past_key_values"][0]) == ["decoder", "encoder"]
    assert sizes[:4] == [(2, 4, 14, 8)] * 2 + [(2, 4, 29, 8)] * 2
    assert kwargs["encoder_attention_mask"].shape == (2, 29)
    assert decoder.axes((), kwargs)[:3] == (
        {0: "batch", 1: "length"},
        {0: "batch", 1: "encoder_length"},
        {0: "batch", 2: "past"},
    )
    results = encoder.model(**encoder.example(2, 7)[1])
    assert list(results)[:3] == ["last_hidden_state", "present.0.encoder.key", "present.0.encoder.value"]
    assert results["present.1.encoder.value"].shape == (2, 4, 7, 8)


def test_an_encoder_of_sound_has_a_fixed_length_and_no_mask() -> None:
    _, _, decoder = parts("whisper")
    _, kwargs = decoder.example()
    assert decoder.source == 30 and "encoder_attention_mask" not in kwargs
    assert {0: "batch"} in decoder.axes((), kwargs)


def test_a_mask_that_the_encoder_makes_of_its_own_is_handed_on() -> None:
    """Eight frames are one position: the encoder's mask is of positions, and the decoder reads no other."""
    _, encoder, decoder = parts("canary")
    inputs = encoder_inputs("canary", 2, 13)
    given = encoder.model(**inputs)["encoder_attention_mask"]
    assert given.dtype is torch.int64 and given.sum(dim=1).tolist() == [14, 10]
    _, kwargs = decoder.example()
    assert kwargs["encoder_attention_mask"].shape[1] == kwargs["past_key_values"][0]["encoder"]["key"].shape[2]
    assert {0: "batch", 1: "encoder_length"} in decoder.axes((), kwargs)


def test_a_mask_of_frames_has_a_length_of_its_own() -> None:
    _, _, decoder = parts("seamless_m4t")
    _, kwargs = decoder.example()
    assert kwargs["encoder_attention_mask"].shape[1] > kwargs["past_key_values"][0]["encoder"]["key"].shape[2]
    assert {0: "batch", 1: "encoder_input_length"} in decoder.axes((), kwargs)


def test_a_mask_that_would_fix_the_length_is_left_out() -> None:
    _, encoder, decoder = parts("moonshine")
    args, kwargs = encoder.example()
    assert list(kwargs) == ["input_values"] and encoder.axes(args, kwargs) == ({0: "batch", 1: "samples"},)
    assert "encoder_attention_mask" not in decoder.example()[1]
    (note,) = encoder.notes
    assert "converted without its mask" in note


def test_what_else_a_model_encodes_is_told() -> None:
    config = transformers.AutoConfig.for_model("seamless_m4t", **SMALL["seamless_m4t"], **SMALL_SPEAKING)
    model = transformers.SeamlessM4TModel(config).eval()
    encoder, _ = with_cross_cache(OpenedModel("torch", "both", Path("both"), model, config=config))
    (note,) = encoder.notes
    assert note == (
        "its encoder takes input_ids, attention_mask; what the model makes of input_features is not in it"
    )


def test_what_does_not_generate_with_a_cache_is_told_so(tmp_path: Path) -> None:
    headless = transformers.BartModel(transformers.AutoConfig.for_model("bart", **SMALL["bart"]))
    headless.save_pretrained(tmp_path / "bart")
    model = open_model(tmp_path / "bart")
    assert encodes_and_decodes(model)
    with pytest.raises(InputError, match="BartModel does not generate: bart; pass --no-cache"):
        with_cross_cache(model)


def test_a_cache_that_is_not_read_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = opened("bart")
    forward = whole.model.forward

    def forgetful(*args: object, **kwargs: object) -> object:
        if kwargs.get("past_key_values") is not None and kwargs["past_key_values"].get_seq_length():  # type: ignore[attr-defined]
            kwargs["past_key_values"].self_attention_cache.crop(-1)  # type: ignore[attr-defined]
        return forward(*args, **kwargs)

    monkeypatch.setattr(whole.model, "forward", forgetful)
    with pytest.raises(InputError):
        with_cross_cache(whole)
