"""Floats that belong to modules, a scale or an epsilon, as constants with guards.

Under ``dynamic=True`` Dynamo makes every Python float an input, which the graph reads with ``.item()``. Attention is
stated with the numbers of its model, so those that belong to a module are fixed: another value compiles anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from attncompile.frontends.torch_internals import fix_value, input_source, restart_with_constants, scalar_symbol


def with_fixed_module_floats(graph_module: torch.fx.GraphModule, inputs: Sequence[Any]) -> torch.fx.GraphModule:
    """A copy in which ``.item()`` of a float that a module owns is the float itself, guarded; the graph without any.

    Args:
        graph_module: from Dynamo.
        inputs: fakes of its inputs.
    """
    floats = list(_module_floats(graph_module, inputs))
    if not floats:
        return graph_module
    graph = torch.fx.Graph()
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    graph.output(graph.graph_copy(graph_module.graph, copies))
    for node, symbol in floats:
        for user in list(copies[node].users):
            if user.op == "call_method" and user.target == "item":
                user.replace_all_uses_with(fix_value(symbol))  # type: ignore[arg-type]
                graph.erase_node(user)
    return torch.fx.GraphModule(graph_module, graph)


def trace_again_with_fixed_floats(graph_module: torch.fx.GraphModule) -> None:
    """Have Dynamo trace once more where its graph has floats of modules for inputs; then it has them as constants.

    To be called before anything else where ahead-of-time autograd compiles the rest: it would ask for the same, since
    what is fixed leaves such an input unused, but only at the end of its own trace, and all work up to there is lost.

    Raises:
        Exception: one that Dynamo alone takes, and takes for that. Nothing is raised for a float that has been asked
            for before, so this ends.
    """
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    values = [node.meta.get("example_value") for node in placeholders]
    restart_with_constants([symbol for _, symbol in _module_floats(graph_module, values)])


def _module_floats(
    graph_module: torch.fx.GraphModule, inputs: Sequence[Any]
) -> Iterator[tuple[torch.fx.Node, torch.SymFloat]]:
    """The placeholders of floats that modules own, and the symbols of their values."""
    for node, fake in zip(graph_module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        source, symbol = input_source(node), scalar_symbol(fake)
        if source is not None and source[1] and isinstance(symbol, torch.SymFloat):
            yield node, symbol


__all__ = ["trace_again_with_fixed_floats", "with_fixed_module_floats"]
