"""Calls in a graph from Dynamo that say themselves how they are differentiated, kept whole.

A function with a gradient of its own (``torch.autograd.Function``) is one call, ``autograd_function_apply``, with a
graph for each direction; a checkpointed block is one, ``tag_activation_checkpoint``, with a graph that is run again in
the backward pass. A tracer above autograd would record the forward graph and lose the rest. So the calls are cut out
before tracing, their results become inputs of what is traced, and afterwards each call is put back at its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any, cast

import torch

_GRAPHS = {"autograd_function_apply": 2, "tag_activation_checkpoint": 1}
"""Such operators, and how many graphs each takes before its operands."""


@dataclass(frozen=True)
class Cut:
    """A graph without the calls that say themselves how they are differentiated.

    Attributes:
        graph_module: takes the results of the calls after its own inputs, and returns their tensor operands after its
            own results.
        calls: the calls in their order.
        results: fake results of all calls, for tracing.
    """

    graph_module: torch.fx.GraphModule
    calls: tuple[torch.fx.Node, ...]
    results: tuple[torch.Tensor, ...]


def without_own_gradients(graph_module: torch.fx.GraphModule, differentiates: bool) -> Cut | None:
    """The graph with these calls cut out; ``None`` where there are none, or one of them cannot be cut out.

    Args:
        graph_module: from Dynamo.
        differentiates: whether gradients are recorded; where they are not, a function is no more than its forward
            graph, which tracing may look into.
    """
    found = (node for node in graph_module.graph.nodes if is_own_gradient(node))
    calls = tuple(node for node in found if differentiates or _graph_count(node) == 1)
    if not calls or not all(_can_be_cut(node) for node in calls):
        return None
    graph = torch.fx.Graph()
    copies: dict[torch.fx.Node, Any] = {}
    operands: list[torch.fx.Node] = []
    for node in graph_module.graph.nodes:
        if node in calls:
            # what is written to an operand later must not reach the call, so it gets its operands as they are now
            operands += [graph.call_function(torch.ops.aten.alias.default, (copies[n],)) for n in _tensors(node)]
            given = [graph.placeholder(f"{node.name}_{number}") for number, _ in enumerate(_results(node))]
            made = [graph.call_function(torch.ops.aten.alias.default, (one,)) for one in given]
            copies[node] = made[0] if isinstance(node.meta["example_value"], torch.Tensor) else tuple(made)
        elif node.op == "call_function" and node.target is getitem and node.args[0] in calls:
            copies[node] = copies[node.args[0]][node.args[1]]
        elif node.op == "output":
            graph.output((*_mapped(node.args[0], copies), *operands))
        elif not (node.op == "get_attr" and node.users and all(user in calls for user in node.users)):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    results = tuple(result for node in calls for result in _results(node))
    return Cut(torch.fx.GraphModule(graph_module, graph), calls, results)


def with_own_gradients(traced: torch.fx.GraphModule, cut: Cut, before: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """What was traced of a graph that was cut, with the calls put back.

    Args:
        traced: the trace of ``cut.graph_module``; changed and returned.
        cut: what was cut out.
        before: the graph before cutting, which holds the graphs that the calls take.
    """
    graph = traced.graph
    placeholders = [node for node in before.graph.nodes if node.op == "placeholder"]
    given_all = [node for node in graph.nodes if node.op == "placeholder"]
    first = len(given_all) - len(cut.results)
    known = dict(zip(placeholders, given_all[:first], strict=True))
    extra = iter(given_all[first:])
    whole = _listed(graph.output_node())
    count = sum(len(_tensors(node)) for node in cut.calls)
    operands = iter(whole[len(whole) - count :])
    for number, node in enumerate(cut.calls):
        given = {source: next(operands) for source in _tensors(node)}
        places = [next(iter(next(extra).users)) for _ in _results(node)]
        with graph.inserting_before(places[0]):
            names = [f"own_gradient_{number}_{n}" for n, _ in enumerate(_graphs(node))]
            parts = [_adopted(traced, before, part, name) for part, name in zip(_graphs(node), names, strict=True)]
            arguments = _mapped(node.args[len(parts) :], {**known, **given})
            call = graph.call_function(_called(node), (*parts, *arguments), dict(node.kwargs))
            call.meta |= {key: value for key, value in node.meta.items() if key != "example_value"}
            single = isinstance(node.meta["example_value"], torch.Tensor)
            made = [call] if single else [graph.call_function(getitem, (call, n)) for n in range(len(places))]
        for place, result in zip(places, made, strict=True):
            result.meta |= {**call.meta, "val": place.meta["val"]}
            place.replace_all_uses_with(result)
            graph.erase_node(place)
        if not single:
            call.meta["val"] = tuple(one.meta["val"] for one in made)
    output = graph.output_node()
    output.args = (tuple(_listed(output)[: len(whole) - count]),)
    for node in given_all[first:]:
        graph.erase_node(node)
    traced.recompile()
    return traced


def _listed(output: torch.fx.Node) -> list[Any]:
    """What a traced graph returns."""
    results: Any = output.args[0]
    return list(results)


def _graphs(call: torch.fx.Node) -> tuple[torch.fx.Node, ...]:
    """The nodes that stand for the graphs that a call takes."""
    return tuple(part for part in call.args[: _graph_count(call)] if isinstance(part, torch.fx.Node))


def _graph_count(node: torch.fx.Node) -> int:
    target: Any = node.target
    return _GRAPHS.get(target.name(), 0) if isinstance(target, torch._ops.HigherOrderOperator) else 0


def _adopted(
    traced: torch.fx.GraphModule, before: torch.fx.GraphModule, part: torch.fx.Node, name: str
) -> torch.fx.Node:
    """A graph of a call, as an attribute of what was traced."""
    traced.add_submodule(name, getattr(before, str(part.target)))
    return traced.graph.get_attr(name)


def _called(call: torch.fx.Node) -> Callable[..., Any]:
    target: Any = call.target
    return cast("Callable[..., Any]", target)


def is_own_gradient(node: torch.fx.Node) -> bool:
    """Whether a node is such a call."""
    return _graph_count(node) > 0


def _can_be_cut(node: torch.fx.Node) -> bool:
    """Whether results and operands of a call are tensors, sizes or numbers, and it writes to none of them."""
    value = node.meta.get("example_value")
    whole = isinstance(value, torch.Tensor)
    parts = isinstance(value, tuple | list) and all(isinstance(one, torch.Tensor) for one in value)
    read = parts and all(user.target is getitem for user in node.users)
    sized = all(
        isinstance(one.meta.get("example_value"), torch.Tensor) or one.op == "placeholder" for one in _operands(node)
    )
    return (whole or read) and sized and not node.kwargs.get("dirty_idx")


def _operands(node: torch.fx.Node) -> list[torch.fx.Node]:
    found: list[torch.fx.Node] = []
    torch.fx.map_arg(node.args[_graph_count(node) :], found.append)
    return list(dict.fromkeys(found))


def _tensors(node: torch.fx.Node) -> list[torch.fx.Node]:
    return [one for one in _operands(node) if isinstance(one.meta.get("example_value"), torch.Tensor)]


def _results(node: torch.fx.Node) -> tuple[torch.Tensor, ...]:
    value = node.meta["example_value"]
    return (value,) if isinstance(value, torch.Tensor) else tuple(value)


def _mapped(value: Any, copies: Mapping[torch.fx.Node, Any]) -> tuple[Any, ...]:
    mapped = torch.fx.map_arg(value, copies.__getitem__)
    return tuple(mapped) if isinstance(mapped, tuple | list) else (mapped,)


__all__ = ["Cut", "with_own_gradients", "without_own_gradients"]
