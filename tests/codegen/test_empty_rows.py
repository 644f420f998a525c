"""Gradients of rows that see no key, against the definition with the score left in the fill."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attncompile.codegen.pytorch import lower, may_be_empty, passing_gradients, why_not_passed
from attncompile.ir import RefusalError, Spec, parse_spec, simplify
from attncompile.ir.expr import Const, apply
from attncompile.ir.sample import random_tensors
from attncompile.verify import require_as_good_as_eager

LOWEST = -1.7e308
"""Swallows any score in float64."""

QUERIES = KEYS = 7
CHANNELS = 8
KEYS_OF_BLOCKS = 800
"""More than one block of them."""

GROUPED = """
site   attend  q[B,4,I,8]  k,v[B,2,J,8]  float32
  score  {score}
  mask   {mask}
  fill   −1.7e308
  kv_head {heads}
  norm   softmax (float32)
  given  keep[B,J]:bool
{given}
"""
PADDED = "j ≤ i and keep[b, j]"

SITES = {
    "grouped heads": ("0.35·s", PADDED, "h // 2", ""),
    "heads in another order": ("0.35·s", PADDED, "h % 2", ""),
    "a bias computed from positions": ("0.35·s + 0.1·float(j − i)", PADDED, "h // 2", ""),
    "a learned bias": ("0.35·s + bias[h, i, j]", PADDED, "h // 2", "  given  bias[4,I,J]:float32"),
    "a learned scale": ("scale[h]·s", PADDED, "h // 2", "  given  scale[4]:float32"),
    "a window": ("0.35·s", "j ≤ i and j > i − 4 and keep[b, j]", "h // 2", ""),
    "padding alone": ("0.35·s", "keep[b, j]", "h // 2", ""),
}


def site(name: str) -> Spec:
    score, mask, heads, given = SITES[name]
    return parse_spec(GROUPED.format(score=score, mask=mask, heads=heads, given=given).strip())


def with_sum(spec: Spec) -> Spec:
    """The same site as the model computes it: the fill is added to the score."""
    attend = spec.attend()
    assert attend is not None
    added = dataclasses.replace(attend, fill=simplify(apply("add", attend.score, Const(LOWEST))))
    return dataclasses.replace(spec, operations=(added,))


def inputs(spec: Spec) -> dict[str, torch.Tensor]:
    """Of two sequences: one padded at the left, one that is padding from end to end."""
    tensors = random_tensors(spec, {"B": 2, "I": QUERIES, "J": KEYS}, 3)
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[0, :3], keep[1] = False, False
    return {name: t.double().requires_grad_() if t.is_floating_point() else keep for name, t in tensors.items()}


def require_near(found: torch.Tensor, truth: torch.Tensor, plain: torch.Tensor, what: str) -> None:
    """As good as the plain computation, but for the order of the sums that a gradient goes through."""
    length = QUERIES * KEYS * CHANNELS
    require_as_good_as_eager(found.detach(), truth.detach().double(), plain.detach(), length, what)


def results(outputs: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    outputs.sin().sum().backward()
    return {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("operator", ["sdpa", "reference"])
def test_gradients_are_those_of_the_sum(name: str, operator: str) -> None:
    spec = site(name)
    assert may_be_empty(spec) and why_not_passed(spec) is None
    plain = lower(spec, "cpu", operator)
    wanted, found, lacking = inputs(spec), inputs(spec), inputs(spec)
    expected = results(with_sum(spec).interpret(wanted)[0], wanted)
    out = passing_gradients(spec, plain).run(*(found[value.name] for value in spec.inputs))
    old = plain.run(*(lacking[value.name] for value in spec.inputs))
    assert isinstance(out, torch.Tensor) and isinstance(old, torch.Tensor)
    require_near(out, old, old, name)
    made, missing = results(out, found), results(old, lacking)
    assert made.keys() == expected.keys()
    for tensor, gradient in made.items():
        require_near(gradient, expected[tensor], expected[tensor], tensor)
    assert not torch.allclose(missing["q"], expected["q"], rtol=1e-3), "the inputs have no row that shows it"


LOADED = """
site   attend  q[B,4,I,8]  k,v[B,2,J,8]  float32
  score  0.35·s + added[b, 0, i, j]
  mask   true
  kv_head h // 2
  norm   softmax (float32)
  given  added[B,1,I,J]:float32
""".strip()


@pytest.mark.parametrize("learned", [False, True])
def test_numbers_that_a_tensor_adds_swallow_scores_too(learned: bool) -> None:
    """A mask that was made outside of the graph: SDPA's backward pass loses the weights of such a row on a CPU."""
    spec = parse_spec(LOADED)
    assert not may_be_empty(spec)
    wanted, found, lacking = inputs(spec), inputs(spec), inputs(spec)
    for given in (wanted, found, lacking):
        numbers = torch.randn(2, 1, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        numbers[0, :, :3], numbers[1] = LOWEST, LOWEST
        given["added"] = numbers.requires_grad_(learned)
    expected = results(spec.interpret(wanted)[0], wanted)
    plain = lower(spec, "cpu", "sdpa")
    out = passing_gradients(spec, plain).run(*(found[value.name] for value in spec.inputs))
    old = plain.run(*(lacking[value.name] for value in spec.inputs))
    assert isinstance(out, torch.Tensor) and isinstance(old, torch.Tensor)
    require_near(out, old, old, "the output")
    made = results(out, found)
    assert made.keys() == expected.keys() and ("added" in made) == learned
    for tensor, gradient in made.items():
        require_near(gradient, expected[tensor], expected[tensor], tensor)


def test_a_number_that_swallows_only_digits_leaves_the_weights_to_the_backward_pass() -> None:
    """Next to −1e9 float32 has no digits for ``ln J``, which SDPA's backward pass needs."""
    spec = parse_spec(str(site("grouped heads")).replace("−1.7e+308", "0.35·s − 1e9"))
    attend = spec.attend()
    assert attend is not None and "s" in str(attend.fill)
    wanted = inputs(spec)
    found = {n: t.detach().float().requires_grad_() if t.is_floating_point() else t for n, t in wanted.items()}
    expected = results(spec.interpret(wanted)[0], wanted)
    out = lower(spec, "cpu", "sdpa").run(*(found[value.name] for value in spec.inputs))
    assert isinstance(out, torch.Tensor)
    narrow = {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in found.items()}
    plain = results(spec.interpret(narrow, torch.float32)[0], narrow)
    for tensor, gradient in results(out, found).items():
        require_near(gradient, expected[tensor], plain[tensor], tensor)


def test_nothing_is_computed_without_gradients() -> None:
    spec = site("grouped heads")
    seen: list[int] = []
    plain = lower(spec, "cpu")
    made = torch.zeros(1)
    counted = dataclasses.replace(plain, run=lambda *tensors: seen.append(len(tensors)) or made)
    tensors = [tensor.detach() for tensor in inputs(spec).values()]
    assert passing_gradients(spec, counted).run(*tensors) is made and seen == [4]


def test_a_learned_edit_of_the_output_gets_no_gradient_from_the_term() -> None:
    text = GROUPED.format(score="0.35·s", mask=PADDED, heads="h // 2", given="  given  gate[4]:float32").strip()
    spec = parse_spec(text.replace("  norm ", "  weight gate[h]·w\n  norm "))
    wanted, found = inputs(spec), inputs(spec)
    expected = results(with_sum(spec).interpret(wanted)[0], wanted)
    out = passing_gradients(spec, lower(spec, "cpu", "sdpa")).run(*(found[value.name] for value in spec.inputs))
    assert isinstance(out, torch.Tensor)
    for tensor, gradient in results(out, found).items():
        require_near(gradient, expected[tensor], expected[tensor], tensor)


def test_a_score_that_is_not_linear_has_no_closed_form() -> None:
    text = GROUPED.format(score="30.0·tanh(0.01·s)", mask=PADDED, heads="h // 2", given="").strip()
    spec = parse_spec(text)
    assert "not linear" in (why_not_passed(spec) or "")
    capped = parse_spec(LOADED.replace("0.35·s", "30.0·tanh(0.01·s)"))
    assert "not linear" in (why_not_passed(capped) or "")
    with pytest.raises(RefusalError, match="not linear"):
        passing_gradients(spec, lower(spec, "cpu", "reference"))


def test_causal_rows_are_never_empty() -> None:
    text = GROUPED.format(score="0.35·s", mask="j ≤ i", heads="h // 2", given="").strip()
    assert not may_be_empty(parse_spec(text.replace("  given  keep[B,J]:bool", "").replace(",J,", ",I,").strip()))


@pytest.mark.parametrize("hidden", [False, True])
def test_blocks_are_left_out_only_where_no_loaded_number_hides_what_is_visible(hidden: bool) -> None:
    """A row whose visible keys get the fill from a tensor weighs those that the mask hides no less."""
    text = LOADED.replace("mask   true", "mask   j ≤ i and j > i − 64\n  fill   −1.7e308")
    spec = parse_spec(text)
    sizes = {"B": 1, "I": KEYS_OF_BLOCKS, "J": KEYS_OF_BLOCKS}
    tensors = {n: t.double() for n, t in random_tensors(spec, sizes, 0).items()}
    if hidden:
        tensors["added"][:, :, 400:410] = LOWEST
    out = lower(spec, "cpu", "blockwise").run(*(tensors[value.name] for value in spec.inputs))
    assert isinstance(out, torch.Tensor)
    exact = spec.interpret(tensors)[0]
    require_as_good_as_eager(out, exact, exact, KEYS_OF_BLOCKS, "blocks")
