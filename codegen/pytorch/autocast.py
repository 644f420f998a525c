"""What ``torch.autocast`` makes of the operands of a product, for products that it does not know."""

from __future__ import annotations

import torch

_DEVICES = ("cpu", "cuda", "xpu", "mps")
AUTOCAST = frozenset(device for device in _DEVICES if torch.amp.is_autocast_available(device))
"""Device types that autocast knows; asked for once, since Dynamo of torch 2.11 cannot ask inside a graph."""


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """What autocast, where it is on, makes of a tensor that goes into a product; ``None`` where it leaves it alone."""
    device = tensor.device.type
    if device not in AUTOCAST or not torch.is_autocast_enabled(device):
        return None
    if not tensor.is_floating_point() or tensor.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype(device)


__all__ = ["autocast_dtype"]
