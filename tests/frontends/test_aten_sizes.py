"""Sizes that must agree, or an operation would fail: one symbol for both."""

from __future__ import annotations

import warnings

import pytest
import torch

import attncompile
from attncompile.backend import FallbackWarning
from attncompile.frontends.aten_sizes import solved
from attncompile.ir import Expr, Size, simplify

A, B, C = (Size(name) for name in "ABC")


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (A, B, (B, A)),
        (6 * A, 6 * B, (B, A)),
        (6 * A, 2 * B, (B, 3 * A)),
        (A + 1, B + 1, (B, A)),
        (A + 1, B + 3, (B, A - 2)),
        (A + C, 2 * B + C, (A, 2 * B)),
        (A + B, B + C, (C, A)),
        (A * B + 1, B * C + 1, None),
        (A // 2 + 1, A + 1, None),
        (A + 1, A + 1, None),
        (2 * A, 2 * B + 1, None),
    ],
    ids=str,
)
def test_two_sizes_that_must_be_equal(one: Expr, other: Expr, expected: tuple[Expr, Expr] | None) -> None:
    found = solved(simplify(one), simplify(other))
    assert found == (expected and (expected[0], simplify(expected[1])))


def test_cached_keys_and_values_whose_lengths_have_symbols_of_their_own() -> None:
    """Dynamo gives them two where it has seen other models before, and the fused operator does not join them."""

    def decode(query: torch.Tensor, cached: tuple[torch.Tensor, ...], new: torch.Tensor) -> torch.Tensor:
        key, value = (torch.cat([kept, new], dim=-2) for kept in cached)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    def call(length: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]:
        cached = tuple(torch.randn(2, 3, length, 8) for _ in range(2))
        for tensor in cached:
            torch._dynamo.mark_dynamic(tensor, 2)
        return torch.randn(2, 3, 1, 8), cached, torch.randn(2, 3, 1, 8)

    compiled = attncompile.compile(decode, rest="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for length in (9, 14):
            arguments = call(length)
            torch.testing.assert_close(compiled(*arguments), decode(*arguments))
