"""Device functions that generated kernels call; their source is copied into each module that needs them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Hyperbolic tangent in float32, to about two units in the last place (polynomial: Cephes, tanhf)."""
    magnitude = tl.abs(x)
    square = x * x
    tail = ((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square
    near = x + x * square * ((tail + 1.33314422036e-1) * square - 3.33332819422e-1)
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * magnitude))
    return tl.where(magnitude < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def round_half_even(x):
    """Nearest integer of float32, ties to even: adding 2^23 leaves no fraction bits."""
    magnitude = tl.abs(x)
    rounded = (magnitude + 8388608.0) - 8388608.0
    return tl.where(magnitude < 8388608.0, tl.where(x < 0, -rounded, rounded), x)


@triton.jit
def floor_divide(x, y):
    """Integer quotient rounded down; Triton's own // rounds towards zero."""
    quotient = x // y
    return tl.where((quotient * y != x) & ((x < 0) != (y < 0)), quotient - 1, quotient)


@triton.jit
def floor_modulo(x, y):
    """Remainder with the sign of the divisor; Triton's own % has the sign of the dividend."""
    remainder = x % y
    return tl.where((remainder != 0) & ((remainder < 0) != (y < 0)), remainder + y, remainder)


@triton.jit
def update(accumulator, peak, total, logits, value_tile, SCALE: tl.constexpr):
    """One step of the online softmax: the logits of these keys join the rows' running maximum and sum.

    SCALE is log2(e) times the constant factor of the score: exponentials are taken in base 2.
    """
    new_peak = tl.maximum(peak, tl.max(logits, 1) * SCALE)
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen no key yet
    weights = tl.exp2(logits * SCALE - shift[:, None])
    rescale = tl.exp2(peak - shift)
    total = total * rescale + tl.sum(weights, 1)
    accumulator = accumulator * rescale[:, None]
    accumulator = tl.dot(weights.to(value_tile.dtype), value_tile, accumulator, input_precision="ieee")
    return accumulator, new_peak, total


@triton.jit
def update_edited(accumulator, peak, total, logits, factor, value_tile, SCALE: tl.constexpr):
    """One step of the online softmax; the factor edits the weights after they are summed.

    SCALE is log2(e) times the constant factor of the score: exponentials are taken in base 2.
    """
    new_peak = tl.maximum(peak, tl.max(logits, 1) * SCALE)
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen no key yet
    weights = tl.exp2(logits * SCALE - shift[:, None])
    rescale = tl.exp2(peak - shift)
    total = total * rescale + tl.sum(weights, 1)
    accumulator = accumulator * rescale[:, None]
    edited = (weights * factor).to(value_tile.dtype)
    accumulator = tl.dot(edited, value_tile, accumulator, input_precision="ieee")
    return accumulator, new_peak, total


@triton.jit
def join_sink(accumulator, peak, total, logit):
    """The last step of an online softmax with a sink: one key more, whose value is zero. The logit is in base 2."""
    new_peak = tl.maximum(peak, logit)
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # no key, and a sink of -inf
    rescale = tl.exp2(peak - shift)
    return accumulator * rescale[:, None], new_peak, total * rescale + tl.exp2(logit - shift)
