"""What encoders read: the names of it, as many steps as make the positions that are asked for, and a mask of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from attncompile.frontends.checkpoint import OpenedModel
from attncompile.frontends.encoder_inputs import Steps, encoder_input, steps_of
from attncompile.frontends.errors import InputError
from tests.small_encoder_decoders import FRAMES, SAMPLES, SMALL, small

NAMES = {
    "whisper": "input_features",
    "seamless_m4t": "input_features",
    "pop2piano": "input_features",  # its generate begins with them; it calls tokens its main input
    "speech-encoder-decoder": "input_values",  # its own name for it is "inputs"
    "pix2struct": "flattened_patches",
    "vision-encoder-decoder": "pixel_values",
    "t5": "input_ids",
}


def opened(model: transformers.PreTrainedModel) -> OpenedModel:
    return OpenedModel("torch", "small", Path("small"), model, config=model.config)


@pytest.mark.parametrize("kind", NAMES)
def test_the_input_is_what_generation_gives_the_encoder(kind: str) -> None:
    assert encoder_input(small(kind)) == NAMES[kind]


@pytest.mark.parametrize("kind", [*FRAMES, *SAMPLES])
def test_as_many_steps_are_made_as_make_the_positions(kind: str) -> None:
    """Convolutions side by side, of two axes, and of other parts of the model are no reason for more."""
    model = small(kind)
    for length in (7, 29):
        kwargs = opened(model).example(2, length)[1]
        main, mask = kwargs[encoder_input(model)], kwargs["attention_mask"]
        with torch.no_grad():
            states = model(**kwargs).encoder_last_hidden_state
        assert length <= states.shape[1] <= length + 1
        assert mask.shape == main.shape[:2] and mask[0].all() and not mask[1, -1]


def test_steps_are_counted_once_for_a_model() -> None:
    model, made = small("canary"), list[int]()

    def sound(steps: int) -> torch.Tensor:
        made.append(steps)
        return torch.zeros(1, steps, 16)

    assert [steps_of(model, "input_features", sound) for _ in range(3)] == [Steps(8)] * 3
    assert len(made) == 2 and Steps(8, 3).of(5) == 43


def test_a_decoder_that_reads_no_tokens_is_told_so() -> None:
    sizes = SMALL["speecht5"] | {"speech_decoder_prenet_units": 8, "speech_decoder_postnet_units": 8}
    model = transformers.SpeechT5ForTextToSpeech(transformers.SpeechT5Config(**sizes)).eval()
    with pytest.raises(InputError, match="SpeechT5ForTextToSpeech takes decoder_input_values, which is not known here"):
        opened(model).example()
