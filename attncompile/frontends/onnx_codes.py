"""How a tensor of codes is read, and whether two are read alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir


@dataclass(frozen=True)
class Codes:
    """How a quantised tensor is read: ``(code − zero) · scale``; ``zero`` may be left out for 0."""

    scale: ir.Value
    zero: ir.Value | None


def is_single(value: ir.Value | None) -> bool:
    """Whether a scale is one number."""
    if value is None:
        return False
    if value.const_value is not None:
        return value.const_value.size == 1
    return value.shape is not None and all(size == 1 for size in value.shape)


def same_numbers(one: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether two values are one, or constants of one content."""
    if one is other:
        return True
    if one is None or other is None or one.const_value is None or other.const_value is None:
        return False
    found, wanted = one.const_value, other.const_value
    return found.dtype == wanted.dtype and np.array_equal(found.numpy(), wanted.numpy())


def same_zeros(one: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether two zero points are the same; one that is left out is 0."""
    if one is not None and other is not None:
        return same_numbers(one, other)
    given = one if one is not None else other
    return given is None or (given.const_value is not None and not np.any(given.const_value.numpy().astype(np.float32)))


__all__ = ["Codes", "is_single", "same_numbers", "same_zeros"]
