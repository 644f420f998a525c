"""Lifting a whole graph: find the sites, prove each structure, attach what surrounds them."""

from __future__ import annotations

from dataclasses import replace

from attncompile.frontends.graph import Graph
from attncompile.lift.block import attach_block
from attncompile.lift.program import Program
from attncompile.lift.prove import Prover
from attncompile.lift.sites import find_sites


def lift_graph(
    graph: Graph, model: str = "model", notes: tuple[str, ...] = (), *, blocks: bool = True
) -> Program:
    """State every attention site of a graph as a Spec.

    Args:
        graph: the native graph view.
        model: what to call it in reports.
        notes: what the reader should know about the capture.
        blocks: whether to recognise projections and position maps around the sites, which only reports need.

    Returns:
        A program whose sites are proven (``lifted`` or ``observed``) or refused with a reason.
    """
    prover = Prover(graph, {})
    sites = tuple(prover.prove(site) for site in find_sites(graph))
    if blocks:
        sites = tuple(replace(site, block=attach_block(graph, site)) for site in sites)
    return Program(model, graph, sites, notes)
