"""Mixtures of experts in ONNX: the operators of transformers' experts that torch's exporter does not know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from onnxscript import opset18 as op

_INT64, _END = 7, 2**62


def translations() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """ONNX functions by operator, as ``torch.onnx.export`` takes them; those of transformers where it has them."""
    grouped = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return {torch.ops.aten.histc.default: _histogram} | ({grouped.default: _grouped_product} if grouped else {})


def _histogram(x: Any, bins: int = 100, min: float = 0, max: float = 0) -> Any:
    """``aten.histc``: how many numbers fall into each of as many bins of one width; the last one holds its end too.

    Args:
        x: float numbers; those outside of the range are not counted.
        bins: how many there are; min, max: the range of all.

    Raises:
        ValueError: for a range that is to be found in the numbers.
    """
    if bins > 1 and not min < max:
        raise ValueError(f"the range of histc is {min} to {max}: one that is found in the numbers is not known in ONNX")
    numbers = op.Reshape(x, op.Constant(value_ints=[1, -1]))
    if bins == 1:
        return op.CastLike(op.Slice(op.Shape(numbers), [1], [2]), x)
    low, high = (op.CastLike(op.Constant(value_float=float(end)), x) for end in (min, max))
    steps = op.CastLike(op.Constant(value_float=bins / (max - min)), x)
    places = op.Min(op.Floor(op.Mul(op.Sub(numbers, low), steps)), op.CastLike(op.Constant(value_float=bins - 1.0), x))
    each = op.CastLike(op.Constant(value_floats=[float(place) for place in range(bins)]), x)
    found = op.Equal(places, op.Reshape(each, op.Constant(value_ints=[-1, 1])))
    inside = op.And(op.GreaterOrEqual(numbers, low), op.LessOrEqual(numbers, high))
    return op.ReduceSum(op.CastLike(op.And(found, inside), x), op.Constant(value_ints=[1]), keepdims=0)


def _grouped_product(rows: Any, weight: Any, offs: Any) -> Any:
    """``transformers.grouped_mm_fallback``: rows that are sorted by expert, each by the matrix of its own.

    Args:
        rows: ``[S, K]``.
        weight: ``[E, K, N]``.
        offs: ``[E]`` integers: where the rows of each expert end. Those behind the last are zeros in the result.
    """
    experts, _, width = weight.shape
    ends, axis, start = op.Cast(offs, to=_INT64), op.Constant(value_ints=[0]), op.Constant(value_ints=[0])
    parts = []
    for expert in range(experts):
        place = op.Constant(value_ints=[expert])
        end = op.Gather(ends, place)
        own = op.Gather(weight, op.Constant(value_int=expert))
        parts.append(op.MatMul(op.Slice(rows, start, end, axis), own))
        start = end
    left = op.Shape(op.Slice(rows, start, op.Constant(value_ints=[_END]), axis), end=1)
    nothing = op.CastLike(op.Constant(value_float=0.0), rows)
    return op.Concat(*parts, op.Expand(nothing, op.Concat(left, op.Constant(value_ints=[width]), axis=0)), axis=0)


__all__ = ["translations"]
