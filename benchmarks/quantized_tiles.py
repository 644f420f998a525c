"""Ways to divide the Hopper kernel's work on operands of 8 bits, measured beside cuDNN's FP8 attention.

    python -m benchmarks.quantized_tiles benchmarks/results/quantized_tiles_h200.json [--rows d64] [--rounds 6]

Everybody runs on codes made beforehand: where the rows for codes in ``codegen/gluon/tiles.py`` come from.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
from typing import Any

import torch

from attncompile.codegen import gluon
from attncompile.codegen.gluon.generate import HopperModule
from attncompile.codegen.triton import load
from attncompile.codegen.triton.cache import load_module
from attncompile.kernels.hopper import HopperTile
from benchmarks.kernels import Run, Work, tensors_of
from benchmarks.narrow_peers import CudnnFp8
from benchmarks.quantized import WORKS, alone, rounded
from benchmarks.report import Report, add_processes, arguments, chosen, parse, shown
from benchmarks.timing import Timed, graphed, interleaved, repeats_of

TWO = HopperTile(2, 128, 3, 2, False, 240, 168, True)
THREE = HopperTile(3, 128, 3, 2, True, 160, 128, True, early=True)
TILES = {
    64: {"fp8 2": TWO, "fp8 3 early turns": THREE, "fp8 3 early": dataclasses.replace(THREE, turns=False)},
    128: {"fp8 2": TWO, "fp8 2 loaded": dataclasses.replace(TWO, loaded=True)},
}
"""By number of channels: warpgroups and what is changed."""


def tiles(work: Work) -> dict[str, HopperTile]:
    """Tiles to compare: what is multiplied, warpgroups and changes."""
    return {**TILES[work.channels], "fp8 2 ahead": dataclasses.replace(TWO, ahead=True), "int8 fp8 2": TWO}


def module(work: Work, name: str) -> HopperModule:
    """The module of a row with one of its tiles."""
    return gluon.generate(rounded(work.spec(), "int8 fp8" if name.startswith("int8") else "fp8"), tiles(work)[name])


def _warm(job: tuple[Work, str]) -> None:
    work, name = job
    small = dataclasses.replace(work, batch=1, length=256)
    load(module(work, name))(*tensors_of(small))
    torch.cuda.synchronize()


def measure(work: Work, rounds: int) -> dict[str, Any]:
    """TF/s of everybody."""
    tensors = tensors_of(work)
    runs: dict[str, Run] = {name: alone(load_module(module(work, name)), tensors) for name in tiles(work)}
    runs["cudnn fp8"] = CudnnFp8(tensors, work.scale, work.kind == "causal", 4.0, True)
    ready: dict[str, Timed] = {}
    for name, run in runs.items():
        run()
        ready[name] = graphed(run, repeats_of(run, 6, 50))
    flops = work.spec().flops({"B": work.batch, "I": work.length}) * work.visible()
    times = interleaved(ready, rounds)
    return {name: {"tflops": flops / torch.tensor(found).median().item() / 1e9} for name, found in times.items()}


def main() -> None:
    """Compile in many processes, measure, print TF/s and write JSON."""
    parser = arguments(__doc__, rounds=6)
    add_processes(parser, 14)
    options = parse(parser)
    works = chosen(WORKS, options.rows)
    jobs = {(work.channels, work.kind, name): (work, name) for work in works for name in tiles(work)}
    with concurrent.futures.ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_warm, jobs.values()))
    report = Report(options.output, {"rounds": options.rounds})
    for work in works:
        results = measure(work, options.rounds)
        report.add({**dataclasses.asdict(work), "results": results})
        print(work.name, {name: shown(found, "{tflops:.0f}") for name, found in results.items()}, flush=True)


if __name__ == "__main__":
    main()
