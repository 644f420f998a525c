"""The rows of the benchmark of rotary maps compute what they say, as far as a CPU can tell."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attncompile.codegen import gluon
from benchmarks.quantized import rounded
from benchmarks.quantized_rotary import ROUNDED, WORKS, Rotated, modules, rotation, tables


@pytest.mark.parametrize("work", WORKS[:2], ids=lambda work: work.name)
def test_both_ways_are_one_function(work: Rotated) -> None:
    small = dataclasses.replace(work, length=9, batch=2)
    shapes = {"q": small.heads, "k": small.groups, "v": small.groups}
    given = {name: torch.randn(2, heads, 9, small.channels, dtype=torch.float64) for name, heads in shapes.items()}
    cos, sin = tables(small, "cpu", torch.float64)
    query, key = rotation(small.convention)(given["q"], given["k"], cos, sin)
    found = small.whole().interpret({**given, "cos": cos, "sin": sin})
    torch.testing.assert_close(found, small.spec().interpret({**given, "q": query, "k": key}))


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
def test_every_row_has_kernels(work: Rotated) -> None:
    for form in ROUNDED:
        for spec in (rounded(work.spec(), form), rounded(work.whole(), form)):
            assert gluon.why_not_spec(spec) is None
    names = {name: module.source for name, module in modules(work).items()}
    assert all(("rotate_quantize" in source) == ("fused" in name) for name, source in names.items())
