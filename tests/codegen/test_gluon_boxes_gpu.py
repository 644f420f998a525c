"""Neighbourhood attention on a Hopper GPU, its tokens read in boxes or moved by copies, against the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attncompile.codegen import gluon, triton
from attncompile.codegen.triton.cache import load
from attncompile.codegen.triton.lower import on_hopper
from tests.kernels.comparison import aligned_inputs, compare
from tests.kernels.neighbourhood_cases import NEIGHBOURHOODS, Neighbourhood

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not on_hopper(torch.device("cuda")), reason="the kernel needs compute capability 9.x"),
]


@pytest.mark.parametrize("row", NEIGHBOURHOODS, ids=lambda row: row.name)
def test_neighbourhoods(row: Neighbourhood) -> None:
    for keys in (128, 64):
        spec = row.moved(128, keys)
        for module in (gluon.generate(spec, in_place=True), gluon.generate(spec), triton.generate(spec)):
            outcomes = compare(row.case, load(module), torch.bfloat16, "cuda", place=aligned_inputs)
            assert all(outcome.passed for outcome in outcomes), (keys, module.name, outcomes)


def test_packed_inputs_are_read_where_they_lie() -> None:
    row = next(row for row in NEIGHBOURHOODS if row.name == "plane")
    row = dataclasses.replace(row, channels=64, batch=2)
    attend = load(gluon.generate(row.moved(128, 128), in_place=True))
    packed = torch.randn(2, 384, 3, 2, 64, device="cuda", dtype=torch.bfloat16)
    query, key, value = (part.transpose(1, 2) for part in packed.unbind(2))
    separate = [part.contiguous() for part in (query, key, value)]
    assert torch.equal(attend(query, key, value), attend(*separate))
    assert torch.equal(attend(query, key, value), attend(query, key, value))


def test_a_neighbourhood_is_computed_in_boxes_unasked() -> None:
    row = Neighbourhood("wide-plane", (32, 128), (6, 6), channels=64, batch=2)
    spec = row.case.spec
    found = triton.lower(spec, "cuda")
    assert "a tile is a box of the tokens' grid" in found.reason
    outcomes = compare(row.case, found.run, torch.bfloat16, "cuda", place=aligned_inputs)
    assert all(outcome.passed for outcome in outcomes), outcomes
