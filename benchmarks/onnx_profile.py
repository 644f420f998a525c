"""Where ONNX Runtime's CPU spends a prompt and a step of language models with a cache, by operator.

    python -m benchmarks.onnx_profile OUT.json ours=FOLDER builder=FOLDER --tokens 2048

Folders are those of `onnx_generation.py`. Models take turns on one thread, prompt and step behind it, and what ONNX
Runtime's own profiler says of each node is summed by operator; of several rounds the one of least time counts. In the
same turns run two yardsticks: the product of hidden states and weights at the rate that ONNX Runtime's `MatMul` reaches
with the prompt's rows, and the reading of as many bytes as the weights have, which no step can do without.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from benchmarks.onnx_operators import device

ROUNDS = 3
INNER, OUTER = 576, 1536
"""Channels of SmolLM2's states, and inside its feed-forward network: the shape of the yardstick's product."""

CHANNELS = 64
"""Of SmolLM2's heads, where a model does not say."""

READ_MIB = 512
"""What the reading yardstick reads: far beyond every cache."""


def profiled(folder: Path, scratch: Path) -> onnxruntime.InferenceSession:
    """The model of a folder on one thread, with its nodes timed."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling, options.profile_file_prefix = True, str(scratch / "profile")
    return onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def feeds(session: onnxruntime.InferenceSession, tokens: int, past: int, filled: Mapping[str, Any]) -> dict[str, Any]:
    """A call of so many new tokens behind so many cached ones; what is cached comes from an earlier call."""
    found: dict[str, Any] = {}
    for entry in session.get_inputs():
        if entry.name == "input_ids":
            found[entry.name] = (np.arange(tokens)[None] * 7919 % 40_000 + 100).astype(np.int64)
        elif entry.name == "attention_mask":
            found[entry.name] = np.ones((1, past + tokens), dtype=np.int64)
        elif entry.name == "position_ids":
            found[entry.name] = np.arange(past, past + tokens)[None]
        else:
            room = past + tokens + 1 if entry.shape[2] == "capacity" else 0  # one buffer for past and present
            channels = entry.shape[3] if isinstance(entry.shape[3], int) else CHANNELS
            empty = np.zeros((1, entry.shape[1], room, channels), dtype=np.float32)
            found[entry.name] = filled.get(entry.name.replace("past_key_values", "present"), empty)
    return found


def by_operator(profile: Path) -> list[dict[str, float]]:
    """Milliseconds of each run by operator, in the order of the runs."""
    runs: list[Counter[str]] = []
    events = [event for event in json.loads(profile.read_text()) if event.get("ph") == "X"]
    starts = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event["name"] == "model_run")
    for start, end in starts:
        inside = (e for e in events if e.get("cat") == "Node" and start <= e["ts"] <= end)
        times: Counter[str] = Counter()
        for event in inside:
            if event["name"].endswith("_kernel_time") and event["args"]["op_name"] not in ("If", "Loop", "Scan"):
                times[event["args"]["op_name"]] += event["dur"] / 1e3
        runs.append(times)
    return [dict(times) for times in runs]


def product_rate(tokens: int) -> float:
    """GFLOP/s of ONNX Runtime's `MatMul` on the states of a prompt and a weight, one thread."""
    weight = numpy_helper.from_array(np.ones((INNER, OUTER), dtype=np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [tokens, INNER])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [tokens, OUTER])],
        [weight],
    )
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    states = np.random.default_rng(0).standard_normal((tokens, INNER)).astype(np.float32)
    seconds = _fastest(lambda: session.run(None, {"x": states}))
    return 2 * tokens * INNER * OUTER / seconds / 1e9


def reading_rate() -> float:
    """GB/s at which one thread reads floats that no cache holds, on pages of the size that weights lie on.

    numpy asks the system for large ones, and ONNX Runtime does not.
    """
    floats = np.frombuffer(mmap.mmap(-1, READ_MIB << 20), dtype=np.float32)
    floats[:] = 1.0
    return floats.nbytes / _fastest(floats.max) / 1e9


def _fastest(call: Callable[[], object]) -> float:
    call()
    found = []
    for _ in range(ROUNDS + 2):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


def measure(folders: Mapping[str, Path], tokens: int) -> dict[str, Any]:
    """Milliseconds of prompt and step by operator, and the yardsticks."""
    rates: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        sessions = {name: profiled(folder, Path(scratch)) for name, folder in folders.items()}
        for _ in range(ROUNDS):
            rates.append((product_rate(tokens), reading_rate()))
            for session in sessions.values():
                names = [entry.name for entry in session.get_outputs()]
                cached = dict(zip(names, session.run(None, feeds(session, tokens, 0, {})), strict=True))
                session.run(None, feeds(session, 1, tokens, cached))
        profiles = {name: by_operator(Path(session.end_profiling())) for name, session in sessions.items()}
    least: dict[str, Any] = {}
    for name, runs in profiles.items():
        forms = {"prompt": runs[0::2], "step": runs[1::2]}
        best = {form: min(found, key=lambda times: sum(times.values())) for form, found in forms.items()}
        least[name] = {
            form: {"sum": round(sum(times.values()), 2)}
            | {operator: round(ms, 2) for operator, ms in sorted(times.items(), key=lambda one: -one[1])[:8]}
            for form, times in best.items()
        }
    return {
        "tokens": tokens,
        "milliseconds": least,
        "product_gflops": round(max(rate for rate, _ in rates), 1),
        "reading_gb_s": round(max(rate for _, rate in rates), 1),
        "weight_bytes": {
            name: sum(file.stat().st_size for file in folder.glob("model.onnx*")) for name, folder in folders.items()
        },
    }


def main(out: Path, folders: Mapping[str, Path], lengths: list[int]) -> None:
    """Measure each length and write the results."""
    record = {
        "device": device(),
        "onnxruntime": onnxruntime.__version__,
        "threads": 1,
        "load_average": list(os.getloadavg()),
        "rows": [measure(folders, tokens) for tokens in lengths],
    }
    out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT.json", help="where the results go")
    parser.add_argument("folders", nargs="+", metavar="NAME=FOLDER", help="models that take turns")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], metavar="N", help="tokens of the prompts")
    chosen = parser.parse_args()
    named = {name: Path(folder) for name, _, folder in (word.partition("=") for word in chosen.folders)}
    main(chosen.out, named, chosen.tokens)
