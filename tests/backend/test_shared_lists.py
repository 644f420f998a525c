"""Layers under one mask share the lists of blocks that a kernel visits: made once in a graph, handed to every layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import attncompile
from attncompile import backend
from attncompile.backend.rewrite import Decision, decide, rewrite
from attncompile.codegen.gluon.lists import ListRoom
from attncompile.codegen.lowering import Lowering, SharedLists
from attncompile.frontends.aten import aten_graph
from attncompile.frontends.capture import capture_export
from attncompile.ir import Spec, parse_spec
from attncompile.ir.expr import loads
from attncompile.kernels import operators
from attncompile.lift import lift_graph
from attncompile.passes import parse_passes
from attncompile.verify import derive_tolerance, require_within
from tests.backend.test_backend import small_llama, tokens

ROOM = ListRoom(128, 128, by_head=False)
made: list[int] = []
"""What was written into lists, in order."""
handed: list[int | None] = []
"""What each call found in its lists."""


def _implementation(text: str) -> operators.Implementation:
    reference = operators._reference(text)

    def run(*tensors: torch.Tensor, lists: torch.Tensor | None = None) -> Any:
        handed.append(None if lists is None else int(lists[-1]))
        return reference(*tensors)

    return run


def _lists(text: str) -> operators.Lists:
    spec = operators.parsed(text)
    attend, types = spec.attend(), spec.types()
    assert attend is not None
    sizes = (*types[attend.query].sizes[:3], types[attend.key].sizes[2])
    reads = {load.tensor for load in loads(attend.mask)}

    def words(known: Mapping[str, Any]) -> Any:
        return ROOM.words(*(operators.extent(size, known) for size in sizes))

    def fill(memory: torch.Tensor, *tensors: torch.Tensor) -> None:
        read = [t for value, t in zip(spec.inputs, tensors, strict=True) if value.name in reads]
        made.append(sum(int(t.long().sum()) for t in read))
        memory[-1] = made[-1]

    return operators.Lists(words, fill)


def chosen(spec: Spec, device: str = "cpu") -> Lowering:
    """A kernel that takes lists where the mask reads a tensor."""
    bound, attend = operators.bind(spec), spec.attend()
    reads = tuple(dict.fromkeys(load.tensor for load in loads(attend.mask))) if attend else ()
    lists = SharedLists(bound.text, reads, bound.lists) if reads else None
    return Lowering("test", "kernel", "", None, bound, lists)


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch, registrations: None) -> None:
    monkeypatch.setattr(backend, "choose_lowering", chosen)
    operators.register("cpu", _implementation, None, _lists)
    made.clear()
    handed.clear()


class Layers(torch.nn.Module):
    """Four layers; the third sees another document than the rest, the last has queries of its own length."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 48) for _ in range(4))

    def forward(self, x: torch.Tensor, document: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            kinds = other if number == 2 else document
            query, key, value = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in layer(x).chunk(3, dim=-1))
            rows = kinds
            if number == 3:
                query, rows = query[:, :, :5], kinds[:, :5]
            shown = rows[:, None, :, None] == kinds[:, None, None, :]
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=shown)
            x = out.transpose(1, 2).flatten(2) if number == 3 else x + out.transpose(1, 2).flatten(2)
        return x


def _inputs(batch: int = 2, length: int = 11) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.randint(0, 3, (batch, length), generator=generator).sort(-1).values for _ in range(2)]
    return torch.randn(batch, length, 16, generator=generator), *kinds


def test_rounded_layers_share_lists_too() -> None:
    """The kernel's operands are codes then; whose sizes are equal is asked of the tensors that they are made of."""
    model, inputs = Layers().eval(), _inputs()
    captured = capture_export(model, inputs)
    program = lift_graph(aten_graph(captured), "layers")
    decisions = decide(program, parse_passes("quantize.int8(smooth=false)"), chosen)
    assert all(decision.passes is not None and decision.passes.applied for decision in decisions)
    rewritten = rewrite(captured.graph_module, program, decisions)
    shared = [node for node in rewritten.graph.nodes if node.op == "call_module" and "lists" in str(node.target)]
    assert [len(node.users) for node in shared] == [2]


def test_one_node_for_each_mask() -> None:
    model, inputs = Layers().eval(), _inputs()
    captured = capture_export(model, inputs)
    program = lift_graph(aten_graph(captured), "layers")
    decisions: tuple[Decision, ...] = decide(program, (), chosen)
    assert [decision.lowering is not None for decision in decisions] == [True] * 4
    rewritten = rewrite(captured.graph_module, program, decisions)
    shared = [node for node in rewritten.graph.nodes if node.op == "call_module" and "lists" in str(node.target)]
    assert [len(node.users) for node in shared] == [2]  # the third and the fourth have nobody to share with
    given = captured.flat_inputs(inputs, {})
    with torch.no_grad():
        traced = make_fx(rewritten)(*given)
        (found,) = rewritten(*given)
    nodes = [str(node.target) for node in traced.graph.nodes]
    assert nodes.count("attncompile.block_lists.default") == 1
    assert nodes.count("attncompile.infer.default") == 4
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(inputs[0].double(), *inputs[1:])
        require_within(found, exact, derive_tolerance(exact, model(*inputs), 16).bound, "the result")
    assert len(set(made)) == 1 and handed.count(made[0]) == handed.count(None)


@pytest.mark.parametrize("training", (False, True), ids=("inference", "training"))
def test_compiled_with_any_length(training: bool) -> None:
    """Padding of a decoder: lists are made once a call, at every length, and gradients pass."""
    model = small_llama().train(training)
    wide = copy.deepcopy(model).double()
    compiled = attncompile.compile(model, rest="eager", dynamic=True)
    for length in (9, 21):
        made.clear()
        handed.clear()
        call = tokens(2, length, "right")
        kept = call["attention_mask"].bool()
        with torch.set_grad_enabled(training):
            exact, eager, found = (run(**call).logits[kept] for run in (wide, model, compiled))
        bound = derive_tolerance(exact.detach(), eager.detach(), model.config.hidden_size).bound
        require_within(found.detach(), exact.detach(), bound, "logits")
        assert made == [int(kept.sum())]
        assert handed == [made[0]] * model.config.num_hidden_layers
        if training:
            (gradient,) = torch.autograd.grad(found.square().mean(), [model.model.embed_tokens.weight])
            (expected,) = torch.autograd.grad(eager.square().mean(), [model.model.embed_tokens.weight])
            (best,) = torch.autograd.grad(exact.square().mean(), [wide.model.embed_tokens.weight])
            require_within(gradient, best, derive_tolerance(best, expected, 2 * length).bound, "the gradient")


@pytest.mark.parametrize("back_end", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_traced_with_symbols_for_sizes(back_end: str) -> None:
    """How much memory lists take is an expression in the sizes of a call: no length is compiled again."""
    spec = parse_spec(
        "x   attend  q,k,v[B,2,I,8]  float32\n  score  0.3·s\n  mask   kind[b, i] = kind[b, j]\n"
        "  norm   softmax (float32)\n  given  kind[B,I]:int64"
    )
    run = operators.bind(spec)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend=back_end)
    def model(*tensors: torch.Tensor) -> torch.Tensor:
        lists = run.lists(*tensors)
        first, second = run(*tensors, lists=lists), run(tensors[0] * 2, *tensors[1:], lists=lists)
        assert isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
        return first + second

    for again, (batch, length) in enumerate(((3, 13), (4, 300))):
        made.clear()
        handed.clear()
        given = [torch.randn(batch, 2, length, 8) for _ in range(3)]
        kind = torch.randint(0, 3, (batch, length))
        with torch._dynamo.config.patch(error_on_recompile=bool(again)):
            found = model(*given, kind)
        plain = [operators.run(spec, given[0] * factor, *given[1:], kind) for factor in (1, 2)]
        assert all(isinstance(each, torch.Tensor) for each in plain)
        torch.testing.assert_close(found, plain[0] + plain[1])
        assert made == [int(kind.sum())] and handed[:2] == made * 2


def test_a_layer_alone_makes_its_own() -> None:
    model = small_llama()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    with torch.no_grad():
        attncompile.compile(model, rest="eager")(**tokens(2, 9, "right"))
    assert made == [] and handed == [None]


@pytest.mark.parametrize("sizes", ((1, 1, 1, 1), (3, 7, 500, 700), (1, 32, 16384, 16384), (2, 1, 300000, 300000)))
@pytest.mark.parametrize("by_head", (False, True))
def test_memory_suffices(sizes: tuple[int, int, int, int], by_head: bool) -> None:
    """What lists take is no more than what is known beforehand."""
    batch, heads, queries, keys = sizes
    for rows, columns in ((128, 128), (192, 128), (128, 64)):
        tiles, blocks = -(-queries // rows), -(-keys // columns)
        lists = batch * tiles * (heads if by_head else 1)
        taken = -(-2 * lists // 4) * 4 + -(-(1 + lists) // 4) * 4 + lists * min(blocks, 1024)
        assert taken <= ListRoom(rows, columns, by_head).words(*sizes)


def test_a_device_without_lists_says_so() -> None:
    operators.use_reference("cpu")
    spec = "x   attend  q,k,v[B,2,I,8]  float32␤  score  s␤  mask   true␤  norm   softmax (float32)"
    with pytest.raises(RuntimeError, match="no lists of blocks are made for x on cpu"):
        torch.ops.attncompile.block_lists(spec, [torch.zeros(1, 2, 3, 8)] * 3)
