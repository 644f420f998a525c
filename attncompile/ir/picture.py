"""Small pictures of a mask: characters for a terminal, SVG for a page, PNG for everything else.

All three draw one block map: queries downward, keys to the right; dark where all is visible, light where part
is, blank where nothing is. Nothing but the standard library is needed.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from attncompile.ir.blocks import block_map
from attncompile.ir.expr import Expr
from attncompile.ir.intervals import Interval, Visibility

Tiles = np.ndarray[Any, np.dtype[np.int8]]

COLOURS = {Visibility.NONE: "#f2f2ee", Visibility.MIXED: "#a9c8de", Visibility.ALL: "#2f6f9f"}
"""What a tile looks like in SVG and PNG."""


def mask_tiles(
    mask: Expr,
    query_length: int,
    key_length: int,
    *,
    columns: int = 32,
    ranges: Mapping[str, Interval] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> Tiles:
    """The mask as at most ``columns`` square tiles along its longer side; arguments as for ``block_map``."""
    block = max(1, math.ceil(max(query_length, key_length) / columns))
    return block_map(
        mask,
        query_length,
        key_length,
        block_query=block,
        block_key=block,
        ranges=ranges,
        tensors=tensors,
    ).visibility


_HALVES = {  # the upper and the lower tile of one character
    (Visibility.NONE, Visibility.NONE): " ",
    (Visibility.ALL, Visibility.NONE): "▀",
    (Visibility.NONE, Visibility.ALL): "▄",
    (Visibility.ALL, Visibility.ALL): "█",
}


def picture(
    mask: Expr,
    query_length: int,
    key_length: int,
    *,
    columns: int = 32,
    ranges: Mapping[str, Interval] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> str:
    """The mask as text: half-blocks where all is visible, ``░`` where part is, blank where nothing is.

    A character holds two tiles, one above the other, as characters are twice as high as wide.
    """
    return drawn_text(mask_tiles(mask, query_length, key_length, columns=columns, ranges=ranges, tensors=tensors))


def drawn_text(tiles: Tiles) -> str:
    """Tiles as text, two rows of them to a line."""
    rows = [*tiles, np.full(tiles.shape[1], Visibility.NONE)] if len(tiles) % 2 else list(tiles)
    lines = [
        "".join(_HALVES.get((Visibility(upper), Visibility(lower)), "░") for upper, lower in pair)
        for pair in (zip(rows[n], rows[n + 1], strict=True) for n in range(0, len(rows), 2))
    ]
    return "\n".join(lines)


def drawn_svg(tiles: Tiles, *, side: int = 4, label: str = "visible keys per query") -> str:
    """Tiles as an SVG image of its own, ``side`` pixels a tile."""
    height, width = tiles.shape[0] * side, tiles.shape[1] * side
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
        f'<rect width="{width}" height="{height}" fill="{COLOURS[Visibility.NONE]}"/>'
        f"{''.join(_rectangles(tiles, side))}</svg>"
    )


def _rectangles(tiles: Tiles, side: int) -> Iterator[str]:
    """One rectangle for each run of equal tiles in a row."""
    for row, values in enumerate(tiles):
        edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
        for start, end in pairwise(edges):
            found = Visibility(int(values[start]))
            if found is not Visibility.NONE:
                yield (
                    f'<rect x="{start * side}" y="{row * side}" width="{(end - start) * side}" '
                    f'height="{side}" fill="{COLOURS[found]}"/>'
                )


def drawn_png(tiles: Tiles, *, side: int = 4) -> bytes:
    """Tiles as a PNG image with a palette, ``side`` pixels a tile (ISO/IEC 15948)."""
    pixels = np.repeat(np.repeat(tiles.astype(np.uint8), side, axis=0), side, axis=1)
    height, width = pixels.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels], axis=1)  # filter 0 before each line
    palette = b"".join(bytes.fromhex(COLOURS[found].removeprefix("#")) for found in Visibility)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", palette),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    )
    written = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)
