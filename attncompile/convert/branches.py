"""Attention in the branches of one ``If``, which are two ways to compute the same."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import onnx_ir as ir

from attncompile.frontends.onnx_bodies import bodies_of, nested_nodes
from attncompile.lift import Site


def opposite(graph: ir.Graph, sites: Iterable[Site]) -> Mapping[str, tuple[Site, ...]]:
    """For each site those that are in another branch of an ``If`` around it, by its name.

    Args:
        graph: of the model; sites: of the whole of it.
    """
    found = list(sites)
    around = {body: (node, body) for node in nested_nodes(graph) if node.op_type == "If" for _, body in bodies_of(node)}
    nodes = {node.name: node for node in nested_nodes(graph)}
    places = {site.name: dict(_branches(nodes.get(site.anchor), around)) for site in found}
    return {
        site.name: tuple(
            other
            for other in found
            if any(places[other.name].get(branching, body) is not body for branching, body in places[site.name].items())
        )
        for site in found
        if places[site.name]
    }


def left_behind(others: Mapping[str, Iterable[Site]]) -> Mapping[str, str]:
    """Sites that have another one in the other branch of an ``If`` around them which is not lifted, by its name.

    A pass that changes what is computed would change one way of two then, and which one is taken depends on lengths.

    Args:
        others: see :func:`opposite`.
    """
    refused = {name: [site.name for site in found if site.status != "lifted"] for name, found in others.items()}
    return {name: found[0] for name, found in refused.items() if found}


def second_forms(
    others: Mapping[str, Iterable[Site]], operators: Mapping[str, str], fused: Collection[str]
) -> frozenset[str]:
    """Sites in plain operators beside a call in another branch: the ``If`` chooses between two forms already.

    Args:
        others: see :func:`opposite`.
        operators: what makes the result of each lifted site, by its name; fused: the names of attention calls.
    """
    calls = {name for name, operator in operators.items() if operator in fused}
    plain = operators.keys() - calls
    return frozenset(name for name in plain if any(site.name in calls for site in others.get(name, ())))


def _branches(
    node: ir.Node | None, around: Mapping[ir.Graph, tuple[ir.Node, ir.Graph]]
) -> Iterator[tuple[ir.Node, ir.Graph]]:
    """The ``If`` nodes around a node, each with the branch that it is in."""
    while node is not None and isinstance(node.graph, ir.Graph) and node.graph in around:
        yield around[node.graph]
        node = around[node.graph][0]


__all__ = ["left_behind", "opposite", "second_forms"]
