"""Small sizes: fields shrink by meaning, what is no size stays."""

from __future__ import annotations

import pytest

from benchmarks.zoo.sizes import STEPS, Ladder, small_config


@pytest.mark.parametrize(
    ("given", "small"),
    [
        ({"hidden_size": 4096, "num_hidden_layers": 32}, {"hidden_size": 64, "num_hidden_layers": 2}),
        ({"num_attention_heads": 32, "num_key_value_heads": 8}, {"num_attention_heads": 4, "num_key_value_heads": 2}),
        ({"num_attention_heads": 32, "num_key_value_heads": 32}, {"num_attention_heads": 4, "num_key_value_heads": 4}),
        ({"num_attention_heads": 71, "num_kv_heads": 1}, {"num_attention_heads": 4, "num_kv_heads": 1}),
        ({"d_head": 64, "n_head": 12}, {"d_head": 16, "n_head": 4}),
        (
            {"sliding_window": 4096, "attn_logit_softcapping": 50.0},
            {"sliding_window": 4096, "attn_logit_softcapping": 50.0},
        ),
        ({"image_size": 224, "patch_size": 16}, {"image_size": 96, "patch_size": 16}),
        ({"hidden_size": 32}, {"hidden_size": 32}),
        ({"hidden_sizes": [128, 256], "hidden_size": 256}, {"hidden_sizes": [128, 256], "hidden_size": 256}),
        ({"text_config": {"vocab_size": 32000}}, {"text_config": {"vocab_size": 300}}),
    ],
)
def test_sizes_by_meaning(given: dict[str, object], small: dict[str, object]) -> None:
    assert small_config(given, Ladder()) == small


def test_every_kind_of_layer_is_shown() -> None:
    kinds = ["sliding", "sliding", "sliding", "full"] * 6
    small = small_config({"num_hidden_layers": 24, "layer_types": kinds}, Ladder())
    assert small == {"num_hidden_layers": 4, "layer_types": ["sliding", "sliding", "sliding", "full"]}


def test_equal_tokens_stay_equal_and_others_differ() -> None:
    given = {"image_token_id": 151655, "text_config": {"eos_token_id": [151643, 151655], "bos_token_id": 1}}
    small = small_config(given, Ladder())
    image, ends = small["image_token_id"], small["text_config"]["eos_token_id"]
    assert image == ends[1] != ends[0]
    assert max(image, *ends) < 300 and small["text_config"]["bos_token_id"] == 1


def test_the_last_step_keeps_widths() -> None:
    small = small_config({"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}, STEPS[-1])
    assert small == {"hidden_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16}
