"""``key_blocks`` and ``block_start`` of the Hopper kernel: which key blocks a tile of queries visits, in what order.

Blocks on an edge of the mask come first, those that every query sees in full last.
"""

from __future__ import annotations

from attncompile.kernels.dense import KeyRuns
from attncompile.kernels.hopper_lines import tidy
from attncompile.kernels.hopper_marks import MarkBlocks
from attncompile.kernels.source import signature

LISTED = ("edges", "first_start", "turned", "listed", "crowded")
"""What ``key_blocks`` returns after the number of blocks where they are listed beforehand."""

COUNTED = ("listed_edges", "listed_blocks", "front", "back")
"""What ``counted`` loads for ``key_blocks``."""

_LOCAL = "row room place taken maps long own rest rank group"
LISTS = (*LISTED, *COUNTED, "counted", "first_block", "listed_tile", "claimed_tile", *_LOCAL.split())
"""Identifiers of the functions that read lists."""


def known(runs: KeyRuns, marks: MarkBlocks | None) -> tuple[str, ...]:
    """What ``key_blocks`` returns after the number of blocks."""
    if marks:
        return LISTED
    first = ("first_start", "first_count") if runs.first else ()
    if runs.everything:
        return ("edges", "main_start", "full_start")
    return ("edges", "main_start", *first, *(("before", "full_start", "full_stop") if runs.full else ()))


def visited_blocks(runs: KeyRuns, context: tuple[str, ...], lengths: tuple[str, str, str]) -> str:
    """``key_blocks`` and ``block_start``: which key blocks a tile visits, those on an edge of the mask first."""
    keys = lengths[2]
    lines = [f"row_last = gl.minimum(row_first + BLOCK_I, {lengths[1]}) - 1", *runs.lines]
    places = ["start = main_start + number * BLOCK_J"]
    terms: list[str] = []
    if runs.everything:
        lines = [
            "# Only the last block, if keys do not fill it, is an edge.",
            f"main_start = {keys} // BLOCK_J * BLOCK_J",
            f"edges = gl.cdiv({keys}, BLOCK_J) - {keys} // BLOCK_J",
            "full_start = 0",
            f"blocks = gl.cdiv({keys}, BLOCK_J)",
        ]
    else:
        lines += [f"main_start = {_aligned(runs.main[0])}", f"main_stop = gl.maximum({runs.main[1]}, main_start)"]
    if runs.first:
        lines += [
            "# A range before it, as far as it does not reach into it.",
            f"first_start = {_aligned(runs.first[0])}",
            f"first_stop = gl.minimum(gl.cdiv({runs.first[1]}, BLOCK_J) * BLOCK_J, main_start)",
            "first_count = gl.maximum(first_stop - first_start, 0) // BLOCK_J",
        ]
        terms.append("first_count")
        places = [
            "start = first_start + number * BLOCK_J",
            "start += gl.where(number >= first_count, main_start - first_start - first_count * BLOCK_J, 0)",
        ]
    if runs.full and not runs.everything:
        lines += [
            "# Without a mask: full_start to full_stop.",
            f"full_start = gl.cdiv(gl.maximum({runs.full[0]}, main_start), BLOCK_J) * BLOCK_J",
            "full_start = gl.minimum(full_start, gl.cdiv(main_stop, BLOCK_J) * BLOCK_J)",
            f"full_stop = gl.minimum({runs.full[1]}, main_stop) // BLOCK_J * BLOCK_J",
            "full_stop = gl.maximum(full_stop, full_start)",
            "before = (full_start - main_start) // BLOCK_J",
            "after = gl.cdiv(gl.maximum(main_stop - full_stop, 0), BLOCK_J)",
        ]
        passed = " + ".join([*terms, "before"])
        places.append(f"start += gl.where(number >= {passed}, full_stop - full_start, 0)")
        terms += ["before", "after"]
    elif not runs.full:
        terms.append("gl.cdiv(main_stop - main_start, BLOCK_J)")
    if runs.full:
        places.append("start = gl.where(number < edges, start, full_start + (number - edges) * BLOCK_J)")
    if not runs.everything:
        lines.append(f"edges = {' + '.join(terms)}")
        lines.append("blocks = edges + (full_stop - full_start) // BLOCK_J" if runs.full else "blocks = edges")
    return _placed(lines, places, known(runs, None), context)


def listed_blocks(marks: MarkBlocks, context: tuple[str, ...], lengths: tuple[str, str, str]) -> str:
    """The functions that read what ``mark_blocks`` and ``order_tiles`` wrote: tiles, and the blocks of each.

    Thread blocks take tiles as they come to need them. The long ones come head by head, so that keys and values of few
    heads have to stay in the cache: the longest of all heads first would read them from memory again and again. The
    short ones of all heads come last, so that all thread blocks end at about the same time, though each knows two tiles
    beforehand.
    """
    heads, queries, keys = lengths
    of_head = f"b * {heads} + h" if marks.by_head else "b"
    row = [
        f"row = ({of_head}) * gl.cdiv({queries}, BLOCK_I) + row_first // BLOCK_I",
        f"room = gl.minimum(gl.cdiv({keys}, BLOCK_J), ROOM)",
        "listed = places + gl.cast(row, gl.int64) * room",
    ]
    tile = [
        "@gluon.jit",
        signature("def listed_tile", ["place", "tile_count", *context], ":"),
        '    """An entry of the work: head by head the long tiles, the longest first, then the others; then −1."""',
        f"    tiles = gl.cdiv({queries}, BLOCK_I)",
        "    maps = tile_count // tiles",
        "    long = gl.load(order)",
        "    own = gl.minimum(place, tile_count - 1)",
        "    rest = gl.maximum(own - long * maps, 0)",
        "    rank = gl.where(own < long * maps, own % long, long + rest // maps)",
        "    group = gl.where(own < long * maps, own // long, rest % maps)",
        f"    b, h = group // {heads}, group % {heads}",
        f"    tile = gl.cast(gl.load(order + 1 + ({of_head}) * tiles + rank), gl.int64)",
        "    tile = (gl.cast(b, gl.int64) << 40) | (gl.cast(h, gl.int64) << 24) | tile",
        "    return gl.where(place < tile_count, tile, -1)",
    ]
    claimed = [
        "@gluon.jit",
        signature("def claimed_tile", ["work", "tile_count", *context], ":"),
        '    """The next entry of the work that no thread block has taken; the first two of each are known."""',
        '    taken = gl.atomic_add(work - (gl.program_id(0) + 1) * RECENT, 1, sem="relaxed")',
        "    place = 2 * gl.num_programs(0) + gl.cast(taken, gl.int32)",
        f"    return {signature('listed_tile', ['place', 'tile_count', *context], '', inside=11)}",
    ]
    counted = [
        "@gluon.jit",
        signature("def counted", ["tile", *context], ":"),
        '    """What ``key_blocks`` needs from memory for an entry of the work list; loaded long before it is read."""',
        "    row_first, b, h = unpacked(gl.maximum(tile, 0))",
        *(f"    {line}" for line in row),
        "    edges, blocks = gl.load(counts + 2 * row), gl.load(counts + 2 * row + 1)",
        "    return edges, blocks, gl.load(listed), gl.load(listed + room - 1)",
    ]
    first = [
        "@gluon.jit",
        signature("def first_block", COUNTED, ":"),
        '    """First key of the block that a tile visits first."""',
        "    crowded = -1 - listed_edges",
        "    return gl.where(crowded >= 0, crowded, gl.where(listed_edges != 0, front, back)) * BLOCK_J",
    ]
    known = [
        *row,
        "# Where a list has no room for all blocks, this is the first of them; negative elsewhere.",
        "crowded = -1 - listed_edges",
        "edges = gl.where(crowded >= 0, listed_blocks, listed_edges)",
        "# The edges stand at the front of the row, the others at its end, in falling order.",
        "turned = edges + room - 1",
        "first_start = first_block(listed_edges, listed_blocks, front, back)",
        "blocks = listed_blocks",
    ]
    place = [
        "place = gl.where(number < edges, number, turned - number)",
        "# One past the last block may be asked for.",
        "start = gl.load(listed + gl.where(crowded < 0, gl.maximum(place, 0), 0))",
        "start = gl.where(crowded < 0, start, crowded + number) * BLOCK_J",
    ]
    functions = [tidy(lines) for lines in (tile, claimed, counted, first)]
    return "\n\n\n".join([*functions, _placed(known, place, LISTED, context, COUNTED)])


def _placed(
    lines: list[str], places: list[str], known: tuple[str, ...], context: tuple[str, ...], loaded: tuple[str, ...] = ()
) -> str:
    counted = [
        "@gluon.jit",
        signature("def key_blocks", ["row_first", "b", "h", *loaded, *context], ":"),
        '    """How many key blocks a tile visits (at least one), and what ``block_start`` needs."""',
        *(f"    {line}" for line in lines),
        f"    return gl.maximum(blocks, 1), {', '.join(known)}",
    ]
    placed = [
        "@gluon.jit",
        signature("def block_start", ["number", *known], ":"),
        '    """First key of a block; blocks on an edge of the mask come first."""',
        *(f"    {line}" for line in places),
        "    return start",
    ]
    return tidy(counted) + "\n\n\n" + tidy(placed)


def _aligned(start: str) -> str:
    """The start of the key block that holds a key (never a negative one)."""
    return start if start == "0" else f"({start}) // BLOCK_J * BLOCK_J"
