"""What lifting costs beside the capture of the graph, and how both grow with the number of layers.

    python -m benchmarks.lifting_cost results.json [--rounds N]

A small Llama (hidden size 64, 4 heads of which 2 hold keys and values, eager attention) of 4 to 64 layers is captured
by torch.export and by Dynamo, and every graph is lifted with its proofs and blocks. Times are medians of interleaved
rounds in one process with one thread; the exponent is the slope of log time over log layers (1 is linear). Peak memory
is that of a fresh process that captures and lifts once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from attncompile.frontends.aten import aten_graph
from attncompile.frontends.capture import Captured, capture_dynamo, capture_export
from attncompile.lift import lift_graph

LAYERS = (4, 8, 16, 32, 64)
CAPTURES = ("export", "dynamo")


def model_of(layers: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A random Llama and its inputs: two rows of 48 tokens, the second padded."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        use_cache=False,
        attn_implementation="eager",
    )
    mask = torch.ones(2, 48, dtype=torch.int64)
    mask[1, 40:] = 0
    return transformers.LlamaModel(config).eval(), {
        "input_ids": torch.randint(0, 300, (2, 48)),
        "attention_mask": mask,
    }


def captured(model: torch.nn.Module, inputs: dict[str, torch.Tensor], how: str) -> tuple[list[Captured], float]:
    """The graphs of a model, and the seconds that taking them took."""
    start = time.perf_counter()
    if how == "export":
        return [capture_export(model, (), inputs)], time.perf_counter() - start
    torch._dynamo.reset()
    graphs: list[Captured] = []

    def backend(graph_module: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(capture_dynamo(graph_module, example_inputs))
        return graph_module.forward

    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=True)(**inputs)
    return graphs, time.perf_counter() - start


def once(layers: int, how: str) -> tuple[float, float, int]:
    """Seconds of capture and of lifting, and the number of lifted sites."""
    model, inputs = model_of(layers)
    graphs, capture_time = captured(model, inputs, how)
    start = time.perf_counter()
    sites = [site for graph in graphs for site in lift_graph(aten_graph(graph)).sites]
    return capture_time, time.perf_counter() - start, sum(site.status == "lifted" for site in sites)


def peak_megabytes(layers: int, how: str) -> float:
    """Largest resident size of a fresh process that captures and lifts once, less that of one that only imports."""

    def of(code: str) -> float:
        ending = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        run = [sys.executable, "-c", f"from benchmarks.lifting_cost import once, captured, model_of; {code}; {ending}"]
        return float(subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()[-1]) / 1024

    return of(f"once({layers}, {how!r})") - of(f"captured(*model_of({layers}), {how!r})")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    times: dict[tuple[str, int], list[tuple[float, float]]] = {}
    found: dict[tuple[str, int], int] = {}
    once(2, "export"), once(2, "dynamo")
    for _ in range(options.rounds):
        for how in CAPTURES:
            for layers in LAYERS:
                capture_time, lift_time, sites = once(layers, how)
                times.setdefault((how, layers), []).append((capture_time, lift_time))
                found[how, layers] = sites
    rows = []
    for (how, layers), seconds in times.items():
        capture_time, lift_time = (statistics.median(column) for column in zip(*seconds, strict=True))
        rows.append(
            {
                "capture": how,
                "layers": layers,
                "lifted": found[how, layers],
                "capture_s": round(capture_time, 3),
                "lift_s": round(lift_time, 3),
                "share": round(lift_time / capture_time, 4),
            }
        )
        print(rows[-1], flush=True)
    growth = {}
    for how in CAPTURES:
        mine = [row for row in rows if row["capture"] == how]
        first, last = mine[0], mine[-1]
        span = math.log(LAYERS[-1] / LAYERS[0])
        growth[how] = {
            "capture_exponent": round(math.log(last["capture_s"] / first["capture_s"]) / span, 3),
            "lift_exponent": round(math.log(last["lift_s"] / first["lift_s"]) / span, 3),
        }
    result = {
        "date": datetime.date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": f"{platform.machine()}, one thread",
        "rounds": options.rounds,
        "rows": rows,
        "growth": growth,
        "lifting_adds_megabytes": {how: round(peak_megabytes(LAYERS[-1], how)) for how in CAPTURES},
        "peak_megabytes_here": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("growth", "lifting_adds_megabytes")}))


if __name__ == "__main__":
    main()
