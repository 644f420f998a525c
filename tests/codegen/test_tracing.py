"""Who makes a graph and who computes, with others compiling beside them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from attncompile.codegen.pytorch import choose, lower
from attncompile.codegen.pytorch.tracing import being_compiled, being_traced
from attncompile.ir import parse_spec
from attncompile.ir.sample import random_tensors
from attncompile.verify import require_as_good_as_eager


class Told(nn.Module):
    """Adds what the code is told: 1 where a graph is made, 10 where the compiler makes it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (1 if being_traced(x) else 0) + (10 if being_compiled(x) else 0)


def compiled(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    told: torch.Tensor = torch.compile(model, backend="eager", fullgraph=True)(x)
    return told


def exported(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    told: torch.Tensor = torch.export.export(model, (x,), strict=False).module()(x)
    return told


def recorded(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    told: torch.Tensor = make_fx(model)(x)(x)
    return told


def scripted(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    told: torch.Tensor = torch.jit.trace(model, (x,), check_trace=False)(x)
    return told


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("call", "told"), [(compiled, 11), (exported, 11), (recorded, 1), (scripted, 1), (nn.Module.__call__, 0)]
)
def test_code_is_told_whether_a_graph_is_made_of_it(
    call: Callable[[nn.Module, torch.Tensor], torch.Tensor], told: int
) -> None:
    torch._dynamo.reset()
    assert call(Told(), torch.zeros(1)).item() == told


def test_what_another_thread_traces_is_its_own_business() -> None:
    """Modes below autograd belong to a thread, those above it to the process."""
    told: list[float] = []

    def traced(x: torch.Tensor) -> torch.Tensor:
        other = threading.Thread(target=lambda: told.append(Told()(torch.zeros(1)).item()))
        other.start()
        other.join()
        return x + 1

    for pre_dispatch in (False, True):
        make_fx(traced, pre_dispatch=pre_dispatch)(torch.zeros(1))
    assert told == [0, 0]


def test_what_another_thread_compiles_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag of the process says that somebody compiles; a long window still skips what it does not see."""
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.compiler.is_compiling() and Told()(torch.zeros(1)).item() == 0

    def whole(*_: object) -> torch.Tensor:
        raise AssertionError("the whole map was computed")

    monkeypatch.setattr(choose, "attend_whole", whole)
    text = """window   attend  q,k,v[1,2,2048,16]  float32
  score  0.25·s
  mask   j ≤ i and j > i − 64
  norm   softmax (float32)"""
    spec = parse_spec(text)
    tensors = random_tensors(spec, {})
    with torch.no_grad():
        found = lower(spec, "cpu").run(*(tensors[value.name] for value in spec.inputs))
    assert isinstance(found, torch.Tensor)
    (exact,), (eager,) = spec.interpret(tensors), spec.interpret(tensors, torch.float32)
    require_as_good_as_eager(found, exact, eager, 16 + 2048, "a window")
