"""Whisper weights from CTranslate2's `model.bin` to a Hugging Face folder.

CTranslate2 writes named little-endian tensors (`ctranslate2/specs/model_spec.py`, binary version 6):

    file: u32 version · text name · u32 revision · u32 count · variables · u32 count · aliases (text, text)
    variable: text name · u8 rank · rank × u32 size · u8 dtype · u32 bytes · the bytes
    text: u16 length including the closing zero · the characters · zero

It stacks the projections that read the same tensor: query, key and value of a self-attention are the row
blocks of one matrix, key and value of a cross-attention those of another. `STACKED` says which; everything
else is renaming.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    import torch

BINARY_VERSION = 6
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}

# CTranslate2's linear layer → the Hugging Face layers whose rows it stacks, in order
STACKED = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "ffn/layer_norm": ("final_layer_norm",),
}
OUTSIDE_LAYERS = {
    "embeddings": "embed_tokens",
    "position_encodings": "embed_positions",
    "layer_norm": "layer_norm",
    "conv1": "conv1",
    "conv2": "conv2",
}
PARAMETER = {"weight": "weight", "encodings": "weight", "gamma": "weight", "beta": "bias", "bias": "bias"}
WITHOUT_BIAS = "k_proj"  # Whisper's keys have no bias; in CTranslate2's stacked vector it is zero

# Token ids of the English-only vocabulary (openai/whisper, `tokenizer.py`); the package's config has the rest
END_OF_TEXT, START_OF_TRANSCRIPT, NO_TIMESTAMPS = 50256, 50257, 50362
ENGLISH_VOCABULARY = 51864


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every variable of a CTranslate2 `model.bin` by name, in its stored dtype; aliases are left out.

    Raises ValueError when this reader does not know the version or a dtype, or the file is cut short.
    """
    with path.open("rb") as file:
        version = _number(file, "I")
        if version != BINARY_VERSION:
            raise ValueError(f"{path}: binary version {version}, this reader knows {BINARY_VERSION}")
        _text(file)  # the specification's name
        _number(file, "I")  # and its revision
        return dict(_variable(file) for _ in range(_number(file, "I")))


def _variable(file: BinaryIO) -> tuple[str, np.ndarray]:
    name = _text(file)
    shape = [_number(file, "I") for _ in range(_number(file, "B"))]
    code = _number(file, "B")
    if code not in DTYPES:
        raise ValueError(f"{file.name}: {name} has the unknown dtype code {code}, known: {sorted(DTYPES)}")
    return name, np.frombuffer(_take(file, _number(file, "I")), DTYPES[code]).reshape(shape)


def _number(file: BinaryIO, code: str) -> int:
    value: int = struct.unpack("<" + code, _take(file, struct.calcsize("<" + code)))[0]
    return value


def _text(file: BinaryIO) -> str:
    return _take(file, _number(file, "H")).rstrip(b"\0").decode()


def _take(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise ValueError(f"{file.name}: ends after {file.tell()} bytes, in the middle of a tensor or a name")
    return data


def whisper_state(tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """CTranslate2's tensors under the names of `WhisperForConditionalGeneration`, in float32.

    Scalars (head counts, switches) are settings, not weights, and are skipped. Raises ValueError for a tensor
    whose name has no counterpart: nothing is dropped silently.
    """
    import torch

    state: dict[str, torch.Tensor] = {}
    for name, array in tensors.items():
        if array.ndim == 0:
            continue
        names = _hugging_face_names(name)
        parts = torch.from_numpy(array.astype(np.float32)).chunk(len(names))
        for to, part in zip(names, parts, strict=True):
            if not to.endswith(WITHOUT_BIAS + ".bias"):
                state[to] = part.clone()
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state


def _hugging_face_names(name: str) -> list[str]:
    """The parameters that the rows of one CTranslate2 tensor become."""
    found = re.fullmatch(r"(encoder|decoder)/(?:layer_(\d+)/)?(.+)/(\w+)", name)
    if found:
        side, layer, key, parameter = found.groups()
        to = STACKED.get(key, ()) if layer else tuple(filter(None, [OUTSIDE_LAYERS.get(key)]))
        prefix = f"model.{side}.layers.{layer}." if layer else f"model.{side}."
        if to and parameter in PARAMETER:
            return [f"{prefix}{each}.{PARAMETER[parameter]}" for each in to]
    raise ValueError(f"CTranslate2 tensor {name!r} has no counterpart in Whisper")


def save_whisper(binary: Path, out: Path) -> None:
    """Write the English-only Whisper in `binary` as a Hugging Face folder, with tokenizer and features.

    `config.json` and `tokenizer.json` of the CTranslate2 model lie beside `binary`. `out` is created.
    Raises ValueError when the model is not an English-only Whisper or a weight is missing.
    """
    from transformers import (
        GenerationConfig,
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    tensors = read_tensors(binary)
    vocabulary, width = tensors["decoder/embeddings/weight"].shape
    if vocabulary != ENGLISH_VOCABULARY:
        raise ValueError(f"{binary}: {vocabulary} tokens; English-only Whisper has {ENGLISH_VOCABULARY}")
    settings = json.loads(binary.with_name("config.json").read_text(encoding="utf8"))
    special: dict[str, Any] = {
        "decoder_start_token_id": START_OF_TRANSCRIPT,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "pad_token_id": END_OF_TEXT,
    }
    config = WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        encoder_layers=_layers(tensors, "encoder"),
        decoder_layers=_layers(tensors, "decoder"),
        encoder_attention_heads=int(tensors["encoder/num_heads"]),
        decoder_attention_heads=int(tensors["decoder/num_heads"]),
        encoder_ffn_dim=len(tensors["encoder/layer_0/ffn/linear_0/weight"]),
        decoder_ffn_dim=len(tensors["decoder/layer_0/ffn/linear_0/weight"]),
        num_mel_bins=tensors["encoder/conv1/weight"].shape[1],
        max_source_positions=len(tensors["encoder/position_encodings/encodings"]),
        max_target_positions=len(tensors["decoder/position_encodings/encodings"]),
        **special,
    )
    model = WhisperForConditionalGeneration(config).eval()
    model.load_state_dict(whisper_state(tensors), strict=True)
    model.generation_config = GenerationConfig(
        **special,
        max_length=config.max_target_positions,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
        no_timestamps_token_id=NO_TIMESTAMPS,
        is_multilingual=False,
        return_timestamps=False,
    )
    model.save_pretrained(out)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(binary.with_name("tokenizer.json")))
    tokenizer.save_pretrained(out)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(out)


def _layers(tensors: dict[str, np.ndarray], side: str) -> int:
    return len({found[1] for name in tensors if (found := re.match(rf"{side}/layer_(\d+)/", name))})
