"""Random inputs of a Spec, on which two computations are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from attncompile.ir.expr import Const, Size, symbols
from attncompile.ir.operators import Kind
from attncompile.ir.scan import Scan, feature_map
from attncompile.ir.simplify import simplify
from attncompile.ir.spec import Spec
from attncompile.ir.types import DTYPES, concrete, element_kind


def symbolic_sizes(spec: Spec) -> tuple[str, ...]:
    """Names of the sizes in the types of a Spec's inputs, in the order they stand."""
    found = [symbol.name for value in spec.inputs for size in value.type.sizes
             for symbol in sorted(symbols(size), key=str) if isinstance(symbol, Size)]
    return tuple(dict.fromkeys(found))


def example_sizes(spec: Spec, length: int = 7) -> dict[str, int]:
    """A value for every symbolic size: batch ``B`` is 2, the others are different lengths from ``length`` on, or from
    the next one on with which every axis has an element (``I − 37`` has none at 37, ``B // (I // 16)`` is none at 7).
    """
    names = symbolic_sizes(spec)
    others = [name for name in names if name != "B"]

    def at(first: int) -> dict[str, int]:
        lengths = {name: first + 4 * number for number, name in enumerate(others)}
        return {name: lengths.get(name, 2) for name in names}

    def filled(first: int) -> bool:
        sizes = at(first)
        try:
            return all(concrete(size, sizes) > 0 for value in spec.inputs for size in value.type.sizes)
        except RuntimeError:  # torch's for a division by zero
            return False

    return at(next((first for first in range(length, length + LONGEST_SHIFT) if filled(first)), length))


LONGEST_SHIFT = 4096
"""How many lengths are tried for one at which no axis of a Spec is empty."""


def _unchanged(drawn: torch.Tensor) -> torch.Tensor:
    return drawn


def bounded_draws(spec: Spec) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """What standard normal numbers become, element by element, for inputs that have a range of their own.

    A scan whose steps differ has them: a state that grows at each step would soon leave nothing to compare. Gates are
    negative, and the delta rule is left a contraction: keys have a length of about 1, rates lie between 0 and 1,
    divided by the squared length of the keys' features where that is more.
    """
    found: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    types = spec.types()
    for scan in (operation for operation in spec.operations if isinstance(operation, Scan)):
        if scan.gate:
            found[scan.gate] = lambda drawn: -0.3 * drawn.abs()
        if scan.rate:
            size = simplify(types[scan.key].sizes[3])
            channels = float(size.value) if isinstance(size, Const) else 100.0
            shorter = channels**-0.5
            squared = channels * float(feature_map(scan.feature, _QUANTILES * shorter).square().mean())
            smaller = 1 / max(1.0, squared)
            found[scan.key] = lambda drawn, shorter=shorter: drawn * shorter  # type: ignore[misc]
            found[scan.rate] = lambda drawn, smaller=smaller: torch.sigmoid(drawn) * smaller  # type: ignore[misc]
    return found


_QUANTILES = torch.special.ndtri((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
"""Of the standard normal distribution: a mean over them is one over it."""


def random_tensors(
    spec: Spec,
    sizes: Mapping[str, int],
    seed: int = 0,
    dtype: torch.dtype | None = None,
    ranges: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, torch.Tensor]:
    """One random tensor for each input of a Spec, by name.

    Real tensors are standard normal, but for those of :func:`bounded_draws`. Truth values and integers are masks: 0
    or 1, a quarter of them 0, unless ``ranges`` gives ``low ≤ x < high`` for the name. Nothing keeps a row from losing
    all its keys.

    Args:
        spec: whose inputs are wanted.
        sizes: a value for every symbolic size.
        seed: of the random numbers.
        dtype: float dtype of the real tensors; each one's own when ``None``.
        ranges: integer ranges by tensor name.
    """
    generator = torch.Generator().manual_seed(seed)
    bounded = bounded_draws(spec)
    made: dict[str, torch.Tensor] = {}
    for value in spec.inputs:
        shape = [concrete(size, sizes) for size in value.type.sizes]
        if element_kind(value.type.dtype) is Kind.FLOAT:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            drawn = bounded.get(value.name, _unchanged)(drawn)
            made[value.name] = drawn.to(dtype or DTYPES[value.type.dtype])
        elif ranges and value.name in ranges:
            drawn = torch.randint(*ranges[value.name], shape, generator=generator)
            made[value.name] = drawn.to(DTYPES[value.type.dtype])
        else:
            made[value.name] = (torch.rand(shape, generator=generator) < 0.75).to(DTYPES[value.type.dtype])
    return made
