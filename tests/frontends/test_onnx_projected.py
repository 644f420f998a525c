"""ONNX Runtime's calls that hold their projections: defined as its kernels compute them, lifted, and put back."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import RemoveUnusedNodesPass

from attncompile.convert.onnx_rewrite import rewrite_onnx
from attncompile.frontends.graph import Info
from attncompile.frontends.onnx import onnx_graph
from attncompile.frontends.onnx_definitions import put_back, spell_out_contrib, spelled_out
from attncompile.ir import Size
from attncompile.ir.expr import Const
from attncompile.lift import lift_graph
from attncompile.passes import parse_passes
from tests.frontends.onnx_reference import parsed
from tests.frontends.projected_calls import CALLS, WIDTH, Projected
from tests.frontends.test_onnx_definitions import form


def computed(call: Projected) -> list[np.ndarray]:
    """What ONNX Runtime's kernel computes, with its optimisations off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    written = call.model().SerializeToString()
    return onnxruntime.InferenceSession(written, options, providers=["CPUExecutionProvider"]).run(None, call.feeds())


def infos(model: ir.Model) -> dict[str, Info]:
    """Shapes of inputs and constants, which the definitions of these models need."""
    found = {}
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        sizes = [Const(n) if isinstance(n, int) else Size(str(n.value)) for n in value.shape or ()]
        found[value.name or ""] = Info(tuple(sizes), "float32")
    return found


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_definition_is_what_the_kernel_computes(call: Projected) -> None:
    model, wanted = ir.from_proto(call.model()), computed(call)
    assert spell_out_contrib(model, infos(model))
    assert not any(node.domain for node in model.graph)
    found = ReferenceEvaluator(ir.to_proto(model)).run(None, call.feeds())
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        # both round to float32: scores of a few units, sums of WIDTH products of numbers below 4
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=WIDTH * 16 * float(np.finfo(np.float32).eps))


def assert_lifted_and_put_back(written: onnx.ModelProto, says: tuple[str, ...]) -> None:
    """One site, whose Spec says so; and the call that its definition stood for is what it was."""
    model = ir.from_proto(written)
    before = form(model)
    (site,) = lift_graph(onnx_graph(model)).sites
    assert site.status == "lifted" and site.proof is not None, str(site.refusal)
    for part in says:
        assert part in str(site.spec), str(site.spec)
    (only,) = spelled_out(model)
    put_back(only)
    RemoveUnusedNodesPass()(model)
    assert form(model) == before
    onnx.checker.check_model(ir.to_proto(model))


@pytest.mark.parametrize("call", [call for call in CALLS if call.says], ids=str)
def test_a_call_is_lifted_and_goes_back(call: Projected) -> None:
    assert_lifted_and_put_back(call.model(), call.says)


TEXT = """g (float[B,S,24] x, float[24,72] w, MASK, float[2,B,3,P,8] past, int32[1] count) => (y)
    { z = com.microsoft.SkipLayerNormalization(x, x, x)  y = com.microsoft.CALL }"""
"""``z`` is nothing that anybody says the shape of."""


@pytest.mark.parametrize(
    ("called", "mask", "reason"),
    [
        ("Attention<num_heads=3, do_rotary=1>(x, w)", "", "do_rotary is set"),
        ("Attention<num_heads=3, past_present_share_buffer=1>(x, w, , m, past, , count)", "", "share_buffer is set"),
        ("Attention<num_heads=3>(x, w, , m, past, , count)", "", "past_sequence_length"),
        ("Attention<num_heads=3>(x, w, , m)", "int32[B,1,M,M] m", "its mask has 4 axes"),
        ("Attention<num_heads=5>(x, w)", "", "(24, 24, 24) are no multiples of 5 heads"),
        ("Attention<num_heads=3, qkv_hidden_sizes=[24, 12, 36]>(x, w)", "", "(24, 12, 36)"),
        ("QAttention<num_heads=3>(x, w)", "", "it has no bias"),
        ("QAttention<num_heads=3>(c, d, h, h, h)", "float16 h, int8[B,S,24] c, int8[24,72] d", "h is float16"),
        ("Attention<num_heads=3>(c, d)", "int8[B,S,24] c, int8[24,72] d", "d is int8"),
        ('Attention<num_heads="three">(x, w)', "", "its attribute num_heads is no number"),
        ("Attention<num_heads=3>(x, w, , m, past, , count, count)", "", "it has 8 inputs"),
        ("Attention<num_heads=3>(x, past)", "", "the shape of its weights is not known"),
        ("Attention<num_heads=3>(x, e)", "float[24,73] e", "(24, 24, 25)"),
    ],
)
def test_a_call_that_is_not_defined_says_why(called: str, mask: str, reason: str) -> None:
    text = TEXT.replace("CALL", called).replace("MASK", mask or "int32[B,S] m")
    (site,) = lift_graph(onnx_graph(parsed(text, 17))).sites
    assert site.status == "refused" and site.refusal is not None
    assert reason in site.refusal.reason and site.refusal.hint


def test_a_definition_needs_an_operator_set_that_can_say_it() -> None:
    text = TEXT.replace("CALL", "Attention<num_heads=3>(x, w)").replace("MASK", "int32[B,S] m")
    (site,) = lift_graph(onnx_graph(parsed(text, 10))).sites
    assert site.refusal is not None and "defined for opset 11 and later" in site.refusal.reason


def test_a_mask_of_unknown_rank_is_refused() -> None:
    text = """g (float[B,S,24] x, float[24,72] w, int32[B,S] p, int64[R] r) => (y) {
        m = Reshape(p, r)  y = com.microsoft.Attention<num_heads=3>(x, w, , m) }"""
    (site,) = lift_graph(onnx_graph(parsed(text, 17))).sites
    assert site.refusal is not None and "it is not known how many axes its mask has" in site.refusal.reason


def test_sites_are_called_after_the_module_of_their_call() -> None:
    text = "g (float[B,S,24] x, float[24,72] w) => (y) { t = com.microsoft.Attention<num_heads=3>(x, w)  y = Neg(t) }"
    model = parsed(text, 17)
    model.graph[0].outputs[0].name = "/encoder/layer.0/self/out"
    (site,) = lift_graph(onnx_graph(model), "model").sites
    assert site.name == "encoder.layer.0.self"


@pytest.mark.parametrize(("prefer", "stays"), [("fastest", True), ("fused", False), ("decomposed", False)])
@pytest.mark.parametrize("operator", ["Attention", "QAttention"])
def test_a_call_stays_one_where_the_fastest_is_asked_for(operator: str, prefer: str, stays: bool) -> None:
    call = next(call for call in CALLS if call.operator == operator and call.name == "causal and padding")
    model, wanted = ir.from_proto(call.model()), computed(call)
    (outcome,) = rewrite_onnx(model, "m", parse_passes("fuse"), "cpu", prefer, False, ()).outcomes  # type: ignore[arg-type]
    operators = [(node.domain, node.op_type) for node in model.graph]
    assert (("com.microsoft", operator) in operators) == stays
    if stays:
        assert outcome.operator == "original" and f"it stays {operator}" in outcome.reason
    elif operator == "QAttention":
        assert ("", "MatMulInteger") in operators  # projections stay in whole numbers
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    written = ir.to_proto(model).SerializeToString()
    found = onnxruntime.InferenceSession(written, options, providers=["CPUExecutionProvider"]).run(None, call.feeds())
    np.testing.assert_allclose(found[0], wanted[0], rtol=0, atol=WIDTH * 16 * float(np.finfo(np.float32).eps))
