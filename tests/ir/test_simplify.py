from __future__ import annotations

import math

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import Apply, Expr, walk
from attncompile.ir.operators import Kind
from attncompile.ir.simplify import Simplifier, simplify, sort_key
from tests.ir.expressions import (
    EXTENTS,
    SMOOTH_LANGUAGE,
    any_expressions,
    defined,
    environment,
    expressions,
)

SEEDS = st.integers(0, 2**31)


def values(expr: Expr, given: Environment) -> torch.Tensor:
    return evaluate(expr, given).expand(given.indices["i"].shape)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit for bit, but for the sign of zero."""
    assert actual.dtype == expected.dtype
    if actual.is_floating_point():
        actual, expected = actual.nan_to_num(nan=12345.678), expected.nan_to_num(nan=12345.678)
    assert torch.equal(actual, expected)


@given(any_expressions(), SEEDS)
def test_simplify_keeps_the_value(expr: Expr, seed: int) -> None:
    given = environment(seed)
    assume(defined(expr, given))
    assert_same(values(simplify(expr), given), values(expr, given))


@given(any_expressions(), SEEDS)
def test_simplify_inside_extents_keeps_the_value(expr: Expr, seed: int) -> None:
    given = environment(seed, inside=True)
    assume(defined(expr, given))
    assert_same(values(simplify(expr, EXTENTS), given), values(expr, given))


def magnitude(expr: Expr, given: Environment) -> float:
    """The largest value on the way, infinite near a singularity: what rounding errors are relative to."""
    largest = 1.0
    for node in walk(expr):
        if node.kind is not Kind.FLOAT:
            continue
        largest = max(largest, float(values(node, given).abs().nan_to_num(nan=math.inf).max()))
        match node:
            case Apply("log" | "log2" | "sqrt" | "rsqrt" | "div" | "pow" as operator, arguments):
                for argument in arguments[1:] if operator == "div" else arguments[:1]:
                    largest = max(largest, 1 / max(float(values(argument, given).abs().min()), 1e-300))
    return largest


@given(expressions(Kind.FLOAT, SMOOTH_LANGUAGE), SEEDS)
def test_simplify_keeps_real_values_up_to_rounding(expr: Expr, seed: int) -> None:
    given = environment(seed, special=False)
    assume(defined(expr, given))
    scale = magnitude(expr, given)
    assume(scale < 1e4)
    error = (values(simplify(expr), given) - values(expr, given)).abs().max()
    assert error <= scale**2 * torch.finfo(torch.float64).eps * sum(1 for _ in walk(expr))


@given(any_expressions(), st.booleans())
def test_simplify_twice_is_once(expr: Expr, inside: bool) -> None:
    extents = EXTENTS if inside else {}
    once = simplify(expr, extents)
    assert simplify(once, extents) == once
    assert Simplifier(extents)(once) == once


@given(any_expressions(), any_expressions())
def test_the_order_agrees_with_equality(left: Expr, right: Expr) -> None:
    assert (sort_key(left) == sort_key(right)) == (left == right)
    assert sort_key(left) <= sort_key(right) or sort_key(right) <= sort_key(left)
