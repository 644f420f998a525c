"""One query over a long cache, beside what people call today, in one run.

    python -m benchmarks.decode benchmarks/results/decode_h200.json [--rows 32k] [--rounds 9] [--sweep int4-32k]

Reading the cache is nearly all the work, so rates are cache bytes a second, beside those of a plain copy on the device
in the same run (read and written bytes). Peers: cuDNN and FlashAttention-2 through PyTorch's SDPA, FlexAttention
compiled. Every round runs each of them once as a replayed CUDA graph; medians are reported. The cache in a narrow type
is compared with the same numbers, dequantised in bfloat16. ``--sweep`` tries other tiles and numbers of parts.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, Literal
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attncompile.codegen.triton import generate
from attncompile.codegen.triton.cache import load_module
from attncompile.ir import Spec, parse_spec
from attncompile.ir.storage import narrow, unpack
from benchmarks.report import Report, arguments, chosen, parse, shown
from benchmarks.timing import Timed, graphed, interleaved, milliseconds, summary

Storage = Literal["bfloat16", "float8_e4m3", "int8", "int4"]
Run = Callable[[], torch.Tensor]
COPIED = 1 << 30
"""Bytes of the copy that stands for the memory's bandwidth."""

PAGE = 16


@dataclass(frozen=True)
class Work:
    """One row: sizes, how the cache is stored, and whether it lies in pages."""

    name: str
    batch: int
    keys: int
    storage: Storage = "bfloat16"
    paged: bool = False
    heads: int = 32
    groups: int = 8
    channels: int = 128
    queries: int = 1

    def spec(self) -> Spec:
        """The Spec; keys have a scale per channel, values one per token."""
        D, G = self.channels, self.groups
        lines = [self.name]
        given = []
        store, bits, width = ("uint8", 4, D // 2) if self.storage == "int4" else (self.storage, 8, D)
        for name, index, shape in (("k", "b, g, d", f"B,{G},{D}"), ("v", "b, g, j", f"B,{G},J")):
            stored = f"{name}_codes" if self.storage != "bfloat16" else name
            if self.paged:
                lines += [
                    f"  gather  {name}_pages[P,{PAGE},{G},{width}]  {store}",
                    f"    at     block_table[b, j // {PAGE}], j % {PAGE}, g, d",
                    f"    sizes  B, {G}, {PAGE}·M, {width}",
                    f"    out    {stored}",
                ]
            if self.storage != "bfloat16":
                lines += [
                    f"  dequantize  {stored}" + ("" if self.paged else f"[B,{G},J,{width}]  {store}"),
                    f"    scale  {name}_scale[{index}]",
                    f"    bits   {bits}",
                    "    dtype  bfloat16",
                    f"    out    {name}",
                ]
                given.append(f"  given  {name}_scale[{shape}]:float32")
        made = self.paged or self.storage != "bfloat16"
        keys = "k  v" if made else f"k,v[B,{G},J,{D}]"
        lines += [
            f"  attend  q[B,{self.heads},I,{D}]  {keys}  bfloat16",
            f"    score  {D**-0.5!r}·s",
            "    mask   " + ("j ≤ i + lengths[b] − I" if self.paged else "j ≤ i + J − I"),
            f"    kv_head h // {self.heads // G}",
            "    norm   softmax (float32)",
            *given,
            *(["  given  block_table[B,M]:int32", "  given  lengths[B]:int32"] if self.paged else []),
        ]
        return parse_spec("\n".join(lines))

    def cache_bytes(self) -> int:
        """Bytes of keys and values, scales included."""
        numbers = 2 * self.batch * self.groups * self.keys * self.channels
        narrow_bytes = {"bfloat16": 2.0, "float8_e4m3": 1.0, "int8": 1.0, "int4": 0.5}[self.storage]
        scales = 0 if self.storage == "bfloat16" else 4 * self.batch * self.groups * self.keys
        return int(numbers * narrow_bytes) + scales


WORKS: tuple[Work, ...] = (
    *(
        Work(f"{storage}-32k", 8, 32768, storage)
        for storage in ("bfloat16", "float8_e4m3", "int8", "int4")  # type: ignore[arg-type]
    ),
    Work("bfloat16-32k-paged", 8, 32768, paged=True),
    Work("bfloat16-4k", 32, 4096),
    Work("int4-4k", 32, 4096, "int4"),
    Work("bfloat16-128k-one-row", 1, 131072),
    Work("bfloat16-32k-16-queries", 8, 32768, queries=16),
)


def inputs_of(work: Work) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Inputs of the Spec by name, and query, key and value in bfloat16 for the peers."""
    shape = (work.batch, work.groups, work.keys, work.channels)
    query = torch.randn(work.batch, work.heads, work.queries, work.channels, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    made: dict[str, torch.Tensor] = {"q": query}
    if work.paged:
        made["lengths"] = torch.full((work.batch,), work.keys, device="cuda", dtype=torch.int32)
        pages = work.batch * work.keys // PAGE
        order = torch.randperm(pages, device="cuda")
        made["block_table"] = order.reshape(work.batch, -1).to(torch.int32)
    real = []
    for name, tensor in (("k", key), ("v", value)):
        stored = tensor
        if work.storage != "bfloat16":
            found = narrow(tensor, work.storage, "channel" if name == "k" else "token")
            stored, made[f"{name}_scale"] = found.codes, found.scale
            codes = unpack(stored) if work.storage == "int4" else stored
            scale = found.scale[:, :, None] if name == "k" else found.scale[..., None]
            tensor = (codes.to(torch.bfloat16) * scale).to(torch.bfloat16)
        real.append(tensor)
        if work.paged:
            laid = torch.empty(pages, PAGE, work.groups, stored.shape[-1], device="cuda", dtype=stored.dtype)
            laid[order] = stored.transpose(1, 2).reshape(laid.shape)
            made[f"{name}_pages"] = laid
        else:
            made[f"{name}_codes" if work.storage != "bfloat16" else name] = stored
    return made, (query, real[0], real[1])


def competitors(
    work: Work, module: ModuleType, given: list[torch.Tensor], plain: tuple[torch.Tensor, ...]
) -> dict[str, Run]:
    """What is timed in a row."""
    query, key, value = plain
    found: dict[str, Run] = {"generated": lambda: module.attend(*given)}

    def sdpa(backend: SDPBackend) -> Run:
        def run() -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(query, key, value, enable_gqa=True)

        return run

    if work.queries == 1 and work.storage == "bfloat16":
        found["cudnn"] = sdpa(SDPBackend.CUDNN_ATTENTION)
        found["flash"] = sdpa(SDPBackend.FLASH_ATTENTION)
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        found["flex"] = lambda: compiled(query, key, value, enable_gqa=True)
    return found


def relative_error(output: torch.Tensor, plain: tuple[torch.Tensor, ...]) -> float:
    """Against SDPA's mathematics in float32 over the first batch row, whose last query sees all."""
    query, key, value = (tensor[:1].float() for tensor in plain)
    with sdpa_kernel(SDPBackend.MATH):
        exact = scaled_dot_product_attention(query[:, :, -1:], key, value, enable_gqa=True)
    return float((output[:1, :, -1:].float() - exact).norm() / exact.norm())


def copy_rate(rounds: int) -> float:
    """Bytes a second, read and written, of a copy on the device."""
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source), 5) for _ in range(rounds)]
    return 2 * COPIED / statistics.median(times) * 1e3


def measure(work: Work, rounds: int, sweep: str | None) -> dict[str, Any]:
    """Interleaved medians of all competitors of a row."""
    spec = work.spec()
    module = load_module(generate(spec))
    made, plain = inputs_of(work)
    given = [made[value.name] for value in spec.inputs]
    row: dict[str, Any] = {**asdict(work), "cache_bytes": work.cache_bytes(), "results": {}}
    running: dict[str, Timed] = {}
    for name, run in competitors(work, module, given, plain).items():
        try:
            row["results"][name] = {"error": relative_error(run(), plain)}
            running[name] = graphed(run, 3)
        except Exception as error:
            row["results"][name] = {"failure": str(error)[:300]}
    for name, times in interleaved(running, rounds, runs=2).items():
        found = summary(running[name], times)
        row["results"][name] |= {**found, "gb_per_s": work.cache_bytes() / found["ms"] / 1e6}
    if sweep is not None:
        row["sweep"] = swept(module, given, tiles=bool(sweep) and sweep in work.name)
    return row


def swept(module: ModuleType, given: list[torch.Tensor], tiles: bool) -> list[dict[str, Any]]:
    """Times with other numbers of waves and, if asked for, other tiles, warps and stages; the best first."""
    usual = module.DECODE_TILES[torch.bfloat16]
    shapes = [*itertools.product((64, 128), (4, 8), (2, 3, 4))] if tiles else [usual]
    tried = []
    for shape in shapes:
        for waves in (1, 2, 3, 4):
            changes: dict[str, Any] = {"DECODE_TILES": {torch.bfloat16: shape}, "WAVES": waves}
            with mock.patch.multiple(module, **changes):
                try:
                    timed = graphed(lambda: module.attend(*given), 3)
                    taken = statistics.median(timed.milliseconds() for _ in range(4))
                except Exception:
                    break  # too much shared memory
            named = dict(zip(("keys", "warps", "stages"), shape, strict=True))
            tried.append({**named, "waves": waves, "ms": taken, "timed": timed.timed})
    return sorted(tried, key=lambda each: float(each["ms"]))[:24]


def main() -> None:
    """Measure, print a line for each row, write JSON after each."""
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--sweep", help="try other numbers of parts, and other tiles for rows with this in their names")
    options = parse(parser)
    copied = copy_rate(options.rounds) / 1e9
    report = Report(options.output, {"rounds": options.rounds, "copy_gb_per_s": copied})
    for work in chosen(WORKS, options.rows):
        row = measure(work, options.rounds, options.sweep)
        torch.cuda.empty_cache()
        for result in row["results"].values():
            if "ms" in result:
                result["of_copy"] = result["gb_per_s"] / copied
        report.add(row)
        times = {name: shown(result, "{ms:.3f} ms {of_copy:.0%}") for name, result in row["results"].items()}
        print(f"{work.name}: {times}", *row.get("sweep", [])[:4], flush=True)


if __name__ == "__main__":
    main()
