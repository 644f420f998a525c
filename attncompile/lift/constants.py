"""Constant tensors that say no more than their indices do, such as the positions that an exporter has computed."""

from __future__ import annotations

import torch

MOST = 2**20
"""Elements beyond which nobody looks."""


def progression(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The numbers ``(a, c₀, c₁, …)`` for which every element of an integer tensor is ``a + c₀·n₀ + c₁·n₁ + …``.

    ``nₖ`` is the index along axis ``k``; along an axis of size 1 its factor is 0. Truth values count as 0 and 1, and
    must all be the same.

    Returns:
        ``None`` for a tensor of another kind, without elements or with more than :data:`MOST`, and where there are no
        such numbers.
    """
    if tensor.is_floating_point() or tensor.is_complex():
        return None
    if not 0 < tensor.numel() <= MOST:
        return None
    whole = tensor.detach().to("cpu", torch.int64)
    corner = whole[(0,) * whole.dim()]
    expected = corner.clone()
    steps = []
    for axis, size in enumerate(whole.shape):
        step = 0
        if size > 1:
            step = int(whole[(0,) * axis + (1,) + (0,) * (whole.dim() - axis - 1)] - corner)
        steps.append(step)
        shape = [size if n == axis else 1 for n in range(whole.dim())]
        expected = expected + step * torch.arange(size).reshape(shape)
    if tensor.dtype is torch.bool and any(steps):
        return None
    return (int(corner), *steps) if torch.equal(expected, whole) else None
