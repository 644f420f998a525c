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
HALF: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
"""Sizes of a part that has a configuration of its own."""
DECODER = HALF | {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 64}
SPECIAL = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END, "decoder_start_token_id": START}
CONFORMER = HALF | {"num_mel_bins": 16, "subsampling_conv_channels": 8, "conv_kernel_size": 3}
CONVOLUTIONS: dict[str, Any] = {
    "conv_dim": [8, 8, 8],
    "conv_kernel": [10, 3, 3],
    "conv_stride": [5, 2, 2],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
SEAMLESS = COMMON | {
    "hidden_size": 32,
    "max_position_embeddings": 64,
    "speech_encoder_layers": 1,
    "speech_encoder_attention_heads": 4,
    "speech_encoder_intermediate_size": 48,
    "feature_projection_input_dim": 16,
    "max_source_positions": 512,
}
SMALL_SPEAKING: dict[str, Any] = {
    "t2u_vocab_size": 40,
    "t2u_encoder_layers": 1,
    "t2u_decoder_layers": 1,
    "t2u_encoder_ffn_dim": 16,
    "t2u_decoder_ffn_dim": 16,
    "t2u_encoder_attention_heads": 4,
    "t2u_decoder_attention_heads": 4,
    "upsample_initial_channel": 32,
    "unit_hifi_gan_vocab_size": 40,
    "unit_embed_dim": 8,
    "lang_embed_dim": 8,
    "spkr_embed_dim": 8,
}
"""Sizes of what a SeamlessM4T speaks with."""
BERT: dict[str, Any] = DECODER | {"model_type": "bert", "is_decoder": True, "add_cross_attention": True}
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
    "canary": SPECIAL
    | {"encoder_config": CONFORMER, "decoder_config": DECODER | {"head_dim": 8, "num_key_value_heads": 4}}
    | {"vocab_size": VOCABULARY},
    "cohere_asr": SPECIAL | DECODER | {"encoder_config": CONFORMER},
    "seamless_m4t": SEAMLESS,
    "seamless_m4t_v2": SEAMLESS,
    "speecht5": COMMON | CONVOLUTIONS | {"hidden_size": 32, "max_text_positions": 64, "positional_dropout": 0.0},
    "speech-encoder-decoder": SPECIAL
    | {"encoder": HALF | CONVOLUTIONS | {"model_type": "wav2vec2"}, "decoder": BERT, "is_encoder_decoder": True},
    "pop2piano": RELATIVE,
    "pix2struct": SPECIAL
    | {
        "vision_config": HALF | {"patch_embed_hidden_size": 12, "d_kv": 8, "d_ff": 48, "seq_len": 64},
        "text_config": RELATIVE | {"hidden_size": 32, "num_layers": 2, "is_decoder": True, "tie_word_embeddings": True},
    },
    "vision-encoder-decoder": SPECIAL
    | {"encoder": HALF | {"model_type": "vit", "image_size": 24, "patch_size": 8}, "decoder": BERT},
}
LISTENING = (
    "whisper",
    "moonshine",
    "speech_to_text",
    "canary",
    "cohere_asr",
    "seamless_m4t",
    "seamless_m4t_v2",
    "speecht5",
    "speech-encoder-decoder",
    "pop2piano",
)
SEEING = ("pix2struct", "vision-encoder-decoder")
SAMPLES = {"moonshine": 400, "speecht5": 20, "speech-encoder-decoder": 20}
"""Samples of sound, about, that make a position."""
FRAMES = {"speech_to_text": (4, 8), "canary": (8, 16), "cohere_asr": (8, 16), "pop2piano": (1, 32)} | dict.fromkeys(
    ("seamless_m4t", "seamless_m4t_v2"), (8, 16)
)
"""Frames that make a position, and features of a frame."""


def small(kind: str) -> transformers.PreTrainedModel:
    """A model of the kind; its logits are spread, so that greedy tokens differ from step to step."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SMALL[kind])
    family = transformers.AutoModelForSpeechSeq2Seq if kind in LISTENING else transformers.AutoModelForSeq2SeqLM
    family = transformers.AutoModelForImageTextToText if kind in SEEING else family
    model = family.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.requires_grad:  # not the sinusoids of positions
                parameter.mul_(3.0)
    model.generation_config.eos_token_id = None
    return model


def encoder_inputs(kind: str, batch: int, length: int) -> dict[str, torch.Tensor]:
    """What an encoder reads: sound, pictures, or tokens. The last row lacks some at its end, where there is a mask."""
    generator = torch.Generator().manual_seed(length)
    if kind == "whisper":
        return {"input_features": torch.randn(batch, 8, 60, generator=generator)}
    if kind == "vision-encoder-decoder":
        return {"pixel_values": torch.randn(batch, 3, 24, 24, generator=generator)}
    if kind == "pix2struct":
        places = torch.stack([torch.arange(length) // 5 + 1, torch.arange(length) % 5 + 1], dim=-1).float()
        patches = torch.randn(batch, length, 12, generator=generator)
        flattened = torch.cat([places.expand(batch, -1, -1), patches], dim=-1)
        return {"flattened_patches": flattened, "attention_mask": _mask(batch, length)}
    if kind in FRAMES:  # any number of frames
        stride, features = FRAMES[kind]
        frames = stride * length + stride // 2 + 1
        sound = torch.randn(batch, frames, features, generator=generator)
        return {"input_features": sound, "attention_mask": _mask(batch, frames)}
    if kind in SAMPLES:
        samples = SAMPLES[kind] * (length + 1)
        mask = {} if kind == "moonshine" else {"attention_mask": _mask(batch, samples)}
        return {"input_values": torch.randn(batch, samples, generator=generator)} | mask
    ids, mask = torch.randint(3, VOCABULARY, (batch, length), generator=generator), _mask(batch, length)
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def _mask(batch: int, length: int) -> torch.Tensor:
    mask = torch.ones(batch, length).long()
    if batch > 1:
        mask[-1, -(length // 3) :] = 0
    return mask
