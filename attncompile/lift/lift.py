"""Lifting a whole graph: find the sites, prove each structure, attach what surrounds them."""

from __future__ import annotations

from dataclasses import replace

from attncompile.frontends.graph import Graph
from attncompile.lift.block import attach_block
from attncompile.lift.program import Program
from attncompile.lift.prove import Prover
from attncompile.lift.sites import find_sites


def lift_graph(graph: Graph, model: str = "model", notes: tuple[str, ...] = ()) -> Program:
    """State every attention site of a graph as a Spec.

    Args:
        graph: the native graph view.
        model: what to call it in reports.
        notes: what the reader should know about the capture.

    Returns:
        A program whose sites are proven (``lifted`` or ``observed``) or refused with a reason.
    """
    prover = Prover(graph, {})
    sites = tuple(prover.prove(site) for site in find_sites(graph))
    return Program(model, graph, tuple(replace(site, block=attach_block(graph, site)) for site in sites), notes)
