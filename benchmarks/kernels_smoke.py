"""Generated Triton kernels on a real GPU: the correctness table, then times beside PyTorch's own attention.

    python -m benchmarks.kernels_smoke results.json [--skip-table] [--rounds 3]

Every row of the kernel tests runs in float16, bfloat16 and float32 and is compared with the reference in
float64. Only when all pass are times taken: medians of interleaved rounds of calls, each round running every
competitor once, so that a card's clock treats all alike. FLOPs count visible pairs only, for all competitors alike.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attncompile.codegen.triton import generate, load
from attncompile.codegen.triton.structure import why_not_spec
from attncompile.ir import Spec, parse_spec
from attncompile.ir.blocks import density
from benchmarks.report import Report, arguments, parse, shown
from benchmarks.timing import Timed, called, interleaved, repeats_of, summary
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


def measure(timing: Timing, rounds: int) -> dict[str, Any]:
    """Interleaved medians of all competitors at one shape."""
    row: dict[str, Any] = {**asdict(timing), "results": {}}
    running: dict[str, Timed] = {}
    for name, run in competitors(timing).items():
        try:
            started = time.perf_counter()
            run()
            torch.cuda.synchronize()
            first = time.perf_counter() - started
            running[name] = called(run, repeats_of(run, 20, 50))
            row["results"][name] = {"first_call_s": first}
        except Exception as error:
            row["results"][name] = {"failure": str(error)[:300]}
    spec = timing.spec()
    attend = spec.attend()
    assert attend is not None
    share = density(attend.mask, timing.length, timing.length)
    flops = spec.flops({"B": timing.batch, "I": timing.length}) * share
    for name, times in interleaved(running, rounds).items():
        found = summary(running[name], times)
        row["results"][name] |= {**found, "tflops": flops / found["ms"] / 1e9}
    return row


def main() -> None:
    """Run the table, then the timings; write JSON; exit with 1 when a row failed."""
    parser = arguments(__doc__, rounds=ROUNDS, rows=False)
    parser.add_argument("--skip-table", action="store_true", help="take times without the correctness table")
    options = parse(parser)
    table = [] if options.skip_table else correctness()
    failed = [row for row in table if row.get("passed") is False]
    report = Report(options.output, {"rounds": options.rounds, "table": table, "failed": len(failed)})
    for timing in () if failed else TIMINGS:
        row = measure(timing, options.rounds)
        report.add(row)
        rates = {name: shown(result, "{tflops:.0f}") for name, result in row["results"].items()}
        print(f"{timing.name}: TF/s {rates}", flush=True)
    print(f"{len(table)} rows, {len(failed)} failed; written to {options.output}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
