"""Which target computes a site on a device."""

from __future__ import annotations

from attncompile.codegen import pytorch, triton
from attncompile.codegen.lowering import Lowering
from attncompile.ir import Spec, simplify
from attncompile.ir.blocks import key_bounds
from attncompile.ir.expr import TRUE, Index, loads

SUPPORTED = ("cpu", "cuda")


def choose_lowering(spec: Spec, device: str) -> Lowering:
    """The target that is expected to be fastest among those that compute the Spec.

    On a CPU that is a PyTorch operator. On CUDA, a map that is dense or plainly causal goes to SDPA, whose cuDNN and
    FlashAttention back ends are ahead of generated Triton there; every other mask or score would push SDPA off those
    back ends, and gets a generated kernel.

    Raises:
        ValueError: for a device that is not supported.
    """
    if device not in SUPPORTED:
        raise ValueError(f"device {device!r} is not supported; the supported ones are {', '.join(SUPPORTED)}")
    if device == "cpu" or (_fast_in_sdpa(spec) and pytorch.why_not(spec, device, "sdpa") is None):
        return pytorch.lower(spec, device)
    if triton.why_not(spec, device) is None:
        return triton.lower(spec, device)
    return pytorch.lower(spec, device)


def _fast_in_sdpa(spec: Spec) -> bool:
    """Whether SDPA computes the Spec without a mask tensor."""
    attend = spec.attend()
    if attend is None or len(spec.operations) != 1 or loads(attend.score):
        return False
    if attend.mask == TRUE:
        return True
    bounds = key_bounds(attend.mask)
    types = spec.types()
    square = types[attend.query].sizes[2] == types[attend.key].sizes[2]
    return square and not bounds.rest and not bounds.lower and bounds.upper == (simplify(Index("i") + 1),)
