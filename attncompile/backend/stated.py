"""Attention that is given as the text of a Spec: what computes it, kept by text, and a call that Dynamo keeps whole."""

from __future__ import annotations

import functools

import torch

from attncompile.backend.choose import choose_lowering
from attncompile.codegen.lowering import Lowering
from attncompile.frontends.torch_internals import outside_tracing
from attncompile.ir import Spec
from attncompile.kernels import operators
from attncompile.passes import parse_passes, run_passes


@functools.lru_cache(maxsize=1024)
def fused(text: str) -> Spec:
    """The Spec of a text in its canonical form, where the pass ``fuse`` applies."""
    return run_passes(operators.parsed(text), parse_passes("fuse")).spec


@functools.lru_cache(maxsize=1024)
def lowered(text: str, device: str) -> tuple[Spec, Lowering]:
    """The Spec that runs for a text, and what computes it: as the back end of ``torch.compile`` decides.

    Args:
        text: a printed Spec.
        device: a device type.

    Raises:
        ValueError: for a text that is no Spec, or a device that is not supported.
    """
    with outside_tracing():
        spec = fused(text)
        return spec, choose_lowering(spec, device)


@torch.compiler.allow_in_graph
def computed(text: str, *tensors: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """The outputs of a Spec for its inputs in order. Dynamo does not look inside; what traces below it does."""
    return lowered(text, tensors[0].device.type)[1].run(*tensors)


__all__ = ["computed", "fused", "lowered"]
