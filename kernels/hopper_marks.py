"""Skeleton of the two small kernels that run before a Hopper kernel whose mask has no limits in closed form.

The first lists the key blocks that each tile of queries visits, the second deals the tiles out to thread blocks, the
longest first and the rounds in turn forwards and backwards, so that all get about the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from attncompile.kernels.source import indented, signature


@dataclass(frozen=True)
class Extreme:
    """Least and greatest element of a load over the queries of a tile, or over the keys of each block.

    Attributes:
        axis: ``i`` or ``j``.
        lines, value: source of the load at ``i`` or ``j``.
        low, high: identifiers.
    """

    axis: str
    lines: tuple[str, ...]
    value: str
    low: str
    high: str

    def source(self) -> list[str]:
        """Statements that define both."""
        reduced = 0 if self.axis == "i" else 1
        return [
            *self.lines,
            f"{self.low} = tl.min({self.value}, {reduced})",
            f"{self.high} = tl.max({self.value}, {reduced})",
        ]


@dataclass(frozen=True)
class MarkBlocks:
    """What a mask decides about the kernel that lists blocks.

    Attributes:
        by_head: whether heads differ.
        extremes: of the loads.
        limits: first key that any query of the tile may see, and the key after the last.
        possible: truth value, false only for blocks of which no query sees anything.
        certain: truth value, true only for blocks of which every query sees everything.
        limit_lines, possible_lines, certain_lines: statements that these rely on.
    """

    by_head: bool
    extremes: tuple[Extreme, ...]
    limits: tuple[str, str]
    limit_lines: tuple[str, ...]
    possible_lines: tuple[str, ...]
    possible: str
    certain_lines: tuple[str, ...]
    certain: str

    def texts(self) -> str:
        """All source that names tensors and sizes."""
        loads = [line for each in self.extremes for line in each.source()]
        lines = (*self.limit_lines, *self.possible_lines, *self.certain_lines)
        return "\n".join([*loads, *self.limits, *lines, self.possible, self.certain])

    @classmethod
    def words(cls) -> frozenset[str]:
        """Identifiers that the text uses itself."""
        text = cls(True, (), ("", ""), (), (), "", (), "").source((), ("", "", "")) + HOST
        numbered = " ".join(f"low_element_{n} high_element_{n}" for n in range(16))
        return frozenset(re.findall(r"\w+", text + numbered))

    def source(self, context: Iterable[str], lengths: tuple[str, str, str]) -> str:
        """Both kernels as text.

        Args:
            context: arguments that expressions may read.
            lengths: identifiers of the numbers of heads, queries and keys.
        """
        heads, queries, keys = lengths
        rows = [line for each in self.extremes if each.axis == "i" for line in each.source()]
        columns = [line for each in self.extremes if each.axis == "j" for line in each.source()]
        of_head = [f"b = program // tiles // {heads}", f"h = program // tiles % {heads}"]
        of_batch = ["b = program // tiles", "h = 0"]
        names = [
            "counts",
            "places",
            *context,
            "ROWS: tl.constexpr",
            "ROW_SPACE: tl.constexpr",
            "KEYS: tl.constexpr",
            "CHUNK: tl.constexpr",
        ]
        body = [
            "program = tl.program_id(0)",
            f"tiles = tl.cdiv({queries}, ROWS)",
            f"blocks = tl.cdiv({keys}, KEYS)",
            *(of_head if self.by_head else of_batch),
            "row_first = program % tiles * ROWS",
            f"row_last = tl.minimum(row_first + ROWS, {queries}) - 1",
            "i = tl.minimum(row_first + tl.arange(0, ROW_SPACE), row_last)",
            *rows,
            *self.limit_lines,
            f"start = tl.maximum({self.limits[0]}, 0) // KEYS",
            f"stop = tl.cdiv(tl.minimum({self.limits[1]}, {keys}), KEYS)",
            "places += tl.cast(program, tl.int64) * blocks",
            "edges = 0",
            "full = 0",
            "for first in range(start, stop, CHUNK):",
            *(
                "    " + line
                for line in (
                    "block = first + tl.arange(0, CHUNK)",
                    "key_first = block * KEYS",
                    f"key_last = tl.minimum(key_first + KEYS, {keys}) - 1",
                    f"j = tl.minimum(key_first[:, None] + tl.arange(0, KEYS)[None, :], {keys} - 1)",
                    *columns,
                    *self.possible_lines,
                    f"seen = {self.possible}",
                    "seen = seen & (block < stop)",
                    *self.certain_lines,
                    f"whole = {self.certain}",
                    f"whole = whole & seen & (key_first + KEYS <= {keys})",
                    "edge = seen & (whole == 0)",
                    "edge_rank = tl.cumsum(edge.to(tl.int32), 0) - 1",
                    "whole_rank = tl.cumsum(whole.to(tl.int32), 0) - 1",
                    "tl.store(places + edges + edge_rank, block, mask=edge)",
                    "tl.store(places + blocks - 1 - full - whole_rank, block, mask=whole)",
                    "edges += tl.sum(edge.to(tl.int32), 0)",
                    "full += tl.sum(whole.to(tl.int32), 0)",
                )
            ),
            "tl.store(places, 0, mask=edges + full == 0)  # a tile that sees nothing still visits one block",
            "tl.store(counts + 2 * program, edges)",
            "tl.store(counts + 2 * program + 1, edges + full)",
        ]
        listed = [
            "@triton.jit",
            signature("def mark_blocks", names, ":"),
            '    """One program: the key blocks that a tile of queries visits.',
            "",
            "    Blocks on an edge of the mask are listed from the front, those that every query sees from the back.",
            '    """',
            indented(body, 4),
        ]
        return "\n".join(listed) + "\n\n\n" + ORDER


ORDER = '''\
@triton.jit
def order_tiles(counts, work, tiles, heads, lists, shared, rows, width, SPACE: tl.constexpr):
    """Deal the tiles out. ``lists`` tiles have lists of their own; each stands for those of ``shared`` heads."""
    own = tl.program_id(0) * SPACE + tl.arange(0, SPACE)
    cost = tl.load(counts + 2 * own + 1, mask=own < lists, other=0)
    rank = tl.zeros([SPACE], tl.int32)
    for first in range(0, lists, SPACE):
        other = first + tl.arange(0, SPACE)
        costs = tl.load(counts + 2 * other + 1, mask=other < lists, other=-1)
        ahead = (costs[None, :] > cost[:, None]) | ((costs[None, :] == cost[:, None]) & (other[None, :] < own[:, None]))
        rank += tl.sum(ahead.to(tl.int32), 1)
    for head in range(0, shared):
        group = own // tiles * shared + head
        batch, of_batch = group // heads, group % heads
        tile = (batch.to(tl.int64) << 40) | (of_batch.to(tl.int64) << 24) | (own % tiles)
        place = rank * shared + head
        turn = place // rows
        row = tl.where(turn % 2 == 0, place % rows, rows - 1 - place % rows)
        tl.store(work + row * width + turn, tile, mask=own < lists)'''

HOST = '''\
def block_lists(like, lists, blocks, arguments):
    """Number of blocks on an edge of the mask and of all blocks for each tile, and the blocks' numbers."""
    counts = torch.empty((lists, 2), dtype=torch.int32, device=like.device)
    places = torch.empty((lists, blocks), dtype=torch.int32, device=like.device)
    space = triton.next_power_of_2(BLOCK_I.value)
    mark_blocks[(lists,)](
        counts, places, *arguments, ROWS=BLOCK_I.value, ROW_SPACE=space, KEYS=BLOCK_J.value, CHUNK=16
    )
    return counts, places


def dealt(counts, tiles, heads, shared, rows):
    """The work list of each thread block; see ``order_tiles``."""
    lists = counts.shape[0]
    width = triton.cdiv(lists * shared, rows) + 2
    work = torch.full((rows, width), -1, dtype=torch.int64, device=counts.device)
    order_tiles[(triton.cdiv(lists, 64),)](counts, work, tiles, heads, lists, shared, rows, width, SPACE=64)
    return work'''
