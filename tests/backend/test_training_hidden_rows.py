"""Rows that several added numbers hide, or such as are loaded, or one beside a bias: values and gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import attncompile
from attncompile.codegen.pytorch.empty_rows import PASSED
from attncompile.verify import derive_tolerance, require_within

HEADS, LENGTH, CHANNELS, SIZE = 2, 9, 8, 50

slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@dataclass(frozen=True)
class Call:
    """What a model is called with: embeddings ``[b,i,c]``, real keys ``[b,j]`` and two masks of numbers to add."""

    states: torch.Tensor
    keep: torch.Tensor
    causal: torch.Tensor
    padding: torch.Tensor

    def to(self, device: str) -> Call:
        """The same on a device, with embeddings that gradients are asked of."""
        states = self.states.detach().to(device).requires_grad_()
        return Call(states, self.keep.to(device), self.causal.to(device), self.padding.to(device))


class Research(torch.nn.Module):
    """Attention as papers' code spells it: two masks and a bias, each added to the scores.

    Args:
        causal, padding: ``graph`` (computed, and added to the scores), ``given`` (an input that is added), ``inf``,
            ``late`` (filled in behind everything else) or nothing; padding also ``sum`` (both masks are added up first)
            and ``clamp`` (and kept above the lowest number).
        bias: ``positions``, ``learned`` or nothing.
        number: what hides; the lowest of the dtype where it is ``None``.
    """

    def __init__(self, causal: str, padding: str, bias: str, number: float | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projection = torch.nn.Linear(HEADS * CHANNELS, 3 * HEADS * CHANNELS)
        self.out = torch.nn.Linear(HEADS * CHANNELS, SIZE)
        self.table = torch.nn.Parameter(torch.randn(2 * LENGTH - 1, HEADS))
        self.causal, self.padding, self.bias, self.number = causal, padding, bias, number

    def forward(self, call: Call) -> torch.Tensor:
        batch, length, _ = call.states.shape
        split = self.projection(call.states).view(batch, length, 3, HEADS, CHANNELS)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * CHANNELS**-0.5
        number = torch.finfo(scores.dtype).min if self.number is None else self.number
        places = torch.arange(length, device=scores.device)
        away = places[:, None] - places[None, :]
        future = scores.new_zeros(length, length).masked_fill(away < 0, number)
        padded = (1 - call.keep.to(scores.dtype))[:, None, None, :] * number
        if self.bias == "positions":
            slopes = -0.25 * (torch.arange(HEADS, device=scores.device) + 1)
            scores = scores + (slopes[:, None, None] * away.abs()).to(scores.dtype)
        if self.bias == "learned":
            scores = scores + self.table[away + length - 1].permute(2, 0, 1)[None]
        if self.causal == "graph":
            scores = scores + future
        if self.causal == "given":
            scores = scores + call.causal
        if self.causal == "inf":
            scores = scores.masked_fill(away < 0, -torch.inf)
        if self.padding == "graph":
            scores = scores + padded
        if self.padding == "given":
            scores = scores + call.padding
        if self.padding == "sum":
            scores = scores + (future + padded)
        if self.padding == "clamp":
            scores = scores + (future + padded).clamp(min=torch.finfo(scores.dtype).min)
        if self.causal == "late":
            scores = scores.masked_fill(away < 0, number)
        values = torch.softmax(scores, -1) @ v
        return self.out(values.transpose(1, 2).flatten(2))


def batch(number: float | None, dtype: torch.dtype) -> Call:
    """Padded at the left, padding from end to end, and padded at the right."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(3, LENGTH, HEADS * CHANNELS, generator=generator).to(dtype).requires_grad_()
    keep = torch.ones(3, LENGTH, dtype=torch.int64)
    keep[0, :3], keep[1], keep[2, -2:] = 0, 0, 0
    hidden = torch.finfo(dtype).min if number is None else number
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    causal = torch.zeros(1, 1, LENGTH, LENGTH, dtype=dtype).masked_fill(future, hidden)
    padding = torch.zeros(3, 1, 1, LENGTH, dtype=dtype).masked_fill(keep[:, None, None, :] == 0, hidden)
    return Call(states, keep, causal, padding)


def results(model: Any, run: Any, call: Call) -> dict[str, torch.Tensor]:
    """The output, the loss, and the gradients of parameters and input."""
    made = run(call)
    loss = made.sin().mean(-1).sum()
    loss.backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert call.states.grad is not None
    return {"output": made.detach(), "loss": loss.detach(), "states": call.states.grad, **found}


def plainly(how: tuple[str, str, str], number: float | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Of the model itself."""
    model = Research(*how, number).to(dtype)
    return results(model, model, batch(number, dtype))


CASES = [
    ("graph", "given", ""),
    ("inf", "given", ""),
    ("given", "given", ""),
    ("graph", "graph", ""),
    ("", "sum", ""),
    ("", "clamp", ""),
    ("graph", "graph", "positions"),
    ("", "given", "positions"),
    ("graph", "given", "learned"),
    ("", "sum", "learned"),
]


@pytest.mark.parametrize("number", [None, -1e9, pytest.param(-1e4, marks=slow)])
@pytest.mark.parametrize("how", CASES, ids=" ".join)
def test_rows_that_added_numbers_hide_are_those_of_the_model(how: tuple[str, str, str], number: float | None) -> None:
    """To float32's rounding, in float64 throughout: −1e9 swallows no digits there.

    The yardstick is eager's error with the lowest number, which float32 and float64 swallow scores in alike: next to
    −1e9 eager loses all digits of a float32 score itself.
    """
    truth = plainly(how, number, torch.float64)
    lowest, eager = plainly(how, None, torch.float64), plainly(how, None, torch.float32)
    model, call = Research(*how, number), batch(number, torch.float32)
    compiled = attncompile.compile(model, rest="eager")
    found = results(model, compiled, call)
    (site,) = attncompile.explain(compiled).sites
    assert PASSED in site.reason and found.keys() == truth.keys()
    for name, value in found.items():
        terms = max(SIZE, 3 * LENGTH)  # of the loss; and of the gradient of a weight
        error = derive_tolerance(lowest[name], eager[name], terms)
        bound = error.eager_error + terms**0.5 * error.eps * float(truth[name].abs().max())
        require_within(value, truth[name], bound, name)


@pytest.mark.parametrize("how", [("graph", "given", ""), ("graph", "given", "learned"), ("graph", "graph", "")])
def test_without_gradients_values_of_such_rows_are_those_of_the_model(how: tuple[str, str, str]) -> None:
    """What two masks hide weighs nothing beside what one hides, and that no more than what the other hides."""
    model, wide = Research(*how, None), Research(*how, None).double()
    compiled = attncompile.compile(model, rest="eager")
    with torch.no_grad():
        found, eager = compiled(batch(None, torch.float32)), model(batch(None, torch.float32))
        truth = wide(batch(None, torch.float64))
    assert all(site.operator != "original" for site in attncompile.explain(compiled).sites)
    require_within(found, truth, derive_tolerance(truth, eager, SIZE).bound, "the output")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("bias", ["", "learned"])
def test_a_number_in_bfloat16_is_the_one_that_a_mask_of_bfloat16_holds(training: bool, bias: str) -> None:
    """−1e9 is −999292928 there, in the graph as in the mask: a row that both hide is hidden equally."""
    how = ("graph", "given", bias)
    truth, eager = plainly(how, -1e9, torch.float64), plainly(how, -1e9, torch.bfloat16)
    model, call = Research(*how, -1e9).bfloat16(), batch(-1e9, torch.bfloat16)
    compiled = attncompile.compile(model, rest="eager")
    if not training:
        with torch.no_grad():
            bound = derive_tolerance(truth["output"], eager["output"], SIZE).bound
            require_within(compiled(call), truth["output"], bound, "the output")
        return
    for name, value in results(model, compiled, call).items():
        require_within(value, truth[name], derive_tolerance(truth[name], eager[name], SIZE).bound, name)


@pytest.mark.parametrize("number", [None, -1e9])
def test_numbers_that_are_added_beside_a_fill_keep_the_model_in_training(number: float | None) -> None:
    """A key that is filled passes nothing on, one that a number hides does, and both may share a row."""
    how = ("late", "given", "")
    model = Research(*how, number)
    compiled = attncompile.compile(model, rest="eager")
    with pytest.warns(attncompile.backend.FallbackWarning, match="in place of the score"):
        found = results(model, compiled, batch(number, torch.float32))
    (site,) = attncompile.explain(compiled).sites
    assert site.operator == "original" and "in place of the score" in site.reason
    for name, value in plainly(how, number, torch.float32).items():
        assert torch.equal(found[name], value), name


@slow
@pytest.mark.parametrize("number", [None, -1e9])
def test_inductor_compiles_them(number: float | None) -> None:
    how = ("graph", "given", "positions")
    truth = plainly(how, number, torch.float64)
    lowest, eager = plainly(how, None, torch.float64), plainly(how, None, torch.float32)
    model = Research(*how, number)
    found = results(model, torch.compile(model, backend="attncompile"), batch(number, torch.float32))
    for name, value in found.items():
        error = derive_tolerance(lowest[name], eager[name], SIZE)
        bound = error.eager_error + SIZE**0.5 * error.eps * float(truth[name].abs().max())
        require_within(value, truth[name], bound, name)
