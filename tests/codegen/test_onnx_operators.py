"""Every operator that says it can compute a Spec does, against the reference, in ONNX Runtime's CPU."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from attncompile.codegen.onnx.capabilities import ATTEND_ROWS, SCAN_ROWS, Capability, rows_for
from attncompile.codegen.onnx.emit import alone
from attncompile.ir.ops import Cache
from attncompile.ir.spec import Spec
from tests.cases import BY_NAME, CASES, Case

# What another order of float32 operations may add, over sums as long as the longest rows and channels of the
# table; the error that plain float32 makes itself is measured beside it.
TOLERANCE = 301**0.5 * 16**0.5 * float(np.finfo(np.float32).eps)


def laid_flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(1, 2).flatten(2)


def run(spec: Spec, row: Capability, tensors: dict[str, torch.Tensor], *, flat: bool) -> list[torch.Tensor]:
    model = alone(spec, row, flat=flat)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    apart = {value.name for value in spec.captured()} | {
        operation.past for operation in spec.operations if isinstance(operation, Cache)
    }
    feed = {
        name: (laid_flat(tensor) if flat and tensor.dim() == 4 and name not in apart else tensor).numpy()
        for name, tensor in tensors.items()
    }
    wanted = {value.name for value in session.get_inputs()}
    return [torch.from_numpy(found) for found in session.run(None, {n: feed[n] for n in wanted})]


def assert_agrees(case: Case, row: Capability, *, flat: bool) -> None:
    spec, tensors = case.spec, case.tensors()
    expected = spec.interpret(tensors, torch.float64)
    plain = spec.interpret(tensors, torch.float32)
    for found, right, same_dtype in zip(run(spec, row, tensors, flat=flat), expected, plain, strict=True):
        unavoidable = float((same_dtype.double() - right).abs().nan_to_num().max())
        if flat and right.dim() == 4:
            right = laid_flat(right)
        torch.testing.assert_close(
            found.double(), right, rtol=TOLERANCE, atol=TOLERANCE + unavoidable, equal_nan=True
        )


ABLE = [(case, row) for case in CASES for row in rows_for(case.spec) if row.why_not(case.spec) is None]


@pytest.mark.parametrize("flat", [False, True], ids=["heads", "flat"])
@pytest.mark.parametrize("case,row", ABLE, ids=[f"{case.name}-{row.operator}" for case, row in ABLE])
def test_operator_computes_the_spec(case: Case, row: Capability, flat: bool) -> None:
    assert_agrees(case, row, flat=flat)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_spec_has_a_decomposition(case: Case) -> None:
    rows = rows_for(case.spec)
    assert [row.operator for row in rows if row.why_not(case.spec) is None][-1:] == ["decomposition"]


@pytest.mark.parametrize(
    "name,operator,reason",
    [
        ("softcap", "MultiHeadAttention", "constant scale"),
        ("log-sum-exp", "MultiHeadAttention", "log-sum-exp"),
        ("gqa", "MultiHeadAttention", "one KV head per query head"),
        ("gqa-strided", "GroupQueryAttention", "in order"),
        ("full", "GroupQueryAttention", "causal"),
        ("causal-first-rows", "GroupQueryAttention", "last query at the last key"),
        ("value-channels", "GroupQueryAttention", "value as key channels"),
        ("empty-rows-nan", "Attention", "NaN"),
        ("empty-rows-nan", "GroupQueryAttention", "NaN"),
        ("empty-rows-constant", "Attention", "adding a number"),
        ("empty-rows-shifted", "GroupQueryAttention", "leaves them a weight"),
        ("sigmoid", "Attention", "softmax only"),
        ("weight-edit", "Attention", "edit the weights"),
        ("scan-grouped", "LinearAttention", "sum of the weights"),
    ],
)
def test_refusals_say_why(name: str, operator: str, reason: str) -> None:
    row = next(row for row in (*ATTEND_ROWS, *SCAN_ROWS) if row.operator == operator)
    said = row.why_not(BY_NAME[name].spec)
    assert said is not None and reason in said


@pytest.mark.parametrize(
    "name,operators",
    [
        ("causal-padding", {"Attention", "MultiHeadAttention", "GroupQueryAttention"}),
        ("empty-rows-lowest", {"Attention", "MultiHeadAttention", "GroupQueryAttention"}),
        ("window", {"Attention", "MultiHeadAttention", "GroupQueryAttention"}),
        ("padding", {"MultiHeadAttention"}),
        ("gqa", {"Attention", "GroupQueryAttention"}),
        ("scan", {"LinearAttention"}),
        ("scan-padding", {"LinearAttention"}),
    ],
)
def test_capable_operators(name: str, operators: set[str]) -> None:
    spec = BY_NAME[name].spec
    able = {row.operator for row in rows_for(spec) if row.why_not(spec) is None}
    assert able == operators | {"decomposition"}
