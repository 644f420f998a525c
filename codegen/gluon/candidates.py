"""Divisions of work worth a try beside the one in the table, those that differ in fewest respects first."""

from __future__ import annotations

import dataclasses
import itertools

from attncompile.codegen.gluon.cells import keys_of_cells
from attncompile.codegen.gluon.structure import padded
from attncompile.codegen.gluon.tiles import SHARED_MEMORY, Codes, shared_bytes
from attncompile.codegen.triton.moved import regrouped_parts
from attncompile.codegen.triton.structure import dense
from attncompile.ir import Spec, simplify
from attncompile.ir.expr import Const
from attncompile.kernels.hopper import MOST_STAGES, HopperTile

_REGISTERS = {2: (240, 168), 3: (160, 128)}
"""By warpgroups that compute: registers of their threads, and of all threads when the block starts."""


def hopper_tiles_to_try(spec: Spec, table: HopperTile) -> tuple[HopperTile, ...]:
    """Tiles of a Spec that fit into shared memory, without the table's.

    Args:
        spec: one attention for which there is a Hopper kernel.
        table: what the table has for it.
    """
    moved = regrouped_parts(spec)
    parts = dense(moved.attention if moved else spec)
    widths = [simplify(found.sizes[3]) for found in (parts.query, parts.value)]
    channels, features = (padded(int(width.value)) for width in widths if isinstance(width, Const))
    rounding = parts.rounding
    codes: Codes = (None, None)
    if rounding:
        codes = (rounding.query.dtype, rounding.value.dtype if rounding.value else None)
    # blocks of codes share scales, and of a mask of cells one number
    fixed = rounding is not None or keys_of_cells(parts.score, parts.mask) is not None
    found = _tiles(table, fixed)
    fit = [tile for tile in found if tile != table and shared_bytes(tile, channels, features, codes) <= SHARED_MEMORY]
    return tuple(sorted(fit, key=lambda tile: (_differ(tile, table), repr(tile))))


def _tiles(table: HopperTile, fixed: bool) -> list[HopperTile]:
    choices = itertools.product(
        (table.groups,) if fixed else tuple(_REGISTERS),
        (table.keys,) if fixed else (64, 128),
        range(1, MOST_STAGES + 1),
        (1, 2),
        (False, True),
        (False, True),
    )
    found = []
    for groups, keys, stages, buffers, turns, early in choices:
        registers, limit = _REGISTERS[groups] if groups != table.groups else (table.registers, table.limit)
        sizes = dataclasses.replace(table, groups=groups, keys=keys, registers=registers, limit=limit)
        found.append(dataclasses.replace(sizes, stages=stages, buffers=buffers, turns=turns, early=early))
    return found


def _differ(tile: HopperTile, table: HopperTile) -> int:
    names = ("groups", "keys", "stages", "buffers", "turns", "early")
    return sum(getattr(tile, name) != getattr(table, name) for name in names)


__all__ = ["hopper_tiles_to_try"]
