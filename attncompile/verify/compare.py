"""Two results compared: how far apart, and an error when that is too far."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from attncompile.verify.tolerance import PIECE, derive_tolerance, largest


@dataclass(frozen=True)
class Comparison:
    """How far a candidate is from the reference.

    Attributes:
        max_abs: largest absolute difference of elements that are finite in both.
        max_rel: ``max_abs`` as a share of the largest reference magnitude (0 where both are 0).
        cosine: cosine of the angle between both, as vectors; 1 where both are 0.
        misplaced: elements where one is finite and the other is not, or both are infinite with different
            signs.
        argmax_agreement: share of rows whose largest element stands at the same place; ``None`` unless asked
            for.
    """

    max_abs: float
    max_rel: float
    cosine: float
    misplaced: int
    argmax_agreement: float | None = None

    def within(self, bound: float) -> bool:
        """Whether nothing is misplaced and the largest difference is at most the bound."""
        return self.misplaced == 0 and self.max_abs <= bound


class MismatchError(ValueError):
    """Two results that should agree do not.

    Attributes:
        comparison: how far they are apart.
    """

    def __init__(self, what: str, comparison: Comparison, bound: float) -> None:
        misplaced = f", and {comparison.misplaced} elements are NaN or infinite on one side only" * bool(
            comparison.misplaced)
        super().__init__(f"{what} is off by {comparison.max_abs:.3g}, where {bound:.3g} is allowed "
                         f"(relative {comparison.max_rel:.3g}, cosine {comparison.cosine:.6f}){misplaced}")
        self.comparison = comparison


def compare(candidate: torch.Tensor, reference: torch.Tensor, *, argmax: bool = False) -> Comparison:
    """Compare two tensors of one shape, in float64.

    Args:
        candidate: the result in question.
        reference: what it should be.
        argmax: also compare where the largest element of the last axis stands (logits).

    Raises:
        ValueError: when the shapes differ.
    """
    if candidate.shape != reference.shape:
        raise ValueError(f"cannot compare shape {tuple(candidate.shape)} with {tuple(reference.shape)}")
    found, wanted = candidate.detach().cpu(), reference.detach().cpu()
    max_abs, scale, product, squares, misplaced = 0.0, 0.0, 0.0, [0.0, 0.0], 0
    # in pieces: results of large models, widened as a whole, would be several times as large as their weights
    for one, other in zip(found.reshape(-1).split(PIECE), wanted.reshape(-1).split(PIECE), strict=True):
        one, other = one.double(), other.double()
        both = one.isfinite() & other.isfinite()
        same = (one == other) | (one.isnan() & other.isnan())
        left, right = one[both], other[both]
        max_abs, scale = max(max_abs, largest(left - right)), max(scale, largest(other))
        product += float(left @ right)
        squares = [total + float(side @ side) for total, side in zip(squares, (left, right), strict=True)]
        misplaced += int((~both & ~same).sum())
    norms = math.sqrt(squares[0]) * math.sqrt(squares[1])
    return Comparison(
        max_abs=max_abs,
        max_rel=max_abs / scale if scale else (0.0 if max_abs == 0 else float("inf")),
        cosine=product / norms if norms else float(squares[0] == squares[1]),
        misplaced=misplaced,
        argmax_agreement=float((found.argmax(-1) == wanted.argmax(-1)).double().mean()) if argmax else None,
    )


def require_within(candidate: torch.Tensor, reference: torch.Tensor, bound: float, what: str) -> Comparison:
    """Compare, and raise where the difference is above a bound that the caller has derived.

    Raises:
        MismatchError: naming ``what`` and both numbers.
    """
    found = compare(candidate, reference)
    if not found.within(bound):
        raise MismatchError(what, found, bound)
    return found


def require_as_good_as_eager(
    candidate: torch.Tensor, reference: torch.Tensor, eager: torch.Tensor, length: int, what: str
) -> Comparison:
    """Compare, and raise where the candidate is worse than the plain computation in its dtype.

    Args:
        candidate: the result in question.
        reference: the result in float64.
        eager: the plain computation in the candidate's dtype.
        length: see :func:`attncompile.verify.tolerance.derive_tolerance`.
        what: name of the candidate for the message.

    Raises:
        MismatchError: when the candidate is further off than the derived tolerance.
    """
    return require_within(candidate, reference, derive_tolerance(reference, eager, length).bound, what)
