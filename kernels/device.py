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


@triton.jit
def weigh(peak, total, logits, SCALE: tl.constexpr):
    """One step of the online softmax without its product: weights, the factor of earlier ones, new peak and sum.

    SCALE is log2(e) times the constant factor of the score: exponentials are taken in base 2.
    """
    new_peak = tl.maximum(peak, tl.max(logits, 1) * SCALE)
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen no key yet
    weights = tl.exp2(logits * SCALE - shift[:, None])
    rescale = tl.exp2(peak - shift)
    return weights, rescale, new_peak, total * rescale + tl.sum(weights, 1)


@triton.jit
def power_above(x):
    """The least power of two that is at least x; 1 for 0. A division by it is exact."""
    return tl.where(x > 0.0, tl.exp2(tl.ceil(tl.log2(x))), 1.0)


@triton.jit
def from_e4m3(codes, DTYPE: tl.constexpr):
    """Numbers of float8 e4m3, given as such or as bytes: exact in float16 and everything wider."""
    if codes.dtype == tl.uint8:
        bits = codes.to(tl.uint16)
        # the exponent's bias is 7 there and 15 in float16: a factor of 2^8, for subnormal numbers too
        half = (((bits & 128) << 8) | ((bits & 127) << 7)).to(tl.float16, bitcast=True) * 256.0
        numbers = tl.where((bits & 127) == 127, float("nan"), half.to(tl.float32)).to(DTYPE)
    else:
        numbers = codes.to(DTYPE)
    return numbers


@triton.jit
def from_int8(codes, DTYPE: tl.constexpr, NVIDIA: tl.constexpr):
    """Numbers of int8: exact in float16 and everything wider.

    Converting integers has a sixteenth of the rate of other instructions there, so the byte u = code + 128 becomes the
    last bits of 1024 + u, from which 1152 is subtracted: four numbers in five instructions.
    """
    if NVIDIA and tl.float16 == DTYPE:
        numbers = tl.inline_asm_elementwise(
            """{
            .reg .b32 bytes, offset;
            mov.b32 offset, 0x64806480;
            xor.b32 bytes, $2, 0x80808080;
            prmt.b32 $0, bytes, 0x64646464, 0x4140;
            prmt.b32 $1, bytes, 0x64646464, 0x4342;
            sub.f16x2 $0, $0, offset;
            sub.f16x2 $1, $1, offset;
            }""",
            "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4,
        )
    else:
        numbers = codes.to(DTYPE)
    return numbers


@triton.jit
def from_int4(codes, DTYPE: tl.constexpr, NVIDIA: tl.constexpr):
    """The signed numbers in the low and in the high four bits of bytes.

    On NVIDIA's GPUs they become the last bits of 1024 + n and of 1024 + 16 n, as in ``from_int8``.
    """
    if NVIDIA and tl.float16 == DTYPE:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 first, second, offset, sixteenth, offset_high;
            mov.b32 offset, 0x64086408;
            mov.b32 sixteenth, 0x2c002c00;
            mov.b32 offset_high, 0xd480d480;
            prmt.b32 first, $4, 0, 0x4140;
            prmt.b32 second, $4, 0, 0x4342;
            lop3.b32 $0, first, 0x000f000f, 0x64086408, 0x6a;
            lop3.b32 $1, second, 0x000f000f, 0x64086408, 0x6a;
            lop3.b32 $2, first, 0x00f000f0, 0x64806480, 0x6a;
            lop3.b32 $3, second, 0x00f000f0, 0x64806480, 0x6a;
            sub.f16x2 $0, $0, offset;
            sub.f16x2 $1, $1, offset;
            fma.rn.f16x2 $2, $2, sixteenth, offset_high;
            fma.rn.f16x2 $3, $3, sixteenth, offset_high;
            }""",
            "=r,=r,=r,=r,r", [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
        )
    else:
        low = (((codes & 15) ^ 8).to(tl.int8) - 8).to(DTYPE)
        high = (codes.to(tl.int8, bitcast=True) >> 4).to(DTYPE)
    return low, high
