"""The layouts of heads: ``[B, H, S, D]`` of a Spec, the flat ``[B, S, H*D]`` of projections and operators.

A projection makes the flat one, the graph turns it with ``Reshape`` and ``Transpose``, and a fused operator
wants it flat again. Looking through the turn saves both copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from attncompile.codegen.onnx.values import Builder, constant, dimensions, known_axis, producer, redirect

TURN = (0, 2, 1, 3)
"""The axis order that takes ``[B, S, H, D]`` to ``[B, H, S, D]`` and back."""


Groups = tuple[tuple[str, ...], ...]
"""For each axis of a graph's value the Spec axes it is made of, outermost first."""


@dataclass(frozen=True)
class Heads:
    """A tensor of heads seen flat: ``flat`` is ``[B, S, heads * channels]``."""

    flat: ir.Value
    heads: int
    channels: int


def _order(value: ir.Value | None) -> tuple[ir.Node, tuple[int, ...]] | None:
    node = producer(value, "Transpose")
    if node is None or "perm" not in node.attributes:
        return None
    return node, tuple(node.attributes["perm"].as_ints())


def heads_of(value: ir.Value) -> Heads | None:
    """The flat tensor behind a value of shape ``[B, H, S, D]`` that is a turned view of it."""
    turned = _order(value)
    if turned is None or turned[1] != TURN or turned[0].inputs[0] is None:
        return None
    return split_of(turned[0].inputs[0])


def flattened(build: Builder, value: ir.Value) -> Heads | None:
    """A turned view ``[B, H, S, D]`` of ``[B, S, H, D]`` that some operator makes, as the flat tensor of it, which is a
    view too; ``None`` for any other value, or sizes that are not known.
    """
    turned = _order(value)
    if turned is None or turned[1] != TURN or turned[0].inputs[0] is None:
        return None
    split = turned[0].inputs[0]
    sizes, heads, channels = dimensions(split), known_axis(split, 2), known_axis(split, 3)
    if sizes is None or sizes[1] is None or heads is None or channels is None:
        return None
    flat = build("Reshape", split, build.constant([0, 0, heads * channels]))
    flat.shape, flat.dtype = ir.Shape((sizes[0], sizes[1], heads * channels)), value.dtype
    return Heads(flat, heads, channels)


def split_of(value: ir.Value) -> Heads | None:
    """The flat tensor behind a value of shape ``[B, S, H, D]`` that only splits its last axis."""
    split = producer(value, "Reshape")
    if split is None or split.inputs[0] is None:
        return None
    flat = split.inputs[0]
    heads, channels, width = known_axis(value, 2), known_axis(value, 3), known_axis(flat, 2)
    sizes, inner = dimensions(value), dimensions(flat)
    if heads is None or channels is None or sizes is None or inner is None or len(inner) != 3:
        return None
    # the last axis alone is split: widths agree, and the sequence axis is the same one
    if width != heads * channels or inner[1] is None or inner[1] != sizes[1]:
        return None
    return Heads(flat, heads, channels)


def to_heads(build: Builder, view: Heads) -> ir.Value:
    """``[B, S, H*D]`` as ``[B, H, S, D]``."""
    split = build("Reshape", view.flat, build.constant([0, 0, view.heads, view.channels]))
    sizes = dimensions(view.flat) or (None, None, None)
    split.shape = ir.Shape((sizes[0], sizes[1], view.heads, view.channels))
    split.dtype = view.flat.dtype
    turned = build("Transpose", split, perm=TURN)
    turned.shape = ir.Shape((sizes[0], view.heads, sizes[1], view.channels))
    turned.dtype = view.flat.dtype
    return turned


@dataclass(frozen=True)
class Operand:
    """A tensor of the Spec as the graph holds it.

    Attributes:
        value: the graph's value.
        groups: for each axis of ``value`` the Spec axes it is made of, outermost first. The flat layout is
            ``(("b",), ("i",), ("h", "d"))``; an empty group is an axis of size 1.
    """

    value: ir.Value
    groups: Groups

    def behind_turn(self) -> Operand:
        """The flat tensor that this one is a split or turned view of, or this one."""
        axes = tuple(group[0] for group in self.groups if len(group) == 1)
        if not len(axes) == 4 == len(self.groups):
            return self
        view = heads_of(self.value)
        if view is not None:
            return Operand(view.flat, flat_groups(axes))
        view = split_of(self.value)
        return self if view is None else Operand(view.flat, ((axes[0],), (axes[1],), axes[2:]))


def single_groups(axes: Iterable[str]) -> Groups:
    """One native axis for each Spec axis, in order."""
    return tuple((axis,) for axis in axes)


def flat_groups(axes: Sequence[str]) -> Groups:
    """The flat layout ``[B, S, H*D]`` of the axes of a ``[B, H, S, D]`` tensor."""
    batch, head, position, channel = axes
    return ((batch,), (position,), (head, channel))


def arrange(
    build: Builder, operand: Operand, wanted: Groups, extents: Mapping[str, int | Callable[[], ir.Value]]
) -> ir.Value:
    """The operand in another layout; nothing is built when it has that layout already.

    Args:
        extents: size of each Spec axis, a number or a maker of an int64 ``[1]`` value.
    """
    if operand.groups == wanted:
        return operand.value
    behind = operand.behind_turn()
    if behind.groups == wanted:
        return behind.value
    value, groups = operand.value, operand.groups
    known = _axis_dimensions(operand, extents)
    if any(len(group) != 1 for group in groups):
        singles = single_groups(axis for group in groups for axis in group)
        value, groups = _reshape(build, value, groups, singles, extents), singles
        state_shape(value, groups, known, operand.value.dtype)
    order = tuple(axis for group in wanted for axis in group)
    current = tuple(group[0] for group in groups)
    absent = [place for place, axis in enumerate(current) if axis not in order and extents.get(axis) == 1]
    if absent:  # the graph has no axis for a single batch row, or head
        value = build("Squeeze", value, build.constant(absent))
        current = tuple(axis for axis in current if axis in order)
    if sorted(order) != sorted(current):
        raise ValueError(f"a tensor with axes {current} cannot be laid out as {wanted}")
    if order != current:
        value = build("Transpose", value, perm=[current.index(axis) for axis in order])
        state_shape(value, single_groups(order), known, operand.value.dtype)
    groups = single_groups(order)
    if groups == wanted:
        return value
    value = _reshape(build, value, groups, wanted, extents)
    state_shape(value, wanted, known, operand.value.dtype)
    return value


def joined(build: Builder, value: ir.Value, places: Sequence[tuple[int, int]]) -> ir.Value:
    """The value with each run of axes, from first to behind the last, as one axis."""
    if all(stop - start == 1 for start, stop in places):
        return value
    sizes = dimensions(value) or (None,) * places[-1][1]
    parts: list[int | ir.Value] = []
    for start, stop in places:
        run = sizes[start:stop]
        numbers = [size for size in run if isinstance(size, int)]
        if len(numbers) == len(run):
            parts.append(math.prod(numbers))
        elif -1 not in parts:
            parts.append(-1)
        else:
            parts.append(build("ReduceProd", build("Shape", value, start=start, end=stop)))
    return reshaped(build, value, parts)


def reshaped(build: Builder, value: ir.Value, sizes: Sequence[int | ir.Value]) -> ir.Value:
    """The value in a shape of numbers and int64 ``[1]`` values."""
    numbers = [size for size in sizes if isinstance(size, int)]
    if len(numbers) == len(sizes):
        return build("Reshape", value, build.constant(numbers))
    pieces = [build.constant([size]) if isinstance(size, int) else size for size in sizes]
    return build("Reshape", value, build("Concat", *pieces, axis=0))


def _axis_dimensions(
    operand: Operand, extents: Mapping[str, int | Callable[[], ir.Value]]
) -> dict[str, int | str | None]:
    """What is known of each Spec axis: its fixed size, or the symbol of the native axis that it is."""
    known: dict[str, int | str | None] = {
        axis: size if isinstance(size, int) else None for axis, size in extents.items()
    }
    for group, size in zip(operand.groups, dimensions(operand.value) or (), strict=False):
        if len(group) == 1 and known.get(group[0]) is None:
            known[group[0]] = size
    return known


def state_shape(
    value: ir.Value, groups: Groups, known: Mapping[str, int | str | None], dtype: ir.DataType | None
) -> None:
    """Write what is known of its shape on a value, for those who read the graph afterwards."""
    sizes: list[int | str | None] = []
    for group in groups:
        parts = [known.get(axis) for axis in group]
        numbers = [part for part in parts if isinstance(part, int)]
        sizes.append(math.prod(numbers) if len(numbers) == len(parts) else parts[0] if len(parts) == 1 else None)
    value.shape = ir.Shape(sizes)
    if dtype is not None:
        value.dtype = dtype


def known_dimensions(
    operands: Iterable[Operand], extents: Mapping[str, int | Callable[[], ir.Value]]
) -> dict[str, int | str | None]:
    """What the operands together tell of the Spec's axes."""
    known: dict[str, int | str | None] = {}
    for operand in operands:
        for axis, size in _axis_dimensions(operand, extents).items():
            if known.get(axis) is None:
                known[axis] = size
    return known


def _reshape(
    build: Builder,
    value: ir.Value,
    groups: Groups,
    wanted: Groups,
    extents: Mapping[str, int | Callable[[], ir.Value]],
) -> ir.Value:
    """A reshape between two groupings of the same axes in the same order."""
    parts: list[int | Callable[[], ir.Value]] = []
    for place, group in enumerate(wanted):
        sizes = [extents[axis] for axis in group]
        if place < len(groups) and groups[place] == group:
            parts.append(0)  # copied from the input
        elif all(isinstance(size, int) for size in sizes):
            parts.append(math.prod(size for size in sizes if isinstance(size, int)))
        elif len(sizes) == 1:
            parts.append(sizes[0])
        else:
            parts.append(-1)
    unknown = [place for place, part in enumerate(parts) if callable(part)]
    if -1 not in parts and unknown:
        parts[unknown.pop()] = -1
    if parts.count(-1) > 1:
        raise ValueError(f"cannot reshape {groups} to {wanted} without knowing more sizes")
    return reshaped(build, value, [part() if callable(part) else part for part in parts])


def drop_double_turns(model: ir.Model) -> int:
    """Remove ``Reshape(Transpose(heads))`` where the heads are a turned view of that tensor; how many."""
    done = 0
    for node in list(model.graph):
        if node.domain or node.op_type != "Reshape":
            continue
        turned = _order(node.inputs[0])
        if turned is None or turned[1] != TURN or turned[0].inputs[0] is None:
            continue
        view = heads_of(turned[0].inputs[0])
        if view is None:
            continue
        target, result, flat = constant(node.inputs[1]), dimensions(node.outputs[0]), dimensions(view.flat)
        width = view.heads * view.channels
        keeps = target is not None and np.array_equal(target.reshape(-1), [0, 0, width])
        if keeps or (result is not None and flat is not None and None not in result and result == flat):
            redirect(node.outputs[0], view.flat)
            done += 1
    return done
