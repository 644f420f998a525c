"""Encoder-decoders of transformers with random weights, small enough for every test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

PAD, START, END = 0, 1, 2
VOCABULARY = 99

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": PAD,
    "bos_token_id": START,
    "eos_token_id": END,
    "decoder_start_token_id": START,
}
TEXT = COMMON | {"max_position_embeddings": 96}
RELATIVE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": PAD,
}
SMALL: Mapping[str, dict[str, Any]] = {
    "whisper": COMMON | {"num_mel_bins": 8, "max_source_positions": 30, "max_target_positions": 64},
    "t5": RELATIVE,
    "bart": TEXT,
    "marian": TEXT,
    "pegasus": TEXT,
    "mbart": TEXT,
    "m2m_100": TEXT,
    "blenderbot": TEXT,
    "mt5": RELATIVE,
    "bigbird_pegasus": TEXT | {"attention_type": "original_full"},
    "speech_to_text": COMMON
    | {
        "max_source_positions": 96,
        "max_target_positions": 64,
        "conv_channels": 16,
        "input_feat_per_channel": 8,
    },
    "moonshine": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "encoder_num_hidden_layers": 1,
        "decoder_num_hidden_layers": 2,
        "encoder_num_attention_heads": 4,
        "decoder_num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
}
LISTENING = ("whisper", "moonshine", "speech_to_text")


def small(kind: str) -> transformers.PreTrainedModel:
    """A model of the kind; its logits are spread, so that greedy tokens differ from step to step."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SMALL[kind])
    family = transformers.AutoModelForSpeechSeq2Seq if kind in LISTENING else transformers.AutoModelForSeq2SeqLM
    model = family.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.requires_grad:  # not the sinusoids of positions
                parameter.mul_(3.0)
    model.generation_config.eos_token_id = None
    return model


def encoder_inputs(kind: str, batch: int, length: int) -> dict[str, torch.Tensor]:
    """What an encoder reads: sound, or tokens of which the last row lacks some at its end."""
    generator = torch.Generator().manual_seed(length)
    if kind == "whisper":
        return {"input_features": torch.randn(batch, 8, 60, generator=generator)}
    if kind == "speech_to_text":  # any number of frames
        return {"input_features": torch.randn(batch, 4 * length + 3, 8, generator=generator)}
    if kind == "moonshine":
        return {"input_values": torch.randn(batch, 400 * length, generator=generator)}
    ids, mask = torch.randint(3, VOCABULARY, (batch, length), generator=generator), torch.ones(batch, length).long()
    if batch > 1:
        mask[-1, -(length // 3) :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}
