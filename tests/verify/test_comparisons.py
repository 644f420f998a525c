"""Comparers raise, and tolerances mean something: each has a canary that must fail."""

from __future__ import annotations

import math

import pytest
import torch

from attncompile.verify import (
    MismatchError,
    compare,
    derive_tolerance,
    require_as_good_as_eager,
    require_within,
)


def test_numbers_by_hand() -> None:
    found = compare(torch.tensor([1.0, 2.0, -4.5]), torch.tensor([1.0, 2.0, -4.0]))
    assert (found.max_abs, found.max_rel, found.misplaced) == (0.5, 0.125, 0)
    assert found.cosine == pytest.approx(23 / math.sqrt(25.25 * 21))
    assert found.argmax_agreement is None


def test_argmax_agreement() -> None:
    logits = torch.tensor([[0.0, 1.0], [3.0, 2.0]])
    assert compare(logits, logits.flip(-1), argmax=True).argmax_agreement == 0.0
    assert compare(logits, torch.tensor([[0.0, 1.0], [1.0, 2.0]]), argmax=True).argmax_agreement == 0.5


@pytest.mark.parametrize(("left", "right", "misplaced"), [
    ([math.nan, 1.0], [math.nan, 1.0], 0),
    ([math.nan, 1.0], [0.0, 1.0], 1),
    ([0.0, 1.0], [math.nan, 1.0], 1),
    ([math.inf, 1.0], [math.inf, 1.0], 0),
    ([math.inf, 1.0], [-math.inf, 1.0], 1),
])
def test_nan_and_infinity_have_their_places(left: list[float], right: list[float], misplaced: int) -> None:
    found = compare(torch.tensor(left), torch.tensor(right))
    assert found.misplaced == misplaced and found.max_abs == 0.0
    if misplaced:
        with pytest.raises(MismatchError, match="NaN or infinite on one side only"):
            require_within(torch.tensor(left), torch.tensor(right), 1.0, "this")


def test_canary_a_difference_raises() -> None:
    wanted = torch.linspace(-1, 1, 100, dtype=torch.float64)
    require_within(wanted + 0.01, wanted, 0.011, "near")
    with pytest.raises(MismatchError, match=r"far is off by 0.02, where 0.011 is allowed"):
        require_within(wanted + 0.02, wanted, 0.011, "far")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_canary_a_result_worse_than_eager_raises(dtype: torch.dtype) -> None:
    left, right = torch.randn(8, 300, dtype=dtype), torch.randn(300, 8, dtype=dtype)
    reference, eager = left.double() @ right.double(), left @ right
    require_as_good_as_eager(eager, reference, eager, 300, "the plain product")
    require_as_good_as_eager(left.flip(1) @ right.flip(0), reference, eager, 300, "a reordered product")
    worse = reference + 3 * derive_tolerance(reference, eager, 300).bound
    with pytest.raises(MismatchError, match="a wrong product is off"):
        require_as_good_as_eager(worse, reference, eager, 300, "a wrong product")


def test_the_bound_grows_as_stated() -> None:
    reference = torch.tensor([2.0], dtype=torch.float64)
    eager = torch.tensor([2.5])
    eps = torch.finfo(torch.float32).eps
    assert derive_tolerance(reference, eager, 16).bound == 0.5 + 4 * eps * 2
    ratio = torch.finfo(torch.float64).eps / eps
    assert derive_tolerance(reference, eager, 16, torch.float64).eager_error == pytest.approx(0.5 * ratio)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"cannot compare shape \(2,\) with \(3,\)"):
        compare(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"the reference is torch\.float32"):
        derive_tolerance(torch.zeros(2), torch.zeros(2), 1)
    with pytest.raises(ValueError, match="has shape"):
        derive_tolerance(torch.zeros(2, dtype=torch.float64), torch.zeros(3), 1)
