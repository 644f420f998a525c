"""How the Hopper kernel divides its work, by head size: measured on an H200 where a row says so."""

from __future__ import annotations

import dataclasses

from attncompile.kernels.hopper import HopperTile

SHARED_MEMORY = 227 * 1024
"""Bytes of shared memory of a thread block on compute capability 9.0."""
_BARRIERS = 1024

SHORT = 4096
"""Fewer queries than this count as short."""

_ROWS: tuple[tuple[int, bool, HopperTile], ...] = (  # channels up to, only for long and light work
    (64, True, HopperTile(3, 128, 2, 2, True, 160, 128, True)),
    (64, False, HopperTile(2, 128, 3, 2, False, 240, 168, True)),
    (128, False, HopperTile(2, 128, 2, 2, True, 240, 168, True, early=True)),
    (256, False, HopperTile(2, 64, 2, 2, True, 240, 168, True)),
    (256, False, HopperTile(2, 64, 2, 1, True, 240, 168, True)),
    (256, False, HopperTile(2, 64, 2, 1, True, 240, 168, False)),
)


_NARROW_ROWS: tuple[tuple[int, bool, HopperTile], ...] = (
    (128, False, HopperTile(2, 128, 3, 2, False, 240, 168, True)),
    (128, False, HopperTile(2, 128, 2, 2, False, 240, 168, True)),
    (256, False, HopperTile(2, 64, 2, 2, True, 240, 168, True)),
    (256, False, HopperTile(2, 64, 2, 1, True, 240, 168, True)),
)
"""Where queries and keys are codes of 8 bits; with values of 8 bits too, weights are held.

Not measured yet. Chosen by registers and instructions: held, no bytes of a step's weights are taken apart and put
together again (96 PRMT instead of 616 at 128 channels); with values of 16 bits that would take more registers than
there are.
"""


def shared_bytes(tile: HopperTile, channels: int, features: int, bytes_of: tuple[int, int] = (2, 2)) -> int:
    """Bytes of shared memory of a thread block; channels are padded.

    Args:
        tile: how the work is divided.
        channels, features: of key and value, padded.
        bytes_of: an element of queries and keys, and of values; results have 16 bits.
    """
    products, values = bytes_of
    query = tile.buffers * tile.queries * channels * products
    ring = tile.stages * tile.keys * (channels * products + features * values)
    out = 2 * tile.queries * features if tile.staged else 0
    return query + ring + out + _BARRIERS


def hopper_tile(
    channels: int,
    features: int,
    *,
    light: bool,
    short: bool = False,
    keys: int | None = None,
    bytes_of: tuple[int, int] = (2, 2),
) -> HopperTile:
    """The first row that fits.

    Args:
        channels, features: of key and value, padded.
        light: whether score and mask need hardly any registers.
        short: whether there are few queries, under a mask that leaves some of a tile's keys out: a tile of 192 queries
            then wastes more of its work than one of 128.
        keys: of a block, where that is given: a mask may be one number for so many.
        bytes_of: an element of queries and keys, and of values.

    Raises:
        ValueError: when there is none.
    """
    for largest, needs_light, tile in _NARROW_ROWS if bytes_of[0] == 1 else _ROWS:
        shared = shared_bytes(tile, channels, features, bytes_of)
        fits = max(channels, features) <= largest and shared <= SHARED_MEMORY
        fits = fits and keys in (None, tile.keys)
        if fits and ((light and not short) or not needs_light):
            return dataclasses.replace(tile, held=bytes_of == (1, 1))
    raise ValueError(f"no tile for {channels} key and {features} value channels")
