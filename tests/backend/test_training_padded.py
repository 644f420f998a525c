"""Gradients of padded batches with the loss of transformers, as the document on training says where they agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attncompile
from attncompile.verify import derive_tolerance, require_within
from tests.backend.test_backend import small_llama, tokens

LONGEST_SUM = 99
"""Terms of the longest sum: the vocabulary, in the loss."""


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def gradients(model: Any, run: Any, call: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the loss that transformers computes; labels of padding are left out, as its collators do."""
    labels = torch.where(call["attention_mask"] == 1, call["input_ids"], -100)
    run(**call, labels=labels, use_cache=False).loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


NO_KEY = pytest.mark.xfail(strict=True, reason="a mask that is added passes gradients where a row sees no key")


@pytest.mark.parametrize(
    ("attention", "padding"),
    [("eager", "right"), ("sdpa", "right"), ("sdpa", "left"), pytest.param("eager", "left", marks=NO_KEY)],
)
def test_gradients_of_a_padded_batch_are_those_of_the_model(attention: str, padding: str) -> None:
    """Padding at the left with ``sdpa``: the row before the first token sees no key, and predicts it."""
    call = tokens(2, 12, padding)
    plain, ours, exact = small_llama(attention), small_llama(attention), small_llama(attention).double()
    truth, eager = gradients(exact, exact, call), gradients(plain, plain, call)
    compiled = attncompile.compile(ours, dynamic=True, rest="eager")
    found = gradients(ours, compiled, call)
    assert all(site.operator != "original" for site in attncompile.explain(compiled).sites)
    assert found.keys() == eager.keys() == truth.keys() and len(found) > 15
    for name, gradient in found.items():
        bound = derive_tolerance(truth[name], eager[name], LONGEST_SUM).bound
        require_within(gradient, truth[name], bound, f"the gradient of {name}")
