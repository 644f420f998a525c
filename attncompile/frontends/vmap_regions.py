"""What a graph from Dynamo computes inside ``vmap``, as plain operations on whole tensors.

Between ``_vmap_increment_nesting`` and the ``_vmap_decrement_nesting`` that belongs to it a value lacks the axes that
are mapped over, and a tracer above functorch loses it. Such a region (the mask functions of transformers, for instance)
is therefore cut out and traced below functorch, where the batching rules have made operations on whole tensors of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch

from attncompile.frontends.torch_internals import interpret, trace_below_transforms

_ENTER, _LEAVE = "_vmap_increment_nesting", "_vmap_decrement_nesting"


@dataclass(frozen=True)
class VmapRegion:
    """A region of a graph as a function; each call traces it and runs what the trace holds.

    Attributes:
        graph_module: the region, with its inputs as placeholders and a tuple of results.
    """

    graph_module: torch.fx.GraphModule
    __name__ = "vmap_region"

    def __call__(self, *inputs: Any) -> Any:
        return interpret(trace_below_transforms(lambda *flat: interpret(self.graph_module, flat), inputs), inputs)


def without_vmap(graph_module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy in which every region inside vmap is one call of a :class:`VmapRegion`.

    Regions that differentiate inside vmap stay as they are.
    """
    regions = list(_regions(graph_module.graph))
    if not regions:
        return graph_module
    inside = {node: region for region in regions for node in region}
    graph = torch.fx.Graph()
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in graph_module.graph.nodes:
        region = inside.get(node)
        if region is None:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        elif node is region[-1]:
            within = set(region)
            read = list(dict.fromkeys(n for part in region for n in part.all_input_nodes if n not in within))
            given = [part for part in region if not within.issuperset(part.users)]
            function = VmapRegion(_cut_out(graph_module, region, read, given))
            call = graph.call_function(function, tuple(copies[n] for n in read))
            copies |= {part: graph.call_function(getitem, (call, number)) for number, part in enumerate(given)}
            for part in (call, *(copies[part] for part in given)):
                part.meta |= {key: value for key, value in node.meta.items() if key != "example_value"}
    return torch.fx.GraphModule(graph_module, graph)


def _cut_out(
    graph_module: torch.fx.GraphModule,
    region: list[torch.fx.Node],
    read: list[torch.fx.Node],
    given: list[torch.fx.Node],
) -> torch.fx.GraphModule:
    """A region as a graph of its own."""
    graph = torch.fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in read}
    for node in region:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in given))
    return torch.fx.GraphModule(graph_module, graph)


def _regions(graph: torch.fx.Graph) -> Iterator[list[torch.fx.Node]]:
    """The outermost regions inside vmap, each with the calls that enter and leave it; constants are left outside."""
    region: list[torch.fx.Node] = []
    depth = 0
    for node in graph.nodes:
        name = str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""
        depth += name == _ENTER
        if depth and node.op != "get_attr":
            region.append(node)
        if name == _LEAVE:
            depth -= 1
            if not depth:
                if all(_stays(part) for part in region):
                    yield region
                region = []


def _stays(node: torch.fx.Node) -> bool:
    """Whether a node enters no transform but vmap."""
    name = str(getattr(node.target, "__name__", ""))
    return name == _ENTER or not name.endswith("_increment_nesting")


__all__ = ["VmapRegion", "without_vmap"]
