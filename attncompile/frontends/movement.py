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

    Leading axes that are equal on both sides pass through, and so do trailing ones; only what lies between
    goes through the linear position.
    """
    left = 0
    while left < min(len(source), len(target)) and source[left] == target[left]:
        left += 1
    right = 0
    while right < min(len(source), len(target)) - left and source[-1 - right] == target[-1 - right]:
        right += 1
    inner_source = source[left : len(source) - right]
    inner_target = target[left : len(target) - right]

    def index_map(indices: Indices) -> Indices:
        position: Expr = ZERO
        for size, index in zip(inner_target, indices[left : len(target) - right], strict=True):
            position = apply("add", apply("mul", position, size), index)
        found: list[Expr] = []
        for size in reversed(inner_source):
            found.append(apply("mod", position, size))
            position = apply("floordiv", position, size)
        if found:
            # the outermost index needs no remainder
            last = found.pop()
            found.append(last.children[0])
        return (*indices[:left], *reversed(found), *indices[len(target) - right :])

    return index_map


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
