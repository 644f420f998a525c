"""Transcribe speech with a converted Whisper, in ONNX Runtime alone; transformers makes the features:

    attncompile convert whisper-tiny.en -o whisper
    python examples/transcribe_onnx.py whisper speech.wav
"""

from __future__ import annotations

import json
import sys
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer
from transformers import WhisperFeatureExtractor


def transcribe(
    folder: Path, features: np.ndarray, prompt: Sequence[int], settings: Mapping[str, Any], count: int
) -> list[int]:
    """At most ``count`` tokens behind the prompt, each the most likely one that the settings do not forbid."""
    encoder, decoder = (onnxruntime.InferenceSession(folder / f"{part}.onnx") for part in ("encoder", "decoder"))
    never, not_first = (settings.get(name) or [] for name in ("suppress_tokens", "begin_suppress_tokens"))
    encoded = zip(encoder.get_outputs(), encoder.run(None, {"input_features": features}), strict=True)
    feeds = {output.name.replace("present", "past_key_values"): value for output, value in encoded}
    del feeds["last_hidden_state"]  # the decoder reads keys and values that were made of it
    for entry in decoder.get_inputs():
        if ".decoder." in entry.name:  # [batch, heads, past, channels]
            kind = np.float16 if entry.type == "tensor(float16)" else np.float32
            feeds[entry.name] = np.zeros((1, entry.shape[1], 0, entry.shape[3]), dtype=kind)
    names, step, made = [entry.name for entry in decoder.get_outputs()], list(prompt), list[int]()
    while len(made) < count and settings.get("eos_token_id") not in made:
        results = dict(zip(names, decoder.run(None, feeds | {"input_ids": np.array([step])}), strict=True))
        logits = results.pop("logits")[0, -1]
        feeds |= {name.replace("present", "past_key_values"): value for name, value in results.items()}
        logits[[*never, *(() if made else not_first)]] = -np.inf
        step = [int(logits.argmax())]
        made += step
    return made


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with wave.open(sys.argv[2]) as file:
        if (file.getnchannels(), file.getsampwidth()) != (1, 2):
            raise SystemExit("one channel of 16 bits, please")
        sound, rate = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16) / 32768, file.getframerate()
    features = WhisperFeatureExtractor.from_pretrained(folder)(sound, sampling_rate=rate, return_tensors="np")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = [tokenizer.token_to_id(token) for token in ("<|startoftranscript|>", "<|notimestamps|>")]
    settings = json.loads((folder / "generation_config.json").read_text())
    print(tokenizer.decode(transcribe(folder, features["input_features"], prompt, settings, count=200)).strip())
