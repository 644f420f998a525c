"""``Scan`` in chunks: quadratic inside a chunk, one state ``[d,e]`` carried from chunk to chunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attncompile.ir import Scan
from attncompile.ir.scan import feature_map

# Positions of a chunk. The work per position is CHUNK·(d + e) inside and d·e for the state: near d, they
# balance.
CHUNK = 64


def scan_chunkwise(
    scan: Scan, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, Any], dtype: torch.dtype
) -> torch.Tensor:
    """The scan's output ``[b,h,i,e]``, computed in ``dtype``; traceable with symbolic lengths.

    With ``φ(k_t)`` zero where the mask hides key ``t``, and ``U_m = Σ_t decay^(C−1−t) φ(k_t) v_tᵀ`` over chunk
    ``m`` of ``C`` positions, the state before chunk ``n`` is ``S_n = Σ_{m<n} decay^(C·(n−1−m)) U_m``, and
    position ``t`` of chunk ``n`` gives ``scale · φ(q_t)ᵀ (decay^(t+1) S_n + Σ_{r≤t} decay^(t−r) φ(k_r) v_rᵀ)``.
    The chunks' states come from one product with a lower triangular matrix, so that no loop runs over the
    length.
    """
    heads = scan.kv_heads(tensors[scan.query], sizes)
    query = feature_map(scan.feature, tensors[scan.query].to(dtype))
    key = scan.key_features(tensors, sizes, dtype).index_select(1, heads)
    value = tensors[scan.value].to(dtype).index_select(1, heads)
    if scan.normalize:
        # one more channel of ones carries the sum of the weights
        value = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)
    length = query.shape[2]
    query, key, value = (_chunks(tensor, length) for tensor in (query, key, value))
    decay = scan.decays(tensors, query.shape[1], sizes, dtype)[:, None]
    position = torch.arange(CHUNK, device=query.device, dtype=dtype)
    inside = _powers(decay[..., None], position[:, None] - position[None, :])
    out = (query @ key.mT * inside[:, None]) @ value
    left = (decay ** (CHUNK - 1 - position))[:, None, :, None]
    made = (key * left).mT @ value
    number = torch.arange(query.shape[2], device=query.device, dtype=dtype)
    carry = _powers(decay[..., None] ** CHUNK, number[:, None] - 1 - number[None, :])
    state = (carry @ made.flatten(3)).unflatten(3, made.shape[3:])
    reach = query * (decay ** (position + 1))[:, None, :, None]
    out = (out + reach @ state) * scan.scale
    out = out.flatten(2, 3)[:, :, :length]
    if scan.normalize:
        out = out[..., :-1] / out[..., -1:].abs().clamp(min=1)
    return out


def _chunks(tensor: torch.Tensor, length: Any) -> torch.Tensor:
    """``[b,h,i,d]`` cut into ``[b,h,n,t,d]``, the last chunk padded with zeros."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, -length % CHUNK)).unflatten(2, (-1, CHUNK))


def _powers(base: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """``base^exponent`` where the exponent is at least 0, else 0."""
    nothing = torch.zeros((), dtype=base.dtype, device=base.device)
    return torch.where(exponent >= 0, base ** exponent.clamp(min=0), nothing)
