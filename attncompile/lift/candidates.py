"""Which products around a normaliser, or without one, are attention: the first pair that can be stated."""

from __future__ import annotations

from collections.abc import Sequence

from attncompile.frontends.graph import Contract, Graph
from attncompile.ir import Index, RefusalError
from attncompile.ir.expr import SCORE, symbols
from attncompile.lift.anchors import Anchor, Product, obstacle_after
from attncompile.lift.grow import state_pair
from attncompile.lift.interpret import Interpreter, Stop
from attncompile.lift.operands import operand_indices
from attncompile.lift.quotient import factors
from attncompile.lift.statement import KEY, NoSite, Statement, refuse


def state_anchor(graph: Graph, anchor: Anchor, scores: Sequence[Product], products: Sequence[Contract]) -> Statement:
    """The statement of attention around a normaliser.

    Args:
        graph: the graph.
        anchor: the normaliser.
        scores: the products that its input could be made of.
        products: the products that could read its weights.

    Raises:
        RefusalError: when no pair of products can be stated; the first reason.
        NoSite: when the keys are parameters.
    """
    if anchor.product is not None:
        products = [anchor.product]
    if not products:
        obstacle = obstacle_after(graph, anchor.output)
        if obstacle is not None:
            native = graph.describe(obstacle.output)
            raise refuse(
                graph,
                "uninterpreted-node",
                f"{native.what} lies between the weights and the values, and is no "
                "pointwise operation or movement of data",
                obstacle.output,
                "in evaluation mode dropout does nothing" if "dropout" in native.what else "",
            )
        raise refuse(
            graph,
            "no-value-product",
            "the normalised scores are never multiplied with values",
            anchor.output,
            "attention ends in a product of the weights with a value tensor",
        )
    refusals: list[RefusalError] = []
    for product in products:
        for score in scores:
            try:
                if score.mixes:
                    raise refuse(
                        graph,
                        "mixed-scores",
                        "the scores are mixed by a product with parameters before the normaliser",
                        score.contract.output,
                        "talking heads are not lifted",
                    )
                return state_pair(graph, anchor, score.contract, product)
            except RefusalError as error:
                refusals.append(error)
    raise refusals[0]


def state_products(graph: Graph, score: Contract, product: Contract, refusal: RefusalError | None = None) -> Statement:
    """The statement of two products that follow each other without a normaliser between them.

    Where the weights are the scores times something that is the same for all keys of a row, the two products could
    as well be taken in the other order: nothing says that this is attention.

    Args:
        graph: the graph.
        score, product: the products.
        refusal: why what divides the scores by a sum was not understood, if something does.

    Raises:
        RefusalError: when the weights are not made of single scores, or are plain multiples of them.
        NoSite: when the keys are parameters, or a whole row gives one number.
    """
    behind = graph.descendants(score.output, product.output)
    sides = [side for side, name in (("left", product.left), ("right", product.right)) if name in behind]
    if len(sides) != 1 or len(product.summed) != 1:
        raise NoSite
    inner = Interpreter(graph, {score.output: Stop(SCORE)}, behind)
    outer = tuple(Index(f"y{n}") for n in range(len(product.output_labels)))
    indices = operand_indices(graph, product, sides[0], outer, {product.summed[0]: KEY})
    try:
        inner.at(product.left if sides[0] == "left" else product.right, indices)
    except RefusalError:
        pass  # something reads whole rows of scores
    else:
        if not any(KEY in symbols(x) for found in inner.stops[score.output].indices for x in found):
            raise NoSite  # one number for the whole row, such as the norm of a vector
    unknown = refusal or refuse(
        graph,
        "unknown-normaliser",
        f"{graph.describe(product.output).name} sums over products of activations that nothing known normalises",
        score.output,
        "attention with a softmax (written in any way), sigmoid or relu is lifted",
    )
    if refusal is not None:
        raise refusal
    try:
        found = state_pair(graph, Anchor(score.output, score.output, None, "none"), score, product)
    except RefusalError:
        raise unknown from None
    multiplied, divided = factors(found.logits)
    others = [part for part in multiplied if part != SCORE]
    if len(others) < len(multiplied) and not any(symbols(part) & {SCORE, KEY} for part in (*others, *divided)):
        raise unknown
    return found
