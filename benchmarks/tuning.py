"""What tuning finds beside the tables of tiles, by kind of work.

    python -m benchmarks.tuning benchmarks/results/tuning_h200.json [--rows causal] [--seconds 20]

Each row is a Spec with tensors, tuned in an empty cache folder (`attncompile.tuning`): milliseconds as the tables say
and as tuned, by the clock of tuning, which times the finalists in turns. What is tuned and what is not is compared in
its result before.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import attncompile
from attncompile.ir import Spec, parse_spec
from attncompile.kernels import operators
from benchmarks import kernels
from benchmarks.report import Report, arguments, chosen, parse


@dataclass(frozen=True)
class Work:
    """A Spec and its tensors.

    Attributes:
        name: of the row.
        spec: what is computed.
        tensors: makes its inputs in order.
    """

    name: str
    spec: Spec
    tensors: Callable[[], list[torch.Tensor]]


def _decode(heads: int, groups: int, channels: int, batch: int, length: int) -> Work:
    text = (
        f"work   attend  q[B,{heads},I,{channels}]  k,v[B,{groups},J,{channels}]  bfloat16\n"
        f"  score  {channels**-0.5!r}·s\n  mask   j ≤ i + J − I\n"
        f"  kv_head h // {heads // groups}\n  norm   softmax (float32)"
    )

    def tensors() -> list[torch.Tensor]:
        shapes = ((batch, heads, 1), (batch, groups, length), (batch, groups, length))
        return [torch.randn(*shape, channels, device="cuda", dtype=torch.bfloat16) for shape in shapes]

    return Work(f"decode-b{batch}-h{heads}-{groups}-d{channels}-{length}", parse_spec(text), tensors)


def _dense(work: kernels.Work) -> Work:
    return Work(work.name, work.spec(), lambda: kernels.tensors_of(work))


_DENSE = (
    "d64-n1024-causal", "d64-n4096-full", "d128-n2048-causal", "d128-n4096-full", "d128-n16384-window",
    "d128-n16384-softcap", "d64-n4096-bias",
)  # fmt: skip
_NARROW = tuple(
    kernels.Work(f"d{channels}-n4096-causal", 4, 16, 16, 4096, channels, "causal", ()) for channels in (80, 96, 256)
)
WORKS = (
    *(_dense(work) for work in (*kernels.WORKS, *_NARROW) if work.name in _DENSE or work in _NARROW),
    _decode(32, 8, 128, 1, 8192),
    _decode(32, 8, 64, 8, 2048),
    _decode(16, 16, 128, 4, 32768),
)


def main() -> None:
    """Tune the rows, write what was found."""
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of tuning for each row (default 20)")
    options = parse(parser)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ATTNCOMPILE_CACHE"] = folder
        report = Report(options.output, {"seconds": options.seconds})
        for work in chosen(WORKS, options.rows):
            inputs = work.tensors()
            start = time.perf_counter()
            # a Spec takes a third of what a session has
            with attncompile.tuning(3 * options.seconds, progress=False) as session, torch.no_grad():
                operators.run(work.spec, *inputs)
            print(f"{work.name}: {session}", flush=True)
            report.add(
                *(
                    {
                        "name": work.name,
                        "bucket": found.bucket,
                        "choice": found.choice.describe(),
                        "ms": found.choice.milliseconds,
                        "untuned_ms": found.choice.instead,
                        "timed": found.timed,
                        "refused": found.refused,
                        "untried": found.untried,
                        "seconds": time.perf_counter() - start,
                    }
                    for found in session.found
                )
            )


if __name__ == "__main__":
    main()
