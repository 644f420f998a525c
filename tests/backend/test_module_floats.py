"""Floats of modules under ``dynamic=True``: constants before anything is compiled, so nothing is compiled twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional

from attncompile import backend
from attncompile.frontends.capture import Captured
from attncompile.frontends.torch_internals import ahead_of_time


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


class Scaled(torch.nn.Module):
    """Attention with a scale of the module's and a factor of the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.5

    def forward(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        return functional.scaled_dot_product_attention(x, x, x, scale=self.scale) * factor


class Work:
    """Counts what is done: calls of the back end by Dynamo, graphs that were looked at, graphs that were compiled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rest: str) -> None:
        self.calls = self.looked_at = self.compiled = 0
        self.options = {"rest": rest}
        look = backend.capture_dynamo

        def looked_at(graph_module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Captured:
            self.looked_at += 1
            return look(graph_module, inputs)

        def compiled(graph_module: torch.fx.GraphModule, inputs: Sequence[Any], _: Any) -> Callable[..., Any]:
            """What asks for another trace is ahead-of-time autograd, before Inductor has anything to do."""
            self.compiled += 1
            return ahead_of_time(graph_module, inputs)

        monkeypatch.setattr(backend, "capture_dynamo", looked_at)
        monkeypatch.setattr(backend, "inductor", compiled)

    def __call__(self, graph_module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.calls += 1
        return backend.attncompile(graph_module, inputs, options=self.options)


@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_done_for_a_graph_that_is_traced_again(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    """The first graph has a float for input that the second has for a constant; only the second is worth a look."""
    model, work = Scaled(), Work(monkeypatch, "inductor")
    run = torch.compile(model, backend=work, dynamic=True)
    x = torch.randn(1, 2, 6, 8, requires_grad=training)
    torch.testing.assert_close(run(x, 0.25), model(x, 0.25))
    assert (work.looked_at, work.compiled) == (1, 1) and work.calls == 2


def test_another_float_of_the_module_is_another_graph_and_one_of_the_caller_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, work = Scaled(), Work(monkeypatch, "inductor")
    run = torch.compile(model, backend=work, dynamic=True)
    x, y = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 9, 8)
    for given, factor in ((x, 0.25), (y, 0.75)):
        torch.testing.assert_close(run(given, factor), model(given, factor))
    assert work.compiled == 1
    model.scale = 0.125
    torch.testing.assert_close(run(y, 0.75), model(y, 0.75))
    assert work.compiled == 2


def test_what_is_not_compiled_behind_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, work = Scaled(), Work(monkeypatch, "eager")
    run = torch.compile(model, backend=work, dynamic=True)
    x = torch.randn(1, 2, 6, 8)
    torch.testing.assert_close(run(x, 0.25), model(x, 0.25))
    assert (work.looked_at, work.calls) == (1, 1)
