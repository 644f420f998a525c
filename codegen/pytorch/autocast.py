"""What ``torch.autocast`` makes of the operands of a product, for products that it does not know."""

from __future__ import annotations

import torch


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """What autocast, where it is on, makes of a tensor that goes into a product; ``None`` where it leaves it alone."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    if not tensor.is_floating_point() or tensor.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype(device)


__all__ = ["autocast_dtype"]
