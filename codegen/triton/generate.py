"""From a Spec to a Triton module: kernel, launcher and documentation in one self-contained file."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

from attncompile.codegen.triton.decode import decode_module
from attncompile.codegen.triton.dense import dense_module
from attncompile.codegen.triton.module import Kernel
from attncompile.codegen.triton.moved import regrouped_parts
from attncompile.codegen.triton.regroup import around
from attncompile.codegen.triton.scan import scan_module
from attncompile.codegen.triton.storage import reads_storage
from attncompile.codegen.triton.structure import is_wide, why_not_spec
from attncompile.codegen.triton.tiles import TunedTile
from attncompile.ir import Spec


@dataclass(frozen=True)
class GeneratedModule:
    """Source of a Triton module.

    Attributes:
        name: a valid module name, the same for equal computations.
        source: the text; its function ``attend`` takes the Spec's inputs in order and returns its outputs.
        kernels: what it launches.
    """

    name: str
    source: str
    kernels: tuple[Kernel, ...]

    @property
    def digest(self) -> str:
        """Hash of the text."""
        return hashlib.sha256(self.source.encode()).hexdigest()


def generate(spec: Spec, tuned: TunedTile | None = None) -> GeneratedModule:
    """The Triton module of a Spec.

    The same Spec gives the same text; the Spec's name is no part of it.

    Args:
        spec: one attention or one scan.
        tuned: a tile in the place of the one that :mod:`attncompile.codegen.triton.tiles` has.

    Raises:
        ValueError: when there is no kernel for the Spec; says why.
    """
    reason = why_not_spec(spec)
    if reason:
        raise ValueError(f"no Triton kernel for {spec.name}: {reason}")
    spec = dataclasses.replace(spec, name="attention")
    moved = regrouped_parts(spec)
    if moved:
        inner = generate(moved.attention, tuned)
        source, moving = around(spec, moved, inner.source)
        kernels = (*moving, *inner.kernels)
    else:
        by_parts = reads_storage(spec) or is_wide(spec)
        make = scan_module if spec.scan() else decode_module if by_parts else dense_module
        source, kernels = make(spec, tuned)
    return GeneratedModule(f"{spec.operations[-1].keyword}_{spec.fingerprint()}", source, kernels)


__all__ = ["GeneratedModule", "Kernel", "generate"]
