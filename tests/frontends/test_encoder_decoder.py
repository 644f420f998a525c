"""Encoder and decoder of a model, each as a function of tensors: together they are the model, call by call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from attncompile.frontends.cached import empty_past
from attncompile.frontends.checkpoint import OpenedModel, open_model
from attncompile.frontends.encoder_decoder import decoder_call, encodes_and_decodes, grown, with_cross_cache
from attncompile.frontends.errors import InputError
from tests.small_encoder_decoders import SMALL, VOCABULARY, encoder_inputs, small


def opened(kind: str) -> OpenedModel:
    model = small(kind)
    model.set_attn_implementation("eager")
    return OpenedModel("torch", kind, Path(kind), model, config=model.config)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("lengths", [(1, 1, 1), (5, 1, 3), (2, 6)], ids=str)
def test_calls_behind_caches_are_the_whole_model(kind: str, lengths: tuple[int, ...]) -> None:
    whole = opened(kind)
    encoder, decoder = with_cross_cache(whole)
    inputs = encoder_inputs(kind, 3, 13)
    ids = torch.randint(3, VOCABULARY, (3, sum(lengths)))
    with torch.no_grad():
        expected = whole.model(**inputs, decoder_input_ids=ids).logits
        cross, past, found = encoder.model(**inputs), empty_past(decoder.widths, 3, torch.float32), []
        for tokens in ids.split(lengths, dim=1):
            results = decoder.model(**decoder_call(tokens, inputs, past, cross))
            past = grown(results, len(decoder.widths))
            found.append(results["logits"])
    # two orders of the same sums, of some hundred terms each
    allowed = 300**0.5 * float(torch.finfo(torch.float32).eps) * float(expected.abs().max())
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=allowed)


def test_names_and_axes_are_those_of_optimum() -> None:
    encoder, decoder = with_cross_cache(opened("bart"))
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
    _, decoder = with_cross_cache(opened("whisper"))
    _, kwargs = decoder.example()
    assert decoder.source == 30 and "encoder_attention_mask" not in kwargs
    assert {0: "batch"} in decoder.axes((), kwargs)


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
