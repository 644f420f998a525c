from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import SCORE, Const, Expr, Index
from attncompile.ir.intervals import Interval, Visibility, bounds, classify
from attncompile.ir.operators import ROWS, Kind, Operator
from attncompile.ir.simplify import simplify
from attncompile.ir.text import parse_expr
from tests.ir.expressions import (
    EXACT_LANGUAGE,
    INDICES,
    KINDS,
    WHOLE_LANGUAGE,
    Language,
    defined,
    environment,
    expressions,
)

BOXES = st.tuples(st.integers(0, 9), st.integers(0, 6))


def box_of(
    given: Environment, corners: dict[str, tuple[int, int]]
) -> tuple[Environment, dict[str, Interval]]:
    """The environment with its indices moved into a box, and the ranges that say so."""
    indices = {name: low + given.indices[name] % (extent + 1) for name, (low, extent) in corners.items()}
    ranges = {name: Interval(low, low + extent) for name, (low, extent) in corners.items()}
    ranges |= {name: Interval(size, size) for name, size in given.sizes.items()}
    for name, kind in KINDS.items():
        if kind is Kind.INT:
            ranges[name] = Interval(-5, 9)
    return Environment(indices, given.sizes, given.tensors, given.score, given.weight), ranges


def check_inside(expr: Expr, corners: dict[str, tuple[int, int]], seed: int) -> None:
    given, ranges = box_of(environment(seed), corners)
    assume(defined(expr, given))
    found = bounds(expr, ranges)
    for dtype in (torch.float64, torch.float32):
        values = evaluate(
            expr, Environment(given.indices, given.sizes, given.tensors, given.score, given.weight, dtype)
        )
        numbers = values.double()[~values.double().isnan()]
        assert bool((numbers >= float(found.low)).all()) and bool((numbers <= float(found.high)).all())


CORNERS = st.fixed_dictionaries({name: BOXES for name in INDICES})


@given(
    st.sampled_from(list(Kind)).flatmap(lambda kind: expressions(kind, EXACT_LANGUAGE)),
    CORNERS,
    st.integers(0, 999),
)
def test_values_lie_inside_their_bounds(expr: Expr, corners: dict[str, tuple[int, int]], seed: int) -> None:
    check_inside(expr, corners, seed)


MODEST = Language(WHOLE_LANGUAGE.real, st.floats(-50, 50), True)


@given(expressions(Kind.BOOL, MODEST), CORNERS, st.integers(0, 999))
def test_masks_of_real_values_are_bounded_in_float32_too(
    expr: Expr, corners: dict[str, tuple[int, int]], seed: int
) -> None:
    check_inside(expr, corners, seed)


@given(expressions(Kind.BOOL), CORNERS, st.integers(0, 999))
def test_a_simplified_mask_is_bounded_alike(
    expr: Expr, corners: dict[str, tuple[int, int]], seed: int
) -> None:
    given, ranges = box_of(environment(seed), corners)
    assume(defined(expr, given))
    visible = evaluate(expr, given)
    match int(classify(simplify(expr), ranges)):
        case Visibility.ALL:
            assert visible.all()
        case Visibility.NONE:
            assert not visible.any()


POINTS = [-math.inf, -7.5, -1.0, -0.25, 0.0, 0.5, 1.0, 3.0, 64.0, math.inf]


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.name not in ("int", "float", "where")], ids=lambda row: row.name
)
def test_every_operator_is_bounded(row: Operator) -> None:
    """Random intervals, and random points in them, for each row of the table."""
    generator = np.random.default_rng(0)
    kinds = [kind for kind in Kind if row.result([kind] * (row.arity or 2))]
    if kinds == [Kind.INT] or "mod" in row.name:
        domain = [-7.0, -1.0, 1.0, 2.0, 5.0, 64.0]
    else:
        domain = [0.0, 1.0] if kinds == [Kind.BOOL] else POINTS
    for _ in range(300):
        sides = [sorted(generator.choice(domain, 2)) for _ in range(row.arity or 2)]
        if row.name in ("floordiv", "mod") and sides[1][0] < 0 < sides[1][1]:
            continue
        low, high = row.bounds(*((a, b) for a, b in sides))
        points = [np.array([a, b, *(x for x in domain if a <= x <= b)]) for a, b in sides]
        grid = [torch.from_numpy(axis.reshape(-1)) for axis in np.meshgrid(*points)]
        if kinds == [Kind.BOOL]:
            grid = [axis.bool() for axis in grid]
        values = row.torch(*grid).double()
        values = values[~values.isnan()]
        slack = 1e-12 * values.abs().nan_to_num(posinf=0)
        assert bool((values >= float(low) - slack).all()) and bool((values <= float(high) + slack).all()), (
            sides,
            low,
            high,
        )


def test_many_boxes_at_once() -> None:
    starts = np.array([[0.0], [4.0]]), np.array([[0.0, 4.0]])
    ranges = {"i": Interval(starts[0], starts[0] + 3), "j": Interval(starts[1], starts[1] + 3)}
    assert classify(parse_expr("j ≤ i"), ranges).tolist() == [[1, 0], [2, 1]]


TIGHT = [
    ("i − i", {"i": (0, 9)}, (0, 0)),
    ("j % 4", {"j": (4, 6)}, (0, 2)),
    ("j % 4", {"j": (4, 8)}, (0, 3)),
    ("j % 64", {"j": (0, 9)}, (0, 9)),
    ("j // 4", {"j": (4, 8)}, (1, 2)),
    ("abs(i − j)", {"i": (0, 3), "j": (2, 8)}, (0, 8)),
    ("min(i, 2)", {"i": (0, 9)}, (0, 2)),
    ("where(i < 4, i, 0)", {"i": (0, 3)}, (0, 3)),
    ("sigmoid(s)", {}, (0, 1)),
    ("i", {}, (0, math.inf)),
    ("J", {}, (0, math.inf)),
]


@pytest.mark.parametrize(("text", "ranges", "expected"), TIGHT, ids=[text for text, *_ in TIGHT])
def test_bounds_are_tight(
    text: str, ranges: dict[str, tuple[int, int]], expected: tuple[float, float]
) -> None:
    found = bounds(simplify(parse_expr(text)), {name: Interval(*sides) for name, sides in ranges.items()})
    assert float(found.low) == pytest.approx(expected[0], abs=1e-5)
    assert float(found.high) == pytest.approx(expected[1], abs=1e-5)


NOT_PROVEN = [
    ("min(s, 3.0) < 5.0", "NaN is not below 5"),
    ("s = s", "NaN is not itself"),
    ("exp(bias[i, j]) ≥ 0.0", "NaN again"),
    ("not (s < inf)", "what a NaN negates"),
]


@pytest.mark.parametrize(("text", "why"), NOT_PROVEN)
def test_nan_is_never_proven_away(text: str, why: str) -> None:
    assert classify(parse_expr(text, KINDS), {}) == Visibility.MIXED


def test_a_given_range_excludes_nan() -> None:
    mask = parse_expr("bias[i, j] > −5.0", KINDS)
    assert classify(mask, {"bias": Interval(-1.0, 1.0)}) == Visibility.ALL
    assert classify(mask, {}) == Visibility.MIXED


def test_rounding_of_float32_is_allowed_for() -> None:
    # 0.1 · 3 is 0.30000000000000004 in float64 and 0.3 or more in float32, depending on the order
    mask = parse_expr("0.1·float(i) ≤ 0.30000000000000004")
    assert classify(mask, {"i": Interval(3, 3)}) == Visibility.MIXED
    assert classify(mask, {"i": Interval(0, 2)}) == Visibility.ALL


def test_only_truth_values_are_classified() -> None:
    with pytest.raises(ValueError, match="i is int, not a mask"):
        classify(Index("i"), {})


def test_an_interval_knows_its_members() -> None:
    assert 3 in Interval(0, 3) and 4 not in Interval(0, 3)
    assert 2 in Interval(np.array([0, 1]), np.array([3, 3])) and 0 not in Interval(
        np.array([0, 1]), np.array([3, 3])
    )
    assert bounds(Const(math.nan), {}) == Interval(-math.inf, math.inf)
    assert bounds(SCORE, {}) == Interval(-math.inf, math.inf)


@pytest.mark.parametrize("name, exact", [("mod", lambda x, y: x % y), ("floordiv", lambda x, y: x // y)])
def test_quotients_of_whole_numbers_by_a_constant(name: str, exact: Callable[[int, int], int]) -> None:
    """Bounds hold for divisors of both signs, and are exact at a point."""
    rule = next(row for row in ROWS if row.name == name).bounds
    for divisor in (-7, -3, -1, 1, 2, 5):
        for low in range(-9, 10):
            for extent in range(5):
                ends = (np.float64(low), np.float64(low + extent)), (np.float64(divisor), np.float64(divisor))
                least, most = rule(*ends)
                values = [exact(x, divisor) for x in range(low, low + extent + 1)]
                assert least <= min(values) and max(values) <= most
                assert extent or least == most == values[0]
