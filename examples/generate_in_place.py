"""Generate text with a language model that was converted for one buffer, in ONNX Runtime alone:

    attncompile convert SmolLM2-135M -o smollm2 --shared-buffer
    python examples/generate_in_place.py smollm2 "The capital of France is"
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

KINDS = {  # of numbers as wide, and ONNX's number of the type; NumPy has no bfloat16
    "tensor(float)": (np.float32, 1),
    "tensor(float16)": (np.float16, 10),
    "tensor(bfloat16)": (np.uint16, 16),
    "tensor(int8)": (np.int8, 3),
    "tensor(uint8)": (np.uint8, 2),
}


def generate(session: onnxruntime.InferenceSession, ids: list[int], ends: set[int], count: int) -> list[int]:
    """At most ``count`` tokens that follow, each the most likely one; the cache never moves."""
    binding = session.io_binding()
    for entry in session.get_inputs():
        if entry.name.startswith("past_key_values."):  # [batch, heads, capacity, channels]
            kind, number = KINDS[entry.type]
            room = np.zeros((1, entry.shape[1], len(ids) + count, entry.shape[3]), dtype=kind)
            buffer = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(room, number)
            binding.bind_ortvalue_input(entry.name, buffer)
            binding.bind_ortvalue_output(entry.name.replace("past_key_values", "present"), buffer)
    made: list[int] = []
    step = ids
    while len(made) < count and not ends & set(made):
        binding.bind_cpu_input("input_ids", np.array([step]))
        binding.bind_cpu_input("attention_mask", np.ones((1, len(ids) + len(made)), dtype=np.int64))
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        step = [most_likely(binding.get_outputs()[-1])]  # logits were bound last
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
