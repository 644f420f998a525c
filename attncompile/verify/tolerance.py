"""How far a result may be from the truth, derived from its dtype and the computation it replaces."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

PIECE = 1 << 20
"""Elements that are looked at together: a selection of finite ones takes several times the memory of the tensor."""


@dataclass(frozen=True)
class Tolerance:
    """``eager_error + √length · eps · scale``: as good as the plain computation, but for one more reordered
    sum.

    Attributes:
        eager_error: largest error of the plain computation in the same dtype, against float64.
        length: number of terms in the longest sum.
        eps: machine epsilon of the dtype.
        scale: largest magnitude of the true result.
    """

    eager_error: float
    length: int
    eps: float
    scale: float

    @property
    def bound(self) -> float:
        """The largest absolute error allowed."""
        return self.eager_error + math.sqrt(self.length) * self.eps * self.scale


def derive_tolerance(
    reference: torch.Tensor, eager: torch.Tensor, length: int, dtype: torch.dtype | None = None
) -> Tolerance:
    """The tolerance for a candidate that computes in the dtype of ``eager``, or in another one.

    Reordering a sum of ``n`` terms moves it by about ``√n · eps`` of its size (rounding errors of random
    sign), so a candidate gets that much on top of the error that the plain computation makes itself.

    Args:
        reference: the result in float64.
        eager: the plain computation's result in the candidate's dtype.
        length: number of terms in the longest sum: keys, or channels where there are more.
        dtype: the candidate's dtype where ``eager`` has another one. For float64 there is no wider yardstick,
            so the error of float32 is taken, scaled down by the ratio of both epsilons.

    Raises:
        ValueError: when the reference is not float64, or the shapes differ.
    """
    if reference.dtype is not torch.float64:
        raise ValueError(f"the reference is {reference.dtype}, a tolerance is derived against float64")
    if reference.shape != eager.shape:
        raise ValueError(f"the reference has shape {tuple(reference.shape)}, the eager result "
                         f"{tuple(eager.shape)}")
    eps = torch.finfo(dtype or eager.dtype).eps
    return Tolerance(
        eager_error=largest(eager.double() - reference) * eps / torch.finfo(eager.dtype).eps,
        length=length,
        eps=eps,
        scale=largest(reference),
    )


def largest(tensor: torch.Tensor) -> float:
    """The largest magnitude of the finite elements, 0 where there is none."""
    found = 0.0
    for part in tensor.reshape(-1).split(PIECE):
        finite = part[part.isfinite()]
        found = max(found, float(finite.abs().max())) if finite.numel() else found
    return found


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether every element is a finite number."""
    return all(bool(part.isfinite().all()) for part in tensor.reshape(-1).split(PIECE))
