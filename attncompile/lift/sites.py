"""Finding attention: anchors, growth to both contractions, and the statement of a site as a Spec."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from attncompile.frontends.graph import Contract, FusedAttention, Graph, Indices, Node, Opaque, Reduce, RefusedAttention
from attncompile.ir import (
    Attend,
    Axis,
    Expr,
    Index,
    Kind,
    Load,
    Normalizer,
    Refusal,
    RefusalError,
    Size,
    Spec,
    TensorType,
    Value,
    simplify,
)
from attncompile.ir.expr import ONE, SCORE, TRUE, WEIGHT, ZERO, Apply, Const, apply, loads, rewrite, substitute, symbols, walk
from attncompile.ir.simplify import polynomial
from attncompile.lift.anchors import (
    SHIFT,
    Anchor,
    Product,
    logarithm,
    normalisers,
    obstacle_after,
    obstacle_behind,
    products_after,
    scores_behind,
    unnormalised_products,
    without_shift,
)
from attncompile.lift.interpret import Interpreter, Stop
from attncompile.lift.masks import scale_score, split_mask
from attncompile.lift.operands import Operand, label_sizes, layout_of, operand_indices, trace_operand
from attncompile.lift.program import Binding, Layout, Region, Site

_B, _H, _I, _J, _D, _E = (Index(name) for name in "bhijde")


@dataclass(frozen=True)
class _Statement:
    """A site before its tensors are named: everything over the symbols ``b h i j d e``.

    Attributes:
        logits: over ``s`` (the product of the nearest operands) and loads; weight: over ``w``.
        query, key, value: candidate operands, nearest first.
        extents: sizes of the symbols.
        output: the value that is replaced, and its element's indices.
        anchor: the value that names the site.
        inner: values strictly between the operands and the output.
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


def find_sites(graph: Graph) -> tuple[Site, ...]:
    """Every attention site of a graph, lifted, observed or refused; not yet proven."""
    place = {node.output: number for number, node in enumerate(graph.nodes)}
    found: list[tuple[int, Site]] = []
    known: set[str] = set()

    def add(anchor: str, state: Callable[[], _Statement]) -> None:
        site = _site(graph, anchor, state)
        if site is not None:
            found.append((place[anchor], site))

    for node in graph.nodes:
        if isinstance(node, FusedAttention):
            add(node.output, partial(_state_fused, graph, node))
        elif isinstance(node, RefusedAttention):
            add(node.output, partial(_refused_call, graph, node))
    for anchor in normalisers(graph):
        scores, products = scores_behind(graph, anchor.source), products_after(graph, anchor.output)
        # a classifier or a router: what it normalises is a map of the state, and no values follow
        if any(all(n in graph.varying for n in s.contract.inputs) for s in scores) or (scores and products):
            if anchor.axis is None and not products:
                continue
            known |= {score.contract.output for score in scores} | {product.output for product in products}
            add(anchor.output, partial(_state_anchor, graph, anchor, scores, products))
        elif anchor.kind == "softmax" and products and (obstacle := obstacle_behind(graph, anchor.source)) is not None:
            add(anchor.output, partial(_refused_obstacle, graph, obstacle))
    for score, product in unnormalised_products(graph, frozenset(known)):
        add(score.output, partial(_refused_products, graph, score, product))
    return _uniquely_named([site for _, site in sorted(found, key=lambda entry: entry[0])])


class _NoSite(Exception):
    """What looked like attention is none."""


def _site(graph: Graph, anchor: str, state: Callable[[], _Statement]) -> Site | None:
    native = graph.describe(anchor)
    name = native.module or native.name
    try:
        statement = state()
        spec, region = _spec(graph, name, statement)
    except RefusalError as error:
        return Site(name, "refused", refusal=error.refusal, source=native.source, anchor=native.name)
    except _NoSite:
        return None
    escape = _escape(graph, statement)
    return Site(name, "observed" if escape else "lifted", spec, escape, native.source, (), region, None, native.name)


def _uniquely_named(sites: list[Site]) -> tuple[Site, ...]:
    seen: dict[str, int] = {}
    result = []
    for site in sites:
        seen[site.name] = seen.get(site.name, 0) + 1
        name = site.name if seen[site.name] == 1 else f"{site.name}.{seen[site.name]}"
        spec = replace(site.spec, name=name) if site.spec else None
        result.append(replace(site, name=name, spec=spec))
    return tuple(result)


def _refuse(graph: Graph, kind: str, reason: str, value: str, hint: str = "") -> RefusalError:
    native = graph.describe(value)
    return RefusalError(Refusal(kind, reason, native.name, native.source, hint))


def _refused_call(graph: Graph, node: RefusedAttention) -> _Statement:
    raise _refuse(graph, "unstated-attention", f"the call of {node.what} is not lifted because {node.reason}", node.output,
                  "export the model with its attention spelled out, or without this option")


def _refused_obstacle(graph: Graph, obstacle: Node) -> _Statement:
    native = graph.describe(obstacle.output)
    what = obstacle.what if isinstance(obstacle, Opaque) else native.what
    raise _refuse(graph, "uninterpreted-node", f"{what} lies between the scores and the normaliser, and is no pointwise "
                  "operation or movement of data", obstacle.output)


def _refused_products(graph: Graph, score: Contract, product: Contract) -> _Statement:
    """Say of two products that follow each other why they are no known attention, unless they are none at all."""
    behind = graph.descendants(score.output, product.output)
    sides = [side for side, name in (("left", product.left), ("right", product.right)) if name in behind]
    if len(sides) != 1 or len(product.summed) != 1:
        raise _NoSite
    inner = Interpreter(graph, {score.output: Stop(SCORE)}, behind)
    outer = tuple(Index(f"y{n}") for n in range(len(product.output_labels)))
    indices = operand_indices(graph, product, sides[0], outer, {product.summed[0]: _J})
    try:
        inner.at(product.left if sides[0] == "left" else product.right, indices)
    except RefusalError:
        pass  # something reads whole rows of scores
    else:
        if not any(_J in symbols(x) for found in inner.stops[score.output].indices for x in found):
            raise _NoSite  # one number for the whole row, such as the norm of a vector
    raise _refuse(graph, "unknown-normaliser", f"{graph.describe(product.output).name} sums over products of activations "
                  "that nothing known normalises", score.output,
                  "attention with a softmax (written in any way), sigmoid or relu is lifted")


def _only(graph: Graph, stop: Stop, what: str, value: str) -> Indices:
    if len(stop.indices) != 1:
        raise _refuse(graph, "several-elements", f"an element of the output depends on {len(stop.indices)} different "
                      f"elements of the {what}", value, "each weight must come from one score")
    return stop.indices[0]


def _state_anchor(graph: Graph, anchor: Anchor, scores: Sequence[Product], products: Sequence[Contract]) -> _Statement:
    if not products:
        obstacle = obstacle_after(graph, anchor.output)
        if obstacle is not None:
            native = graph.describe(obstacle.output)
            raise _refuse(graph, "uninterpreted-node", f"{native.what} lies between the weights and the values, and is no "
                          "pointwise operation or movement of data", obstacle.output,
                          "in evaluation mode dropout does nothing" if "dropout" in native.what else "")
        raise _refuse(graph, "no-value-product", "the normalised scores are never multiplied with values", anchor.output,
                      "attention ends in a product of the weights with a value tensor")
    refusals: list[RefusalError] = []
    for product in products:
        for score in scores:
            try:
                if score.mixes:
                    raise _refuse(graph, "mixed-scores", "the scores are mixed by a product with parameters before the "
                                  "normaliser", score.contract.output, "talking heads are not lifted")
                return _state_pair(graph, anchor, score.contract, product)
            except RefusalError as error:
                refusals.append(error)
    raise refusals[0]


def _state_pair(graph: Graph, anchor: Anchor, score: Contract, product: Contract) -> _Statement:
    behind = graph.descendants(score.output, product.output)
    after = graph.descendants(anchor.output, product.output)
    sides = [side for side, name in (("left", product.left), ("right", product.right)) if name in after]
    if len(sides) != 1 or len(product.summed) != 1 or len(score.summed) != 1:
        raise _refuse(graph, "not-a-product", "the weights must meet the values, and queries the keys, in a product over "
                      "one axis", product.output)
    weight_side, value_side = sides[0], "right" if sides[0] == "left" else "left"
    sizes = label_sizes(graph, product)
    out_symbols = tuple(Index(f"y{n}") for n in range(len(product.output_labels)))
    extents: dict[str, Expr] = {s.name: sizes[l] for s, l in zip(out_symbols, product.output_labels, strict=True)}
    extents["j"] = sizes[product.summed[0]]
    summed = {product.summed[0]: _J}

    weights = Interpreter(graph, {anchor.output: Stop(WEIGHT), score.output: Stop(SCORE)}, behind, extents)
    weight_value = product.left if weight_side == "left" else product.right
    weight = weights.at(weight_value, operand_indices(graph, product, weight_side, out_symbols, summed))
    weight = substitute(weight, {apply("exp", apply("log", WEIGHT)): WEIGHT})  # a weight is never negative
    if SCORE in symbols(weight):
        raise _refuse(graph, "weight-reads-score", f"the edit of the weights {weight} reads the score itself", product.output)
    at_anchor = _only(graph, weights.stops[anchor.output], "normaliser", anchor.output)
    _check_axis(graph, anchor, at_anchor, extents["j"])

    rows = {} if anchor.axis is None else _row_maxima(graph, anchor, behind)
    lifted = Interpreter(graph, {score.output: Stop(SCORE), **rows}, behind, extents)
    logits = _as_logits(graph, anchor, lifted.at(anchor.source, at_anchor))
    if any(_J in symbols(index) for stop in rows.values() for indices in stop.indices for index in indices):
        raise _refuse(graph, "unknown-normaliser", "the maximum that is subtracted is not that of a row", anchor.output)
    at_score = _only(graph, lifted.stops[score.output], "score product", score.output)
    extents["d"] = label_sizes(graph, score)[score.summed[0]]
    plain = Interpreter(graph, {}, behind, extents)
    traced = {}
    for side in ("left", "right"):
        name = score.left if side == "left" else score.right
        if name in behind:
            raise _refuse(graph, "recursive-score", "an operand of the score depends on the score", score.output)
        indices = operand_indices(graph, score, side, at_score, {score.summed[0]: _D})
        traced[side] = trace_operand(plain, name, indices, frozenset([_D]))
    value_indices = operand_indices(graph, product, value_side, out_symbols, summed)
    value = trace_operand(plain, product.left if value_side == "left" else product.right, value_indices, frozenset([_J]))
    if not value or not traced["left"] or not traced["right"]:
        raise _refuse(graph, "operand-layout", "an operand is not a tensor of the graph, or something overwrites it",
                      product.output)
    reads_key = {side: any(_J in symbols(x) for x in found[0].indices) for side, found in traced.items()}
    if sum(reads_key.values()) != 1:
        raise _refuse(graph, "no-key-axis", "exactly one operand of the score must run over the keys", score.output)
    key = traced["left" if reads_key["left"] else "right"]
    query = traced["right" if reads_key["left"] else "left"]
    if (score.left if reads_key["left"] else score.right) not in graph.varying:
        raise _NoSite  # a layer of a network: its keys are parameters

    def uses(operand: Operand) -> frozenset[Expr]:
        return frozenset(s for x in operand.indices for s in symbols(x))

    value_only = [y for y in out_symbols if y in uses(value[0]) and all(y not in symbols(x) for x in at_anchor)]
    if len(value_only) != 1:
        raise _refuse(graph, "several-value-axes", f"the output has {len(value_only)} axes that only the values run over; "
                      "one, the channels, is understood", product.output)
    query_only = [y for y in out_symbols if y in uses(query[0]) and y not in uses(key[0]) and y not in uses(value[0])]
    unit = [y for y in out_symbols if extents[y.name] == ONE and y not in value_only]
    ordered = _query_axis(query_only or unit[-1:], extents, at_anchor)
    batch = [y for y in out_symbols if y not in (ordered, value_only[0])]
    renaming, new_extents = _batch_and_heads(batch, extents, [*query, *key, *value])
    renaming[value_only[0]] = _E
    new_extents.update({"i": ONE, "e": extents[value_only[0].name], "j": extents["j"], "d": extents["d"]})
    if ordered is not None:
        renaming[ordered] = _I
        new_extents["i"] = extents[ordered.name]
    simplifier = graph.simplifier(new_extents)

    def renamed(expr: Expr) -> Expr:
        return simplifier(substitute(expr, renaming))

    def operands(found: list[Operand]) -> tuple[Operand, ...]:
        return tuple(Operand(o.value, tuple(renamed(x) for x in o.indices), renamed(o.factor)) for o in found)

    inner = graph.ancestors([product.output], behind) - {product.output}
    weight, empty = _empty_rows(weight)
    return _Statement(renamed(logits), renamed(weight), operands(query), operands(key), operands(value), new_extents,
                      product.output, tuple(renamed(y) for y in out_symbols),
                      Normalizer(anchor.kind, graph.infos[anchor.output].dtype, empty), anchor.output, inner)


def _check_axis(graph: Graph, anchor: Anchor, at_anchor: Indices, keys: Expr) -> None:
    """The normaliser must run over all the keys, and over nothing else."""
    if anchor.axis is None:
        return
    along = at_anchor[anchor.axis]
    if _J not in symbols(along) or any(_J in symbols(x) for n, x in enumerate(at_anchor) if n != anchor.axis):
        raise _refuse(graph, "wrong-axis", f"the normaliser runs over axis {anchor.axis}, but the product with the values "
                      "sums over another axis", anchor.output, "normalise over the keys")
    normalised = graph.infos[anchor.output].shape[anchor.axis]
    if along != _J or simplify(normalised) != simplify(keys):
        raise _refuse(graph, "partial-normaliser", f"the normaliser runs over {normalised} positions, the product with the "
                      f"values over {keys}", anchor.output,
                      "weights that are sliced after the normaliser (sink columns) are not lifted yet")


def _row_maxima(graph: Graph, anchor: Anchor, behind: frozenset[str]) -> dict[str, Stop]:
    """The maxima of scores that the normaliser's input is made of: they are subtracted from whole rows."""
    before = graph.ancestors([anchor.source], behind)
    return {name: Stop(SHIFT) for name in sorted(before)
            if isinstance(node := graph.producer.get(name), Reduce) and node.operator == "max"}


def _as_logits(graph: Graph, anchor: Anchor, source: Expr) -> Expr:
    """The logit, from the element that the normaliser reads."""
    logits = logarithm(source) if anchor.exponential else source
    found = None if logits is None else without_shift(simplify(logits))
    if found is None:
        raise _refuse(graph, "unknown-normaliser", f"the weights are made of {source}, which is no softmax", anchor.output)
    return simplify(found)


def _empty_rows(weight: Expr) -> tuple[Expr, Literal["nan", "zero"]]:
    """An edit of the weights without ``where(w ≠ w, 0, w)``, which says that rows without a visible key give zero.

    Of finite scores, softmax makes NaN in such rows only. The edit must read the weight through that choice alone.
    """
    unequal = apply("ne", WEIGHT, WEIGHT)
    zeroed = [apply("where", unequal, 0.0, WEIGHT), apply("where", apply("eq", WEIGHT, WEIGHT), WEIGHT, 0.0)]
    without = substitute(weight, {choice: Const(1.0) for choice in zeroed})
    if without == weight or WEIGHT in symbols(without):
        return weight, "nan"
    return substitute(weight, {choice: WEIGHT for choice in zeroed}), "zero"


def _query_axis(candidates: Sequence[Index], extents: Mapping[str, Expr], at_anchor: Indices) -> Index | None:
    """Which axis of the output counts the queries; ``None`` for a single query whose axis has been dropped.

    Where keys are shared by all heads, heads and queries are alike and either would do: the queries are as many as the
    keys, or of symbolic number, or next to the keys in the weights.
    """
    if not candidates:
        return None
    by_key = next((n for n, x in enumerate(at_anchor) if x == _J), len(at_anchor))

    def rank(axis: Index) -> tuple[bool, bool, int]:
        size = extents[axis.name]
        apart = min((abs(by_key - n) for n, x in enumerate(at_anchor) if axis in symbols(x)), default=len(at_anchor))
        return size != extents["j"], isinstance(size, Const), apart

    return min(candidates, key=rank)


def _batch_and_heads(batch: Sequence[Index], extents: Mapping[str, Expr], operands: Sequence[Operand]
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
                                return {only: _B * heads + _H}, {"b": count, "h": heads}
        return {only: _B}, {"b": size, "h": ONE}
    symbolic = [axis for axis in batch if not isinstance(extents[axis.name], Const)]
    outer = symbolic[0] if len(symbolic) == 1 else batch[0]
    heads = [axis for axis in batch if axis is not outer]
    renaming: dict[Expr, Expr] = {outer: _B}
    inner: Expr = ONE
    for axis in reversed(heads):
        size = extents[axis.name]
        renaming[axis] = simplify((_H // inner) % size) if axis is not heads[0] else simplify(_H // inner)
        inner = simplify(inner * size)
    return renaming, {"b": extents[outer.name], "h": inner}


def _state_fused(graph: Graph, node: FusedAttention) -> _Statement:
    batch, heads, queries, keys, channels, value_channels = node.sizes
    extents: dict[str, Expr] = {"b": batch, "h": heads, "i": queries, "j": keys, "d": channels, "e": value_channels}
    interpreter = Interpreter(graph, {}, frozenset(), extents)
    query = trace_operand(interpreter, node.query, node.query_indices((_B, _H, _I, _D)), frozenset([_D]))
    key = trace_operand(interpreter, node.key, node.key_indices((_B, _H, _J, _D)), frozenset([_D]))
    value = trace_operand(interpreter, node.value, node.value_indices((_B, _H, _J, _E)), frozenset([_J]))
    logits: Expr = apply("mul", node.scale, SCORE)
    if node.softcap:
        logits = apply("mul", node.softcap, apply("tanh", apply("div", logits, node.softcap)))
    visible: list[Expr] = [node.causal] if node.causal is not None else []
    if node.mask is not None and node.mask_indices is not None:
        mask = interpreter.at(node.mask, node.mask_indices((_B, _H, _I, _J)))
        if mask.kind is Kind.BOOL:
            visible.append(mask)
        else:
            logits = apply("add", logits, mask)
    for condition in visible:
        logits = apply("where", condition, logits, node.mask_fill)
    output = node.output_indices or tuple(_joined(axes, extents) for axes in node.output_order)
    renaming: dict[Expr, Expr] = {}
    if heads == ONE:
        renaming, outer = _batch_and_heads([_B], extents, [*query, *key, *value])
        extents = {**extents, **outer}
    simplifier = graph.simplifier(extents)

    def renamed(expr: Expr) -> Expr:
        return simplifier(substitute(expr, renaming))

    def operands(found: list[Operand]) -> tuple[Operand, ...]:
        return tuple(Operand(o.value, tuple(renamed(x) for x in o.indices), renamed(o.factor)) for o in found)

    return _Statement(renamed(logits), WEIGHT, operands(query), operands(key), operands(value), extents, node.output,
                      tuple(renamed(x) for x in output), Normalizer("softmax", node.dtype, node.empty), node.output,
                      frozenset())


def _joined(axes: str, extents: Mapping[str, Expr]) -> Expr:
    """The position on a native axis that is made of Spec axes, outermost first."""
    position: Expr = ZERO
    for axis in axes:
        position = apply("add", apply("mul", position, extents[axis]), Index(axis))
    return simplify(position)


def _kv_head(operand: Operand) -> Expr | None:
    """The KV head of query head ``h``, as the operand's indices say; ``None`` when they say several things."""
    found: set[Expr] = set()
    for index in operand.indices:
        for mono in polynomial(index):
            found |= {atom for atom in mono if _H in symbols(atom)}
    if not found:
        return ZERO
    return found.pop() if len(found) == 1 else None


def _kv_heads(kv_head: Expr, heads: Expr) -> Expr | None:
    """How many KV heads there are."""
    match kv_head:
        case Index("h"):
            return heads
        case Const(0):
            return ONE
        case Apply("floordiv", (Index("h"), repeat)):
            return simplify(heads // repeat)
        case Apply("mod", (Index("h"), count)):
            return count
    return None


@dataclass(frozen=True)
class _Chosen:
    operand: Operand
    layout: Layout


def _choose(candidates: Sequence[Operand], axes: dict[str, tuple[Expr, Expr]], graph: Graph) -> _Chosen | None:
    """The farthest operand that holds exactly the Spec tensor."""
    for operand in reversed(candidates):
        layout = layout_of(graph, operand.indices, graph.infos[operand.value].shape, axes)
        if layout is not None:
            return _Chosen(operand, layout)
    return None


def _choose_kv(graph: Graph, statement: _Statement, extents: dict[str, Expr]) -> tuple[_Chosen, _Chosen, Expr, Expr] | None:
    """Key and value that agree on the KV heads, farthest first."""
    heads = extents["h"]
    options = [k for k in (_kv_head(o) for o in (*reversed(statement.key), *reversed(statement.value))) if k is not None]
    if heads == ONE:
        options = [_H]
    for kv_head in dict.fromkeys(options):
        groups = _kv_heads(kv_head, heads)
        if groups is None:
            continue
        found = []
        for candidates, channel in ((statement.key, _D), (statement.value, _E)):
            matching = [o for o in candidates if heads == ONE or _kv_head(o) in (kv_head, ZERO)]
            symbol = kv_head if kv_head != ZERO else Index("g")
            axes = {"b": (_B, extents["b"]), "g": (symbol, groups), "j": (_J, extents["j"]),
                    channel.name: (channel, extents[channel.name])}
            found.append(_choose(matching, axes, graph))
        if found[0] is not None and found[1] is not None:
            return found[0], found[1], kv_head, groups
    return None


def _spec(graph: Graph, name: str, statement: _Statement) -> tuple[Spec, Region]:
    extents = dict(statement.extents)
    if not graph.is_native(statement.output):
        raise _refuse(graph, "inner-output", "the product with the values is only part of a native operation",
                      statement.output)
    axes = {"b": (_B, extents["b"]), "h": (_H, extents["h"]), "i": (_I, extents["i"]), "d": (_D, extents["d"])}
    query = _choose(statement.query, axes, graph)
    if query is None:
        raise _refuse(graph, "operand-layout", "no tensor on the way holds exactly the queries", statement.output)
    chosen = _choose_kv(graph, statement, extents)
    if chosen is None:
        raise _refuse(graph, "operand-layout", "no tensors on the way hold exactly the keys and values", statement.output)
    key, value, kv_head, groups = chosen
    output_axes = {"b": (_B, extents["b"]), "h": (_H, extents["h"]), "i": (_I, extents["i"]), "e": (_E, extents["e"])}
    output = layout_of(graph, statement.output_indices, graph.infos[statement.output].shape, output_axes)
    if output is None:
        raise _refuse(graph, "output-layout", "the output's axes mix batch, heads and queries in a way that is not "
                      "understood", statement.output)
    simplifier = graph.simplifier(extents)
    factor = simplifier(apply("mul", query.operand.factor, key.operand.factor))
    logits = simplifier(scale_score(statement.logits, factor))
    weight = simplifier(apply("mul", value.operand.factor, statement.weight))
    score, mask, fill = split_mask(logits)
    naming = _Naming(graph, extents)
    types = {
        "q": naming.type("bhid", (extents["b"], extents["h"], extents["i"], extents["d"]), query.operand.value),
        "k": naming.type("bgjd", (extents["b"], groups, extents["j"], extents["d"]), key.operand.value),
        "v": naming.type("bgje", (extents["b"], groups, extents["j"], extents["e"]), value.operand.value),
    }
    attend = Attend("q", "k", "v", naming.expr(_real(score)), naming.expr(mask), naming.expr(_real(fill)),
                    naming.expr(weight), kv_head, statement.normalizer)
    captured = naming.captured()
    spec = Spec(name, (*(Value(n, t) for n, t in types.items()), *(v for v, _ in captured)), (attend,))
    try:
        spec.verify()
    except ValueError as error:
        raise _refuse(graph, "ill-typed", str(error).splitlines()[0], statement.output) from None
    inner = {graph.owner.get(v, v) for v in statement.inner} | {graph.owner.get(statement.output, statement.output)}
    order = [n for n in graph.natives if n in inner]
    region = Region(
        (Binding("q", query.operand.value, query.layout), Binding("k", key.operand.value, key.layout),
         Binding("v", value.operand.value, value.layout), *(Binding(v.name, n, None) for v, n in captured)),
        (Binding("out", statement.output, output),), tuple(order),
    )
    return spec, region


def _real(expr: Expr) -> Expr:
    if expr.kind is Kind.FLOAT:
        return expr
    return Const(float(expr.value)) if isinstance(expr, Const) else apply("float", expr)


class _Naming:
    """Names of sizes and captured tensors as they appear in a Spec."""

    def __init__(self, graph: Graph, extents: Mapping[str, Expr]) -> None:
        self.graph = graph
        self.sizes: dict[Expr, Expr] = {}
        for axis, name in (("b", "B"), ("i", "I"), ("j", "J")):
            size = simplify(substitute(extents[axis], self.sizes))
            free = [node for node in walk(size) if isinstance(node, Size) and node not in self.sizes.values()]
            if isinstance(size, Const) or not free:
                continue
            poly = polynomial(size)
            for symbol in free:
                if poly.get((symbol,)) == 1 and not any(symbol in mono for mono in poly if mono != (symbol,)):
                    # past and new keys: J is what the tensor shows, the part without a name is what remains
                    self.sizes[symbol] = simplify(Size(name) - (size - symbol))
                    break
            else:
                self.sizes[extents[axis]] = Size(name)
        self.tensors: dict[str, str] = {}

    def size(self, size: Expr) -> Expr:
        return simplify(substitute(size, self.sizes))

    def type(self, letters: str, sizes: Sequence[Expr], native: str) -> TensorType:
        axes = tuple(Axis(letter, self.size(size)) for letter, size in zip(letters, sizes, strict=True))
        return TensorType(axes, self.graph.infos[native].dtype)

    def expr(self, expr: Expr) -> Expr:
        for load in loads(expr):
            if load.tensor not in self.tensors:
                self.tensors[load.tensor] = self._name(load.tensor)

        def renamed(node: Expr) -> Expr | None:
            if isinstance(node, Load) and node.tensor in self.tensors:
                return Load(self.tensors[node.tensor], node.indices, node.element)
            return self.sizes.get(node)

        return simplify(rewrite(expr, renamed)) if expr not in (TRUE, WEIGHT) else expr

    def _name(self, native: str) -> str:
        given = self.graph.inputs.get(native)
        name = re.sub(r"[^\w.]", "_", given.name if given else native)
        name = name if re.match(r"[A-Za-z_]", name) else f"t_{name}"
        while name in self.tensors.values() or name in ("q", "k", "v", "out", "s", "w", "true", "false", "inf", "nan"):
            name += "_"
        return name

    def captured(self) -> list[tuple[Value, str]]:
        found = []
        for native, name in self.tensors.items():
            info = self.graph.infos[native]
            axes = tuple(Axis(f"a{n}", self.size(size)) for n, size in enumerate(info.shape))
            found.append((Value(name, TensorType(axes, info.dtype)), native))
        return found


def _escape(graph: Graph, statement: _Statement) -> Refusal | None:
    """Why a site can only be observed: one of its inner values is read elsewhere."""
    inside = statement.inner | {statement.output}
    for value in sorted(statement.inner):
        outside = [user for user in graph.users.get(value, ()) if user.output not in inside]
        if value in graph.outputs or outside:
            reader = "the model returns it" if value in graph.outputs else f"{graph.describe(outside[0].output).name} reads it"
            native = graph.describe(value)
            return Refusal("escaping-value", f"the inner value {native.name} ({native.what}) is needed outside: {reader}",
                           native.name, native.source, "ask the model not to return attention weights")
    return None

