"""Block sizes, warps and pipeline stages by head size and dtype.

Chosen so that no kernel of the tested set spills registers on sm_90 and all fit into 160 KiB of shared
memory; on a device with less the launcher lowers the number of stages. What a device is measured to do better
with takes the place of a row: :mod:`attncompile.codegen.triton.tuning`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Tile:
    """How a kernel is launched: queries and keys per block, warps per program, pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class TunedTile:
    """A tile in the place of the one that the table has.

    Attributes:
        kernel: which of a module's kernels.
        element: element type of the operands, such as ``bfloat16``.
        tile: of a decode kernel the queries do not count.
    """

    kernel: Literal["dense", "decode", "scan"]
    element: str
    tile: Tile


def with_tuned(tiles: Mapping[str, Tile], kernel: str, tuned: TunedTile | None) -> dict[str, Tile]:
    """The tiles of a kernel by element type, with the tuned one if it is of this kernel."""
    changed = {tuned.element: tuned.tile} if tuned is not None and tuned.kernel == kernel else {}
    return {**tiles, **changed}


_DENSE: tuple[tuple[int, int, Tile], ...] = (  # head channels up to, bytes of an element
    (64, 2, Tile(128, 64, 4, 3)),
    (128, 2, Tile(128, 64, 8, 3)),
    (256, 2, Tile(64, 32, 8, 3)),
    (32, 4, Tile(64, 32, 4, 2)),
    (64, 4, Tile(32, 32, 4, 2)),
    (128, 4, Tile(32, 32, 8, 2)),
    (256, 4, Tile(16, 16, 4, 2)),
)
_SCAN: tuple[tuple[int, int, Tile], ...] = (  # queries is the chunk, keys the value channels of a program
    (64, 2, Tile(64, 64, 4, 2)),
    (128, 2, Tile(64, 32, 8, 2)),
    (256, 2, Tile(32, 32, 8, 1)),
    (64, 4, Tile(32, 16, 8, 1)),
    (128, 4, Tile(16, 16, 8, 1)),
    (256, 4, Tile(16, 16, 8, 1)),
)

_BACKWARD: tuple[tuple[int, int, dict[str, Tile]], ...] = (  # by what a program computes the gradient of
    (64, 2, {"query": Tile(64, 64, 4, 3), "key": Tile(64, 64, 4, 3), "pair": Tile(64, 64, 8, 1)}),
    (128, 2, {"query": Tile(64, 64, 4, 2), "key": Tile(64, 128, 8, 3), "pair": Tile(64, 64, 8, 1)}),
    (256, 2, {"query": Tile(64, 32, 8, 2), "key": Tile(32, 64, 8, 2), "pair": Tile(32, 32, 8, 1)}),
    (64, 4, {"query": Tile(32, 32, 8, 2), "key": Tile(32, 32, 8, 2), "pair": Tile(32, 32, 8, 1)}),
    (256, 4, {"query": Tile(16, 16, 4, 1), "key": Tile(16, 16, 4, 1), "pair": Tile(16, 16, 4, 1)}),
)

LARGEST_HEAD = 256
LARGEST_WIDE_HEAD = 1024
"""Of the kernel that cuts keys into parts, which also cuts channels into pieces."""


def dense_tile(channels: int, element: int, *, most_keys: int | None = None, heavy: bool = False) -> Tile:
    """The tile of the dense kernel.

    Args:
        channels: the larger of key and value channels, padded to a power of two.
        element: bytes of an element of the values.
        most_keys: upper limit of the keys per block, a power of two.
        heavy: whether score or mask need many registers: more warps then share a tile.
    """
    tile = _find(_DENSE, channels, element)
    warps = 8 if heavy and tile.queries * tile.keys >= 64 * 64 else tile.warps
    return Tile(tile.queries, min(tile.keys, most_keys or tile.keys), warps, tile.stages)


def decode_tile(bytes_of_a_key: int, wide: bool = False, four_bits: bool = False) -> Tile:
    """The tile of the decode kernel: a stage is to hold 32 KiB of stored keys and values, at most 128 of them.

    Args:
        bytes_of_a_key: what one key and its value take, with channels padded as in the tile.
        wide: whether a head is read in pieces: sums of 512 channels for 64 rows take half the registers of 8 warps.
        four_bits: whether all numbers have so many. Taking them apart then takes about as long as reading them, and the
            two warps of a program, with 16 KiB for each stage, wait less for each other than four: 76 µs for 277 MB on
            an H200, where four took 102 and one 80.
    """
    if wide:
        return Tile(16, 16, 8, 2)
    most, keys = (16 if four_bits else 32) * 1024, 128
    while keys > 16 and keys * bytes_of_a_key > most:
        keys //= 2
    return Tile(16, keys, 2 if four_bits else 4, 3)


def scan_tile(channels: int, element: int) -> Tile:
    """The tile of the scan: chunk length and value channels of a program."""
    return _find(_SCAN, channels, element)


def backward_tile(gradient: str, channels: int, element: int) -> Tile:
    """The tile of a backward kernel.

    Args:
        gradient: of what a program computes it: ``query``, ``key`` or ``pair``.
        channels: the larger of key and value channels, padded to a power of two.
        element: bytes of an element of the values.
    """
    return _find(tuple((largest, size, tiles[gradient]) for largest, size, tiles in _BACKWARD), channels, element)


def on_hip(tile: Tile) -> Tile:
    """The tile of a backward kernel on an AMD GPU: with waves of 64 lanes, four of them hold a tile in registers.

    Compiled for gfx942, a kernel with 128 positions of 128 channels keeps 6 KiB on the stack of each lane; this none.
    """
    return Tile(min(tile.queries, 64), min(tile.keys, 64), min(tile.warps, 4), 1)


def _find(table: tuple[tuple[int, int, Tile], ...], channels: int, element: int) -> Tile:
    for largest, size, tile in table:
        if channels <= largest and element == size:
            return tile
    raise ValueError(f"no tile for {channels} channels of {element} bytes; the largest head has {LARGEST_HEAD}")
