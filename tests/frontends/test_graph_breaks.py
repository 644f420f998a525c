"""Models that torch.export cannot take are taken in the pieces that Dynamo makes of them."""

from __future__ import annotations

import pytest
import torch

import attncompile
from attncompile.frontends.errors import CaptureError
from attncompile.frontends.graph_breaks import capture_with_breaks

HEADS, CHANNELS = 2, 4


class Breaking(torch.nn.Module):
    """Two layers of attention with a decision about data in between."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = torch.nn.ModuleList(torch.nn.Linear(8, 24) for _ in range(2))

    def attend(self, x: torch.Tensor, number: int) -> torch.Tensor:
        shape = (x.shape[0], x.shape[1], HEADS, CHANNELS)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.maps[number](x).chunk(3, -1))
        out = (q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v
        return out.transpose(1, 2).reshape(x.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attend(x, 0)
        if x.sum().item() > 1e9:
            x = x - 1
        return self.attend(x, 1)


def test_every_piece_is_lifted() -> None:
    torch.manual_seed(0)
    program = attncompile.lift(Breaking(), (torch.randn(2, 5, 8),))
    assert program.count("lifted") == 2 and len(program.sites) == 2
    assert len({site.name for site in program.sites}) == 2
    assert any("torch.export takes no graph of the whole" in note for note in program.notes)
    assert "2 attention sites, 2 lifted" in str(program)


def test_modes_are_restored_and_nothing_is_rewritten() -> None:
    model = Breaking().train()
    graphs, notes = capture_with_breaks(model, (torch.randn(2, 5, 8),))
    assert len(graphs) >= 2 and notes == ()
    assert model.training


def test_a_model_that_fails_says_so() -> None:
    class Failing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no such luck")

    with pytest.raises(CaptureError, match="no such luck"):
        attncompile.lift(Failing(), (torch.randn(2, 3),))


class Marking(Breaking):
    """Marks places in a table by numbers that only the data tell, which Dynamo cannot trace in one piece."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        marked = torch.zeros(x.shape[:2], dtype=torch.bool)
        rows, columns = (x[..., 0] > 0).nonzero().unbind(-1)
        marked[[*rows], [*columns]] = True
        x = torch.where(marked[..., None], x, 2 * x)
        return self.attend(self.attend(x, 0), 1)


def test_functions_inside_one_that_can_not_be_traced_are_traced() -> None:
    torch.manual_seed(0)
    program = attncompile.lift(Marking(), (torch.randn(2, 5, 8),))
    assert program.count("lifted") == 2 and len(program.sites) == 2
