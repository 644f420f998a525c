"""Ways to divide the Hopper kernel's work, measured: where the rows of ``codegen/gluon/tiles.py`` come from.

    python -m benchmarks.kernel_tiles results.json [--lengths 2048,16384] [--rounds 5]
    python -m benchmarks.kernel_tiles results.json --lengths 16384 --channels 128 --kinds causal,sinks,documents,softcap

``table`` is what the generator chooses by itself. Beside dense and causal work stand the kinds of
:class:`benchmarks.kernels.Work`, to see whether what a tile gains there it gains for other scores and masks too.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from attncompile.codegen import gluon
from attncompile.codegen.triton import load
from attncompile.kernels.hopper import HopperTile
from benchmarks.kernels import Work, sdpa, tensors_of
from benchmarks.report import Report, add_processes, arguments, parse, shown
from benchmarks.timing import graphed, interleaved, repeats_of, summary

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
    " settled": {"settled": True},
    " chains": {"chains": True},
    " settled chains": {"settled": True, "chains": True},
}


def variants(channels: int) -> dict[str, HopperTile | None]:
    """Tiles to compare, by a short name: warpgroups and what is changed; the generator's own choice is ``None``."""
    return {"table": None} | {
        name + change: dataclasses.replace(tile, **fields)
        for name, tile in FORMS[channels].items()
        for change, fields in CHANGES.items()
    }


def works(channels: list[int], lengths: list[int], kinds: list[str]) -> list[Work]:
    """Rows of 16384 tokens and 2048 channels."""
    return [
        Work(f"d{d}-n{n}-{kind}", max(1, 16384 // n), 2048 // d, 2048 // d, n, d, kind, ())
        for d in channels
        for n in lengths
        for kind in kinds
    ]


def _warm(job: tuple[Work, HopperTile | None]) -> None:
    work, tile = job
    small = dataclasses.replace(work, batch=1, length=256)
    load(gluon.generate(small.spec(), tile))(*tensors_of(small))
    torch.cuda.synchronize()


def main() -> None:
    """Compile in many processes, measure interleaved, print TF/s and write JSON."""
    parser = arguments(__doc__, rounds=5, rows=False)
    parser.add_argument("--lengths", default="2048,16384", help="numbers of tokens (default 2048,16384)")
    parser.add_argument("--channels", default="64,128", help="of a head (default 64,128)")
    parser.add_argument("--kinds", default="full,causal", help="scores and masks (default full,causal)")
    add_processes(parser, 12)
    options = parse(parser)
    channels, lengths = ([int(size) for size in given.split(",")] for given in (options.channels, options.lengths))
    rows = works(channels, lengths, options.kinds.split(","))
    jobs = {
        (work.spec().fingerprint(), name): (work, tile)
        for work in rows
        for name, tile in variants(work.channels).items()
    }
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.processes, context) as pool:
        list(pool.map(_warm, jobs.values()))
    report = Report(options.output, {"rounds": options.rounds})
    for work in rows:
        tensors = tensors_of(work)
        plain = work.kind in ("full", "causal")
        running = {"cudnn": sdpa(SDPBackend.CUDNN_ATTENTION)(work, tensors)} if plain else {}
        for name, tile in variants(work.channels).items():
            attend = load(gluon.generate(work.spec(), tile))
            running[name] = lambda attend=attend, tensors=tensors: attend(*tensors)
        for run in running.values():
            run()
        repeats = repeats_of(running["table"], 12, 50)
        ready = {name: graphed(run, repeats) for name, run in running.items()}
        flops = work.spec().flops({"B": work.batch, "I": work.length}) * work.visible()
        results = {}
        for name, times in interleaved(ready, options.rounds).items():
            found = summary(ready[name], times)
            results[name] = {**found, "tflops": flops / found["ms"] / 1e9}
        report.add({**dataclasses.asdict(work), "results": results})
        print(work.name, {name: shown(found, "{tflops:.0f}") for name, found in results.items()}, flush=True)


if __name__ == "__main__":
    main()
