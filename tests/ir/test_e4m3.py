"""Rounding to float8 e4m3, and Specs that ask for it."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch

from attncompile.ir import Normalizer, Quantize, parse_spec, print_spec
from attncompile.ir.e4m3 import LARGEST, LEAST_EXPONENT, e4m3, power_scale, weight_rounding

NUMBERS = torch.tensor(
    sorted({s * (8 + m) / 8 * 2.0**e for s, m, e in itertools.product((-1, 1), range(8), range(-6, 9))}
           | {s * m * 2.0**-9 for s, m in itertools.product((-1, 1), range(8))}),
    dtype=torch.float64,
)  # fmt: skip
"""What the format holds, and ±480, which it does not."""


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_e4m3_gives_the_nearest_number(dtype: torch.dtype) -> None:
    held = NUMBERS[NUMBERS.abs() <= LARGEST]
    between = (held[1:] + held[:-1]) / 2
    x = torch.cat([held, between, 500 * torch.randn(500, dtype=torch.float64), torch.tensor([1e9, -1e9])]).to(dtype)
    found = e4m3(x)
    assert found.dtype is dtype
    assert torch.equal(found.float(), x.float().clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float())


def test_a_scale_is_the_least_power_of_two_that_fits() -> None:
    exponents = torch.arange(-30, 60, dtype=torch.float64)
    for size in (448.0, 448.0 * (1 + 2.0**-40), 300.0, 225.0, 224.0):
        scale = power_scale(size * torch.exp2(exponents))
        assert torch.equal(scale, torch.exp2(exponents) * (2 if size > 448 else 0.5 if size == 224 else 1))
    least = 2.0**LEAST_EXPONENT
    assert power_scale(torch.tensor([0.0, 1e-30])).tolist() == [least, least]


@pytest.mark.parametrize("smooth", (False, True))
def test_quantize_to_e4m3(smooth: bool) -> None:
    x = torch.randn(2, 3, 10, 5, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 1e6])[None, :, None, None]
    x[0, 0] = 0.0
    step = Quantize("x", "float8_e4m3", 4, smooth)
    codes, scale = step.parts(x)
    assert scale.shape == (2, 3, 3) and codes.abs().max() <= LARGEST
    assert torch.equal(codes, e4m3(codes)) and torch.equal(torch.log2(scale), torch.log2(scale).round())
    shifted = x - x.mean(dim=2, keepdim=True) if smooth else x
    found = step.reference({"x": x}, {}, torch.float64)["out"]
    # four significant bits, or even steps below 2^-6 of the scale
    allowed = torch.maximum(shifted.abs() * 2.0**-4, scale.repeat_interleave(4, 2)[:, :, :10, None] * 2.0**-10)
    assert bool(((found - shifted).abs() <= allowed).all())
    assert not found[0, 0].any()


def test_weights_are_rounded_relative_to_a_power_of_two() -> None:
    logits = torch.randn(3, 4, 50, dtype=torch.float64) * 4
    logits[0, 0, 10:] = -math.inf
    logits[1, 1] = -math.inf
    factor = weight_rounding(logits)
    weights = torch.softmax(logits, dim=-1)
    largest = torch.exp2((logits.amax(-1, keepdim=True) * math.log2(math.e)).ceil())
    numbers = weights * factor * torch.logsumexp(logits, -1, keepdim=True).exp() / largest * 256
    shown = weights > 0
    torch.testing.assert_close(numbers[shown], e4m3(numbers)[shown], rtol=1e-12, atol=0.0)
    assert bool((factor[~shown] == 1).all())


SPEC = """site
  quantize  q[B,2,I,8]  bfloat16
    dtype  float8_e4m3
    out    q8
  quantize  v[B,2,J,8]  bfloat16
    dtype  float8_e4m3
    block  16
    out    v8
  attend  q8  k[B,2,J,8]  v8  bfloat16
    score  0.35·s
    mask   j ≤ i
    norm   softmax (float32), weights float8_e4m3, empty rows zero
    lse    lse
  gives  out, lse"""


def test_a_spec_with_rounded_weights_prints_and_is_interpreted() -> None:
    spec = parse_spec(SPEC)
    assert print_spec(spec) == SPEC
    q, k, v = (torch.randn(1, 2, 9, 8, dtype=torch.float64) for _ in range(3))
    out, lse = spec.interpret({"q": q, "k": k, "v": v})
    codes, scale = Quantize("q", "float8_e4m3", 64).parts(q)
    logits = 0.35 * torch.einsum("bhid,bhjd->bhij", codes * scale[..., None], k)
    logits = logits.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
    values, powers = Quantize("v", "float8_e4m3", 16).parts(v)
    torch.testing.assert_close(lse, torch.logsumexp(logits, -1))
    weights = torch.softmax(logits, -1) * weight_rounding(logits)
    torch.testing.assert_close(out, weights @ (values * powers[..., None]))


@pytest.mark.parametrize(
    "text, said",
    (
        ("sigmoid (float32), weights float8_e4m3", "only the weights of a softmax are rounded"),
        ("softmax (float32), weights int8", "unknown weights 'int8'"),
        ("softmax (float32), weights", "', weights float8_e4m3'"),
    ),
)
def test_normalisers_that_cannot_be(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Normalizer.parse(text)
