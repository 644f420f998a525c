"""Index maps of the data-movement operations: where an output element comes from."""

from __future__ import annotations

from collections.abc import Sequence

from attncompile.frontends.graph import IndexMap, Indices
from attncompile.ir import Expr
from attncompile.ir.expr import ONE, ZERO, Const, apply
from attncompile.ir.simplify import simplify


def permute(order: Sequence[int]) -> IndexMap:
    """Output axis ``n`` is input axis ``order[n]``."""

    def index_map(indices: Indices) -> Indices:
        found: list[Expr] = [ZERO] * len(order)
        for output_axis, input_axis in enumerate(order):
            found[input_axis] = indices[output_axis]
        return tuple(found)

    return index_map


def broadcast(source: Indices, target: Indices) -> IndexMap:
    """Right-aligned broadcasting of a source shape to a target shape; an axis of size 1 is read at 0.

    A source axis counts as broadcast only when it is the constant 1 and the target's is not.
    """
    offset = len(target) - len(source)

    def index_map(indices: Indices) -> Indices:
        return tuple(
            ZERO if size == ONE and target[axis + offset] != ONE else indices[axis + offset]
            for axis, size in enumerate(source)
        )

    return index_map


def reshape(source: Indices, target: Indices) -> IndexMap:
    """Row-major reinterpretation of the same elements.

    Axes before which there are as many elements on both sides begin a group of their own: ``[B·H, N]`` as ``[B, H, N]``
    leaves ``N`` alone. Only within a group an element goes through its linear position.
    """
    groups = _groups(source, target)

    def index_map(indices: Indices) -> Indices:
        found: list[Expr] = []
        for (first, last), (begin, end) in groups:
            found += _unravelled(source[first:last], target[begin:end], indices[begin:end])
        return tuple(found)

    return index_map


def _unravelled(source: Indices, target: Indices, indices: Indices) -> list[Expr]:
    """The indices in a shape of the element at some indices of another shape of as many elements."""
    if source == target:
        return list(indices)
    position: Expr = ZERO
    for size, index in zip(target, indices, strict=True):
        position = apply("add", apply("mul", position, size), index)
    found: list[Expr] = []
    for size in reversed(source[1:]):
        found.append(apply("mod", position, size))
        position = apply("floordiv", position, size)
    if source:
        found.append(position)  # the outermost index needs no remainder
    return found[::-1]


_Span = tuple[int, int]


def _groups(source: Indices, target: Indices) -> list[tuple[_Span, _Span]]:
    """The axes of two shapes in groups of as many elements, outermost first."""
    before = _products(target)
    groups: list[tuple[_Span, _Span]] = []
    first = begin = 0
    for last, product in enumerate(_products(source)[:-1]):
        if last > first and product in before[begin + 1 : -1]:
            end = before.index(product, begin + 1)
            groups.append(((first, last), (begin, end)))
            first, begin = last, end
    return [*groups, ((first, len(source)), (begin, len(target)))]


def _products(shape: Indices) -> list[Expr]:
    """The number of elements that the axes before each axis make, and all of them."""
    found: list[Expr] = [ONE]
    for size in shape:
        found.append(simplify(apply("mul", found[-1], size)))
    return found


def slices(axis: int, start: Expr, step: int) -> IndexMap:
    """Output position ``n`` on the axis is input position ``start + step · n``."""

    def index_map(indices: Indices) -> Indices:
        moved = apply("add", start, apply("mul", Const(step), indices[axis]))
        return (*indices[:axis], moved, *indices[axis + 1 :])

    return index_map


def select(axis: int, position: Expr) -> IndexMap:
    """The axis is removed, its element at one position kept."""

    def index_map(indices: Indices) -> Indices:
        return (*indices[:axis], position, *indices[axis:])

    return index_map


def squeeze(axes: Sequence[int]) -> IndexMap:
    """Axes of size 1 (numbered in the source) are removed."""
    removed = sorted(axes)

    def index_map(indices: Indices) -> Indices:
        found = list(indices)
        for axis in removed:
            found.insert(axis, ZERO)
        return tuple(found)

    return index_map


def unsqueeze(axes: Sequence[int]) -> IndexMap:
    """Axes of size 1 (numbered in the result) are added."""
    added = set(axes)

    def index_map(indices: Indices) -> Indices:
        return tuple(index for axis, index in enumerate(indices) if axis not in added)

    return index_map


def identity(indices: Indices) -> Indices:
    """The same element."""
    return indices


def flip(axes: Sequence[int], shape: Indices) -> IndexMap:
    """The axes run backwards."""

    def index_map(indices: Indices) -> Indices:
        return tuple(
            simplify(shape[axis] - 1 - index) if axis in axes else index for axis, index in enumerate(indices)
        )

    return index_map
