"""Views that autograd makes again while a graph is traced, and that nothing reads.

Writing in place through a view of a tensor whose gradient is recorded changes the history of every view of it:
autograd runs the operations that made those views once more, on tensors that no tracer has seen. In the trace that is
a tensor that exists only there, and views of it which nothing reads. The function is the same without them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from attncompile.frontends.memory import altered_arguments


def without_regenerated_views(traced: torch.fx.GraphModule, unseen: Iterable[torch.fx.Node]) -> None:
    """Remove from a graph those of its unseen tensors, with what is made of them, that make nothing of its result.

    Args:
        traced: the graph, which is changed.
        unseen: its nodes for tensors that existed only while it was traced.
    """
    made: dict[torch.fx.Node, None] = dict.fromkeys(unseen)
    for node in traced.graph.nodes:
        if any(read in made for read in node.all_input_nodes):
            made[node] = None
    for node in reversed(made):
        if not node.users and node.op in ("get_attr", "call_function") and not altered_arguments(node):
            traced.graph.erase_node(node)
            if node.op == "get_attr" and not any(node.target == other.target for other in traced.graph.nodes):
                delattr(traced, str(node.target))


__all__ = ["without_regenerated_views"]
