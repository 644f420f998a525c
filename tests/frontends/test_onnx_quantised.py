"""Operators on quantised tensors are brought to the QDQ form, exactly, and can be put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers its operators

from attncompile.frontends.graph import Rounding
from attncompile.frontends.onnx import onnx_graph
from attncompile.frontends.onnx_definitions import put_back, spelled_out
from attncompile.verify import derive_tolerance, require_within
from tests.frontends.onnx_reference import parsed
from tests.quantised_attention import FORMS, OPTIMISED, REWRITTEN, inputs, quantised_file


def run(model: ir.Model, fed: Mapping[str, np.ndarray]) -> np.ndarray:
    """By ONNX Runtime with its optimisations off: each operator as it is written."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    written = ir.to_proto(model).SerializeToString()
    (found,) = onnxruntime.InferenceSession(written, options, providers=["CPUExecutionProvider"]).run(None, dict(fed))
    return found


def operators(model: ir.Model) -> list[str]:
    return sorted(f"{node.domain} {node.op_type}".strip() for node in model.graph)


QUANTISED = {"MatMulInteger", "QLinearMatMul", "QLinearAdd", "QLinearMul", "QLinearSoftmax", "QGemm"}


@pytest.mark.parametrize("form", [*FORMS, *REWRITTEN])
def test_the_qdq_form_computes_the_same_and_goes_back(form: str, tmp_path: Path) -> None:
    model = ir.load(quantised_file(form, tmp_path))
    kept, before, fed = run(model, inputs(7)), operators(model), inputs(7)
    # of 1 / scale ONNX Runtime's QLinearSoftmax takes the whole part, 254 for 255: what it was made of is compared
    wanted = run(ir.load(quantised_file(form.removesuffix(OPTIMISED), tmp_path)), fed)
    step = float(np.abs(wanted).max()) / 127
    graph = onnx_graph(model)
    live = {node.output: node for node in graph.nodes if node.output in graph.live}
    products = {getattr(node, "what", "") for node in live.values()} & QUANTISED
    assert products == ({"MatMulInteger"} if form == "dynamic" else set())  # its linear layers stay
    assert {node.op_type for node in model.graph if node.domain} <= {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
    found = run(model, fed)
    # a tie that floats break otherwise moves a code by one
    assert np.abs(found - wanted).max() <= step and np.abs(found - wanted).mean() <= step / 50
    for call in spelled_out(model):
        put_back(call)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    assert operators(model) == before
    np.testing.assert_array_equal(run(model, fed), kept)


TINY = """g (float[2,3,4] q, float[2,4,3] k, float[2,3,4] v) => (y)
    <float a = {0.02}, float a2 = {0.02}, float b = {0.03}, uint8 za = {128}, uint8 zb = {120}> { BODY }"""


CHANNELS = 4
"""Of its queries and keys: terms of the longest sum."""


def drawn() -> dict[str, np.ndarray]:
    """Inputs of such a graph."""
    random = np.random.default_rng(0)
    shapes = {"q": (2, 3, 4), "k": (2, 4, 3), "v": (2, 3, 4)}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def inside(text: str, fed: Mapping[str, np.ndarray], names: str) -> dict[str, np.ndarray]:
    """What some values of a graph are: codes, scales and other numbers that carry no error yet."""
    found = {}
    for name in names.split():
        model = parsed(text)
        model.graph.outputs[:] = [ir.convenience.create_value_mapping(model.graph)[name]]
        found[name] = run(model, fed)
    return found


def computed(nodes: str, given: Mapping[str, np.ndarray], dtype: type[np.floating]) -> torch.Tensor:
    """What nodes in ONNX's text form make of numbers in one floating-point type."""
    read = {name: np.asarray(value, dtype) for name, value in given.items()}
    kind = {np.float64: "double", np.float32: "float"}[dtype]
    inputs = ", ".join(f"{kind}{list(value.shape) or ''} {name}" for name, value in read.items())
    return torch.from_numpy(run(parsed(f"g ({inputs}) => (y) {{ {nodes} }}"), read))


def require_rounding_alone(results: Sequence[np.ndarray], nodes: str, given: Mapping[str, np.ndarray]) -> None:
    """What was given and what it became are both as near to the exact numbers as plain nodes in float32 are.

    Args:
        results: of the original and of what it became.
        nodes: what both compute, without operators on codes.
        given: what these nodes read.

    Raises:
        MismatchError: where one of them is further off.
    """
    exact = computed(nodes, given, np.float64)
    bound = derive_tolerance(exact, computed(nodes, given, np.float32), CHANNELS).bound
    for result in results:
        require_within(torch.from_numpy(result), exact, bound, nodes)


def rounded(body: str, opset: int = 21) -> Mapping[str, Rounding]:
    return onnx_graph(parsed(TINY.replace("BODY", body), opset)).roundings


@pytest.mark.parametrize(
    ("read", "is_one"),
    [("a, za", True), ("a2, za", True), ("b, za", False), ("a, zb", False), ("a", False)],
)
def test_a_rounding_is_read_back_as_it_was_made(read: str, is_one: bool) -> None:
    found = rounded(f"c = QuantizeLinear(q, a, za)  d = DequantizeLinear(c, {read})  y = MatMul(d, k)")
    assert found == ({"d": Rounding("d", "q", "uint8", pytest.approx(0.02))} if is_one else {})


def test_moved_codes_are_rounded_numbers_that_are_moved() -> None:
    body = """c = QuantizeLinear(q, a, za)  t = Transpose<perm = [0, 2, 1]>(c)  d = DequantizeLinear(t, a, za)
        y = MatMul(v, d)"""
    graph = onnx_graph(parsed(TINY.replace("BODY", body)))
    assert set(graph.roundings) == {"c.DequantizeLinear.out", "d"}
    assert graph.unrounded is not None
    moved = graph.unrounded.producer["d"]
    assert [graph.unrounded.producer[name].inputs for name in moved.inputs] == [("c.DequantizeLinear.out",)]


INTEGERS = """cq, sq, zq = DynamicQuantizeLinear(q)  ck, sk, zk = DynamicQuantizeLinear(k)
    p = MatMulInteger(cq, ck, ZEROS)  f = Cast<to = 1>(p)  """


@pytest.mark.parametrize(
    ("zeros", "scaled", "both"),
    [
        ("zq, zk", "s = Mul(sq, sk)  y = Mul(f, s)", True),
        ("zq, zk", "g = Mul(sk, f)  y = Mul(g, sq)", True),
        ("zq, zk", "s = Mul(sq, sq)  y = Mul(f, s)", False),
        ("zq, zk", "g = Mul(f, a)  y = Mul(g, sq)", False),
        ("zk, zq", "s = Mul(sq, sk)  y = Mul(f, s)", False),
        ("zq", "s = Mul(sq, sk)  y = Mul(f, s)", False),
        ("zq, zk", "g = Neg(f)  s = Mul(sq, sk)  y = Mul(g, s)", False),
    ],
)
def test_products_of_whole_numbers_by_both_scales_are_products_of_floats(zeros: str, scaled: str, both: bool) -> None:
    text = TINY.replace("BODY", INTEGERS.replace("ZEROS", zeros) + scaled)
    model, fed = parsed(text), drawn()
    wanted = run(parsed(text), fed)
    graph = onnx_graph(model)
    assert {r.source for r in graph.roundings.values()} == ({"q", "k"} if both else set())
    assert all(rounding.dynamic and rounding.dtype == "uint8" for rounding in graph.roundings.values())
    require_rounding_alone([wanted, run(model, fed)], scaled, inside(text, fed, "f sq sk a"))


JOINED = """c = QuantizeLinear(q, a, za)  e = QuantizeLinear(v, SCALE, za)  j = JOIN  d = DequantizeLinear(j, a, za)
    y = MatMul(d, k)"""


@pytest.mark.parametrize(
    ("join", "scale", "roundings"),
    [
        ("Concat<axis = 1>(c, e)", "a", ["c.DequantizeLinear.out", "d", "e.DequantizeLinear.out"]),
        ("Concat<axis = 1>(c, e)", "b", []),
        ("com.microsoft.QLinearConcat<axis = 1>(a, za, c, a, za, e, b, za)", "b",
         ["c.DequantizeLinear.out", "d", "e.DequantizeLinear.out"]),
    ],
)  # fmt: skip
def test_codes_that_are_concatenated(join: str, scale: str, roundings: list[str]) -> None:
    text = TINY.replace("BODY", JOINED.replace("JOIN", join).replace("SCALE", scale))
    fed = drawn()
    model, wanted = parsed(text), run(parsed(text), fed)
    assert sorted(onnx_graph(model).roundings) == roundings
    nodes = "n = Sub(j, za)  d = Mul(n, a)  y = MatMul(d, k)"
    require_rounding_alone([wanted, run(model, fed)], nodes, inside(text, fed, "j a za k"))


def test_a_product_that_scales_itself() -> None:
    text = TINY.replace(
        "BODY",
        """cq, sq, zq = DynamicQuantizeLinear(q)  ck, sk, zk = DynamicQuantizeLinear(k)
        y = com.microsoft.MatMulIntegerToFloat(cq, ck, sq, sk, zq, zk)""",
    )
    assert {r.source for r in onnx_graph(parsed(text)).roundings.values()} == {"q", "k"}


@pytest.mark.parametrize(("scale", "rounded"), [("ks", {"q", "k"}), ("qs", set())])
def test_a_product_that_rounds_one_side_itself(scale: str, rounded: set[str]) -> None:
    """By the other side's own scale that is a product of rounded numbers; by another scale it stays what it is."""
    text = TINY.replace(
        "BODY",
        f"""cq, qs, qz = DynamicQuantizeLinear(v)  ck, ks, kz = DynamicQuantizeLinear(k)
        s = com.microsoft.DynamicQuantizeMatMul(q, ck, {scale}, kz)  y = Add(s, qs)""",
    )
    fed = drawn()
    model, wanted = parsed(text), run(parsed(text), fed)
    graph = onnx_graph(model)
    assert {r.source for r in graph.roundings.values()} == rounded
    assert [str(size) for size in graph.infos["s"].shape] == ["2", "3", "3"]  # known of either
    given = inside(text, fed, "qs ck ks kz")
    given |= inside(TINY.replace("BODY", "c, s, z = DynamicQuantizeLinear(q)  y = Identity(s)"), fed, "c s z")
    nodes = f"n = Sub(c, z)  l = Mul(n, s)  m = Sub(ck, kz)  r = Mul(m, {scale})  p = MatMul(l, r)  y = Add(p, qs)"
    require_rounding_alone([wanted, run(model, fed)], nodes, given)


GEMM = """g (uint8[5,4] a) => (y) <float sa = {0.05}, uint8 za = {120}, float one = {0.04}, int8 zero = {2},
    int8[4,3] w = {1, -9, 70, 4, 50, -6, 7, 8, 9, -99, 1, 2}, float[3] sw = {0.02, 0.05, 0.01}, int8[3] zw = {0, 0, 0},
    int32[3] c = {9, -70, 300}, float sy = {0.02}, uint8 zy = {125}> { y = com.microsoft.QGemm CALL }"""


@pytest.mark.parametrize(
    "call",
    [
        "(a, sa, za, w, one, zero, c, sy, zy)",
        "(a, sa, za, w, sw, zw, c)",
        "<alpha = 2.0>(a, sa, za, w, sw, zw, , sy, zy)",
        "<alpha = 0.5>(a, sa, za, w, one, zero, c)",
        "<transB = 1>(a, sa, za, t, one, zero, c)",
        "<transB = 1>(a, sa, za, t, sw, zw, c, sy, zy)",
        "<transA = 1>(b, sa, za, w, one, zero, c, sy, zy)",
    ],
)
def test_a_gemm_of_codes_is_one_of_numbers(call: str) -> None:
    text = GEMM.replace("CALL", call)
    if "trans" in call:
        text = text.replace("int8[4,3] w", "int8[3,4] t").replace("uint8[5,4] a", "uint8[5,4] a, uint8[4,5] b")
        text = text.replace("int8[3,4] t", "int8[4,3] w") if "transA" in call else text
    model = parsed(text)
    fed = {value.name or "": np.random.default_rng(0).integers(0, 255, tuple(value.shape or ()), np.uint8)
           for value in model.graph.inputs}  # fmt: skip
    wanted = run(parsed(text), fed)
    onnx_graph(model)
    assert "com.microsoft QGemm" not in operators(model) and "Gemm" in operators(model)
    found = run(model, fed)
    assert found.dtype == wanted.dtype
    if found.dtype == np.uint8:
        np.testing.assert_array_equal(found, wanted)
    else:
        scale, offset = ("sw", "zw") if "sw" in call else ("one", "zero")
        given = inside(text, fed, f"sa za {'t' if 'transB' in call else 'w'} {scale} {offset} c")
        given["alpha"] = np.asarray(0.5 if "alpha" in call else 1.0)
        turned = "w = Transpose(t)" if "t" in given else ""
        nodes = f"""{turned} n = Sub(a, za)  l = Mul(n, sa)  m = Sub(w, {offset})  r = Mul(m, {scale})
            p = MatMul(l, r)  u = Mul(sa, {scale})  d = Mul(c, u)  o = Add(p, d)  y = Mul(o, alpha)"""
        require_rounding_alone([wanted, found], nodes, {**given, "a": fed["a"]})


@pytest.mark.parametrize(("opset", "kind", "known"), [(17, "uint8", True), (17, "uint16", False), (21, "uint16", True)])
def test_pairs_of_the_runtime_are_those_of_the_standard(opset: int, kind: str, known: bool) -> None:
    body = """c = com.microsoft.QuantizeLinear(q, a, za)  d = com.microsoft.DequantizeLinear(c, a, za)
        y = MatMul(d, k)"""
    found = onnx_graph(parsed(TINY.replace("uint8 za", f"{kind} za").replace("BODY", body), opset)).roundings
    assert found == ({"d": Rounding("d", "q", kind, pytest.approx(0.02))} if known else {})


def test_codes_that_are_split_are_rounded_numbers_that_are_split() -> None:
    body = """c = QuantizeLinear(q, a, za)  l, r = Split<axis = 2, num_outputs = 2>(c)  d = DequantizeLinear(l, a, za)
        e = DequantizeLinear(r, a, za)  f = Concat<axis = 2>(e, d)  y = MatMul(f, k)"""
    graph = onnx_graph(parsed(TINY.replace("BODY", body)))
    assert set(graph.roundings) == {"c.DequantizeLinear.out", "d", "e"}


class Quantised(torch.nn.Module):
    """Attention with what torch's quantiser (pt2e) puts around its products."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(rounded_by_torch(q) @ rounded_by_torch(k).transpose(-1, -2) * 0.35, -1)
        return rounded_by_torch(weights) @ rounded_by_torch(v)


def rounded_by_torch(x: torch.Tensor) -> torch.Tensor:
    operators = torch.ops.quantized_decomposed
    coded = operators.quantize_per_tensor(x, 0.03, 128, 0, 255, torch.uint8)
    return operators.dequantize_per_tensor(coded, 0.03, 128, 0, 255, torch.uint8)


def test_what_torch_exports_of_a_quantised_model_is_in_the_qdq_form(tmp_path: Path) -> None:
    given = tuple(torch.randn(2, 4, 9, 8) for _ in range(3))
    torch.onnx.export(Quantised(), given, tmp_path / "model.onnx", dynamo=True, verbose=False)
    found = onnx_graph(ir.load(tmp_path / "model.onnx")).roundings.values()
    assert sorted((one.dtype, one.scale) for one in found) == [("uint8", pytest.approx(0.03))] * 4


def test_scales_of_rows_and_columns_need_an_operator_set_that_writes_them() -> None:
    text = """g (uint8[2,3,4] a, uint8[2,4,3] b) => (y)
        <float[3] rows = {0.1, 0.2, 0.3}, float[3] columns = {0.2, 0.4, 0.1}, uint8[3] zeros = {1, 2, 3},
         float step = {0.05}, uint8 zero = {128}> {
        y = QLinearMatMul(a, rows, zeros, b, columns, zeros, step, zero) }"""
    old = parsed(text, 12)
    onnx_graph(old)
    assert operators(old) == ["QLinearMatMul"]
    new = parsed(text, 21)
    onnx_graph(new)
    read = [node for node in new.graph if node.op_type == "DequantizeLinear"]
    assert [node.attributes["axis"].as_int() for node in read] == [-2, -1]
