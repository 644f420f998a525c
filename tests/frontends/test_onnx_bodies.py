"""Attention inside the bodies of ``If``, ``Loop`` and ``Scan`` and inside local functions: found, and rewritten."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import attncompile
from attncompile.frontends.graph import RefusedAttention
from attncompile.frontends.onnx import onnx_graph
from attncompile.frontends.onnx_bodies import nested_nodes, nested_values
from attncompile.lift import Program, lift_graph
from tests.backend.test_backend import small_llama

BRANCHES = """g (bool c, float[B,2,I,4] q, float[B,2,J,4] k, float[B,2,J,4] v, bool[B,1,1,J] m) => (y) {
    kt = Transpose<perm=[0,1,3,2]>(k)
    y = If(c) <
        then_branch = t () => (float[B,2,I,4] out) {
            s = MatMul(q, kt)  p = Softmax(s)  out = MatMul(p, v) },
        else_branch = e () => (float[B,2,I,4] out) {
            zero = Constant<value = float {0.0}>()  low = Constant<value = float {-10000.0}>()
            s = MatMul(q, kt)  f = Where(m, zero, low)  l = Add(s, f)  p = Softmax(l)  out = MatMul(p, v) }> }"""

LOOP = """g (float[B,2,I,4] q, float[B,2,J,4] k, float[B,2,J,4] v) => (y, keys) {
    rounds = Constant<value = int64 {3}>()  go = Constant<value = bool {1}>()
    y, keys = Loop(rounds, go, q, k) <body = b (int64 i, bool go_in, state, seen) => (bool go_out, out, more) {
        go_out = Identity(go_in)
        kt = Transpose<perm=[0,1,3,2]>(k)  s = MatMul(state, kt)  p = Softmax(s)  out = MatMul(p, v)
        more = Concat<axis=2>(seen, k) }> }"""

SCAN = """g (float[T,B,2,I,4] qs, float[B,2,J,4] k, float[B,2,J,4] v) => (ys) {
    ys = Scan<num_scan_inputs = 1, body = b (q) => (out) {
        kt = Transpose<perm=[0,1,3,2]>(k)  s = MatMul(q, kt)  p = Softmax(s)  out = MatMul(p, v) }>(qs) }"""


def parsed(text: str, *, version: int = 21, functions: str = "") -> ir.Model:
    head = f'<ir_version: 10, opset_import: ["" : {version}, "local" : 1]>'
    return ir.from_proto(onnx.parser.parse_model(f"{head} {text} {functions}"))


def lifted(model: ir.Model) -> Program:
    return lift_graph(onnx_graph(model))


def test_both_branches_are_lifted_with_what_they_capture() -> None:
    plain, masked = lifted(parsed(BRANCHES)).sites
    for site in (plain, masked):
        assert site.status == "lifted", site.refusal
        assert site.region is not None
        # the transposed key is made outside, and is seen through
        assert [binding.value for binding in site.region.inputs[:3]] == ["q", "k", "v"]
    assert "mask   m[b, 0, 0, j]" in str(masked.spec) and "mask   true" in str(plain.spec)


def test_names_are_unique_across_branches_and_what_is_computed_stays() -> None:
    model = parsed(BRANCHES)
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((1, 2, 3, 4)).astype(np.float32) for name in "qkv"}
    feeds["m"] = np.array([True, False, True]).reshape(1, 1, 1, 3)

    def run(model: ir.Model) -> list[np.ndarray]:
        session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
        return [session.run(None, {**feeds, "c": np.array(c)})[0] for c in (True, False)]

    before = run(model)
    onnx_graph(model)
    for wanted, found in zip(before, run(model), strict=True):
        np.testing.assert_array_equal(found, wanted)
    names = [value.name for value in nested_values(model.graph)]
    assert len(set(names)) == len(names)
    natives = [node.name for node in nested_nodes(model.graph)]
    assert len(set(natives)) == len(natives)


def test_the_state_of_a_loop_may_be_the_query_and_may_grow() -> None:
    model = parsed(LOOP)
    graph = onnx_graph(model)
    (site,) = lift_graph(graph).sites
    assert site.status == "lifted", site.refusal
    assert "q[B,2,I,4]  k,v[B,2,J,4]" in str(site.spec)
    # the concatenated keys are longer in every round, so their length is none that is known; the rest is
    batch, heads, length, channels = graph.infos["seen"].shape
    assert (str(batch), str(heads), str(channels)) == ("B", "2", "4") and str(length) not in ("J", "I")


def test_a_slice_of_a_scan_is_an_operand() -> None:
    (site,) = lifted(parsed(SCAN)).sites
    assert site.status == "lifted", site.refusal
    assert "q[B,2,I,4]  k,v[B,2,J,4]" in str(site.spec)


def test_weights_that_a_body_returns_are_observed() -> None:
    text = BRANCHES.replace("y = If", "y, w = If").replace("=> (y)", "=> (y, w)")
    text = text.replace("(float[B,2,I,4] out)", "(float[B,2,I,4] out, float[B,2,I,J] p)")
    for site in lifted(parsed(text)).sites:
        assert site.status == "observed" and site.refusal is not None
        assert site.refusal.kind == "escaping-value"


CALLED = "g (float[B,2,I,4] q, float[B,2,J,4] k, float[B,2,J,4] v) => (y) {{ y = local.attend{call}(q, k, v) }}"
FUNCTION = """<domain: "local", opset_import: ["" : {version}]> attend {attributes} (q, k, v) => (y) {{
    t = Transpose<perm=[0,1,3,2]>(k)  s = MatMul(q, t)  p = Softmax(s)  y = MatMul(p, v) }}"""


def test_local_functions_are_looked_into_inside_bodies_too() -> None:
    function = FUNCTION.format(version=21, attributes="")
    (site,) = lifted(parsed(CALLED.format(call=""), functions=function)).sites
    assert site.status == "lifted", site.refusal
    inside = """g (bool c, float[B,2,I,4] q, float[B,2,J,4] k, float[B,2,J,4] v) => (y) {
        y = If(c) <then_branch = t () => (float[B,2,I,4] a) { a = local.attend(q, k, v) },
                   else_branch = e () => (float[B,2,I,4] a) { a = Identity(q) }> }"""
    (site,) = lifted(parsed(inside, functions=function)).sites
    assert site.status == "lifted", site.refusal


def test_attention_in_a_function_that_cannot_be_inlined_is_refused_and_not_lost() -> None:
    model = parsed(CALLED.format(call=""), functions=FUNCTION.format(version=17, attributes=""))
    graph = onnx_graph(model)
    assert any(isinstance(node, RefusedAttention) for node in graph.nodes)
    (site,) = lift_graph(graph).sites
    assert site.status == "refused" and site.refusal is not None
    assert "it is written for opset 17 of ai.onnx, the model for 21" in str(site.refusal)


def test_a_function_without_attention_is_no_site() -> None:
    body = """<domain: "local", opset_import: ["" : 17]> attend (q, k, v) => (y) { y = Add(q, k) }"""
    assert lifted(parsed(CALLED.format(call=""), functions=body)).sites == ()


@pytest.fixture(scope="module")
def switched(tmp_path_factory: pytest.TempPathFactory, exports: Path) -> Path:
    """A model that switches operators by length: both are in branches of an ``If``."""
    folder = tmp_path_factory.mktemp("switched")
    small_llama().save_pretrained(folder / "llama")
    attncompile.convert(folder / "llama", folder / "out", to="onnx", prefer="fastest", cache=False)
    return folder / "out" / "model.onnx"


def test_our_own_length_switch_is_found_again(switched: Path) -> None:
    model = ir.load(switched)
    operators = [node.op_type for node in nested_nodes(model.graph)]
    assert operators.count("If") == operators.count("Attention") == operators.count("GroupQueryAttention") == 2
    sites = lifted(model).sites
    assert [site.status for site in sites] == ["lifted"] * 4, [str(site.refusal) for site in sites]
    assert [site.name for site in sites] == [
        f"model.layers.{layer}.self_attn{again}" for layer in range(2) for again in ("", ".2")
    ]
    assert all("j ≤ i and attention_mask[b, j] ≠ 0" in str(site.spec) for site in sites)


def test_sites_in_bodies_are_rewritten(switched: Path, tmp_path: Path) -> None:
    attncompile.convert(switched, tmp_path / "plain", to="onnx", prefer="decomposed")
    operators = [node.op_type for node in nested_nodes(ir.load(tmp_path / "plain" / "model.onnx").graph)]
    assert operators.count("If") == 2 and operators.count("Softmax") == 4
    assert "Attention" not in operators and "GroupQueryAttention" not in operators


def test_a_site_that_captures_is_rewritten_in_its_branch(tmp_path: Path) -> None:
    model = parsed(BRANCHES, version=23)
    ir.save(model, tmp_path / "model.onnx")
    attncompile.convert(tmp_path / "model.onnx", tmp_path / "out", to="onnx", prefer="fused")
    written = ir.load(tmp_path / "out" / "model.onnx")
    inside = [node.op_type for node in nested_nodes(written.graph) if node.graph is not written.graph]
    assert not {"Softmax", "MatMul"} & set(inside)
