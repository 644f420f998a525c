"""What listing key blocks and dealing tiles out costs, before a Hopper kernel whose mask loads tensors.

    python -m benchmarks.mask_lists results.json [--lengths 4096,16384,65536] [--rounds 9]

Microseconds in CUDA graphs, causal attention inside documents: ``call`` makes its lists, ``lists given`` has those of a
call before, ``lists`` makes them alone, by two kernels: ``mark`` lists the blocks of each tile, ``deal`` deals the
tiles out. Beside what is generated stand other ways to divide both: ``mark 64 8`` looks at 64 blocks together in 8
warps, ``deal 8 128 4`` orders 8 tiles in a program and compares them with 128 together, in 4 warps.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import triton

from attncompile.codegen import gluon
from attncompile.codegen.triton.cache import load_module
from benchmarks.kernels import Run, Work, tensors_of
from benchmarks.report import Report, arguments, parse
from benchmarks.timing import graphed, interleaved, repeats_of, summary

HEADS, CHANNELS = 16, 128
MARKS = ((16, 1), (16, 4), (16, 8), (32, 4), (32, 8), (64, 8), (64, 16), (128, 8), (128, 16))
"""Blocks that are looked at together, and warps."""
DEALS = ((8, 1024, 4), (8, 128, 4), (8, 256, 1), (4, 1024, 4), (4, 128, 1), (1, 256, 1), (16, 1024, 8))
"""Tiles of a program, those that they are compared with together, and warps."""


def parts(module: ModuleType, tensors: list[torch.Tensor]) -> dict[str, Run]:
    """Calls of the generated module and of its two small kernels, by name."""
    query, document = tensors[0], tensors[3]
    batch, length = query.shape[0], query.shape[2]
    tiles, blocks = (triton.cdiv(length, size.value) for size in (module.BLOCK_I, module.BLOCK_J))
    lists = batch * tiles
    rows = min(torch.cuda.get_device_properties(query.device).multi_processor_count, lists * HEADS)
    width = triton.cdiv(lists * HEADS, rows) + 2
    numbers = 2 * rows * width + 2 * lists + lists * min(blocks, module.ROOM.value) + 8
    memory = torch.empty(numbers, dtype=torch.int32, device=query.device)
    counts, places, work = module.list_parts(memory, query, lists, HEADS, blocks, rows)
    given = (document, *document.stride(), HEADS, length)

    def mark(chunk: int, warps: int) -> None:
        module.launch(
            module.mark_blocks, (lists,), counts, places, places.shape[1], *given, ROWS=module.BLOCK_I.value,
            ROW_SPACE=module.BLOCK_I.value, KEYS=module.BLOCK_J.value, CHUNK=chunk, num_warps=warps,
        )  # fmt: skip

    def deal(space: int, chunk: int, warps: int) -> None:
        programs = triton.cdiv(max(lists, rows * width - lists * HEADS), space)
        module.launch(
            module.order_tiles, (programs,), counts, work, tiles, HEADS, lists, HEADS, rows, width, SPACE=space,
            CHUNK=chunk, num_warps=warps,
        )  # fmt: skip

    return {
        "call": lambda: module.attend(*tensors),
        "lists given": lambda: module.attend(*tensors, memory),
        "lists": lambda: module.mask_lists(memory, *tensors),
        "mark": lambda: module.block_lists(counts, places, given),
        "deal": lambda: module.deal(counts, work, tiles, HEADS, HEADS),
        **{f"mark {chunk} {warps}": lambda c=chunk, w=warps: mark(c, w) for chunk, warps in MARKS},
        **{f"deal {space} {chunk} {warps}": lambda s=space, c=chunk, w=warps: deal(s, c, w)
           for space, chunk, warps in DEALS},
    }  # fmt: skip


def measure(length: int, rounds: int) -> dict[str, Any]:
    """One length: 16384 tokens in all, or one row of more."""
    work = Work(
        f"documents-{length}", max(1, 16384 // length), HEADS, HEADS, length, CHANNELS, "documents", ()
    )
    tensors = tensors_of(work)
    running = parts(load_module(gluon.generate(work.spec())), tensors)
    running["lists"]()  # what the call with given lists reads
    ready = {}
    for name, run in running.items():
        run()
        ready[name] = graphed(run, repeats_of(run, 2, 50))
    found = {name: summary(ready[name], times) for name, times in interleaved(ready, rounds).items()}
    return {"name": work.name, "batch": work.batch, "length": length, "results": found}


def main() -> None:
    """Measure, print a line for each length, write JSON after each."""
    parser = arguments(__doc__, rounds=9, rows=False)
    parser.add_argument("--lengths", default="4096,16384,65536", help="numbers of tokens (default 4096,16384,65536)")
    options = parse(parser)
    report = Report(options.output, {"rounds": options.rounds, "heads": HEADS, "channels": CHANNELS})
    for length in options.lengths.split(","):
        row = measure(int(length), options.rounds)
        report.add(row)
        print(row["name"], {name: f"{1e3 * each['ms']:.1f}" for name, each in row["results"].items()}, flush=True)


if __name__ == "__main__":
    main()
