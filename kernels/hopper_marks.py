"""Skeleton of the two small kernels that run before a Hopper kernel whose mask has no limits in closed form.

The first lists the key blocks that each tile of queries visits, the second deals the tiles out to thread blocks, the
longest first and the rounds in turn forwards and backwards, so that all get about the same. A list has room for a fixed
number of blocks, so that memory grows with the length and not with its square; a tile that sees more of them visits
every block between its limits, under the mask.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from attncompile.kernels.source import indented, signature

ROOM = 1024
"""Key blocks that the list of a tile has room for: 131072 keys, and 32 bytes for each query."""


@dataclass(frozen=True)
class Cells:
    """Positions that stand for all of a tile: one in each cell of the map in which a load gives one element.

    Attributes:
        number: tells the identifiers apart.
        queries, keys: size of a cell.
        across_queries, across_keys: cells that a tile or a block reaches into at most.
    """

    number: int
    queries: int
    keys: int
    across_queries: int
    across_keys: int

    def source(self) -> list[str]:
        """Statements that define ``i_cell`` and ``j_cell``, shaped ``[cells, blocks, cells]``."""
        rows, columns = (1 << (n - 1).bit_length() for n in (self.across_queries, self.across_keys))
        i, j = f"i_cell_{self.number}", f"j_cell_{self.number}"
        return [
            f"{i} = (row_first // {self.queries} + tl.arange(0, {rows})) * {self.queries}",
            f"{i} = tl.minimum(tl.maximum({i}, row_first), row_last)[:, None, None]",
            f"{j} = (key_first[:, None] // {self.keys} + tl.arange(0, {columns})[None, :]) * {self.keys}",
            f"{j} = tl.minimum(tl.maximum({j}, key_first[:, None]), key_last[:, None])[None, :, :]",
        ]


@dataclass(frozen=True)
class Extreme:
    """Least and greatest element of a load over the queries of a tile, or over the keys of each block, or over both.

    Attributes:
        axis: ``i``, ``j`` or ``ij``.
        lines, value: source of the load at ``i`` or ``j``, or at ``cells``.
        low, high: identifiers.
        cells: positions that stand for all; only for both axes.
    """

    axis: str
    lines: tuple[str, ...]
    value: str
    low: str
    high: str
    cells: Cells | None = None

    def source(self) -> list[str]:
        """Statements that define both."""
        over = {"i": "tl.{0}({1}, 0)", "j": "tl.{0}({1}, 1)", "ij": "tl.{0}(tl.{0}({1}, 2), 0)"}[self.axis]
        return [
            *(self.cells.source() if self.cells else []),
            *self.lines,
            f"{self.low} = {over.format('min', self.value)}",
            f"{self.high} = {over.format('max', self.value)}",
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

    @property
    def chunk(self) -> int:
        """Key blocks that are looked at together: fewer where the keys of each are read."""
        return 16 if any(each.axis == "j" for each in self.extremes) else 128

    @classmethod
    def words(cls) -> frozenset[str]:
        """Identifiers that the text uses itself."""
        text = cls(True, (), ("", ""), (), (), "", (), "").source((), ("", "", "")) + HOST + KEPT
        numbered = " ".join(f"low_element_{n} high_element_{n} i_cell_{n} j_cell_{n}" for n in range(16))
        return frozenset(re.findall(r"\w+", text + numbered))

    def source(self, context: Iterable[str], lengths: tuple[str, str, str]) -> str:
        """Both kernels as text.

        Args:
            context: arguments that expressions may read.
            lengths: identifiers of the numbers of heads, queries and keys.
        """
        heads, queries, keys = lengths
        rows = [line for each in self.extremes if each.axis == "i" for line in each.source()]
        columns = [line for each in self.extremes if each.axis != "i" for line in each.source()]
        of_head = [f"b = program // tiles // {heads}", f"h = program // tiles % {heads}"]
        of_batch = ["b = program // tiles", "h = 0"]
        names = [
            "counts",
            "places",
            "room",
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
            "places += tl.cast(program, tl.int64) * room",
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
                    "tl.store(places + edges + edge_rank, block, mask=edge & (edges + edge_rank < room))",
                    "from_end = full + whole_rank",
                    "tl.store(places + room - 1 - from_end, block, mask=whole & (from_end < room))",
                    "edges += tl.sum(edge.to(tl.int32), 0)",
                    "full += tl.sum(whole.to(tl.int32), 0)",
                )
            ),
            "visited = edges + full",
            "# A tile that sees nothing still visits one block, under the mask.",
            "tl.store(places, 0, mask=visited == 0)",
            "edges = tl.where(visited == 0, 1, edges)",
            "visited = tl.maximum(visited, 1)",
            "# More than there is room for: all between the limits, from the block whose number is -1 - edges.",
            "edges = tl.where(visited > room, -1 - start, edges)",
            "visited = tl.where(visited > room, stop - start, visited)",
            "tl.store(counts + 2 * program, edges)",
            "tl.store(counts + 2 * program + 1, visited)",
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
def order_tiles(counts, work, tiles, heads, lists, shared, rows, width, SPACE: tl.constexpr, CHUNK: tl.constexpr):
    """Deal the tiles out. ``lists`` tiles have lists of their own; each stands for those of ``shared`` heads.

    A tile comes after all that visit more blocks. Of those that visit as many the tiles of one head stand together, in
    the order of their queries: what they read in common stays in the cache.
    """
    own_first = tl.program_id(0) * SPACE
    own = own_first + tl.arange(0, SPACE)
    cost = tl.load(counts + 2 * own + 1, mask=own < lists, other=0)
    near = tl.load(counts + 2 * own + 1, mask=own < lists, other=-1)
    same = (near[None, :] == cost[:, None]) & (own[None, :] < own[:, None])
    ahead = tl.sum(((near[None, :] > cost[:, None]) | same).to(tl.int32), 1)
    # summed once at the end: a sum over threads takes longer than all else
    passed = tl.zeros([SPACE, CHUNK], tl.int32)
    for first in range(0, tl.minimum(own_first, lists), CHUNK):
        other = first + tl.arange(0, CHUNK)
        costs = tl.load(counts + 2 * other + 1, mask=other < tl.minimum(own_first, lists), other=-1)
        passed += (costs[None, :] >= cost[:, None]).to(tl.int32)
    for first in range(own_first + SPACE, lists, CHUNK):
        other = first + tl.arange(0, CHUNK)
        costs = tl.load(counts + 2 * other + 1, mask=other < lists, other=-1)
        passed += (costs[None, :] > cost[:, None]).to(tl.int32)
    ahead += tl.sum(passed, 1)
    equal = tl.zeros([SPACE], tl.int32)
    longer = ahead
    if shared > 1:
        longer = tl.zeros([SPACE], tl.int32)
        for first in range(0, lists, CHUNK):
            other = first + tl.arange(0, CHUNK)
            costs = tl.load(counts + 2 * other + 1, mask=other < lists, other=-1)
            longer += tl.sum((costs[None, :] > cost[:, None]).to(tl.int32), 1)
            equal += tl.sum((costs[None, :] == cost[:, None]).to(tl.int32), 1)
    for head in range(0, shared):
        group = own // tiles * shared + head
        batch, of_batch = group // heads, group % heads
        tile = (batch.to(tl.int64) << 40) | (of_batch.to(tl.int64) << 24) | (own % tiles)
        place = longer * shared + head * equal + ahead - longer
        turn = place // rows
        row = tl.where(turn % 2 == 0, place % rows, rows - 1 - place % rows)
        tl.store(work + row * width + turn, tile, mask=own < lists)
    # what is left of each row says that the work is done
    place = lists * shared + own
    turn = place // rows
    row = tl.where(turn % 2 == 0, place % rows, rows - 1 - place % rows)
    tl.store(work + row * width + turn, tl.full([SPACE], -1, tl.int64), mask=turn < width)'''

KEPT = '''\
KEPT = {}


def kept_lists(device, *sizes, make):
    """Lists and work for these sizes: the mask loads nothing, so they are made once and kept."""
    key = (device, *sizes)
    if key not in KEPT:
        made = make()
        if torch.cuda.is_current_stream_capturing() or len(KEPT) >= 256:
            return made  # in a graph they are there when it runs, not before
        torch.cuda.current_stream(device).synchronize()  # other streams read them too
        KEPT[key] = made
    return KEPT[key]'''
"""Where a mask loads nothing: its lists depend on sizes alone."""

HOST = '''\
def list_parts(memory, like, lists, shared, blocks, rows):
    """For each tile how many blocks lie on an edge of the mask and how many it visits, which, and who computes it.

    All in one stretch of memory, each from a multiple of 16 bytes on.
    """
    room, width = min(blocks, ROOM.value), triton.cdiv(lists * shared, rows) + 2
    first = triton.cdiv(2 * rows * width, 4) * 4
    second = first + triton.cdiv(2 * lists, 4) * 4
    if memory is None:
        memory = torch.empty(second + lists * room, dtype=torch.int32, device=like.device)
    counts = memory[first : first + 2 * lists].view(lists, 2)
    places = memory[second : second + lists * room].view(lists, room)
    return counts, places, memory[: 2 * rows * width].view(torch.int64).view(rows, width)


def block_lists(counts, places, arguments):
    """Write for each tile how many blocks it visits, and which; see ``mark_blocks``."""
    space = triton.next_power_of_2(BLOCK_I.value)
    launch(
        mark_blocks, (counts.shape[0],), counts, places, places.shape[1], *arguments, ROWS=BLOCK_I.value,
        ROW_SPACE=space, KEYS=BLOCK_J.value, CHUNK=CHUNK.value, num_warps=1 if CHUNK.value > 16 else 4,
    )


def deal(counts, work, tiles, heads, shared):
    """Write the work list of each thread block; see ``order_tiles``."""
    lists, (rows, width) = counts.shape[0], work.shape
    programs = triton.cdiv(max(lists, rows * width - lists * shared), 8)
    launch(
        order_tiles, (programs,), counts, work, tiles, heads, lists, shared, rows, width, SPACE=8, CHUNK=1024
    )'''

MOST_PROCESSORS = 256
"""Thread blocks that the work is dealt to at most: what lists take is known without a GPU."""
