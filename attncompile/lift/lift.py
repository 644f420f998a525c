"""Lifting a whole graph: find the sites, prove each structure, attach what surrounds them."""

from __future__ import annotations

from dataclasses import replace

from attncompile.frontends.collection import without_collection
from attncompile.frontends.graph import Graph
from attncompile.lift.anchors import normalisers
from attncompile.lift.block import attach_block
from attncompile.lift.guard import find_guard
from attncompile.lift.program import Program, Site
from attncompile.lift.prove import Prover
from attncompile.lift.refusals import complete, nearest
from attncompile.lift.rounded import with_rounded
from attncompile.lift.sites import find_sites


@without_collection()
def lift_graph(graph: Graph, model: str = "model", notes: tuple[str, ...] = (), *, blocks: bool = True) -> Program:
    """State every attention site of a graph as a Spec.

    Args:
        graph: the native graph view.
        model: what to call it in reports.
        notes: what the reader should know about the capture.
        blocks: whether to recognise projections and position maps around the sites, which only reports need.

    Returns:
        A program whose sites are proven (``lifted`` or ``observed``) or refused with a reason.
    """
    sites = _proven(graph, blocks)
    if graph.unrounded is not None:
        sites = with_rounded(graph, sites, _proven(graph.unrounded, blocks))
    return Program(model, graph, sites, notes)


def _proven(graph: Graph, blocks: bool) -> tuple[Site, ...]:
    """The sites of a graph, each proven, or refused with a reason."""
    prover = Prover(graph, {})
    sites = tuple(prover.prove(site) for site in find_sites(graph))
    if blocks:
        sites = tuple(_with_block(graph, site) for site in sites)
    return _explained(graph, sites)


def _with_block(graph: Graph, site: Site) -> Site:
    """The site with what surrounds it, and the mask that its score may hide."""
    block, steps = attach_block(graph, site)
    return replace(site, block=block, steps=steps, guarded=find_guard(site.spec) if site.spec else None)


def _explained(graph: Graph, sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """The sites, each refusal with a suggested edit, and with the nearest thing that was recognised."""
    if all(site.refusal is None for site in sites):
        return sites
    anchors = tuple(normalisers(graph)) if any(site.status == "refused" for site in sites) else ()
    return tuple(
        replace(
            site,
            refusal=complete(site.refusal),
            nearest=nearest(graph, site.anchor, anchors) if site.status == "refused" else "",
        )
        if site.refusal
        else site
        for site in sites
    )
