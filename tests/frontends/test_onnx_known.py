"""Small values of an ONNX graph as expressions, the branches that they decide, and softmaxes of unknown rank."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from attncompile.frontends.graph import RefusedAttention
from attncompile.frontends.onnx import onnx_graph
from attncompile.frontends.onnx_bodies import nested_nodes
from attncompile.frontends.onnx_known import Known, known_value, scalar, vector
from attncompile.ir import Size
from attncompile.ir.expr import ZERO, Const
from attncompile.lift import lift_graph


def table(array: object) -> Known:
    """A constant."""
    numbers = np.asarray(array)
    kind = {"i": "int64", "b": "bool", "f": "float32"}[numbers.dtype.kind]
    return Known(numbers.shape, tuple(Const(item) for item in numbers.reshape(-1).tolist()), kind)


CASES = {
    "Transpose": ([np.arange(6).reshape(2, 3)], {}),
    "Transpose perm": ([np.arange(6).reshape(1, 2, 3)], {"perm": [2, 0, 1]}),
    "Reshape": ([np.arange(8), np.array([-1, 2])], {}),
    "Reshape copies": ([np.arange(8).reshape(2, 4), np.array([0, 2, -1])], {}),
    "Slice flips": (
        [np.arange(8).reshape(4, 2), np.array([-1]), np.array([-(2**63) + 1]), np.array([0]), np.array([-1])],
        {},
    ),
    "Slice two axes": ([np.arange(12).reshape(3, 4), np.array([1, 0]), np.array([3, -1]), np.array([0, 1])], {}),
    "Gather rows": ([np.arange(6).reshape(3, 2), np.array([[2, 0]])], {"axis": 0}),
    "Gather columns": ([np.arange(6).reshape(3, 2), np.array(1)], {"axis": 1}),
    "Concat columns": ([np.arange(4).reshape(2, 2), np.arange(2).reshape(2, 1)], {"axis": 1}),
    "Unsqueeze": ([np.arange(3), np.array([0, 2])], {}),
    "Squeeze": ([np.arange(3).reshape(1, 3, 1), np.array([0])], {}),
    "Flatten": ([np.arange(8).reshape(2, 2, 2)], {"axis": -1}),
    "Add broadcast": ([np.arange(3).reshape(3, 1), np.arange(2)], {}),
    "Expand": ([np.arange(3).reshape(3, 1), np.array([2, 1, 4])], {}),
    "ReduceProd": ([np.arange(1, 7).reshape(2, 3), np.array([1])], {"keepdims": 0}),
    "ReduceSum all": ([np.arange(6).reshape(2, 3)], {}),
    "OneHot": ([np.array([1, 3, -1]), np.array(4), np.array([0, 5])], {"axis": -1}),
    "OneHot front": ([np.array([1, 0]), np.array(3), np.array([7, 8])], {"axis": 0}),
    "Range": ([np.array(2), np.array(11), np.array(3)], {}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_rule_gives_what_the_operator_gives(name: str) -> None:
    arrays, attributes = CASES[name]
    operator = name.split()[0]
    names = [f"x{n}" for n in range(len(arrays))]
    node = onnx.helper.make_node(operator, names, ["y"], **attributes)
    inputs = [
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.INT64, a.shape)
        for n, a in zip(names, arrays, strict=True)
    ]
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT64, None)
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", inputs, [output]), opset_imports=[onnx.helper.make_opsetid("", 18)]
    )
    (expected,) = ReferenceEvaluator(model).run(None, dict(zip(names, arrays, strict=True)))
    found = known_value(operator, [table(a) for a in arrays], attributes)
    assert found is not None
    assert found.dims == expected.shape
    assert [item.value for item in found.items] == expected.reshape(-1).tolist()


def test_a_quotient_without_remainder_is_known_whatever_the_sign() -> None:
    length = Size("Length")
    padded = -8 * ((-length) // 8)
    found = known_value("Div", [scalar(padded), scalar(Const(8))], {})
    assert found is not None and str(found.items[0]) == "(Length + 7) // 8"
    assert known_value("Div", [scalar(-length), scalar(Const(8))], {}) is None  # truncated, not floored


def test_malformed_nodes_give_nothing() -> None:
    assert known_value("Reshape", [table(np.arange(6)), vector([Const(4), Const(2)])], {}) is None
    assert known_value("Gather", [table(np.arange(6)), vector([Const(9)])], {}) is None
    assert known_value("Concat", [table(np.arange(6)), scalar(Const(1))], {"axis": 0}) is None


ATTENTION = """
   scores = MatMul(q, kt)
   weights = Softmax<axis = -1>(scores)
   out = MatMul(weights, v)
"""


def parsed(text: str) -> ir.Model:
    """A model from a graph in ONNX's text form."""
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> {text}'))


def test_a_branch_that_the_shape_decides_takes_the_place_of_its_if() -> None:
    model = parsed(
        """g (float[B, 2, N, 8] q, float[B, 2, N, 8] k, float[B, 2, N, 8] v) => (float[B, 2, N, 8] out) {
           shape = Shape(k)
           rank = Size(shape)
           three = Constant<value = int64 {3}>()
           deep = Greater(rank, three)
           kt = If(deep) <
              then_branch = t () => (float kt1) { kt1 = Transpose<perm = [0, 1, 3, 2]>(k) },
              else_branch = e () => (float kt2) { kt2 = Flatten(k) }>
        """
        + ATTENTION
        + "}"
    )
    (site,) = lift_graph(onnx_graph(model), "model").sites
    assert site.status == "lifted"
    assert not any(node.op_type == "If" for node in nested_nodes(model.graph))
    q = np.random.default_rng(0).standard_normal((2, 2, 5, 8)).astype(np.float32)
    (out,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"q": q, "k": q, "v": q})
    scores = np.exp(q @ q.swapaxes(-1, -2))
    assert np.abs(out - scores / scores.sum(-1, keepdims=True) @ q).max() < 64 * np.finfo(np.float32).eps


def test_a_decided_if_that_is_an_output_of_the_model_keeps_its_name() -> None:
    model = parsed(
        """g (float[N] x) => (float[N] y) {
           yes = Constant<value = bool {1}>()
           y = If(yes) <then_branch = t () => (float a) { a = Neg(x) }, else_branch = e () => (float b) { b = Abs(x) }>
        }"""
    )
    onnx_graph(model)
    assert [value.name for value in model.graph.outputs] == ["y"]
    (out,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": np.array([1.0, -2.0], dtype=np.float32)})
    assert out.tolist() == [-1.0, 2.0]


def test_an_if_that_data_decides_stays() -> None:
    model = parsed(
        """g (float[N] x, bool c) => (float[N] y) {
           y = If(c) <then_branch = t () => (float a) { a = Neg(x) }, else_branch = e () => (float b) { b = Abs(x) }>
        }"""
    )
    onnx_graph(model)
    assert [node.op_type for node in model.graph] == ["If"]


def test_what_the_first_round_of_a_loop_decides_is_not_decided_for_the_others() -> None:
    text = """g (float[1] x) => (float[M] y) {
       trip = Constant<value = int64 {3}>()
       yes = Constant<value = bool {1}>()
       y = Loop(trip, yes, x) <body = b (int64 i, bool c, float s) => (bool d, float t) {
          d = Identity(c)
          n = Size(s)
          one = Constant<value = int64 {1}>()
          first = Equal(n, one)
          u = If(first) <then_branch = p () => (float a) { a = Neg(s) }, else_branch = q () => (float e) { e = Abs(s) }>
          t = Concat<axis = 0>(u, s)
       }>
    }"""
    model, feeds = parsed(text), {"x": np.array([2.0], dtype=np.float32)}
    (expected,) = ReferenceEvaluator(ir.to_proto(parsed(text))).run(None, feeds)
    onnx_graph(model)
    (found,) = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)
    assert found.tolist() == expected.tolist() == [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, -2.0, 2.0]


def test_a_softmax_of_unknown_rank_between_two_products_is_refused_by_name() -> None:
    model = parsed(
        """g (float[B, 2, N, 8] q, float[B, 2, N, 8] k, float[B, 2, N, 8] v, int64[M] s) => (float out) {
           kt = Reshape(k, s)
        """
        + ATTENTION
        + "}"
    )
    graph = onnx_graph(model)
    (refused,) = [node for node in graph.nodes if isinstance(node, RefusedAttention)]
    assert "kt (Reshape)" in refused.reason
    (site,) = lift_graph(graph, "model").sites
    assert site.status == "refused" and site.refusal is not None and site.refusal.kind == "unstated-attention"


def test_a_classifier_of_unknown_rank_is_no_site() -> None:
    model = parsed(
        """g (float[B, 8] x, float[8, 4] w, int64[M] s) => (float out) {
           h = Reshape(x, s)
           out = Softmax<axis = -1>(h)
        }"""
    )
    assert lift_graph(onnx_graph(model), "model").sites == ()


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
@pytest.mark.parametrize("number", [0.0, 0.25, -0.25, 0.75, 1e6, -1e4, 12.6])
def test_one_number_and_its_code(number: float, kind: type[np.int8] | type[np.uint8]) -> None:
    """Halves go to the even code, and what is beyond the codes to the last one."""
    name = np.dtype(kind).name
    scale, zero = scalar(Const(0.5), "float32"), Known((), (Const(3),), name)
    written = np.array(number, np.float32), np.array(0.5, np.float32), np.array(3, kind)
    code = known_value("QuantizeLinear", [scalar(Const(number), "float32"), scale, zero], {})
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[] x, float[] s, KIND[] z) => (KIND[] c, float[] y) {
        c = QuantizeLinear(x, s, z)  y = DequantizeLinear(c, s, z) }""".replace("KIND", name)
    wanted = ReferenceEvaluator(onnx.parser.parse_model(text)).run(None, dict(zip("xsz", written, strict=True)))
    assert code == Known((), (Const(int(wanted[0])),), name)
    assert known_value("DequantizeLinear", [code, scale, zero], {}) == scalar(Const(float(wanted[1])), "float32")


def test_codes_of_several_numbers_are_not_written_out() -> None:
    several = Known((2,), (Const(1.0), Const(2.0)), "float32")
    scale, zero = scalar(Const(0.5), "float32"), Known((), (Const(0),), "int8")
    assert known_value("QuantizeLinear", [several, scale, zero], {}) is None
    assert known_value("DequantizeLinear", [Known((2,), (ZERO, ZERO), "int8"), scale, zero], {}) is None
    assert known_value("DequantizeLinear", [scalar(ZERO, "int8"), scale, None], {}) is None


def test_what_follows_a_short_stored_tensor_follows_what_is_fed_for_it() -> None:
    """Its elements are known, and a proof runs on others; what only its shape says stays known."""
    graph = onnx_graph(parsed("""g (float[B,3] x) => (y, n)
        <float[3] w = {1.0, 2.0, 3.0}, int64[2] flat = {1, 3}> {
        r = Reshape(w, flat)  t = Neg(r)  y = Add(x, t)  n = Shape(x) }"""))
    assert graph.evaluate is not None
    x, other = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([5.0, 7.0, 9.0], dtype=torch.float64)
    assert graph.evaluate(["y"], {"x": x, "w": other}, {"B": 2})["y"].tolist() == [[-5.0, -7.0, -9.0]] * 2
    assert graph.evaluate(["y"], {"x": x}, {"B": 2})["y"].tolist() == [[-1.0, -2.0, -3.0]] * 2
    assert graph.evaluate(["n"], {"w": other}, {"B": 2})["n"].tolist() == [2, 3]
