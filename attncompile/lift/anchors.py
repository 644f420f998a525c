"""Anchors: where scores are normalised, however that is written, and which products lie before and behind.

A softmax is anchored on its operator; sigmoid and relu on the pointwise operator between two products; whatever
divides scores by a sum over them, before or after the product with the values, on the operator where the sum meets
the scores or the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from attncompile.frontends.graph import (
    Cast,
    Concatenate,
    Contract,
    CumulativeSum,
    Graph,
    Linear,
    Move,
    Node,
    Opaque,
    Pointwise,
    Reduce,
    Select,
    Softmax,
    Write,
)
from attncompile.ir.expr import Const

UNWRITTEN = (Pointwise, Cast, Move, Concatenate, Select)
"""Nodes that only read. Products that follow each other through what each writes into one buffer are the steps of a
recurrence (the rows of a triangular inverse, say); only a normaliser between them makes attention of that.
"""

TRANSPARENT = (*UNWRITTEN, Write)
"""Nodes that interpretation passes through."""


@dataclass(frozen=True)
class Anchor:
    """A normaliser.

    Attributes:
        output: the normalised weights; where only the product with the values is divided, what it becomes.
        source: the value it normalises.
        axis: the axis of both that it runs over; ``None`` when it is pointwise or a quotient.
        kind: as in :class:`attncompile.ir.Normalizer`; a quotient by a sum is anything that divides.
        total: of a quotient, the sum over the keys.
        product: of a quotient behind the product with the values, that product.
    """

    output: str
    source: str
    axis: int | None
    kind: Literal["softmax", "sigmoid", "relu", "none", "quotient"]
    total: str = ""
    product: Contract | None = None


def normalisers(graph: Graph) -> Iterator[Anchor]:
    """Everything in a graph that could normalise scores."""
    for node in graph.nodes:
        match node:
            case Softmax(output, source, axis):
                yield Anchor(output, source, axis, "softmax")
            case Reduce(_, _, "sum", (_,)):
                yield from _quotients_by(graph, node)
            case Pointwise(output, "sigmoid", (str(source),)):
                yield Anchor(output, source, None, "sigmoid")
            case Pointwise(output, "max", (str(source), Const(0.0)) | (Const(0.0), str(source))):
                yield Anchor(output, source, None, "relu")


def _quotients_by(graph: Graph, total: Reduce) -> Iterator[Anchor]:
    """Where a sum over scores, with whatever is done to it, first meets the scores, or their product with values."""
    products = {product.output for product in _contractions_behind(graph, total.source)}
    if not products:
        return
    seen, stack = {total.output}, [total.output]
    while stack:
        value = stack.pop()
        for user in graph.users.get(value, ()):
            if user.output in seen or not isinstance(user, Move | Cast | Pointwise):
                continue
            seen.add(user.output)
            others = [operand for operand in user.inputs if operand != value]
            met = [product for other in others for product in _contractions_behind(graph, other)]
            after = [product for product in met if _reads(graph, product, products)]
            if any(product.output in products for product in met):
                yield Anchor(user.output, total.source, None, "quotient", total.output)
            elif after:
                yield Anchor(user.output, total.source, None, "quotient", total.output, after[0])
            else:
                stack.append(user.output)


def _reads(graph: Graph, product: Contract, scores: set[str]) -> bool:
    """Whether an operand of a product is made of scores."""
    return any(found.output in scores for name in product.inputs for found in _contractions_behind(graph, name))


def corrections(graph: Graph, score: Contract, value: str) -> Iterator[str]:
    """Products and quotients of the attention's result with something else that is made of its scores."""
    result = value
    while True:
        users = graph.users.get(value, ())
        if len(users) != 1 or not isinstance(users[0], Move | Cast | Pointwise):
            return
        (user,) = users
        if isinstance(user, Pointwise):
            others = [operand for operand in user.inputs if operand != value]
            if user.operator in ("mul", "div") and others:
                made, later = (graph.descendants(start, user.output) for start in (score.output, result))
                if any(o in made and o not in later for o in others):
                    yield user.output
            return
        value = user.output


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
        if len(varying) == 2 or not (varying or any(_is_given(graph, name) for name in product.inputs)):
            plain.append(Product(product))  # of two activations, or of what a network makes of its parameters alone
        elif varying:
            behind = _contractions_behind(graph, varying[0])
            learned.append(Product(product, any(all(n in graph.varying for n in p.inputs) for p in behind)))
    return [*plain, *learned]


def mixed_by_layer(graph: Graph, value: str) -> list[Product]:
    """The products of two activations that a linear layer mixes, and from whose mixture a value is made pointwise."""
    layers = [node for node in _behind(graph, value, _through_transparent) if isinstance(node, Linear)]
    mixed = [product for layer in layers for product in _contractions_behind(graph, layer.source)]
    return [Product(product, True) for product in mixed if all(name in graph.varying for name in product.inputs)]


def products_after_layer(graph: Graph, weights: str) -> list[Contract]:
    """Products that read a value, or what one linear layer makes of it, through pointwise operations and movements."""
    layers = [node for node in graph.nodes if isinstance(node, Linear)]
    behind = {layer.output: _behind(graph, layer.source, _through_transparent) for layer in layers}
    made = [value for value, nodes in behind.items() if any(node.output == weights for node in nodes)]
    return [product for value in (weights, *made) for product in products_after(graph, value)]


def _through_transparent(node: Node) -> Iterable[str]:
    return node.inputs if isinstance(node, TRANSPARENT) else ()


def _is_given(graph: Graph, value: str) -> bool:
    """Whether a value is a parameter or constant itself, cast or moved."""
    while isinstance(node := graph.producer.get(value), Move | Cast):
        value = node.source
    return node is None


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


def _behind(graph: Graph, value: str, onward: Callable[[Node], Iterable[str]]) -> Iterator[Node]:
    """Each node behind a value, once; ``onward`` names the inputs of a node to go on with."""
    seen: set[str] = set()
    stack = [value]
    while stack:
        name = stack.pop()
        node = graph.producer.get(name)
        if name in seen or node is None:
            continue
        seen.add(name)
        yield node
        stack += onward(node)


def _contractions_behind(graph: Graph, value: str) -> list[Contract]:
    def onward(node: Node) -> Iterable[str]:
        if isinstance(node, Select):
            return (node.data,)
        return node.inputs if isinstance(node, TRANSPARENT) else ()

    return [node for node in _behind(graph, value, onward) if isinstance(node, Contract)]


def products_after(graph: Graph, weights: str, passed: tuple[type[Node], ...] = TRANSPARENT) -> list[Contract]:
    """Products that read a value through pointwise operations and movements only; ``passed`` are their kinds."""
    found: list[Contract] = []
    seen, stack = {weights}, [weights]
    while stack:
        for user in graph.users.get(stack.pop(), ()):
            if isinstance(user, Contract):
                if user not in found:
                    found.append(user)
            elif isinstance(user, passed) and user.output not in seen:
                seen.add(user.output)
                stack.append(user.output)
    return found


ROUNDINGS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
"""Operations that round a value to a narrow type or back, which interpretation does not pass."""

INTEGER_PRODUCTS = frozenset({"MatMulInteger", "QLinearMatMul", "MatMulIntegerToFloat"})
"""Products of codes, which nothing states where their scales are not known to be those of their operands."""


def is_multiplied_rounded(graph: Graph, weights: str) -> bool:
    """Whether a product reads a value through pointwise operations and movements, and through roundings."""
    seen, stack = {weights}, [weights]
    while stack:
        for user in graph.users.get(stack.pop(), ()):
            if isinstance(user, Contract) or _is_integer_product(graph, user):
                return True
            if user.output not in seen and (
                isinstance(user, TRANSPARENT) or (isinstance(user, Opaque) and user.what in ROUNDINGS)
            ):
                seen.add(user.output)
                stack.append(user.output)
    return False


def _is_integer_product(graph: Graph, node: Node) -> bool:
    """Whether a node multiplies codes of activations."""
    if not isinstance(node, Opaque) or node.what not in INTEGER_PRODUCTS:
        return False
    right = node.reads[3 if node.what == "QLinearMatMul" else 1 :]
    return {*node.reads[:1], *right[:1]} <= graph.varying


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


def obstacle_behind(graph: Graph, source: str) -> Node | None:
    """An operation that interpretation can not pass, with a product of two activations right behind it.

    A map with parameters (a linear layer) is no obstacle: what it makes of the state are no scores.
    """
    for obstacle in _obstacles_behind(graph, source):
        if _is_integer_product(graph, obstacle):
            return obstacle
        stack, seen = list(obstacle.inputs), set(obstacle.inputs)
        while stack:
            node = graph.producer.get(stack.pop())
            if isinstance(node, Contract) and all(name in graph.varying for name in node.inputs):
                return obstacle
            if node is not None and _is_integer_product(graph, node):
                return obstacle
            if isinstance(node, (*TRANSPARENT, Reduce, CumulativeSum)) or type(node) is Opaque:
                fresh = [name for name in node.inputs if name not in seen]
                seen.update(fresh)
                stack += fresh
    return None


def _obstacles_behind(graph: Graph, value: str) -> list[Node]:
    found = _behind(graph, value, _through_transparent)
    return [node for node in found if type(node) is Opaque or isinstance(node, CumulativeSum)]


def unnormalised_products(graph: Graph, known: frozenset[str]) -> Iterator[tuple[Contract, Contract]]:
    """Pairs of products of activations with something pointwise between them that is no known normaliser.

    Args:
        graph: the graph.
        known: outputs of the scores and of the products of known sites.
    """
    for node in graph.nodes:
        if not isinstance(node, Contract) or node.output in known or any(is_learned(graph, n) for n in node.inputs):
            continue
        pointwise = [user for user in graph.users.get(node.output, ()) if isinstance(user, Pointwise)]
        for user in pointwise:
            for product in products_after(graph, user.output, UNWRITTEN):
                if product.output not in known and not any(is_learned(graph, name) for name in product.inputs):
                    yield node, product
                    break
            else:
                continue
            break
