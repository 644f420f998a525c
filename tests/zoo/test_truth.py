"""The count of attentions, on functions whose count is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from benchmarks.zoo.truth import count

Q = (2, 4, 6, 8)


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2) / 8).softmax(-1) @ v


def masked_upcast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k).masked_fill(torch.ones(6, 6).tril() == 0, -1e9)
    return torch.einsum("bhij,bhjd->bhid", F.dropout(scores.softmax(-1, dtype=torch.float32), training=False), v)


def with_sink(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.cat([q @ k.mT, torch.zeros(2, 4, 6, 1)], -1).softmax(-1)
    return weights[..., :-1] @ v


def written_in_place(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.zeros(2, 4, 6, 6)
    scores[:, :, :, :3] = q @ k[:, :, :3].mT
    scores[:, :, :, 3:] = q @ k[:, :, 3:].mT
    return scores.softmax(-1) @ v


def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def pooling(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q.sum(-1, keepdim=True) * torch.ones(6)).softmax(-1) @ v


def read_but_unused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT).softmax(-1).sum(-1, keepdim=True) * v


def twice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return plain(q, k, plain(q, k, v))


class Calls(torch.nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.function(q, k, v)


@pytest.mark.parametrize(
    ("function", "decomposed", "in_one_call"),
    [
        (plain, 1, 0),
        (masked_upcast, 1, 0),
        (with_sink, 1, 0),
        (written_in_place, 1, 0),
        (fused, 0, 1),
        (pooling, 0, 0),
        (read_but_unused, 0, 0),
        (twice, 2, 0),
    ],
)
def test_counts(function: Callable[..., torch.Tensor], decomposed: int, in_one_call: int) -> None:
    truth = count(Calls(function), (torch.randn(*Q), torch.randn(*Q), torch.randn(*Q)))
    assert (truth.decomposed, truth.fused) == (decomposed, in_one_call)


class Router(torch.nn.Module):
    """A mixture of experts: softmax over a linear layer, then a batched product."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(8, 3)
        self.experts = torch.nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.gate(x).softmax(-1)
        return torch.einsum("bne,bnd,edf->bnf", weights, x, self.experts)


def test_a_router_is_no_attention() -> None:
    assert count(Router(), (torch.randn(2, 6, 8),)).attentions == ()


def test_the_module_of_an_attention_is_named() -> None:
    model = torch.nn.ModuleDict({"inner": Calls(plain)})

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.parts["inner"](x, x, x)

    (one,) = count(Outer(), (torch.randn(*Q),)).attentions
    assert one.module == "parts.inner" and one.shape == (2, 4, 6, 6)
