"""A cache that keeps the last tokens alone, compiled for any length: its width and how far it got are symbols then."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import attncompile
from attncompile.verify import derive_tolerance, require_within
from tests.backend.test_generation import small

WINDOW = 5
"""Width of the windows of the small models."""

TURNS = (9, 4, 1, 6, 1)
"""Tokens that are added at a time: a prompt longer than the window, others behind it, steps between and after."""


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def conversation(model: Any, run: Any, turns: tuple[int, ...], padded: bool) -> list[torch.Tensor]:
    """The logits of what is no padding, turn by turn, with one cache."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 99, (2, sum(turns)), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    cache, found, done = DynamicCache(config=model.config), [], 0
    for length in turns:
        end = done + length
        given = {"attention_mask": mask[:, :end]} if padded else {}
        with torch.no_grad():
            logits = run(input_ids=ids[:, done:end], past_key_values=cache, **given).logits
        found.append(logits[mask[:, done:end].bool()] if padded else logits)
        done = end
    return found


def masks(compiled: Any) -> list[str]:
    """The mask of every site, as text."""
    return [site.before.partition("mask   ")[2].partition("\n")[0] for site in attncompile.explain(compiled).sites]


@pytest.mark.parametrize(
    ("kind", "turns", "padded"),
    [
        ("mistral", TURNS, False),
        pytest.param("mistral", TURNS, True, marks=pytest.mark.slow),
        pytest.param("mistral", (3, 1, 1, 1, 4), True, marks=pytest.mark.slow),
        pytest.param("gemma2", TURNS, False, marks=pytest.mark.slow),
        pytest.param("gemma3_text", TURNS, True, marks=pytest.mark.slow),
    ],
)
def test_every_turn_of_a_conversation(kind: str, turns: tuple[int, ...], padded: bool) -> None:
    model = small(kind, "eager" if kind == "gemma2" else "sdpa")
    if kind == "mistral":
        del model.model.layers[1:]
    wide = copy.deepcopy(model).double()
    compiled = attncompile.compile(model.forward, dynamic=True, rest="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = conversation(model, compiled, turns, padded)
    plain, exact = (conversation(one, one, turns, padded) for one in (model, wide))
    for turn, (one, other, reference) in enumerate(zip(found, plain, exact, strict=True)):
        require_within(one, reference, derive_tolerance(reference, other, 64).bound, f"turn {turn}")
    said = masks(compiled)
    assert said and all(said), "every site is stated"
    if not padded:  # closed in form, so that kernels skip what is hidden
        assert not any("[" in mask for mask in said), said
        assert {f"j ≤ i and j > i − {WINDOW}", f"j ≤ i + J − I and j > i + J − I − {WINDOW}"} <= set(said), said


def test_the_window_of_a_padded_prompt_is_stated() -> None:
    model = small("mistral", "sdpa")
    del model.model.layers[1:]
    compiled = attncompile.compile(model.forward, dynamic=True, rest="eager")
    conversation(model, compiled, (9,), True)
    assert masks(compiled) == [f"j ≤ i and j > i − {WINDOW} and attention_mask[b, j] ≠ 0"]
