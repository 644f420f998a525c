"""``generate()`` with quantised caches: the tokens of the model as it is, with the same cache, through both doors."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import attncompile
import attncompile.hf
from attncompile.backend import FallbackWarning
from tests.backend.test_backend import tokens
from tests.backend.test_generation import SEARCHES, compiled, generated, require_rewritten, small

CACHES: dict[str, dict[str, Any]] = {
    "fp8": {"backend": "fp8"},
    "quanto": {"backend": "quanto", "nbits": 4, "q_group_size": 8, "residual_length": 4},
    "hqq": {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1, "q_group_size": 8, "residual_length": 4},
}
PACKAGES = {"quanto": "optimum.quanto", "hqq": "hqq"}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    attncompile.hf.forget()
    yield
    torch._dynamo.reset()
