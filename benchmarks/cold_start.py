"""How long the first call of a kernel takes in a fresh process, with empty caches and with those of an earlier one.

    python -m benchmarks.cold_start benchmarks/results/cold_start_h200.json [--rows dense] [--profile]

Starting Python, importing and opening the device happen before and are stated by themselves, and so does what
:mod:`attncompile.codegen.triton.ready` finds out while the back end reads a model: Triton's hash of its own
installation, what talks to the driver, Gluon's import. What is timed is everything from a Spec's text to the result on
the device: passes, generating the module, compiling or reading the binary from the cache on disk, the launch. Each row
has a cache of its own, so that none profits from another; the processes get ready together and are then timed one after
the other. With ``--profile`` all run again under a profiler, for where the time goes. Targets: 3 s cold, 0.2 s warm for
each new kernel.
"""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

COLD, WARM = 3.0, 0.2
"""Seconds that a first call should take at most."""

LENGTH = 4096
BEGUN = "COLD_START_BEGUN"
"""Environment variable with the time at which a process was started."""


@dataclass(frozen=True)
class Start:
    """A row: a Spec and what is called first.

    Attributes:
        name: of the row.
        text: the Spec.
        shapes: of the inputs.
        part: ``operator`` is what a model calls; the others are modules of its gradients by query, key and value, in
            plain Triton (``backward``) and for Hopper GPUs (``hopper-backward``).
        passes: that change the Spec first.
    """

    name: str
    text: str
    shapes: tuple[tuple[int, ...], ...]
    part: Literal["operator", "backward", "hopper-backward"] = "operator"
    passes: str = ""


def _attend(name: str, score: str, mask: str, keys: str = "I", groups: int = 16, channels: int = 128) -> str:
    shared = f"\n  kv_head h // {16 // groups}" if groups < 16 else ""
    given = "\n  given  document[B,I]:int64" if "document" in mask else ""
    return (
        f"{name}   attend  q[B,16,I,{channels}]  k,v[B,{groups},{keys},{channels}]  bfloat16\n  score  {score}\n"
        f"  mask   {mask}{shared}\n  norm   softmax (float32){given}"
    )


SCALE = f"{128**-0.5!r}·s"
SELF = ((1, 16, LENGTH, 128),) * 3
CACHED = ((8, 16, 1, 128), (8, 4, LENGTH, 128), (8, 4, LENGTH, 128))
STARTS: tuple[Start, ...] = (
    Start("dense", _attend("dense", SCALE, "j ≤ i"), SELF),
    Start(
        "alibi-window", _attend("x", f"{SCALE} + exp2(−0.5·float(h + 1))·float(j − i)", "j ≤ i and j > i − 1024"), SELF
    ),
    Start(
        "alibi-64",
        _attend("x", "0.125·s + exp2(−0.5·float(h + 1))·float(j − i)", "j ≤ i", channels=64),
        ((1, 16, LENGTH, 64),) * 3,
    ),
    Start("documents", _attend("x", SCALE, "j ≤ i and document[b, j] = document[b, i]"), (*SELF, (1, LENGTH))),
    Start("fp8", _attend("dense", SCALE, "j ≤ i"), SELF, passes="quantize.fp8"),
    Start("decode", _attend("decode", SCALE, "j ≤ i + J − I", "J", 4), CACHED),
    Start("backward", _attend("dense", SCALE, "j ≤ i"), SELF, "backward"),
    Start("hopper-backward", _attend("dense", SCALE, "j ≤ i"), SELF, "hopper-backward"),
)


def first_call(start: Start, tensors: list[Any]) -> tuple[Callable[[], Any], float]:
    """What is called, and the seconds until it could be: reading the Spec and generating text."""
    from attncompile.codegen import gluon
    from attncompile.codegen.triton import lower
    from attncompile.codegen.triton.backward import generate_backward
    from attncompile.codegen.triton.cache import load_module
    from attncompile.ir import parse_spec
    from attncompile.passes import parse_passes, run_passes

    begun = time.perf_counter()
    spec = parse_spec(start.text)
    if start.passes:
        spec = run_passes(spec, parse_passes(start.passes)).spec
    if start.part == "operator":
        run = lower(spec, "cuda").run
        return (lambda: run(*tensors)), time.perf_counter() - begun
    on_hopper = start.part == "hopper-backward"
    module = load_module(gluon.generate_backward(spec) if on_hopper else generate_backward(spec, ("q", "k", "v")))
    given, out, lse, *inputs = tensors
    return (lambda: module.attend_backward(given, out, lse, *inputs)), time.perf_counter() - begun


def tensors_of(start: Start) -> list[Any]:
    """The inputs of the Spec, documents of 1024 tokens; before them, for gradients, the result's, a result and LSE."""
    import torch

    inputs = [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        if len(shape) == 4
        else torch.arange(shape[-1], device="cuda").div(1024, rounding_mode="floor").expand(shape).contiguous()
        for shape in start.shapes
    ]
    if start.part == "operator":
        return inputs
    out = torch.randn(start.shapes[0], device="cuda", dtype=torch.bfloat16)
    return [torch.randn_like(out), out, torch.zeros(out.shape[:3], device="cuda"), *inputs]


def watched(kernels: list[dict[str, Any]]) -> None:
    """Have Triton tell of each kernel how long its stages took, in seconds; ``cubin`` is ptxas."""
    from triton import knobs

    def listen(*, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        stages = {name: taken / 1e6 for name, taken in times.lowering_stages}
        own = {"ir_s": times.ir_initialization / 1e6, "store_s": times.store_results / 1e6}
        kernels.append({"kernel": src.fn.__name__, "read_from_cache": cache_hit, **own, "stages_s": stages})

    knobs.compilation.listener = listen


def inside(name: str, profiled: bool) -> None:
    """What a process of its own does: get ready, say so, wait for the word, make the first call, say how it went."""
    start = next(start for start in STARTS if start.name == name)
    python = time.time() - float(os.environ[BEGUN])
    begun = time.perf_counter()
    import torch
    import triton

    import attncompile.backend  # noqa: F401 - what a model that calls the operator has imported
    from attncompile.codegen.triton.ready import get_ready, wait_until_ready

    imports = time.perf_counter() - begun
    tensors = tensors_of(start)
    torch.cuda.synchronize()
    device = time.perf_counter() - begun - imports
    get_ready()  # the back end begins with it, and then takes longer to read the model than this takes
    wait_until_ready()
    ready = time.perf_counter() - begun - imports - device
    print(json.dumps({"python_s": python, "imports_s": imports, "device_s": device, "ready_s": ready}), flush=True)
    sys.stdin.readline()
    kernels: list[dict[str, Any]] = []
    profile = cProfile.Profile()
    if profiled:
        profile.enable()
    else:
        watched(kernels)
    started = time.perf_counter()
    triton.runtime.driver.active.get_current_device()
    driver = time.perf_counter() - started
    call, generation = first_call(start, tensors)
    called = time.perf_counter()
    call()
    torch.cuda.synchronize()
    ended = time.perf_counter()
    profile.disable()
    call()
    torch.cuda.synchronize()
    found = {
        "total_s": ended - started,
        "driver_s": driver,
        "until_callable_s": generation,
        "call_s": ended - called,
        "second_call_s": time.perf_counter() - ended,
        "kernels": kernels,
    }
    print(json.dumps({"profile": costly(profile)} if profiled else found), flush=True)


def costly(profile: cProfile.Profile, most: int = 25) -> list[dict[str, Any]]:
    """The functions in which, with what they call, most time went; the profiler itself slows calls down."""
    stats: Any = pstats.Stats(profile)
    rows = sorted(stats.stats.items(), key=lambda item: -item[1][3])[:most]
    return [
        {
            "function": f"{'/'.join(Path(file).parts[-3:])}:{line} {name}",
            "calls": calls,
            "own_s": own,
            "with_calls_s": total,
        }
        for (file, line, name), (calls, _, own, total, _) in rows
    ]


def phase(starts: tuple[Start, ...], caches: dict[str, Path], profiled: bool) -> dict[str, dict[str, Any]]:
    """Each row's first call in a fresh process: all get ready together, then one after the other is timed."""
    running = {}
    for start in starts:
        places = {"TRITON_CACHE_DIR": str(caches[start.name] / "triton"), "ATTNCOMPILE_CACHE": str(caches[start.name])}
        code = f"from benchmarks.cold_start import inside; inside({start.name!r}, {profiled})"
        running[start.name] = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **places, BEGUN: str(time.time())},
        )
    found: dict[str, dict[str, Any]] = {}
    for name, process in running.items():
        assert process.stdout is not None
        ready = process.stdout.readline()
        found[name] = json.loads(ready) if ready else {}
    for name, process in running.items():
        said, _ = process.communicate("go\n")
        last = said.strip().splitlines()[-1:] or ["{}"]
        found[name] |= (
            json.loads(last[0]) if process.returncode == 0 else {"failure": f"exit code {process.returncode}"}
        )
    return found


def main() -> None:
    """Time all, print a line for each row, write JSON."""
    from benchmarks.report import Report, arguments, chosen, parse

    parser = arguments(__doc__)
    parser.add_argument("--profile", action="store_true", help="run all again under a profiler")
    options = parse(parser)
    starts = chosen(STARTS, options.rows)
    report = Report(options.output, {"cores": os.cpu_count(), "target_cold_s": COLD, "target_warm_s": WARM})
    for profiled in (False, True)[: 1 + options.profile]:
        with tempfile.TemporaryDirectory() as folder:
            caches = {start.name: Path(folder) / start.name for start in starts}
            found = {when: phase(starts, caches, profiled) for when in ("cold", "warm")}
        for start in starts:
            row = {"name": start.name, "spec": start.text, "part": start.part, "profiled": profiled}
            report.add({**row, **{when: each[start.name] for when, each in found.items()}})
            for when, each in found.items():
                print(f"{start.name} {when}: {json.dumps(each[start.name])[:600]}", flush=True)


if __name__ == "__main__":
    main()
