"""Gluon kernels for Hopper GPUs (compute capability 9.0): what plain Triton cannot say there."""

from attncompile.codegen.gluon import backward
from attncompile.codegen.gluon.backward import HopperGradients, generate_backward, why_not_backward
from attncompile.codegen.gluon.candidates import hopper_tiles_to_try
from attncompile.codegen.gluon.generate import HopperModule, generate, generate_fastest
from attncompile.codegen.gluon.structure import arranged, slower, why_not_installed, why_not_spec

__all__ = [
    "HopperGradients",
    "HopperModule",
    "arranged",
    "backward",
    "generate",
    "generate_backward",
    "generate_fastest",
    "hopper_tiles_to_try",
    "slower",
    "why_not_backward",
    "why_not_installed",
    "why_not_spec",
]
