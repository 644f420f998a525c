"""The ways to compute a Spec on a GPU that :mod:`attncompile.codegen.triton.tuning` tries, and the one that it kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from attncompile.codegen import pytorch
from attncompile.codegen.triton.cache import load, load_module
from attncompile.codegen.triton.candidates import KernelName, tiles_to_try
from attncompile.codegen.triton.decode import FEW_QUERIES, LONG_CACHE
from attncompile.codegen.triton.generate import GeneratedModule, Kernel, generate
from attncompile.codegen.triton.plain_maps import plain_map
from attncompile.codegen.triton.tiles import TunedTile
from attncompile.codegen.triton.tuned import Choice
from attncompile.codegen.triton.tuning import Alternative, Run
from attncompile.ir import Quantize, Spec
from attncompile.ir.prologue import input_behind
from attncompile.kernels.hopper import HopperTile
from attncompile.kernels.operators import parsed


def made_by(text: str, choice: Choice, length: int, otherwise: Run) -> Run:
    """The function that a choice stands for.

    Args:
        text: of the Spec.
        choice: what to compute it by.
        length: about how many queries there are, for the table of Hopper tiles.
        otherwise: computes it where the kernel in Gluon cannot read the tensors where they lie.

    Raises:
        ValueError: when there is no such kernel.
    """
    if choice.target == "sdpa":
        return pytorch.lower(parsed(text), "cuda", "sdpa").run
    generated = _module_of(text, choice, length)
    if choice.target == "triton":
        return load(generated)
    module = load_module(generated)

    def run(*tensors: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        try:
            found: torch.Tensor | tuple[torch.Tensor, ...] = module.attend(*tensors)
        except module.Refused:
            return otherwise(*tensors)
        return found

    return run


def _module_of(text: str, choice: Choice, length: int) -> GeneratedModule:
    if choice.target == "triton":
        return generate(parsed(text), choice.tile)
    # here, because that package is made from this one's parts
    from attncompile.codegen import gluon

    return gluon.generate_fastest(parsed(text), choice.hopper, queries=length)


def alternatives(
    text: str,
    module: GeneratedModule,
    tensors: Sequence[torch.Tensor],
    length: int,
    *,
    runs: Literal["triton", "gluon", "sdpa"],
    hopper: HopperTile | None = None,
) -> tuple[Alternative, ...]:
    """What to try for a Spec's tensors beside what runs without tuning, the most promising first.

    Args:
        text: of the Spec.
        module: in plain Triton, as the table says.
        tensors: the Spec's inputs in order.
        length: about how many queries there are, for the table of Hopper tiles.
        runs: what computes it without tuning.
        hopper: the table's tile of the kernel in Gluon, where there is one for these tensors.
    """
    spec = parsed(text)
    plain = load(module)
    choices = [Choice("triton")]
    if plain_map(spec) is not None and pytorch.why_not(spec, "cuda", "sdpa") is None:
        choices.append(Choice("sdpa"))
    if hopper is not None:
        from attncompile.codegen import gluon

        choices.insert(0, Choice("gluon"))
        choices += [Choice("gluon", hopper=tile) for tile in gluon.hopper_tiles_to_try(spec, hopper)]
    choices += _plain_choices(spec, module, tensors)

    def alternative(choice: Choice) -> Alternative:
        module_of = None if choice.target == "sdpa" else lambda: _module_of(text, choice, length)
        return Alternative(choice, lambda: made_by(text, choice, length, plain), module_of)

    return tuple(alternative(choice) for choice in choices if choice != Choice(runs))


def _plain_choices(spec: Spec, module: GeneratedModule, tensors: Sequence[torch.Tensor]) -> Iterator[Choice]:
    """Tiles of the kernel in plain Triton that runs for these tensors."""
    element = next((str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()), "")
    name, kernel = _kernel_that_runs(module, *_lengths(spec, tensors))
    if element not in kernel.tiles:
        return
    rounds = any(isinstance(step, Quantize) for step in spec.operations)
    for tile in tiles_to_try(name, kernel.tiles[element], fixed=rounds):
        yield Choice("triton", tile=TunedTile(name, element, tile))


def _kernel_that_runs(module: GeneratedModule, queries: int, keys: int) -> tuple[KernelName, Kernel]:
    """The kernel of a module in plain Triton that computes so many queries over so many keys."""
    kernels = {kernel.name: kernel for kernel in module.kernels}
    if "scan_forward" in kernels:
        return "scan", kernels["scan_forward"]
    few = queries <= FEW_QUERIES and keys >= LONG_CACHE
    if "attend_split" in kernels and (few or "attend_forward" not in kernels):
        return "decode", kernels["attend_split"]
    return "dense", kernels["attend_forward"]


def _lengths(spec: Spec, tensors: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Queries and keys of a call, as far as an input has them; zero otherwise."""
    attend = spec.attend() or spec.scan()
    shapes = {value.name: tensor.shape for value, tensor in zip(spec.inputs, tensors, strict=True)}
    names = [input_behind(spec, name) for name in (attend.query, attend.key)] if attend else []
    found = [shapes[name][2] if name in shapes else 0 for name in names] or [0, 0]
    return found[0], found[1]


__all__ = ["alternatives", "made_by"]
