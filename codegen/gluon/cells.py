"""Loads whose element is the same for a cell of the map: a mask given for blocks, ``blocks[h, i // 128, j // 128]``.

Where a cell holds whole tiles, such a load is one number for a tile, read once; where it does not, a few elements
stand for all of a tile.
"""

from __future__ import annotations

import math

from attncompile.codegen.triton.expressions import is_pair
from attncompile.ir.expr import Apply, Const, Expr, Index, Load, loads, substitute, walk
from attncompile.kernels.hopper import HopperTile

GROUP_QUERIES = 64
"""Queries of a warpgroup: they begin at a multiple of this."""

FIRST_ROW, START = Index("first_row"), Index("start")
"""First query of a warpgroup and first key of a block."""

MOST = 16
"""Elements of a load that may stand for a tile when blocks are listed."""


def cell(load: Load, name: str) -> int:
    """The largest ``c`` such that the load's place depends on an index only through ``index // c``, as it is written.

    1 where the index stands alone, 0 where it does not occur.
    """

    def found(expr: Expr) -> int:
        match expr:
            case Index():
                return int(expr.name == name)
            case Apply("floordiv", (Index() as inner, Const(divisor))) if inner.name == name and divisor > 0:
                return int(divisor)
        return math.gcd(*(found(child) for child in expr.children))

    return math.gcd(*(found(index) for index in load.indices))


def samples(size: int, span: int) -> int:
    """How many cells of a size a range of positions reaches into at most; it begins at a multiple of its length."""
    step = math.gcd(size, span)
    return (size - step + span - 1) // size + 1


def few(load: Load, tile: HopperTile) -> tuple[int, int] | None:
    """How many cells along queries and keys stand for a tile and a block, or ``None`` where there are too many.

    Args:
        load: an element that depends on query and key, and on nothing loaded.
        tile: how the work is divided.
    """
    nested = any(isinstance(node, Load) for index in load.indices for node in walk(index))
    if nested or not is_pair(load):
        return None
    found = samples(cell(load, "i"), tile.queries), samples(cell(load, "j"), tile.keys)
    return found if math.prod(found) <= MOST else None


def by_tile(load: Load, tile: HopperTile) -> bool:
    """Whether all queries of a warpgroup and all keys of a block load one element."""
    return is_pair(load) and cell(load, "i") % GROUP_QUERIES == 0 and cell(load, "j") % tile.keys == 0


def keys_of_cells(*expressions: Expr) -> int | None:
    """Keys of a block for which the loads of each pair are one number for a tile, where blocks of 128 are too large."""
    found = [cell(load, "j") for expr in expressions for load in loads(expr) if is_pair(load)]
    return 64 if found and math.gcd(*found) % 128 == 64 else None


def read_once(expr: Expr, tile: HopperTile) -> Expr:
    """The expression with such loads read at the first query of the warpgroup and the first key of the block."""
    first: dict[Expr, Expr] = {Index("i"): FIRST_ROW, Index("j"): START}
    return substitute(expr, {load: substitute(load, first) for load in loads(expr) if by_tile(load, tile)})


__all__ = ["FIRST_ROW", "START", "by_tile", "cell", "few", "keys_of_cells", "read_once", "samples"]
