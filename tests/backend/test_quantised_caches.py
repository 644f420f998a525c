"""``generate()`` with quantised caches: the tokens of the model as it is with the same cache, through both doors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import attncompile
import attncompile.hf
from attncompile.backend import FallbackWarning
from tests.backend.test_backend import tokens
from tests.backend.test_generation import SEARCHES, generated, require_rewritten, small

CACHES: dict[str, dict[str, Any]] = {
    "fp8": {"backend": "fp8"},
    "quanto": {"backend": "quanto", "nbits": 4, "q_group_size": 8, "residual_length": 4},
    "hqq": {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1, "q_group_size": 8, "residual_length": 4},
}
"""So few tokens are kept as they are that the cache is quantised again in the middle of a generation."""

PACKAGES = {"fp8": "torch", "quanto": "optimum.quanto", "hqq": "hqq"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    attncompile.hf.forget()
    yield
    torch._dynamo.reset()


def calls(cache: str, search: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A padded batch, and how to generate from it."""
    pytest.importorskip(PACKAGES[cache])
    how = {**SEARCHES[search], "cache_implementation": "quantized", "cache_config": CACHES[cache]}
    return tokens(2, 7), how


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("cache", "search", "kind", "dynamic"),
    [
        ("fp8", "greedy", "llama", True),
        pytest.param("fp8", "beams", "llama", None, marks=SLOW),
        pytest.param("fp8", "sampling", "qwen3", True, marks=SLOW),
        *(pytest.param(name, "greedy", "llama", how, marks=SLOW) for name in ("quanto", "hqq") for how in (True, None)),
    ],
)
def test_a_compiled_model(cache: str, search: str, kind: str, dynamic: bool | None) -> None:
    call, how = calls(cache, search)
    expected = generated(small(kind), call, **how)
    model = small(kind, "sdpa")
    model.forward = attncompile.compile(model.forward, dynamic=dynamic, rest="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        assert torch.equal(generated(model, call, **how), expected)
    require_rewritten(model.forward)
    if cache == "fp8":  # keys and values are read as they lie in the cache, whose scale is a factor of the score
        assert any(":float8_e4m3 " in site.after for site in attncompile.explain(model.forward).sites)


@pytest.mark.parametrize("search", ["greedy", pytest.param("beams", marks=SLOW)])
@pytest.mark.parametrize("cache", CACHES)
def test_a_model_whose_calls_are_stated(cache: str, search: str) -> None:
    call, how = calls(cache, search)
    model = small("llama", "attncompile")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        assert torch.equal(generated(model, call, **how), generated(small("llama"), call, **how))
    sites = attncompile.hf.explain(model).sites
    assert sites and all(site.spec is not None for site in sites)
