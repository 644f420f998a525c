"""Quotients of sums of exponentials are the numbers that they are written for."""

from __future__ import annotations

import pytest
import torch

from attncompile.ir import Expr, Kind, parse_expr, print_expr, simplify
from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import Load, apply
from attncompile.lift.exponentials import Exponents, difference, linear, ratio, sum_of, without_row_terms
from attncompile.lift.rows import free_of_map

TENSORS = {name: torch.tensor(value, dtype=torch.float64) for name, value in (("m", 0.7), ("a", -1.3), ("b", 0.4))}
KINDS = dict.fromkeys(TENSORS, Kind.FLOAT)
SCORE = torch.tensor(0.9, dtype=torch.float64)


def expr(text: str) -> Expr:
    return parse_expr(text, KINDS)


def value(found: Expr) -> float:
    return float(evaluate(found, Environment(tensors=TENSORS, score=SCORE)))


def total(exponents: Exponents) -> float:
    return sum(value(apply("exp", exponent)) for exponent in exponents)


@pytest.mark.parametrize(
    "text",
    [
        "exp(s − m[]) / (exp(a[]) + exp(b[]))",
        "sigmoid(s − a[])",
        "sigmoid(a[] − log(exp(b[]) + exp(m[])))",
        "exp(s − m[] − log(exp(a[]) + 2.5))",
        "exp2(s)·exp(a[])·3.0",
        "1.0 / (exp(a[]) + 1e-06) + exp(b[] − s)",
        "exp(0.5·(s + a[]))·where(true, 1.0, 0.0)",
        "where(false, exp(s), 0.0) + exp(m[])",
        "exp(0.5·log(exp(a[]) + exp(b[])))",
    ],
)
def test_a_ratio_has_the_value_of_its_expression(text: str) -> None:
    found = ratio(expr(text), {})
    assert found is not None
    assert total(found.above) / total(found.below) == pytest.approx(value(expr(text)), rel=1e-13)


@pytest.mark.parametrize("text", ["s", "exp(s) − 1.0", "tanh(s)", "max(exp(s), 1.0)", "−1.0·exp(s)"])
def test_what_is_no_ratio_of_positive_sums_is_refused(text: str) -> None:
    assert ratio(expr(text), {}) is None


def test_symbols_stand_for_sums() -> None:
    symbol = Load("sum", (), Kind.FLOAT)
    found = ratio(apply("div", expr("exp(s)"), symbol), {symbol: (expr("a[]"), expr("b[]"))})
    assert found is not None and found.below == (expr("a[]"), expr("b[]"))


def test_linear_parts_add_up() -> None:
    text = expr("0.5·(s − 2.0·a[]) + a[] − 3.0 + m[]·b[]")
    assert expr("a[]") not in linear(text)
    assert value(sum_of(linear(text))) == pytest.approx(value(text), rel=1e-13)


def test_differences_are_what_does_not_cancel() -> None:
    found = difference(expr("0.5·s − m[]"), expr("a[] + 0.5·s"), free_of_map)
    assert found is not None and value(found) == pytest.approx(-0.7 + 1.3)
    assert difference(expr("0.5·s"), expr("0.4·s"), free_of_map) is None
    hidden = expr("where(j ≤ i, 0.5·s − m[], −inf)")
    assert difference(hidden, expr("where(j ≤ i, 0.5·s, −inf)"), free_of_map) == simplify(expr("−m[]"))
    assert difference(hidden, expr("where(j < i, 0.5·s, −inf)"), free_of_map) is None


def test_every_branch_must_have_the_same_row_terms() -> None:
    def of_row(part: Expr) -> bool:
        return part == expr("m[]")

    split = without_row_terms(expr("where(j ≤ i, s − m[], −inf)"), of_row)
    assert split is not None and print_expr(split[0]) == "where(j ≤ i, s, −inf)" and value(split[1]) == -0.7
    assert without_row_terms(expr("where(j ≤ i, s − m[], s)"), of_row) is None
