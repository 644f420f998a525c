"""Ways to divide the Hopper kernel's work, measured: where the rows of ``codegen/gluon/tiles.py`` come from.

python -m benchmarks.kernel_tiles results.json [--lengths 2048,16384] [--rounds 5]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import statistics
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from attncompile.codegen import gluon
from attncompile.codegen.triton import load
from attncompile.kernels.hopper import HopperTile
from benchmarks.kernels import Work, graphed, sdpa, tensors_of
from benchmarks.kernels_smoke import milliseconds

TWO = HopperTile(2, 128, 2, 2, True, 240, 168, True)
THREE = HopperTile(3, 128, 2, 2, True, 160, 128, True)
FORMS = {
    64: {"3": THREE, "2": dataclasses.replace(TWO, stages=3)},
    128: {"2": TWO},
}
CHANGES: dict[str, dict[str, Any]] = {
    "": {},
    " early": {"early": True},
    " no turns": {"turns": False},
    " early no turns": {"early": True, "turns": False},
}


def variants(channels: int) -> dict[str, HopperTile]:
    """Tiles to compare, by a short name: warpgroups and what is changed."""
    return {
        name + change: dataclasses.replace(tile, **fields)
        for name, tile in FORMS[channels].items()
        for change, fields in CHANGES.items()
    }


def works(lengths: list[int]) -> list[Work]:
    """Dense and causal rows of 16384 tokens and 2048 channels."""
    return [
        Work(f"d{d}-n{n}-{kind}", max(1, 16384 // n), 2048 // d, 2048 // d, n, d, kind, ())
        for d in FORMS
        for n in lengths
        for kind in ("full", "causal")
    ]


def _warm(job: tuple[Work, HopperTile]) -> None:
    work, tile = job
    small = dataclasses.replace(work, batch=1, length=256)
    load(gluon.generate(small.spec(), tile))(*tensors_of(small))
    torch.cuda.synchronize()


def main() -> None:
    """Compile in many processes, measure interleaved, print TF/s and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path)
    parser.add_argument("--lengths", default="2048,16384")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=12)
    options = parser.parse_args()
    rows = works([int(length) for length in options.lengths.split(",")])
    jobs = {
        (work.spec().fingerprint(), name): (work, tile)
        for work in rows
        for name, tile in variants(work.channels).items()
    }
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.processes, context) as pool:
        list(pool.map(_warm, jobs.values()))
    report = []
    for work in rows:
        tensors = tensors_of(work)
        running = {"cudnn": sdpa(SDPBackend.CUDNN_ATTENTION)(work, tensors)}
        for name, tile in variants(work.channels).items():
            attend = load(gluon.generate(work.spec(), tile))
            running[name] = lambda attend=attend, tensors=tensors: attend(*tensors)
        for run in running.values():
            run()
        times: dict[str, list[float]] = {name: [] for name in running}
        repeats = max(1, int(12 / milliseconds(running["cudnn"], 3)))
        running = {name: graphed(run, repeats) for name, run in running.items()}
        for number in range(options.rounds + 1):
            for name, run in running.items():
                once = milliseconds(run, 1) / repeats
                times[name] += [once] if number else []
        flops = work.spec().flops({"B": work.batch, "I": work.length}) * work.visible()
        found = {name: flops / statistics.median(each) / 1e9 for name, each in times.items()}
        report.append({**dataclasses.asdict(work), "tflops": found})
        print(work.name, {name: round(rate) for name, rate in found.items()}, flush=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
