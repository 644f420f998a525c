"""``genai_config.json``: what onnxruntime-genai reads beside a model with a cache, to generate with it.

Names of inputs and outputs are those of the model; ``%d`` stands for a layer. Past and present are different buffers:
the model takes a past of any length and gives one that is longer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attncompile.frontends.cached import CachedModel

GENERATOR = "genai_config.json"

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams")
"""Settings of a generation configuration that onnxruntime-genai has under the same name."""


def write_generator(model: CachedModel, file: str, folder: Path) -> list[str]:
    """Write the configuration beside the model; what there is to say when it cannot be.

    Args:
        model: what was converted; file: the name of the ONNX file; folder: where it lies.
    """
    reason = _why_not(model)
    if reason is not None:
        return [f"no {GENERATOR} was written: {reason}; {file} runs in ONNX Runtime alone"]
    (folder / GENERATOR).write_text(json.dumps(_configuration(model, file), indent=2) + "\n", encoding="utf-8")
    return []


def _why_not(model: CachedModel) -> str | None:
    if len({width for layer in model.widths for width in layer}) > 1:
        return "onnxruntime-genai needs the same number of heads and channels in every layer"
    if _token(model, "eos_token_id") is None:
        return "the checkpoint does not say which token ends a text"
    missing = [name for name in ("vocab_size", "max_position_embeddings") if _number(model, name) is None]
    return f"config.json has no {' and no '.join(missing)}" if missing else None


def _configuration(model: CachedModel, file: str) -> dict[str, Any]:
    (heads, channels), _ = model.widths[0]
    ends = _token(model, "eos_token_id")
    pad = _token(model, "pad_token_id")
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    if model.model.positions:
        inputs["position_ids"] = "position_ids"
    tokens = {
        "bos_token_id": _token(model, "bos_token_id"),
        "eos_token_id": ends,
        "pad_token_id": pad if pad is not None else (ends[0] if isinstance(ends, list) else ends),
    }
    context = _number(model, "max_position_embeddings")
    return {
        "model": {
            **{name: value for name, value in tokens.items() if value is not None},
            "context_length": context,
            "type": "decoder",
            "vocab_size": _number(model, "vocab_size"),
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": file,
                "hidden_size": _number(model, "hidden_size") or heads * channels,
                "head_size": channels,
                "num_attention_heads": _number(model, "num_attention_heads") or heads,
                "num_hidden_layers": len(model.widths),
                "num_key_value_heads": heads,
                "inputs": inputs
                | {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": _sampling(model) | {"max_length": context, "past_present_share_buffer": False},
    }


def _sampling(model: CachedModel) -> dict[str, Any]:
    """How the checkpoint wants its tokens drawn, where it says so."""
    given = getattr(model.model.inner, "generation_config", None)
    found = {name: getattr(given, name, None) for name in SAMPLING}
    return {name: value for name, value in found.items() if value is not None}


def _token(model: CachedModel, name: str) -> int | list[int] | None:
    """A token's number: of the generation configuration, which knows more ends of a text, else of the model's."""
    found = getattr(getattr(model.model.inner, "generation_config", None), name, None)
    found = getattr(model.config, name, None) if found is None else found
    return found if isinstance(found, int | list) else None


def _number(model: CachedModel, name: str) -> int | None:
    text = model.config.get_text_config(decoder=True)
    found = getattr(text, name, None)
    return found if isinstance(found, int) else None


__all__ = ["GENERATOR", "write_generator"]
