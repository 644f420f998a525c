"""The two layouts of heads: ``[B, H, S, D]`` of a Spec and the flat ``[B, S, H*D]`` that projections and operators use.

A projection makes the flat one, the graph turns it with ``Reshape`` and ``Transpose``, and a fused operator wants it
flat again. Looking through the turn saves both copies.
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
    if turned is None or turned[1] != TURN:
        return None
    split = producer(turned[0].inputs[0], "Reshape")
    if split is None or split.inputs[0] is None:
        return None
    flat, whole = split.inputs[0], split.outputs[0]
    heads, channels, width = known_axis(whole, 2), known_axis(whole, 3), known_axis(flat, 2)
    sizes, inner = dimensions(whole), dimensions(flat)
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
        groups: for each axis of ``value`` the Spec axes it is made of, outermost first; ``(("b",), ("i",), ("h", "d"))``
            is a flat ``[B, I, H*D]``, an empty group an axis of size 1.
    """

    value: ir.Value
    groups: Groups

    def behind_turn(self) -> Operand:
        """The flat tensor that this one is a turned view of, or this one."""
        axes = tuple(group[0] for group in self.groups if len(group) == 1)
        view = heads_of(self.value) if len(axes) == 4 == len(self.groups) else None
        return self if view is None else Operand(view.flat, flat_groups(axes))


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
    operand = Operand(operand.value, operand.groups)
    if operand.groups == wanted:
        return operand.value
    behind = operand.behind_turn()
    if behind.groups == wanted:
        return behind.value
    value, groups = operand.value, operand.groups
    if any(len(group) != 1 for group in groups):
        singles = single_groups(axis for group in groups for axis in group)
        value, groups = _reshape(build, value, groups, singles, extents), singles
    order = tuple(axis for group in wanted for axis in group)
    current = tuple(group[0] for group in groups)
    if sorted(order) != sorted(current):
        raise ValueError(f"a tensor with axes {current} cannot be laid out as {wanted}")
    if order != current:
        value = build("Transpose", value, perm=[current.index(axis) for axis in order])
    groups = single_groups(order)
    return value if groups == wanted else _reshape(build, value, groups, wanted, extents)


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
    numbers = [part for part in parts if isinstance(part, int)]
    if len(numbers) == len(parts):
        return build("Reshape", value, build.constant(numbers))
    pieces = [build.constant([part]) if isinstance(part, int) else part() for part in parts]
    return build("Reshape", value, build("Concat", *pieces, axis=0))


def drop_double_turns(model: ir.Model) -> int:
    """Remove ``Reshape(Transpose(heads))`` where the heads are a turned view of the same flat tensor; how many."""
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
