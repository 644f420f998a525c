"""Finding attention: every anchor of a graph becomes a site, lifted, observed or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from attncompile.frontends.graph import (
    FusedAttention,
    Graph,
    Node,
    Opaque,
    RefusedAttention,
)
from attncompile.ir import (
    Refusal,
    RefusalError,
)
from attncompile.lift.anchors import (
    Product,
    is_learned,
    normalisers,
    obstacle_behind,
    products_after,
    scores_behind,
    unnormalised_products,
)
from attncompile.lift.program import Site
from attncompile.lift.specify import specify
from attncompile.lift.statement import NoSite, Statement, refuse, refuse_products, state_anchor, state_fused


def find_sites(graph: Graph) -> tuple[Site, ...]:
    """Every attention site of a graph, lifted, observed or refused; not yet proven."""
    place = {node.output: number for number, node in enumerate(graph.nodes)}
    found: list[tuple[int, Site]] = []
    known: set[str] = set()

    def add(anchor: str, state: Callable[[], Statement]) -> None:
        site = _site(graph, anchor, state)
        if site is not None:
            found.append((place[anchor], site))

    for node in graph.nodes:
        if isinstance(node, FusedAttention):
            add(node.output, partial(state_fused, graph, node))
        elif isinstance(node, RefusedAttention):
            add(node.output, partial(_refused_call, graph, node))
    for anchor in normalisers(graph):
        scores, products = scores_behind(graph, anchor.source), products_after(graph, anchor.output)
        # a classifier or a router: what it normalises is a map of the state, and no values follow
        if any(all(n in graph.varying for n in s.contract.inputs) for s in scores) or (scores and products):
            if anchor.axis is None and not (products and any(_of_activations(graph, s) for s in scores)):
                continue  # a gate, or the hidden state of an expert
            known |= {score.contract.output for score in scores} | {product.output for product in products}
            add(anchor.output, partial(state_anchor, graph, anchor, scores, products))
        elif (
            anchor.kind == "softmax"
            and products
            and (obstacle := obstacle_behind(graph, anchor.source)) is not None
        ):
            add(anchor.output, partial(_refused_obstacle, graph, obstacle))
    for score, product in unnormalised_products(graph, frozenset(known)):
        add(score.output, partial(refuse_products, graph, score, product))
    return _uniquely_named([site for _, site in sorted(found, key=lambda entry: entry[0])])


def _of_activations(graph: Graph, score: Product) -> bool:
    return not any(is_learned(graph, name) for name in score.contract.inputs)


def _site(graph: Graph, anchor: str, state: Callable[[], Statement]) -> Site | None:
    native = graph.describe(anchor)
    name = native.module or native.name
    try:
        statement = state()
        spec, region = specify(graph, name, statement)
    except RefusalError as error:
        return Site(name, "refused", refusal=error.refusal, source=native.source, anchor=native.name)
    except NoSite:
        return None
    escape = _escape(graph, statement)
    return Site(
        name, "observed" if escape else "lifted", spec, escape, native.source, (), region, None, native.name
    )


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
        "export the model with its attention spelled out, or without this option",
    )


def _refused_obstacle(graph: Graph, obstacle: Node) -> Statement:
    native = graph.describe(obstacle.output)
    what = obstacle.what if isinstance(obstacle, Opaque) else native.what
    raise refuse(
        graph,
        "uninterpreted-node",
        f"{what} lies between the scores and the normaliser, and is no pointwise "
        "operation or movement of data",
        obstacle.output,
    )


def _is_dead(graph: Graph, node: Node) -> bool:
    """Whether nothing comes of a node: the positions that ``max`` gives with its values, for instance."""
    writes = graph.describe(node.output).what.endswith("_")
    return not graph.users.get(node.output) and node.output not in graph.outputs and not writes


def _escape(graph: Graph, statement: Statement) -> Refusal | None:
    """Why a site can only be observed: one of its inner values is read elsewhere."""
    inside = statement.inner | {statement.output}
    for value in sorted(statement.inner):
        readers = [user for user in graph.users.get(value, ()) if user.output not in inside]
        outside = [user for user in readers if not _is_dead(graph, user)]
        if value in graph.outputs or outside:
            reader = (
                "the model returns it"
                if value in graph.outputs
                else f"{graph.describe(outside[0].output).name} reads it"
            )
            native = graph.describe(value)
            return Refusal(
                "escaping-value",
                f"the inner value {native.name} ({native.what}) is needed outside: {reader}",
                native.name,
                native.source,
                "ask the model not to return attention weights",
            )
    return None
