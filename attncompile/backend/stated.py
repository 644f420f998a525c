"""Attention that is given as the text of a Spec: what computes it, kept by text, and a call that Dynamo keeps whole."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from attncompile.backend.choose import choose_lowering
from attncompile.backend.compilation import solved_sizes
from attncompile.codegen.lowering import Lowering
from attncompile.frontends.torch_internals import is_fake, outside_tracing, size_hint
from attncompile.ir import Spec
from attncompile.kernels import operators
from attncompile.passes import PassResult, parse_passes, run_passes

_TRACED_SIZES: dict[tuple[str, str], Mapping[str, int] | None] = {}
"""Of the first call that was traced, by text and device: :func:`traced_sizes`."""


@functools.lru_cache(maxsize=1024)
def fused(text: str) -> PassResult:
    """The Spec of a text in its canonical form, where the pass ``fuse`` applies."""
    return run_passes(operators.parsed(text), parse_passes("fuse"))


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
        spec = fused(text).spec
        return spec, choose_lowering(spec, device)


def sizes_of(text: str, *tensors: torch.Tensor) -> Mapping[str, int] | None:
    """The Spec's symbolic sizes for its inputs in order; ``None`` where they do not tell all of them."""
    shapes = [[size_hint(extent) for extent in tensor.shape] for tensor in tensors]
    known = [[extent for extent in shape if extent is not None] for shape in shapes]
    return solved_sizes(operators.parsed(text), known) if known == shapes else None


def traced_sizes(text: str, device: str) -> Mapping[str, int] | None:
    """The sizes of the first call of :func:`computed` with this text that was part of a compiled graph."""
    return _TRACED_SIZES.get((text, device))


def forget_traced_sizes() -> None:
    """Forget all of them."""
    _TRACED_SIZES.clear()


@torch.compiler.allow_in_graph
def computed(text: str, *tensors: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """The outputs of a Spec for its inputs in order. Dynamo does not look inside; what traces below it does."""
    device = tensors[0].device.type
    if is_fake(tensors[0]) and (text, device) not in _TRACED_SIZES:
        # Dynamo's own trace, where a symbol still tells its number
        _TRACED_SIZES[text, device] = sizes_of(text, *tensors)
    return lowered(text, device)[1].run(*tensors)


__all__ = ["computed", "forget_traced_sizes", "fused", "lowered", "sizes_of", "traced_sizes"]
