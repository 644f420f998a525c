"""Expressions linear in one symbol: slope and offset, or none."""

from __future__ import annotations

import pytest
import torch

from attncompile.ir import Kind, parse_expr, simplify
from attncompile.ir.affine import affine
from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import SCORE, WEIGHT

TENSORS = {"t": Kind.FLOAT}


@pytest.mark.parametrize(("text", "slope", "offset"), [
    ("s", "1.0", "0.0"),
    ("−s", "−1.0", "0.0"),
    ("0.25·s", "0.25", "0.0"),
    ("(s + 1.0)·0.5", "0.5", "0.5"),
    ("0.25·s + t[i] + 0.5·s", "0.75", "t[i]"),
    ("s·t[h]", "t[h]", "0.0"),
    ("(s + t[i])/t[h]", "1.0 / t[h]", "1.0 / t[h]·t[i]"),
    ("where(j ≤ i, 0.5·s, 0.5·s − 2.0)", "0.5", "where(j ≤ i, 0.0, −2.0)"),
    ("float(i)", "0.0", "float(i)"),
])
def test_split(text: str, slope: str, offset: str) -> None:
    expr = parse_expr(text, TENSORS)
    found = affine(expr)
    assert found is not None
    assert found.slope == simplify(parse_expr(slope, TENSORS))
    environment = Environment(
        {"i": torch.tensor(3), "j": torch.tensor(5), "h": torch.tensor(1)},
        tensors={"t": torch.tensor([0.5, 2.0, 3.0, 4.0], dtype=torch.float64)},
        score=torch.tensor(0.7, dtype=torch.float64),
    )
    rebuilt = evaluate(found.slope * SCORE + found.offset, environment)
    torch.testing.assert_close(rebuilt, evaluate(expr, environment))
    torch.testing.assert_close(evaluate(found.offset, environment),
                               evaluate(simplify(parse_expr(offset, TENSORS)), environment))


@pytest.mark.parametrize("text", [
    "30.0·tanh(s)", "s·s", "1.0 / s", "where(s > 0.0, s, 0.0)", "max(s, 0.0)", "s + exp(s)",
])
def test_not_linear(text: str) -> None:
    assert affine(parse_expr(text)) is None


def test_other_symbols() -> None:
    found = affine(parse_expr("w·t[h]", TENSORS), WEIGHT)
    assert found is not None and str(found.slope) == "t[h]"
