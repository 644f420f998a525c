"""The Graph view of ONNX models: shapes, names, evaluation, and attention found in real exports."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers

from attncompile.frontends.graph import (
    Opaque,
    Pointwise,
)
from attncompile.frontends.onnx import onnx_graph
from attncompile.frontends.onnx_sizes import SizeNames
from attncompile.ir import Size
from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.types import concrete
from attncompile.lift import lift_graph
from tests.frontends.onnx_reference import compare, parsed


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("batch", 2),
        ("2*batch + 1", 5),
        ("batch*seq", 14),
        ("floor(seq/2)", 3),
        ("Max(1, seq - 9)", 1),
        ("seq//2", 3),
        ("ceiling(seq/2)", 4),
        ("Mod(seq, 4)", 3),
        ("-batch + seq", 5),
        ("seq**2", 49),
    ],
)
def test_dimension_names_are_arithmetic(text: str, value: int) -> None:
    names = SizeNames()
    assert concrete(names.expression(text), {"Batch": 2, "Seq": 7}) == value


def test_other_dimension_names_are_symbols() -> None:
    names = SizeNames()
    assert names.expression("onnx::Shape_dim 0") == Size("Onnx__Shape_dim_0")
    assert names.expression("past_len + seq", declared_only=True) == names.symbol("past_len + seq")
    assert names.symbol("batch") == Size("Batch")
    assert names.symbol("Batch") == Size("Batch_")
    assert names.symbol("0") == Size("Size_0")
    assert names.display["Batch_"] == "Batch"


def test_names_proven_equal_become_one() -> None:
    graph = onnx_graph(parsed("g (float[B,M,K] x, float[C,L,N] z) => (y) { y = MatMul(x, z) }"))
    assert graph.infos["z"].shape[1] == graph.infos["x"].shape[2] == Size("K")
    # batch axes may be broadcast: two names, but one size in a proof
    assert graph.infos["z"].shape[0] == Size("C")
    assert graph.size_hints["B"] == graph.size_hints["C"] != graph.size_hints["M"]


def test_hint_of_an_axis_that_meets_a_constant() -> None:
    graph = onnx_graph(parsed("g (float[B,N] x, float[1,128] z) => (y) { y = Add(x, z) }"))
    assert graph.size_hints["N"] == 128


def test_nameless_nodes_are_named_and_names_are_unique() -> None:
    model = parsed("g (float[N] x) => (y) { a = Exp(x)  y = Exp(a) }")
    for node in model.graph:
        node.name = "" if node.outputs[0].name == "a" else "same"
    next(iter(model.graph)).outputs[0].name = "a#1"
    graph = onnx_graph(model)
    assert len(graph.natives) == 2 and all(graph.natives)
    assert all("#" not in name for name in graph.owner if graph.is_native(name))


def test_module_and_source_from_whatever_the_exporter_left() -> None:
    model = parsed("""g (float[N,2] x) => (y) <float[2,2] w = {1.0, 0.0, 0.0, 1.0}> {
        a = MatMul(x, w)  b = Exp(a)  y = Exp(b) }""")
    model.graph.initializers["w"].name = "encoder.layer.0.query.weight"
    nodes = list(model.graph)
    nodes[2].metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'decoder', 'decoder.self', 'exp']"
    nodes[2].metadata_props["pkg.torch.onnx.class_hierarchy"] = (
        "['M', 'm.Decoder', 'm.SelfAttention', 'aten.exp']"
    )
    nodes[2].metadata_props["pkg.torch.onnx.stack_trace"] = (
        'File "/home/me/model.py", line 7, in forward\n    return x.exp()'
    )
    nodes[1].name = "/encoder/layer.1/attention/Exp"
    graph = onnx_graph(model)
    product, plain, told = (graph.describe(name) for name in ("a", "b", "y"))
    assert product.module == "encoder.layer.0.query"
    assert (
        plain.module == "encoder.layer.1.attention"
        and plain.source == "node /encoder/layer.1/attention/Exp (Exp)"
    )
    assert (told.module, told.module_type, told.source) == (
        "decoder.self",
        "SelfAttention",
        "model.py:7  return x.exp()",
    )


def test_evaluation_names_the_input_that_is_missing() -> None:
    graph = onnx_graph(parsed("g (float[N] x, float[N] z) => (y) { a = Exp(x)  y = Add(a, z) }"))
    fed = {"a": torch.zeros(3)}
    with pytest.raises(ValueError, match="the region reads z, which the Spec does not"):
        graph.evaluate(["y"], fed, {"N": 3})
    assert graph.evaluate(["y"], {**fed, "z": torch.ones(3)}, {"N": 3})["y"].tolist() == [1.0, 1.0, 1.0]


def test_sizes_stand_in_for_inputs_that_are_only_asked_for_their_shape() -> None:
    graph = onnx_graph(
        parsed("""g (int64[N,M] ids, float[A] x) => (y) {
        s = Shape(ids)  y = ConstantOfShape<value = float[1] {1.0}>(s) }""")
    )
    assert graph.evaluate(["y"], {}, {"N": 2, "M": 3})["y"].shape == (2, 3)


def test_functions_are_inlined() -> None:
    model = ir.from_proto(
        onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[N] x) => (y) { y = local.twice(x) }
        <domain: "local", opset_import: ["" : 21]> twice (a) => (b) { b = Add(a, a) }""")
    )
    assert [type(node) for node in onnx_graph(model).nodes] == [Pointwise]


def test_subgraphs_are_opaque_but_read_what_they_take() -> None:
    graph = onnx_graph(
        parsed("""g (bool c, float[N] x) => (y) {
        a = Exp(x)
        y = If(c) <then_branch = t () => (float[N] p) { p = Neg(a) }, else_branch = e () => (float[N] q) { q =
        Exp(x) }> }""")
    )
    assert {"a", "c", "x"} <= set(graph.producer["y"].inputs)


def test_unknown_operators_get_their_shape_from_inference() -> None:
    graph = onnx_graph(parsed("g (float[N,3,8] x, float[5,3,2] w) => (y) { a = Conv(x, w)  y = Exp(a) }"))
    assert isinstance(graph.producer["a"], Opaque)
    assert concrete(graph.infos["y"].shape[2], {"N": 2}) == 7
    assert graph.infos["y"].shape[0] == Size("N")


def test_incomplete_inference_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's own function saves the model where it is run when it cannot infer every shape."""
    monkeypatch.chdir(tmp_path)
    text = """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
        g (float[N,8] x) => (y) { a = own.Twist(x)  b = Conv(x, x)  y = Abs(a) }"""
    onnx_graph(ir.from_onnx_text(text))
    assert not list(tmp_path.iterdir())


# --- real exports -------------------------------------------------------------------------------------------


def test_integer_products_around_attention_leave_it_visible() -> None:
    """Dynamically quantised projections: opaque, but the float products of attention between them are
    lifted."""
    weights = ", ".join(["1"] * 64)
    text = f"""g (float[B,I,8] x) => (y)
        <uint8[8,8] wq = {{{weights}}}, uint8 z = {{128}}, float half = {{0.5}},
         int64[4] heads = {{0, 0, 2, 4}}> {{
        xq, xs, xz = DynamicQuantizeLinear(x)  p = MatMulInteger(xq, wq, xz, z)  f = Cast<to=1>(p)
        q0 = Mul(f, xs)  q1 = Reshape(q0, heads)
        q = Transpose<perm=[0,2,1,3]>(q1)  k = Transpose<perm=[0,2,3,1]>(q1)
        s = MatMul(q, k)  l = Mul(s, half)  a = Softmax(l)  y = MatMul(a, q) }}"""
    graph = onnx_graph(parsed(text))
    assert {node.what for node in graph.nodes if isinstance(node, Opaque)} == {
        "DynamicQuantizeLinear",
        "MatMulInteger",
    }
    (site,) = lift_graph(graph).sites
    assert site.status == "lifted" and "0.5·s" in str(site.spec)
    # a scale that each call finds stays with its tensor: no operator takes it as a factor of scores or weights
    assert site.region is not None and {entry.value for entry in site.region.inputs} == {"q0"}


SITES = {"minilm-int8": 6, "paraphrase-minilm-l3": 3}
MASK = {
    "minilm-int8": "mask   attention_mask[b, j] ≠ 0",
    "paraphrase-minilm-l3": "3.4028234663852886e+38·(attention_mask[b, j] − 1)",
}


@pytest.mark.parametrize("name", SITES)
def test_third_party_files_are_lifted(name: str, onnx_files: dict[str, Path]) -> None:
    sites = lift_graph(onnx_graph(ir.load(onnx_files[name]))).sites
    assert [site.status for site in sites] == ["lifted"] * SITES[name]
    scale = 1 / math.sqrt(32)
    for number, site in enumerate(sites):
        assert site.name.endswith(f"encoder.layer.{number}.attention.self")
        assert MASK[name] in str(site.spec)
        attend = site.spec.attend() if site.spec else None
        assert attend is not None
        slope = evaluate(
            attend.score,
            Environment(
                {a: torch.zeros(1, dtype=torch.int64) for a in "bhij"},
                {},
                {"attention_mask": torch.ones(1, 1)},
                torch.ones(1),
            ),
        )
        assert float(slope) == pytest.approx(scale, rel=float(np.finfo(np.float32).eps))
        assert [type(operation).__name__ for operation in site.block] == ["Project"] * 3


def test_every_value_of_a_third_party_file(onnx_files: dict[str, Path]) -> None:
    model = ir.load(onnx_files["paraphrase-minilm-l3"])
    feeds = {v.name or "": np.random.default_rng(0).integers(0, 2, (2, 5)) for v in model.graph.inputs}
    compare(model, feeds, ("LayerNormalization",))


def tiny_bert(attention: str) -> torch.nn.Module:
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=64,
        attn_implementation=attention,
    )

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = transformers.BertModel(config).eval()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return self.bert(input_ids=input_ids, attention_mask=attention_mask)[0]

    return Encoder().eval()


@pytest.mark.parametrize(
    "dynamo", [pytest.param(True, id="dynamo", marks=pytest.mark.slow), pytest.param(False, id="torchscript")]
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_torch_exports_are_lifted(attention: str, dynamo: bool, tmp_path: Path) -> None:
    model, file = tiny_bert(attention), tmp_path / "model.onnx"
    inputs = (torch.randint(0, 97, (2, 7)), torch.ones(2, 7, dtype=torch.int64))
    names = ["input_ids", "attention_mask"]
    if dynamo:
        axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=64)}
        program = torch.onnx.export(
            model, inputs, dynamo=True, dynamic_shapes=dict.fromkeys(names, axes), verbose=False
        )
        assert program is not None
        program.save(file)
    else:
        torch.onnx.export(
            model,
            inputs,
            file,
            dynamo=False,
            input_names=names,
            opset_version=17,
            dynamic_axes={name: {0: "batch", 1: "sequence"} for name in names},
        )
    loaded = ir.load(file)
    feeds = {
        "input_ids": np.random.default_rng(0).integers(0, 97, (2, 5)),
        "attention_mask": np.array([[1] * 5, [1, 1, 0, 0, 0]]),
    }
    graph = compare(loaded, feeds, ("LayerNormalization", "Gelu"))
    sites = lift_graph(graph).sites
    assert [site.status for site in sites] == ["lifted", "lifted"], [str(site.refusal) for site in sites]
    assert [site.name for site in sites] == [f"bert.encoder.layer.{n}.attention.self" for n in range(2)]
    for site in sites:
        assert "mask   attention_mask[b, j] ≠ 0" in str(site.spec)
