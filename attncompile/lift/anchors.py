"""Anchors: where scores are normalised, however that is written, and which products lie before and behind.

A softmax is anchored on its operator or on a division of ``exp`` by its own sum; sigmoid and relu are
anchored on the pointwise operator between two products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from attncompile.frontends.graph import (
    Cast,
    Concatenate,
    Contract,
    Graph,
    Move,
    Node,
    Opaque,
    Pointwise,
    Reduce,
    Select,
    Softmax,
)
from attncompile.ir import Expr, Index, Kind, Load, RefusalError, simplify
from attncompile.ir.expr import ONE, ZERO, Apply, Const, apply, walk, where
from attncompile.lift.interpret import Interpreter, Stop

TRANSPARENT = (Pointwise, Cast, Move, Concatenate, Select)
"""Nodes that interpretation passes through."""

SHIFT = Load("row_shift", (), Kind.FLOAT)
"""Stands for what is subtracted from a whole row before ``exp``; a softmax does not see it."""


@dataclass(frozen=True)
class Anchor:
    """A normaliser.

    Attributes:
        output: the normalised weights.
        source: the value it normalises; its element at the indices of a weight is that weight's logit, or the
            exponential of it.
        axis: the axis of both that it runs over; ``None`` when it is pointwise.
        kind: as in :class:`attncompile.ir.Normalizer`.
        exponential: whether ``source`` is the exponential of the logits.
    """

    output: str
    source: str
    axis: int | None
    kind: Literal["softmax", "sigmoid", "relu"]
    exponential: bool = False


def normalisers(graph: Graph) -> Iterator[Anchor]:
    """Everything in a graph that could normalise scores."""
    for node in graph.nodes:
        match node:
            case Softmax(output, source, axis):
                yield Anchor(output, source, axis, "softmax")
            case Reduce(_, _, "sum", (_,)):
                yield from _divisions_by(graph, node)
            case Pointwise(output, "sigmoid", (str(source),)):
                yield Anchor(output, source, None, "sigmoid")
            case Pointwise(output, "max", (str(source), Const(0.0)) | (Const(0.0), str(source))):
                yield Anchor(output, source, None, "relu")


def _divisions_by(graph: Graph, total: Reduce) -> Iterator[Anchor]:
    """Divisions of a value by its own sum over one axis."""
    seen, stack = {total.output}, [total.output]
    while stack:
        value = stack.pop()
        for user in graph.users.get(value, ()):
            if isinstance(user, Move | Cast) and user.output not in seen:
                seen.add(user.output)
                stack.append(user.output)
            elif isinstance(user, Pointwise) and user.operator == "div" and user.operands[1] == value:
                try:
                    axis = _normalised_axis(graph, total, user)
                except RefusalError:
                    continue  # its numerator can not be read, so that nothing is known of it
                if axis is not None:
                    yield Anchor(user.output, str(user.operands[0]), axis, "softmax", True)


def _normalised_axis(graph: Graph, total: Reduce, division: Pointwise) -> int | None:
    """The axis over which the numerator of a division is summed in its denominator, if that is what the two
    are.
    """
    numerator, denominator = division.operands
    shape = graph.infos[division.output].shape
    if (
        not isinstance(numerator, str)
        or not isinstance(denominator, str)
        or graph.infos[numerator].shape != shape
    ):
        return None
    position = tuple(Index(f"y{n}") for n in range(len(shape)))
    extents = {index.name: size for index, size in zip(position, shape, strict=True)}
    row = Stop(Load("row_sum", (), Kind.FLOAT))
    interpreter = Interpreter(graph, {total.output: row}, frozenset(), extents)
    below = graph.infos[denominator].shape
    offset = len(shape) - len(below)
    found = interpreter.at(
        denominator, tuple(ZERO if size == ONE else position[n + offset] for n, size in enumerate(below))
    )
    if found != row.symbol or len(row.indices) != 1:
        return None
    (summed,) = total.axes
    kept = list(row.indices[0])
    if total.keeps_axes:
        del kept[summed]
    element = interpreter.at(numerator, position)
    for axis, index in enumerate(position):
        if simplify(shape[axis]) == simplify(graph.infos[total.source].shape[summed]):
            read = (*kept[:summed], index, *kept[summed:])
            if not any(index in walk(k) for k in kept) and interpreter.at(total.source, read) == element:
                return axis
    return None


def logarithm(weight: Expr) -> Expr | None:
    """The logit of an unnormalised weight: of ``exp(x)`` it is ``x``, of a weight that a mask sets to 0 it is
    −∞.
    """
    match weight:
        case Const(0.0):
            return Const(-math.inf)
        case Apply("exp", (exponent,)):
            return exponent
        case Apply("exp2", (exponent,)):
            return apply("mul", math.log(2.0), exponent)
        case Apply("where", (condition, then, otherwise)):
            first, second = logarithm(then), logarithm(otherwise)
            return None if first is None or second is None else where(condition, first, second)
        case Apply("mul", (one, Apply("where", (condition, Const(1.0), Const(0.0))))) | Apply(
            "mul", (Apply("where", (condition, Const(1.0), Const(0.0))), one)
        ):
            found = logarithm(one)
            return None if found is None else where(condition, found, -math.inf)
    return None


def without_shift(logits: Expr) -> Expr | None:
    """Logits less what is subtracted from the whole row, or ``None`` where that is not all the shift does."""
    if all(node != SHIFT for node in walk(logits)):
        return logits
    return _unshifted(logits)


def _unshifted(logits: Expr) -> Expr | None:
    match logits:
        case Const(value) if value == -math.inf:
            return logits
        case Apply("add", terms):
            subtracted = apply("mul", -1.0, SHIFT)
            rest = [term for term in terms if simplify(term) != simplify(subtracted)]
            if len(rest) == len(terms) - 1 and all(node != SHIFT for term in rest for node in walk(term)):
                return apply("add", *rest) if rest else Const(0.0)
        case Apply("where", (condition, then, otherwise)):
            first, second = _unshifted(then), _unshifted(otherwise)
            if first is not None and second is not None and all(node != SHIFT for node in walk(condition)):
                return where(condition, first, second)
    return None


@dataclass(frozen=True)
class Product:
    """A product that may make the scores.

    Attributes:
        contract: the product.
        mixes: it multiplies scores with parameters, as talking heads do.
    """

    contract: Contract
    mixes: bool = False


def scores_behind(graph: Graph, value: str) -> list[Product]:
    """The products from which a value is made pointwise; those of two activations first.

    A product with parameters counts too: its query may be learned. Where it multiplies another product, it
        mixes scores.
    """
    plain: list[Product] = []
    learned: list[Product] = []
    for product in _contractions_behind(graph, value):
        varying = [name for name in product.inputs if name in graph.varying]
        if len(varying) == 2:
            plain.append(Product(product))
        elif varying:
            behind = _contractions_behind(graph, varying[0])
            learned.append(Product(product, any(all(n in graph.varying for n in p.inputs) for p in behind)))
    return [*plain, *learned]


def is_learned(graph: Graph, value: str) -> bool:
    """Whether a value is a parameter, or rows of one, wherever they are picked from: the weights of an expert, say."""
    while value in graph.varying:
        match graph.producer.get(value):
            case Select(_, data):
                value = data
            case Move(_, source) | Cast(_, source):
                value = source
            case _:
                return False
    return True


def _contractions_behind(graph: Graph, value: str) -> list[Contract]:
    found: list[Contract] = []
    seen: set[str] = set()
    stack = [value]
    while stack:
        name = stack.pop()
        node = graph.producer.get(name)
        if name in seen or node is None:
            continue
        seen.add(name)
        if isinstance(node, Contract):
            found.append(node)
        elif isinstance(node, Select):
            stack.append(node.data)
        elif isinstance(node, TRANSPARENT):
            stack += node.inputs
    return found


def products_after(graph: Graph, weights: str) -> list[Contract]:
    """Products that read a value through pointwise operations and movements only."""
    found: list[Contract] = []
    seen, stack = {weights}, [weights]
    while stack:
        for user in graph.users.get(stack.pop(), ()):
            if isinstance(user, Contract):
                if user not in found:
                    found.append(user)
            elif isinstance(user, TRANSPARENT) and user.output not in seen:
                seen.add(user.output)
                stack.append(user.output)
    return found


def obstacle_after(graph: Graph, weights: str) -> Node | None:
    """The first operation on the way from the weights that interpretation can not pass."""
    seen, stack = {weights}, [weights]
    while stack:
        for user in graph.users.get(stack.pop(), ()):
            if not isinstance(user, TRANSPARENT):
                return user
            if user.output not in seen:
                seen.add(user.output)
                stack.append(user.output)
    return None


def obstacle_behind(graph: Graph, source: str) -> Opaque | None:
    """An operation that interpretation can not pass, with a product of two activations right behind it.

    A map with parameters (a linear layer) is no obstacle: what it makes of the state are no scores.
    """
    for obstacle in _opaque_behind(graph, source):
        stack, seen = list(obstacle.inputs), set(obstacle.inputs)
        while stack:
            node = graph.producer.get(stack.pop())
            if isinstance(node, Contract) and all(name in graph.varying for name in node.inputs):
                return obstacle
            if isinstance(node, (*TRANSPARENT, Reduce)) or type(node) is Opaque:
                fresh = [name for name in node.inputs if name not in seen]
                seen.update(fresh)
                stack += fresh
    return None


def _opaque_behind(graph: Graph, value: str) -> list[Opaque]:
    found: list[Opaque] = []
    seen: set[str] = set()
    stack = [value]
    while stack:
        name = stack.pop()
        node = graph.producer.get(name)
        if name in seen or node is None:
            continue
        seen.add(name)
        if type(node) is Opaque:
            found.append(node)
        elif isinstance(node, TRANSPARENT):
            stack += node.inputs
    return found


def unnormalised_products(graph: Graph, known: frozenset[str]) -> Iterator[tuple[Contract, Contract]]:
    """Pairs of products of activations with something pointwise between them that is no known normaliser.

    Args:
        graph: the graph.
        known: outputs of the scores and of the products of known sites.
    """
    for node in graph.nodes:
        if (
            not isinstance(node, Contract)
            or node.output in known
            or any(is_learned(graph, n) for n in node.inputs)
        ):
            continue
        pointwise = [user for user in graph.users.get(node.output, ()) if isinstance(user, Pointwise)]
        for user in pointwise:
            for product in products_after(graph, user.output):
                if product.output not in known and not any(is_learned(graph, name) for name in product.inputs):
                    yield node, product
                    break
            else:
                continue
            break
