"""Whether tokens that a Spec moves can be read where they lie: their new order is one of boxes of a grid."""

from __future__ import annotations

from attncompile.codegen.triton.expressions import Dialect, Scope, print_triton
from attncompile.codegen.triton.module import constant
from attncompile.codegen.triton.moved import Regrouped
from attncompile.ir import Attend, Spec, simplify
from attncompile.ir.expr import Const, Expr, Index
from attncompile.ir.tiling import SLOT, Tiling, read_tiling
from attncompile.kernels.hopper import HopperTile
from attncompile.kernels.hopper_boxes import MOST_AXES, Boxes


def boxes_of(spec: Spec, parts: Regrouped, tile: HopperTile, dialect: Dialect) -> Boxes | None:
    """How a kernel with this tile reads the tokens of a Spec where they lie, or ``None`` where it cannot.

    Args:
        spec: the whole.
        parts: of it.
        tile: how the work is divided.
        dialect: of the coordinates' source.
    """
    attend = parts.attention.operations[0]
    assert isinstance(attend, Attend)
    types = spec.types()
    found = []
    for name, places in ((attend.query, tile.queries), (attend.key, tile.keys), (attend.value, tile.keys)):
        move = parts.before[name]
        tokens = simplify(types[move.tensor].sizes[2])
        if not isinstance(tokens, Const) or places & (places - 1):
            return None
        tiling = read_tiling(move.at, int(tokens.value), constant(move.size), places)
        if tiling is None or len(tiling.grid) + 2 > MOST_AXES:
            return None
        found.append(tiling)
    query, key, value = found
    back = simplify(query.slot(SLOT), {"i": Const(query.tokens)})
    if key != value or query.grid != key.grid or not tile.staged or simplify(parts.after.at) != simplify(back):
        return None
    own = first_part(query.box, tile.groups)
    heads = [str(simplify(types[name].sizes[1])) for name in (attend.query, attend.key)]
    if own is None or not all(map(str.isdigit, heads)):
        return None
    texts = []
    for tiling, symbol in ((query, SLOT), (key, Index("j"))):
        extents: dict[str, Expr] = {symbol.name: Const(tiling.slots)}
        scope = Scope({symbol.name: symbol.name}, {}, {}, {}, extents, dialect)
        texts.append(_coordinates(tiling, symbol, scope))
    return Boxes(query.grid, own, key.box, (int(heads[0]), int(heads[1])), *texts)


def _coordinates(tiling: Tiling, symbol: Expr, scope: Scope) -> tuple[tuple[str, ...], tuple[str, ...]]:
    lines: list[str] = []
    places = []
    for axis, coordinate in enumerate(tiling.coordinates(symbol)):
        printed = print_triton(coordinate, scope)
        lines += [*printed.lines, f"place_{axis} = {printed.value}"]
        places.append(f"place_{axis}")
    return tuple(lines), tuple(places)


def first_part(box: tuple[int, ...], parts: int) -> tuple[int, ...] | None:
    """The box that the first of so many equal runs of places in a box is, if it is one."""
    sides: list[int] = []
    for side in box:
        if parts > 1 and side % parts == 0:
            sides.append(side // parts)
            parts = 1
        elif parts > 1 and parts % side == 0:
            sides.append(1)
            parts //= side
        elif parts == 1:
            sides.append(side)
        else:
            return None
    return tuple(sides) if parts == 1 else None


__all__ = ["boxes_of", "first_part"]
