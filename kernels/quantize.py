"""Skeletons of the kernels that round queries, keys and values, one scale for a block of positions of one head.

Follows: SageAttention (arXiv:2410.02367) for int8; the key order of shuffled values is that in which a thread of a
WGMMA accumulator holds weights.
"""

from __future__ import annotations

DEVICE_FUNCTIONS = ("to_e4m3", "power_scale", "power_inverse")
"""Functions of :mod:`attncompile.kernels.device` that they call."""


def power_of_two(value: int, least: int = 1) -> int:
    """The least power of two that is no less, and at least ``least``."""
    return max(least, 1 << (value - 1).bit_length())


CODES = '''\
@triton.jit
def round_to_codes(x, largest, E4M3: tl.constexpr):
    """Codes of a block whose largest magnitude is given, and its scale."""
    if E4M3:
        unit = power_scale(largest)
        rounded = to_e4m3(x * power_inverse(unit))
    else:
        unit = largest / 127.0
        # adding 1.5 · 2^23 leaves no fraction bits: ties go to even
        whole = tl.div_rn(x, tl.where(unit > 0.0, unit, 1.0) + tl.zeros_like(x)) + 12582912.0 - 12582912.0
        rounded = tl.minimum(tl.maximum(whole, -127.0), 127.0).to(tl.int8)
    return rounded, unit


def empty_codes(tensor, dtype, block):
    """Memory for codes, whose rows have whole 16 bytes, and for scales."""
    B, H, I, D = tensor.shape
    codes = torch.empty((B, H, I, triton.cdiv(D, 16) * 16), dtype=dtype, device=tensor.device)
    return codes, torch.empty((B, H, triton.cdiv(I, block)), dtype=torch.float32, device=tensor.device)'''
"""What the kernels for queries and keys have in common, as text."""

BLOCKS = '''\
@triton.jit(do_not_specialize=["H", "I"])
def quantize_blocks(
    tensor, mean, codes, scale, stride_b, stride_h, stride_i, stride_d, code_stride, H, I,
    BLOCK: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, D: tl.constexpr, SMOOTH: tl.constexpr,
    E4M3: tl.constexpr,
):
    """One program: one block of positions of one head; codes are [B,H,I,D], scale [B,H,cdiv(I,BLOCK)]."""
    blocks = tl.cdiv(I, BLOCK)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks
    tensor += tl.cast(head // H, tl.int64) * stride_b + tl.cast(head % H, tl.int64) * stride_h
    lanes = tl.arange(0, TILE)
    rows = block * BLOCK + lanes
    channels = tl.arange(0, CHANNELS)
    inside = ((lanes < BLOCK) & (rows < I))[:, None] & (channels < D)[None, :]
    offsets = tl.cast(rows, tl.int64)[:, None] * stride_i + channels[None, :] * stride_d
    x = tl.load(tensor + offsets, mask=inside, other=0).to(tl.float32)
    if SMOOTH:
        x -= tl.load(mean + tl.cast(head, tl.int64) * D + channels, mask=channels < D, other=0)[None, :]
        x = tl.where(inside, x, 0.0)
    rounded, unit = round_to_codes(x, tl.max(tl.max(tl.abs(x), 1), 0), E4M3)
    tl.store(scale + tl.program_id(0), unit)
    written = (tl.cast(head, tl.int64) * I + rows)[:, None] * code_stride + channels[None, :]
    tl.store(codes + written, rounded, mask=inside)


def quantize(tensor, dtype, block, smooth, later=None):
    """Codes [B,H,I,D] and float32 scales [B,H,cdiv(I,block)]; smooth subtracts the mean over positions."""
    B, H, I, D = tensor.shape
    mean = tensor.mean(dim=2, dtype=torch.float32) if smooth else tensor
    codes, scale = empty_codes(tensor, dtype, block)
    if codes.numel():
        with torch.cuda.device_of(tensor):
            launch(
                quantize_blocks, (scale.numel(),), tensor, mean, codes, scale, *tensor.stride(), codes.stride(2), H, I,
                BLOCK=block, TILE=triton.next_power_of_2(block), CHANNELS=triton.next_power_of_2(D), D=D,
                SMOOTH=smooth, E4M3=dtype != torch.int8, later=later,
            )
    return codes[..., :D], scale'''
"""For queries and keys: the kernel and its launcher as text."""

VALUES = '''\
@triton.jit(do_not_specialize=["G", "J"])
def quantize_value_blocks(
    tensor, codes, scale, stride_b, stride_g, stride_j, stride_e, G, J, length,
    BLOCK: tl.constexpr, TILE: tl.constexpr, FEATURES: tl.constexpr, E: tl.constexpr, SHUFFLED: tl.constexpr,
):
    """One program: one block of values of one head, turned over; codes are [B,G,E,length], scale [B,G,cdiv(J,BLOCK)].

    SHUFFLED: of each 16 keys, place 4t + 2h + i holds the value of key 8h + 2t + i.
    """
    blocks = tl.cdiv(J, BLOCK)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks
    tensor += tl.cast(head // G, tl.int64) * stride_b + tl.cast(head % G, tl.int64) * stride_g
    lanes = tl.arange(0, TILE)
    places = block * BLOCK + lanes
    rows = places
    if SHUFFLED:
        rows = block * BLOCK + ((lanes & ~15) | ((lanes & 2) << 2) | ((lanes & 12) >> 1) | (lanes & 1))
    features = tl.arange(0, FEATURES)
    real = (features < E)[None, :]
    inside = ((lanes < BLOCK) & (rows < J))[:, None] & real
    offsets = tl.cast(rows, tl.int64)[:, None] * stride_j + features[None, :] * stride_e
    x = tl.load(tensor + offsets, mask=inside, other=0).to(tl.float32)
    unit = power_scale(tl.max(tl.max(tl.abs(x), 1), 0))
    tl.store(scale + tl.program_id(0), unit)
    written = (tl.cast(head, tl.int64) * E + features)[None, :] * length + places[:, None]
    # past the last key come zeros
    stored = ((lanes < BLOCK) & (places < length))[:, None] & real
    tl.store(codes + written, to_e4m3(x * power_inverse(unit)), mask=stored)


def quantize_values(tensor, block, shuffled, later=None):
    """float8 e4m3 codes [B,G,E,J] with rows of whole 16 bytes, and float32 scales [B,G,cdiv(J,block)]."""
    B, G, J, E = tensor.shape
    length = triton.cdiv(J, 16) * 16
    codes = torch.empty((B, G, E, length), dtype=torch.float8_e4m3fn, device=tensor.device)
    scale = torch.empty((B, G, triton.cdiv(J, block)), dtype=torch.float32, device=tensor.device)
    if codes.numel():
        with torch.cuda.device_of(tensor):
            launch(
                quantize_value_blocks, (scale.numel(),), tensor, codes, scale, *tensor.stride(), G, J, length,
                BLOCK=block, TILE=triton.next_power_of_2(block), FEATURES=triton.next_power_of_2(E), E=E,
                SHUFFLED=shuffled, num_warps=8, later=later,
            )
    return codes, scale'''
"""For values: the kernel and its launcher as text."""
