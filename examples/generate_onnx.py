"""Generate text with a converted language model, in ONNX Runtime alone:

    attncompile convert SmolLM2-135M -o smollm2
    python examples/generate_onnx.py smollm2 "The capital of France is"
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def generate(session: onnxruntime.InferenceSession, ids: list[int], ends: set[int], count: int) -> list[int]:
    """At most ``count`` tokens that follow, each the most likely one."""
    feeds: dict[str, np.ndarray] = {}
    for entry in session.get_inputs():
        if entry.name.startswith("past_key_values."):  # [batch, heads, past, channels]
            feeds[entry.name] = np.zeros((1, entry.shape[1], 0, entry.shape[3]), dtype=np.float32)
    names = [entry.name for entry in session.get_outputs()]
    made: list[int] = []
    step = ids
    while len(made) < count and not ends & set(made):
        length = len(ids) + len(made)
        feeds["input_ids"] = np.array([step])
        feeds["attention_mask"] = np.ones((1, length), dtype=np.int64)
        feeds["position_ids"] = np.arange(length - len(step), length)[None]
        results = dict(zip(names, session.run(None, feeds), strict=True))
        feeds |= {name.replace("present", "past_key_values"): results[name] for name in names if name != "logits"}
        step = [int(results["logits"][0, -1].argmax())]
        made += step
    return made


if __name__ == "__main__":
    folder, prompt = Path(sys.argv[1]), sys.argv[2]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = json.loads((folder / "genai_config.json").read_text())["model"]["eos_token_id"]
    model = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    ends = set(end if isinstance(end, list) else [end])
    print(prompt + tokenizer.decode(generate(model, tokenizer.encode(prompt).ids, ends, count=40)))
