"""Quantised ONNX files whose attention is rounded inside: kept as they are, or in floats where that is asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.transformers.optimizer import optimize_model

import attncompile
from attncompile.cli import main
from attncompile.codegen.onnx.normalisation import OPSET
from attncompile.codegen.onnx.tidy import loses_types, suited_opset
from attncompile.frontends.errors import InputError
from attncompile.plan.schema import load_plan
from tests.frontends.projected_calls import CALLS
from tests.onnx_files import assert_clean, operators
from tests.quantised_attention import FORMS, REWRITTEN, inputs, quantised_file, saved_by_the_runtime
from tests.tampered_lowerings import scaled, tamper

QUICK = ("qdq", "qoperator-everything", "dynamic")
"""Forms that are not much like another one."""


def run(file: Path, seed: int = 11) -> np.ndarray:
    (found,) = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, inputs(seed))
    return found


def away(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_an_operator_that_the_runtime_does_not_know_is_named_with_the_file(tmp_path: Path) -> None:
    file = quantised_file("dynamic", tmp_path)
    model = onnx.load(file)
    model.opset_import.append(onnx.helper.make_opsetid("who.knows", 1))
    model.graph.node.append(onnx.helper.make_node("Twice", [model.graph.output[0].name], ["twice"], domain="who.knows"))
    model.graph.output[0].name = "twice"
    onnx.save(model, file)
    with pytest.raises(InputError, match=r"who\.knows:Twice\(-1\) is not a registered") as raised:
        attncompile.convert(file, tmp_path / "out", to="onnx")
    said = str(raised.value)
    assert str(file) in said and "known ones" in said and "before_" not in said and "report" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["qdq-everything", "qoperator-everything", "dynamic"])
def test_a_file_stays_as_it_is_unless_that_is_asked(form: str, tmp_path: Path) -> None:
    file = quantised_file(form, tmp_path)
    made = attncompile.convert(file, tmp_path / "out", to="onnx")
    (site,) = load_plan(tmp_path / "out" / "plan.json").sites
    assert site.operator == "original" and "rounds inside this attention" in site.reason
    assert "1 site kept as it was: the file rounds inside this attention" in str(made)
    (told,) = json.loads((tmp_path / "out" / "report.json").read_text())["sites"]
    assert told["status"] == "observed" and "unround" in told["hint"] and told["check"].startswith("rounded-values")
    assert sorted(operators(tmp_path / "out" / "model.onnx")) == sorted(operators(file))
    np.testing.assert_array_equal(run(tmp_path / "out" / "model.onnx"), run(file))


@pytest.mark.parametrize(
    "form", [form if form in QUICK else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
)
def test_unround_computes_attention_in_floats_and_nothing_else(form: str, tmp_path: Path) -> None:
    file, out = quantised_file(form, tmp_path), tmp_path / "out"
    attncompile.convert(file, out, to="onnx", passes="unround, fuse", budget=0.2)
    (site,) = load_plan(out / "plan.json").sites
    assert site.operator != "original" and site.applied == ("unround", "fuse")
    (told,) = json.loads((out / "report.json").read_text())["sites"]
    assert 0 < told["change"] < 0.2 and told["change_inputs"] == "batch 1, length 9"
    before, after = (operators(each) for each in (file, out / "model.onnx"))
    assert "QLinearSoftmax" not in after
    for product in ("QLinearMatMul", "MatMulInteger"):  # those of scores and values are gone, the linear layers stay
        assert after.count(product) == max(0, before.count(product) - 2)
    assert after.count("QuantizeLinear") < before.count("QuantizeLinear") + 2
    exact = run(tmp_path / "float.onnx")
    assert away(run(out / "model.onnx"), exact) < away(run(file), exact)
    assert attncompile.verify(out).passed
    assert_clean(out)


def test_a_budget_that_is_too_small_writes_nothing(tmp_path: Path) -> None:
    file = quantised_file("qdq", tmp_path)
    with pytest.raises(InputError, match="over the budget of 1e-05"):
        attncompile.convert(file, tmp_path / "out", to="onnx", passes="unround", budget=1e-5)
    assert not (tmp_path / "out").exists()


def test_a_model_that_rounds_nothing_has_nothing_to_unround(tmp_path: Path) -> None:
    quantised_file("qdq", tmp_path)
    attncompile.convert(tmp_path / "float.onnx", tmp_path / "out", to="onnx", passes="unround, fuse", prefer="fused")
    (site,) = load_plan(tmp_path / "out" / "plan.json").sites
    assert site.applied == ("fuse",)
    assert [(one.call, one.reason) for one in site.refused] == [
        ("unround", "the model rounds nothing inside this attention")
    ]


def test_a_site_that_fails_is_rounded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = quantised_file("qoperator-everything", tmp_path), tmp_path / "out"
    tamper(monkeypatch, scaled, lambda site, spec, row: True, alone=True)
    attncompile.convert(file, out, to="onnx", passes="unround, fuse")
    (site,) = load_plan(out / "plan.json").sites
    assert site.rolled_back and site.operator == "original"
    assert sorted(operators(out / "model.onnx")) == sorted(operators(file))
    np.testing.assert_array_equal(run(out / "model.onnx"), run(file))


def test_inspect_as_data_names_every_rounding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = quantised_file("qdq", tmp_path)
    assert main(["inspect", str(file), "--json", "-"]) == 0
    (site,) = json.loads(capsys.readouterr().out)["sites"]
    assert [one["of"] for one in site["rounds"]] == ["q", "k", "v", "the scores", "the weights"]
    scores = site["rounds"][3]
    assert scores["value"] == "s0" and scores["type"] == "int8" and 0 < scores["scale"] < 1 and not scores["dynamic"]


def test_inspect_says_what_is_rounded_and_what_helps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = quantised_file("dynamic", tmp_path)
    assert main(["inspect", str(file), "--provider", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "q, k, v, the weights to uint8 by scales of each call" in told
    assert '--passes "unround, fuse"' in told and "1 attention site, 0 lifted, 1 observed, 0 refused" in told


@pytest.mark.parametrize("prefer", ["fastest", "fused"])
def test_a_call_with_quantised_projections_goes_in_and_out(prefer: str, tmp_path: Path) -> None:
    call = next(call for call in CALLS if str(call) == "QAttention lengths")
    file, out = tmp_path / "call.onnx", tmp_path / "out"
    onnx.save(call.model(), file)
    made = attncompile.convert(file, out, to="onnx", prefer=prefer)  # type: ignore[arg-type]
    (site,) = load_plan(out / "plan.json").sites
    products = {"QAttention", "MatMulInteger"} & set(operators(out / "model.onnx"))
    if prefer == "fastest":
        assert products == {"QAttention"} and "it stays QAttention" in site.reason
    else:
        assert products == {"MatMulInteger"} and site.operator == "Attention", str(made)
    assert attncompile.verify(out).passed
    assert_clean(out)


@pytest.mark.parametrize("form", REWRITTEN[2:4])
def test_what_the_runtime_wrote_is_computed_in_floats_where_that_is_asked(form: str, tmp_path: Path) -> None:
    file, out = quantised_file(form, tmp_path), tmp_path / "out"
    before = operators(file)
    attncompile.convert(file, out, to="onnx", passes="unround, fuse", budget=0.2)
    (site,) = load_plan(out / "plan.json").sites
    assert site.operator != "original" and site.applied == ("unround", "fuse")
    after = operators(out / "model.onnx")
    for product in ("QGemm", "MatMulIntegerToFloat"):  # linear layers stay
        assert after.count(product) == before.count(product)
    assert after.count("DynamicQuantizeMatMul") == max(0, before.count("DynamicQuantizeMatMul") - 2)
    exact = run(tmp_path / "float.onnx")
    assert away(run(out / "model.onnx"), exact) < away(run(file), exact)
    assert attncompile.verify(out).passed


@pytest.mark.slow
@pytest.mark.parametrize("optimised", [False, True])
def test_what_the_runtimes_own_tools_make_of_a_real_model(
    optimised: bool, onnx_files: dict[str, Path], tmp_path: Path
) -> None:
    """Fused for BERT, quantised for each call, and saved once more by the runtime: as Optimum does it."""
    source = next(path for path in onnx_files.values() if path.name == "paraphrase-minilm-l3.onnx")
    fused, file, out = (tmp_path / name for name in ("fused.onnx", "quantised.onnx", "out"))
    optimize_model(str(source), model_type="bert", num_heads=12, hidden_size=384, opt_level=0).save_model_to_file(fused)
    quantize_dynamic(fused, file, per_channel=True, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})
    if optimised:
        file = saved_by_the_runtime(file, tmp_path / "saved.onnx")
    assert operators(file).count("QAttention") == 3
    assert attncompile.lift(file).count("lifted") == 3
    made = attncompile.convert(file, out, to="onnx", prefer="fused")
    assert made.certificate.passed
    assert [site.operator for site in load_plan(out / "plan.json").sites] == ["Attention"] * 3
    assert "QAttention" not in operators(out / "model.onnx")
    assert attncompile.verify(out).passed


MOVED_CODES = """<ir_version: 9, opset_import: ["" : 20]>
g (float[B,2,I,8] q, float[B,2,I,8] k, float[B,2,I,8] v) => (float[B,2,I,8] y) <float a = {0.05}, int8 z = {3}> {
    c = QuantizeLinear(k, a, z)  d = DequantizeLinear(c, a, z)  t = Transpose<perm = [0, 1, 3, 2]>(d)  n = Neg(t)
    s = MatMul(q, n)  w = Softmax<axis = -1>(s)  y = MatMul(w, v) }"""
"""Attention over INT8 codes that are moved: ONNX Runtime 1.31 fails to optimise that from opset 21 on."""


def test_codes_with_a_sign_stay_at_an_opset_that_the_runtime_can_optimise(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(MOVED_CODES)
    onnx.save(model, tmp_path / "old.onnx")
    made = attncompile.convert(tmp_path / "old.onnx", tmp_path / "out", to="onnx", prefer="fused")
    opset = onnx.load(tmp_path / "out" / "model.onnx").opset_import[0].version
    assert opset == (20 if loses_types(ir.from_proto(model)) else OPSET)
    assert ("it loses the type of codes" in str(made)) == (opset == 20)
    assert attncompile.verify(tmp_path / "out").passed


def test_a_file_that_the_runtimes_optimiser_fails_on_is_refused_with_what_helps(tmp_path: Path) -> None:
    file, model = tmp_path / "new.onnx", onnx.parser.parse_model(MOVED_CODES)
    if not loses_types(ir.from_proto(model)):
        pytest.skip("this ONNX Runtime optimises such files")
    model.opset_import[0].version = 21
    onnx.save(model, file)
    with pytest.raises(InputError, match=r"own optimiser that fails.*at opset 20, or round to UINT8"):
        attncompile.convert(file, tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()


def test_only_rounding_to_codes_with_a_sign_keeps_an_opset_low() -> None:
    model = onnx.parser.parse_model(MOVED_CODES)
    unsigned = onnx.parser.parse_model(MOVED_CODES.replace("int8 z", "uint8 z"))
    assert not loses_types(ir.from_proto(unsigned)) and suited_opset(ir.from_proto(unsigned)) == OPSET
    stored = MOVED_CODES.replace("int8 z", "int8[2] w = {1, 2}, int8 z")
    weight = onnx.parser.parse_model(stored.replace("c = Q", "u = DequantizeLinear(w, a, z)  c = Q"))
    del weight.graph.node[1:]
    assert not loses_types(ir.from_proto(weight))
    model.opset_import[0].version = 21
    assert not loses_types(ir.from_proto(model))  # it is there already
