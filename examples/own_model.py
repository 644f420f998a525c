"""A model that spells attention by hand, for the command line:

    attncompile inspect examples/own_model.py:build --picture --seq 4096
    attncompile convert examples/own_model.py:build -o own-model

Scores are soft-capped, four query heads share a KV head unrepeated, and the mask is made of positions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


class WindowedAttention(nn.Module):
    """Causal attention over the last ``window`` positions with soft-capped scores, in five dimensions."""

    def __init__(self, channels: int = 64, kv_heads: int = 2, shared: int = 4, window: int = 1024) -> None:
        super().__init__()
        self.kv_heads, self.shared, self.window = kv_heads, shared, window
        self.head = channels // (kv_heads * shared)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, kv_heads * self.head)
        self.value = nn.Linear(channels, kv_heads * self.head)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, channels = x.shape
        query = self.query(x).view(batch, length, self.kv_heads, self.shared, self.head)
        key = self.key(x).view(batch, length, self.kv_heads, self.head)
        value = self.value(x).view(batch, length, self.kv_heads, self.head)
        scores = torch.einsum("bigrd,bjgd->bgrij", query, key) / math.sqrt(self.head)
        scores = 30 * torch.tanh(scores / 30)
        rows = torch.arange(length, device=x.device)
        ahead = rows[None, :] > rows[:, None]
        behind = rows[None, :] <= rows[:, None] - self.window
        weights = scores.masked_fill(ahead | behind, float("-inf")).softmax(dim=-1)
        mixed = torch.einsum("bgrij,bjgd->bigrd", weights, value)
        return self.out(mixed.reshape(batch, length, channels))


def build() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Two layers with example arguments; their batch and length become symbolic."""
    torch.manual_seed(0)
    model = nn.Sequential(WindowedAttention(), WindowedAttention()).eval()
    return model, (torch.randn(2, 50, 64),), {}
