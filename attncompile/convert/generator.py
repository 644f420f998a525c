"""``genai_config.json``: what onnxruntime-genai reads beside a model with a cache, to generate with it.

Names of inputs and outputs are those of the model; ``%d`` stands for a layer. Past and present are different buffers
unless the model was made for one: it takes a past of any length and gives one that is longer.

Of encoder-decoders onnxruntime-genai (0.18) runs those that listen: its type ``whisper`` gives an encoder the features
of thirty seconds of sound, and a decoder tokens and both caches, and nothing else. Its type for translation models
(``marian-ssru``) keeps a recurrent state instead of a self-attention's cache.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attncompile.convert.providers import named_provider
from attncompile.frontends.cached import CachedModel, Generating
from attncompile.frontends.checkpoint import OpenedModel
from attncompile.frontends.encoder_decoder import DecoderModel
from attncompile.frontends.positions import positions_of

GENERATOR = "genai_config.json"
SOUND = "audio_processor_config.json"
"""The file from which onnxruntime-genai learns how features are made of sound."""

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams")
"""Settings of a generation configuration that onnxruntime-genai has under the same name."""

FRAMES = 3000
"""Frames of features that onnxruntime-genai gives an encoder; it asks for half as many positions."""

Device = Mapping[str, Mapping[str, str]]
"""Options of an execution provider by the name that onnxruntime-genai has for it."""

DEVICES: Mapping[str, Device] = {"CUDAExecutionProvider": {"cuda": {"enable_cuda_graph": "0"}}}
"""What onnxruntime-genai is told to run on, as its own builder tells it; it runs on a CPU where it is told nothing."""


def write_generator(model: Generating, files: Sequence[str], folder: Path, provider: str = "cpu") -> list[str]:
    """Write the configuration beside the model; what there is to say when it cannot be.

    Args:
        model: what was converted, the decoder of an encoder-decoder; files: the names of the ONNX files, the decoder's
            last; folder: where they lie; provider: where they will run.
    """
    device = DEVICES.get(named_provider(provider))
    told: list[str] = []
    if isinstance(model, DecoderModel):
        reason = _why_not(model) or _why_not_heard(model)
        made = None if reason else _listening(model, files, device)
        told = [] if reason else _write_sound(model, folder)
    else:
        assert isinstance(model, CachedModel)
        reason = _why_not(model)
        made = None if reason else _configuration(model, files[-1], device)
    if made is None:
        run = f"{files[-1]} runs" if len(files) == 1 else f"{' and '.join(files)} run"
        return [f"no {GENERATOR} was written: {reason}; {run} in ONNX Runtime alone"]
    (folder / GENERATOR).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    return told


def _why_not(model: Generating) -> str | None:
    if len({width for layer in model.widths for width in layer}) > 1:
        return "onnxruntime-genai needs the same number of heads and channels in every layer"
    if _token(model, "eos_token_id") is None:
        return "the checkpoint does not say which token ends a text"
    missing = ["vocab_size"] if _number(model, "vocab_size") is None else []
    if positions_of(model.config) is None:
        missing.append("max_position_embeddings")
    return f"config.json has no {' and no '.join(missing)}" if missing else None


def _why_not_heard(model: DecoderModel) -> str | None:
    assert model.encoder is not None
    inputs = model.encoder.example(1, 7)[1]
    features = inputs.get("input_features")
    if features is None or len(inputs) > 1:
        return (
            "the encoder-decoders that onnxruntime-genai runs take features of sound and no padding mask, this one "
            f"takes {' and '.join(inputs)}"
        )
    if model.source is None:
        return f"onnxruntime-genai gives an encoder {FRAMES} frames of features, this one takes any number"
    if (features.shape[-1], model.source) != (FRAMES, FRAMES // 2):
        return (
            f"onnxruntime-genai gives an encoder {FRAMES} frames and asks for {FRAMES // 2} positions, here "
            f"{features.shape[-1]} frames make {model.source}"
        )
    if model.cross != model.widths:
        return "onnxruntime-genai needs as many heads and channels in cross-attention as in self-attention"
    return None


def _configuration(model: CachedModel, file: str, device: Device | None) -> dict[str, Any]:
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    if model.model.positions and not model.shared:
        inputs["position_ids"] = "position_ids"
    past, present = _cache_names("past", "past_key_values"), _cache_names("present", "present")
    decoder = _section(model, file, device) | {"inputs": inputs | past, "outputs": {"logits": "logits"} | present}
    return _whole(model, {"type": "decoder", "decoder": decoder})


def _listening(model: DecoderModel, files: Sequence[str], device: Device | None) -> dict[str, Any]:
    encoder, decoder = (_section(model, file, device) for file in files)
    encoder |= {
        "num_hidden_layers": _number(model, "encoder_layers") or len(model.widths),
        "inputs": {"audio_features": "input_features"},
        "outputs": {"encoder_hidden_states": "last_hidden_state"}
        | _cache_names("cross_present", "present", ".encoder"),
    }
    decoder |= {
        "inputs": {"input_ids": "input_ids"}
        | _cache_names("past", "past_key_values", ".decoder")
        | _cache_names("cross_past", "past_key_values", ".encoder"),
        "outputs": {"logits": "logits"} | _cache_names("present", "present", ".decoder"),
    }
    return _whole(model, {"type": "whisper", "encoder": encoder, "decoder": decoder})


def _cache_names(kind: str, start: str, part: str = "") -> dict[str, str]:
    """What onnxruntime-genai calls the names of keys and values, and the names."""
    return {f"{kind}_{side}_names": f"{start}.%d{part}.{side}" for side in ("key", "value")}


def _section(model: Generating, file: str, device: Device | None) -> dict[str, Any]:
    """What a configuration says of one file, and of where it runs."""
    (heads, channels), _ = model.widths[0]
    return {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": [device] if device else []},
        "filename": file,
        "hidden_size": _number(model, "hidden_size") or heads * channels,
        "head_size": channels,
        "num_attention_heads": _number(model, "num_attention_heads") or heads,
        "num_hidden_layers": len(model.widths),
        "num_key_value_heads": heads,
    }


def _whole(model: Generating, parts: dict[str, Any]) -> dict[str, Any]:
    ends = _token(model, "eos_token_id")
    pad = _token(model, "pad_token_id")
    tokens = {
        "bos_token_id": _token(model, "bos_token_id"),
        "eos_token_id": ends,
        "pad_token_id": pad if pad is not None else (ends[0] if isinstance(ends, list) else ends),
    }
    context = positions_of(model.config)
    return {
        "model": {
            **{name: value for name, value in tokens.items() if value is not None},
            "context_length": context,
            "vocab_size": _number(model, "vocab_size"),
            **parts,
        },
        "search": _sampling(model) | {"max_length": context, "past_present_share_buffer": model.shared},
    }


def _write_sound(model: DecoderModel, folder: Path) -> list[str]:
    """Write how features are made of sound, as the checkpoint says; a note where it does not."""
    try:
        given = json.loads((model.path / "preprocessor_config.json").read_text(encoding="utf-8"))
        attributes = {
            name: int(given[key])
            for name, key in (("n_fft", "n_fft"), ("hop_length", "hop_length"), ("chunk_size", "chunk_length"))
        }
        bands = int(given["feature_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return [f"no {SOUND} was written, for the checkpoint does not say how its features are made of sound"]
    size = attributes["n_fft"]
    steps = [
        {"name": "audio_decoder", "type": "AudioDecoder"},
        {
            "name": "STFT",
            "type": "STFTNorm",
            "attrs": {"n_fft": size, "frame_length": size, "hop_length": attributes["hop_length"]},
        },
        {"name": "log_mel_spectrogram", "type": "LogMelSpectrum", "attrs": attributes | {"n_mel": bands}},
    ]
    written = {"feature_extraction": {"sequence": [{"operation": step} for step in steps]}}
    (folder / SOUND).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return []


def _original(model: Generating) -> OpenedModel:
    assert model.opened is not None
    return model.opened


def _sampling(model: Generating) -> dict[str, Any]:
    """How the checkpoint wants its tokens drawn, where it says so."""
    given = getattr(_original(model).model, "generation_config", None)
    found = {name: getattr(given, name, None) for name in SAMPLING}
    return {name: value for name, value in found.items() if value is not None}


def _token(model: Generating, name: str) -> int | list[int] | None:
    """A token's number: of the generation configuration, which knows more ends of a text, else of the model's."""
    found = getattr(getattr(_original(model).model, "generation_config", None), name, None)
    found = getattr(model.config, name, None) if found is None else found
    return found if isinstance(found, int | list) else None


def _number(model: Generating, name: str) -> int | None:
    text = model.config.get_text_config(decoder=True)
    found = getattr(text, name, None)
    return found if isinstance(found, int) else None


__all__ = ["GENERATOR", "SOUND", "write_generator"]
