"""Growing a site from an anchor: back to the product that makes the scores, forward to that with the values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from attncompile.frontends.graph import Contract, Graph, Indices, Move
from attncompile.ir import Expr, Index, Kind, Load, Normalizer, RefusalError
from attncompile.ir.expr import ONE, SCORE, WEIGHT, substitute, symbols, walk
from attncompile.lift.anchors import Anchor, corrections
from attncompile.lift.axes import batch_and_heads, query_axis
from attncompile.lift.escapes import escaping
from attncompile.lift.folded import Fold, find_fold, unfolded
from attncompile.lift.interpret import Interpreter, Stop
from attncompile.lift.normaliser import Normalised, edited, of_anchor, of_quotient, of_softmax
from attncompile.lift.operands import Operand, label_sizes, operand_indices
from attncompile.lift.parts import PartedOperand, batch_of_all_parts, tensors, trace_parts
from attncompile.lift.pieces import inverse
from attncompile.lift.quotient import factors, fraction
from attncompile.lift.rows import Rows, free_of_map
from attncompile.lift.statement import CHANNEL, KEY, QUERY, VALUE_CHANNEL, NoSite, Statement, refuse

VALUES = Load("weighted_values", (), Kind.FLOAT)
"""Stands for the product of the weights with the values."""


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


def state_pair(graph: Graph, anchor: Anchor, score: Contract, product: Contract) -> Statement:
    """The statement of attention between two products.

    What the product with the values is multiplied with afterwards belongs to the attention where it is made of the
    scores too, such as a sink that is applied through the log-sum-exp; where that is not understood, or read elsewhere,
    the attention ends before it.

    Args:
        graph: the graph.
        anchor: the normaliser.
        score: the product that makes the scores.
        product: the product with the values.

    Raises:
        RefusalError: naming the first condition that does not hold.
        NoSite: when the keys are parameters.
    """
    end = anchor.output if anchor.product is not None else _native_end(graph, product.output)
    for result in corrections(graph, score, end):
        try:
            found = _state_until(graph, anchor, score, product, result)
        except RefusalError:
            continue
        if not any(escaping(graph, found)):
            return found
    try:
        return _state_until(graph, anchor, score, product, end)
    except RefusalError as error:
        try:
            return _state_until(graph, anchor, score, product, end, loads_rows=True)
        except RefusalError:
            raise error from None


@dataclass(frozen=True)
class _Result:
    """The value that the attention ends in.

    Attributes:
        indices: of its element, symbols of their own.
        extents: their sizes.
        at_product: the element of the product with the values that it is made of.
        factor: what that element is multiplied with, over the sums and maxima of its row; ``None`` for nothing.
        output: indices of the value's element over these symbols: the symbols themselves, unless they are the axes of a
            product that is no value of the graph.
    """

    indices: tuple[Index, ...]
    extents: Mapping[str, Expr]
    at_product: Indices
    factor: Expr | None
    output: Indices


def _plain_result(graph: Graph, product: Contract) -> _Result:
    sizes = label_sizes(graph, product)
    indices = tuple(Index(f"y{n}") for n in range(len(product.output_labels)))
    extents = {y.name: sizes[label] for y, label in zip(indices, product.output_labels, strict=True)}
    return _Result(indices, extents, indices, None, indices)


def _native_end(graph: Graph, value: str) -> str:
    """The first value of the graph that a product only is in another form, where it is no value of the graph itself."""
    while not graph.is_native(value):
        users = graph.users.get(value, ())
        if len(users) != 1 or not isinstance(users[0], Move):
            return value
        value = users[0].output
    return value


def _moved_result(graph: Graph, product: Contract, result: str) -> _Result:
    """A result that holds the elements of a product in other axes, such as heads and channels in one."""
    plain = _plain_result(graph, product)
    if result == product.output:
        return plain
    shape = graph.infos[result].shape
    outer = {Index(f"x{n}"): size for n, size in enumerate(shape)}
    stop = Stop(VALUES)
    behind = graph.descendants(product.output, result)
    extents = {x.name: size for x, size in outer.items()}
    found = Interpreter(graph, {product.output: stop}, behind, extents).at(result, tuple(outer))
    element = _only(graph, stop, "product with the values", result)
    back = inverse(graph, element, graph.infos[product.output].shape, plain.indices, outer)
    if found != VALUES or back is None:
        raise refuse(
            graph,
            "output-layout",
            "the axes of the sum of several products are no rearrangement of those of the products",
            result,
        )
    return _Result(plain.indices, plain.extents, plain.indices, None, tuple(back[x] for x in outer))


def _corrected_result(graph: Graph, product: Contract, result: str, rows: Rows, behind: frozenset[str]) -> _Result:
    shape = graph.infos[result].shape
    indices = tuple(Index(f"y{n}") for n in range(len(shape)))
    extents = {y.name: size for y, size in zip(indices, shape, strict=True)}
    stop = Stop(VALUES)
    found = Interpreter(graph, {**rows.stops, product.output: stop}, behind, extents).at(result, indices)
    above, below = factors(found)
    if above.count(VALUES) != 1 or not all(free_of_map(part) for part in (*above, *below)):
        raise refuse(graph, "unknown-normaliser", f"the result is corrected to {found}", result)
    above.remove(VALUES)
    if any(VALUES in walk(part) for part in (*above, *below)):
        raise refuse(graph, "unknown-normaliser", f"the result is corrected to {found}", result)
    return _Result(
        indices,
        extents,
        _only(graph, stop, "product with the values", result),
        fraction(above, below) if above or below else None,
        indices,
    )


def _edit(
    graph: Graph,
    anchor: Anchor,
    score: Contract,
    element: tuple[str, Indices],
    behind: frozenset[str],
    extents: Mapping[str, Expr],
) -> tuple[Expr, Indices]:
    """What is done to the weights between normaliser and values, and the element of the normaliser it is done to."""
    interpreter = Interpreter(graph, {anchor.output: Stop(WEIGHT), score.output: Stop(SCORE)}, behind, extents)
    weight = interpreter.at(*element)
    if SCORE in symbols(weight):
        raise refuse(
            graph,
            "weight-reads-score",
            f"the edit of the weights {weight} reads the score itself",
            element[0],
        )
    return weight, _only(graph, interpreter.stops[anchor.output], "normaliser", anchor.output)


def _unfolded(found: _Result, fold: Fold) -> _Result:
    """The same elements, with the two axes that one holds apart."""
    meaning, sizes = unfolded(fold, found.indices, found.extents)
    indices = tuple(Index(f"y{n}") for n in range(len(sizes)))
    return _Result(
        indices,
        {y.name: size for y, size in zip(indices, sizes, strict=True)},
        tuple(substitute(x, meaning) for x in found.at_product),
        found.factor if found.factor is None else substitute(found.factor, meaning),
        tuple(substitute(x, meaning) for x in found.output),
    )


def _state_until(
    graph: Graph,
    anchor: Anchor,
    score: Contract,
    product: Contract,
    result: str,
    *,
    loads_rows: bool = False,
    folds: tuple[Fold, ...] = (),
) -> Statement:
    """The statement that ends in a result. Sums and maxima of scores that are no part of the normaliser (a clamp
    relative to the largest score, say) may be loaded: they need the scores, so that these are read elsewhere too.
    Axes of the result that hold two (``folds``) are taken apart, one after the other.
    """
    behind = graph.descendants(score.output, result)
    after = behind if anchor.product is not None else graph.descendants(anchor.output, product.output)
    sides = [side for side, name in (("left", product.left), ("right", product.right)) if name in after]
    if len(sides) != 1 or len(product.summed) != 1 or len(score.summed) != 1:
        raise refuse(
            graph,
            "not-a-product",
            "the weights must meet the values, and queries the keys, in a product over one axis",
            product.output,
        )
    weight_side, value_side = sides[0], "right" if sides[0] == "left" else "left"
    corrected = result != _native_end(graph, product.output)
    rows = Rows.before(graph, result if corrected else anchor.output, behind)
    if anchor.kind != "quotient" and not corrected:
        rows = rows.without_totals() if anchor.axis is not None else Rows(graph, {}, {})
    if loads_rows:
        rows = Rows(graph, {}, {})
    reached = (
        _corrected_result(graph, product, result, rows, behind) if corrected else _moved_result(graph, product, result)
    )
    for fold in folds:
        reached = _unfolded(reached, fold)
    out_symbols, at_product, extents = reached.indices, reached.at_product, dict(reached.extents)
    extents["j"] = label_sizes(graph, product)[product.summed[0]]
    summed: dict[str, Expr] = {product.summed[0]: KEY}
    weight_value = product.left if weight_side == "left" else product.right
    weight_indices = operand_indices(graph, product, weight_side, at_product, summed)
    lifted = Interpreter(graph, {score.output: Stop(SCORE), **rows.stops}, behind, extents)
    if anchor.product is not None or anchor.kind == "none":
        weight: Expr = WEIGHT
        at_anchor = weight_indices
    else:
        weight, at_anchor = _edit(graph, anchor, score, (weight_value, weight_indices), behind, extents)
    element = (weight_value, weight_indices) if anchor.product else (anchor.output, at_anchor)
    if anchor.kind == "none" and reached.factor is not None:
        raise refuse(graph, "unknown-normaliser", f"the result is multiplied by {reached.factor}", result)
    if anchor.kind == "none":
        normalised = Normalised("none", lifted.at(weight_value, weight_indices))
    elif anchor.kind == "quotient":
        stated = lifted.at(*element) if reached.factor is None else fraction([lifted.at(*element), reached.factor], [])
        normalised = of_quotient(graph, anchor, lifted, rows, stated, extents["j"])
    elif reached.factor is not None:
        normalised = of_softmax(graph, anchor, at_anchor, lifted, rows, extents["j"], reached.factor)
    else:
        normalised = of_anchor(graph, anchor, at_anchor, lifted, rows, extents["j"])
    if corrected and weight != WEIGHT:
        raise refuse(graph, "unknown-normaliser", "edited weights are divided after the product", product.output)
    at_score = _only(graph, lifted.stops[score.output], "score product", score.output)
    extents["d"] = label_sizes(graph, score)[score.summed[0]]
    plain = Interpreter(graph, {}, behind, extents)
    traced = {}
    for side in ("left", "right"):
        name = score.left if side == "left" else score.right
        if name in behind:
            raise refuse(graph, "recursive-score", "an operand of the score depends on the score", score.output)
        indices = operand_indices(graph, score, side, at_score, {score.summed[0]: CHANNEL})
        traced[side] = trace_parts(plain, name, indices, frozenset([CHANNEL]))
    value_indices = operand_indices(graph, product, value_side, at_product, summed)
    value = trace_parts(plain, product.left if value_side == "left" else product.right, value_indices, frozenset([KEY]))
    if not value or not traced["left"] or not traced["right"]:
        raise refuse(
            graph,
            "operand-layout",
            "an operand is not a tensor of the graph, or something overwrites it",
            product.output,
        )
    reads_key = {side: any(KEY in symbols(x) for x in found[0].indices) for side, found in traced.items()}
    if sum(reads_key.values()) != 1:
        raise refuse(graph, "no-key-axis", "exactly one operand of the score must run over the keys", score.output)
    key = traced["left" if reads_key["left"] else "right"]
    query = traced["right" if reads_key["left"] else "left"]
    asked, read = (score.right, score.left) if reads_key["left"] else (score.left, score.right)
    if read not in graph.varying and asked in graph.varying:
        raise NoSite  # a layer of a network: its keys are parameters

    def uses(operand: Operand) -> frozenset[Expr]:
        return frozenset(s for x in operand.indices for s in symbols(x))

    value_only = [y for y in out_symbols if y in uses(value[0]) and all(y not in symbols(x) for x in weight_indices)]
    if len(value_only) != 1:
        raise refuse(
            graph,
            "several-value-axes",
            f"the output has {len(value_only)} axes that only the values run over; one, the channels, is understood",
            product.output,
        )
    query_only = [y for y in out_symbols if y in uses(query[0]) and y not in uses(key[0]) and y not in uses(value[0])]
    folded = find_fold(query_only, extents, at_anchor)
    if folded is not None:
        return _state_until(graph, anchor, score, product, result, loads_rows=loads_rows, folds=(*folds, folded))
    unit = [y for y in out_symbols if extents[y.name] == ONE and y not in value_only]
    ordered = query_axis(query_only or unit[-1:], extents, at_anchor)
    batch = [y for y in out_symbols if y not in (ordered, value_only[0])]
    renaming, new_extents = batch_and_heads(batch, extents, [*query, *tensors(key), *tensors(value)], ordered)
    renaming, new_extents = batch_of_all_parts(batch, extents, renaming, [*key, *value]) or (renaming, new_extents)
    renaming[value_only[0]] = VALUE_CHANNEL
    new_extents.update({"i": ONE, "e": extents[value_only[0].name], "j": extents["j"], "d": extents["d"]})
    if ordered is not None:
        renaming[ordered] = QUERY
        new_extents["i"] = extents[ordered.name]
    simplifier = graph.simplifier(new_extents)

    def renamed(expr: Expr) -> Expr:
        return simplifier(substitute(expr, renaming))

    def operand(found: Operand) -> Operand:
        changed = replace(found, indices=tuple(renamed(x) for x in found.indices), factor=renamed(found.factor))
        return changed.each(operand) if isinstance(changed, PartedOperand) else changed

    def operands(found: list[Operand]) -> tuple[Operand, ...]:
        return tuple(operand(entry) for entry in found)

    inner = graph.ancestors([result], behind - lifted.reduced) - {result}
    weight, empty = edited(weight, normalised)
    return Statement(
        renamed(normalised.logits),
        renamed(weight),
        operands(query),
        operands(key),
        operands(value),
        new_extents,
        result,
        tuple(renamed(y) for y in reached.output),
        Normalizer(normalised.kind, graph.infos[anchor.total or anchor.output].dtype, empty),
        anchor.output,
        inner,
        renamed(normalised.sink),
        renamed(normalised.divisor),
        score.output,
        tuple(renamed(x) for x in at_score),
        product.output,
    )
