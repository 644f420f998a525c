"""ATen operations that choose elements by positions read from integer tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attncompile.frontends import movement
from attncompile.frontends.aten_builder import Builder, Row, Unstated, axis_of
from attncompile.frontends.aten_sizes import broadcast_shapes
from attncompile.frontends.graph import Indices, Select
from attncompile.ir.expr import ONE, ZERO


def _index(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    data, selectors = b.tensor(args[0]), list(args[1])
    shape = b.shape(data)
    selectors += [None] * (len(shape) - len(selectors))
    tensors = {axis: b.tensor(s) for axis, s in enumerate(selectors) if s is not None}
    if any(b.info(t).dtype == "bool" for t in tensors.values()) or not tensors:
        raise Unstated
    axes = sorted(tensors)
    common = broadcast_shapes([b.shape(t) for t in tensors.values()])
    together = axes[-1] - axes[0] + 1 == len(axes)
    first = axes[0] if together else 0
    free = [axis for axis in range(len(shape)) if axis not in tensors]

    def free_axis(axis: int) -> Callable[[Indices], Indices]:
        place = free.index(axis)
        where = place if place < first else place + len(common)
        return lambda indices: (indices[where],)

    def chosen(tensor: str) -> Callable[[Indices], Indices]:
        inner = movement.broadcast(b.shape(tensor), common)
        return lambda indices: inner(indices[first : first + len(common)])

    positions = tuple(
        (tensors[axis], chosen(tensors[axis])) if axis in tensors else (None, free_axis(axis))
        for axis in range(len(shape))
    )
    return b.emit(Select(b.name(), data, positions), b.out)


def _index_put(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    """``x[..., truth] = number``: where a tensor of truth values holds, the number stands in place of the elements."""
    data, selectors = b.tensor(args[0]), list(args[1])
    accumulates = kwargs.get("accumulate", args[3] if len(args) > 3 else False)
    given = [(axis, selector) for axis, selector in enumerate(selectors) if selector is not None]
    if accumulates or len(given) != 1:
        raise Unstated
    ((first, selector),) = given
    truth, number, shape = b.tensor(selector), b.tensor(args[2]), b.shape(data)
    if b.info(truth).dtype != "bool" or any(size != ONE for size in b.shape(number)):
        raise Unstated
    chosen = b.shape(truth)
    last = first + len(chosen)
    for whole, size in zip(shape[first:last], chosen, strict=True):
        b.equate(whole, size)
    single = b.move(number, lambda indices: (ZERO,) * len(b.shape(number)), "reshape", ())
    spread = b.move(truth, lambda indices: indices[first:last], "expand", shape)
    return b.pointwise("where", spread, single, data)


def _along(
    b: Builder,
    data: str,
    axis: int,
    index: str,
    index_map: Callable[[Indices], Indices],
    others: Callable[[int], int],
    wraps: bool,
) -> str:
    rank = len(b.shape(data))

    def keep(source_axis: int) -> Callable[[Indices], Indices]:
        where = others(source_axis)
        return lambda indices: (indices[where],)

    positions = tuple((index, index_map) if a == axis else (None, keep(a)) for a in range(rank))
    return b.emit(Select(b.name(), data, positions, wraps), b.out)


def _embedding(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    table, index = b.tensor(args[0]), b.tensor(args[1])
    rank = len(b.shape(index))
    return _along(b, table, 0, index, lambda indices: indices[:rank], lambda axis: rank + axis - 1, False)


def _index_select(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    data, axis, index = b.tensor(args[0]), axis_of(args[1], len(b.out.shape)), b.tensor(args[2])
    return _along(b, data, axis, index, lambda indices: (indices[axis],), lambda a: a, False)


def _gather(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    data, axis, index = b.tensor(args[0]), axis_of(args[1], len(b.out.shape)), b.tensor(args[2])
    return _along(b, data, axis, index, lambda indices: indices, lambda a: a, False)


def _take_along(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    """``gather`` whose data and positions broadcast against each other, except along the axis."""
    data, index = b.tensor(args[0]), b.tensor(args[1])
    if len(args) < 3 or args[2] is None:
        raise Unstated
    axis = axis_of(args[2], len(b.out.shape))
    spread = (*b.out.shape[:axis], b.shape(data)[axis], *b.out.shape[axis + 1 :])
    data = b.move(data, movement.broadcast(b.shape(data), spread), "expand", spread)
    index = b.move(index, movement.broadcast(b.shape(index), b.out.shape), "expand", b.out.shape)
    return _along(b, data, axis, index, lambda indices: indices, lambda a: a, False)


SELECTION: dict[str, Row] = {
    "index": _index,
    "index_put": _index_put,
    "embedding": _embedding,
    "index_select": _index_select,
    "gather": _gather,
    "take_along_dim": _take_along,
}
"""Operations that choose elements by positions read from integer tensors."""
