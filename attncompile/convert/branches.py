"""Attention in the branches of one ``If``, which are two ways to compute the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import onnx_ir as ir

from attncompile.frontends.onnx_bodies import bodies_of, nested_nodes
from attncompile.lift import Site


def left_behind(graph: ir.Graph, sites: Iterable[Site]) -> Mapping[str, str]:
    """Sites that have another one in the other branch of an ``If`` around them which is not lifted, by its name.

    A pass that changes what is computed would change one way of two then, and which one is taken depends on lengths.

    Args:
        graph: of the model; sites: of the whole of it.
    """
    found = list(sites)
    around = {body: (node, body) for node in nested_nodes(graph) if node.op_type == "If" for _, body in bodies_of(node)}
    nodes = {node.name: node for node in nested_nodes(graph)}
    places = {site.name: dict(_branches(nodes.get(site.anchor), around)) for site in found}
    refused = [site.name for site in found if site.status != "lifted"]
    return {
        site.name: other
        for site in found
        for other in refused
        if any(places[other].get(branching, body) is not body for branching, body in places[site.name].items())
    }


def _branches(
    node: ir.Node | None, around: Mapping[ir.Graph, tuple[ir.Node, ir.Graph]]
) -> Iterator[tuple[ir.Node, ir.Graph]]:
    """The ``If`` nodes around a node, each with the branch that it is in."""
    while node is not None and isinstance(node.graph, ir.Graph) and node.graph in around:
        yield around[node.graph]
        node = around[node.graph][0]


__all__ = ["left_behind"]
