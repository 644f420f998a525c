"""Finding attention: every anchor of a graph becomes a site, lifted, observed or refused."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial

from attncompile.frontends.graph import (
    Contract,
    FusedAttention,
    FusedScan,
    Graph,
    Node,
    Opaque,
    RefusedAttention,
)
from attncompile.ir import (
    Refusal,
    RefusalError,
    Spec,
)
from attncompile.ir.attend import NO_SINK
from attncompile.lift.anchors import (
    Anchor,
    Product,
    is_learned,
    is_multiplied_rounded,
    mixed_by_layer,
    normalisers,
    obstacle_behind,
    products_after,
    products_after_layer,
    scores_behind,
    unnormalised_products,
)
from attncompile.lift.candidates import state_anchor, state_products
from attncompile.lift.escapes import escaping, with_log_sum
from attncompile.lift.fused import state_fused
from attncompile.lift.joining import joined
from attncompile.lift.loaded import loaded_numbers
from attncompile.lift.masks import swallows
from attncompile.lift.program import Region, Site, Status
from attncompile.lift.recurrent import scan_site
from attncompile.lift.specify import specify
from attncompile.lift.statement import NoSite, Statement, refuse


def find_sites(graph: Graph) -> tuple[Site, ...]:
    """Every attention site of a graph, lifted, observed or refused; not yet proven."""
    graph = joined(graph)
    place = {node.output: number for number, node in enumerate(graph.nodes)}
    found: list[tuple[int, Site]] = []
    known: set[str] = set()

    def add(anchor: str, state: partial[Statement]) -> None:
        site = _site(graph, anchor, state)
        if site is not None:
            found.append((place[anchor], site))

    for node in graph.nodes:
        if isinstance(node, FusedAttention):
            add(node.output, partial(state_fused, graph, node))
        elif isinstance(node, FusedScan):
            found.append((place[node.output], scan_site(graph, node)))
        elif isinstance(node, RefusedAttention):
            add(node.output, partial(_refused_call, graph, node))
    claimed: set[str] = set()
    unread: dict[str, RefusalError] = {}
    anchors = list(normalisers(graph))
    # the last quotient first: it may divide what an earlier one has divided, or correct it
    for anchor in reversed([anchor for anchor in anchors if anchor.kind == "quotient"]):
        found_here = _quotient(graph, anchor, claimed)
        if isinstance(found_here, Statement):
            claimed.add(found_here.product)
            known |= {found_here.score, found_here.product}
            add(anchor.output, partial(_same, found_here))
        elif found_here is not None:
            # the sum may be anything: where no other anchor is found between the products, this is why not
            unread.update({score.contract.output: found_here for score in scores_behind(graph, anchor.source)})
    for anchor in anchors:
        scores = scores_behind(graph, anchor.source)
        every = products_after(graph, anchor.output)
        products = [product for product in every if product.output not in claimed]
        if anchor.kind == "quotient" or (every and not products):
            continue
        ends = {score.contract.output for score in scores} | {product.output for product in products}
        # a classifier or a router: what it normalises is a map of the state, and no values follow
        if any(all(n in graph.varying for n in s.contract.inputs) for s in scores) or (scores and products):
            if anchor.axis is None and not (products and any(_of_activations(graph, s) for s in scores)):
                continue  # a gate, or the hidden state of an expert
            known |= ends
            add(anchor.output, partial(state_anchor, graph, anchor, scores, products))
        elif anchor.kind == "softmax" and (mixed := _mixed(graph, anchor, known)):
            add(anchor.output, partial(state_anchor, graph, anchor, *mixed))
        elif anchor.kind == "softmax" and (products or is_multiplied_rounded(graph, anchor.output)):
            obstacle = obstacle_behind(graph, anchor.source)
            if obstacle is not None:
                add(anchor.output, partial(_refused_obstacle, graph, obstacle))
    for score, product in unnormalised_products(graph, frozenset(known)):
        add(score.output, partial(state_products, graph, score, product, unread.get(score.output)))
    return _uniquely_named([site for _, site in sorted(found, key=lambda entry: entry[0])])


def _quotient(graph: Graph, anchor: Anchor, claimed: set[str]) -> Statement | RefusalError | None:
    """The statement of scores that are divided by a sum, or why there is none; ``None`` where it is no attention."""
    scores = scores_behind(graph, anchor.source)
    products = [anchor.product] if anchor.product is not None else products_after(graph, anchor.output)
    products = [product for product in products if product.output not in claimed]
    if not products or not any(_of_activations(graph, score) for score in scores):
        return None  # a norm of something, or a classifier
    try:
        return state_anchor(graph, anchor, scores, products)
    except NoSite:
        return None
    except RefusalError as error:
        return error


def _mixed(graph: Graph, anchor: Anchor, known: set[str]) -> tuple[list[Product], list[Contract]] | None:
    """The scores that a linear layer mixes before a normaliser, as talking heads do, and the products behind it, whose
    weights may be mixed too. ``None`` where there are none but results of ``known`` sites, which are routed or
    classified.
    """
    mixed = [score for score in mixed_by_layer(graph, anchor.source) if score.contract.output not in known]
    products = products_after_layer(graph, anchor.output) if mixed else []
    return (mixed, products) if products else None


def _same(statement: Statement) -> Statement:
    return statement


def _of_activations(graph: Graph, score: Product) -> bool:
    return not any(is_learned(graph, name) for name in score.contract.inputs)


def _site(graph: Graph, anchor: str, state: partial[Statement]) -> Site | None:
    native = graph.describe(anchor)
    name = native.module or native.name
    try:
        statement = state()
        statement, spec, region = _specified(graph, name, statement)
        if (hidden := spec.undetermined_sizes()) and state.args[0] is graph:
            with contextlib.suppress(RefusalError):
                narrower = replace(graph, withheld=hidden)
                again = state.func(narrower, *state.args[1:])
                statement, spec, region = _specified(narrower, name, again)
    except RefusalError as error:
        return Site(name, "refused", refusal=error.refusal, source=native.source, anchor=native.name)
    except NoSite:
        return None
    except (ValueError, IndexError, KeyError, RuntimeError) as error:
        # shapes that a file declares and its operators contradict
        reason = f"what the graph says of it does not fit together ({type(error).__name__}: {error})"
        refusal = Refusal("contradiction", reason, native.name, native.source, "report this model if it runs")
        return Site(name, "refused", refusal=refusal, source=native.source, anchor=native.name)
    escape = _escape(graph, statement)
    status: Status = "observed" if escape else "lifted"
    numbers = loaded_numbers(graph, statement.logits)
    swallowed = _swallows(graph, statement, numbers)
    return Site(
        name,
        status,
        spec,
        escape,
        native.source,
        (),
        region,
        None,
        native.name,
        swallows=swallowed,
        numbers=bool(numbers),
    )


def _swallows(graph: Graph, statement: Statement, numbers: frozenset[str]) -> bool:
    """See :attr:`Site.swallows`. Other normalisers, and a softmax with a sink, give such a position the weight 0."""
    if statement.normalizer.kind != "softmax" or statement.sink != NO_SINK:
        return False
    return swallows(graph.simplifier(dict(statement.extents))(statement.logits), numbers)


def _specified(graph: Graph, name: str, statement: Statement) -> tuple[Statement, Spec, Region]:
    """The Spec of a statement, with the log-sum-exp as a second result where that makes it whole."""
    whole = with_log_sum(graph, statement)
    if whole.lse:
        try:
            spec, region = specify(graph, name, whole)
        except RefusalError:
            pass  # the log-sum-exp is in a layout of its own
        else:
            after = graph.descendants(whole.lse)
            if not any(binding.value in after for binding in region.inputs):
                return whole, spec, region
    return (statement, *specify(graph, name, statement))


def _uniquely_named(sites: list[Site]) -> tuple[Site, ...]:
    seen: dict[str, int] = {}
    result = []
    for site in sites:
        seen[site.name] = seen.get(site.name, 0) + 1
        name = site.name if seen[site.name] == 1 else f"{site.name}.{seen[site.name]}"
        spec = replace(site.spec, name=name) if site.spec else None
        result.append(replace(site, name=name, spec=spec))
    return tuple(result)


def _refused_call(graph: Graph, node: RefusedAttention) -> Statement:
    raise refuse(
        graph,
        "unstated-attention",
        f"the call of {node.what} is not lifted because {node.reason}",
        node.output,
    )


def _refused_obstacle(graph: Graph, obstacle: Node) -> Statement:
    native = graph.describe(obstacle.output)
    what = obstacle.what if isinstance(obstacle, Opaque) else native.what
    raise refuse(
        graph,
        "uninterpreted-node",
        f"{what} lies between the scores and the normaliser, and is no pointwise operation or movement of data",
        obstacle.output,
    )


def _escape(graph: Graph, statement: Statement) -> Refusal | None:
    """Why a site can only be observed: one of its inner values is read elsewhere."""
    for value, reader in escaping(graph, statement):
        by, hint = "the model returns it", "ask the model not to return attention weights"
        if reader is not None:
            by = f"{graph.describe(reader.output).name} reads it"
            hint = "ask the model not to return attention weights, or do without what is made of it there"
        native = graph.describe(value)
        return Refusal(
            "escaping-value",
            f"the inner value {native.name} ({native.what}) is needed outside: {by}",
            native.name,
            native.source,
            hint,
        )
    return None
