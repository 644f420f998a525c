"""The shared table itself: rows print as they are written, and are what they say."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attncompile.ir import Attend, print_spec
from tests.cases import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_print_as_written(case: Case) -> None:
    assert print_spec(case.spec) == case.text


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_empty_rows_are_where_the_table_says(case: Case) -> None:
    spec = case.spec
    attend = spec.attend()
    if attend is None or len(spec.operations) > 1:
        assert not case.empty_rows
        return
    if attend.norm.kind != "softmax":
        assert not case.empty_rows
        return
    # with −∞ for masked logits and NaN for rows without a key, the NaN rows are the empty ones
    plain = Attend(attend.query, attend.key, attend.value, mask=attend.mask, kv_head=attend.kv_head)
    probe = dataclasses.replace(spec, operations=(plain,), outputs=("out",))
    (out,) = probe.interpret(case.tensors(), torch.float64)
    assert bool(out.isnan().any()) == case.empty_rows
