"""Gradients of attention beside what people call today, in one run.

    python -m benchmarks.backward benchmarks/results/backward_h200.json [--rows causal] [--rounds 7] [--sweep]

Only the backward pass is timed: the result and its log-sum-exp are there, as after a forward pass. Peers: cuDNN and
FlashAttention-2 through PyTorch's SDPA, FlexAttention compiled; ``ours`` are plain Triton's generated kernels,
``hopper`` is the Gluon one where there is one, ``operator`` is what autograd runs for the operator that models call.
Every round calls each of them so often that the GPU is busy for some 20 ms, longer than the host needs to call them;
medians of the rounds are reported. (Replaying captured graphs of backward passes ended in illegal accesses as soon as
a second one was captured, with PyTorch's own operators alone just the same.) Work is counted as 2.5 times that of the
forward pass over visible pairs (five products instead of two), for all alike, however many products a kernel computes
again. Gradients are compared with those of cuDNN, or of FlexAttention where that has no such variant. ``--sweep``
tries other tiles of our kernels.
"""

from __future__ import annotations

import concurrent.futures
import math
import multiprocessing
import statistics
from collections.abc import Callable
from dataclasses import asdict
from types import ModuleType
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from attncompile.codegen import gluon
from attncompile.codegen.triton import generate, load, lower
from attncompile.codegen.triton.backward import generate_backward
from attncompile.codegen.triton.cache import load_module
from attncompile.kernels.operators import with_log_sum_exp
from benchmarks.kernels import SDPA, Run, Work, flex, sdpa, tensors_of
from benchmarks.report import Report, add_processes, arguments, chosen, parse, shown
from benchmarks.timing import Timed, called, interleaved, milliseconds, repeats_of, summary

Tile = tuple[int, int, int, int]

WORKS: tuple[Work, ...] = (
    *(
        Work(f"d{d}-n{n}-{kind}", 16384 // n, 2048 // d, 2048 // d, n, d, kind, (*SDPA, "flex"))
        for d, n in ((128, 16384), (64, 16384), (128, 2048), (64, 2048))
        for kind in ("causal", "full")
    ),
    Work("d128-n8192-causal-32-8", 2, 32, 8, 8192, 128, "causal", SDPA),
    *(Work(f"d128-n16384-{kind}", 1, 16, 16, 16384, 128, kind, ("flex",)) for kind in ("alibi", "window", "softcap")),
    Work("d64-n4096-bias", 4, 16, 16, 4096, 64, "bias", ("flex",)),
)

SWEEP: dict[tuple[int, str], tuple[Tile, ...]] = {
    (128, "TILES_QUERY"): ((64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 128, 8, 2), (128, 64, 8, 3)),
    (128, "TILES_KEY"): ((64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (32, 128, 8, 3)),
    (64, "TILES_QUERY"): ((64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (64, 32, 4, 4)),
    (64, "TILES_KEY"): ((64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (32, 64, 4, 4), (64, 128, 8, 3)),
}  # fmt: skip
"""Tiles by head channels and table: queries, keys, warps, stages."""


def gradient_of(work: Work, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The gradient of the result, stored as the result is."""
    shape = (work.batch, work.length, work.heads, work.channels)
    return torch.randn(shape, device="cuda", dtype=tensors[0].dtype).transpose(1, 2)


def differentiated(work: Work, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors whose gradients are wanted: query, key, value, and a bias."""
    return tensors[:3] + (tensors[3:] if work.kind == "bias" else [])


def by_autograd(make: Callable[[Work, list[torch.Tensor]], Run]) -> Callable[..., Callable[[], Any]]:
    """The backward pass of a peer, its forward pass done."""

    def made(work: Work, tensors: list[torch.Tensor], given: torch.Tensor) -> Callable[[], Any]:
        leaves = [t.detach() for t in tensors]
        wanted = differentiated(work, leaves)
        for leaf in wanted:
            leaf.requires_grad_()
        out = make(work, leaves)()
        return lambda: torch.autograd.grad(out, wanted, given, retain_graph=True)

    return made


def ours(work: Work, tensors: list[torch.Tensor], given: torch.Tensor) -> Callable[[], Any]:
    """Our generated kernels in plain Triton."""
    return generated(work, tensors, given, module_of(work, wanted_of(work, tensors)))


def hopper(work: Work, tensors: list[torch.Tensor], given: torch.Tensor) -> Callable[[], Any]:
    """Our generated kernel for Hopper GPUs."""
    return generated(work, tensors, given, load_module(gluon.generate_backward(work.spec(), wanted_of(work, tensors))))


def wanted_of(work: Work, tensors: list[torch.Tensor]) -> tuple[str, ...]:
    """Names of the inputs whose gradients are wanted."""
    return tuple(value.name for value in work.spec().inputs[: len(differentiated(work, tensors))])


def generated(
    work: Work, tensors: list[torch.Tensor], given: torch.Tensor, module: ModuleType
) -> Callable[[], Any]:
    """The gradients that a generated module computes, its forward pass done."""
    out, lse = load(generate(with_log_sum_exp(work.spec())))(*tensors)
    return lambda: [g for g in module.attend_backward(given, out, lse, *tensors) if g is not None]


def module_of(work: Work, wanted: tuple[str, ...]) -> ModuleType:
    """Our module for the gradients of these inputs."""
    return load_module(generate_backward(work.spec(), wanted))


def through_operator(work: Work, tensors: list[torch.Tensor]) -> Run:
    """The operator as a model calls it."""
    run = lower(work.spec(), "cuda").run

    def forward() -> torch.Tensor:
        found = run(*tensors)
        assert isinstance(found, torch.Tensor)
        return found

    return forward


MAKERS: dict[str, Callable[..., Callable[[], Any]]] = {
    "ours": ours,
    "hopper": hopper,
    "operator": by_autograd(through_operator),
    "cudnn": by_autograd(sdpa(SDPBackend.CUDNN_ATTENTION)),
    "flash2": by_autograd(sdpa(SDPBackend.FLASH_ATTENTION)),
    "flex": by_autograd(flex),
}


def inputs(work: Work) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Inputs of the Spec, and the gradient of its result."""
    tensors = tensors_of(work)
    return tensors, gradient_of(work, tensors)


def measure(work: Work, rounds: int) -> dict[str, Any]:
    """Interleaved medians of everybody at one row."""
    torch._dynamo.reset()
    tensors, given = inputs(work)
    row: dict[str, Any] = {**asdict(work), "visible": work.visible(), "results": {}}
    running: dict[str, Timed] = {}
    found: dict[str, list[torch.Tensor]] = {}
    for name in ("ours", "hopper", "operator", *work.peers):
        try:
            run = MAKERS[name](work, tensors, given)
            found[name] = [gradient.clone() for gradient in run()]
            row["results"][name] = {}
            running[name] = called(run, max(2, repeats_of(run, 20, 100)))
        except Exception as error:
            row["results"][name] = {"failure": f"{type(error).__name__}: {error}"[:300]}
    flops = 2.5 * work.spec().flops({"B": work.batch, "I": work.length}) * row["visible"]
    judge = found.get("cudnn", found.get("flex"))
    for name, times in interleaved(running, rounds).items():
        taken = summary(running[name], times)
        row["results"][name] |= {**taken, "tflops": flops / taken["ms"] / 1e9}
        if judge is not None and name in found:
            row["results"][name]["differences"] = [
                float((one - other).float().norm() / other.float().norm())
                for one, other in zip(found[name], judge, strict=True)
            ]
    return row


def sweep(work: Work) -> list[dict[str, Any]]:
    """Time of our kernels with other tiles, one table after the other."""
    tensors, given = inputs(work)
    run = ours(work, tensors, given)
    module = module_of(work, ("q", "k", "v"))
    rows = []
    for (channels, table), tiles in SWEEP.items():
        if channels != work.channels:
            continue
        usual = getattr(module, table)[torch.bfloat16]
        for tile in tiles:
            getattr(module, table)[torch.bfloat16] = tile
            row: dict[str, Any] = {"name": work.name, "table": table, "tile": tile, "timed": "calls"}
            try:
                run()
                row["ms"] = statistics.median(milliseconds(run, 3) for _ in range(3))
            except Exception as error:
                row["failure"] = str(error)[:120]
            rows.append(row)
            print(row, flush=True)
        getattr(module, table)[torch.bfloat16] = usual
    return rows


def _warm(work: Work, name: str, table: str, tile: Tile | None) -> None:
    try:
        tensors, given = inputs(work)
        run = MAKERS[name](work, tensors, given)
        if tile is not None:
            getattr(module_of(work, ("q", "k", "v")), table)[torch.bfloat16] = tile
        run()
        torch.cuda.synchronize()
    except Exception as error:
        print(f"{work.name} {name} {tile}: {error}"[:200], flush=True)


def warm_up(works: tuple[Work, ...], tiles: bool, processes: int) -> None:
    """Fill Triton's and Inductor's caches in processes of their own."""
    jobs: list[tuple[Work, str, str, Tile | None]] = []
    for work in works:
        jobs += [
            (work, name, "", None)
            for name in ("ours", "hopper", "operator", "flex")
            if name != "flex" or name in work.peers
        ]
        if tiles:
            for (channels, table), options in SWEEP.items():
                jobs += [(work, "ours", table, tile) for tile in options if channels == work.channels]
    with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for job in [pool.submit(_warm, *each) for each in jobs]:
            job.result()


def main() -> None:
    """Measure, print a line for each row, write JSON after each."""
    parser = arguments(__doc__, rounds=7)
    add_processes(parser)
    parser.add_argument("--sweep", action="store_true", help="try other tiles instead of measuring peers")
    options = parse(parser)
    works = chosen(WORKS, options.rows)
    report = Report(options.output, {"rounds": options.rounds})
    warm_up(works, options.sweep, options.processes)
    for work in works:
        if options.sweep:
            report.add(*sweep(work))
        else:
            row = measure(work, options.rounds)
            report.add(row)
            rates = {name: shown(result, "{tflops:.0f}") for name, result in row["results"].items()}
            worst = max((max(r.get("differences", [0.0])) for r in row["results"].values()), default=math.nan)
            print(f"{work.name}: TF/s {rates}, differences up to {worst:.1e}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
