"""For how many positions something is stated: those that the model has."""

from __future__ import annotations

import pytest
import transformers

from attncompile.frontends.errors import InputError
from attncompile.frontends.positions import STATED_FOR, stated_length

FEW = transformers.BertConfig(max_position_embeddings=60)
MANY = transformers.LlamaConfig(max_position_embeddings=4 * STATED_FOR)
BART = transformers.BartConfig(max_position_embeddings=60)
CLIP = transformers.CLIPConfig(text_config={"max_position_embeddings": 60})


@pytest.mark.parametrize(
    ("config", "asked", "expected"),
    [
        (FEW, None, 60),
        (FEW, 7, 7),
        (FEW, 60, 60),
        (MANY, None, STATED_FOR),
        (MANY, 4 * STATED_FOR, 4 * STATED_FOR),
        (None, None, STATED_FOR),
        (None, 5000, 5000),
        (BART, None, STATED_FOR),
        (BART, 1500, 1500),
        (CLIP, 1500, 1500),
    ],
)
def test_as_asked_or_as_many_as_there_are(config: object, asked: int | None, expected: int) -> None:
    """An encoder, of frames or patches say, is not bounded by the positions of the text beside it."""
    assert stated_length(config, asked) == expected


@pytest.mark.parametrize("config", [FEW, MANY])
def test_more_than_there_are_is_a_mistake(config: transformers.PreTrainedConfig) -> None:
    limit = config.max_position_embeddings
    with pytest.raises(InputError, match=f"length {limit + 1} is more than the {limit} positions") as caught:
        stated_length(config, limit + 1)
    assert f"use at most {limit}" in str(caught.value)
