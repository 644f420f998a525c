"""Calls in a graph from Dynamo that a tracer must not look into, kept whole.

Two kinds of calls are more than what they compute. A function with a gradient of its own (``torch.autograd.Function``)
is one call, ``autograd_function_apply``, with a graph for each direction; a checkpointed block is one,
``tag_activation_checkpoint``, with a graph that is run again in the backward pass: a tracer above autograd would record
the forward graph and lose the rest. And a call that reads a *wrapped* tensor, a subclass that holds others, such as
torchao's quantised weights or a ``DTensor``, is carried out by that subclass: what compiles the rest asks it how.

So these calls are cut out before tracing, their results become inputs of what is traced, and afterwards each call is
put back at its place. Wrapped tensors themselves never reach the tracer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any, cast

import torch

from attncompile.frontends.torch_internals import is_wrapped

_GRAPHS = {"autograd_function_apply": 2, "tag_activation_checkpoint": 1}
"""Operators that say themselves how they are differentiated, and how many graphs each takes before its operands."""


class NotCut(Exception):
    """A call that reads or gives a wrapped tensor cannot be kept whole; says which and why."""


@dataclass(frozen=True)
class Cut:
    """A graph without the calls that are kept whole.

    Attributes:
        graph_module: takes the results of the calls after its own inputs, and returns their tensor operands after its
            own results.
        calls: the calls in their order.
        results: fake results of all calls, for tracing.
    """

    graph_module: torch.fx.GraphModule
    calls: tuple[torch.fx.Node, ...]
    results: tuple[torch.Tensor, ...]


def without_whole_calls(graph_module: torch.fx.GraphModule, differentiates: bool) -> Cut | None:
    """The graph with these calls cut out; ``None`` where there are none, or one of them cannot be cut out.

    Args:
        graph_module: from Dynamo.
        differentiates: whether gradients are recorded; where they are not, a function is no more than its forward
            graph, which tracing may look into.

    Raises:
        NotCut: when a call with a wrapped tensor cannot be cut out, or the graph returns one.
    """
    calls = tuple(node for node in graph_module.graph.nodes if _is_whole(node, differentiates))
    for node in calls:
        if (_graph_count(node) == 0 or _wrapped(node)) and not _can_be_cut(node):
            raise NotCut(f"{node.name} computes with {_kind(node)} in a way that cannot be kept whole")
    if not calls or not all(_can_be_cut(node) for node in calls):
        return None
    graph = torch.fx.Graph()
    copies: dict[torch.fx.Node, Any] = {}
    operands: list[torch.fx.Node] = []
    for node in graph_module.graph.nodes:
        if node in calls:
            if is_wrapped(node.meta["example_value"]):
                continue  # only calls that are kept whole read it
            # what is written to an operand later must not reach the call, so it gets its operands as they are now
            operands += [graph.call_function(torch.ops.aten.alias.default, (copies[n],)) for n in _tensors(node)]
            given = [graph.placeholder(f"{node.name}_{number}") for number, _ in enumerate(_results(node))]
            made = [graph.call_function(torch.ops.aten.alias.default, (one,)) for one in given]
            copies[node] = made[0] if isinstance(node.meta["example_value"], torch.Tensor) else tuple(made)
        elif node.target is getitem and isinstance(copies.get(node.args[0]), tuple):
            copies[node] = copies[node.args[0]][node.args[1]]
        elif node.op == "output":
            returned = [one for one in node.all_input_nodes if is_wrapped(one.meta.get("example_value"))]
            if returned:
                raise NotCut(f"it returns {returned[0].name}, {_kind(returned[0])}")
            graph.output((*_mapped(node.args[0], copies), *operands))
        elif not (node.op == "get_attr" and node.users and all(user in calls for user in node.users)):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    results = tuple(result for node in calls for result in _results(node))
    return Cut(torch.fx.GraphModule(graph_module, graph), calls, results)


def with_whole_calls(traced: torch.fx.GraphModule, cut: Cut, before: torch.fx.GraphModule) -> torch.fx.GraphModule:
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
        if is_wrapped(node.meta["example_value"]):
            continue  # made where it is first read
        given = {source: next(operands) for source in _tensors(node)}
        places = [next(iter(next(extra).users)) for _ in _results(node)]
        with graph.inserting_before(places[0]):
            names = [f"own_gradient_{number}_{n}" for n, _ in enumerate(_graphs(node))]
            parts = [_adopted(traced, before, part, name) for part, name in zip(_graphs(node), names, strict=True)]
            for source in _operands(node):
                _make_wrapped(graph, source, known)
            call = _put_back(graph, node, {**known, **given}, parts)
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


def is_put_back(node: torch.fx.Node) -> bool:
    """Whether a node of a traced graph is a call that was kept whole: what it computes is its own business."""
    return _KEPT in node.meta


_KEPT = "attncompile_kept_whole"


def _put_back(
    graph: torch.fx.Graph,
    node: torch.fx.Node,
    known: Mapping[torch.fx.Node, torch.fx.Node],
    parts: list[torch.fx.Node],
) -> torch.fx.Node:
    """A call in the traced graph, as a call of a function; without what it gives."""
    args, kwargs = torch.fx.map_arg((node.args[len(parts) :], node.kwargs), known.__getitem__)
    call = graph.call_function(_called(node), (*parts, *args), dict(kwargs))
    call.meta |= {key: value for key, value in node.meta.items() if key != "example_value"}
    call.meta[_KEPT] = True
    return call


def _make_wrapped(graph: torch.fx.Graph, source: torch.fx.Node, known: dict[torch.fx.Node, torch.fx.Node]) -> None:
    """Put back the call that gives a wrapped tensor, with those behind it, before the first that reads it."""
    if source in known or not is_wrapped(source.meta.get("example_value")):
        return
    for behind in source.all_input_nodes:
        _make_wrapped(graph, behind, known)
    known[source] = _put_back(graph, source, known, [])
    known[source].meta["val"] = source.meta["example_value"]


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
    if call.op == "call_method":
        (owner, *_) = call.args
        assert isinstance(owner, torch.fx.Node)
        target = getattr(type(owner.meta["example_value"]), str(target))
    return cast("Callable[..., Any]", target)


def _is_whole(node: torch.fx.Node, differentiates: bool) -> bool:
    """Whether a node is a call that is kept whole."""
    if node.op not in ("call_function", "call_method"):
        return False
    own = _graph_count(node)
    return (own > 0 and (differentiates or own == 1)) or _wrapped(node)


def _wrapped(node: torch.fx.Node) -> bool:
    """Whether a call reads or gives a wrapped tensor."""
    return any(is_wrapped(one.meta.get("example_value")) for one in (node, *node.all_input_nodes))


def _kind(node: torch.fx.Node) -> str:
    """What kind of wrapped tensor a call reads or gives, in words."""
    values = (one.meta.get("example_value") for one in (node, *node.all_input_nodes))
    return f"a tensor of type {next(type(value).__name__ for value in values if is_wrapped(value))}"


def _can_be_cut(node: torch.fx.Node) -> bool:
    """Whether results and operands of a call are tensors, sizes or numbers, and it writes to none of them."""
    value = node.meta.get("example_value")
    operands = _operands(node)
    sized = all(isinstance(one.meta.get("example_value"), torch.Tensor) or one.op == "placeholder" for one in operands)
    if is_wrapped(value):  # what else it reads may have changed where it is put back
        return sized and _graph_count(node) == 0 and not _tensors(node)
    whole = isinstance(value, torch.Tensor)
    parts = isinstance(value, tuple | list) and all(
        isinstance(one, torch.Tensor) and not is_wrapped(one) for one in value
    )
    read = parts and all(user.target is getitem for user in node.users)
    held = all(one.op != "get_attr" for one in operands if is_wrapped(one.meta.get("example_value")))
    return (whole or read) and sized and held and not node.kwargs.get("dirty_idx")


def _operands(node: torch.fx.Node) -> list[torch.fx.Node]:
    found: list[torch.fx.Node] = []
    torch.fx.map_arg((node.args[_graph_count(node) :], node.kwargs), found.append)
    return list(dict.fromkeys(found))


def _tensors(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The operands that are tensors, wrapped ones left out."""
    values = ((one, one.meta.get("example_value")) for one in _operands(node))
    return [one for one, value in values if isinstance(value, torch.Tensor) and not is_wrapped(value)]


def _results(node: torch.fx.Node) -> tuple[torch.Tensor, ...]:
    """The results that are tensors, wrapped ones left out."""
    value = node.meta["example_value"]
    return () if is_wrapped(value) else (value,) if isinstance(value, torch.Tensor) else tuple(value)


def _mapped(value: Any, copies: Mapping[torch.fx.Node, Any]) -> tuple[Any, ...]:
    mapped = torch.fx.map_arg(value, copies.__getitem__)
    return tuple(mapped) if isinstance(mapped, tuple | list) else (mapped,)


__all__ = ["Cut", "NotCut", "is_put_back", "with_whole_calls", "without_whole_calls"]
