"""Prompts and steps of generation in onnxruntime-genai: our model beside others of the same checkpoint.

    python benchmarks/onnx_generation.py OUT.json ours=FOLDER builder=FOLDER plain=FOLDER

A folder holds a model and its ``genai_config.json``: ``attncompile convert`` writes one,
``python -m onnxruntime_genai.models.builder -m CHECKPOINT -o FOLDER -p fp32 -e cpu`` another. The models take turns,
round after round, each with one thread; what counts is the processor time of the process, which other programs on the
machine do not lengthen much. Prompts are the fastest of the rounds, steps the median. Greedy tokens are compared too.
Needs onnxruntime-genai alone.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

LENGTHS = (64, 512, 2048)
ROUNDS, STEPS = 3, 12


def single_threaded(og: Any, folder: Path, scratch: Path) -> Any:
    """The model of a folder with one thread, whatever its configuration says."""
    scratch.mkdir()
    for file in folder.iterdir():
        if file.name != "genai_config.json":
            (scratch / file.name).symlink_to(file.resolve())
    settings = json.loads((folder / "genai_config.json").read_text())
    settings["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 1
    (scratch / "genai_config.json").write_text(json.dumps(settings))
    return og.Model(str(scratch))


def generated(og: Any, model: Any, ids: np.ndarray) -> tuple[float, list[float], list[int]]:
    """Seconds of the prompt, seconds of each step, and the tokens."""
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=len(ids) + STEPS + 2, do_sample=False)
    generator = og.Generator(model, settings)
    start = time.process_time()
    generator.append_tokens(ids)
    generator.generate_next_token()
    prompt, steps = time.process_time() - start, []
    while len(steps) < STEPS and not generator.is_done():
        start = time.process_time()
        generator.generate_next_token()
        steps.append(time.process_time() - start)
    return prompt, steps, [int(token) for token in generator.get_sequence(0)[len(ids) :]]


def measure(og: Any, models: Mapping[str, Any], length: int) -> dict[str, Any]:
    """One length with every model in turn."""
    ids = (np.arange(length) * 7919 % 40_000 + 100).astype(np.int32)
    prompts: dict[str, list[float]] = {name: [] for name in models}
    steps: dict[str, list[float]] = {name: [] for name in models}
    tokens: dict[str, list[int]] = {}
    for number in range(ROUNDS):
        for name in sorted(models, reverse=bool(number % 2)):
            prompt, found, tokens[name] = generated(og, models[name], ids)
            prompts[name].append(prompt)
            steps[name] += found
    return {
        "prompt": length,
        "prompt_ms": {name: round(1e3 * min(times), 1) for name, times in prompts.items()},
        "step_ms": {name: round(1e3 * statistics.median(times), 1) for name, times in steps.items()},
        "same_tokens": len({tuple(found) for found in tokens.values()}) == 1,
    }


def main(out: Path, folders: Mapping[str, Path]) -> None:
    """Measure every length and write the results."""
    import onnxruntime_genai as og

    with tempfile.TemporaryDirectory() as scratch:
        models = {name: single_threaded(og, folder, Path(scratch) / name) for name, folder in folders.items()}
        rows = []
        for length in LENGTHS:
            rows.append(measure(og, models, length))
            print(rows[-1], flush=True)
    out.write_text(json.dumps({"onnxruntime-genai": og.__version__, "threads": 1, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit("usage: python benchmarks/onnx_generation.py OUT.json NAME=FOLDER …")
    main(Path(sys.argv[1]), {name: Path(folder) for name, _, folder in (word.partition("=") for word in sys.argv[2:])})
