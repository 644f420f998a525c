"""Rounding to float8 e4m3: numbers with four significant bits from 2^−6 to 448, and multiples of 2^−9 below.

Scales are powers of two, as in the microscaling formats: for floating-point codes any other scale is no more
accurate, and with these every product with a scale is exact.

Follows: Micikevicius et al. 2022 (arXiv:2209.05433); scales as in the OCP Microscaling specification 1.0.
"""

from __future__ import annotations

import math

import torch

LARGEST = 448.0
"""The largest number: 1.75 · 2^8."""

LEAST_EXPONENT = -40
"""Scales are no smaller than 2 to this power: what lies below 2^−50 is rounded to zero."""

HEADROOM = 8
"""Weights are rounded as multiples of 2^−8: the largest of a row becomes a number from 128 to 256."""


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """The nearest e4m3 number, ties to even, in the dtype of ``x``; beyond 448 the nearest is 448."""
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    _, exponent = torch.frexp(wide)  # of a significand in [1/2, 1)
    unit = torch.ldexp(torch.ones_like(wide), exponent.clamp(min=-5) - 4)
    return ((wide / unit).round() * unit).clamp(-LARGEST, LARGEST).to(x.dtype)


def power_scale(largest: torch.Tensor) -> torch.Tensor:
    """The least power of two by which a largest magnitude becomes at most 448; at least 2^−40, also for 0."""
    significand, exponent = torch.frexp(largest.to(torch.float64))
    needed = exponent - 9 + (significand > LARGEST / 512).to(exponent.dtype)
    needed = torch.where(largest > 0, needed, LEAST_EXPONENT).clamp(min=LEAST_EXPONENT)
    return torch.ldexp(torch.ones_like(significand), needed).to(largest.dtype)


def weight_rounding(logits: torch.Tensor) -> torch.Tensor:
    """By what factor rounding to e4m3 changes each weight of a softmax over the last axis.

    With ``x = log2(e) · logit`` and ``p = ⌈max_j x_j⌉`` it is ``e4m3(2^(8 + x_j − p)) / 2^(8 + x_j − p)``, and 1
    where a weight is zero. The sum that the weights are divided by is not rounded.
    """
    exponents = logits * math.log2(math.e)
    peak = exponents.amax(dim=-1, keepdim=True).ceil() if logits.shape[-1] else exponents
    weights = torch.exp2(exponents - torch.where(peak.isfinite(), peak, 0.0) + HEADROOM)
    return torch.where(weights > 0, e4m3(weights) / weights, 1.0)
