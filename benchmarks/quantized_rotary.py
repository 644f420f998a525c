"""Rounding to 8 bits behind rotary maps: rotated by the kernels that round, or by others before them.

    python -m benchmarks.quantized_rotary benchmarks/results/quantized_rotary_h200.json [--rows d128] [--rounds 9]

Queries and keys are rotated as Llama does (``half``) or as GPT-J does (``interleaved``), by tables in bfloat16. For
each form of rounding: ``eager`` rotates by PyTorch's operators, ``inductor`` by the kernel that torch.compile makes of
them, both before our kernels of ``quantize.fp8`` or ``quantize.int8``; ``fused`` is our Spec with the maps in it;
``unrotated`` leaves the rotation out. ``codes`` is the time of what comes before the attention alone. Times are
interleaved medians of replayed CUDA graphs, as in :mod:`benchmarks.kernels`. Errors are relative to the norm of the
exact result in float64 from the same inputs, for two heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from attncompile.codegen import gluon
from attncompile.codegen.triton.cache import load_module
from attncompile.codegen.triton.generate import GeneratedModule
from attncompile.ir import Position, Quantize, Spec, Value, parse_expr, tensor_type
from attncompile.ir.operators import Kind
from attncompile.ir.prologue import Prologue, with_positions
from attncompile.ir.types import DTYPES
from benchmarks.kernels import Run, Work, tensors_of
from benchmarks.quantized import exact, relative_error, rounded
from benchmarks.report import Report, arguments, chosen, parse, shown
from benchmarks.timing import Timed, graphed, interleaved, repeats_of, summary

ROUNDED = ("fp8", "int8 bf16")
"""Forms of :data:`benchmarks.quantized.FORMS` that are timed."""


@dataclasses.dataclass(frozen=True)
class Rotated(Work):
    """A row of :mod:`benchmarks.kernels` whose queries and keys are rotated.

    Attributes:
        convention: of pairs, as in :class:`attncompile.ir.Position`.
    """

    convention: str = "half"

    def whole(self) -> Spec:
        """The Spec with its rotary maps: tables are ``[i,d]``."""
        names = {"cos": Kind.FLOAT, "sin": Kind.FLOAT}
        cos, sin = (parse_expr(f"{name}[i, d]", names) for name in names)
        positions = tuple(Position(name, cos, sin, self.channels, self.convention) for name in "qk")
        tables = (Value(name, tensor_type("id", ("I", self.channels), "bfloat16")) for name in names)
        return with_positions(self.spec(), Prologue(positions, tuple(tables)))


WORKS = tuple(
    Rotated(
        f"d{channels}-n{length}-{convention}",
        16384 // length,
        2048 // channels,
        512 // channels,
        length,
        channels,
        "causal",
        (),
        convention,
    )
    for channels in (64, 128)
    for length in (2048, 16384)
    for convention in ("half", "interleaved")
)
"""2048 channels of queries, a quarter as many of keys."""


def tables(work: Rotated, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Cosines and sines ``[i,d]`` with base 10000."""
    count = work.channels // 2
    frequencies = 10000.0 ** (-torch.arange(count, device=device, dtype=torch.float64) / count)
    angles = torch.arange(work.length, device=device, dtype=torch.float64)[:, None] * frequencies
    spread = torch.cat([angles, angles], -1) if work.convention == "half" else angles.repeat_interleave(2, -1)
    return [spread.cos().to(dtype), spread.sin().to(dtype)]


def rotation(convention: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The rotation of queries and keys as models write it, in the dtype of its arguments."""

    def turned(x: torch.Tensor) -> torch.Tensor:
        if convention == "half":
            first, second = x.chunk(2, -1)
            return torch.cat([-second, first], -1)
        return torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)

    def rotate(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return q * cos + turned(q) * sin, k * cos + turned(k) * sin

    return rotate


def codes(spec: Spec, module: Any, tensors: list[torch.Tensor], angles: list[torch.Tensor]) -> Run:
    """What a module runs to make codes of queries and keys, without the attention."""
    steps = [step for step in spec.operations if isinstance(step, Quantize)][:2]
    fused = hasattr(module, "rotate_quantize")

    def run() -> list[Any]:
        made = []
        for tensor, step in zip(tensors, steps, strict=False):
            given = (DTYPES[step.dtype], step.block, step.smooth)
            made.append(module.rotate_quantize(tensor, *angles, *given) if fused else module.quantize(tensor, *given))
        return made

    return run


def modules(work: Rotated) -> dict[str, GeneratedModule]:
    """Generated kernels by form, with and without the maps."""
    made = {}
    for form in ROUNDED:
        made[f"{form} fused"] = gluon.generate(rounded(work.whole(), form), queries=work.length)
        made[f"{form} apart"] = gluon.generate(rounded(work.spec(), form), queries=work.length)
    return made


def contenders(work: Rotated, tensors: list[torch.Tensor], angles: list[torch.Tensor]) -> dict[str, Run]:
    """Everybody that is timed, by name."""
    q, k, v = tensors
    eager = rotation(work.convention)
    inductor = torch.compile(eager, fullgraph=True)
    found: dict[str, Run] = {"rotation eager": lambda: eager(q, k, *angles)}
    found["rotation inductor"] = lambda: inductor(q, k, *angles)
    made = {name: load_module(module) for name, module in modules(work).items()}

    def behind(rotate: Callable[..., Any], run: Callable[..., Any]) -> Run:
        return lambda: run(*rotate(q, k, *angles))

    for form in ROUNDED:
        fused, apart = made[f"{form} fused"], made[f"{form} apart"]
        spec = rounded(work.spec(), form)
        plain = codes(spec, apart, tensors, angles)

        def rounds(first: torch.Tensor, second: torch.Tensor, spec: Spec = spec, apart: Any = apart) -> Any:
            return codes(spec, apart, [first, second], angles)()

        def attends(first: torch.Tensor, second: torch.Tensor, apart: Any = apart) -> Any:
            return apart.attend(first, second, v)

        found[f"{form} unrotated"] = lambda apart=apart: apart.attend(q, k, v)  # type: ignore[misc]
        found[f"{form} eager"] = behind(eager, attends)
        found[f"{form} inductor"] = behind(inductor, attends)
        found[f"{form} fused"] = lambda fused=fused: fused.attend(q, k, v, *angles)  # type: ignore[misc]
        found[f"{form} codes unrotated"] = plain
        found[f"{form} codes inductor"] = behind(inductor, rounds)
        found[f"{form} codes fused"] = codes(rounded(work.whole(), form), fused, tensors, angles)
    return found


def errors(work: Rotated, tensors: list[torch.Tensor], angles: list[torch.Tensor]) -> dict[str, float]:
    """How far each result is from the exact one."""
    wide = [table.double() for table in angles]
    turned = rotation(work.convention)(*(tensor.double() for tensor in tensors[:2]), *wide)
    shared = work.heads // work.groups
    every = [turned[0], *(t.repeat_interleave(shared, 1) for t in (turned[1], tensors[2].double()))]
    best = exact(work, every)
    running = contenders(work, tensors, angles)
    names = [f"{form} {how}" for form in ROUNDED for how in ("eager", "inductor", "fused")]
    return {name: relative_error(work, running[name](), best) for name in names}


def measure(work: Rotated, rounds: int) -> dict[str, Any]:
    """Times and errors of one row."""
    tensors, angles = tensors_of(work), tables(work)
    row: dict[str, Any] = {**dataclasses.asdict(work), "results": {}}
    running: dict[str, Timed] = {}
    for name, run in contenders(work, tensors, angles).items():
        try:
            run()
            torch.cuda.synchronize()
            running[name] = graphed(run, repeats_of(run, 12, 50))
        except Exception as error:
            row["results"][name] = {"failure": f"{type(error).__name__}: {error}"[:300]}
    # the first round warms up
    for name, times in interleaved(running, rounds + 1).items():
        row["results"][name] = summary(running[name], times[1:])
    row["errors"] = errors(work, tensors, angles)
    return row


def main() -> None:
    """Measure, print a line for each row, write JSON after each."""
    options = parse(arguments(__doc__, rounds=9))
    report = Report(options.output, {"rounds": options.rounds})
    for work in chosen(WORKS, options.rows):
        row = measure(work, options.rounds)
        report.add(row)
        print(f"{work.name}: ms", {n: shown(r, "{ms:.4f}") for n, r in row["results"].items()}, flush=True)
        print("  errors", {name: f"{error:.1e}" for name, error in row["errors"].items()}, flush=True)
        torch.compiler.reset()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
