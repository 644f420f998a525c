"""Attention whose operands are rounded to 8 bits, beside who else does that: how fast, and how far from exact.

    python -m benchmarks.quantized benchmarks/results/quantized_h200.json [--rows d64] [--rounds 9]

Ours are the Specs that ``quantize.fp8`` and ``quantize.int8`` make, with their rounding and alone on codes made
beforehand; the peers are cuDNN's FP8 attention (alone: its caller rounds) and SageAttention 1 (both ways). Times are
interleaved medians of replayed CUDA graphs, as in :mod:`benchmarks.kernels`. Errors are relative to the norm of the
exact result, computed in float64 from the same bfloat16 inputs for two heads: normally distributed ones, and ones
where one channel in sixteen of the keys has a mean of ±10 and one channel in sixteen of the values is ten times as
large, as language models have them.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch.nn.attention import SDPBackend

from attncompile.codegen import gluon, triton
from attncompile.codegen.triton import load
from attncompile.codegen.triton.cache import load_module
from attncompile.codegen.triton.generate import GeneratedModule
from attncompile.ir import Spec
from attncompile.passes import parse_passes, run_passes
from benchmarks.kernels import Run, Work, our_gluon, sdpa, tensors_of
from benchmarks.narrow_peers import CudnnFp8, sage, sage_alone
from benchmarks.report import Report, add_processes, arguments, chosen, parse, shown
from benchmarks.timing import Timed, graphed, interleaved, repeats_of, summary

FORMS = {
    "fp8": "quantize.fp8",
    "int8 fp8": "quantize.int8(values=true)",
    "int8 bf16": "quantize.int8",
    "fp8 bf16": "quantize.fp8(values=false)",
}
"""What is multiplied in what: queries with keys, then weights with values (the same where one is named)."""

WORKS = tuple(
    Work(f"d{channels}-n{length}-{kind}", 16384 // length, *[2048 // channels] * 2, length, channels, kind, ())
    for channels in (64, 128)
    for length in (2048, 16384)
    for kind in ("full", "causal")
)


def rounded(spec: Spec, form: str) -> Spec:
    """A Spec after the pass of a form.

    Raises:
        ValueError: when the pass does not apply.
    """
    found = run_passes(spec, parse_passes(FORMS[form]))
    if found.refused:
        raise ValueError(found.refused[0][1])
    return found.spec


def alone(module: ModuleType, tensors: list[torch.Tensor]) -> Run:
    """The attention of a module on codes that are made once."""
    kept: dict[Any, Any] = {}

    def once(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(tensor: torch.Tensor, *arguments: Any) -> Any:
            key = (tensor.data_ptr(), function, arguments)
            if key not in kept:
                kept[key] = function(tensor, *arguments)
            return kept[key]

        return run

    def attend() -> torch.Tensor:
        with contextlib.ExitStack() as changes:
            for name in ("quantize", "quantize_values"):
                if hasattr(module, name):
                    changes.enter_context(mock.patch.object(module, name, once(getattr(module, name))))
            return module.attend(*tensors)  # type: ignore[no-any-return]

    return attend


def outlying(work: Work, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The inputs with large channels: a mean in the keys, a factor in the values."""
    query, key, value = (tensor.clone() for tensor in tensors)
    key[..., ::16] += torch.where(torch.rand(work.groups, 1, work.channels // 16, device="cuda") < 0.5, 10.0, -10.0)
    value[..., 8::16] *= 10.0
    return [query, key, value]


def exact(work: Work, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The result in float64 for the first and the last head of the first batch row: ``[2,i,e]``."""
    made = []
    for head in (0, work.heads - 1):
        query, key, value = (tensor[0, head].double() for tensor in tensors)
        rows = []
        for first in range(0, work.length, 2048):
            scores = query[first : first + 2048] @ key.T * work.scale
            if work.kind == "causal":
                places = torch.arange(work.length, device="cuda")
                hidden = places[None] > places[first : first + 2048, None]
                scores.masked_fill_(hidden, float("-inf"))
            rows.append(torch.softmax(scores, dim=-1) @ value)
        made.append(torch.cat(rows))
    return torch.stack(made)


def relative_error(work: Work, found: torch.Tensor, best: torch.Tensor) -> float:
    """Norm of the difference over the norm of the exact result."""
    shown = found[0, [0, work.heads - 1]].double()
    return float((shown - best).norm() / best.norm())


def modules(work: Work) -> dict[str, GeneratedModule]:
    """Generated kernels of a row by name."""
    made: dict[str, GeneratedModule] = {}
    for form in FORMS:
        made[form] = gluon.generate(rounded(work.spec(), form), queries=work.length)
    for form in ("fp8", "int8 fp8", "int8 bf16"):
        made[f"{form} plain"] = triton.generate(rounded(work.spec(), form))
    return made


def contenders(work: Work, tensors: list[torch.Tensor]) -> dict[str, Callable[[], Run]]:
    """Everybody that is timed, not yet compiled."""
    causal = work.kind == "causal"
    found: dict[str, Callable[[], Run]] = {
        "bf16": lambda: our_gluon(work, tensors),
        "cudnn bf16": lambda: sdpa(SDPBackend.CUDNN_ATTENTION)(work, tensors),
        "cudnn fp8 alone": lambda: CudnnFp8(tensors, work.scale, causal, 4.0, True),
        "sage": lambda: sage(tensors, work.scale, causal),
        "sage alone": lambda: sage_alone(tensors, work.scale, causal),
    }
    for name, module in modules(work).items():
        loaded = load_module(module)
        found[f"{name} alone"] = lambda loaded=loaded: alone(loaded, tensors)  # type: ignore[misc]
        found[name] = lambda loaded=loaded: lambda: loaded.attend(*tensors)  # type: ignore[misc]
    return found


def errors(work: Work, tensors: list[torch.Tensor]) -> dict[str, float | str]:
    """How far each result is from the exact one."""
    best, causal = exact(work, tensors), work.kind == "causal"
    largest = float(best.abs().max())
    runs: dict[str, Callable[[], torch.Tensor]] = {
        "bf16": lambda: our_gluon(work, tensors)(),
        "cudnn fp8": lambda: CudnnFp8(tensors, work.scale, causal, largest, True).result(),
        "cudnn fp8 unscaled": lambda: CudnnFp8(tensors, work.scale, causal, largest, False).result(),
        "sage": lambda: sage(tensors, work.scale, causal)(),
    }
    for name, module in modules(work).items():
        runs[name] = lambda module=module: load(module)(*tensors)  # type: ignore[misc]
    found: dict[str, float | str] = {}
    for name, run in runs.items():
        try:
            found[name] = relative_error(work, run(), best)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:200]
    return found


def measure(work: Work, rounds: int) -> dict[str, Any]:
    """Times and errors of one row."""
    tensors = tensors_of(work)
    row: dict[str, Any] = {"name": work.name, "batch": work.batch, "heads": work.heads, "length": work.length,
                           "channels": work.channels, "kind": work.kind, "results": {}}  # fmt: skip
    running: dict[str, Timed] = {}
    for name, make in contenders(work, tensors).items():
        try:
            run = make()
            run()
            torch.cuda.synchronize()
            running[name] = graphed(run, repeats_of(run, 12, 50))
        except Exception as error:
            row["results"][name] = {"failure": f"{type(error).__name__}: {error}"[:300]}
    flops = work.spec().flops({"B": work.batch, "I": work.length}) * work.visible()
    for name, times in interleaved(running, rounds).items():
        found = summary(running[name], times)
        row["results"][name] = {**found, "tflops": flops / found["ms"] / 1e9}
    row["errors"] = errors(work, tensors)
    row["errors with outliers"] = errors(work, outlying(work, tensors))
    return row


def _warm(job: tuple[Work, str]) -> None:
    """Fill Triton's cache with one kernel and those that round for it."""
    work, name = job
    small = dataclasses.replace(work, batch=1)
    module = modules(small)[name] if name else gluon.generate(small.spec(), queries=work.length)
    load(module)(*tensors_of(small))
    torch.cuda.synchronize()


def warm_up(works: tuple[Work, ...], processes: int) -> None:
    """Compile what these rows need, in processes of its own, many at a time."""
    distinct = {(work.channels, work.kind): work for work in works}
    jobs = [(work, name) for work in distinct.values() for name in ("", *modules(work))]
    with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_warm, jobs))


def main() -> None:
    """Measure, print a line for each row, write JSON after each."""
    parser = arguments(__doc__, rounds=9)
    add_processes(parser, 14)
    options = parse(parser)
    works = chosen(WORKS, options.rows)
    report = Report(options.output, {"rounds": options.rounds})
    warm_up(works, options.processes)
    for work in works:
        row = measure(work, options.rounds)
        report.add(row)
        rates = {name: shown(result, "{tflops:.0f}") for name, result in row["results"].items()}
        print(f"{work.name}: TF/s {rates}", flush=True)
        for kind in ("errors", "errors with outliers"):
            print(f"  {kind}", {n: e if isinstance(e, str) else f"{e:.1e}" for n, e in row[kind].items()}, flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
