"""Rotary maps of a Spec in PyTorch, before a lowering of the rest that has no place for them."""

from __future__ import annotations

import dataclasses

import torch

from attncompile.codegen.lowering import Lowering
from attncompile.codegen.pytorch.grid import read_sizes
from attncompile.ir import Spec
from attncompile.ir.prologue import leading_positions, without_positions


def rotating_first(spec: Spec, rest: Lowering) -> Lowering:
    """A lowering of a Spec with leading rotary maps: PyTorch rotates, at least in float32, and ``rest`` goes on.

    Args:
        spec: the whole; rest: of :func:`attncompile.ir.prologue.without_positions` of it.
    """
    names = [value.name for value in spec.inputs]
    inner = [value.name for value in without_positions(spec).inputs]
    positions = leading_positions(spec)
    # lists of blocks read the mask's tensors, and of the others only their sizes, which rotation leaves as they are
    before = {step.out: step.tensor for step in positions}
    places = [names.index(before.get(name, name)) for name in inner]

    def run(*tensors: torch.Tensor, **options: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        known = dict(zip(names, tensors, strict=True))
        sizes = read_sizes(spec, known)
        for step in positions:
            own = known[step.tensor].dtype
            known[step.out] = step.reference(known, sizes, torch.promote_types(own, torch.float32))[step.out].to(own)
        return rest.run(*(known[name] for name in inner), **options)

    lists = rest.lists
    if lists is not None:
        make = lists.make
        lists = dataclasses.replace(lists, make=lambda *tensors: make(*(tensors[place] for place in places)))
    return dataclasses.replace(rest, reason=f"{rest.reason}; queries and keys are rotated first", run=run, lists=lists)


__all__ = ["rotating_first"]
