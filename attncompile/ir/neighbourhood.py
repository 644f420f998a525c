"""Masks of neighbourhood attention: windows over the coordinates of tokens that form a grid.

Token ``i`` of a grid ``n_0 × … × n_k`` in raster order has the coordinates ``i // (n_1·…·n_k)``, …, ``i % n_k``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from attncompile.ir.expr import Const, Expr, Index, apply, conjunction
from attncompile.ir.simplify import simplify


def raster_coordinates(index: Expr, grid: Sequence[int]) -> tuple[Expr, ...]:
    """Coordinates of a token by its number in raster order."""
    found = []
    for axis in range(len(grid)):
        inner = math.prod(grid[axis + 1 :])
        outer = index // inner if inner > 1 else index
        found.append(outer % grid[axis] if axis else outer)
    return tuple(found)


def axis_window(
    query: Expr, key: Expr, length: int, window: int, dilation: int = 1, stride: int = 1, causal: bool = False
) -> tuple[Expr, ...]:
    """What must hold for a key to lie in a query's window along one axis.

    Positions with equal remainders by ``dilation`` form a line of their own; along it a query sees the ``window`` keys
    around the leader of its ``stride`` neighbours, ``x // stride · stride + stride // 2``, as many before it as after
    it (one more before it for an even window), moved inwards where they would pass an end. A ``causal`` query sees the
    keys from ``window − 1`` before the last of its ``stride`` neighbours up to itself. A window longer than the line is
    the line.

    Args:
        query, key: positions on the axis.
        length: of the axis.
        window, dilation, stride: positive numbers.
        causal: whether keys after the query are hidden.
    """
    line: Expr = Const(length // dilation)
    parts: list[Expr] = []
    if dilation > 1:
        parts.append(apply("eq", key % dilation, query % dilation))
        line = (length - 1 - query % dilation) // dilation + 1 if length % dilation else line
        query, key = query // dilation, key // dilation
    window = min(window, max(1, length // dilation))
    if causal:
        leader = apply("min", query // stride * stride + (stride - 1), line - 1)
        return (*parts, key >= apply("max", leader - (window - 1), 0), key <= query)
    leader = apply("min", query // stride * stride + stride // 2, line - 1) if stride > 1 else query
    start = apply("min", apply("max", leader - window // 2, 0), line - window)
    return (*parts, key >= start, key < start + window)


def neighbourhood(
    grid: Sequence[int],
    window: Sequence[int],
    *,
    dilation: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    causal: Sequence[bool] | None = None,
) -> Expr:
    """The mask of N-dimensional neighbourhood attention over ``i j``: :func:`axis_window` along every axis.

    Args:
        grid: sizes of the axes, the outermost first.
        window, dilation, stride, causal: for each axis; 1, 1 and false when left out.

    Raises:
        ValueError: for numbers below 1, or when there are not as many as axes.

    Follows: Hassani et al. 2023 (arXiv:2204.07143), dilation as in arXiv:2209.15001, stride and even windows as in
    generalized neighbourhood attention (arXiv:2504.16922).
    """
    count = len(grid)
    options = {
        "window": tuple(window),
        "dilation": tuple(dilation or (1,) * count),
        "stride": tuple(stride or (1,) * count),
    }
    ends = tuple(causal or (False,) * count)
    for name, values in {"grid": tuple(grid), **options, "causal": ends}.items():
        if len(values) != count or not count:
            raise ValueError(f"{name} {values} should have one entry for each of the {count} axes of the grid")
        if name != "causal" and min(values) < 1:
            raise ValueError(f"{name} {values} should have no number below 1")
    for axis, (size, spread) in enumerate(zip(grid, options["dilation"], strict=True)):
        if spread > size:
            raise ValueError(f"dilation {spread} of axis {axis} exceeds its {size} positions")
    total = math.prod(grid)
    extents: dict[str, Expr] = {"i": Const(total), "j": Const(total)}
    queries, keys = (raster_coordinates(Index(name), grid) for name in "ij")
    parts: list[Expr] = []
    for axis, size in enumerate(grid):
        sides, steps = options["window"][axis], (options["dilation"][axis], options["stride"][axis])
        parts += axis_window(queries[axis], keys[axis], size, sides, *steps, ends[axis])
    return simplify(conjunction(parts), extents)


__all__ = ["axis_window", "neighbourhood", "raster_coordinates"]
