"""Inputs of models that read several things at once, and of those that read spectrograms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from attncompile.frontends.checkpoint import OpenedModel
from attncompile.frontends.several_inputs import with_others

TEXT = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 24, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 12, "patch_size": 4}  # fmt: skip


def clip() -> transformers.PreTrainedModel:
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8))


def siglip() -> transformers.PreTrainedModel:
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=VISION))


def llava() -> transformers.PreTrainedModel:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=98,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


def spectrogram() -> transformers.PreTrainedModel:
    config = transformers.ASTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, max_length=40,
        num_mel_bins=24, patch_size=8, frequency_stride=8, time_stride=8,
    )  # fmt: skip
    return transformers.ASTModel(config)


def example(model: transformers.PreTrainedModel) -> dict[str, Any]:
    opened = OpenedModel("torch", "small", Path("small"), model.eval(), config=model.config)
    return dict(opened.example(2, 9)[1])


@pytest.mark.parametrize("build", [clip, siglip])
def test_two_towers_get_text_and_pictures(build: Any) -> None:
    model = build()
    given = example(model)
    assert given["input_ids"].shape == (2, 9) and given["pixel_values"].shape == (2, 3, 12, 12)
    assert not given["attention_mask"][1].all() or "attention_mask" not in given
    with torch.no_grad():
        assert model(**given).logits_per_image.shape == (2, 2)


def test_a_language_model_that_may_see_pictures_gets_text() -> None:
    assert set(example(llava())) == {"input_ids", "attention_mask"}


def test_an_encoder_of_spectrograms_gets_one() -> None:
    model = spectrogram()
    given = example(model)
    assert given["input_values"].shape == (2, 40, 24)
    with torch.no_grad():
        assert model(**given).last_hidden_state.shape[0] == 2


def test_without_a_length_there_are_as_many_tokens_as_positions() -> None:
    few = clip().eval()
    opened = OpenedModel("torch", "small", Path("small"), few, config=few.config)
    assert opened.example()[1]["input_ids"].shape == (2, 24)


class Reads(torch.nn.Module):
    """Runs with exactly these inputs; counts its calls."""

    def __init__(self, *needed: str) -> None:
        super().__init__()
        self.needed, self.calls = set(needed), 0

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, pixel_values: Any = None, input_features: Any = None
    ) -> None:
        self.calls += 1
        given = {"input_ids": input_ids, "pixel_values": pixel_values, "input_features": input_features}
        if {name for name, value in given.items() if value is not None} != self.needed:
            raise ValueError("not these")


def named(name: str) -> str:
    if name == "input_features":
        raise LookupError("no features here")
    return f"made {name}"


def test_others_are_added_where_a_model_does_not_run_without() -> None:
    pictures = {"pixel_values": "given"}
    assert with_others(Reads("pixel_values"), pictures, named) == pictures
    found = with_others(Reads("pixel_values", "input_ids"), pictures, named)
    assert found == pictures | {"input_ids": "made input_ids", "attention_mask": "made attention_mask"}
    assert with_others(Reads("pixel_values", "input_features"), pictures, named) == pictures  # cannot be made
    assert with_others(Reads(), pictures, named) == pictures


def test_a_model_with_one_input_is_not_called() -> None:
    model = torch.nn.Linear(1, 1)
    assert with_others(model, {"input": 1}, named) == {"input": 1}
    complete = Reads("input_ids")
    with_others(complete, {"input_ids": 1, "pixel_values": 2, "input_features": 3}, named)
    assert complete.calls == 0
