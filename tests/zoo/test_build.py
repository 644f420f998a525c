"""Tiny models: deterministic, padded, with the attention that was asked for."""

from __future__ import annotations

import pytest
import torch

from benchmarks.zoo.build import BuildError, build
from benchmarks.zoo.inputs import BATCH, LENGTH
from benchmarks.zoo.truth import count


def test_the_same_call_gives_the_same_numbers() -> None:
    first, second = (build("llama") for _ in range(2))
    assert all(
        torch.equal(one, other) for one, other in zip(first[0].parameters(), second[0].parameters(), strict=True)
    )
    assert torch.equal(first[2]["input_ids"], second[2]["input_ids"])


def test_the_second_row_is_padded() -> None:
    _, _, kwargs = build("bert")
    assert kwargs["input_ids"].shape == (BATCH, LENGTH)
    assert kwargs["attention_mask"].sum(-1).tolist() == [LENGTH, LENGTH - 8]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_as_asked(attention: str) -> None:
    model, args, kwargs = build("llama", attention)  # type: ignore[arg-type]
    truth = count(model, args, kwargs)
    assert (truth.decomposed, truth.fused) == ((2, 0) if attention == "eager" else (0, 2))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters()) and not model.training


def test_both_towers_run() -> None:
    model, args, kwargs = build("clip")
    modules = {one.module.split(".")[0] for one in count(model, args, kwargs).attentions}
    assert modules == {"text_model", "vision_model"}


def test_an_unknown_type_is_said() -> None:
    with pytest.raises(BuildError, match="no model type 'nonesuch'"):
        build("nonesuch")
