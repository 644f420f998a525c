"""Execution providers of ONNX Runtime: the names that people give, and what they stand for."""

from __future__ import annotations

from collections.abc import Mapping

import onnxruntime

from attncompile.codegen.onnx.capabilities import Provider
from attncompile.frontends.errors import InputError

SHORT: Mapping[str, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""Names that stand for the provider that is meant most often."""

GPUS = frozenset(
    {
        "CUDAExecutionProvider",
        "TensorrtExecutionProvider",
        "NvTensorRTRTXExecutionProvider",
        "ROCMExecutionProvider",
        "MIGraphXExecutionProvider",
    }
)
"""Providers for which operators are chosen as for CUDA; for all others as for the CPU, which runs what they lack."""


IN_FULL: Mapping[str, Mapping[str, str]] = {"CUDAExecutionProvider": {"use_tf32": "0"}}
"""Options with which a provider computes in the dtypes that a model says."""


def named_provider(provider: str) -> str:
    """The whole name of a provider: ``cpu`` is ``CPUExecutionProvider``.

    Raises:
        InputError: when ONNX Runtime knows no such provider.
    """
    known = {name.lower(): name for name in (*onnxruntime.get_all_providers(), *available())}
    found = known.get(SHORT.get(provider.lower(), provider).lower())
    if found is None:
        raise InputError(f"ONNX Runtime has no provider {provider!r}", _installed(), _advice())
    return found


def short_provider(provider: str) -> str:
    """The short name of a provider where it has one, else the whole one."""
    whole = named_provider(provider)
    return next((short for short, name in SHORT.items() if name == whole), whole)


def session_providers(provider: str) -> tuple[str, ...]:
    """The providers of a session, the CPU last, which runs what another has no kernel for.

    Raises:
        InputError: when the provider is not known, or not in the installed ONNX Runtime.
    """
    name = named_provider(provider)
    if name not in available():
        raise InputError(f"{name} is not in the installed ONNX Runtime", _installed(), _advice())
    behind = ("CUDAExecutionProvider",) if name == "TensorrtExecutionProvider" else ()
    return tuple(dict.fromkeys((name, *(one for one in behind if one in available()), "CPUExecutionProvider")))


def kernels_of(provider: str) -> Provider:
    """Whose row of the capability table holds for a provider."""
    return "cuda" if named_provider(provider) in GPUS else "cpu"


def available() -> tuple[str, ...]:
    """Providers of the installed ONNX Runtime."""
    return tuple(onnxruntime.get_available_providers())


def _installed() -> str:
    return f"onnxruntime {onnxruntime.__version__}"


def _advice() -> str:
    return f"it has {', '.join(available())}; choose one of them, or install another build of ONNX Runtime"


__all__ = [
    "GPUS",
    "IN_FULL",
    "SHORT",
    "available",
    "kernels_of",
    "named_provider",
    "session_providers",
    "short_provider",
]
