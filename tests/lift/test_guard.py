"""Guards: a score term is a mask under facts, or it is not; and nothing is ever rewritten by it."""

from __future__ import annotations

import pytest
import torch

from attncompile.ir import Attend, Kind, Spec, Value, parse_expr, tensor_type
from attncompile.ir.evaluate import Environment, evaluate
from attncompile.lift.guard import find_guard
from attncompile.lift.masks import HIDDEN
from attncompile.lift.render import mask_picture, site_density

KINDS = {"m": Kind.INT, "t": Kind.BOOL, "x": Kind.FLOAT}


def spec_of(score: str, mask: str = "true") -> Spec:
    attend = Attend("q", "k", "v", score=parse_expr(score, KINDS), mask=parse_expr(mask, KINDS))
    axes = {"q": "bhid", "k": "bgjd", "v": "bgje"}
    inputs = [Value(name, tensor_type(letters, ("B", 2, "I", 4))) for name, letters in axes.items()]
    dtypes = {"m": "int64", "t": "bool", "x": "float32"}
    inputs += [Value(n, tensor_type("ac", ("B", "I"), dtypes[n])) for n in attend_tensors(attend)]
    return Spec("site", tuple(inputs), (attend,))


def attend_tensors(attend: Attend) -> list[str]:
    return list(dict.fromkeys(load.tensor for load in attend.captured()))


MASKS = [
    ("0.5·s + (float(m[b, j]) − 1.0)·3.4e38", "m[b, j] ≠ 0", ["m[b, j] ∈ {0, 1}"]),
    ("0.5·s + (1.0 − float(m[b, j]))·−10000.0", "m[b, j] ≠ 0", ["m[b, j] ∈ {0, 1}"]),
    ("s + float(m[b, j])·−1e9", "m[b, j] = 0", ["m[b, j] ∈ {0, 1}"]),
    ("s + (float(t[b, j]) − 1.0)·1e9", "t[b, j]", []),
    ("s + (float(m[b, i])·float(m[b, j]) − 1.0)·1e9", "m[b, i] ≠ 0 and m[b, j] ≠ 0", None),
    ("s + (float(m[b, j]) − 1.0)·1e9 + float(i − j)", "m[b, j] ≠ 0", ["m[b, j] ∈ {0, 1}"]),
]


@pytest.mark.parametrize(("score", "mask", "facts"), MASKS, ids=[row[0] for row in MASKS])
def test_a_term_is_a_mask_under_facts(score: str, mask: str, facts: list[str] | None) -> None:
    spec = spec_of(score)
    before = str(spec)
    guard = find_guard(spec)
    assert guard is not None
    assert str(spec) == before
    if facts is not None:
        assert [str(fact) for fact in guard.facts] == facts
    length = 5
    grid = {"b": torch.tensor(0), "i": torch.arange(length)[:, None], "j": torch.arange(length)[None, :]}
    tensors = {"m": torch.tensor([[1, 0, 1, 1, 0]]), "t": torch.tensor([[True, False, True, True, False]])}
    environment = Environment(grid, {"I": length, "J": length}, tensors)
    visible = evaluate(guard.mask, environment).expand(length, length)
    assert torch.equal(visible, evaluate(parse_expr(mask, KINDS), environment).expand(length, length))
    total = sum(evaluate(term, environment).expand(length, length) for term in guard.terms)
    assert isinstance(total, torch.Tensor)
    assert (total[visible] == 0).all() and (total[~visible] <= HIDDEN).all()
    assert all(bool(evaluate(fact.expr, environment).all()) for fact in guard.facts)


NO_MASKS = [
    "0.5·s",
    "s + float(m[b, j])·0.5",  # a bias
    "s + (float(m[b, j]) − 1.0)·100.0",  # too weak to hide
    "s + float(m[b, j])·1e9",  # lifts one position above all others
    "s + x[b, j]·−1e9",  # a real tensor could hold anything
    "s·float(m[b, j])",
    "s + float(m[b, j])·x[b, j]",
]


@pytest.mark.parametrize("score", NO_MASKS)
def test_a_term_that_is_no_mask(score: str) -> None:
    assert find_guard(spec_of(score)) is None


def test_density_and_picture_use_a_guard_and_say_so() -> None:
    spec = spec_of("s + (float(m[b, j]) − 1.0)·3.4e38", "j ≤ i")
    guard = find_guard(spec)
    assert guard is not None
    assert str(guard) == "if m[b, j] ∈ {0, 1}: mask m[b, j] ≠ 0"
    plain, guarded = site_density(spec, 8), site_density(spec, 8, guard=guard)
    assert plain is not None and guarded is not None
    assert (plain.bound, guarded.bound) == (False, True)
    values = {"m": torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])}
    known = site_density(spec, 8, guard=guard, values=values)
    assert known is not None and not known.bound
    assert known.share == pytest.approx(((10 + 16) + 36) / 2 / 64)
    drawn = mask_picture(spec, 8, guard=guard, values=values)
    assert drawn.splitlines() == ["█▄      ", "███▄    ", "████    ", "████    "]
