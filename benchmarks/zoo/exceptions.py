"""What some model types need beyond small sizes: one row per type, with nothing about their attention in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Need:
    """Special needs of a model type.

    Attributes:
        config: values over the small configuration; nested mappings are merged.
        inputs: arguments to give though the signature calls them optional.
        afresh: whether ``config`` goes to the configuration class alone, because its defaults depend on each other.
        model: class to take, where the base model is no model by itself.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    afresh: bool = False
    model: str = ""


SERIES = Need(
    {
        "prediction_length": 8, "context_length": 24, "lags_sequence": [1, 2, 3], "num_time_features": 2, "d_model": 64,
        "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
    },
    ("past_time_features", "past_observed_mask", "future_values", "future_time_features"),
    afresh=True,
)  # fmt: skip
SEGMENT_ANYTHING = Need(
    {
        "vision_config": {
            "num_pos_feats": 32, "image_size": 96, "patch_size": 16, "output_channels": 64, "window_size": 4,
            "global_attn_indexes": [1],
        },
        "prompt_encoder_config": {"hidden_size": 64, "image_size": 96, "image_embedding_size": 6},
    },
    ("input_points",),
)  # fmt: skip
BLOCKS_OF_FOUR = Need({"block_size": 4, "num_random_blocks": 2})
WINDOW_OF_SIXTEEN = Need({"attention_window": [16, 16]})
FEW_FILTERS = Need(
    {
        part: {"num_filters": 2}
        for part in ("audio_config", "semantic_model_config", "acoustic_tokenizer_encoder_config",
                     "semantic_tokenizer_encoder_config")
    }
)  # fmt: skip
BACKBONE = {
    "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1],
}  # fmt: skip
"""Stands in for backbones of convolutions, which hold no attention."""

NEEDS: Mapping[str, Need] = {
    "albert": Need({"embedding_size": 32}),
    "audio-spectrogram-transformer": Need({"max_length": 96, "num_mel_bins": 64}),
    "autoformer": SERIES,
    "bamba": Need({"attn_layer_indices": [1]}),
    "big_bird": BLOCKS_OF_FOUR,
    "bigbird_pegasus": BLOCKS_OF_FOUR,
    "bros": Need(inputs=("bbox",)),
    "canine": Need({"local_transformer_stride": 16}),
    "dbrx": Need(
        {
            "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 300,
            "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        },
        afresh=True,
    ),
    "decision_transformer": Need(
        {"n_layer": 2, "n_head": 4, "hidden_size": 64},
        ("states", "actions", "rewards", "returns_to_go", "timesteps"),
    ),
    "deepseek_v2": Need({"num_experts_per_tok": 2}),
    "donut-swin": Need({"window_size": 4}),
    "dpt": Need(
        {
            "backbone_out_indices": [0, 1, 1, 1], "neck_hidden_sizes": [16, 16, 16, 16], "fusion_hidden_size": 16,
        }
    ),
    "esm": Need({"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32}),
    "funnel": Need({"block_sizes": [1, 1], "block_repeats": [1, 1], "d_head": 16, "n_head": 4, "d_model": 64}),
    "git": Need(inputs=("pixel_values",)),
    "granitemoehybrid": Need({"layer_types": ["mamba", "attention"]}),
    "informer": SERIES,
    "jamba": Need({"attn_layer_offset": 1, "attn_layer_period": 2}),
    "layoutlm": Need(inputs=("bbox",)),
    "layoutlmv2": Need(inputs=("bbox", "image")),
    "layoutlmv3": Need({"input_size": 96, "coordinate_size": 8, "shape_size": 16}, ("bbox",)),
    "led": WINDOW_OF_SIXTEEN,
    "lilt": Need({"hidden_size": 96}, ("bbox",)),
    "longformer": WINDOW_OF_SIXTEEN,
    "longt5": Need({"local_radius": 16, "global_block_size": 8}),
    "lxmert": Need(inputs=("visual_feats", "visual_pos")),
    "nemotron": Need({"num_key_value_heads": 2, "head_dim": 16}),
    "patchtst": Need({"num_input_channels": 3}, ("past_values",)),
    "patchtsmixer": Need({"num_input_channels": 3}),
    "perceiver": Need(
        {
            "d_model": 64, "d_latents": 64, "num_latents": 16, "num_blocks": 1, "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4, "num_cross_attention_heads": 4,
        }
    ),
    "recurrent_gemma": Need({"num_hidden_layers": 3}),
    "reformer": Need(
        {
            "attn_layers": ["local", "lsh"], "axial_pos_embds": False, "local_attn_chunk_length": 16,
            "lsh_attn_chunk_length": 16, "num_buckets": 4, "hidden_size": 64, "num_attention_heads": 4,
            "attention_head_size": 16,
        }
    ),
    "rwkv": Need({"attention_hidden_size": 64}),
    "sam": SEGMENT_ANYTHING,
    "sam_hq": SEGMENT_ANYTHING,
    "siglip2": Need(inputs=("pixel_attention_mask", "spatial_shapes")),
    "speecht5": Need(model="SpeechT5ForSpeechToText"),
    "swin": Need({"image_size": 224}),
    "time_series_transformer": SERIES,
    "timesfm": Need({"context_length": 64, "horizon_length": 32}),
    "transfo-xl": Need({"cutoffs": []}),
    "udop": Need(inputs=("bbox",)),
    "vibevoice": FEW_FILTERS,
    "vibevoice_asr": FEW_FILTERS,
    "vilt": Need({"image_size": 96, "patch_size": 16}, ("pixel_values",)),
    "visual_bert": Need(inputs=("visual_embeds",)),
    "yolos": Need({"image_size": [96, 96]}),
}  # fmt: skip


def need_of(model_type: str) -> Need:
    """The row of a type, or the empty one."""
    return NEEDS.get(model_type, Need())
