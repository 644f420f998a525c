"""Gradients of rows that see no key, on a GPU: those of the model in float64, whatever computes them there."""

from __future__ import annotations

import pytest
import torch

import attncompile
from attncompile.verify import derive_tolerance, require_within
from tests.backend.test_backend import small_llama, tokens
from tests.backend.test_training_hidden_rows import CASES, LENGTH, SIZE, Research, batch, plainly, results
from tests.backend.test_training_padded import LONGEST_SUM, exact_gradients, gradients, plain_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("rest", ["eager", "inductor"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients_of_a_padded_batch_are_those_of_the_model(attention: str, padding: str, rest: str) -> None:
    call = tokens(2, 12, padding)
    truth, eager = (of(small_llama(attention), call) for of in (exact_gradients, plain_gradients))
    ours = small_llama(attention).to(DEVICE)
    compiled = attncompile.compile(ours, dynamic=True, rest=rest)
    found = gradients(ours, compiled, {name: value.to(DEVICE) for name, value in call.items()})
    assert len(attncompile.explain(compiled).sites) == 2 and found.keys() == truth.keys()
    for name, gradient in found.items():
        bound = derive_tolerance(truth[name], eager[name], LONGEST_SUM).bound
        require_within(gradient.cpu(), truth[name], bound, f"the gradient of {name}")


@pytest.mark.parametrize("number", [None, -1e9])
@pytest.mark.parametrize("how", CASES, ids=" ".join)
def test_rows_that_added_numbers_hide_are_those_of_the_model(how: tuple[str, str, str], number: float | None) -> None:
    truth = plainly(how, number, torch.float64)
    lowest, eager = plainly(how, None, torch.float64), plainly(how, None, torch.float32)
    model = Research(*how, number).to(DEVICE)
    compiled = attncompile.compile(model, rest="eager")
    found = results(model, compiled, batch(number, torch.float32).to(DEVICE))
    assert len(attncompile.explain(compiled).sites) == 1 and found.keys() == truth.keys()
    for name, value in found.items():
        terms = max(SIZE, 3 * LENGTH)  # of the loss; and of the gradient of a weight
        error = derive_tolerance(lowest[name], eager[name], terms)
        bound = error.eager_error + terms**0.5 * error.eps * float(truth[name].abs().max())
        require_within(value.cpu(), truth[name], bound, name)
