"""Operands of a contraction: which tensor a product reads, in which layout, and with which factor in front."""

from __future__ import annotations

from dataclasses import dataclass

from attncompile.frontends.graph import Cast, Contract, Graph, Indices, Move, Pointwise
from attncompile.ir import Expr, simplify
from attncompile.ir.expr import ONE, ZERO, Apply, Const, Index, apply, substitute, symbols, walk
from attncompile.ir.simplify import Simplifier, polynomial
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


def operand_indices(graph: Graph, node: Contract, side: str, output: Indices, summed: dict[str, Expr]) -> Indices:
    """The element of one side of a contraction that contributes to an output element."""
    name, labels = (node.left, node.left_labels) if side == "left" else (node.right, node.right_labels)
    position = {**dict(zip(node.output_labels, output, strict=True)), **summed}
    sizes = label_sizes(graph, node)
    return tuple(
        ZERO if size == ONE and sizes[label] != ONE else position[label]
        for label, size in zip(labels, graph.infos[name].shape, strict=True)
    )


def label_sizes(graph: Graph, node: Contract) -> dict[str, Expr]:
    """The size of each label of a contraction: of two sizes the one that is not 1, a constant before a symbol."""
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
        if graph.is_native(value) and value not in interpreter.dependent:
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


def _followed_factor(interpreter: Interpreter, node: Pointwise, indices: Indices, summed: frozenset[Expr]
                     ) -> tuple[str, Indices, Expr] | None:
    """Through ``x · f`` or ``x / f``, when ``f`` is a number or a scalar that the summed index does not move."""
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
            if symbols(factor) & summed:
                return None
            applied = apply("div", Const(1.0), factor) if node.operator == "div" else factor
            return operand, indices, applied
    return None


def layout_of(indices: Indices, shape: Indices, axes: dict[str, tuple[Expr, Expr]], extents: dict[str, Expr]) -> Layout | None:
    """The layout of a tensor whose element at ``indices`` is the Spec element at the axis symbols.

    Args:
        indices: one expression per native axis.
        shape: native shape.
        axes: Spec axis name to (the expression that runs over it, its size).
        extents: sizes of the index symbols.

    Returns:
        The layout, or ``None`` when the tensor holds other elements too, repeats elements, or is a slice: its linear
        position must be exactly the row-major position over some order of the axes.
    """
    placeholder = {name: Index(f"axis_{name}") for name in axes}
    # replace the symbols by axis placeholders, so that a compound axis (h // 3) is an atom
    compound = {symbol: placeholder[name] for name, (symbol, _) in axes.items()}
    replaced = [_replace(index, compound) for index in indices]
    names = {symbol: name for name, symbol in placeholder.items()}
    groups: list[tuple[str, ...]] = []
    used: list[str] = []
    for index in replaced:
        if index.kind.value != "int":
            return None
        terms = polynomial(index)
        here: list[tuple[int, str]] = []
        for mono, value in terms.items():
            atoms = [node for atom in mono for node in walk(atom) if isinstance(node, Index)]
            if any(atom not in names for atom in atoms) or len(atoms) > 1 or (not atoms):
                return None
            size = sum(2 if isinstance(a, Index) else 5 for a in mono) + (abs(value) > 1)
            here.append((-abs(value) - 10**6 * (len(mono) - 1) + 0 * size, names[atoms[0]]))
        ordered = [name for _, name in sorted(here)]
        fresh = [name for name in dict.fromkeys(ordered) if name not in used]
        used += fresh
        groups.append(tuple(fresh))
    missing = [name for name, (_, size) in axes.items() if name not in used and size != ONE]
    if [m for m in missing if m not in ("b", "h", "g")]:
        return None
    sizes = {name: size for name, (_, size) in axes.items()}
    extent_of = {f"axis_{name}": size for name, size in sizes.items()}
    simplifier = Simplifier(extent_of)
    native: Expr = ZERO
    for index, size in zip(replaced, shape, strict=True):
        native = apply("add", apply("mul", native, size), index)
    wanted: Expr = ZERO
    total: Expr = ONE
    for name in used:
        wanted = apply("add", apply("mul", wanted, sizes[name]), placeholder[name])
        total = apply("mul", total, sizes[name])
    whole = apply("mul", *shape, ONE) if shape else ONE
    if simplifier(native) != simplifier(wanted) or simplify(whole) != simplify(total):
        return None
    return Layout(tuple(groups))


def _replace(index: Expr, values: dict[Expr, Expr]) -> Expr:
    compound = {k: v for k, v in values.items() if isinstance(k, Apply)}
    simple = {k: v for k, v in values.items() if not isinstance(k, Apply)}
    result = substitute(index, dict(compound)) if compound else index
    return simplify(substitute(result, dict(simple)))
