"""Every Spec that the Hopper kernel takes, without a GPU: its module's own text, run warp by warp, at awkward sizes."""

from __future__ import annotations

import pytest
import torch

from attncompile.codegen.gluon import generate
from tests.cases import Case
from tests.codegen.hopper_on_cpu import run_on_cpu
from tests.codegen.test_gluon_gpu import LOWERED, ROWS
from tests.kernels.comparison import aligned_inputs, compare

SIZES = ((2, 7, 13), (1, 130, 257))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_awkward_sizes(row: Case) -> None:
    module = generate(row.spec)
    dtype = torch.float16 if "float16" in row.text.split() else torch.bfloat16
    for batch, queries, keys in SIZES:
        sizes = {"B": batch, "I": queries, "J": keys}
        case = Case(row.name, row.text, sizes, ranges={"document": (0, 3), "listed": (0, 2)})
        for outcome in compare(case, lambda *tensors: run_on_cpu(module, tensors), dtype, place=aligned_inputs):
            assert outcome.passed, (sizes, outcome)


@pytest.mark.parametrize("case", LOWERED, ids=lambda case: case.name)
def test_table(case: Case) -> None:
    module = generate(case.spec)
    for outcome in compare(case, lambda *tensors: run_on_cpu(module, tensors), torch.bfloat16, place=aligned_inputs):
        assert outcome.passed, outcome
