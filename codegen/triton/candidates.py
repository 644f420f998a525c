"""Tiles worth a try beside the one in the table, those that differ least from it first."""

from __future__ import annotations

import itertools
import math
from typing import Literal

from attncompile.codegen.triton.tiles import Tile

KernelName = Literal["dense", "decode", "scan"]

_QUERIES: dict[KernelName, tuple[int, ...]] = {"dense": (32, 64, 128), "decode": (), "scan": (16, 32, 64, 128)}
_KEYS: dict[KernelName, tuple[int, ...]] = {
    "dense": (32, 64, 128),
    "decode": (16, 32, 64, 128, 256),
    "scan": (16, 32, 64),
}
_STAGES: dict[KernelName, tuple[int, ...]] = {"dense": (1, 2, 3, 4), "decode": (2, 3, 4, 5), "scan": (1, 2, 3)}
_WARPS = (2, 4, 8)

_LEAST, _MOST = 8, 128
"""Numbers of a tile's map that a thread holds: with fewer it waits most of the time, with more they do not fit."""


def tiles_to_try(kernel: KernelName, table: Tile, *, fixed: bool = False) -> tuple[Tile, ...]:
    """Tiles of a kernel in plain Triton, nearest to the table's first, without that one.

    Args:
        kernel: whose they are.
        table: what the table has.
        fixed: whether queries and keys of a block have to stay, as where codes of a block share a scale.
    """
    queries = (table.queries,) if fixed or kernel == "decode" else _QUERIES[kernel]
    keys = (table.keys,) if fixed else _KEYS[kernel]
    found = [
        Tile(*each)
        for each in itertools.product(queries, keys, _WARPS, _STAGES[kernel])
        if kernel == "decode" or _LEAST <= each[0] * each[1] / (32 * each[2]) <= _MOST
    ]
    return tuple(sorted((each for each in found if each != table), key=lambda each: (_steps(each, table), repr(each))))


def _steps(tile: Tile, table: Tile) -> float:
    doublings = sum(
        abs(math.log2(getattr(tile, name) / getattr(table, name))) for name in ("queries", "keys", "warps")
    )
    return doublings + abs(tile.stages - table.stages)


__all__ = ["KernelName", "tiles_to_try"]
