"""Derivatives against PyTorch's autograd in float64, operator by operator and on random expressions."""

from __future__ import annotations

import pytest
import torch

from attncompile.ir import Kind, parse_expr, simplify
from attncompile.ir.derivative import DERIVATIVES, NONE, derivative, real_loads
from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import SCORE, Const, Expr, Index, Load, apply, loads, where
from attncompile.ir.operators import ROWS
from tests.ir.rounding import operations, within_rounding

POSITIVE = apply("exp", SCORE)
HALF = Const(0.5)
BIAS = Load("bias", (Index("i"),), Kind.FLOAT)

ROW_EXAMPLES: dict[str, tuple[Expr, ...]] = {
    "add": (SCORE + BIAS * 2.0,),
    "mul": (SCORE * BIAS * SCORE,),
    "div": (SCORE / (POSITIVE + 1.0), apply("div", 1.0, POSITIVE), BIAS / POSITIVE),
    "pow": (
        apply("pow", POSITIVE, SCORE),
        apply("pow", POSITIVE, 3),
        apply("pow", POSITIVE, 0),
        apply("pow", 2.0, SCORE),
    ),
    "min": (apply("min", SCORE, BIAS), apply("min", SCORE, HALF, SCORE * 2.0)),
    "max": (apply("max", SCORE, BIAS), apply("max", SCORE, HALF, SCORE * 2.0), apply("max", 0.0, SCORE)),
    "where": (
        where(apply("gt", SCORE, BIAS), SCORE * SCORE, BIAS * SCORE),
        where(apply("lt", Index("i"), 3), SCORE, 1.0),
    ),
    "float": (
        apply("float", SCORE) * SCORE,
        apply("float", apply("gt", SCORE, 0.0)) * SCORE,
        apply("float", apply("int", SCORE * 3.0)) * SCORE,
    ),
    "abs": (apply("abs", SCORE), apply("abs", SCORE - BIAS)),
    "log": (apply("log", POSITIVE + 1.0),),
    "log2": (apply("log2", POSITIVE + 1.0),),
    "sqrt": (apply("sqrt", POSITIVE),),
    "rsqrt": (apply("rsqrt", POSITIVE),),
    "floor": (apply("floor", SCORE * 3.0) + SCORE,),
    "ceil": (apply("ceil", SCORE * 3.0) + SCORE,),
    "round": (apply("round", SCORE * 3.0) + SCORE,),
}
REAL_ROWS = [
    row.name
    for row in ROWS
    if row.result([Kind.BOOL if row.name == "where" and n == 0 else Kind.FLOAT for n in range(row.arity or 2)])
    is Kind.FLOAT
]


def environment(score: torch.Tensor, bias: torch.Tensor) -> Environment:
    indices = {"i": torch.arange(len(score)), "j": torch.zeros(1, dtype=torch.int64)}
    return Environment(indices, {}, {"bias": bias}, score=score, dtype=score.dtype)


def points(special: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and biases that float32 holds exactly, so that it takes the same branches as float64."""
    generator = torch.Generator().manual_seed(0)
    score, bias = torch.randn(2, 64, generator=generator).double()
    if special:  # kinks and ties
        score[:6] = torch.tensor([0.0, 0.5, 0.25, -1.0, 0.0, 2.0], dtype=torch.float64)
        bias[:6] = torch.tensor([0.0, 0.5, 0.5, -1.0, -1.0, 0.0], dtype=torch.float64)
    return score, bias


def by_autograd(expr: Expr, variable: Expr, dtype: torch.dtype, special: bool) -> torch.Tensor:
    """What PyTorch finds for the derivative."""
    score, bias = (tensor.to(dtype) for tensor in points(special))
    tensor = (score if variable == SCORE else bias).requires_grad_()
    value = evaluate(expr, environment(score, bias)).expand(len(score))
    found = torch.autograd.grad(value.sum(), tensor, allow_unused=True)[0] if value.requires_grad else None
    return torch.zeros_like(score) if found is None else found


def check(expr: Expr, special: bool = True) -> None:
    for variable in (SCORE, BIAS):
        symbolic = derivative(expr, variable)
        found = evaluate(symbolic, environment(*points(special))).expand(64)
        expected = by_autograd(expr, variable, torch.float64, special)
        narrow = by_autograd(expr, variable, torch.float32, special)
        assert within_rounding(found, expected, narrow, operations(expr, symbolic)), (expr, variable)


@pytest.mark.parametrize("name", REAL_ROWS)
def test_every_operator(name: str) -> None:
    assert name in DERIVATIVES, f"the operator {name} has no row"
    alone = () if name in ROW_EXAMPLES else (apply(name, SCORE), apply(name, SCORE * BIAS) * SCORE)
    for example in ROW_EXAMPLES.get(name, alone):
        check(example)


@pytest.mark.parametrize(
    "text",
    (
        "30.0·tanh(0.0083·s)",
        "0.25·s + bias[i]·(j − i)",
        "s·bias[i] + exp(−abs(s))",
        "where(i > 3, sigmoid(s), bias[i]) / (1.0 + exp(s·s))",
        "max(0.0, min(1.0, s))·log(1.0 + exp(bias[i]))",
        "sin(s)·cos(bias[i]) + erf(s) + exp2(s) + rsqrt(1.0 + s·s)",
    ),
)
def test_score_expressions(text: str) -> None:
    check(parse_expr(text, {"bias": Kind.FLOAT}))


def test_what_does_not_vary_has_derivative_zero() -> None:
    assert derivative(parse_expr("0.5·float(i − j)", {}), SCORE) == NONE
    assert derivative(apply("float", apply("gt", SCORE, 0.0)), SCORE) == NONE


def test_a_side_not_chosen_does_not_count() -> None:
    expr = where(apply("gt", SCORE, 0.0), apply("sqrt", SCORE), 0.0)
    score, bias = points(True)
    assert bool(evaluate(derivative(expr, SCORE), environment(score, bias)).isfinite().all())


def test_results_are_simplified() -> None:
    assert derivative(parse_expr("0.25·s", {}), SCORE) == Const(0.25)
    assert derivative(parse_expr("s·bias[i]", {"bias": Kind.FLOAT}), SCORE) == BIAS
    assert derivative(parse_expr("0.25·s + bias[i]·(j − i)", {"bias": Kind.FLOAT}), BIAS) == simplify(
        apply("float", Index("j") - Index("i"))
    )


def test_loads_that_matter() -> None:
    expr = parse_expr("where(bias[j] > 0.0, s, bias[i])", {"bias": Kind.FLOAT})
    assert len(loads(expr)) == 2 and real_loads(expr) == (BIAS,)


def test_refusals_are_named() -> None:
    with pytest.raises(ValueError, match="only a real expression"):
        derivative(apply("gt", SCORE, 0.0), SCORE)
    with pytest.raises(ValueError, match="no derivative by i"):
        derivative(SCORE, Index("i"))
