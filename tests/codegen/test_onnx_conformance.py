"""ONNX's own conformance cases for attention, from the file through Spec and lowering to ONNX Runtime's results.

Every case of ``Attention``, ``FlexAttention`` and ``LinearAttention`` with float operands, as one call and as the
function of plain operators that the standard defines it by. What cannot go all the way stands in one of the tables
below with the reason, and a test fails when that reason is no longer true.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.backend.test.case import node as onnx_cases
from onnx.backend.test.case.node import attention, flexattention, linear_attention

from attncompile.codegen.onnx.choose import Prefer
from attncompile.convert.onnx_rewrite import Rewritten, rewrite_onnx
from attncompile.passes import parse_passes

# ONNX registers a module's cases when it is imported; collecting by its function would make those of all operators
REGISTERED = (attention, flexattention, linear_attention)
CASES = {case.name: case for case in onnx_cases._NodeTestCases if "attention" in case.name}

SCORES = (
    "test_attention_4d_with_qk_matmul",
    "test_attention_4d_with_past_and_present_qk_matmul",
    "test_attention_3d_with_past_and_present_qk_matmul",
    "test_attention_23_fullymasked_qk_matmul",
    "test_attention_24_fullymasked_qk_matmul",
    "test_attention_24_qk_matmul",
    "test_attention_local_window_gqa_rank4_mask",
)
"""How the names begin of cases that return the scores or the weights too: stated, and left as they were."""

BODIES = {
    name: "its recurrence is the body of a Scan, which is read node by node and not as a recurrence"
    for name in CASES
    if name.startswith("test_linear_attention") and name.endswith("_expanded")
}
"""Cases that run as they are: no site of theirs is lifted, or is it as a whole."""

NARROW = {name: "ONNX Runtime's CPU has no kernel for bfloat16" for name in CASES if "bf16" in name}
"""Cases that are lifted, and whose result ONNX Runtime does not load."""

WRONG = {
    f"test_attention_4d_with_past_and_present_qk_matmul_bias_{axes}_mask_causal": "ONNX Runtime's own Attention gives "
    "-inf in the scores that it returns, where the standard has a finite sum"
    for axes in ("3d", "4d")
}
"""Cases of a call that stays, because it returns its scores, and that ONNX Runtime computes otherwise."""


def returns_scores(name: str) -> bool:
    return name.startswith(SCORES)


def preferred(case: Any) -> Prefer:
    """A preference under which the site is written anew: a call of Attention is one already."""
    return "decomposed" if case.model.graph.node[0].op_type == "Attention" else "fused"


def rewritten(case: Any, prefer: Prefer) -> Rewritten:
    return rewrite_onnx(ir.from_proto(case.model), case.name, parse_passes("fuse"), "cpu", prefer, False, ())


def loaded(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def results(case: Any, model: ir.Model) -> list[np.ndarray]:
    ((arrays, _),) = case.data_sets
    names = [value.name for value in case.model.graph.input]
    return loaded(ir.to_proto(model).SerializeToString()).run(None, dict(zip(names, arrays, strict=True)))


def terms(case: Any) -> int:
    """More than the terms of any sum: channels, or keys, of all inputs together."""
    shapes = [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in case.model.graph.input]
    return max(size for shape in shapes for size in shape[-2:])


def apart(found: np.ndarray, wanted: np.ndarray, terms: int) -> str:
    """How two results differ beyond rounding, in words; empty where they do not."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"{found.dtype}{found.shape} where {wanted.dtype}{wanted.shape} is expected"
    one, other = found.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(other)
    if not np.array_equal(np.where(np.isfinite(one), 0.0, one), np.where(finite, 0.0, other), equal_nan=True):
        return "NaN or infinity in other places"
    # both sides round each sum; what they round is of the size of the largest value
    bound = 2 * math.sqrt(terms) * float(np.finfo(wanted.dtype).eps) * max(1.0, float(np.abs(other[finite]).max()))
    largest = float(np.abs(one[finite] - other[finite]).max(initial=0.0))
    return "" if largest <= bound else f"differs by {largest:.3g}, beyond {bound:.3g}"


@functools.cache
def differences(name: str, prefer: Prefer) -> tuple[Rewritten, Mapping[str, str]]:
    """What became of a case, and the outputs that differ from the published ones."""
    case = CASES[name]
    made = rewritten(case, prefer)
    ((_, wanted),) = case.data_sets
    pairs = zip((value.name for value in case.model.graph.output), results(case, made.model), wanted, strict=True)
    told = {output: apart(np.asarray(one), np.asarray(other), terms(case)) for output, one, other in pairs}
    return made, {output: said for output, said in told.items() if said}


WHOLE = [name for name in CASES if name not in {*BODIES, *NARROW} and not returns_scores(name)]
STAYING = [name for name in CASES if returns_scores(name) and name not in WRONG]


def assert_goes_all_the_way(name: str, prefer: Prefer) -> None:
    made, wrong = differences(name, prefer)
    (outcome,) = made.outcomes
    assert outcome.site.status == "lifted", str(outcome.site.refusal)
    assert outcome.operator != "original", outcome.reason
    assert not wrong


@pytest.mark.parametrize("name", WHOLE)
def test_case_goes_through_spec_and_lowering(name: str) -> None:
    assert_goes_all_the_way(name, preferred(CASES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WHOLE if preferred(CASES[name]) == "fused"])
def test_case_goes_through_plain_operators(name: str) -> None:
    assert_goes_all_the_way(name, "decomposed")


def test_linear_attention_is_one_operator() -> None:
    calls = [name for name in WHOLE if name.startswith("test_linear_attention")]
    assert len(calls) == 14
    for name in calls:
        made, _ = differences(name, "fused")
        assert [outcome.operator for outcome in made.outcomes] == ["LinearAttention"]


@pytest.mark.parametrize("name", STAYING)
def test_case_that_returns_scores_stays_and_runs(name: str) -> None:
    made, wrong = differences(name, "fused")
    (outcome,) = made.outcomes
    assert outcome.site.status == "observed" and outcome.operator == "original"
    assert not wrong


@pytest.mark.parametrize("name", BODIES)
def test_recurrence_in_a_body_runs_as_it_is(name: str) -> None:
    made, wrong = differences(name, "fused")
    assert not wrong
    assert not any(outcome.site.status == "lifted" for outcome in made.outcomes), "take it out of the table"


@pytest.mark.parametrize("name", NARROW)
def test_bfloat16_has_no_kernels(name: str) -> None:
    made = rewritten(CASES[name], preferred(CASES[name]))
    (outcome,) = made.outcomes
    assert outcome.site.status == "lifted", str(outcome.site.refusal)
    with pytest.raises(Exception, match="Could not find an implementation"):
        loaded(ir.to_proto(made.model).SerializeToString())


@pytest.mark.parametrize("name", WRONG)
def test_scores_of_the_runtime_itself_differ(name: str) -> None:
    made, wrong = differences(name, "fused")
    assert made.outcomes[0].site.status == "observed"
    assert list(wrong) == ["qk_matmul_output"]
    ((_, wanted),) = CASES[name].data_sets
    unchanged = results(CASES[name], ir.from_proto(CASES[name].model))
    assert apart(np.asarray(unchanged[-1]), np.asarray(wanted[-1]), terms(CASES[name]))
