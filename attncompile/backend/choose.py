"""Which target computes a site on a device."""

from __future__ import annotations

import torch

from attncompile.codegen import pytorch, triton
from attncompile.codegen.lowering import Lowering, Run
from attncompile.codegen.triton.lower import on_hopper
from attncompile.codegen.triton.plain_maps import PlainMap, plain_map, without_mask
from attncompile.ir import Spec
from attncompile.ir.prologue import leading_positions, without_positions

SUPPORTED = ("cpu", "cuda")


def choose_lowering(spec: Spec, device: str) -> Lowering:
    """The target that is expected to be fastest among those that compute the Spec.

    On a CPU that is a PyTorch operator. On CUDA, a map that is dense or plainly causal goes to SDPA, whose cuDNN and
    FlashAttention back ends are ahead of generated Triton there; on a Hopper GPU a generated kernel is ahead of them
    for large maps whose gradients nobody records, and the sizes decide. Every other mask or score would push SDPA off
    those back ends, and gets a generated kernel. Rotary maps that a Spec states are for the kernels that round
    operands; without rounding PyTorch computes them first.

    Raises:
        ValueError: for a device that is not supported.
    """
    if device not in SUPPORTED:
        raise ValueError(f"device {device!r} is not supported; the supported ones are {', '.join(SUPPORTED)}")
    if device == "cpu":
        return pytorch.lower(spec, device)
    generated = triton.why_not(spec, device) is None
    if leading_positions(spec) and not generated:
        return pytorch.rotating_first(spec, choose_lowering(without_positions(spec), device))
    if without_mask(spec) and pytorch.why_not(spec, device, "sdpa") is None:
        plain = plain_map(spec)
        if plain is None or not generated or not on_hopper(torch.device(device)):
            return pytorch.lower(spec, device)
        return _by_size(spec, plain, device)
    return triton.lower(spec, device) if generated else pytorch.lower(spec, device)


def _by_size(spec: Spec, plain: PlainMap, device: str) -> Lowering:
    """SDPA or the generated kernel: decided when the graph is traced if it has fixed sizes, else when it runs."""
    sdpa, generated = pytorch.lower(spec, device, "sdpa").run, triton.lower(spec, device)
    return Lowering(
        generated.target,
        f"sdpa or {generated.operator}",
        f"{generated.reason}; with gradients in SDPA, whose backward pass is faster",
        generated.source,
        _chosen_by_size(plain, sdpa, generated.run),
    )


def _chosen_by_size(plain: PlainMap, sdpa: Run, generated: Run) -> Run:
    def run(*tensors: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        sizes = (*tensors[plain.query].shape, tensors[plain.key].shape[2])
        if recorded or (all(type(size) is int for size in sizes) and plain.faster_in_sdpa(tensors)):
            return sdpa(*tensors)
        return generated(*tensors)

    return run
