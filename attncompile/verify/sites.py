"""A site's replacement against its Spec, on fresh random inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from attncompile.ir import Attend, Kind, Quantize, Scan, Spec
from attncompile.ir.sample import example_sizes, random_tensors
from attncompile.ir.some_rows import interpret_in_pieces, of_rows, rows_that_fit
from attncompile.ir.types import DTYPES, NAMES, element_kind
from attncompile.verify.certificate import SiteCase, SiteCertificate
from attncompile.verify.compare import compare
from attncompile.verify.tolerance import derive_tolerance, largest

Run = Callable[..., "torch.Tensor | tuple[torch.Tensor, ...]"]
Masks = Literal["ones", "random", "empty"]


@dataclass(frozen=True)
class Draw:
    """How inputs are drawn.

    Attributes:
        length: the shortest axis length; other lengths are a little longer, so that ``I ≠ J``.
        masks: captured integers and truth values: all ``ones``, ``random`` 0 and 1, or random with the first
            batch row ``empty``, so that no key of it is visible.
        seed: of the random numbers.
        batch: rows of the batch.
    """

    length: int
    masks: Masks
    seed: int
    batch: int = 2


LARGEST = 10**8
"""Elements of an attention map, over batch rows and heads, up to which all of one is evaluated in float64; of a larger
one some rows are."""

# One position, lengths that divide nothing, several blocks of a kernel; padding of every kind.
DRAWS = (
    Draw(1, "ones", 0),
    Draw(7, "random", 1),
    Draw(33, "ones", 2),
    Draw(70, "random", 3),
    Draw(150, "empty", 4),
)


def draw_tensors(
    spec: Spec, sizes: Mapping[str, int], draw: Draw, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The inputs of one draw, by name; what is captured holds numbers of its own type."""
    tensors = random_tensors(spec, sizes, draw.seed, dtype)
    for value in spec.captured():
        if element_kind(value.type.dtype) is Kind.FLOAT:
            tensors[value.name] = tensors[value.name].to(DTYPES[value.type.dtype]).to(dtype)
        elif draw.masks == "ones":
            tensors[value.name] = torch.ones_like(tensors[value.name])
        elif draw.masks == "empty" and tensors[value.name].dim():
            tensors[value.name][0] = 0
    return tensors


def longest_sum(spec: Spec, tensors: Mapping[str, torch.Tensor]) -> int:
    """Number of terms in the longest sum: keys, or channels where there are more."""
    attention = [operation for operation in spec.operations if isinstance(operation, Attend | Scan)]
    named = {name for operation in attention for name in (operation.query, operation.key)}
    extents = [extent for name in named if name in tensors for extent in tensors[name].shape[2:]]
    return max(extents, default=max((tensor.numel() for tensor in tensors.values()), default=1))


def check_site(
    name: str,
    spec: Spec,
    run: Run,
    *,
    operator: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    original: Spec | None = None,
    draws: Sequence[Draw] = DRAWS,
    sizes: Mapping[str, int] | None = None,
) -> SiteCertificate:
    """Run a lowering on random inputs and compare it with the Spec in float64, of a large map on some of its rows.

    Args:
        name: the site.
        spec: what the lowering is to compute.
        run: the lowering; takes the tensors in the order of ``spec.inputs``.
        operator: what computes it, for the record.
        dtype: dtype of the real inputs.
        device: where it runs.
        original: the Spec before lossy passes; its distance is recorded too, and is not judged.
        draws: how the inputs are drawn.
        sizes: symbolic sizes that are not free, such as a length that a model fixes.

    Returns:
        The site's entry of the certificate; ``passed`` says whether every draw was within its tolerance.
    """
    return SiteCertificate(
        site=name,
        spec=str(spec),
        fingerprint=spec.fingerprint(),
        status="checked",
        operator=operator,
        cases=tuple(_check(spec, run, dtype, device, original, draw, sizes or {}) for draw in draws),
    )


@dataclass(frozen=True)
class _Yardstick:
    """What of a Spec is evaluated, and which of a replacement's results that is.

    Attributes:
        spec: the Spec, or the same for some queries.
        tensors: its inputs.
        rows: which queries; ``None`` is all of them.
    """

    spec: Spec
    tensors: Mapping[str, torch.Tensor]
    rows: torch.Tensor | None

    def interpret(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """The definition on these inputs, in a float dtype."""
        return interpret_in_pieces(self.spec, self.tensors, dtype)

    def of(self, result: torch.Tensor) -> torch.Tensor:
        """The part of an output ``[b,h,i,…]`` that is evaluated."""
        return result if self.rows is None else result[:, :, self.rows.to(result.device)]


def _yardstick(spec: Spec, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int], seed: int) -> _Yardstick:
    count = rows_that_fit(spec, sizes, LARGEST)
    return _Yardstick(*of_rows(spec, tensors, count, seed)) if count else _Yardstick(spec, tensors, None)


def _check(spec: Spec, run: Run, dtype: torch.dtype, device: torch.device | str, original: Spec | None,
           draw: Draw, fixed: Mapping[str, int]) -> SiteCase:
    sizes = example_sizes(spec, draw.length)
    sizes |= ({"B": draw.batch} if "B" in sizes else {}) | dict(fixed)
    tensors = draw_tensors(spec, sizes, draw, dtype)
    result = run(*(tensors[value.name].to(device) for value in spec.inputs))
    part = _yardstick(spec, tensors, sizes, draw.seed)
    candidates = tuple(part.of(one) for one in (result if isinstance(result, tuple) else (result,)))
    plain_dtype = torch.float32 if dtype is torch.float64 else dtype
    references, eager = (part.interpret(kind) for kind in (torch.float64, plain_dtype))
    length = longest_sum(spec, tensors)
    found = [compare(made, reference) for made, reference in zip(candidates, references, strict=True)]
    edges = _moved_by_edges(part, references)
    bounds = [derive_tolerance(reference, plain.to(plain_dtype), length, dtype).bound + edge
              for reference, plain, edge in zip(references, eager, edges, strict=True)]
    # the output that comes nearest to its bound, or is furthest beyond it
    worst = max(range(len(found)), key=lambda n: (found[n].misplaced, found[n].max_abs - bounds[n]))
    change = None
    if original is not None:
        whole = _yardstick(original, tensors, sizes, draw.seed)
        before = whole.interpret(torch.float64)
        change = max(compare(after, wanted).max_rel for after, wanted in zip(references, before, strict=True))
    return SiteCase(
        seed=draw.seed, masks=draw.masks, sizes=dict(sizes), dtype=NAMES[dtype],
        max_abs=found[worst].max_abs, max_rel=found[worst].max_rel, misplaced=found[worst].misplaced,
        tolerance=bounds[worst], change=change,
        passed=all(one.within(bound) for one, bound in zip(found, bounds, strict=True)),
    )


EDGES = 4
"""Times that inputs are moved, to see what a code at an edge does."""


def _moved_by_edges(part: _Yardstick, references: Sequence[torch.Tensor]) -> list[float]:
    """How far each output moves where computed numbers are rounded to codes: by a step where a number lies at an edge.

    Numbers that are rotated, or that a mean is subtracted from, are known up to the rounding of float32. Where one lies
    that near the middle of two codes, either may be taken, and neither is wrong. So the inputs are moved by as much, a
    few times, and outputs may move as far as they then do. Codes of inputs themselves have no such freedom.
    """
    given = {value.name for value in part.spec.inputs}
    steps = [step for step in part.spec.operations if isinstance(step, Quantize)]
    if all(step.tensor in given and not step.smooth for step in steps):
        return [0.0] * len(references)
    generator = torch.Generator().manual_seed(0)
    apart = [0.0] * len(references)
    for _ in range(EDGES):
        moved = dict(part.tensors)
        for name, tensor in part.tensors.items():
            if tensor.is_floating_point():
                noise = 2 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 1
                moved[name] = tensor.double() * (1 + 4 * torch.finfo(torch.float32).eps * noise)
        results = interpret_in_pieces(part.spec, moved, torch.float64)
        changes = (result - reference for result, reference in zip(results, references, strict=True))
        apart = [max(most, largest(change)) for most, change in zip(apart, changes, strict=True)]
    return apart


def refused_site(
    name: str, reason: str, spec: Spec | None = None, *, rolled_back: bool = False
) -> SiteCertificate:
    """The entry of a site that was left as it was, or ``rolled_back`` to that."""
    text, fingerprint = (str(spec), spec.fingerprint()) if spec else ("", "")
    return SiteCertificate(site=name, spec=text, fingerprint=fingerprint,
                           status="rolled back" if rolled_back else "unchanged", operator="original", reason=reason)


__all__ = [
    "DRAWS",
    "LARGEST",
    "Draw",
    "check_site",
    "draw_tensors",
    "longest_sum",
    "refused_site",
]
