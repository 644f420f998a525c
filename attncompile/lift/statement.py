"""The statement of a site: growing from an anchor to both products, everything over the symbols ``b h i j d
e``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from attncompile.frontends.graph import (
    Contract,
    FusedAttention,
    Graph,
    Indices,
    Reduce,
)
from attncompile.ir import (
    Expr,
    Index,
    Kind,
    Normalizer,
    Refusal,
    RefusalError,
    simplify,
)
from attncompile.ir.ops import NO_SINK
from attncompile.ir.expr import (
    ONE,
    SCORE,
    WEIGHT,
    ZERO,
    Apply,
    Const,
    apply,
    substitute,
    symbols,
    walk,
)
from attncompile.lift.anchors import (
    SHIFT,
    Anchor,
    Product,
    logarithm,
    obstacle_after,
    without_shift,
)
from attncompile.lift.interpret import Interpreter, Stop
from attncompile.lift.operands import Operand, label_sizes, operand_indices, trace_operand

MOST_SINKS = 16
"""Positions beside the keys up to which a normaliser is stated with a sink."""

BATCH, HEAD, QUERY, KEY, CHANNEL, VALUE_CHANNEL = (Index(name) for name in "bhijde")


@dataclass(frozen=True)
class Statement:
    """A site before its tensors are named: everything over the symbols ``b h i j d e``.

    Attributes:
        logits: over ``s`` (the product of the nearest operands) and loads; weight: over ``w``.
        query, key, value: candidate operands, nearest first.
        extents: sizes of the symbols.
        output: the value that is replaced, and its element's indices.
        anchor: the value that names the site.
        inner: values strictly between the operands and the output.
        sink: logit of what the normaliser counts beside the keys, −∞ where there is nothing.
    """

    logits: Expr
    weight: Expr
    query: tuple[Operand, ...]
    key: tuple[Operand, ...]
    value: tuple[Operand, ...]
    extents: Mapping[str, Expr]
    output: str
    output_indices: Indices
    normalizer: Normalizer
    anchor: str
    inner: frozenset[str]
    sink: Expr = NO_SINK


class NoSite(Exception):
    """What looked like attention is none."""


def refuse(graph: Graph, kind: str, reason: str, value: str, hint: str = "") -> RefusalError:
    """The refusal to raise, with the native node and the source line of a value."""
    native = graph.describe(value)
    return RefusalError(Refusal(kind, reason, native.name, native.source, hint))


def refuse_products(graph: Graph, score: Contract, product: Contract) -> Statement:
    """Say of two products that follow each other why they are no known attention, unless they are none at
    all.
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
    raise refuse(
        graph,
        "unknown-normaliser",
        f"{graph.describe(product.output).name} sums over products of activations "
        "that nothing known normalises",
        score.output,
        "attention with a softmax (written in any way), sigmoid or relu is lifted",
    )


def _only(graph: Graph, stop: Stop, what: str, value: str) -> Indices:
    if len(stop.indices) != 1:
        raise refuse(
            graph,
            "several-elements",
            f"an element of the output depends on {len(stop.indices)} different elements of the {what}",
            value,
            "each weight must come from one score",
        )
    return stop.indices[0]


def state_anchor(
    graph: Graph, anchor: Anchor, scores: Sequence[Product], products: Sequence[Contract]
) -> Statement:
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
                return _state_pair(graph, anchor, score.contract, product)
            except RefusalError as error:
                refusals.append(error)
    raise refusals[0]


def _state_pair(graph: Graph, anchor: Anchor, score: Contract, product: Contract) -> Statement:
    behind = graph.descendants(score.output, product.output)
    after = graph.descendants(anchor.output, product.output)
    sides = [side for side, name in (("left", product.left), ("right", product.right)) if name in after]
    if len(sides) != 1 or len(product.summed) != 1 or len(score.summed) != 1:
        raise refuse(
            graph,
            "not-a-product",
            "the weights must meet the values, and queries the keys, in a product over one axis",
            product.output,
        )
    weight_side, value_side = sides[0], "right" if sides[0] == "left" else "left"
    sizes = label_sizes(graph, product)
    out_symbols = tuple(Index(f"y{n}") for n in range(len(product.output_labels)))
    extents: dict[str, Expr] = {
        axis.name: sizes[label] for axis, label in zip(out_symbols, product.output_labels, strict=True)
    }
    extents["j"] = sizes[product.summed[0]]
    summed = {product.summed[0]: KEY}

    weights = Interpreter(graph, {anchor.output: Stop(WEIGHT), score.output: Stop(SCORE)}, behind, extents)
    weight_value = product.left if weight_side == "left" else product.right
    weight = weights.at(weight_value, operand_indices(graph, product, weight_side, out_symbols, summed))
    weight = substitute(weight, {apply("exp", apply("log", WEIGHT)): WEIGHT})  # a weight is never negative
    if SCORE in symbols(weight):
        raise refuse(
            graph,
            "weight-reads-score",
            f"the edit of the weights {weight} reads the score itself",
            product.output,
        )
    at_anchor = _only(graph, weights.stops[anchor.output], "normaliser", anchor.output)
    beside = _beside_keys(graph, anchor, at_anchor, extents["j"])

    rows = {} if anchor.axis is None else _row_maxima(graph, anchor, behind)
    lifted = Interpreter(graph, {score.output: Stop(SCORE), **rows}, behind, extents)
    logits = _as_logits(graph, anchor, lifted.at(anchor.source, at_anchor))
    if any(KEY in symbols(index) for stop in rows.values() for indices in stop.indices for index in indices):
        raise refuse(
            graph, "unknown-normaliser", "the maximum that is subtracted is not that of a row", anchor.output
        )
    at_score = _only(graph, lifted.stops[score.output], "score product", score.output)
    sink = _sink(graph, anchor, at_anchor, beside, Interpreter(graph, {score.output: Stop(SCORE), **rows}, behind, extents))
    extents["d"] = label_sizes(graph, score)[score.summed[0]]
    plain = Interpreter(graph, {}, behind, extents)
    traced = {}
    for side in ("left", "right"):
        name = score.left if side == "left" else score.right
        if name in behind:
            raise refuse(
                graph, "recursive-score", "an operand of the score depends on the score", score.output
            )
        indices = operand_indices(graph, score, side, at_score, {score.summed[0]: CHANNEL})
        traced[side] = trace_operand(plain, name, indices, frozenset([CHANNEL]))
    value_indices = operand_indices(graph, product, value_side, out_symbols, summed)
    value = trace_operand(
        plain, product.left if value_side == "left" else product.right, value_indices, frozenset([KEY])
    )
    if not value or not traced["left"] or not traced["right"]:
        raise refuse(
            graph,
            "operand-layout",
            "an operand is not a tensor of the graph, or something overwrites it",
            product.output,
        )
    reads_key = {side: any(KEY in symbols(x) for x in found[0].indices) for side, found in traced.items()}
    if sum(reads_key.values()) != 1:
        raise refuse(
            graph, "no-key-axis", "exactly one operand of the score must run over the keys", score.output
        )
    key = traced["left" if reads_key["left"] else "right"]
    query = traced["right" if reads_key["left"] else "left"]
    if (score.left if reads_key["left"] else score.right) not in graph.varying:
        raise NoSite  # a layer of a network: its keys are parameters

    def uses(operand: Operand) -> frozenset[Expr]:
        return frozenset(s for x in operand.indices for s in symbols(x))

    value_only = [
        y for y in out_symbols if y in uses(value[0]) and all(y not in symbols(x) for x in at_anchor)
    ]
    if len(value_only) != 1:
        raise refuse(
            graph,
            "several-value-axes",
            f"the output has {len(value_only)} axes that only the values run over; "
            "one, the channels, is understood",
            product.output,
        )
    query_only = [
        y for y in out_symbols if y in uses(query[0]) and y not in uses(key[0]) and y not in uses(value[0])
    ]
    unit = [y for y in out_symbols if extents[y.name] == ONE and y not in value_only]
    ordered = _query_axis(query_only or unit[-1:], extents, at_anchor)
    batch = [y for y in out_symbols if y not in (ordered, value_only[0])]
    renaming, new_extents = _batch_and_heads(batch, extents, [*query, *key, *value])
    renaming[value_only[0]] = VALUE_CHANNEL
    new_extents.update({"i": ONE, "e": extents[value_only[0].name], "j": extents["j"], "d": extents["d"]})
    if ordered is not None:
        renaming[ordered] = QUERY
        new_extents["i"] = extents[ordered.name]
    simplifier = graph.simplifier(new_extents)

    def renamed(expr: Expr) -> Expr:
        return simplifier(substitute(expr, renaming))

    def operands(found: list[Operand]) -> tuple[Operand, ...]:
        return tuple(Operand(o.value, tuple(renamed(x) for x in o.indices), renamed(o.factor)) for o in found)

    inner = graph.ancestors([product.output], behind) - {product.output}
    weight, empty = _empty_rows(weight)
    return Statement(
        renamed(logits),
        renamed(weight),
        operands(query),
        operands(key),
        operands(value),
        new_extents,
        product.output,
        tuple(renamed(y) for y in out_symbols),
        Normalizer(anchor.kind, graph.infos[anchor.output].dtype, empty),
        anchor.output,
        inner,
        renamed(sink),
    )


def _beside_keys(graph: Graph, anchor: Anchor, at_anchor: Indices, keys: Expr) -> tuple[Expr, ...]:
    """The positions of the normaliser that are no keys; it must run over all the keys.

    Raises:
        RefusalError: when it runs over another axis, or over more than a fixed number of other positions.
    """
    if anchor.axis is None:
        return ()
    along = at_anchor[anchor.axis]
    if KEY not in symbols(along) or any(
        KEY in symbols(x) for n, x in enumerate(at_anchor) if n != anchor.axis
    ):
        raise refuse(
            graph,
            "wrong-axis",
            f"the normaliser runs over axis {anchor.axis}, but the product with the values "
            "sums over another axis",
            anchor.output,
            "normalise over the keys",
        )
    normalised = graph.infos[anchor.output].shape[anchor.axis]
    first, others = simplify(along - KEY), simplify(normalised - keys)
    if not (isinstance(first, Const) and isinstance(others, Const) and 0 <= first.value <= others.value <= MOST_SINKS):
        raise refuse(
            graph,
            "partial-normaliser",
            f"the normaliser runs over {normalised} positions, the product with the values over {keys}",
            anchor.output,
            "only a fixed number of further positions (sink columns) may be normalised with the keys",
        )
    leading = int(first.value)
    return (
        *(Const(n) for n in range(leading)),
        *(simplify(keys + n) for n in range(leading, int(others.value))),
    )


def _sink(
    graph: Graph, anchor: Anchor, at_anchor: Indices, beside: Sequence[Expr], interpreter: Interpreter
) -> Expr:
    """One logit for all that is normalised with the keys: the log of the sum of their exponentials."""
    found: list[Expr] = []
    for position in beside:
        assert anchor.axis is not None
        place = (*at_anchor[: anchor.axis], position, *at_anchor[anchor.axis + 1 :])
        logit = _as_logits(graph, anchor, interpreter.at(anchor.source, place))
        if SCORE in symbols(logit) or KEY in symbols(logit):
            raise refuse(
                graph,
                "partial-normaliser",
                f"position {position} of the normaliser is a score too, but no value belongs to it",
                anchor.output,
                "normalise over the keys that have values",
            )
        found.append(logit if logit.kind is Kind.FLOAT else apply("float", logit))
    if not found:
        return NO_SINK
    return found[0] if len(found) == 1 else apply("log", apply("add", *(apply("exp", logit) for logit in found)))


def _row_maxima(graph: Graph, anchor: Anchor, behind: frozenset[str]) -> dict[str, Stop]:
    """The maxima of scores that the normaliser's input is made of: they are subtracted from whole rows."""
    before = graph.ancestors([anchor.source], behind)
    return {
        name: Stop(SHIFT)
        for name in sorted(before)
        if isinstance(node := graph.producer.get(name), Reduce) and node.operator == "max"
    }


def _as_logits(graph: Graph, anchor: Anchor, source: Expr) -> Expr:
    """The logit, from the element that the normaliser reads."""
    logits = logarithm(source) if anchor.exponential else source
    found = None if logits is None else without_shift(simplify(logits))
    if found is None:
        raise refuse(
            graph,
            "unknown-normaliser",
            f"the weights are made of {source}, which is no softmax",
            anchor.output,
        )
    return simplify(found)


def _empty_rows(weight: Expr) -> tuple[Expr, Literal["nan", "zero"]]:
    """An edit of the weights without ``where(w ≠ w, 0, w)``, which says that rows without a visible key give
    zero.

    Of finite scores, softmax makes NaN in such rows only. The edit must read the weight through that choice
    alone.
    """
    unequal = apply("ne", WEIGHT, WEIGHT)
    zeroed = [apply("where", unequal, 0.0, WEIGHT), apply("where", apply("eq", WEIGHT, WEIGHT), WEIGHT, 0.0)]
    without = substitute(weight, {choice: Const(1.0) for choice in zeroed})
    if without == weight or WEIGHT in symbols(without):
        return weight, "nan"
    return substitute(weight, {choice: WEIGHT for choice in zeroed}), "zero"


def _query_axis(candidates: Sequence[Index], extents: Mapping[str, Expr], at_anchor: Indices) -> Index | None:
    """Which axis of the output counts the queries; ``None`` for a single query whose axis has been dropped.

    Where keys are shared by all heads, heads and queries are alike and either would do: the queries are as
        many as the
    keys, or of symbolic number, or next to the keys in the weights.
    """
    if not candidates:
        return None
    by_key = next((n for n, x in enumerate(at_anchor) if x == KEY), len(at_anchor))

    def rank(axis: Index) -> tuple[bool, bool, int]:
        size = extents[axis.name]
        apart = min(
            (abs(by_key - n) for n, x in enumerate(at_anchor) if axis in symbols(x)), default=len(at_anchor)
        )
        return size != extents["j"], isinstance(size, Const), apart

    return min(candidates, key=rank)


def _batch_and_heads(
    batch: Sequence[Index], extents: Mapping[str, Expr], operands: Sequence[Operand]
) -> tuple[dict[Expr, Expr], dict[str, Expr]]:
    """Write the batch-like output axes in terms of ``b`` and ``h``."""
    if not batch:
        return {}, {"b": ONE, "h": ONE}
    if len(batch) == 1:
        (only,) = batch
        size = extents[only.name]
        for operand in operands:
            for index in operand.indices:
                for node in walk(index):
                    match node:
                        case Apply("floordiv" | "mod", (found, heads)) if found == only and heads != ONE:
                            count = simplify(size // heads)
                            if simplify(count * heads) == simplify(size):
                                return {only: BATCH * heads + HEAD}, {"b": count, "h": heads}
        return {only: BATCH}, {"b": size, "h": ONE}
    symbolic = [axis for axis in batch if not isinstance(extents[axis.name], Const)]
    outer = symbolic[0] if len(symbolic) == 1 else batch[0]
    inner_axes = [axis for axis in batch if axis is not outer]
    renaming: dict[Expr, Expr] = {outer: BATCH}
    inner: Expr = ONE
    for axis in reversed(inner_axes):
        size = extents[axis.name]
        renaming[axis] = (
            simplify((HEAD // inner) % size) if axis is not inner_axes[0] else simplify(HEAD // inner)
        )
        inner = simplify(inner * size)
    return renaming, {"b": extents[outer.name], "h": inner}


def state_fused(graph: Graph, node: FusedAttention) -> Statement:
    """The statement of one native attention call.

    Raises:
        RefusalError: when the mask can not be interpreted.
    """
    batch, heads, queries, keys, channels, value_channels = node.sizes
    extents: dict[str, Expr] = {
        "b": batch,
        "h": heads,
        "i": queries,
        "j": keys,
        "d": channels,
        "e": value_channels,
    }
    interpreter = Interpreter(graph, {}, frozenset(), extents)
    query = trace_operand(
        interpreter, node.query, node.query_indices((BATCH, HEAD, QUERY, CHANNEL)), frozenset([CHANNEL])
    )
    key = trace_operand(
        interpreter, node.key, node.key_indices((BATCH, HEAD, KEY, CHANNEL)), frozenset([CHANNEL])
    )
    value = trace_operand(
        interpreter, node.value, node.value_indices((BATCH, HEAD, KEY, VALUE_CHANNEL)), frozenset([KEY])
    )
    logits: Expr = apply("mul", node.scale, SCORE)
    if node.softcap:
        logits = apply("mul", node.softcap, apply("tanh", apply("div", logits, node.softcap)))
    visible: list[Expr] = [node.causal] if node.causal is not None else []
    if node.mask is not None and node.mask_indices is not None:
        mask = interpreter.at(node.mask, node.mask_indices((BATCH, HEAD, QUERY, KEY)))
        if mask.kind is Kind.BOOL:
            visible.append(mask)
        else:
            logits = apply("add", logits, mask)
    for condition in visible:
        logits = apply("where", condition, logits, node.mask_fill)
    output = node.output_indices or tuple(_joined(axes, extents) for axes in node.output_order)
    renaming: dict[Expr, Expr] = {}
    if heads == ONE:
        renaming, outer = _batch_and_heads([BATCH], extents, [*query, *key, *value])
        extents = {**extents, **outer}
    simplifier = graph.simplifier(extents)

    def renamed(expr: Expr) -> Expr:
        return simplifier(substitute(expr, renaming))

    def operands(found: list[Operand]) -> tuple[Operand, ...]:
        return tuple(Operand(o.value, tuple(renamed(x) for x in o.indices), renamed(o.factor)) for o in found)

    return Statement(
        renamed(logits),
        WEIGHT,
        operands(query),
        operands(key),
        operands(value),
        extents,
        node.output,
        tuple(renamed(x) for x in output),
        Normalizer("softmax", node.dtype, node.empty),
        node.output,
        frozenset(),
    )


def _joined(axes: str, extents: Mapping[str, Expr]) -> Expr:
    """The position on a native axis that is made of Spec axes, outermost first."""
    position: Expr = ZERO
    for axis in axes:
        position = apply("add", apply("mul", position, extents[axis]), Index(axis))
    return simplify(position)
