"""Triton kernels: one readable, self-contained module for each class of Specs."""

from attncompile.codegen.triton.cache import load
from attncompile.codegen.triton.generate import GeneratedModule, generate
from attncompile.codegen.triton.lower import lower, why_not

__all__ = ["GeneratedModule", "generate", "load", "lower", "why_not"]
