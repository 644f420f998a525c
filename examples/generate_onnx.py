"""Generate text with a converted language model, in ONNX Runtime alone:

    attncompile convert SmolLM2-135M -o smollm2
    python examples/generate_onnx.py smollm2 "The capital of France is"
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

TYPES = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}  # ONNX's numbers; NumPy has no bfloat16


def generate(session: onnxruntime.InferenceSession, ids: list[int], ends: set[int], count: int) -> list[int]:
    """At most ``count`` tokens that follow, each the most likely one."""
    given = {entry.name: entry for entry in session.get_inputs()}
    feeds: dict[str, onnxruntime.OrtValue] = {}
    for name, entry in given.items():
        if name.startswith("past_key_values."):  # [batch, heads, past, channels]
            empty = [1, entry.shape[1], 0, entry.shape[3]]
            feeds[name] = onnxruntime.OrtValue.ortvalue_from_shape_and_type(empty, TYPES[entry.type])
    names = [entry.name for entry in session.get_outputs()]
    made: list[int] = []
    step = ids
    while len(made) < count and not ends & set(made):
        length = len(ids) + len(made)
        now = {"input_ids": step, "attention_mask": [1] * length, "position_ids": range(length - len(step), length)}
        for name in given.keys() & now.keys():  # not every model takes positions
            feeds[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.array([now[name]], dtype=np.int64))
        results = dict(zip(names, session.run_with_ort_values(names, feeds), strict=True))
        feeds |= {name.replace("present", "past_key_values"): results[name] for name in names if name != "logits"}
        step = [most_likely(results["logits"])]
        made += step
    return made


def most_likely(logits: onnxruntime.OrtValue) -> int:
    """The token that is most likely behind the last one."""
    if logits.data_type() != "tensor(bfloat16)":
        return int(logits.numpy()[0, -1].argmax())
    size = logits.shape()[-1]  # the upper halves of float32, row by row
    last = logits.data_ptr() + logits.tensor_size_in_bytes() - 2 * size
    bits = np.array((ctypes.c_uint16 * size).from_address(last), dtype=np.uint32)
    return int((bits << 16).view(np.float32).argmax())


if __name__ == "__main__":
    folder, prompt = Path(sys.argv[1]), sys.argv[2]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    said = json.loads((folder / "genai_config.json").read_text())["model"]
    gpu = ["CUDAExecutionProvider"] if said["decoder"]["session_options"]["provider_options"] else []
    model = onnxruntime.InferenceSession(folder / "model.onnx", providers=[*gpu, "CPUExecutionProvider"])
    end = said["eos_token_id"]
    ends = set(end if isinstance(end, list) else [end])
    print(prompt + tokenizer.decode(generate(model, tokenizer.encode(prompt).ids, ends, count=40)))
