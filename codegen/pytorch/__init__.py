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
from attncompile.codegen.pytorch.empty_rows import adds_fill, may_be_empty, passing_gradients, why_not_passed
from attncompile.codegen.pytorch.rotary import rotating_first

__all__ = [
    "OPERATORS",
    "MaskKey",
    "adds_fill",
    "lower",
    "lower_to_aten",
    "mask_inputs",
    "may_be_empty",
    "passing_gradients",
    "rotating_first",
    "visible_mask",
    "why_not",
    "why_not_passed",
]
