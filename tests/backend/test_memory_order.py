"""Sites in graphs that write to memory: what is replaced gives what the graph gave, and what can not be stays."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch.utils._pytree import tree_leaves

from attncompile.backend.rewrite import decide, rewrite
from attncompile.codegen import pytorch
from attncompile.frontends.aten import aten_graph
from attncompile.lift import lift_graph
from tests.lift.forms import Form, attend, dot, heads, merged


def core(q, k, v):
    return torch.softmax(dot(heads(q), heads(k)) * 0.5, -1) @ heads(v)


def result_changed_in_place(q, k, v):
    out = core(q, k, v)
    out.add_(1)
    return out


def result_changed_through_a_view(q, k, v):
    out = core(q, k, v)
    out[:, :1].add_(1)
    return out


def view_of_a_result_that_is_changed(q, k, v):
    out = core(q, k, v)
    part = out[:, :1]
    out.add_(1)
    return part


def result_copied_before_it_is_changed(q, k, v):
    out = core(q, k, v)
    before = out.clone()
    out.mul_(2)
    return out + before


def result_copied_into_a_buffer(q, k, v):
    out = torch.empty_like(q)
    out[:, :3] = merged(core(q, k, v))[:, :3]
    out[:, 3:] = v[:, 3:]
    return out


def keys_changed_before(q, k, v):
    key = k * 1.0
    later = key[:, 1:]
    key.view(-1)[:5] = 0
    later.mul_(2)
    return core(q, key, v)


def keys_changed_afterwards(q, k, v):
    key = k * 1.0
    out = core(q, key, v)
    key[:, 0] = 0
    return out, key


def keys_changed_before_and_afterwards(q, k, v):
    key = k * 1.0
    key[:, 0] = 0
    out = core(q, key, v)
    key[:, 1] = 0
    return out, key


def window_moved_on(q, k, v):
    key = k.clone()
    moved = key.roll(-1, 1)
    moved[:, torch.tensor([-1])] = q[:, :1]
    key.copy_(moved)
    moved[:, :] = v
    return core(q, key, moved)


def scores_changed_in_place(q, k, v):
    logits = dot(heads(q), heads(k))
    logits *= 0.5
    logits[..., 0] = -torch.inf
    return attend(logits, heads(v))


def result_divided_in_place(q, k, v):
    weights = torch.exp(dot(heads(q), heads(k)) * 0.5)
    out = weights @ heads(v)
    out /= weights.sum(-1, keepdim=True)
    return merged(out)


FUNCTIONS: tuple[Callable[..., object], ...] = (
    result_changed_in_place, result_changed_through_a_view, view_of_a_result_that_is_changed,
    result_copied_before_it_is_changed, result_copied_into_a_buffer, keys_changed_before, keys_changed_afterwards,
    keys_changed_before_and_afterwards, window_moved_on, scores_changed_in_place, result_divided_in_place,
)  # fmt: skip


def rewritten(function: Callable[..., object]) -> tuple[torch.fx.GraphModule, int]:
    """The captured graph with its site replaced, having been compared with the graph; and how many were replaced."""
    form = Form(function.__name__, function)
    captured, inputs = form.capture(), form.inputs
    program = lift_graph(aten_graph(captured), form.name, captured.notes)
    decisions = decide(program, (), lambda spec: pytorch.lower(spec, "cpu"), even_reference=True)
    found = rewrite(captured.graph_module, program, decisions)
    results = [
        tree_leaves(module(*captured.flat_inputs((), copy.deepcopy(inputs))))
        for module in (captured.graph_module, found)
    ]
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    return found, sum(decision.lowering is not None for decision in decisions)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_the_rewritten_graph_gives_the_same(function: Callable[..., object]) -> None:
    _, replaced = rewritten(function)
    # no tensor holds the keys, or the result, as they were between two writes
    assert replaced == (function not in (result_changed_through_a_view, keys_changed_before_and_afterwards))


def test_scores_that_were_changed_in_place_are_not_made_any_more() -> None:
    found, _ = rewritten(scores_changed_in_place)
    assert not [node for node in found.graph.nodes if str(node.target).startswith(("aten.matmul", "aten.mul_"))]
