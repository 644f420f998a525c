"""ATen operations that only move elements: views, copies, slices, repetitions, concatenations."""

from __future__ import annotations

from typing import Any

import torch

from attncompile.frontends import movement
from attncompile.frontends.aten_builder import Builder, Row, Unstated, arguments_of, as_dtype, axis_of
from attncompile.frontends.aten_sizes import product
from attncompile.frontends.graph import Concatenate, Fill, Indices, Info, Reduce
from attncompile.ir import Expr, simplify
from attncompile.ir.expr import ONE, ZERO, Const, apply
from attncompile.ir.simplify import Simplifier


def _same(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    return b.move(source, movement.identity, "same", b.shape(source))


def _dropout(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    probability, training = args[1], args[2]
    if training and probability:
        raise Unstated
    return _same(b, args, kwargs)


def _view(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    """The same elements in another shape; ``view`` to another dtype reads their bytes, which has no row.

    The sizes that were asked for hold as many elements as the source; torch may state what it infers instead, such as
    ``6·s37 // s18`` heads where the model asked for 6.
    """
    source = b.tensor(args[0])
    asked = args[1] if len(args) > 1 else None
    if isinstance(asked, torch.dtype):
        raise Unstated
    if isinstance(asked, list | tuple) and -1 not in asked and len(asked) == len(b.out.shape):
        b.equate(product(b.shape(source)), product(b.number(size) for size in asked))
    return b.move(source, movement.reshape(b.shape(source), b.out.shape), "reshape", b.out.shape)


def _expand(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    return b.move(source, movement.broadcast(b.shape(source), b.out.shape), "expand", b.out.shape)


def _transpose(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    rank = len(b.shape(source))
    order = list(range(rank))
    if rank >= 2:
        first, second = (axis_of(a, rank) for a in (args[1:3] if len(args) > 2 else (rank - 2, rank - 1)))
        order[first], order[second] = order[second], order[first]
    return b.move(source, movement.permute(order), "permute", b.out.shape)


def _permute(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    rank = len(b.shape(source))
    return b.move(source, movement.permute([axis_of(a, rank) for a in args[1]]), "permute", b.out.shape)


def _movedim(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    rank = len(b.shape(source))
    moved, targets = ([a] if isinstance(a, int) else list(a) for a in args[1:3])
    placed = {axis_of(t, rank): axis_of(m, rank) for m, t in zip(moved, targets, strict=True)}
    rest = iter(axis for axis in range(rank) if axis not in placed.values())
    order = [placed[axis] if axis in placed else next(rest) for axis in range(rank)]
    return b.move(source, movement.permute(order), "permute", b.out.shape)


def _unsqueeze(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    return b.move(source, movement.unsqueeze([axis_of(args[1], len(b.out.shape))]), "unsqueeze", b.out.shape)


def _squeeze(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    shape = b.shape(source)
    asked = range(len(shape)) if len(args) < 2 else [args[1]] if isinstance(args[1], int) else args[1]
    axes = [axis_of(a, len(shape)) for a in asked if shape[axis_of(a, len(shape))] == ONE]
    return b.move(source, movement.squeeze(axes), "squeeze", b.out.shape)


def _position(b: Builder, argument: Any, size: Expr) -> Expr:
    """A start or index, counted from the end when negative."""
    number = b.number(0 if argument is None else argument)
    if isinstance(number, Const):
        return simplify(size + number) if number.value < 0 else number
    return number


def _slice(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    shape = b.shape(source)
    axis = axis_of(args[1] if len(args) > 1 else 0, len(shape))
    size, end, step = shape[axis], args[3] if len(args) > 3 else None, args[4] if len(args) > 4 else 1
    start = _position(b, args[2] if len(args) > 2 else 0, size)
    if step == 1 and (end is None or (isinstance(end, int) and end >= _NO_END)):
        start = simplify(size - b.out.shape[axis])  # what is left says where it began, with torch's own clamping
    elif not isinstance(start, Const) or not isinstance(size, Const):
        start = start if Simplifier({}).nonnegative(start) else simplify(apply("max", start, ZERO))
    else:
        start = Const(min(max(start.value, 0), size.value))
    return b.move(source, movement.slices(axis, start, step), "slice", b.out.shape)


_NO_END = 2**63 - 1
"""The end of a slice that has none."""


def _diff(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    """Each element less the one before it, along an axis, as often as is asked for; truth values: whether they differ.

    ``prepend`` and ``append`` are parts of what is subtracted from itself.
    """
    source, times, axis, prepend, append = arguments_of(b.node).values()
    if times < 1:
        raise Unstated
    axis = axis_of(axis, len(b.out.shape))
    parts = tuple(b.tensor(part) for part in (prepend, source, append) if part is not None)
    length = simplify(apply("add", *(b.shape(part)[axis] for part in parts), ZERO))
    whole, dtype = parts[0], b.out.dtype

    def shape(size: Expr) -> Indices:
        return (*b.out.shape[:axis], size, *b.out.shape[axis + 1 :])

    if len(parts) > 1:
        whole = b.emit(Concatenate(b.name(), parts, axis), Info(shape(length), dtype))
    for number in range(1, times + 1):
        rest = shape(b.out.shape[axis] if number == times else simplify(length - number))
        before, after = (b.move(whole, movement.slices(axis, Const(n), 1), "slice", rest) for n in (0, 1))
        negative = before if dtype == "bool" else b.pointwise("mul", Const(-1), before)
        whole = b.pointwise("ne", after, before) if dtype == "bool" else b.pointwise("add", after, negative)
    return whole


def _narrow(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    axis = axis_of(args[1], len(b.shape(source)))
    start = _position(b, args[2], b.shape(source)[axis])
    return b.move(source, movement.slices(axis, start, 1), "slice", b.out.shape)


def _select(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    shape = b.shape(source)
    axis = axis_of(args[1], len(shape))
    return b.move(source, movement.select(axis, _position(b, args[2], shape[axis])), "select", b.out.shape)


def _flip(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    shape = b.shape(source)
    return b.move(source, movement.flip([axis_of(a, len(shape)) for a in args[1]], shape), "flip", shape)


def _repeat(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    shape = b.shape(source)
    offset = len(b.out.shape) - len(shape)

    def index_map(indices: Indices) -> Indices:
        return tuple(apply("mod", indices[axis + offset], size) for axis, size in enumerate(shape))

    return b.move(source, index_map, "repeat", b.out.shape)


def _repeat_interleave(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    repeats = b.number(args[1])
    dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
    if dim is None:
        raise Unstated
    axis = axis_of(dim, len(b.shape(source)))

    def index_map(indices: Indices) -> Indices:
        return (*indices[:axis], apply("floordiv", indices[axis], repeats), *indices[axis + 1 :])

    return b.move(source, index_map, "repeat", b.out.shape)


def _diagonal(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    rank = len(b.shape(source))
    given = arguments_of(b.node)
    offset, first, second = given["offset"], axis_of(given["dim1"], rank), axis_of(given["dim2"], rank)
    begins = {first: max(-offset, 0), second: max(offset, 0)}

    def index_map(indices: Indices) -> Indices:
        rest = iter(indices[:-1])
        return tuple(indices[-1] + begins[axis] if axis in begins else next(rest) for axis in range(rank))

    return b.move(source, index_map, "diagonal", b.out.shape)


def _unfold(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    """Windows of an axis: element ``w`` of window ``n`` is ``n · step + w``; the last axis runs over ``w``."""
    source = b.tensor(args[0])
    axis, step = axis_of(args[1], len(b.shape(source))), args[3]

    def index_map(indices: Indices) -> Indices:
        return (*indices[:axis], simplify(indices[axis] * step + indices[-1]), *indices[axis + 1 : -1])

    return b.move(source, index_map, "unfold", b.out.shape)


def _as_strided(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    """Any places of the memory of a tensor that lies in it without gaps: a place is divided by the tensor's strides."""
    source, given = b.tensor(args[0]), arguments_of(b.node)
    value = args[0].meta["val"]
    shape = b.shape(source)
    order = _row_major(b, value)
    strides = [b.number(stride) for stride in given["stride"]]
    begin = b.number(given["storage_offset"] or 0)
    linear = movement.reshape(tuple(shape[axis] for axis in order), (product(shape),))

    def index_map(indices: Indices) -> Indices:
        place = begin
        for index, stride in zip(indices, strides, strict=True):
            place = apply("add", place, apply("mul", index, stride))
        found = linear((place,))
        return tuple(found[order.index(axis)] for axis in range(len(shape)))

    return b.move(source, index_map, "as_strided", b.out.shape)


def _row_major(b: Builder, value: torch.Tensor) -> list[int]:
    """The axes of a tensor that fills its memory, outermost first."""
    offset, held = value.storage_offset(), value.untyped_storage().nbytes()
    if offset != 0 or simplify(b.number(held) - value.element_size() * product(b.size(n) for n in value.shape)) != ZERO:
        raise Unstated
    left, order = list(range(value.dim())), list[int]()
    expected: Expr = ONE
    while left:
        found = [axis for axis in left if simplify(b.number(value.stride(axis)) - expected) == ZERO]
        # an axis of size 1 moves nothing on: what has its stride lies outside it
        found.sort(key=lambda axis: b.size(value.shape[axis]) != ONE)
        if not found:
            raise Unstated
        order.insert(0, found[0])
        left.remove(found[0])
        expected = simplify(expected * b.size(value.shape[found[0]]))
    return order


def _pad(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    """A constant before and after the last axes, from the last axis on; a negative count cuts."""
    given, value = arguments_of(b.node), b.tensor(args[0])
    if given.get("mode", "constant") != "constant":
        raise Unstated
    counts, constant = given["pad"], as_dtype(b.number(given["value"] or 0), b.out.dtype)
    for place in range(len(counts) // 2):
        axis = len(b.shape(value)) - 1 - place
        value = _padded(b, value, axis, [b.number(count) for count in counts[2 * place : 2 * place + 2]], constant)
    return value if b.made else _same(b, args, kwargs)


def _padded(b: Builder, value: str, axis: int, counts: list[Expr], constant: Expr) -> str:
    """One axis of a value, longer by the counts before and after it."""
    shape, dtype = b.shape(value), b.info(value).dtype
    cut = [-int(count.value) if isinstance(count, Const) and count.value < 0 else 0 for count in counts]
    added = [ZERO if less else count for count, less in zip(counts, cut, strict=True)]
    if not all(Simplifier({}).nonnegative(count) for count in added):
        raise Unstated

    def resized(size: Expr) -> Indices:
        return (*shape[:axis], simplify(size), *shape[axis + 1 :])

    if any(cut):
        value = b.move(value, movement.slices(axis, Const(cut[0]), 1), "slice", resized(shape[axis] - sum(cut)))
    before, after = (
        [] if count == ZERO else [b.emit(Fill(b.name(), constant), Info(resized(count), dtype))] for count in added
    )
    if not before and not after:
        return value
    longer = b.shape(value)[axis] + added[0] + added[1]
    return b.emit(Concatenate(b.name(), (*before, value, *after), axis), Info(resized(longer), dtype))


def _concatenate(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    parts = tuple(b.tensor(part) for part in args[0])
    axis = axis_of(args[1] if len(args) > 1 else kwargs.get("dim", 0), len(b.out.shape))
    if any(len(b.shape(part)) != len(b.out.shape) for part in parts):
        raise Unstated
    return b.emit(Concatenate(b.name(), parts, axis), b.out)


def _stack(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    axis = axis_of(args[1] if len(args) > 1 else 0, len(b.out.shape))
    shape = (*b.out.shape[:axis], ONE, *b.out.shape[axis + 1 :])
    parts = tuple(b.move(b.tensor(p), movement.unsqueeze([axis]), "unsqueeze", shape) for p in args[0])
    return b.emit(Concatenate(b.name(), parts, axis), b.out)


def _part(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    """One result of a split, chunk or unbind."""
    whole, number = args
    if not isinstance(whole, torch.fx.Node):
        raise Unstated
    kind = str(whole.target)
    if kind.startswith("aten.meshgrid"):
        return _grid(b, whole, number)
    if not isinstance(whole.args[0], torch.fx.Node):
        raise Unstated
    source = b.value(whole.args[0], whole)
    rank = len(b.shape(source))
    further: list[Any] = list(whole.args[1:])
    parts = whole.meta["val"]
    if kind.startswith("aten.max.dim") and number == 0:
        return b.emit(
            Reduce(b.name(), source, "max", (axis_of(further[0], rank),), bool(further[1:] and further[1])),
            b.out,
        )
    if "unbind" in kind:
        axis = axis_of(further[0] if further else 0, rank)
        return b.move(source, movement.select(axis, Const(number)), "select", b.out.shape)
    if not any(name in kind for name in ("split", "chunk")):
        raise Unstated
    dim: Any = further[1] if len(further) > 1 else whole.kwargs.get("dim", 0)
    axis = axis_of(dim, rank)
    start: Expr = ZERO
    for part in parts[:number]:
        start = simplify(start + b.size(part.shape[axis]))
    return b.move(source, movement.slices(axis, start, 1), "slice", b.out.shape)


def _grid(b: Builder, whole: torch.fx.Node, number: int) -> str:
    """One result of ``meshgrid``: an input along its own axis; ``xy`` exchanges the first two axes."""
    axis = number
    if whole.kwargs.get("indexing", "ij") == "xy" and number < 2:
        axis = 1 - number
    tensors: Any = whole.args[0]
    source = b.value(tensors[number], whole)
    scalar = not b.shape(source)
    return b.move(source, lambda indices: () if scalar else (indices[axis],), "expand", b.out.shape)


MOVEMENT: dict[str, Row] = {
    "alias": _same,
    "contiguous": _same,
    "clone": _same,
    "detach": _same,
    "detach_": _same,
    "lift_fresh_copy": _same,
    "lift_fresh": _same,
    "dropout": _dropout,
    "view": _view,
    "view_as": _view,
    "reshape": _view,
    "_unsafe_view": _view,
    "flatten": _view,
    "unflatten": _view,
    "expand": _expand,
    "broadcast_to": _expand,
    "expand_as": _expand,
    "transpose": _transpose,
    "t": _transpose,
    "swapaxes": _transpose,
    "swapdims": _transpose,
    "numpy_T": _transpose,
    "mT": _transpose,
    "permute": _permute,
    "movedim": _movedim,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "slice": _slice,
    "narrow": _narrow,
    "diff": _diff,
    "select": _select,
    "moveaxis": _movedim,
    "adjoint": _transpose,
    "ravel": _view,
    "reshape_as": _view,
    "diagonal": _diagonal,
    "unfold": _unfold,
    "as_strided": _as_strided,
    "tile": _repeat,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "narrow_copy": _narrow,
    "flip": _flip,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "cat": _concatenate,
    "concat": _concatenate,
    "concatenate": _concatenate,
    "stack": _stack,
    "getitem": _part,
}
"""Operations that only move elements."""
