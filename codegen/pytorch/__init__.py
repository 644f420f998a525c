"""Specs as PyTorch operators: SDPA, FlexAttention, chunked scans, or the reference definition."""

from attncompile.codegen.pytorch.choose import (
    OPERATORS,
    MaskKey,
    lower,
    lower_to_aten,
    mask_inputs,
    visible_mask,
    why_not,
)
from attncompile.codegen.pytorch.rotary import rotating_first

__all__ = [
    "OPERATORS",
    "MaskKey",
    "lower",
    "lower_to_aten",
    "mask_inputs",
    "rotating_first",
    "visible_mask",
    "why_not",
]
