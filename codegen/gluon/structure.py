"""What the Hopper kernel can do."""

from __future__ import annotations

import re

from attncompile.codegen.gluon.cells import by_tile, keys_of_cells
from attncompile.codegen.gluon.columns import COLUMN, FAR, fold_columns
from attncompile.codegen.gluon.tiles import Codes, hopper_tile
from attncompile.codegen.triton.expressions import is_pair
from attncompile.codegen.triton.moved import regrouped_parts
from attncompile.codegen.triton.saturated import Saturated
from attncompile.codegen.triton.structure import Dense, dense
from attncompile.codegen.triton.structure import why_not_spec as why_not_triton
from attncompile.ir import Spec, simplify
from attncompile.ir.expr import SCORE, TRUE, Apply, Const, Expr, Load, walk
from attncompile.ir.rearrange import regrouped
from attncompile.kernels.hopper import WEIGHING, HopperTile

GRANULE = 8
"""Channels in 16 bytes: rows of fewer, or of no multiple, cannot be copied by TMA."""


MOST_EFFORT = 48
"""Instructions beyond which compiling takes minutes, registers spill, and the matrix unit waits anyway."""

_LONG = {"exp": 4, "log": 4, "log2": 4, "pow": 8, "sigmoid": 8, "erf": 30, "sin": 40, "cos": 40, "sqrt": 4, "div": 8}
"""Operators that take more than about two instructions."""


def effort(expr: Expr, keys: int) -> int:
    """Roughly how many instructions an expression takes for each pair, each shared part counted once."""
    varying = {COLUMN, FAR, SCORE}
    found = (node for node in walk(fold_columns(expr, keys=keys)) if isinstance(node, Apply))
    nodes = [node for node in dict.fromkeys(found) if not varying.isdisjoint(walk(node))]
    return sum(_LONG.get(node.operator, 1) for node in nodes)


TRITON = ((3, 6), (3, 9))
"""Oldest and newest release of Triton that the generated text is compiled with: Gluon still moves between releases."""


def why_not_installed(version: str) -> str | None:
    """Why this release of Triton does not run the kernel, or ``None``."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if TRITON[0] <= numbers <= TRITON[1]:
        return None
    oldest, newest = (".".join(map(str, each)) for each in TRITON)
    return f"the Hopper kernel is written for Triton {oldest} to {newest}; installed is {version}"


def padded(channels: int) -> int:
    """Channels of a tile: a power of two."""
    return max(16, 1 << (channels - 1).bit_length())


def why_not_spec(spec: Spec) -> str | None:
    """Why there is no Hopper kernel for the Spec, or ``None``."""
    moved = regrouped_parts(spec)
    if moved:
        return why_not_spec(moved.attention)
    reason = why_not_triton(spec)
    if reason:
        return reason
    if not {operation.keyword for operation in spec.operations} <= {"attend", "quantize", "position"}:
        return f"the Hopper kernel computes one attend, not {', '.join(o.keyword for o in spec.operations)}"
    parts = dense(spec)
    kind = parts.attend.norm.kind
    if kind not in WEIGHING:
        return f"the Hopper kernel normalises by {', '.join(WEIGHING)}, not by {kind}"
    if kind != "softmax" and parts.rounding:
        return f"the Hopper kernel takes operands of 8 bits for softmax, not for {kind}"
    if parts.edit is not None:
        return f"the Hopper kernel has no edit of weights such as {parts.attend.weight}"
    if parts.attend.taps:
        return f"{', '.join(parts.attend.taps)} would take registers of the Hopper kernel; plain Triton gives them"
    rounded = {step.out: step for step in parts.rounding.steps} if parts.rounding else {}
    for name, found in ((parts.attend.query, parts.query), (parts.attend.value, parts.value)):
        channels = _constant(found.sizes[3])
        if channels % GRANULE and name not in rounded:
            return f"{name} has {channels} channels; TMA copies rows of multiples of {GRANULE}"
    try:
        tile = tile_for(parts, light=False)
    except ValueError as error:
        return str(error)
    for name in (parts.attend.key, parts.attend.value):
        if name in rounded and rounded[name].block % tile.keys:
            return (
                f"{name} has a scale for {rounded[name].block} positions; the Hopper kernel takes multiples of "
                f"the {tile.keys} keys of a tile"
            )
    taken = max(effort(expr, tile.keys) for expr in (parts.score, parts.mask))
    if taken > MOST_EFFORT:
        return f"score and mask take about {taken} instructions for each pair; the Hopper kernel is for {MOST_EFFORT}"
    return None


def tile_for(parts: Dense, *, light: bool, short: bool = False, keys: int | None = None) -> HopperTile:
    """How the kernel divides the work of a Spec.

    Args:
        parts: of the Spec.
        light, short, keys: as in :func:`attncompile.codegen.gluon.tiles.hopper_tile`.

    Raises:
        ValueError: when there is no tile.
    """
    channels, features = (padded(_constant(found.sizes[3])) for found in (parts.query, parts.value))
    sinks = parts.sink is not None
    return hopper_tile(channels, features, light=light, short=short, sinks=sinks, keys=keys, codes=codes_of(parts))


def codes_of(parts: Dense) -> Codes:
    """What queries and keys, and what values are rounded to."""
    rounding = parts.rounding
    return (rounding.query.dtype, rounding.value.dtype if rounding.value else None) if rounding else (None, None)


def arranged(spec: Spec, in_place: bool = False) -> Spec:
    """The Spec with its tokens in boxes as large as a tile, where that leaves much less to visit; or as it is.

    Args:
        spec: one attention.
        in_place: whether boxes will be read where they lie, without copies.
    """
    found = spec.attend()
    widths = [simplify(spec.types()[name].sizes[3]) for name in (found.query, found.value)] if found else []
    if found is None or not all(isinstance(width, Const) for width in widths):
        return spec
    try:
        tile = hopper_tile(*(padded(_constant(width)) for width in widths), light=False)
    except ValueError:
        return spec
    return regrouped(spec, tile.queries, tile.keys, not in_place) or spec


def slower(spec: Spec) -> str | None:
    """Why plain Triton is faster, or safer, although there is a Hopper kernel; or ``None``.

    Measured on an H200: a bias for each pair takes plain Triton 244 TF/s, the Hopper kernel 198 (64 channels, 4096
    keys): its warpgroups lack the registers for so many addresses. An element that a whole tile shares costs nothing.
    With values in e4m3 it is 1.4 to 3.4 times as fast as SageAttention 1, which is plain Triton. Beside plain Triton it
    takes weights by sigmoid 1.7 times as fast with 128 channels, 1.0 to 1.2 with 64; by relu 1.6 to 1.7, and 1.2 to
    1.6; queries and keys of 8 bits with values of 16 1.8 to 1.9 times, and 1.3 to 1.4.
    """
    moved = regrouped_parts(spec)
    parts = dense(moved.attention if moved else spec)
    tile = tile_for(parts, light=False, keys=keys_of_cells(parts.score, parts.mask))
    far = Saturated.of(parts.score, parts.mask, parts.query.sizes[2], parts.key.sizes[2])
    for expr in (TRUE if far else parts.score, parts.mask):
        for load in walk(expr):
            if isinstance(load, Load) and is_pair(load) and not by_tile(load, tile):
                return f"{load} is loaded for each pair, which plain Triton does faster"
    return None


def may_be_infinite(score: Expr) -> bool:
    """Whether a score may be −∞ or nearly so: additive masks are loaded from tensors."""
    return any(isinstance(node, Load) for node in walk(score))


def _constant(size: Expr) -> int:
    found = simplify(size)
    assert isinstance(found, Const)  # why_not_triton has seen to it
    return int(found.value)
