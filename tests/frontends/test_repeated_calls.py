"""Calls that a graph repeats are traced once: the graph is the one that tracing each of them gives."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional

from attncompile.backend import attncompile
from attncompile.frontends import capture
from attncompile.frontends.repeated_calls import RepeatedCalls
from attncompile.frontends.torch_internals import fake_inputs, interpret, trace_pre_dispatch


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


class Counted(RepeatedCalls):
    """Remembers itself."""

    last: RepeatedCalls

    def __init__(self, graph_module: torch.fx.GraphModule) -> None:
        super().__init__(graph_module)
        Counted.last = self


class Plain(Counted):
    """Traces each call."""

    def run(self, *inputs: Any, **_: Any) -> Any:
        return interpret(self.module, inputs)  # type: ignore[arg-type]


def described(value: Any, memories: dict[int, int]) -> Any:
    """Shape, strides, dtype and memory of a node's value."""
    if isinstance(value, torch.Tensor):
        memory = memories.setdefault(value.untyped_storage()._cdata, len(memories))
        return str(value.shape), str(value.stride()), str(value.storage_offset()), value.dtype, memory
    return tuple(described(part, memories) for part in value) if isinstance(value, tuple | list) else str(value)


def text_of(graph_module: torch.fx.GraphModule) -> list[tuple[Any, ...]]:
    """Every node with all that is read of it but its name, which counts sizes that nothing reads too."""
    memories: dict[int, int] = {}
    places = {node: f"%{place}" for place, node in enumerate(graph_module.graph.nodes)}
    return [
        (
            node.op,
            str(node.target),
            str(torch.fx.node.map_arg((node.args, dict(node.kwargs)), places.__getitem__)),
            described(node.meta.get("val"), memories),
            str(node.meta.get("nn_module_stack")),
            node.meta.get("stack_trace"),
        )
        for node in graph_module.graph.nodes
    ]


def both(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], inputs: Sequence[Any], dynamic: bool
) -> RepeatedCalls:
    """Trace the graphs of a call with and without, assert that they are equal, and say how the former went."""
    ways: list[RepeatedCalls] = []

    def backend(graph_module: torch.fx.GraphModule, example_inputs: Any) -> Any:
        found = []
        for kind in (Plain, Counted):
            monkeypatch.setattr(capture, "RepeatedCalls", kind)
            found.append(text_of(capture.capture_dynamo(graph_module, example_inputs).graph_module))
        ways.append(Counted.last)
        assert found[0] == found[1]
        return graph_module.forward

    torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    assert len(ways) == 1
    return ways[0]


class Layer(torch.nn.Module):
    """What a decoder layer is made of, over a cache that it writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(32, eps=1e-5)
        self.queries, self.keys, self.out = (torch.nn.Linear(32, 32) for _ in range(3))
        self.scale = 0.25

    def forward(self, x: torch.Tensor, cache: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        query, key = (part(y).unflatten(-1, (4, 8)).transpose(1, 2) for part in (self.queries, self.keys))
        query = query * torch.cos(query) + torch.cat([-query[..., 4:], query[..., :4]], -1)
        cache[:, :, : key.shape[2]] = key.detach()
        seen = key + cache[:, :, : key.shape[2]]
        y = functional.scaled_dot_product_attention(query, seen, seen, attn_mask=mask, scale=self.scale)
        return x + functional.silu(self.out(y.transpose(1, 2).flatten(2)))


class Layers(torch.nn.Module):
    """Several of them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(count))

    def forward(self, x: torch.Tensor, caches: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, cache, mask)
        return x


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_model_of_more_layers_traces_no_more_calls(
    monkeypatch: pytest.MonkeyPatch, dynamic: bool, training: bool
) -> None:
    traced = []
    for count in (2, 4):
        model, caches = Layers(count), [torch.zeros(2, 4, 9, 8) for _ in range(count)]
        inputs = (torch.randn(2, 7, 32), caches, torch.ones(7, 7).tril().bool())
        torch._dynamo.reset()
        with torch.set_grad_enabled(training):
            way = both(monkeypatch, model, inputs, dynamic)
        calls = sum(node.op.startswith("call_") for node in way.graph.nodes)
        traced.append(calls - way.replayed)
        assert way.replayed > 15 * (count - 1)
    assert traced[0] == traced[1]


def in_place(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    for _ in range(3):
        x = x * y
        x.add_(y)
        x[:, 1:].mul_(2.0)
        x[0] = y[1]
        y = x.transpose(0, 1).contiguous().transpose(0, 1).to(torch.float32)
    return x + y


def several_results(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    for _ in range(3):
        first, second = x.chunk(2, dim=-1)
        largest, _ = torch.max(torch.cat([second, first], -1), dim=-1, keepdim=True)
        parts = torch.unbind(y, 0)
        x, y = x - largest, torch.stack(parts[::-1])
    return x @ y.T


def shared(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    for _ in range(2):
        x = (x * x) + (x * y) + (y * x)
        y = x.view(-1).view(x.shape)
        y = functional.dropout(x, 0.0, True) + y.expand_as(x)
    return x


def modes(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    for _ in range(2):
        with torch.no_grad():
            seen = x * y
        with torch.autocast("cpu", torch.bfloat16):
            x = functional.linear(x, y @ y.T) + seen.float()
        x = x * y
    return x


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("function", [in_place, several_results, shared, modes])
def test_the_graph_is_that_of_tracing_each_call(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., torch.Tensor], training: bool, dynamic: bool
) -> None:
    x, y = torch.randn(6, 6), torch.randn(6, 6, requires_grad=training)
    assert both(monkeypatch, function, (x, y), dynamic).replayed > 0


# --- what a key holds ---------------------------------------------------------------------------------------


def replayed(calls: Sequence[tuple[Any, tuple[Any, ...]]], inputs: Sequence[Any]) -> tuple[int, torch.fx.GraphModule]:
    """How many of some calls are not traced, and the trace; a number among their arguments stands for that input."""
    graph = torch.fx.Graph()
    given = [graph.placeholder(f"x{number}") for number in range(len(inputs))]
    made = []
    for target, arguments in calls:
        read = torch.fx.node.map_aggregate(arguments, lambda a: given[a.number] if isinstance(a, Input) else a)
        call = graph.call_method if isinstance(target, str) else graph.call_function
        made.append(call(target, tuple(read)))  # type: ignore[arg-type]
        made[-1].meta["example_value"] = None if target is torch.set_num_threads else torch.empty(0)
    graph.output(tuple(made))
    way: list[RepeatedCalls] = []

    def run(*flat: Any) -> Any:
        way.append(RepeatedCalls(torch.fx.GraphModule({}, graph)))
        return way[0].run(*flat)

    mode, fakes = fake_inputs(inputs)
    traced = trace_pre_dispatch(run, mode, fakes)
    return way[0].replayed, traced


class Input:
    """An input of a graph, by its number."""

    def __init__(self, number: int) -> None:
        self.number = number


A, B, C = Input(0), Input(1), Input(2)
SQUARE = (4, 4)


def plain(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.zeros(shape) for shape in shapes]


BASE = torch.zeros(4, 4)
NEAR_MISSES: dict[str, tuple[Any, Any, list[torch.Tensor]]] = {
    "another number": ((operator.mul, (A, 2.0)), (operator.mul, (B, 3.0)), plain(SQUARE, SQUARE)),
    "a whole number": ((operator.add, (A, 2.0)), (operator.add, (B, 2)), plain(SQUARE, SQUARE)),
    "the sign of zero": ((operator.add, (A, 0.0)), (operator.add, (B, -0.0)), plain(SQUARE, SQUARE)),
    "a truth value": ((operator.mul, (A, True)), (operator.mul, (B, 1)), plain(SQUARE, SQUARE)),
    "another axis": ((torch.softmax, (A, -1)), (torch.softmax, (B, 0)), plain(SQUARE, SQUARE)),
    "another slice": (
        (operator.getitem, (A, slice(0, 2))), (operator.getitem, (B, slice(1, 2))), plain(SQUARE, SQUARE),
    ),
    "another function": ((torch.sin, (A,)), (torch.cos, (B,)), plain(SQUARE, SQUARE)),
    "another shape": ((torch.sin, (A,)), (torch.sin, (B,)), plain(SQUARE, (4, 5))),
    "other strides": (("contiguous", (A,)), ("contiguous", (B,)), [torch.zeros(4, 4), torch.zeros(4, 4).T]),
    "another offset": ((torch.sin, (A,)), (torch.sin, (B,)), [torch.zeros(4), torch.zeros(5)[1:]]),
    "another dtype": (("float", (A,)), ("float", (B,)), [torch.zeros(4), torch.zeros(4, dtype=torch.float64)]),
    "gradients": ((torch.sin, (A,)), (torch.sin, (B,)), [torch.zeros(4), torch.zeros(4, requires_grad=True)]),
    "one tensor twice": ((operator.mul, (A, B)), (operator.mul, (A, A)), plain(SQUARE, SQUARE)),
    "shared memory": ((operator.mul, (A, B)), (operator.mul, (A, C)), [BASE, torch.zeros(4, 4), BASE.view(4, 4)]),
    "a mask": (
        (functional.scaled_dot_product_attention, (A, A, A, B)),
        (functional.scaled_dot_product_attention, (A, A, A, C)),
        [torch.zeros(1, 1, 4, 4), torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.bool)],
    ),
    "no mask": (
        (functional.scaled_dot_product_attention, (A, A, A, B)),
        (functional.scaled_dot_product_attention, (A, A, A, None)),
        [torch.zeros(1, 1, 4, 4), torch.zeros(4, 4)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_calls_that_differ_in_a_small_thing_are_both_traced(name: str) -> None:
    one, other, inputs = NEAR_MISSES[name]
    assert replayed([one, other], inputs)[0] == 0
    assert replayed([one, one], inputs)[0] == 1
    assert replayed([one, other, one, other], inputs)[0] == 2


def test_what_is_made_for_its_effect_alone_ends_what_is_known() -> None:
    sine = (torch.sin, (A,))
    assert replayed([sine, sine], plain(SQUARE))[0] == 1
    assert replayed([sine, (torch.set_num_threads, (torch.get_num_threads(),)), sine], plain(SQUARE))[0] == 0


def test_gradients_that_a_call_asks_for_are_asked_for_each_time() -> None:
    """It is no operation, so replaying the operations of the first call would leave it out."""
    calls = [("requires_grad_", (A,)), ("requires_grad_", (B,)), (torch.sin, (B,))]
    number, traced = replayed(calls, plain(SQUARE, SQUARE))
    assert number == 0
    assert [str(node.target) for node in traced.graph.nodes if node.op == "call_function"] == ["aten.sin.default"]


def test_a_tensor_that_the_tracer_knows_is_none_that_it_does_not() -> None:
    """It computes with what it knows, a constant of the function say, so a call on it is not one on an input."""
    graph = torch.fx.Graph()
    given = graph.placeholder("x")
    one = graph.call_function(torch.sin, (given,))
    constant = graph.call_function(torch.tensor, ([1.0, 2.0],))
    other = graph.call_function(torch.sin, (constant,))
    graph.output((one, other))
    for node in graph.nodes:
        node.meta["example_value"] = torch.empty(0)
    mode, fakes = fake_inputs([torch.zeros(2)])
    traced = trace_pre_dispatch(lambda x: RepeatedCalls(torch.fx.GraphModule({}, graph)).run(x), mode, fakes)
    read = [node.args[0] for node in traced.graph.nodes if str(node.target) == "aten.sin.default"]
    assert len(read) == 2 and all(isinstance(node, torch.fx.Node) for node in read) and read[0] is not read[1]


def test_values_that_only_a_call_itself_knows_are_not_replayed() -> None:
    """Positions of what is not zero are as many as there are: a size of its own for each call."""
    assert replayed([(torch.nonzero, (A,)), (torch.nonzero, (A,))], plain(SQUARE))[0] == 0


# --- the sites of a model -----------------------------------------------------------------------------------


class Differing(torch.nn.Module):
    """Attention four times, alike but for a scale, a mask and the number of channels."""

    def forward(self, x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
        narrow = x[..., :4]
        return [
            functional.scaled_dot_product_attention(x, x, x, attn_mask=first, scale=0.5),
            functional.scaled_dot_product_attention(x, x, x, attn_mask=first, scale=0.25),
            functional.scaled_dot_product_attention(x, x, x, attn_mask=second, scale=0.5),
            functional.scaled_dot_product_attention(narrow, narrow, narrow, attn_mask=first, scale=0.5),
            functional.scaled_dot_product_attention(x, x, x, attn_mask=first, scale=0.5),
        ]


@pytest.mark.parametrize("dynamic", [False, True])
def test_sites_that_differ_in_a_small_thing_are_computed_as_they_are(dynamic: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 6, 8, generator=generator)
    first, second = (torch.rand(6, 6, generator=generator) < 0.6 for _ in range(2))
    first |= torch.eye(6, dtype=torch.bool)
    second |= torch.eye(6, dtype=torch.bool)
    model = Differing()
    compiled = torch.compile(model, backend=attncompile, dynamic=dynamic, options={"rest": "eager"})
    for found, expected in zip(compiled(x, first, second), model(x, first, second), strict=True):
        torch.testing.assert_close(found, expected)
