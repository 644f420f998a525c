"""What listing key blocks and ordering tiles costs, before a Hopper kernel whose mask loads tensors.

    python -m benchmarks.mask_lists results.json [--lengths 4096,16384,65536] [--rounds 9]

Microseconds in CUDA graphs, causal attention inside documents: ``call`` makes its lists, ``lists given`` has those of a
call before, ``lists`` makes them alone: ``mark`` looks at the keys and lists the blocks of each tile, ``order`` orders
the tiles.
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


def parts(module: ModuleType, memory: torch.Tensor, tensors: list[torch.Tensor]) -> dict[str, Run]:
    """Calls of the generated module and of what makes its lists, by name."""
    query, document = tensors[0], tensors[3]
    batch, length = query.shape[0], query.shape[2]
    tiles, blocks = (triton.cdiv(length, size.value) for size in (module.BLOCK_I, module.BLOCK_J))
    counts, places, order = module.list_parts(memory, query, batch * tiles, blocks)
    given = (document, *document.stride(), HEADS, length)
    return {
        "call": lambda: module.attend(*tensors),
        "lists given": lambda: module.attend(*tensors, memory),
        "lists": lambda: module.mask_lists(memory, *tensors),
        "mark": lambda: module.block_lists(counts, places, tiles, blocks, given),
        "order": lambda: module.tile_order(counts, order, tiles),
    }


def measure(length: int, rounds: int) -> dict[str, Any]:
    """One length: 16384 tokens in all, or one row of more."""
    work = Work(
        f"documents-{length}", max(1, 16384 // length), HEADS, HEADS, length, CHANNELS, "documents", ()
    )
    tensors = tensors_of(work)
    generated = gluon.generate(work.spec())
    assert generated.list_room is not None
    words = generated.list_room.words(work.batch, HEADS, length, length)
    memory = torch.empty(words, dtype=torch.int32, device="cuda")
    running = parts(load_module(generated), memory, tensors)
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
