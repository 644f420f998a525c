"""Attention that a file rounds inside: stated without its roundings, which the site lists.

A graph whose values are rounded to a narrow type on their way (queries, keys, scores, weights, values) is lifted twice:
as it is, and with every rounded value passed on as it is. What is attention as it is stays so. What is attention only
without roundings is *observed*: its Spec is proven to be what the nodes compute without them, which is near what the
file computes and no rewriting of it. The pass ``unround`` is the permission to put it in that place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from attncompile.frontends.graph import Graph
from attncompile.ir import Refusal
from attncompile.lift.program import Region, RoundedPart, Site
from attncompile.lift.refusals import complete


def with_rounded(graph: Graph, sites: Sequence[Site], unrounded: Sequence[Site]) -> tuple[Site, ...]:
    """The sites of a graph that rounds.

    Args:
        graph: the graph; sites: what was found in it as it is.
        unrounded: what was found with every rounded value passed on as it is.
    """
    known = {site.anchor: site for site in sites}
    found: list[Site] = []
    for site in unrounded:
        own = known.pop(site.anchor, None)
        found.append(own if own is not None and own.status != "refused" else _with_roundings(graph, site))
    inside = {node for site in found if site.region is not None for node in site.region.nodes}
    found += [site for site in known.values() if site.status != "refused" or site.anchor not in inside]
    return tuple(sorted(found, key=lambda site: graph.native_order.get(site.anchor, len(graph.native_order))))


def only_rounds(site: Site) -> bool:
    """Whether a site is observed for its roundings alone."""
    return site.status == "observed" and site.refusal is not None and site.refusal.kind == "rounded-values"


def without_roundings(site: Site) -> Site:
    """A site that is to be computed without its roundings: lifted, where they alone made it observed."""
    return replace(site, status="lifted", refusal=None) if only_rounds(site) else site


def _with_roundings(graph: Graph, site: Site) -> Site:
    """A site of the graph without roundings, with those that lie between its operands and its results."""
    if site.spec is None or site.region is None:
        return site
    parts = tuple(_parts(graph, site, site.region))
    if not parts:
        return site
    return replace(site, status="observed", refusal=site.refusal or _refusal(graph, site, parts), roundings=parts)


def _refusal(graph: Graph, site: Site, parts: Sequence[RoundedPart]) -> Refusal:
    native = graph.describe(parts[0].rounding.output)
    reason = (
        f"the file rounds inside this attention ({described(parts)}), and the Spec says what it computes without that"
    )
    source = native.source if native.source != site.source else ""
    return complete(Refusal("rounded-values", reason, native.name, source))


def described(parts: Sequence[RoundedPart]) -> str:
    """What is rounded to which types, in words."""
    kinds: dict[str, list[str]] = {}
    for part in parts:
        kind = f"{part.rounding.dtype}{' by scales of each call' if part.rounding.dynamic else ''}"
        kinds.setdefault(kind, []).append(part.of)
    return "; ".join(f"{', '.join(dict.fromkeys(names))} to {kind}" for kind, names in kinds.items())


def _parts(graph: Graph, site: Site, region: Region) -> Iterator[RoundedPart]:
    """The roundings of a region, in the order of the graph, each with what is rounded."""
    plain = graph.unrounded
    assert plain is not None  # the site was found in it
    made = _made_of(plain, region)
    tensors = {entry.name for entry in region.inputs if entry.layout is not None}
    anchored = {value for value in made if plain.describe(value).name == site.anchor}
    behind = frozenset[str]().union(*(plain.descendants(value) for value in anchored))
    for node in plain.nodes:
        rounding = graph.roundings.get(node.output)
        if rounding is not None and node.output in made:
            of = made[node.output]
            yield RoundedPart(_part(of & tensors or of, node.output in behind), rounding)


def _part(of: frozenset[str], behind: bool) -> str:
    """What is made of some tensors of the Spec, before the normaliser or behind it."""
    if behind:
        return "the result" if any(name.startswith("v") for name in of) else "the weights"
    return "the scores" if len(of) > 1 else "".join(of) or "a constant"


def _made_of(graph: Graph, region: Region) -> dict[str, frozenset[str]]:
    """Every value between the operands of a region and its results, with the operands that it is made of."""
    given: dict[str, set[str]] = {}
    for entry in region.inputs:
        given.setdefault(entry.value, set()).add(entry.name)
    inside: set[str] = set()
    stack = [entry.value for entry in region.outputs]
    while stack:
        value = stack.pop()
        if value not in inside and value not in given and value in graph.producer:
            inside.add(value)
            stack += graph.producer[value].inputs
    found = {value: frozenset(names) for value, names in given.items()}
    for node in graph.nodes:
        if node.output in inside:
            found[node.output] = frozenset[str]().union(*(found.get(name, frozenset()) for name in node.inputs))
    return {value: found[value] for value in inside}


__all__ = ["described", "only_rounds", "with_rounded", "without_roundings"]
