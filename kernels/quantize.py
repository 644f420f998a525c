"""Skeleton of the kernel that rounds queries or keys to int8, one scale for a block of positions of one head.

Follows: SageAttention (arXiv:2410.02367).
"""

from __future__ import annotations

SOURCE = '''\
@triton.jit
def quantize_blocks(
    tensor, mean, whole, scale, stride_b, stride_h, stride_i, stride_d, H, I,
    BLOCK: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr, D: tl.constexpr, SMOOTH: tl.constexpr,
):
    """One program: one block of positions of one head; whole is [B,H,I,D], scale [B,H,cdiv(I,BLOCK)]."""
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
    largest = tl.max(tl.max(tl.abs(x), 1), 0) / 127.0
    rounded = round_half_even(tl.div_rn(x, tl.where(largest > 0.0, largest, 1.0) + tl.zeros_like(x)))
    rounded = tl.minimum(tl.maximum(rounded, -127.0), 127.0)
    tl.store(scale + tl.program_id(0), largest)
    written = (tl.cast(head, tl.int64) * I + rows)[:, None] * D + channels[None, :]
    tl.store(whole + written, rounded.to(tl.int8), mask=inside)


def quantize(tensor, block, smooth):
    """int8 [B,H,I,D] and float32 scales [B,H,cdiv(I,block)]; smooth subtracts the mean over positions."""
    B, H, I, D = tensor.shape
    mean = tensor.mean(dim=2, dtype=torch.float32) if smooth else tensor
    whole = torch.empty((B, H, I, D), dtype=torch.int8, device=tensor.device)
    scale = torch.empty((B, H, triton.cdiv(I, block)), dtype=torch.float32, device=tensor.device)
    if whole.numel():
        quantize_blocks[(scale.numel(),)](
            tensor, mean, whole, scale, *tensor.stride(), H, I,
            BLOCK=block, TILE=triton.next_power_of_2(block), CHANNELS=triton.next_power_of_2(D), D=D,
            SMOOTH=smooth,
        )
    return whole, scale
'''
"""The kernel and its launcher as text; it calls the device function ``round_half_even``."""
