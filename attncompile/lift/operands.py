"""Operands of a contraction: which tensor a product reads, in which layout, with which factor."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attncompile.frontends.graph import Cast, Contract, Graph, Indices, Move, Pointwise
from attncompile.ir import Expr, Index, Kind, Load, simplify
from attncompile.ir.expr import ONE, ZERO, Apply, Const, Score, Weight, apply, loads, substitute, symbols, walk
from attncompile.ir.simplify import Simplifier
from attncompile.ir.types import element_kind
from attncompile.lift.interpret import Interpreter
from attncompile.lift.program import Layout


@dataclass(frozen=True)
class Operand:
    """A tensor on the way to a contraction.

    Attributes:
        value: the graph value.
        indices: its element that the product reads, over the symbols of the site.
        factor: what it is multiplied with on the way (free of the summed index).
    """

    value: str
    indices: Indices
    factor: Expr


def operand_indices(graph: Graph, node: Contract, side: str, output: Indices, summed: Mapping[str, Expr]) -> Indices:
    """The element of one side of a contraction that contributes to an output element."""
    name, labels = (node.left, node.left_labels) if side == "left" else (node.right, node.right_labels)
    position = {**dict(zip(node.output_labels, output, strict=True)), **summed}
    sizes = label_sizes(graph, node)
    return tuple(
        ZERO if size == ONE and sizes[label] != ONE else position[label]
        for label, size in zip(labels, graph.infos[name].shape, strict=True)
    )


def label_sizes(graph: Graph, node: Contract) -> dict[str, Expr]:
    """The size of each label of a contraction: of two sizes the one that is not 1, a constant before a
    symbol.
    """
    found: dict[str, Expr] = {}
    for name, labels in ((node.left, node.left_labels), (node.right, node.right_labels)):
        for label, size in zip(labels, graph.infos[name].shape, strict=True):
            if label not in found or found[label] == ONE or (size != ONE and isinstance(size, Const)):
                found[label] = size
    return found


def trace_operand(interpreter: Interpreter, value: str, indices: Indices, summed: frozenset[Expr]) -> list[Operand]:
    """The tensors that a product could be said to read, nearest first.

    Follows movements of data, float casts and factors that do not depend on the summed indices.
    """
    graph, found, factor = interpreter.graph, [], Const(1.0)
    indices = tuple(interpreter.simplifier(index) for index in indices)
    scale: Expr = factor
    while True:
        if graph.is_readable(value) and value not in interpreter.dependent:
            found.append(Operand(value, indices, interpreter.simplifier(scale)))
        node = graph.producer.get(value)
        if isinstance(node, Move):
            value, indices = node.source, tuple(interpreter.simplifier(i) for i in node.index_map(indices))
        elif isinstance(node, Cast) and element_kind(node.dtype) is element_kind(graph.infos[node.source].dtype):
            value = node.source
        elif isinstance(node, Pointwise) and node.operator in ("mul", "div"):
            followed = _followed_factor(interpreter, node, indices, summed)
            if followed is None:
                return found
            value, indices, applied = followed
            scale = apply("mul", scale, applied)
        else:
            return found


def _followed_factor(
    interpreter: Interpreter, node: Pointwise, indices: Indices, summed: frozenset[Expr]
) -> tuple[str, Indices, Expr] | None:
    """Through ``x · f`` or ``x / f``, when the summed index does not move the scalar ``f``.

    A scalar that the graph finds from its data, such as the scale of numbers rounded in each call, stays with its
    tensor.
    """
    graph = interpreter.graph
    target = graph.infos[node.output].shape
    for place, operand in enumerate(node.operands):
        if not isinstance(operand, str) or (node.operator == "div" and place == 1):
            continue
        if graph.infos[operand].shape != target:
            continue
        others = [other for number, other in enumerate(node.operands) if number != place]
        factors: list[Expr] = []
        for other in others:
            if isinstance(other, Expr):
                factors.append(other)
                continue
            if any(size != ONE for size in graph.infos[other].shape):
                break
            factors.append(interpreter.at(other, tuple(ZERO for _ in graph.infos[other].shape)))
        else:
            factor = apply("mul", Const(1.0), *factors)
            if symbols(factor) & summed or any(_is_found(graph, load.tensor) for load in loads(factor)):
                return None
            applied = apply("div", Const(1.0), factor) if node.operator == "div" else factor
            return operand, indices, applied
    return None


def _is_found(graph: Graph, value: str) -> bool:
    return value in graph.varying and value not in graph.inputs


def layout_of(graph: Graph, indices: Indices, shape: Indices, axes: Mapping[str, tuple[Expr, Expr]]) -> Layout | None:
    """The layout of a tensor whose element at ``indices`` is the Spec element at the axis symbols.

    Args:
        graph: whose simplifiers are used.
        indices: one expression per native axis.
        shape: native shape.
        axes: Spec axis name to (the expression that runs over it, its size).

    Returns:
        The layout, or ``None`` when the tensor holds other elements too, repeats elements, or is a slice: its
            linear
        position must be exactly the row-major position over some order of the axes.
    """
    # an axis symbol may be compound (h // 3): a name of its own makes it an atom
    placeholder: dict[str, Expr] = {name: Index(f"axis_{name}") for name in axes}
    named = {symbol: name for name, symbol in placeholder.items()}
    replaced = [_replace(index, {symbol: placeholder[name] for name, (symbol, _) in axes.items()}) for index in indices]
    sizes = {name: size for name, (_, size) in axes.items()}
    groups: list[list[str]] = []
    used: list[str] = []
    for index in replaced:
        found = dict.fromkeys(node for node in walk(index) if isinstance(node, Index | Load | Score | Weight))
        if index.kind is not Kind.INT or any(node not in named for node in found):
            return None
        fresh = [named[node] for node in found if named[node] not in used]
        used += fresh
        groups.append(fresh)
    if any(size != ONE for name, size in sizes.items() if name not in used and name not in _SHARED):
        return None
    simplifier = graph.simplifier({f"axis_{name}": size for name, size in sizes.items()})
    position, total = _linear(replaced, list(shape))
    count = apply("mul", *(sizes[name] for name in used), ONE)
    if simplifier(total) != simplifier(count):
        return None
    position = simplifier(position)
    for orders in itertools.product(*(itertools.permutations(group) for group in groups)):
        order = [name for group in orders for name in group]
        if simplifier(_linear([placeholder[n] for n in order], [sizes[n] for n in order])[0]) == position:
            return _runs(simplifier, shape, order, sizes)
    return None


def _runs(simplifier: Simplifier, shape: Indices, order: Sequence[str], sizes: Mapping[str, Expr]) -> Layout:
    """The shortest runs of native axes that are as large as runs of the Spec's axes, outermost first."""
    groups: list[tuple[str, ...]] = []
    runs: list[int] = []
    start = first = 0
    while start < len(shape):
        ends = ((stop, last) for stop in range(start + 1, len(shape) + 1) for last in range(first, len(order) + 1))
        for stop, last in ends:
            rest = last if stop < len(shape) else len(order)  # sizes of 1 at the end belong to the last
            native = simplifier(apply("mul", ONE, *shape[start:stop]))
            if native == simplifier(apply("mul", ONE, *(sizes[name] for name in order[first:rest]))):
                break
        else:
            stop, rest = len(shape), len(order)
        groups.append(tuple(order[first:rest]))
        runs.append(stop - start)
        start, first = stop, rest
    return Layout(tuple(groups), () if set(runs) <= {1} else tuple(runs))


_SHARED = ("b", "h", "g")
"""Axes that an operand may lack: every batch or head then reads the same elements."""


def _linear(indices: Sequence[Expr], sizes: Sequence[Expr]) -> tuple[Expr, Expr]:
    """The row-major position of an element, and the number of elements."""
    position: Expr = ZERO
    count: Expr = ONE
    for index, size in zip(indices, sizes, strict=True):
        position = apply("add", apply("mul", position, size), index)
        count = apply("mul", count, size)
    return position, count


def _replace(index: Expr, values: Mapping[Expr, Expr]) -> Expr:
    """Compound expressions first, then symbols, so that the ``h`` in ``h // 3`` is left alone."""
    compound: dict[Expr, Expr] = {old: new for old, new in values.items() if isinstance(old, Apply)}
    simple = {old: new for old, new in values.items() if not isinstance(old, Apply)}
    return simplify(substitute(substitute(index, compound), simple))
