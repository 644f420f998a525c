"""Generate text with a language model that was converted for one buffer, in ONNX Runtime alone:

    attncompile convert SmolLM2-135M -o smollm2 --shared-buffer
    python examples/generate_in_place.py smollm2 "The capital of France is"
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def generate(session: onnxruntime.InferenceSession, ids: list[int], ends: set[int], count: int) -> list[int]:
    """At most ``count`` tokens that follow, each the most likely one; the cache never moves."""
    kinds = {"float": np.float32, "float16": np.float16, "int8": np.int8, "uint8": np.uint8}
    binding = session.io_binding()
    for entry in session.get_inputs():
        if entry.name.startswith("past_key_values."):  # [batch, heads, capacity, channels]
            room = np.zeros((1, entry.shape[1], len(ids) + count, entry.shape[3]), dtype=kinds[entry.type[7:-1]])
            buffer = onnxruntime.OrtValue.ortvalue_from_numpy(room)
            binding.bind_ortvalue_input(entry.name, buffer)
            binding.bind_ortvalue_output(entry.name.replace("past_key_values", "present"), buffer)
    made: list[int] = []
    step = ids
    while len(made) < count and not ends & set(made):
        binding.bind_cpu_input("input_ids", np.array([step]))
        binding.bind_cpu_input("attention_mask", np.ones((1, len(ids) + len(made)), dtype=np.int64))
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        step = [int(binding.get_outputs()[-1].numpy()[0, -1].argmax())]  # logits were bound last
        made += step
    return made


if __name__ == "__main__":
    folder, prompt = Path(sys.argv[1]), sys.argv[2]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = json.loads((folder / "genai_config.json").read_text())["model"]["eos_token_id"]
    model = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    ends = set(end if isinstance(end, list) else [end])
    print(prompt + tokenizer.decode(generate(model, tokenizer.encode(prompt).ids, ends, count=40)))
