"""Whether a call makes a graph or a result, by what this thread does and not by what others do meanwhile."""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def being_traced(*tensors: object) -> bool:
    """Whether a graph is being made of the code that asks: by Dynamo, export, ``make_fx``, ``torch.jit.trace`` or a
    tensor subclass that records.

    ``torch.compiler.is_compiling`` is a flag of the process, set for as long as any thread compiles (torch 2.13): a
    server that answers while a model is loaded beside it would be told that it is traced, and take the plain way that
    graphs get, whose memory grows with the square of the length. So would a check that runs during a compilation.

    Args:
        tensors: that the code computes with; those of export and of ahead-of-time autograd are subclasses, or have
            symbols for sizes.
    """
    if torch.compiler.is_dynamo_compiling():  # Dynamo reads True here; Python itself always False
        return True
    if any(isinstance(mode, ProxyTorchDispatchMode) for mode in _get_current_dispatch_mode_stack()):
        return True  # of this thread; get_proxy_mode() tells of another thread's, where it traces for export
    return torch.jit.is_tracing() or not all(map(_is_plain, tensors))


def being_compiled(*tensors: object) -> bool:
    """Whether torch's compiler or export makes a graph of the code that asks, in this thread; a tensor subclass that
    computes (a distributed or quantised tensor) is no sign of it by itself.
    """
    return torch.compiler.is_compiling() and being_traced(*tensors)


def _is_plain(tensor: object) -> bool:
    if not isinstance(tensor, torch.Tensor):
        return True
    plain = type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter
    return plain and all(isinstance(size, int) for size in tensor.shape)
