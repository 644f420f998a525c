"""Pieces of one row of weights or scores: which positions of the row a product stands for.

Positions are read off what the graph computes, never off shapes that happen to fit: the element of the row that a
product reads (or makes) is interpreted, and its position along the keys is the piece's own position plus where the
piece starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from attncompile.frontends.graph import Cast, Contract, Graph, Indices, Move, Pointwise
from attncompile.ir import Expr, Index, Kind, Load, RefusalError, simplify
from attncompile.ir.expr import ONE, WEIGHT, ZERO, Apply, Const, substitute, symbols, walk
from attncompile.lift.axes import KEY
from attncompile.lift.interpret import Interpreter, Stop
from attncompile.lift.operands import label_sizes, operand_indices
from attncompile.lift.rows import MOST_SINKS


@dataclass(frozen=True)
class Piece:
    """A product that reads or makes some positions of a row.

    Attributes:
        product: the product.
        start: the first of the positions.
        length: how many they are.
        element: the product's element; of scores, over the axes of what is normalised and the position ``j`` in the
            piece; of weights, over axes that :func:`total_of` names.
        factor: what the product is multiplied with where it is added to the others; 1 for scores.
    """

    product: Contract
    start: Expr
    length: Expr
    element: Indices = ()
    factor: float = 1.0


def tiled(pieces: Sequence[Piece]) -> list[Piece] | None:
    """All the pieces in the order of their positions, or ``None`` where they overlap or leave a gap.

    Positions before the first piece are allowed, up to as many as a normaliser may count beside the keys.
    """
    rest = list(pieces)
    starts = {int(p.start.value): p for p in rest if isinstance(p.start, Const)}
    if not starts or not 0 <= min(starts) <= MOST_SINKS:
        return None
    found = [starts[min(starts)]]
    rest.remove(found[0])
    while rest:
        end = simplify(found[-1].start + found[-1].length)
        following = [piece for piece in rest if simplify(piece.start - end) == ZERO]
        if len(following) != 1:
            return None
        found += following
        rest.remove(following[0])
    return found


def _offset(index: Expr) -> Expr | None:
    """What is added to the key ``j``; ``None`` where the index is anything else."""
    start = simplify(index - KEY)
    return None if any(isinstance(node, Index | Load) for node in walk(start)) else start


def weight_side(graph: Graph, weights: str, product: Contract) -> str | None:
    """Which operand of a product over one axis is made of the weights; ``None`` where not exactly one is."""
    behind = graph.descendants(weights, product.output)
    sides = [side for side, name in (("left", product.left), ("right", product.right)) if name in behind]
    return sides[0] if len(sides) == 1 and len(product.summed) == 1 else None


def piece_of_weights(graph: Graph, weights: str, product: Contract) -> Piece | None:
    """The positions of a row of weights that a product with values reads, or ``None`` where that is not known."""
    side = weight_side(graph, weights, product)
    if side is None:
        return None
    sizes = label_sizes(graph, product)
    outer = tuple(Index(f"y{n}") for n in range(len(product.output_labels)))
    extents = {y.name: sizes[label] for y, label in zip(outer, product.output_labels, strict=True)}
    extents["j"] = length = sizes[product.summed[0]]
    stop = Stop(WEIGHT)
    interpreter = Interpreter(graph, {weights: stop}, graph.descendants(weights, product.output), extents)
    name = product.left if side == "left" else product.right
    try:
        interpreter.at(name, operand_indices(graph, product, side, outer, {product.summed[0]: KEY}))
    except RefusalError:
        return None
    if len(stop.indices) != 1:
        return None
    along = [index for index in stop.indices[0] if KEY in symbols(index)]
    start = _offset(along[0]) if len(along) == 1 else None
    return None if start is None else Piece(product, start, length)


def sums_of(graph: Graph, pieces: Sequence[Piece]) -> Iterator[tuple[str, list[Piece]]]:
    """Values in which products meet, in the order of the graph, each with the products that it is made of."""
    held: dict[str, frozenset[str]] = {piece.product.output: frozenset([piece.product.output]) for piece in pieces}
    for node in graph.nodes:
        if isinstance(node, Move | Cast | Pointwise) and node.output not in held:
            inside = [held[name] for name in node.inputs if name in held]
            if not inside:
                continue
            held[node.output] = frozenset().union(*inside)
            if all(len(held[node.output]) > len(part) for part in inside):
                yield node.output, [piece for piece in pieces if piece.product.output in held[node.output]]


def total_of(graph: Graph, value: str, pieces: Sequence[Piece]) -> list[Piece] | None:
    """The pieces with their factors and elements, where a value is their sum and nothing else.

    The elements are over ``y0``, ``y1``, …, the axes of the value.
    """
    shape = graph.infos[value].shape
    outer = tuple(Index(f"y{n}") for n in range(len(shape)))
    stops = {p.product.output: Stop(Load(f"piece_{n}", (), Kind.FLOAT)) for n, p in enumerate(pieces)}
    behind = frozenset().union(*(graph.descendants(p.product.output, value) for p in pieces))
    extents = {y.name: size for y, size in zip(outer, shape, strict=True)}
    interpreter = Interpreter(graph, stops, behind, extents)
    try:
        found = _terms(interpreter.at(value, outer))
    except RefusalError:
        return None
    if found is None or set(found) != {stop.symbol for stop in stops.values()}:
        return None
    if any(len(stop.indices) != 1 for stop in stops.values()):
        return None
    placed = [(piece, stops[piece.product.output]) for piece in pieces]
    return [Piece(p.product, p.start, p.length, s.indices[0], found[s.symbol]) for p, s in placed]


def _terms(expr: Expr) -> dict[Expr, float] | None:
    """A sum of different symbols times numbers, by symbol; ``None`` where the expression is anything else."""
    match expr:
        case Load(_, ()):
            return {expr: 1.0}
        case Const(value) if value == 0:
            return {}
        case Apply("add", arguments):
            joined: dict[Expr, float] = {}
            for argument in arguments:
                terms = _terms(argument)
                if terms is None or terms.keys() & joined.keys():
                    return None
                joined |= terms
            return joined
        case Apply("mul", arguments):
            numbers = [argument for argument in arguments if isinstance(argument, Const)]
            others = [argument for argument in arguments if not isinstance(argument, Const)]
            terms = _terms(others[0]) if len(others) == 1 else None
            factor = 1.0
            for number in numbers:
                factor *= float(number.value)
            return None if terms is None else {symbol: factor * value for symbol, value in terms.items()}
        case Apply("div", (above, Const(number))) if number != 0:
            terms = _terms(above)
            return None if terms is None else {symbol: value / float(number) for symbol, value in terms.items()}
    return None


def pieces_of_scores(
    graph: Graph, source: str, axis: int, products: Sequence[Contract], stops: Mapping[str, Stop]
) -> list[Piece]:
    """The positions of a row that several products make, where that is known.

    Args:
        graph: the graph.
        source: what is normalised.
        axis: its axis that is normalised over.
        products: what it is made of.
        stops: sums and maxima of rows, which are of no interest here.
    """
    shape = graph.infos[source].shape
    outer = tuple(KEY if n == axis else Index(f"y{n}") for n in range(len(shape)))
    extents = {y.name: size for y, size in zip(outer, shape, strict=True)}
    found = {p.output: Stop(Load(f"piece_{n}", (), Kind.FLOAT)) for n, p in enumerate(products)}
    behind = frozenset().union(*(graph.descendants(p.output, source) for p in products))
    try:
        Interpreter(graph, {**stops, **found}, behind, extents).at(source, outer)
    except RefusalError:
        return []
    pieces: list[Piece] = []
    for product in products:
        reached = found[product.output].indices
        if len(reached) != 1 or len(product.summed) != 1:
            continue
        along = [n for n, index in enumerate(reached[0]) if KEY in symbols(index)]
        before = _offset(reached[0][along[0]]) if len(along) == 1 else None
        if before is None:
            continue
        length = label_sizes(graph, product)[product.output_labels[along[0]]]
        element = tuple(KEY if n == along[0] else index for n, index in enumerate(reached[0]))
        pieces.append(Piece(product, simplify(ZERO - before), length, element))
    return pieces


def inverse(
    graph: Graph, entries: Indices, shape: Indices, places: Sequence[Expr], sizes: Mapping[Index, Expr]
) -> dict[Expr, Expr] | None:
    """The symbols that make an element's indices, over these indices.

    Args:
        graph: whose simplifiers are used.
        entries: the indices, over the symbols.
        shape: their sizes.
        places: what to call the indices in the result.
        sizes: the symbols, with their sizes. One that makes no index is 0 in the result.

    Returns:
        Each symbol's value, or ``None`` where the indices are no rearrangement of the symbols: the linear position must
        be the row-major position over some order of them.
    """
    found: dict[Expr, Expr] = {symbol: ZERO for symbol in sizes}
    waiting = {symbol for symbol, size in sizes.items() if size != ONE}
    reads = [symbols(entry) & waiting for entry in entries]
    while waiting := {symbol for symbol in waiting if any(symbol in read for read in reads)}:
        together: set[Expr] = {min(waiting, key=str)}
        while more := {s for read in reads if read & together for s in read} - together:
            together |= more
        inside = [n for n, read in enumerate(reads) if read & together]
        own = {symbol: size for symbol, size in sizes.items() if symbol in together}
        part = _rearranged(
            graph, [entries[n] for n in inside], [shape[n] for n in inside], [places[n] for n in inside], own
        )
        if part is None:
            return None
        found |= part
        waiting -= together
    return found


def _rearranged(
    graph: Graph, entries: list[Expr], shape: list[Expr], places: list[Expr], sizes: Mapping[Index, Expr]
) -> dict[Expr, Expr] | None:
    """The symbols over the places of some indices that run over these symbols alone."""
    if len(entries) == len(sizes) == 1 and entries[0] in sizes:
        return {entries[0]: places[0]}
    before = graph.simplifier({symbol.name: size for symbol, size in sizes.items()})
    after = graph.simplifier({p.name: size for p, size in zip(places, shape, strict=True) if isinstance(p, Index)})
    for order in itertools.permutations(range(len(entries))):
        lengths = [shape[n] for n in order]
        position = before(_linear([entries[n] for n in order], lengths))
        for digits in itertools.permutations(sizes):
            if before(_linear(digits, [sizes[symbol] for symbol in digits])) != position:
                continue
            flat = _linear([places[n] for n in order], lengths)
            found: dict[Expr, Expr] = {}
            below: Expr = ONE
            for symbol in reversed(digits):
                whole = flat // below
                found[symbol] = after(whole if symbol is digits[0] else whole % sizes[symbol])
                below = simplify(below * sizes[symbol])
            return found
    return None


def _linear(indices: Sequence[Expr], sizes: Sequence[Expr]) -> Expr:
    """The row-major position of an element."""
    position: Expr = ZERO
    for index, size in zip(indices, sizes, strict=True):
        position = position * size + index
    return position


def placed(indices: Indices, values: Mapping[Expr, Expr]) -> Indices:
    """Indices with their symbols replaced."""
    return tuple(substitute(index, values) for index in indices)


__all__ = [
    "Piece",
    "inverse",
    "piece_of_weights",
    "pieces_of_scores",
    "placed",
    "sums_of",
    "tiled",
    "total_of",
    "weight_side",
]
