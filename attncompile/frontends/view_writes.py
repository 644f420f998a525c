"""Writes through views of a tensor, as pure functions of indices.

``x[:, 1:].add_(y)`` changes the elements of ``x`` that the slice shows, and those of every other view of ``x`` that
show the same memory. The version of a view that a write leaves is

    where(the element lies in the memory that was written, what was written at its place there, the version before)

in which the place is found by going from the view to the nearest tensor that both are views of, and from there back
into the view that was written. Going down is composing index maps; going back is inverting them, which is possible
exactly for what torch lets one write through: slices, selections, permutations, reshapes and diagonals, but not
repetitions or overlapping windows. Where a map has no inverse, or nothing says what view a tensor is, the version
stays opaque.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import getitem

import torch

from attncompile.frontends import movement
from attncompile.frontends.graph import Indices, Info, Kept, Move, Node, Opaque, Write
from attncompile.frontends.memory import Change, Versions, written_arguments
from attncompile.frontends.torch_internals import is_batched
from attncompile.ir import Expr, Index, simplify
from attncompile.ir.expr import ONE, ZERO, Const, apply, substitute, symbols
from attncompile.ir.simplify import Simplifier

Place = Callable[[Indices], tuple[Indices, Indices]]
"""The conditions under which an element lies inside a view, and its indices there."""

CHANGED = "memory changed in place"
"""What a version is called that nothing states."""


class NoInverse(ValueError):
    """An index map whose inverse is not known; the message says which and why."""


# --- what is a view of what ---------------------------------------------------------------------------------


def storage_of(node: torch.fx.Node) -> int | None:
    """The identity of the memory that tracing saw behind a node's value."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or is_batched(value):
        return None
    return value.untyped_storage()._cdata


def view_path(node: torch.fx.Node) -> tuple[torch.fx.Node, ...]:
    """From the tensor that owns the memory to a node that is a view of it, one operation after the other.

    What works in place and gives its target back is left out: it is the same view.
    """
    path: list[torch.fx.Node] = []
    seen: torch.fx.Node | None = node
    while seen is not None:
        targets = written_arguments(seen)
        if len(targets) == 1 and storage_of(targets[0]) == storage_of(seen):
            seen = targets[0]
            continue
        path.append(seen)
        seen = _viewed(seen)
    return tuple(reversed(path))


def _viewed(node: torch.fx.Node) -> torch.fx.Node | None:
    """The node that another is a view of; ``None`` where it has memory of its own."""
    storage = storage_of(node)
    if node.op != "call_function" or storage is None:
        return None
    whole = node.args[0] if node.target is getitem else node
    read = whole.all_input_nodes if isinstance(whole, torch.fx.Node) else []
    found = [argument for argument in read if storage_of(argument) == storage]
    return found[0] if len(found) == 1 else None


def common_view(
    one: torch.fx.Node, other: torch.fx.Node
) -> tuple[tuple[torch.fx.Node, ...], tuple[torch.fx.Node, ...]] | None:
    """The ways to two nodes from the last node that both are views of, which begins both; ``None`` without one."""
    first, second = view_path(one), view_path(other)
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] is second[shared]:
        shared += 1
    return (first[shared - 1 :], second[shared - 1 :]) if shared and not _repeats(first[0]) else None


def _repeats(node: torch.fx.Node) -> bool:
    """Whether a tensor may show one place of its memory at several indices."""
    value = node.meta["val"]
    return any(
        isinstance(stride, int) and stride == 0 and not (isinstance(size, int) and size <= 1)
        for size, stride in zip(value.shape, value.stride(), strict=True)
    )


# --- the inverse of an index map ----------------------------------------------------------------------------


def inverted(move: Move, source: Indices, target: Indices) -> Place:
    """Where an element of the source of a view is in the view.

    Args:
        move: the view.
        source, target: the shapes of what it shows, and its own.

    Raises:
        NoInverse: when several elements of the view may be one of the source, or nothing tells which.
    """
    if move.what == "reshape":
        back = movement.reshape(target, source)
        return lambda indices: ((), back(indices))
    own = tuple(Index(f"x{axis}") for axis in range(len(target)))
    simplifier = Simplifier({x.name: size for x, size in zip(own, target, strict=True)})
    place = tuple(simplifier(index) for index in move.index_map(own))
    solved: dict[Index, tuple[int, _Affine]] = {}
    for axis, index in enumerate(place):
        read = [x for x in own if x in symbols(index)]
        if len(read) > 1:
            raise NoInverse(f"{move.what} shows overlapping windows")
        if read and read[0] not in solved:
            solved[read[0]] = (axis, _affine(simplifier, move.what, index, read[0]))
    lost = [x for x, size in zip(own, target, strict=True) if x not in solved and size != ONE]
    if lost:
        raise NoInverse(f"{move.what} shows an element more than once")

    def inverse(indices: Indices) -> tuple[Indices, Indices]:
        inside: list[Expr] = []
        found: dict[Expr, Expr] = {x: ZERO for x in own}
        for x, size in zip(own, target, strict=True):
            if x in solved:
                axis, affine = solved[x]
                found[x] = affine.back(indices[axis])
                inside += affine.inside(indices[axis], size, source[axis])
        defining = {axis for axis, _ in solved.values()}
        for axis, index in enumerate(place):
            if axis not in defining and source[axis] != ONE:
                inside.append(apply("eq", indices[axis], substitute(index, found)))
        return tuple(inside), tuple(found[x] for x in own)

    return inverse


@dataclass(frozen=True)
class _Affine:
    """An index ``start + step · x`` of a source, ``x`` being one of the view."""

    start: Expr
    step: int

    def back(self, index: Expr) -> Expr:
        """The view's index of an element of the source that the view shows."""
        if self.step < 0:
            return apply("floordiv", self.start - index, Const(-self.step))
        return apply("floordiv", index - self.start, Const(self.step))

    def inside(self, index: Expr, size: Expr, source: Expr) -> list[Expr]:
        """When the view shows an element, ``size`` and ``source`` being the lengths of the view and of the source."""
        if self.step == 1 and self.start == ZERO and size == source:
            return []
        end = self.start + self.step * (size - 1)
        low, high = (self.start, end) if self.step > 0 else (end, self.start)
        found: list[Expr] = []
        step = Const(abs(self.step))
        first = int(self.start.value) if isinstance(self.start, Const) else -1
        if not (self.step > 0 and 0 <= first < self.step):  # else its remainder says it all
            found.append(apply("ge", index, simplify(low)))
        if self.step < 0 or simplify(size - (source - self.start + step - 1) // step) != ZERO:
            found.append(apply("le", index, simplify(high)))  # else the view goes on to the end of what it shows
        if step != ONE and isinstance(self.start, Const):
            found.append(apply("eq", apply("mod", index, step), Const(int(self.start.value) % int(step.value))))
        elif step != ONE:
            found.append(apply("eq", apply("mod", index - self.start, step), ZERO))
        return found


def _affine(simplifier: Simplifier, what: str, index: Expr, x: Index) -> _Affine:
    start = simplifier(substitute(index, {x: ZERO}))
    step = simplifier(substitute(index, {x: ONE}) - start)
    if not isinstance(step, Const) or step == ZERO or simplifier(start + step * x) != index:
        raise NoInverse(f"{what} is not affine")
    return _Affine(start, int(step.value))


# --- what a write leaves ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ViewWrites:
    """States the versions that writes leave.

    Attributes:
        nodes: the nodes of the native graph by name.
        versions: which versions there are.
        producer: what is stated so far.
        infos: shapes and dtypes so far.
    """

    nodes: Mapping[str, torch.fx.Node]
    versions: Versions
    producer: Mapping[str, Node]
    infos: Mapping[str, Info]

    def after(self, value: str, change: Change) -> Node:
        """The version of a value that a change leaves; :class:`Opaque` with the reason where it can not be stated."""
        shape = self.infos[value].shape
        try:
            place = self._place(self.versions.root(value), change)
        except NoInverse as reason:
            return Opaque(change.after, change.read, f"{CHANGED} ({reason})")
        own = tuple(Index(f"x{axis}") for axis in range(len(shape)))
        simplifier = Simplifier({x.name: size for x, size in zip(own, shape, strict=True)})
        inside = {simplifier(condition) for condition in place(own)[0]}
        if Const(False) in inside:
            return Kept(change.after, change.before, movement.identity, "kept")
        if inside <= {Const(True)}:
            return Move(change.after, change.written, lambda indices: place(indices)[1], "written")
        return Write(change.after, change.before, change.written, place)

    def _place(self, root: str, change: Change) -> Place:
        """Where an element of a node is in the view that was written."""
        if not change.written:
            raise NoInverse(f"{change.writer} does not give back what it wrote")
        target = self.versions.root(change.writer)
        ways = common_view(self.nodes[root], self.nodes[target])
        if ways is None:
            raise NoInverse(f"nothing says how {root} and {target} share memory")
        shared = ways[0][0].name
        down = self._moves(root, shared, {node.name for node in ways[0]})
        back = [
            inverted(move, self.infos[move.source].shape, self.infos[move.output].shape)
            for move in reversed(self._moves(target, shared, {node.name for node in ways[1]}))
        ]

        def place(indices: Indices) -> tuple[Indices, Indices]:
            inside: Indices = ()
            for move in down:
                indices = tuple(simplify(index) for index in move.index_map(indices))
            for inverse in back:
                conditions, indices = inverse(indices)
                inside += conditions
            return inside, indices

        return place

    def _moves(self, node: str, shared: str, way: set[str]) -> list[Move]:
        """How the elements of a view are those of what it is a view of, nearest first."""
        found: list[Move] = []
        value = self.versions.made(node)
        while (name := self.versions.root(value)) != shared:
            made = self.producer.get(value)
            if name not in way or not isinstance(made, Move):
                raise NoInverse(f"{name} is no movement of data")
            found.append(made)
            value = made.source
        return found


__all__ = ["CHANGED", "NoInverse", "Place", "ViewWrites", "common_view", "inverted", "storage_of", "view_path"]
