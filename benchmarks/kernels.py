"""Forward attention kernels beside what people call today, in one run.

    python -m benchmarks.kernels benchmarks/results/kernels_peers_h200.json [--rows causal] [--rounds 7] [--fa4]

Peers: cuDNN and FlashAttention-2 through PyTorch's SDPA, FlexAttention compiled, our plain Triton, our Gluon kernel;
FlashAttention-4 with ``--fa4`` where ``flash-attn-4`` is installed, compiled beforehand like ours where it has a cache
on disk (``FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1``). Every round runs each of them once, so that the card's clock and
temperature treat all alike, as a replayed CUDA graph, so that kernels are timed and not the host (how long a call keeps
that busy stands beside it); what cannot be captured is timed by calls, and its result says so in ``timed``. Medians of
the rounds are reported. FLOPs count visible pairs only, for all alike. Each result is compared with cuDNN's or, where
that has no such variant, with plain Triton's.
"""

from __future__ import annotations

import concurrent.futures
import functools
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attncompile.codegen import gluon, triton
from attncompile.codegen.triton import load
from attncompile.ir import Spec, parse_spec
from attncompile.ir.blocks import density
from benchmarks.report import Report, add_processes, arguments, chosen, parse, shown
from benchmarks.timing import Timed, graphed, interleaved, repeats_of, summary

WINDOW, CAP, DOCUMENT, SINKS, FARTHEST = 1024, 30.0, 2048, 4, 255
FLASH4_CACHE = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
"""Set to 1, FlashAttention-4 keeps what it compiles on disk."""


@dataclass(frozen=True)
class Work:
    """One row.

    Attributes:
        name: of the row.
        batch, heads, groups, length, channels: sizes; ``groups`` is the number of key heads.
        kind: ``full``, ``causal``, ``alibi``, ``relative``, ``window``, ``sink-window``, ``softcap``, ``documents``,
            ``sinks`` or ``bias``; all but ``full`` and ``bias`` are causal.
        peers: who else computes it.
    """

    name: str
    batch: int
    heads: int
    groups: int
    length: int
    channels: int
    kind: str
    peers: tuple[str, ...]

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return self.channels**-0.5

    def spec(self) -> Spec:
        """What is computed."""
        score, mask, more, given = f"{self.scale!r}·s", "j ≤ i", "", ""
        match self.kind:
            case "full":
                mask = "true"
            case "alibi":
                score += f" + exp2(−{8 / self.heads!r}·float(h + 1))·float(j − i)"
            case "relative":
                score += f" + table[h, max(0, min(i − j, {FARTHEST}))]"
                given = f"table[{self.heads},{FARTHEST + 1}]:float32"
            case "window":
                mask = f"j ≤ i and j > i − {WINDOW}"
            case "sink-window":
                mask = f"j ≤ i and (j > i − {WINDOW} or j < {SINKS})"
            case "softcap":
                score = f"{CAP}·tanh({self.scale / CAP!r}·s)"
            case "documents":
                mask, given = "j ≤ i and document[b, j] = document[b, i]", "document[B,I]:int32"
            case "sinks":
                more, given = "sink   sinks[h]", f"sinks[{self.heads}]:float32"
            case "bias":
                mask, score = "true", f"{score} + bias[h, i, j]"
                given = f"bias[{self.heads},I,I]:bfloat16"
        lines = [
            f"work   attend  q[B,{self.heads},I,{self.channels}]  k,v[B,{self.groups},I,{self.channels}]  bfloat16",
            f"score  {score}",
            f"mask   {mask}",
            *([f"kv_head h // {self.heads // self.groups}"] if self.heads != self.groups else []),
            *([more] if more else []),
            "norm   softmax (float32)",
            *([f"given  {given}"] if given else []),
        ]
        return parse_spec("\n  ".join(lines))

    def visible(self) -> float:
        """Share of the pairs that the mask leaves."""
        if self.kind == "documents":
            return min(1.0, DOCUMENT / self.length) / 2
        attend = self.spec().attend()
        assert attend is not None
        return density(attend.mask, self.length, self.length)


SDPA = ("cudnn", "flash2")
DENSE = tuple(
    Work(
        f"d{channels}-n{length}-{kind}",
        max(1, 16384 // length),
        2048 // channels,
        2048 // channels,
        length,
        channels,
        kind,
        (*SDPA, "flex") if (length, channels) == (16384, 128) else SDPA,
    )
    for channels in (64, 128)
    for length in (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    for kind in ("full", "causal")
)
VARIANTS = tuple(
    Work(f"d128-n16384-{kind}", 1, 16, 16, 16384, 128, kind, ("flex",))
    for kind in ("alibi", "relative", "window", "sink-window", "softcap", "documents", "sinks")
)
GROUPED = (Work("d128-n8192-causal-32-8", 2, 32, 8, 8192, 128, "causal", SDPA),)
BIAS = (Work("d64-n4096-bias", 4, 16, 16, 4096, 64, "bias", ("flex",)),)
WORKS = (*VARIANTS, *GROUPED, *BIAS, *DENSE)

Run = Callable[[], torch.Tensor]


def tensors_of(work: Work) -> list[torch.Tensor]:
    """Inputs in the order of the Spec, operands stored as ``[b,i,h,d]``."""
    made = []
    for value in work.spec().inputs:
        if value.name in "qkv":
            heads = work.heads if value.name == "q" else work.groups
            shape = (work.batch, work.length, heads, work.channels)
            made.append(torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2))
        elif value.name == "document":
            positions = torch.arange(work.length, device="cuda", dtype=torch.int32) // DOCUMENT
            made.append(positions.expand(work.batch, -1).contiguous())
        elif value.name in ("sinks", "table"):
            shape = (work.heads,) if value.name == "sinks" else (work.heads, FARTHEST + 1)
            made.append(torch.randn(shape, device="cuda"))
        else:
            shape = (work.heads, work.length, work.length)
            made.append(torch.randn(shape, device="cuda", dtype=torch.bfloat16))
    return made


def sdpa(backend: SDPBackend) -> Callable[[Work, list[torch.Tensor]], Run]:
    """A back end of PyTorch's ``scaled_dot_product_attention``."""

    def make(work: Work, tensors: list[torch.Tensor]) -> Run:
        def run() -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    *tensors[:3], is_causal=work.kind == "causal", enable_gqa=work.heads != work.groups
                )

        return run

    return make


def flex(work: Work, tensors: list[torch.Tensor]) -> Run:
    """Compiled FlexAttention, its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    extra = tensors[3] if len(tensors) > 3 else None

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        shown = i >= j
        if work.kind in ("window", "sink-window"):
            near = j > i - WINDOW
            shown = shown & ((near | (j < SINKS)) if work.kind == "sink-window" else near)
        if work.kind == "documents":
            assert extra is not None
            shown = shown & (extra[b, i] == extra[b, j])
        return shown

    def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        if work.kind == "alibi":
            return s + torch.exp2(-(8 / work.heads) * (h + 1.0)) * (j - i)
        if work.kind == "softcap":
            return CAP * torch.tanh(s / CAP)
        assert extra is not None
        if work.kind == "relative":
            return s + extra[h, (i - j).clamp(0, FARTHEST)]
        return s + extra[h, i, j]

    blocks = None
    if work.kind not in ("full", "bias"):
        blocks = create_block_mask(mask, work.batch, None, work.length, work.length, device="cuda")
    changed = score if work.kind in ("alibi", "relative", "softcap", "bias") else None
    compiled = torch.compile(flex_attention, dynamic=False)
    sinks = work.kind == "sinks"

    def run() -> torch.Tensor:
        found = compiled(
            *tensors[:3], score_mod=changed, block_mask=blocks, enable_gqa=work.heads != work.groups, return_lse=sinks
        )
        if not sinks:
            return found
        out, lse = found
        assert extra is not None
        return out * torch.sigmoid(lse - extra[None, :, None])[..., None].to(out.dtype)

    return run


def flash4(work: Work, tensors: list[torch.Tensor]) -> Run:
    """FlashAttention-4, which has window, softcap and sinks beside the dense forms.

    Raises:
        ValueError: for a variant that it lacks.
        ImportError: when ``flash-attn-4`` is not installed.
    """
    from flash_attn.cute import flash_attn_func

    options: dict[str, Any] = {"causal": work.kind != "full"}
    match work.kind:
        case "window":
            options["window_size"] = (WINDOW - 1, 0)
        case "softcap":
            options["softcap"] = CAP
        case "sinks":
            options["learnable_sink"] = tensors[3].bfloat16()
        case "full" | "causal":
            pass
        case other:
            raise ValueError(f"FlashAttention-4 has no {other}")
    moved = [tensor.transpose(1, 2) for tensor in tensors[:3]]

    def run() -> torch.Tensor:
        found = flash_attn_func(*moved, **options)
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    return run


def plain_triton(work: Work, tensors: list[torch.Tensor]) -> Run:
    """Our generated kernel in plain Triton."""
    attend = load(triton.generate(work.spec()))
    return lambda: attend(*tensors)


def our_gluon(work: Work, tensors: list[torch.Tensor]) -> Run:
    """Our generated kernel in Gluon."""
    attend = load(gluon.generate(work.spec(), queries=work.length))
    return lambda: attend(*tensors)


MAKERS: dict[str, Callable[[Work, list[torch.Tensor]], Run]] = {
    "gluon": our_gluon,
    "triton": plain_triton,
    "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash2": sdpa(SDPBackend.FLASH_ATTENTION),
    "flex": flex,
    "flash4": flash4,
}


def host_microseconds(run: Run) -> float:
    """Time that a call keeps the host busy."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(5):
        run()
    taken = (time.perf_counter() - started) / 5
    torch.cuda.synchronize()
    return taken * 1e6


def race(makers: Mapping[str, Callable[[], Run]], rounds: int, judges: tuple[str, ...]) -> dict[str, Any]:
    """Interleaved medians of several ways to compute one thing.

    Args:
        makers: from a name to what prepares a call.
        rounds: how often each is timed.
        judges: the first of these that runs is what the others' results are compared with.

    Returns:
        by name the :func:`benchmarks.timing.summary`, the time of the first call and the difference; or why it failed.
    """
    results: dict[str, Any] = {}
    running: dict[str, Timed] = {}
    outputs: dict[str, torch.Tensor] = {}
    for name, make in makers.items():
        try:
            started = time.perf_counter()
            run = make()
            outputs[name] = run()
            torch.cuda.synchronize()
            first = time.perf_counter() - started
            repeats = repeats_of(run, 15, 50)
            results[name] = {"first_call_s": first, "host_us": host_microseconds(run)}
            running[name] = graphed(run, repeats)
        except Exception as error:
            results[name] = {"failure": f"{type(error).__name__}: {error}"[:300]}
    judge = next((outputs[name] for name in judges if name in outputs), None)
    for name, times in interleaved(running, rounds).items():
        results[name] |= summary(running[name], times)
        if judge is not None:
            results[name]["difference"] = float((outputs[name] - judge).float().norm() / judge.float().norm())
    return results


def measure(work: Work, rounds: int, others: tuple[str, ...]) -> dict[str, Any]:
    """Interleaved medians of everybody at one row."""
    torch._dynamo.reset()  # past eight shapes FlexAttention would run uncompiled
    tensors = tensors_of(work)
    names = ("gluon", "triton", *work.peers, *others)
    makers = {name: functools.partial(MAKERS[name], work, tensors) for name in names}
    row: dict[str, Any] = {**asdict(work), "visible": work.visible()}
    row["results"] = race(makers, rounds, ("cudnn", "triton"))
    flops = work.spec().flops({"B": work.batch, "I": work.length}) * row["visible"]
    for result in row["results"].values():
        if "ms" in result:
            result["tflops"] = flops / result["ms"] / 1e9
    return row


def _warm(work: Work, others: tuple[str, ...]) -> None:
    """Fill caches with one row's kernels: called in processes of its own, many at a time."""
    tensors = tensors_of(work)  # Inductor's cache knows sizes
    for name in ("gluon", "triton", *(name for name in ("flex",) if name in work.peers), *others):
        try:
            MAKERS[name](work, tensors)()
        except Exception as error:
            print(f"{work.name}: {error}", flush=True)
    torch.cuda.synchronize()


def warm_up(works: tuple[Work, ...], processes: int, others: tuple[str, ...] = ()) -> None:
    """Compile the kernels of these rows, one for each distinct Spec.

    Args:
        works: the rows.
        processes: that compile at the same time.
        others: further names whose kernels are kept in a cache on disk.
    """
    distinct = {(work.spec().fingerprint(), work.length < 4096, "flex" in work.peers): work for work in works}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
        list(pool.map(functools.partial(_warm, others=others), distinct.values()))


def main() -> None:
    """Measure, print a line for each row, write JSON after each."""
    parser = arguments(__doc__, rounds=9)
    add_processes(parser)
    parser.add_argument("--fa4", action="store_true", help="FlashAttention-4 too; needs flash-attn-4")
    options = parse(parser)
    works = chosen(WORKS, options.rows)
    report = Report(options.output, {"rounds": options.rounds})
    others = ("flash4",) if options.fa4 else ()
    warm_up(works, options.processes, others if os.environ.get(FLASH4_CACHE) == "1" else ())
    for work in works:
        rounds = options.rounds if work.length <= 16384 else max(3, options.rounds // 2)
        row = measure(work, rounds, others)
        report.add(row)
        rates = {name: shown(result, "{tflops:.0f}") for name, result in row["results"].items()}
        worst = max((r.get("difference", 0.0) for r in row["results"].values()), default=math.nan)
        print(f"{work.name}: TF/s {rates}, differences up to {worst:.1e}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
