"""How the Hopper kernel divides its work, by head size: measured on an H200 where a row says so."""

from __future__ import annotations

from dataclasses import dataclass

from attncompile.kernels.hopper import HopperTile

SHARED_MEMORY = 227 * 1024
"""Bytes of shared memory of a thread block on compute capability 9.0."""
_BARRIERS = 1024

E4M3 = "float8_e4m3"
Codes = tuple[str | None, str | None]
"""What queries and keys, and what values are rounded to; ``None``: not at all."""

SHORT = 4096
"""Fewer queries than this count as short."""

@dataclass(frozen=True)
class _Row:
    """A tile, and the work it is for.

    Attributes:
        channels: at most so many.
        tile: how the work is divided.
        light: only long and light work.
        sinks: only rows of queries with sinks, or only those without; ``None``: both.
    """

    channels: int
    tile: HopperTile
    light: bool = False
    sinks: bool | None = None


_ROWS: tuple[_Row, ...] = (
    _Row(64, HopperTile(3, 128, 2, 2, True, 160, 128, True, early=True), light=True, sinks=True),
    _Row(64, HopperTile(3, 128, 2, 2, True, 160, 128, True, settled=True), light=True),
    _Row(64, HopperTile(2, 128, 3, 2, False, 240, 168, True, chains=True)),
    _Row(128, HopperTile(2, 128, 2, 2, True, 240, 168, True, early=True), light=True, sinks=False),
    _Row(128, HopperTile(2, 128, 2, 2, True, 240, 168, True, chains=True)),
    _Row(256, HopperTile(2, 64, 2, 2, True, 240, 168, True)),
    _Row(256, HopperTile(2, 64, 2, 1, True, 240, 168, True)),
    _Row(256, HopperTile(2, 64, 2, 1, True, 240, 168, False)),
)
"""Where operands have 16 bits. Without ``settled`` ptxas 12.8 puts all exponentials of three warpgroups at 64 channels
behind the step's last wait. Two at 128 that wait for their keys ``early`` have a quarter of them there in light maps,
where that is 1 to 2 % faster than none, and all of them with sinks, where it is 5 to 7 % slower; with any other score
or mask it is neither. Three at 64 channels are 6 % faster ``early`` than ``settled`` with sinks. Two at 64, without
turns, wait for single instructions: four chains of comparisons are shorter (``benchmarks/kernel_tiles.py``)."""

_NARROW_ROWS: tuple[_Row, ...] = (
    _Row(128, HopperTile(2, 128, 3, 2, False, 240, 168, True)),
    _Row(128, HopperTile(2, 128, 2, 2, False, 240, 168, True)),
    _Row(256, HopperTile(2, 64, 2, 2, True, 240, 168, True)),
    _Row(256, HopperTile(2, 64, 2, 1, True, 240, 168, True)),
)
"""Where queries and keys are codes of 8 bits."""
_E4M3_ROWS: tuple[_Row, ...] = (
    _Row(64, HopperTile(3, 128, 3, 2, True, 160, 128, True, early=True), light=True),
    _Row(64, HopperTile(2, 128, 3, 2, False, 240, 168, True)),
    _Row(128, HopperTile(2, 128, 3, 2, False, 240, 168, True, ahead=True), light=True),
    _Row(128, HopperTile(2, 128, 3, 2, False, 240, 168, True, loaded=True)),
    *_NARROW_ROWS[1:],
)
"""Where all is e4m3. Four weights are a word: three warpgroups have registers enough for 64 channels, and two of them
for the scores of two blocks of 128, but for up to eight scalars (Triton 3.6 and 3.7; 3.9 moves 74 words to memory under
a causal mask, which has not been timed). Ahead of integer products, which have to be converted, that was slower.
Measured on an H200 (``benchmarks/quantized_tiles.py``)."""


def shared_bytes(tile: HopperTile, channels: int, features: int, codes: Codes = (None, None)) -> int:
    """Bytes of shared memory of a thread block; channels are padded.

    Args:
        tile: how the work is divided.
        channels, features: of key and value, padded.
        codes: what queries and keys, and what values are rounded to; results have 16 bits.
    """
    products, values = (1 if code else 2 for code in codes)
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
    sinks: bool = False,
    keys: int | None = None,
    codes: Codes = (None, None),
) -> HopperTile:
    """The first row that fits.

    Args:
        channels, features: of key and value, padded.
        light: whether score and mask need hardly any registers.
        short: whether there are few queries, under a mask that leaves some of a tile's keys out: a tile of 192 queries
            then wastes more of its work than one of 128.
        sinks: whether rows of queries have a sink.
        keys: of a block, where that is given: a mask may be one number for so many.
        codes: what queries and keys, and what values are rounded to.

    Raises:
        ValueError: when there is none.
    """
    rows = _ROWS if codes[0] is None else _E4M3_ROWS if codes == (E4M3, E4M3) else _NARROW_ROWS
    for row in rows:
        tile = row.tile
        fits = max(channels, features) <= row.channels and keys in (None, tile.keys)
        fits = fits and shared_bytes(tile, channels, features, codes) <= SHARED_MEMORY
        if fits and ((light and not short) or not row.light) and row.sinks in (None, sinks):
            return tile
    raise ValueError(f"no tile for {channels} key and {features} value channels")
