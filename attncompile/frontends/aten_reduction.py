"""ATen operations whose elements are made of many: products, sums, maxima, softmax."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any, Literal

from attncompile.frontends import movement
from attncompile.frontends.aten_builder import Builder, Row, Unstated, axis_of
from attncompile.frontends.graph import Contract, CumulativeSum, Indices, Info, Linear, Pointwise, Reduce, Softmax
from attncompile.ir import Expr
from attncompile.ir.expr import ONE, Const


def _labels(count: int, offset: int = 0) -> tuple[str, ...]:
    return tuple(f"batch{n + offset}" for n in range(count))


def contract_matmul(left: Indices, right: Indices) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Labels of NumPy's ``matmul``, whose batch axes broadcast right-aligned."""
    if len(left) < 2 or len(right) < 2:
        raise Unstated
    batch = max(len(left), len(right)) - 2
    return (
        (*_labels(len(left) - 2, batch - len(left) + 2), "row", "inner"),
        (*_labels(len(right) - 2, batch - len(right) + 2), "inner", "column"),
        (*_labels(batch), "row", "column"),
    )


def _agree(b: Builder, left: Mapping[str, Expr], right: Mapping[str, Expr]) -> None:
    """Sizes of one label are equal, except where one of them is the constant 1 and broadcast."""
    for label in left.keys() & right.keys():
        if ONE not in (left[label], right[label]):
            b.equate(left[label], right[label])


def _matmul(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    left, right = b.tensor(args[0]), b.tensor(args[1])
    labels = contract_matmul(b.shape(left), b.shape(right))
    _agree(b, dict(zip(labels[0], b.shape(left), strict=True)), dict(zip(labels[1], b.shape(right), strict=True)))
    return b.emit(Contract(b.name(), left, right, *labels), b.out)


def _baddbmm(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    product = _matmul(b, args[1:3], {})
    scaled = b.pointwise("mul", b.number(kwargs.get("alpha", 1)), product)
    if kwargs.get("beta", 1) == 0:
        return scaled
    added = b.pointwise("mul", b.number(kwargs.get("beta", 1)), b.tensor(args[0]))
    return b.pointwise("add", scaled, added)


def _einsum(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    equation, tensors = args[0].replace(" ", ""), args[1]
    if len(tensors) != 2:
        raise Unstated
    left, right = b.tensor(tensors[0]), b.tensor(tensors[1])
    inputs, arrow, output = equation.partition("->")
    first, second = inputs.split(",")
    if "..." in equation:
        if not arrow:
            raise Unstated
        first, second, output = _without_ellipsis(first, second, output, len(b.shape(left)), len(b.shape(right)))
    if not arrow:
        output = "".join(sorted(c for c in set(first + second) if (first + second).count(c) == 1))
    if len(set(first)) != len(first) or len(set(second)) != len(second):
        raise Unstated
    _agree(b, dict(zip(first, b.shape(left), strict=True)), dict(zip(second, b.shape(right), strict=True)))
    return b.emit(Contract(b.name(), left, right, tuple(first), tuple(second), tuple(output)), b.out)


def _without_ellipsis(first: str, second: str, output: str, rank: int, other_rank: int) -> tuple[str, str, str]:
    """The terms of an equation with letters for the axes that ``...`` stands for, aligned at the right."""
    free = [letter for letter in string.ascii_letters if letter not in first + second + output]
    counts = [r - len(term) + 3 if "..." in term else 0 for term, r in ((first, rank), (second, other_rank))]
    letters = "".join(free[: max(counts)])
    return (
        first.replace("...", letters[len(letters) - counts[0] :]),
        second.replace("...", letters[len(letters) - counts[1] :]),
        output.replace("...", letters),
    )


def _vector_product(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    """``mv``: a matrix times a vector."""
    left, right = b.tensor(args[0]), b.tensor(args[1])
    return b.emit(Contract(b.name(), left, right, ("row", "inner"), ("inner",), ("row",)), b.out)


def _inner(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    """The sum over both last axes, all other axes kept."""
    left, right = b.tensor(args[0]), b.tensor(args[1])
    first, second = ([f"{side}{n}" for n in range(len(b.shape(t)) - 1)] for side, t in (("l", left), ("r", right)))
    labels = (*first, "inner"), (*second, "inner"), (*first, *second)
    return b.emit(Contract(b.name(), left, right, *labels), b.out)


def _tensordot(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    """The sum over pairs of axes; what is left of the first operand comes first."""
    left, right = b.tensor(args[0]), b.tensor(args[1])
    pairs: list[dict[int, str]] = [
        {axis_of(axis, len(b.shape(t))): f"summed{n}" for n, axis in enumerate(axes)}
        for t, axes in ((left, args[2]), (right, args[3]))
    ]
    first, second = (
        tuple(found.get(n, f"{side}{n}") for n in range(len(b.shape(t))))
        for side, t, found in (("l", left, pairs[0]), ("r", right, pairs[1]))
    )
    kept = tuple(label for label in (*first, *second) if not label.startswith("summed"))
    return b.emit(Contract(b.name(), left, right, first, second, kept), b.out)


def _outer(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    left, right = b.tensor(args[0]), b.tensor(args[1])
    column = b.move(left, movement.unsqueeze([1]), "unsqueeze", (b.shape(left)[0], ONE))
    return b.pointwise("mul", column, right)


def _largest(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    """``max`` of two tensors, or of all elements; the one over an axis gives two results."""
    if len(args) == 2:
        return b.pointwise("max", b.tensor(args[0]), b.tensor(args[1]))
    return _reduce("max")(b, args, kwargs)


def _smallest(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    """``min`` of two tensors; of all elements it stays opaque."""
    if len(args) != 2:
        raise Unstated
    return b.pointwise("min", b.tensor(args[0]), b.tensor(args[1]))


def _linear(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    bias = b.tensor(args[2]) if len(args) > 2 and args[2] is not None else None
    return b.emit(Linear(b.name(), b.tensor(args[0]), b.tensor(args[1]), bias), b.out)


def _addmm(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    if kwargs.get("alpha", 1) != 1 or kwargs.get("beta", 1) != 1:
        raise Unstated
    return b.emit(Linear(b.name(), b.tensor(args[1]), b.tensor(args[2]), b.tensor(args[0]), True), b.out)


def _softmax(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    return b.emit(Softmax(b.name(), b.tensor(args[0]), axis_of(args[1], len(b.out.shape))), b.out)


def _cumulative_sum(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    if not b.out.shape:
        raise Unstated
    return b.emit(CumulativeSum(b.name(), source, axis_of(args[1], len(b.out.shape))), b.out)


def _log_softmax(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    weights = b.emit(Softmax(b.name(), b.tensor(args[0]), axis_of(args[1], len(b.out.shape))), b.out)
    return b.pointwise("log", weights)


def _logsumexp(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    """``max x + log Σ exp(x − max x)`` over one axis."""
    source = b.tensor(args[0])
    shape = b.shape(source)
    (axis,) = [args[1]] if isinstance(args[1], int) else args[1] if len(args[1]) == 1 else [None]
    if axis is None or not b.info(source).dtype.startswith(("float", "bfloat")):
        raise Unstated
    axis = axis_of(axis, len(shape))
    row = Info((*shape[:axis], ONE, *shape[axis + 1 :]), b.info(source).dtype)
    largest = b.emit(Reduce(b.name(), source, "max", (axis,), True), row)
    shifted = b.pointwise("add", source, b.pointwise("mul", Const(-1.0), largest))
    parts = b.pointwise("exp", shifted)
    total = b.pointwise("log", b.emit(Reduce(b.name(), parts, "sum", (axis,), True), row))
    found = b.pointwise("add", largest, total)
    keeps = bool(args[2] if len(args) > 2 else kwargs.get("keepdim", False))
    return found if keeps else b.move(found, movement.squeeze([axis]), "squeeze", b.out.shape)


def _reduce(kind: Literal["sum", "max"]) -> Row:
    def row(b: Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
        source = b.tensor(args[0])
        rank = len(b.shape(source))
        asked = args[1] if len(args) > 1 else kwargs.get("dim")
        if b.out.dtype == "bool" or (kind == "sum" and not b.info(source).dtype.startswith(("float", "bfloat"))):
            raise Unstated
        axes = range(rank) if asked is None or asked == [] else [asked] if isinstance(asked, int) else asked
        keeps = bool(args[2] if len(args) > 2 else kwargs.get("keepdim", False))
        summed = tuple(sorted(axis_of(a, rank) for a in axes))
        factors = _factors(b, source) if kind == "sum" and len(summed) == 1 else None
        if factors is None:
            return b.emit(Reduce(b.name(), source, kind, summed, keeps), b.out)
        labels = tuple(f"axis{n}" for n in range(rank))
        kept = labels[: summed[0]] + labels[summed[0] + 1 :]
        shape = b.shape(source)
        left, right = factors
        product = b.emit(
            Contract(
                b.name(),
                left,
                right,
                labels[rank - len(b.shape(left)) :],
                labels[rank - len(b.shape(right)) :],
                kept,
            ),
            Info((*shape[: summed[0]], *shape[summed[0] + 1 :]), b.out.dtype),
        )
        return b.move(product, movement.unsqueeze(summed), "unsqueeze", b.out.shape) if keeps else product

    return row


def _factors(b: Builder, value: str) -> tuple[str, str] | None:
    """The two tensors whose outer product a value is: its sum over an axis is then a contraction.

    Each of the two lacks an axis; a product of equal shapes, or with a mask that only one side broadcasts, is
    none.
    """
    match b.producer.get(value):
        case Pointwise(_, "mul", (str(left), str(right))):
            shape = b.shape(value)
            lacking = [len(b.shape(f)) < len(shape) or ONE in b.shape(f) for f in (left, right)]
            return (left, right) if all(lacking) and (b.shape(left) != shape or b.shape(right) != shape) else None
    return None


REDUCTION: dict[str, Row] = {
    "matmul": _matmul,
    "bmm": _matmul,
    "mm": _matmul,
    "baddbmm": _baddbmm,
    "einsum": _einsum,
    "mv": _vector_product,
    "inner": _inner,
    "tensordot": _tensordot,
    "outer": _outer,
    "linear": _linear,
    "addmm": _addmm,
    "softmax": _softmax,
    "_softmax": _softmax,
    "log_softmax": _log_softmax,
    "_log_softmax": _log_softmax,
    "logsumexp": _logsumexp,
    "sum": _reduce("sum"),
    "cumsum": _cumulative_sum,
    "amax": _reduce("max"),
    "max": _largest,
    "min": _smallest,
}
"""Operations whose elements are made of many."""
