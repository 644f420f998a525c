"""Block-sparse and neighbourhood attention beside FlexAttention and beside the share of dense work that is visited.

    python -m benchmarks.sparse benchmarks/results/sparse_h200.json [--rows random] [--rounds 9]

``bound`` is the time of our own dense kernel, measured in the same rounds, times the share of the map's tiles of 128
queries and keys that have to be visited; ``share`` is how much of it is reached.

Blocks: a mask is given for blocks of 128 queries and keys, ``blocks[h, i // 128, j // 128]``, at random or in a band
around the diagonal. Our call lists the blocks of each tile anew every time, on the GPU: ``gluon`` includes that,
``gluon, lists given`` does not. FlexAttention's block mask is made beforehand, of full blocks only, as is best for it.

Neighbourhoods: windows over the coordinates of a grid, moved inwards at its borders. ``gluon`` reads tokens in boxes of
the grid where they lie, ``gluon, copies`` moves them before and after, ``gluon, raster`` leaves them in raster order.
FlexAttention runs in raster order and, with copies before and after, in the same order as ours.
"""

from __future__ import annotations

import concurrent.futures
import math
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from attncompile.codegen import gluon
from attncompile.codegen.pytorch.flex import flex_form, flex_source
from attncompile.codegen.triton.cache import load_module
from attncompile.codegen.triton.moved import regrouped_parts
from attncompile.ir import Refusal, Spec, parse_spec
from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.neighbourhood import neighbourhood
from attncompile.ir.rearrange import best_arrangement, read_grid
from benchmarks.kernels import Run, race
from benchmarks.report import Report, add_processes, arguments, chosen, parse, shown

BLOCK = 128
LENGTH = 16384


@dataclass(frozen=True)
class Blocks:
    """A row whose mask is given for blocks.

    Attributes:
        channels: of a head; there are 2048 in all.
        layout: ``random`` or ``band``.
        density: share of the blocks that are visible, about.
    """

    channels: int
    layout: str
    density: float

    @property
    def name(self) -> str:
        """Of the row."""
        return f"{self.layout}-{100 * self.density:.0f}%-d{self.channels}"

    @property
    def heads(self) -> int:
        """Number of heads."""
        return 2048 // self.channels

    def spec(self, mask: str = "blocks[h, i // 128, j // 128]") -> Spec:
        """What is computed; under another mask nothing is loaded."""
        lines = [
            f"work   attend  q,k,v[B,{self.heads},I,{self.channels}]  bfloat16",
            f"score  {self.channels**-0.5!r}·s",
            f"mask   {mask}",
            "norm   softmax (float32)",
            *([f"given  blocks[{self.heads},(I+127)//128,(I+127)//128]:bool"] if "blocks" in mask else []),
        ]
        return parse_spec("\n  ".join(lines))

    def visible(self) -> torch.Tensor:
        """The mask ``[h, i // 128, j // 128]``: in every row of blocks the same number, the diagonal among them."""
        count = LENGTH // BLOCK
        chosen = max(1, round(self.density * count))
        rows = torch.arange(count, device="cuda")
        if self.layout == "band":
            first = (rows - chosen // 2).clamp(0, count - chosen)
            inside = (rows[None] >= first[:, None]) & (rows[None] < first[:, None] + chosen)
            return inside.expand(self.heads, -1, -1).contiguous()
        order = torch.rand(self.heads, count, count, device="cuda")
        order[:, rows, rows] = 2.0
        return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order.topk(chosen, -1).indices, True)


WORKS = tuple(
    Blocks(channels, layout, density)
    for channels in (128, 64)
    for layout in ("random", "band")
    for density in (0.05, 0.1, 0.2, 0.5)
)


@dataclass(frozen=True)
class Window:
    """A row of neighbourhood attention.

    Attributes:
        name: of the row.
        grid, window, stride: of each axis.
        heads, channels: sizes.
    """

    name: str
    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    heads: int
    channels: int

    @property
    def tokens(self) -> int:
        """Tokens of the grid."""
        return math.prod(self.grid)

    def spec(self, mask: str = "") -> Spec:
        """What is computed, or the same under another mask."""
        mask = mask or str(neighbourhood(self.grid, self.window, stride=self.stride))
        lines = [
            f"work   attend  q,k,v[1,{self.heads},{self.tokens},{self.channels}]  bfloat16",
            f"score  {self.channels**-0.5!r}·s",
            f"mask   {mask}",
            "norm   softmax (float32)",
        ]
        return parse_spec("\n  ".join(lines))


WINDOWS = (
    Window("plane-128x128-window-16x16", (128, 128), (16, 16), (1, 1), 16, 128),
    Window("plane-128x128-window-16x16-d64", (128, 128), (16, 16), (1, 1), 32, 64),
    Window("plane-128x128-window-32x32-stride-16x8", (128, 128), (32, 32), (16, 8), 16, 128),
    Window("volume-30x48x80-window-18x24x24", (30, 48, 80), (18, 24, 24), (1, 1, 1), 8, 128),
)


def operands(heads: int, channels: int, length: int = LENGTH) -> list[torch.Tensor]:
    """Query, key and value ``[1, h, i, d]``, stored as ``[b, i, h, d]``."""
    shape = (1, length, heads, channels)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]


def ours(spec: Spec, tensors: list[torch.Tensor]) -> Run:
    """Our generated kernel."""
    return ours_of(gluon.generate(spec, queries=LENGTH), tensors)


def ours_of(module: gluon.HopperModule, tensors: list[torch.Tensor]) -> Run:
    """A generated module."""
    attend = load_module(module).attend
    return lambda: attend(*tensors)


def ours_listed(spec: Spec, tensors: list[torch.Tensor]) -> Run:
    """Our generated kernel, told its lists of key blocks, as layers after the first are that have the same mask."""
    generated = gluon.generate(spec, queries=LENGTH)
    assert generated.list_room is not None
    query, key = tensors[:2]
    words = generated.list_room.words(*query.shape[:3], key.shape[2])
    lists = torch.empty(words, dtype=torch.int32, device=query.device)
    module = load_module(generated)
    module.mask_lists(lists, *tensors)
    return lambda: module.attend(*tensors, lists=lists)


def flex_blocks(tensors: list[torch.Tensor], visible: torch.Tensor) -> Run:
    """Compiled FlexAttention, every visible block marked as full."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    counts = visible.sum(-1, dtype=torch.int32)[None]
    indices = visible.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)[None].contiguous()
    nothing = torch.zeros_like(counts)
    blocks = BlockMask.from_kv_blocks(nothing, indices, counts, indices, BLOCK_SIZE=BLOCK)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(*tensors, block_mask=blocks)


def block_makers(work: Blocks, visible: torch.Tensor) -> dict[str, Callable[[], Run]]:
    """Who computes a row of blocks."""
    tensors = operands(work.heads, work.channels)
    return {
        "dense": lambda: ours(work.spec("true"), tensors),
        "gluon": lambda: ours(work.spec(), [*tensors, visible]),
        "gluon, lists given": lambda: ours_listed(work.spec(), [*tensors, visible]),
        "flex": lambda: flex_blocks(tensors, visible),
    }


BLOCK_NAMES = ("dense", "gluon", "flex")
WINDOW_NAMES = ("dense", "gluon", "gluon, copies", "gluon, raster", "flex", "flex, same order")


Makers = dict[str, Callable[[], Run]]


def without_peers(makers: Makers, alone: bool) -> Makers:
    """Ours only, where that is asked for."""
    return {name: make for name, make in makers.items() if not (alone and "flex" in name)}


def measure_blocks(work: Blocks, rounds: int, alone: bool) -> dict[str, Any]:
    """One row."""
    visible = work.visible()
    makers = without_peers(block_makers(work, visible), alone)
    results = race(makers, rounds, ("flex",))
    density = float(visible.float().mean())
    bound = _with_shares(results, density)
    return {"name": work.name, **asdict(work), "visited": density, "bound_ms": bound, "results": results}


def flex_moved(spec: Spec, tensors: list[torch.Tensor]) -> Run:
    """Compiled FlexAttention; where the Spec moves tokens, by gathers before and after."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    moved = regrouped_parts(spec)
    inner = moved.attention if moved else spec
    attend = inner.attend()
    assert attend is not None
    form = flex_form(attend, inner.types())
    if isinstance(form, Refusal):
        raise ValueError(form.reason)
    namespace: dict[str, Any] = {}
    exec(flex_source(form), namespace)
    score_mod, mask_mod = namespace["make"](torch, {}, {})
    queries, keys = (int(str(inner.types()[name].sizes[2])) for name in (attend.query, attend.key))
    blocks = create_block_mask(mask_mod, None, None, queries, keys, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def places(at: Any, size: int) -> torch.Tensor:
        index = {"i": torch.arange(size, device="cuda")}
        return evaluate(at, Environment(index, {}, device=torch.device("cuda"))).expand(size).clamp(min=0)

    if moved is None:
        return lambda: compiled(*tensors, score_mod=score_mod, block_mask=blocks, scale=1.0)
    sizes = (queries, keys, keys)
    before = [
        places(moved.before[name].at, size)
        for name, size in zip((attend.query, attend.key, attend.value), sizes, strict=True)
    ]
    after = places(moved.after.at, tensors[0].shape[2])

    def run() -> torch.Tensor:
        given = [tensor.index_select(2, index) for tensor, index in zip(tensors, before, strict=True)]
        return compiled(*given, score_mod=score_mod, block_mask=blocks, scale=1.0).index_select(2, after)

    return run


def window_makers(work: Window) -> dict[str, Callable[[], Run]]:
    """Who computes a row of neighbourhood attention."""
    tensors = operands(work.heads, work.channels, work.tokens)
    spec = work.spec()
    moved = gluon.arranged(spec, in_place=True)

    return {
        "dense": lambda: ours(work.spec("true"), tensors),
        "gluon": lambda: ours_of(gluon.generate(moved, queries=work.tokens, in_place=True), tensors),
        "gluon, copies": lambda: ours(moved, tensors),
        "gluon, raster": lambda: ours(spec, tensors),
        "flex": lambda: flex_moved(spec, tensors),
        "flex, same order": lambda: flex_moved(moved, tensors),
    }


def measure_window(work: Window, rounds: int, alone: bool) -> dict[str, Any]:
    """One row."""
    attend = work.spec().attend()
    assert attend is not None
    grid = read_grid(attend.mask, work.tokens)
    assert grid is not None
    order = best_arrangement(grid, BLOCK, BLOCK)
    visited = order.visited / work.tokens**2
    torch._dynamo.reset()  # past eight shapes FlexAttention would run uncompiled
    results = race(without_peers(window_makers(work), alone), rounds, ("flex", "gluon, raster"))
    bound = _with_shares(results, visited)
    boxes = {"query_box": order.queries.box, "key_box": order.keys.box}
    return {"name": work.name, **asdict(work), **boxes, "visited": visited, "visible": _visible(work),
            "bound_ms": bound, "results": results}  # fmt: skip


def _visible(work: Window) -> float:
    """Share of the pairs that the mask leaves."""
    return math.prod(window / size for window, size in zip(work.window, work.grid, strict=True))


def _with_shares(results: dict[str, Any], visited: float) -> float:
    """The bound in ms; adds to each result how much of it is reached."""
    bound = float(results["dense"].get("ms", math.nan)) * visited
    results["dense"].pop("difference", None)
    for name, result in results.items():
        if name != "dense" and "ms" in result:
            result["share"] = bound / result["ms"]
    return bound


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    results = row["results"]
    told = {n: shown(r, "{ms:.3f} ms" + (" ({share:.0%})" if "share" in r else "")) for n, r in results.items()}
    worst = max((r.get("difference", 0.0) for r in results.values()), default=0.0)
    return f"{row['name']}: bound {row['bound_ms']:.3f} ms, {told}, differences up to {worst:.1e}"


def _warm(task: tuple[Blocks | Window, str]) -> None:
    """Fill Triton's and Inductor's caches with what one competitor runs at a row."""
    work, name = task
    begun = time.perf_counter()
    try:
        makers = block_makers(work, work.visible()) if isinstance(work, Blocks) else window_makers(work)
        makers[name]()()
        torch.cuda.synchronize()
        print(f"compiled {work.name}, {name}: {time.perf_counter() - begun:.0f} s", flush=True)
    except Exception as error:
        print(f"{work.name}, {name}: {error}"[:1000], flush=True)


def warm_up(works: tuple[Blocks | Window, ...], processes: int, alone: bool) -> None:
    """Compile the kernels of these rows in processes of their own, many at a time."""
    distinct = {work.channels if isinstance(work, Blocks) else work.name: work for work in works}.values()
    names = {True: BLOCK_NAMES, False: WINDOW_NAMES}
    tasks = [(work, name) for work in distinct for name in names[isinstance(work, Blocks)]]
    tasks = [task for task in tasks if not (alone and "flex" in task[1])]
    tasks.sort(key=lambda task: "flex" not in task[1])  # the slowest first
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
        list(pool.map(_warm, tasks))


def main() -> None:
    """Measure, print a line for each row, write JSON after each."""
    parser = arguments(__doc__, rounds=9)
    add_processes(parser, 12)
    parser.add_argument("--alone", action="store_true", help="without FlexAttention, which takes long to compile")
    options = parse(parser)
    works = chosen((*WORKS, *WINDOWS), options.rows)
    report = Report(options.output, {"rounds": options.rounds})
    warm_up(works, options.processes, options.alone)
    for work in works:
        if isinstance(work, Blocks):
            row = measure_blocks(work, options.rounds, options.alone)
        else:
            row = measure_window(work, options.rounds, options.alone)
        report.add(row)
        print(line(row), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
