"""Processor time of compiling with ``backend="attncompile"`` beside Dynamo alone and beside Inductor, on a CPU.

    python -m benchmarks.compile_time results.json [--layers N] [--rounds N] [--before CHECKOUT]

A Llama of 16 layers with SDPA, small in every other way, which has as many nodes in its graph as a large one: a prompt
with dynamic shapes, and a decoding step over a static cache with fixed ones. Wall time says little on a machine that
others use, and nothing here waits for a GPU; so what is measured is the processor time of a first call, and beside it
that of the C++ compilers it starts. Every measurement is in a process of its own, without caches, after a model of one
layer has been compiled; contenders take turns, and the median of the rounds counts. With ``--before`` the package of
another checkout takes part.

What is ours alone is the difference between ``attncompile, eager`` and ``dynamo``: neither compiles anything behind.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTENDERS = ("dynamo", "attncompile, eager", "inductor", "attncompile")
PHASES = ("prefill", "decode")
CONTEXT, LENGTH = 64, 32
ROOT = Path(__file__).parents[1]


def backend_of(contender: str) -> Any:
    """What torch.compile takes for it."""
    if contender == "inductor":
        return contender
    if contender == "dynamo":
        return lambda graph_module, inputs: graph_module.forward
    from attncompile.backend import attncompile

    rest = "eager" if contender.endswith("eager") else "inductor"
    return lambda graph_module, inputs: attncompile(graph_module, inputs, options={"rest": rest})


def call_of(phase: str, contender: str, layers: int) -> Callable[[], Any]:
    """One call of a compiled model, with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=256, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    dynamic = phase == "prefill"
    if phase == "prefill":
        base, tokens = model.get_decoder(), torch.randint(0, 300, (1, LENGTH))
        read = torch.compile(
            lambda tokens: base(tokens, use_cache=False)[0], backend=backend_of(contender), dynamic=dynamic
        )
        return lambda: read(tokens)
    cache = transformers.StaticCache(config, max_cache_len=CONTEXT)
    cache.early_initialization(1, 2, 32, torch.float32, torch.device("cpu"))
    for layer in cache.layers:
        layer.cumulative_length.fill_(CONTEXT - 1)

    def step(tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        return model(tokens, past_key_values=cache, use_cache=True).logits  # type: ignore[no-any-return]

    run = torch.compile(step, backend=backend_of(contender), dynamic=dynamic)
    return lambda: run(torch.full((1, 1), 17), cache)


def inside(phase: str, contender: str, layers: int) -> dict[str, float]:
    """Processor seconds of a first call in this process, and of the processes that it starts."""
    import torch

    torch.set_num_threads(1)
    spent: list[tuple[float, float]] = []
    for count in (1, layers):
        torch._dynamo.reset()
        call = call_of(phase, contender, count)
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        begun = time.process_time()
        with torch.no_grad():
            call()
        own = time.process_time() - begun
        spent.append((own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - children))
    own, children = spent[-1]
    return {"own_s": round(own, 2), "compilers_s": round(children, 2)}


def measured(phase: str, contender: str, layers: int, checkout: Path) -> dict[str, float]:
    """The same in a process that imports the package of a checkout."""
    environment = {
        **os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-P", __file__, "-", "--inside", phase, contender, "--layers", str(layers)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=checkout, check=False)
    if done.returncode:
        raise RuntimeError(f"{contender} failed in {checkout}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def commit_of(checkout: Path) -> str:
    """The commit of a checkout."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    asked = subprocess.run(command, capture_output=True, text=True, cwd=checkout, check=False)
    return asked.stdout.strip()


def rows_of(layers: int, rounds: int, before: Path | None) -> list[dict[str, Any]]:
    """The medians of every phase and contender."""
    turns = [(name, name, ROOT) for name in CONTENDERS]
    if before is not None:
        turns += [(f"{name}, before", name, before) for name in CONTENDERS if name.startswith("attncompile")]
    rows = []
    for phase in PHASES:
        found: dict[str, list[dict[str, float]]] = {shown: [] for shown, _, _ in turns}
        for turn in range(rounds):
            for shown, contender, checkout in turns if turn % 2 == 0 else turns[::-1]:
                found[shown].append(measured(phase, contender, layers, checkout))
                print(phase, shown, found[shown][-1], flush=True)
        for shown, seconds in found.items():
            medians = {name: statistics.median(one[name] for one in seconds) for name in ("own_s", "compilers_s")}
            every = [one["own_s"] for one in seconds]
            rows.append({"phase": phase, "contender": shown, **medians, "own_s_of_rounds": every})
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", type=Path, help="another checkout of this repository")
    parser.add_argument("--inside", nargs=2, metavar=("PHASE", "CONTENDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside:
        print(json.dumps(inside(*options.inside, options.layers)))
        return
    import torch
    import transformers

    rows = rows_of(options.layers, options.rounds, options.before and options.before.resolve())
    result = {
        "date": datetime.date.today().isoformat(),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread, others at work beside it",
        "layers": options.layers,
        "rounds": options.rounds,
        "commit": commit_of(ROOT),
        "before": commit_of(options.before) if options.before else None,
        "rows": rows,
    }  # fmt: skip
    options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
