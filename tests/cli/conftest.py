"""The command line in this process, and small models written to files."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from attncompile.cli import main

MODELS = '''
import torch
from torch import nn


class Attention(nn.Module):
    """Causal, 4 query heads over 2 KV heads of 8 channels; the mask is built from positions."""

    def __init__(self, window=None):
        super().__init__()
        self.query = nn.Linear(32, 32)
        self.keys = nn.Linear(32, 32)
        self.out = nn.Linear(32, 32)
        self.window = window

    def forward(self, x):
        batch, length, _ = x.shape
        query = self.query(x).view(batch, length, 4, 8).transpose(1, 2)
        key, value = self.keys(x).view(batch, length, 2, 2, 8).permute(3, 0, 2, 1, 4)
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        rows = torch.arange(length, device=x.device)
        visible = rows[None, :] <= rows[:, None]
        if self.window:
            visible = visible & (rows[None, :] > rows[:, None] - self.window)
        scores = (query @ key.transpose(-1, -2) * 8**-0.5).masked_fill(~visible, float("-inf"))
        mixed = scores.softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).reshape(batch, length, 32))


class OverQueries(nn.Module):
    """Weights that sum to one over the queries, not over the keys."""

    def forward(self, query, key, value):
        return (query @ key.transpose(-1, -2)).softmax(-2) @ value


class WithWeights(nn.Module):
    """Attention that also returns its weights."""

    def forward(self, query, key, value):
        weights = (query @ key.transpose(-1, -2)).softmax(-1)
        return weights @ value, weights


def example():
    return torch.randn(2, 12, 32)


def causal():
    return nn.Sequential(Attention(), Attention()).eval(), (example(),), {}


def window():
    return nn.Sequential(Attention(), Attention(window=4)).eval(), (example(),), {}


def plain():
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU()).eval(), (example(),), {}


def operands():
    return tuple(torch.randn(2, 3, 9, 8) for _ in range(3))


def over_queries():
    return OverQueries(), operands(), {}


def with_weights():
    return WithWeights(), operands(), {}


def not_a_model():
    return "a string"


def out_of_memory():
    raise MemoryError


def huge():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")
'''


@dataclass(frozen=True)
class Ran:
    """What one call of the command line did."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """The one sentence on stderr; fails when there is more, or a traceback."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in self.err
        return lines[0].removeprefix("error: ")


Run = Callable[..., Ran]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in this process."""
    monkeypatch.delenv("ATTNCOMPILE_DEBUG", raising=False)

    def go(*arguments: object) -> Ran:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Ran(code, captured.out, captured.err)

    return go


@pytest.fixture
def models(tmp_path: Path) -> str:
    """``file.py:`` of the file `MODELS`, to be followed by the name of one of its functions."""
    file = tmp_path / "models.py"
    file.write_text(textwrap.dedent(MODELS))
    return f"{file}:"
