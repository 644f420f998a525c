"""How the Hopper kernel divides its work, by head size: measured on an H200 where a row says so."""

from __future__ import annotations

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


def shared_bytes(tile: HopperTile, channels: int, features: int) -> int:
    """Bytes of shared memory of a thread block; channels are padded, elements have 16 bits."""
    query = tile.buffers * tile.queries * channels
    ring = tile.stages * tile.keys * (channels + features)
    out = tile.queries * features if tile.staged else 0
    return 2 * (query + ring + out) + _BARRIERS


def hopper_tile(
    channels: int, features: int, *, light: bool, short: bool = False, keys: int | None = None
) -> HopperTile:
    """The first row that fits.

    Args:
        channels, features: of key and value, padded.
        light: whether score and mask need hardly any registers.
        short: whether there are few queries, under a mask that leaves some of a tile's keys out: a tile of 192 queries
            then wastes more of its work than one of 128.
        keys: of a block, where that is given: a mask may be one number for so many.

    Raises:
        ValueError: when there is none.
    """
    for largest, needs_light, tile in _ROWS:
        fits = max(channels, features) <= largest and shared_bytes(tile, channels, features) <= SHARED_MEMORY
        fits = fits and keys in (None, tile.keys)
        if fits and ((light and not short) or not needs_light):
            return tile
    raise ValueError(f"no tile for {channels} key and {features} value channels")
