"""The operators' definitions in plain PyTorch, in whatever dtype their operands have."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Attended:
    """Results of one attention: ``out [B, H, I, E]``, and the map ``[B, H, I, J]`` at each of its stages."""

    out: torch.Tensor
    raw: torch.Tensor
    capped: torch.Tensor
    masked: torch.Tensor
    weights: torch.Tensor


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    cap: float = 0.0,
    bias: torch.Tensor | None = None,
    visible: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
) -> Attended:
    """``softmax(where(visible, cap·tanh(scale·q·k / cap) + bias, -inf)) · v``; a row of -inf alone gives zero.

    Args:
        query: ``[B, H, I, D]``; key, value: ``[B, G, J, D]`` and ``[B, G, J, E]``, G a divisor of H.
        scale: ``D^-1/2`` where it is left out; cap: 0 for none.
        bias, visible: broadcast to ``[B, H, I, J]``.
        sink: ``[H]``, a logit of each head that takes part in the normaliser and in nothing else.
    """
    shares = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shares, 1), value.repeat_interleave(shares, 1)
    raw = (query @ key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    capped = cap * torch.tanh(raw / cap) if cap else raw
    masked = capped if bias is None else capped + bias.to(capped.dtype)
    if visible is not None:
        masked = masked.masked_fill(~visible.expand(masked.shape), -math.inf)
    counted = masked
    if sink is not None:
        column = sink.to(masked.dtype)[None, :, None, None].expand(*masked.shape[:3], 1)
        counted = torch.cat([masked, column], -1)
    weights = torch.softmax(counted, -1)[..., : masked.shape[-1]].nan_to_num(0.0)
    return Attended(weights @ value, raw, capped, masked, weights)


def positions_visible(
    queries: int, keys: int, *, causal: bool, window: int = 0, past: int | None = None
) -> torch.Tensor:
    """``[I, J]``: ``j <= i + past`` where causal, and of those the last ``window`` where that is not 0."""
    i, j = torch.arange(queries)[:, None] + (keys - queries if past is None else past), torch.arange(keys)
    seen = j <= i if causal else torch.ones(queries, keys, dtype=torch.bool)
    return seen & (j > i - window) if window else seen


def rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False
) -> torch.Tensor:
    """Rotary positions: ``x [B, H, S, D]`` with tables ``[S, R/2]`` or ``[B, S, R/2]`` for the first R channels."""
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    parts = first * cos - second * sin, first * sin + second * cos
    whole = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([whole, rest], -1)


def tables(positions: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``[positions, channels / 2]`` in float32."""
    angles = torch.arange(positions)[:, None] * 100.0 ** (-torch.arange(channels // 2) / (channels // 2))
    return torch.cos(angles), torch.sin(angles)


def root_mean_square(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + epsilon) * weight`` over the last axis."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight.to(x.dtype)


def heads(flat: torch.Tensor, count: int) -> torch.Tensor:
    """``[B, S, H·D]`` as ``[B, H, S, D]``."""
    return flat.unflatten(-1, (count, -1)).transpose(1, 2)


def flat(split: torch.Tensor) -> torch.Tensor:
    """``[B, H, S, D]`` as ``[B, S, H·D]``."""
    return split.transpose(1, 2).flatten(2)


def scan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    decay: torch.Tensor | None = None,
    rate: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence of ``LinearAttention`` and its last state ``[B, G, D, E]``.

    ``S = exp(g)·S + k (beta·(v - S^T k))^T`` with a rate beta, ``S = exp(g)·S + k v^T`` without; ``o = scale·S^T q``.

    Args:
        query: ``[B, H, T, D]``; key, value: ``[B, G, T, D]`` and ``[B, G, T, E]``.
        decay: the logarithm ``g``, ``[B, G, T, D]`` or ``[B, G, T, 1]``; rate: ``[B, G, T, 1]``.
        state: the one before the first step; zero where it is left out.
    """
    batch, groups, steps, channels = key.shape
    shares = query.shape[1] // groups
    held = state if state is not None else key.new_zeros(batch, groups, channels, value.shape[-1])
    held = held.to(key.dtype)
    made = []
    for t in range(steps):
        k, v = key[:, :, t], value[:, :, t]
        if decay is not None:
            held = held * torch.exp(decay[:, :, t])[..., None]
        if rate is not None:
            v = rate[:, :, t] * (v - (held.transpose(2, 3) @ k[..., None])[..., 0])
        held = held + k[..., None] * v[..., None, :]
        seen = held.repeat_interleave(shares, 1)
        made.append(scale * (query[:, :, t, None] @ seen)[:, :, 0])
    return torch.stack(made, 2), held
