"""The Triton target: generated kernels behind the operator ``attncompile::run``."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from attncompile.codegen.lowering import Lowering
from attncompile.codegen.triton.cache import load
from attncompile.codegen.triton.generate import GeneratedModule, generate
from attncompile.codegen.triton.structure import gives_zeros, why_not_spec
from attncompile.ir import Spec
from attncompile.kernels import operators


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "False")


def why_not(spec: Spec, device: torch.device | str) -> str | None:
    """Why the Spec cannot run as a Triton kernel on the device, or ``None``."""
    device = torch.device(device)
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu" and not _interpreted():
        return "Triton kernels need a GPU; on the CPU there is only Triton's interpreter (TRITON_INTERPRET=1)"
    if device.type not in ("cuda", "cpu"):
        return f"Triton kernels run on CUDA and ROCm devices, not on {device.type}"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"the kernels need compute capability 8.0 or higher, {device} has {major}.{minor}"
    return why_not_spec(spec)


@functools.lru_cache(maxsize=512)
def _generated(text: str) -> GeneratedModule:
    return generate(operators.parsed(text))


def lower(spec: Spec, device: torch.device | str) -> Lowering:
    """The Spec as a generated Triton kernel.

    ``run`` goes through the operator ``attncompile::run``, so it traces, exports and differentiates.

    Raises:
        ValueError: when :func:`why_not` has a reason.
    """
    reason = why_not(spec, device)
    if reason:
        raise ValueError(f"no Triton kernel for {spec.name} on {device}: {reason}")
    module = generate(spec)
    said = "one fused kernel; nothing of the attention map is stored"
    if any(operation.keyword == "quantize" for operation in spec.operations):
        said = "Q·K in int8 with a scale for each block, inside one fused kernel"
    if spec.scan():
        said = "a scan over chunks; the state stays on chip"
    if gives_zeros(spec):
        said += "; rows without any visible key give zeros, where the original gives their mean or NaN"
    run = load(module) if torch.device(device).type == "cpu" else operators.bind(spec)
    return Lowering("triton", module.kernels[-1].name, said, module.source, run)


def _implementation(text: str) -> operators.Implementation:
    return load(_generated(text))


operators.register("cuda", _implementation)
