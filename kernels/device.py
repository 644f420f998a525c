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
def update_hiding(accumulator, peak, total, logits, value_tile, SCALE: tl.constexpr):
    """One step of the online softmax where a number that is added to a score may hide its key.

    A row that has seen no exponent above −2^27 yet takes the least normal number in the place of SCALE, and no peak:
    finite logits then have equal weights, however low, and −∞ has none. Beside a real score neither has any.
    SCALE is log2(e) times the constant factor of the score: exponentials are taken in base 2.
    """
    highest = tl.max(logits, 1)
    limited = tl.maximum(highest * SCALE, -134217728.0)
    new_peak = tl.maximum(peak, tl.where(highest == float("-inf"), highest, limited))
    low = new_peak <= -134217728.0
    factor = tl.where(low, 1.1754943508222875e-38, SCALE)
    weights = tl.exp2(logits * factor[:, None] - tl.where(low, 0.0, new_peak)[:, None])
    rescale = tl.exp2(peak - tl.where(new_peak == float("-inf"), 0.0, new_peak))  # a row that has seen no key yet
    total = total * rescale + tl.sum(weights, 1)
    accumulator = accumulator * rescale[:, None]
    accumulator = tl.dot(weights.to(value_tile.dtype), value_tile, accumulator, input_precision="ieee")
    return accumulator, new_peak, total


@triton.jit
def update_tapped(accumulator, peak, total, moment, logits, factor, value_tile, SCALE: tl.constexpr):
    """One step of the online softmax as ``update_edited``, with the sum of weights times exponents below the peak.

    SCALE is log2(e) times the constant factor of the score: exponentials are taken in base 2.
    """
    new_peak = tl.maximum(peak, tl.max(logits, 1) * SCALE)
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen no key yet
    exponents = logits * SCALE - shift[:, None]
    weights = tl.exp2(exponents)
    rescale = tl.exp2(peak - shift)
    below = tl.where(peak == float("-inf"), 0.0, peak - shift)
    moment = (moment + total * below) * rescale + tl.sum(tl.where(weights > 0.0, weights * exponents, 0.0), 1)
    total = total * rescale + tl.sum(weights, 1)
    accumulator = accumulator * rescale[:, None]
    edited = (weights * factor).to(value_tile.dtype)
    accumulator = tl.dot(edited, value_tile, accumulator, input_precision="ieee")
    return accumulator, new_peak, total, moment


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
def update_narrow(accumulator, peak, total, logits, value_tile, powers, SCALE: tl.constexpr):
    """One step of the online softmax whose weights meet their values in e4m3.

    The values' scales, powers of two, join the weights, and peaks are whole numbers: with both, what is rounded does
    not depend on which keys came before. The accumulator holds 2^8 times the sum of the products.
    SCALE is log2(e) times the constant factor of the score: exponentials are taken in base 2.
    """
    products = logits * SCALE + ((powers.to(tl.int32, bitcast=True) >> 23) - 127).to(tl.float32)[None, :]
    new_peak = tl.maximum(peak, tl.ceil(tl.max(products, 1)))
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen no key yet
    weights = tl.exp2(products - (shift - 8.0)[:, None])
    rescale = tl.exp2(peak - shift)
    total = total * rescale + tl.sum(weights * (power_inverse(powers) * 0.00390625)[None, :], 1)
    accumulator = tl.dot(to_e4m3(weights), value_tile, accumulator * rescale[:, None])
    return accumulator, new_peak, total


@triton.jit
def to_e4m3(x):
    """The nearest float8 e4m3 number, ties to even, of a number whose magnitude is at most 448.

    Adding 1.5 · 2^20 times the power of two below |x| leaves four significant bits; below 2^-6 that power stays. The
    conversion then has nothing to round: Triton's interpreter rounds otherwise than the hardware.
    """
    below = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    large = tl.maximum(below, 0.015625) * 1572864.0
    return ((x + large) - large).to(tl.float8e4nv)


@triton.jit
def power_scale(largest):
    """The least power of two by which a magnitude becomes at most 448; at least 2^-40, also for 0."""
    bits = largest.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 8 + tl.where((bits & 0x7FFFFF) > 0x600000, 1, 0)
    return (tl.maximum(exponent, 127 - 40) << 23).to(tl.float32, bitcast=True)


@triton.jit
def power_inverse(power):
    """One divided by a power of two, exactly."""
    return (0x7F000000 - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def join_sink(accumulator, peak, total, logit):
    """The last step of an online softmax with a sink: one key more, whose value is zero. The logit is in base 2."""
    new_peak = tl.maximum(peak, logit)
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # no key, and a sink of -inf
    rescale = tl.exp2(peak - shift)
    return accumulator * rescale[:, None], new_peak, total * rescale + tl.exp2(logit - shift)


@triton.jit
def weigh(peak, total, logits, SCALE: tl.constexpr, AXIS: tl.constexpr):
    """One step of the online softmax without its product: weights, the factor of earlier ones, new peak and sum.

    SCALE is log2(e) times the constant factor of the score: exponentials are taken in base 2. AXIS is that of the keys.
    """
    new_peak = tl.maximum(peak, tl.max(logits, AXIS) * SCALE)
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen no key yet
    weights = tl.exp2(logits * SCALE - tl.expand_dims(shift, AXIS))
    rescale = tl.exp2(peak - shift)
    return weights, rescale, new_peak, total * rescale + tl.sum(weights, AXIS)


@triton.jit
def weigh_scaled(peak, total, logits, scales, SCALE: tl.constexpr, AXIS: tl.constexpr):
    """As ``weigh``, where each key's weight is multiplied by the scale of its value.

    The peak is that of the products, so that none of them exceeds 1 whatever the scales are; the total counts the
    weights without their scales, relative to the same peak.
    """
    logits = logits * SCALE
    # the next power of two above each scale, from its exponent; at least 2^-60: a value of zero bounds its weight too
    powers = tl.maximum((scales.to(tl.int32, bitcast=True) >> 23) & 255, 66) - 126
    products = logits + powers.to(tl.float32)
    new_peak = tl.maximum(peak, tl.max(products, AXIS))
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen no key yet
    weights = tl.exp2(logits - tl.expand_dims(shift, AXIS))
    rescale = tl.exp2(peak - shift)
    return weights * scales, rescale, new_peak, total * rescale + tl.sum(weights, AXIS)


@triton.jit
def power_above(x):
    """The least power of two that is at least x; 1 for 0. A division by it is exact."""
    return tl.where(x > 0.0, tl.exp2(tl.ceil(tl.log2(x))), 1.0)


@triton.jit
def asked_byte(pairs, PART: tl.constexpr):
    """For instructions of NVIDIA's GPUs: 16 bits that begin with the first (PART even) or the second byte."""
    if PART % 2 == 0:
        found = pairs
    else:
        found = tl.inline_asm_elementwise(
            "shr.u32 $0, $1, 8;", "=r,r", [pairs], dtype=tl.int16, is_pure=True, pack=2,
        )
    return found


@triton.jit
def from_int8(pairs, PART: tl.constexpr, DTYPE: tl.constexpr, CAPABILITY: tl.constexpr):
    """The int8 number of the first or the second byte (PART 0 or 1); in float16 plus 128, and 2^-24 of that on NVIDIA's
    GPUs.

    Converting integers is slow there. The subnormal numbers of float16 are the multiples of 2^-24, so that the byte
    itself is one; matrix units take them at their usual rate.
    """
    if CAPABILITY > 0 and tl.float16 == DTYPE:
        number = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x00ff00ff, 0x00800080, 0x6a;",
            "=r,r", [asked_byte(pairs, PART)], dtype=tl.float16, is_pure=True, pack=2,
        )
    elif tl.float16 == DTYPE:
        number = (((pairs >> (8 * PART)) & 255) ^ 128).to(DTYPE)
    else:
        number = ((pairs << (8 - 8 * PART)) >> 8).to(DTYPE)
    return number


@triton.jit
def from_int4(pairs, PART: tl.constexpr, DTYPE: tl.constexpr, CAPABILITY: tl.constexpr):
    """One of the four signed numbers of 16 bits: in the low four bits of the first or the second byte (PART 0 or 1), or
    in the high four, then 16 times it. In float16 it is 8 more before, and 2^-24 of that on NVIDIA's GPUs, as in
    ``from_int8``.
    """
    if CAPABILITY > 0 and tl.float16 == DTYPE and PART < 2:
        number = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x000f000f, 0x00080008, 0x6a;",
            "=r,r", [asked_byte(pairs, PART)], dtype=tl.float16, is_pure=True, pack=2,
        )
    elif CAPABILITY > 0 and tl.float16 == DTYPE:
        number = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x00f000f0, 0x00800080, 0x6a;",
            "=r,r", [asked_byte(pairs, PART)], dtype=tl.float16, is_pure=True, pack=2,
        )
    elif tl.float16 == DTYPE:
        BITS: tl.constexpr = 15 if PART < 2 else 240
        number = (((pairs >> (8 * (PART % 2))) & BITS) ^ (BITS // 15 * 8)).to(DTYPE)
    elif PART < 2:
        number = ((pairs << (12 - 8 * PART)) >> 12).to(DTYPE)
    else:
        number = (((pairs << (24 - 8 * PART)) >> 8) & -16).to(DTYPE)
    return number


@triton.jit
def from_e4m3(pairs, PART: tl.constexpr, DTYPE: tl.constexpr, CAPABILITY: tl.constexpr):
    """The float8 e4m3 number in the low (PART 0) or the high byte of 16 bits: exact in float16 and everything wider."""
    if CAPABILITY >= 89 and tl.float16 == DTYPE:
        if PART == 0:
            number = tl.inline_asm_elementwise(
                """{
                .reg .b32 bytes;
                .reg .b16 low, high;
                prmt.b32 bytes, $1, 0, 0x3120;
                mov.b32 {low, high}, bytes;
                cvt.rn.f16x2.e4m3x2 $0, low;
                }""",
                "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2,
            )
        else:
            number = tl.inline_asm_elementwise(
                """{
                .reg .b32 bytes;
                .reg .b16 low, high;
                prmt.b32 bytes, $1, 0, 0x3120;
                mov.b32 {low, high}, bytes;
                cvt.rn.f16x2.e4m3x2 $0, high;
                }""",
                "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2,
            )
    else:
        number = e4m3_number((pairs >> (8 * PART)) & 255, DTYPE)
    return number


@triton.jit
def e4m3_number(byte, DTYPE: tl.constexpr):
    """The float8 e4m3 number of a byte."""
    # the exponent's bias is 7 there and 15 in float16: a factor of 2^8, for subnormal numbers too
    half = (((byte & 128) << 8) | ((byte & 127) << 7)).to(tl.float16, bitcast=True) * 256.0
    nothing = tl.where((byte & 127) == 127, 32256, 0).to(tl.int16).to(tl.float16, bitcast=True)  # zero, or NaN
    return (half + nothing).to(DTYPE)
