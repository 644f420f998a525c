"""Lifting a whole graph: find the sites, prove each structure, attach what surrounds them."""

from __future__ import annotations

from dataclasses import replace

from attncompile.frontends.graph import Graph
from attncompile.ir import Position
from attncompile.lift.block import attach_block, rotary_base
from attncompile.lift.program import Program, Site
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
        sites = tuple(_with_block(graph, site) for site in sites)
    return Program(model, graph, sites, notes)


def _with_block(graph: Graph, site: Site) -> Site:
    """The site with what surrounds it."""
    block = attach_block(graph, site)
    bases = (rotary_base(graph, operation) for operation in block if isinstance(operation, Position))
    return replace(site, block=block, rotary_base=next(bases, None))
