"""How long a call of attention keeps the host busy: what a short kernel cannot hide.

    python -m benchmarks.host_time benchmarks/results/host_time_h200.json [--rounds 15]

Sizes are so small that the GPU is always done first. Every round calls each competitor a few hundred times in a row and
waits for the GPU only then; medians of the rounds are reported, in microseconds a call. ``operator`` is what a
compiled model calls, ``gluon`` and ``triton`` are the generated modules without it, ``sdpa`` is PyTorch's own choice of
back end.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.backward import through_operator
from benchmarks.kernels import Run, Work, flex, our_gluon, plain_triton, tensors_of
from benchmarks.report import Report, arguments, parse

CALLS = 200
WORKS = (
    Work("d128-n256-causal", 1, 16, 16, 256, 128, "causal", ("flex",)),
    Work("d64-n256-full", 1, 32, 32, 256, 64, "full", ("flex",)),
    Work("d128-n256-causal-32-8", 1, 32, 8, 256, 128, "causal", ("flex",)),
    Work("d128-n256-alibi", 1, 16, 16, 256, 128, "alibi", ("flex",)),
    Work("d128-n256-documents", 1, 16, 16, 256, 128, "documents", ("flex",)),
)


def by_sdpa(work: Work, tensors: list[torch.Tensor]) -> Run:
    """PyTorch's operator; which back end it takes is set outside."""
    causal, grouped = work.kind == "causal", work.heads != work.groups
    return lambda: scaled_dot_product_attention(*tensors[:3], is_causal=causal, enable_gqa=grouped)


Competitor = tuple[Callable[[Work, list[torch.Tensor]], Run], Callable[[], AbstractContextManager[Any]]]
OURS: dict[str, Competitor] = {
    "operator": (through_operator, nullcontext),
    "gluon": (our_gluon, nullcontext),
    "triton": (plain_triton, nullcontext),
}
PEERS: dict[str, Competitor] = {
    "sdpa": (by_sdpa, nullcontext),
    "cudnn": (by_sdpa, lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION)),
    "flash2": (by_sdpa, lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)),
    "flex": (flex, nullcontext),
}


def microseconds(run: Run) -> float:
    """Of host time that a call takes."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(CALLS):
        run()
    taken = time.perf_counter() - started
    torch.cuda.synchronize()
    return taken / CALLS * 1e6


def measure(work: Work, rounds: int) -> dict[str, Any]:
    """Interleaved medians of everybody at one row."""
    torch._dynamo.reset()
    tensors = tensors_of(work)
    names = [*OURS, *(("sdpa", "cudnn", "flash2") if work.kind in ("full", "causal") else ()), "flex"]
    row: dict[str, Any] = {**asdict(work), "results": {}}
    running = {}
    for name in names:
        make, context = (OURS | PEERS)[name]
        try:
            with context():
                run = make(work, tensors)
                for _ in range(20):
                    run()
            running[name] = run, context
        except Exception as error:
            row["results"][name] = {"failure": f"{type(error).__name__}: {error}"[:300]}
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, (run, context) in running.items():
            with context():
                times[name].append(microseconds(run))
    for name, found in times.items():
        median = statistics.median(found)
        row["results"][name] = {"host_us": median, "spread": (max(found) - min(found)) / median}
    return row


def main() -> None:
    """Measure, print a line for each row, write JSON after each."""
    options = parse(arguments(__doc__, rounds=15, rows=False))
    processor = platform.processor() or platform.machine()
    report = Report(options.output, {"processor": processor, "rounds": options.rounds, "calls": CALLS})
    with torch.no_grad():
        for work in WORKS:
            row = measure(work, options.rounds)
            report.add(row)
            shown = {n: f"{r['host_us']:.1f}" if "host_us" in r else r["failure"] for n, r in row["results"].items()}
            print(f"{work.name}: µs {shown}", flush=True)


if __name__ == "__main__":
    main()
