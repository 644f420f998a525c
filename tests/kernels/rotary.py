"""Codes of rotated tensors, element by element: those of the definition, except where rounding decides."""

from __future__ import annotations

from typing import Any

import torch

from attncompile.codegen.triton import generate
from attncompile.codegen.triton.cache import load_module
from attncompile.codegen.triton.rotary import maps
from attncompile.codegen.triton.structure import dense
from attncompile.ir import Position, Quantize
from attncompile.ir.types import DTYPES, bind_sizes
from tests.cases import Case
from tests.kernels.comparison import poisoned_inputs, poisoned_memory
from tests.kernels.narrow import moved_codes, rotation_error


def wrong_codes(case: Case, dtype: torch.dtype, device: str = "cpu") -> list[dict[str, Any]]:
    """For each rounded tensor: elements that may not be as they are, and the share of those that may move at all.

    The yardstick is the definition in float64, on the kernel's own inputs; :func:`moved_codes` says how far an element
    may be from it. Rows of the inputs have NaN between them.
    """
    spec = case.spec
    tensors = {name: tensor.to(device) for name, tensor in case.tensors(0, dtype).items()}
    sizes = dict(bind_sizes({value.name: value.type for value in spec.inputs}, tensors))
    given = dict(zip((value.name for value in spec.inputs), poisoned_inputs(spec, tensors), strict=True))
    module, found = load_module(generate(spec)), []
    rotations = {step.out: step for step in spec.operations if isinstance(step, Position)}
    for step in (step for step in spec.operations if isinstance(step, Quantize) and step.tensor in rotations):
        position = rotations[step.tensor]
        chosen = next(each for each in maps(spec, dense(spec)) if step.tensor in each.results)
        function = getattr(module, f"rotate_quantize{chosen.skeleton.suffix}")
        arguments = [*(given[name] for name in chosen.tensors), *(sizes[name] for name in chosen.sizes)]
        with poisoned_memory():
            codes, scale = function(given[position.tensor], *arguments, DTYPES[step.dtype], step.block, step.smooth)
        exact = position.reference(tensors, sizes, torch.float64)[position.out]
        wanted = step.reference({**tensors, step.tensor: exact}, sizes, torch.float64)[step.out]
        length = exact.shape[2]
        got = codes.double() * scale.double().repeat_interleave(step.block, dim=2)[:, :, :length, None]
        allowed = moved_codes(step, exact, rotation_error(position, tensors, sizes))
        single = torch.finfo(torch.float32).eps  # a scale of int8 is stored in float32
        wrong = ~((got - wanted).abs() <= allowed + single * wanted.abs())
        step_of = wanted.abs().amax() / 448  # smaller than any step that a code may take
        moving = (allowed > step_of).double().mean()
        found.append({"tensor": step.tensor, "wrong": int(wrong.sum()), "moving": float(moving)})
    return found
