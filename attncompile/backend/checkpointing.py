"""Blocks whose activations are computed again in the backward pass, as `torch.utils.checkpoint` asks for.

Dynamo hands each of them over as a graph of its own, called by one node. Attention is rewritten inside those graphs, so
the calls, and with them the memory that checkpointing saves, stay as they are. (Training Deep Nets with Sublinear
Memory Cost, arXiv 1604.06174.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

_OPERATOR = "tag_activation_checkpoint"
_ATTENTION = ("softmax", "scaled_dot_product_attention")


@dataclass(frozen=True)
class Body:
    """A checkpointed block.

    Attributes:
        name: of the submodule.
        graph_module: the block.
        inputs: fake tensors and other values that it is called with.
    """

    name: str
    graph_module: torch.fx.GraphModule
    inputs: tuple[Any, ...]


def checkpointed_bodies(module: torch.fx.GraphModule) -> tuple[Body, ...]:
    """The checkpointed blocks that a graph from Dynamo calls."""
    found: dict[str, Body] = {}
    for node in filter(_is_checkpoint, module.graph.nodes):
        name = str(node.args[0].target)
        body = getattr(module, name)
        values = (part.meta["example_value"] if isinstance(part, torch.fx.Node) else part for part in node.args[1:])
        found[name] = Body(name, body, tuple(values))
    return tuple(found.values())


def checkpoints(module: torch.fx.GraphModule) -> bool:
    """Whether a graph calls a checkpointed block."""
    return any(_is_checkpoint(node) for node in module.graph.nodes)


def _is_checkpoint(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() == _OPERATOR


def with_bodies(module: torch.fx.GraphModule, bodies: Mapping[str, torch.fx.GraphModule]) -> torch.fx.GraphModule:
    """A copy of a graph that calls these blocks in place of those with the same names."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    result = torch.fx.GraphModule(module, graph)
    result.meta.update(module.meta)
    for name, body in bodies.items():
        setattr(result, name, body)
    return result


def attends(module: torch.fx.GraphModule) -> bool:
    """Whether a graph itself, its checkpointed blocks left out, has something that attention is made with."""
    calls = (str(node.target) for node in module.graph.nodes if node.op != "placeholder")
    return any(part in call for call in calls for part in _ATTENTION)
