"""Generated Triton kernels on a real GPU: the correctness table, then times beside PyTorch's own attention.

    python -m benchmarks.kernels_smoke results.json [--skip-table] [--quick]

Every row of the kernel tests runs in float16, bfloat16 and float32 and is compared with the reference in
float64. Only
when all pass are times taken: medians of interleaved rounds, each round running every competitor once, so
that a card's clock treats all alike. FLOPs count visible pairs only, for all competitors alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attncompile.codegen.triton import generate, load
from attncompile.codegen.triton.structure import why_not_spec
from attncompile.ir import Spec, parse_spec
from attncompile.ir.blocks import density
from tests.kernels.cases import ALL_CASES
from tests.kernels.comparison import compare

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDS = 15
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


@dataclass(frozen=True)
class Timing:
    """One shape to time.

    Attributes:
        name: of the row.
        batch, heads, groups, length, channels: sizes.
        mask: visible keys; ``score``: the score.
        peers: SDPA back ends that compute the same thing.
        tokens: whether a padding mask ``attention_mask[b, j]`` is part of it.
    """

    name: str
    batch: int
    heads: int
    groups: int
    length: int
    channels: int
    mask: str = "true"
    score: str = ""
    peers: tuple[str, ...] = ("cudnn", "flash")
    tokens: bool = False

    def spec(self) -> Spec:
        """The Spec."""
        shared = self.heads // self.groups
        score = self.score or f"{self.channels**-0.5!r}·s"
        lines = [
            f"{self.name}   attend  q[B,{self.heads},I,{self.channels}]  "
            f"k,v[B,{self.groups},I,{self.channels}]  bfloat16",
            f"  score  {score}",
            f"  mask   {self.mask}",
            *([f"  kv_head h // {shared}"] if shared > 1 else []),
            "  norm   softmax (float32)",
            *(["  given  attention_mask[B,I]:int64"] if self.tokens else []),
        ]
        return parse_spec("\n".join(lines))


CAUSAL = "j ≤ i"
WINDOW = "j ≤ i and j > i − 1024"
TIMINGS: tuple[Timing, ...] = (
    Timing("d128-n2048-full", 8, 16, 16, 2048, 128),
    Timing("d128-n2048-causal", 8, 16, 16, 2048, 128, CAUSAL),
    Timing("d128-n16384-full", 1, 16, 16, 16384, 128),
    Timing("d128-n16384-causal", 1, 16, 16, 16384, 128, CAUSAL),
    Timing("d64-n2048-full", 8, 32, 32, 2048, 64),
    Timing("d64-n2048-causal", 8, 32, 32, 2048, 64, CAUSAL),
    Timing("d64-n16384-causal", 1, 32, 32, 16384, 64, CAUSAL),
    Timing("gqa-d128-n8192-causal", 1, 32, 8, 8192, 128, CAUSAL),
    Timing("window-1024-d128-n16384", 1, 16, 16, 16384, 128, WINDOW, peers=()),
    Timing(
        "sink-window-1024-d128-n16384", 1, 16, 16, 16384, 128, "j ≤ i and (j > i − 1024 or j < 4)", peers=()
    ),
    Timing("softcap-d128-n16384-causal", 1, 16, 16, 16384, 128, CAUSAL, "30.0·tanh(0.00295·s)", peers=()),
    Timing("padding-d64-n512", 16, 12, 12, 512, 64, "attention_mask[b, j] ≠ 0", tokens=True, peers=()),
)


def correctness() -> list[dict[str, Any]]:
    """Every row of the table in every dtype."""
    rows = []
    for case in ALL_CASES:
        reason = why_not_spec(case.spec)
        if reason:
            rows.append({"case": case.name, "refused": reason})
            continue
        for dtype in DTYPES:
            row: dict[str, Any] = {"case": case.name, "dtype": str(dtype)}
            try:
                outcomes = compare(case, load(generate(case.spec)), dtype, "cuda")
                row["outputs"] = [asdict(outcome) for outcome in outcomes]
                row["passed"] = all(outcome.passed for outcome in outcomes)
            except Exception:
                row |= {"passed": False, "failure": traceback.format_exc(limit=-4)}
            rows.append(row)
            if not row["passed"]:
                print("FAILED", json.dumps(row), file=sys.stderr, flush=True)
    return rows


def competitors(timing: Timing) -> dict[str, Callable[[], Any]]:
    """The generated kernel and its peers, on the same inputs."""
    spec = timing.spec()
    shape = (timing.batch, timing.length, timing.channels)
    query, key, value = (
        torch.randn(shape[0], shape[1], heads, shape[2], device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for heads in (timing.heads, timing.groups, timing.groups)
    )
    inputs: list[torch.Tensor] = [query, key, value]
    if timing.tokens:
        lengths = torch.linspace(timing.length // 2, timing.length, timing.batch, device="cuda")
        inputs.append((torch.arange(timing.length, device="cuda")[None] < lengths[:, None]).long())
    attend = load(generate(spec))
    found: dict[str, Callable[[], Any]] = {"generated": lambda: attend(*inputs)}

    def peer(backend: SDPBackend) -> Callable[[], Any]:
        def run() -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    query,
                    key,
                    value,
                    is_causal=timing.mask == CAUSAL,
                    enable_gqa=timing.heads != timing.groups,
                )

        return run

    for name in timing.peers:
        found[f"sdpa {name}"] = peer(BACKENDS[name])
    return found


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """Time of one call, by events around several."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / repeats


def measure(timing: Timing, rounds: int) -> dict[str, Any]:
    """Interleaved medians of all competitors at one shape."""
    row: dict[str, Any] = {**asdict(timing), "results": {}}
    running: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, run in competitors(timing).items():
        try:
            started = time.perf_counter()
            run()
            torch.cuda.synchronize()
            first = time.perf_counter() - started
            once = milliseconds(run, 2)
            running[name] = (run, max(1, min(50, int(20 / max(once, 1e-3)))))
            row["results"][name] = {"first_call_s": first}
        except Exception as error:
            row["results"][name] = {"failure": str(error)[:300]}
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, (run, repeats) in running.items():
            times[name].append(milliseconds(run, repeats))
    spec = timing.spec()
    attend = spec.attend()
    assert attend is not None
    share = density(attend.mask, timing.length, timing.length)
    flops = spec.flops({"B": timing.batch, "I": timing.length}) * share
    for name, found in times.items():
        median = statistics.median(found)
        row["results"][name] |= {"ms": median, "min_ms": min(found), "tflops": flops / median / 1e9}
    return row


def main() -> None:
    """Run the table, then the timings; write JSON; exit with 1 when a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--skip-table", action="store_true", help="take times without the correctness table")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU; torch.cuda.is_available() is false")
    import triton

    torch.manual_seed(0)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if not options.skip_table:
        report["table"] = correctness()
    failed = [row for row in report.get("table", []) if row.get("passed") is False]
    report["failed"] = len(failed)
    options.output.write_text(json.dumps(report, indent=1), encoding="utf-8")
    if not failed:
        report["times"] = []
        for timing in TIMINGS:
            row = measure(timing, 3 if options.quick else ROUNDS)
            report["times"].append(row)
            options.output.write_text(json.dumps(report, indent=1), encoding="utf-8")
            shown = {
                name: round(r["tflops"]) if "tflops" in r else "failed" for name, r in row["results"].items()
            }
            print(f"{timing.name}: TF/s {shown}", flush=True)
    print(f"{len(report.get('table', []))} rows, {len(failed)} failed; written to {options.output}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
