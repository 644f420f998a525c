"""Biases that a model looks up at places which are loaded for each pair: loaded themselves, once for all layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attncompile.codegen.pytorch import lower
from attncompile.frontends.aten import aten_graph
from attncompile.frontends.capture import capture_export
from attncompile.ir import print_spec
from attncompile.lift import Program, lift_graph

LENGTH = 40


class Attention(nn.Module):
    """Two layers with one relative bias, by logarithmic buckets (T5), an index of pairs (Swin) or a distance."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.table = nn.Embedding(32, 3)
        self.register_buffer("index", torch.randint(0, 32, (LENGTH, LENGTH)))

    def bias(self) -> torch.Tensor:
        places = torch.arange(LENGTH)
        distance = places[None, :] - places[:, None]
        if self.how == "buckets":
            far = 8 + (torch.log(distance.abs().float() / 8) / 2.0 * 8).clamp(max=7).long()
            buckets = torch.where(distance.abs() < 8, distance.abs(), far) + 16 * (distance > 0)
            return self.table(buckets).permute(2, 0, 1)[None]
        if self.how == "index":
            rows = self.table.weight[self.index.view(-1)]
            return rows.view(LENGTH, LENGTH, 3).permute(2, 0, 1)[None]
        return self.table(distance.clamp(-12, 12) + 12).permute(2, 0, 1)[None]

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        bias = self.bias()
        first = torch.softmax(q @ k.mT * 0.3 + bias, -1) @ v
        return torch.softmax(first @ k.mT * 0.3 + bias, -1) @ v


def lifted(how: str) -> Program:
    q, k, v = (torch.randn(2, 3, LENGTH, 8) for _ in range(3))
    captured = capture_export(Attention(how), (q, k, v))
    return lift_graph(aten_graph(captured), how, captured.notes)


@pytest.mark.parametrize(
    ("how", "loaded"),
    [("buckets", "embedding[i, j, h]"), ("index", "view_1[i, j, h]"), ("distance", "table.weight[min(12, max(−12,")],
)
def test_what_is_looked_up_for_each_pair_is_loaded_once(how: str, loaded: str) -> None:
    program = lifted(how)
    assert len(program.sites) == 2
    specs = [site.spec for site in program.sites]
    for spec in specs:
        assert spec is not None
        score = print_spec(spec)
        assert loaded in score
        assert score.count("[i, j") == (how != "distance"), "no place is loaded for a pair"
    given = [value for spec in specs if spec is not None for value in spec.captured()]
    assert len({value.name for value in given}) == 1, "both layers load one tensor"
    assert all(lower(spec) is not None for spec in specs if spec is not None)
