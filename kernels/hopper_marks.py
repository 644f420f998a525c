"""Skeleton of the small kernels that run before a Hopper kernel whose mask has no limits in closed form.

The first looks at what the mask reads of each key, if it does, and keeps the least and the greatest element of each
block. The second lists the key blocks that each tile of queries visits, the third puts the tiles of a head in order,
those that visit most first. A list has room for a fixed number of blocks, so that memory grows with the length and not
with its square; a tile that sees more of them visits every block between its limits, under the mask.
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
        over = "tl.{0}(tl.{0}({1}, 2), 0)" if self.axis == "ij" else "tl.{0}({1}, 0)"
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
    def by_key(self) -> tuple[Extreme, ...]:
        """Those over the keys of each block."""
        return tuple(each for each in self.extremes if each.axis == "j")

    def host(self) -> str:
        """The functions that launch the kernels, as text."""
        lines = [line.partition("  # if ") for line in HOST.splitlines()]
        text = "\n".join(line for line, _, condition in lines if not condition or self.by_key)
        return text.replace("EXTREMES", str(2 * len(self.by_key)))

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
        columns = [line for each in self.extremes if each.axis == "ij" for line in each.source()]
        for number, each in enumerate(self.by_key):
            columns.append(f"{each.low} = tl.load(known + {2 * number})")
            columns.append(f"{each.high} = tl.load(known + {2 * number + 1})")
        if self.by_key:
            columns.insert(0, f"known = extremes + (of_map + tl.minimum(block, blocks - 1)) * {2 * len(self.by_key)}")
        of_head = [f"b = program // tiles // {heads}", f"h = program // tiles % {heads}"]
        of_batch = ["b = program // tiles", "h = 0"]
        names = [
            "counts",
            "places",
            "room",
            *(["extremes"] if self.by_key else []),
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
            *(["of_map = program // tiles * blocks"] if self.by_key else []),
            "edges = 0",
            "full = 0",
            "for first in range(start, stop, CHUNK):",
            *(
                "    " + line
                for line in (
                    "block = first + tl.arange(0, CHUNK)",
                    "key_first = block * KEYS",
                    f"key_last = tl.minimum(key_first + KEYS, {keys}) - 1",
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
        kernels = [*([self._extremes(context, heads, keys)] if self.by_key else []), "\n".join(listed), ORDER]
        return "\n\n\n".join(kernels)

    def _extremes(self, context: Iterable[str], heads: str, keys: str) -> str:
        """The kernel that looks at the keys."""
        width = 2 * len(self.by_key)
        body = [
            "program = tl.program_id(0)",
            f"blocks = tl.cdiv({keys}, KEYS)",
            *([f"b = program // blocks // {heads}", f"h = program // blocks % {heads}"] if self.by_head
              else ["b = program // blocks", "h = 0"]),
            f"j = tl.minimum(program % blocks * KEYS + tl.arange(0, KEYS), {keys} - 1)",
            f"extremes += program * {width}",
        ]  # fmt: skip
        for number, each in enumerate(self.by_key):
            body += [
                *each.source(),
                f"tl.store(extremes + {2 * number}, {each.low})",
                f"tl.store(extremes + {2 * number + 1}, {each.high})",
            ]
        return "\n".join(
            [
                "@triton.jit",
                signature("def key_extremes", ["extremes", *context, "KEYS: tl.constexpr"], ":"),
                '    """One program: the least and the greatest of what the mask reads of the keys of a block."""',
                indented(body, 4),
            ]
        )


ORDER = '''\
@triton.jit
def order_tiles(counts, order, tiles, SPACE: tl.constexpr, CHUNK: tl.constexpr):
    """One program: the places of SPACE tiles among those that lie in one map.

    A tile comes after all that visit more blocks. Of those that visit as many the first queries come first: what they
    read in common stays in the cache. The first element counts the tiles of the first map that visit more than half of
    what its longest visits, see ``listed_tile``.
    """
    parts = tl.cdiv(tiles, SPACE)
    first_of_map = tl.program_id(0) // parts * tiles
    counts += 2 * first_of_map
    own = tl.program_id(0) % parts * SPACE + tl.arange(0, SPACE)
    cost = tl.load(counts + 2 * own + 1, mask=own < tiles, other=0)
    # summed once at the end: a sum over threads takes longer than all else
    passed = tl.zeros([SPACE, CHUNK], tl.int32)
    for first in range(0, tiles, CHUNK):
        other = first + tl.arange(0, CHUNK)
        costs = tl.load(counts + 2 * other + 1, mask=other < tiles, other=-1)
        same = (costs[None, :] == cost[:, None]) & (other[None, :] < own[:, None])
        passed += ((costs[None, :] > cost[:, None]) | same).to(tl.int32)
    tl.store(order + 1 + first_of_map + tl.sum(passed, 1), own, mask=own < tiles)
    if tl.program_id(0) == 0:
        longest = tl.zeros([CHUNK], tl.int32)
        for first in range(0, tiles, CHUNK):
            other = first + tl.arange(0, CHUNK)
            longest = tl.maximum(longest, tl.load(counts + 2 * other + 1, mask=other < tiles, other=0))
        half = tl.max(longest, 0) // 2
        long = tl.zeros([CHUNK], tl.int32)
        for first in range(0, tiles, CHUNK):
            other = first + tl.arange(0, CHUNK)
            long += (tl.load(counts + 2 * other + 1, mask=other < tiles, other=0) > half).to(tl.int32)
        tl.store(order, tl.sum(long, 0))'''

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
def list_parts(memory, like, lists, blocks):
    """For each tile how many blocks lie on an edge of the mask and how many it visits, which, and the tiles' order.

    All in one stretch of memory, each from a multiple of 16 bytes on.
    """
    room = min(blocks, ROOM.value)
    first = triton.cdiv(2 * lists, 4) * 4
    second = first + triton.cdiv(1 + lists, 4) * 4
    if memory is None:
        memory = torch.empty(second + lists * room, dtype=torch.int32, device=like.device)
    places = memory[second : second + lists * room].view(lists, room)
    return memory[: 2 * lists].view(lists, 2), places, memory[first : first + 1 + lists]


def block_lists(counts, places, tiles, blocks, arguments, later=None):
    """Write for each tile how many blocks it visits, and which; see ``mark_blocks``."""
    space, lists = triton.next_power_of_2(BLOCK_I.value), counts.shape[0]
    programs = lists // tiles * blocks  # if by key
    extremes = torch.empty((programs, EXTREMES), dtype=torch.int64, device=counts.device)  # if by key
    launch(key_extremes, (programs,), extremes, *arguments, KEYS=BLOCK_J.value, num_warps=1, later=later)  # if by key
    arguments = extremes, *arguments  # if by key
    launch(
        mark_blocks, (lists,), counts, places, places.shape[1], *arguments, ROWS=BLOCK_I.value, ROW_SPACE=space,
        KEYS=BLOCK_J.value, CHUNK=128, num_warps=1, later=later,
    )


def tile_order(counts, order, tiles, later=None):
    """Write in which order tiles are begun; see ``order_tiles``."""
    programs = counts.shape[0] // tiles * triton.cdiv(tiles, 8)
    launch(order_tiles, (programs,), counts, order, tiles, SPACE=8, CHUNK=128, later=later)'''

RECENT = 8
"""Entries of the work that a thread block remembers: it reads at most two ahead of the one that it computes, and its
producer is at most two tiles ahead of that."""
