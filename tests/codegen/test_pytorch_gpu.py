"""The PyTorch lowerings on a GPU: SDPA's kernels there, block-wise SDPA, compiled FlexAttention, scans."""

from __future__ import annotations

import pytest
import torch

from attncompile.codegen.pytorch import lower, why_not
from attncompile.ir.sample import random_tensors
from attncompile.verify import check_site, require_as_good_as_eager
from attncompile.verify.sites import longest_sum
from tests.cases import BY_NAME, CASES, Case

pytestmark = pytest.mark.gpu

# A compilation each: one row for each kind of score and mask.
COMPILED = ("softcap", "alibi", "sink-window-long", "documents", "gqa", "empty-rows-lowest", "log-sum-exp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", ["sdpa", "blockwise", "scan", "reference"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_table(case: Case, operator: str, dtype: torch.dtype) -> None:
    spec = case.spec
    if why_not(spec, "cuda", operator) is not None:
        return
    # float32 products otherwise run in TF32, whose rounding is not that of float32
    torch.backends.cuda.matmul.allow_tf32 = False
    run = lower(spec, "cuda", operator).run
    entry = check_site(case.name, spec, run, operator=operator, dtype=dtype, device="cuda")
    assert entry.passed, [one for one in entry.cases if not one.passed]


@pytest.mark.parametrize("row", COMPILED)
def test_compiled_flex(row: str) -> None:
    case = BY_NAME[row]
    spec = case.spec
    tensors = random_tensors(spec, {"B": 2, "I": 512}, 1, torch.bfloat16, case.ranges)
    run = lower(spec, "cuda", "flex").run
    found = run(*(tensors[value.name].cuda() for value in spec.inputs))
    results = found if isinstance(found, tuple) else (found,)
    wanted, eager = spec.interpret(tensors), spec.interpret(tensors, torch.bfloat16)
    for one, reference, plain in zip(results, wanted, eager, strict=True):
        require_as_good_as_eager(one.cpu(), reference, plain, longest_sum(spec, tensors), row)
