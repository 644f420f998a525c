"""For how many positions something is stated: those that the model has."""

from __future__ import annotations

import pytest
import torch
import transformers

from attncompile.frontends.errors import InputError
from attncompile.frontends.positions import STATED_FOR, rows_of_positions, stated_length

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


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        (transformers.BertConfig(**SIZES, vocab_size=99, max_position_embeddings=60), 60),
        (transformers.BertConfig(**SIZES, vocab_size=60, max_position_embeddings=60), None),
        (transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=99, n_positions=60), 60),
        (transformers.LlamaConfig(**SIZES, vocab_size=99, max_position_embeddings=60), None),
        (transformers.OPTConfig(**SIZES, ffn_dim=16, vocab_size=99, max_position_embeddings=60), None),
    ],
    ids=["BERT", "as many words", "GPT-2", "rotary", "two rows more"],
)
def test_the_rows_of_a_table_bound_every_sequence(config: transformers.PreTrainedConfig, rows: int | None) -> None:
    model = transformers.AutoModel.from_config(config)
    assert rows_of_positions(model) == rows
    assert rows_of_positions(torch.nn.Sequential(model)) == rows  # around it too


def test_of_two_sequences_neither_is_bounded() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 99, "pad_token_id": 0}
    config = transformers.WhisperConfig(**sizes, encoder_attention_heads=2, decoder_attention_heads=2)
    assert rows_of_positions(transformers.WhisperModel(config)) is None
