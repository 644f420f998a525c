"""Calls spelled out by ONNX's own definitions, and put back where nobody replaced their attention."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.backend.test.case.node import attention, flexattention
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import RemoveUnusedNodesPass

from attncompile.codegen.onnx.tried import installed, newest_opset
from attncompile.convert.onnx_rewrite import rewrite_onnx
from attncompile.frontends.onnx import onnx_graph
from attncompile.frontends.onnx_definitions import put_back, spelled_out
from attncompile.verify import require_as_good_as_eager

PREFIX = "test_attention_4d_"
NAMES = (
    f"{PREFIX}with_past_and_present",
    f"{PREFIX}gqa_with_past_and_present",
    f"{PREFIX}with_qk_matmul",
    "test_flexattention_causal_mask",
)
TWO_STEPS = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[2,3,4,8] q, float[2,3,4,8] k, float[2,3,4,8] v, float[2,3,P,8] pk, float[2,3,P,8] pv)
    => (float[2,3,4,8] y, float[2,3,R,8] rk, float[2,3,R,8] rv) {
    x, sk, sv = Attention<is_causal = 1>(q, k, v, , pk, pv)
    y, rk, rv = Attention<is_causal = 1>(x, k, v, , sk, sv)
}
"""
"""Two calls with a cache; the second reads what the first gives."""


def case(name: str) -> onnx.backend.test.case.test_case.TestCase:
    assert attention and flexattention  # importing them registers their cases
    return next(found for found in onnx.backend.test.case.node._NodeTestCases if found.name == name)


def form(model: ir.Model) -> list[object]:
    """What a model's nodes are, with the names of what they read and make."""
    return [
        (
            node.domain,
            node.op_type,
            [value.name if value is not None else "" for value in node.inputs],
            [value.name for value in node.outputs],
            sorted(node.attributes),
        )
        for node in model.graph
    ]


def feeds() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    sizes = {"q": 4, "k": 4, "v": 4, "pk": 5, "pv": 5}
    return {name: generator.standard_normal((2, 3, size, 8), np.float32) for name, size in sizes.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_call_that_is_put_back_is_the_call(name: str) -> None:
    model = ir.from_proto(case(name).model)
    before = form(model)
    onnx_graph(model)
    calls = spelled_out(model)
    assert form(model) != before and len(calls) == 1
    assert not any("attncompile.definition" in node.metadata_props for node in model.graph)
    put_back(calls[0])
    RemoveUnusedNodesPass()(model)
    assert form(model) == before
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_a_call_reads_what_another_that_was_put_back_gives() -> None:
    model = ir.from_onnx_text(TWO_STEPS)
    before = form(model)
    expected = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds())
    onnx_graph(model)
    calls = spelled_out(model)
    assert len(calls) == 2
    for only in calls:  # also when the first stays spelled out for a while
        put_back(only)
    RemoveUnusedNodesPass()(model)
    assert form(model) == before
    for found, wanted in zip(ReferenceEvaluator(ir.to_proto(model)).run(None, feeds()), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


WIDE_STATE = """<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
    scan (float16[2,5,16] q, float16[2,5,16] k, float16[2,5,16] v, float[2,2,8,8] s) => (y, z) {
        y, z = com.microsoft.LinearAttention<q_num_heads=2, kv_num_heads=2, update_rule="linear">(q, k, v, s)
    }"""


def test_a_call_that_nobody_measured_stays() -> None:
    """With a state of another type no operator was tried, and how fast this one is beside plain ones is not known."""
    model = ir.from_onnx_text(WIDE_STATE)
    before = form(model)
    (outcome,) = rewrite_onnx(model, "scan", (), "cpu", "fastest", False, ()).outcomes
    assert outcome.site.status == "lifted", str(outcome.site.refusal)
    assert "it stays LinearAttention, which was not measured" in outcome.reason
    assert form(model) == before


def test_a_call_that_the_runtime_does_not_know_is_written_anew() -> None:
    """In float64 no fused operator is right, and FlexAttention is none of ONNX Runtime's at all."""
    model = ir.from_proto(case("test_flexattention_double").model)
    (outcome,) = rewrite_onnx(model, "flex", (), "cpu", "fastest", False, ()).outcomes
    assert outcome.operator == "decomposition", outcome.reason
    assert not any(node.op_type == "FlexAttention" for node in model.graph)


@pytest.mark.skipif(newest_opset(installed(), "cpu") >= 27, reason="the installed ONNX Runtime knows windows")
def test_a_call_with_attributes_that_the_runtime_does_not_know_gives_way_to_its_definition() -> None:
    """A call that returns its scores is not replaced, and ONNX Runtime 1.31 knows Attention without windows."""
    model = ir.from_proto(case("test_attention_local_window_gqa_rank4_mask").model)
    made = rewrite_onnx(model, "window", (), "cpu", "fastest", False, ())
    assert [outcome.operator for outcome in made.outcomes] == ["original"]
    assert not any(node.op_type == "Attention" for node in model.graph)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize("prefer", ["fastest", "decomposed"])
def test_a_conversion_keeps_calls_that_it_does_not_replace(prefer: str) -> None:
    model = ir.from_onnx_text(TWO_STEPS)
    expected = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds())
    rewritten = rewrite_onnx(model, "two", (), "cpu", prefer, False, ())  # type: ignore[arg-type]
    operators = [node.op_type for node in rewritten.model.graph]
    if prefer == "fastest":
        assert operators == ["Attention", "Attention"] and not rewritten.choices
        assert all("it stays Attention" in outcome.reason for outcome in rewritten.outcomes)
    else:
        assert "Attention" not in operators and len(rewritten.choices) == 2
    wide = onnx.parser.parse_model(TWO_STEPS.replace("float[", "double["))
    exact = ReferenceEvaluator(wide).run(None, {name: value.astype(np.float64) for name, value in feeds().items()})
    results = ReferenceEvaluator(ir.to_proto(rewritten.model)).run(None, feeds())
    for found, wanted, eager in zip(*(map(torch.from_numpy, made) for made in (results, exact, expected)), strict=True):
        require_as_good_as_eager(found, wanted, eager, 9, f"as {prefer} as possible")  # keys: five, and four more
