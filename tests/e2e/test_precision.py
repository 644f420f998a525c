"""Conversions with ``--precision``: what is rounded, what it costs, and that a budget is never exceeded unsaid."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

import attncompile
from attncompile.convert.calibration import Call
from attncompile.convert.generator import GENERATOR
from attncompile.convert.precision import KINDS, parse_precision, write_precise
from attncompile.convert.quality import Quality, over_budget
from attncompile.convert.runtime import session
from attncompile.frontends.errors import InputError
from attncompile.plan.schema import load_plan
from benchmarks.onnx_quality import embedding_cosines
from tests.codegen.test_onnx_stored import CHANNELS, GROUPS, buffered
from tests.e2e.test_convert_cached import QUICK, prompts
from tests.onnx_files import assert_clean, operators


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "llama"
    QUICK["llama"]().save_pretrained(folder)
    return folder


def test_a_budget_leaves_what_hurts_most_in_float32(bert_folder: Path, tmp_path: Path) -> None:
    """The budget of a second conversion lies between what rounding everything costs and rounding nothing."""
    whole = attncompile.convert(bert_folder, tmp_path / "whole", precision="int8", budget=1.0)
    assert operators(tmp_path / "whole" / "model.onnx").count("MatMulInteger") == 13
    changes = [entry for entry in whole.certificate.end_to_end if entry.metric.startswith("relative change of")]
    assert {entry.tolerance for entry in changes} == {1.0}
    budget = 0.98 * max(entry.after for entry in changes)
    part = attncompile.convert(bert_folder, tmp_path / "part", precision="int8", budget=budget)
    plan = load_plan(tmp_path / "part" / "plan.json")
    assert (plan.precision, plan.budget) == ("int8", budget)
    assert 1 <= len(plan.kept) <= 7
    assert operators(tmp_path / "part" / "model.onnx").count("MatMulInteger") == 13 - len(plan.kept)
    assert all(entry.after <= budget for entry in part.certificate.end_to_end if entry.metric.startswith("relative"))
    said = [note for note in part.report.notes if "were left in float32" in note]
    assert len(said) == 1 and ".dense" in said[0] and f"budget of {budget:g}" in said[0]
    assert_clean(tmp_path / "part")
    assert attncompile.verify(tmp_path / "part").passed
    assert attncompile.verify(tmp_path / "part" / "model.onnx", provider="CPUExecutionProvider").passed
    with pytest.raises(InputError, match="over the budget of 1e-06, also with half of them in float32"):
        attncompile.convert(bert_folder, tmp_path / "none", precision="int8", budget=1e-6)
    assert not (tmp_path / "none").exists()


def test_float16_is_judged_and_damage_to_it_is_noticed(bert_folder: Path, tmp_path: Path) -> None:
    made = attncompile.convert(bert_folder, tmp_path / "out", precision="fp16")
    assert load_plan(tmp_path / "out" / "plan.json").budget == KINDS["fp16"].budget
    assert made.certificate.passed and any(site.operator == "Attention" for site in made.report.sites)
    assert_clean(tmp_path / "out")
    assert all(site.change is not None for site in made.report.sites)
    model = onnx.load(tmp_path / "out" / "model.onnx")
    weight = max(
        (tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16),
        key=lambda tensor: len(tensor.raw_data),
    )
    weight.raw_data = bytes(len(weight.raw_data))
    onnx.save(model, tmp_path / "out" / "model.onnx")
    failed = attncompile.verify(tmp_path / "out")
    assert not failed.passed and over_budget(failed.end_to_end) is not None


def test_what_no_provider_here_runs_is_refused_by_name(bert_folder: Path, tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("a GPU runs it")
    with pytest.raises(InputError, match=r"CPUExecutionProvider has no bfloat16 kernel for .*MatMul"):
        attncompile.convert(bert_folder, tmp_path / "bf16", precision="bf16")
    with pytest.raises(InputError, match="fp8 is for GPUs"):
        attncompile.convert(bert_folder, tmp_path / "fp8", precision="fp8")
    assert not any(path.name in ("bf16", "fp8") for path in tmp_path.iterdir())


def test_a_language_model_of_four_bits_keeps_its_cache_and_configuration(llama: Path, tmp_path: Path) -> None:
    made = attncompile.convert(llama, tmp_path / "out", precision="int4(block=16)", cache=True)
    assert_clean(tmp_path / "out")
    assert operators(tmp_path / "out" / "model.onnx").count("MatMulNBits") == 15  # seven a layer, and the logits
    loaded = session(tmp_path / "out" / "model.onnx", "cpu")
    decoder = json.loads((tmp_path / "out" / GENERATOR).read_text())["model"]["decoder"]
    names = {entry.name for entry in loaded.get_inputs()}
    assert {decoder["inputs"]["past_key_names"] % layer for layer in range(2)} <= names
    assert any("int4(block=16): 15 of 15 projections" in note for note in made.report.notes)


def test_a_language_model_of_float16_generates(llama: Path, tmp_path: Path) -> None:
    """Its cache is float16, its logits are float32; onnxruntime-genai takes it so."""
    attncompile.convert(llama, tmp_path / "out", precision="fp16", cache=True, prefer="fused")
    assert_clean(tmp_path / "out")
    loaded = session(tmp_path / "out" / "model.onnx", "cpu")
    kinds = {entry.name: entry.type for entry in (*loaded.get_inputs(), *loaded.get_outputs())}
    assert kinds["logits"] == "tensor(float)"
    assert kinds["past_key_values.1.value"] == kinds["present.1.value"] == "tensor(float16)"
    generators = pytest.importorskip("onnxruntime_genai")
    model = generators.Model(str(tmp_path / "out"))
    settings = generators.GeneratorParams(model)
    settings.set_search_options(max_length=17, do_sample=False)
    generator = generators.Generator(model, settings)
    generator.append_tokens(prompts(1, 9, 0)[0][0].numpy().astype("int32"))
    generator.generate_next_token()
    assert len(generator.get_sequence(0)) == 10


WRONG = {
    "int5": "there is no precision 'int5' (did you mean 'int8'?); there are fp32, fp16",
    "int4(block=33)": "int4: block must be one of 16, 32, 64, 128 or 256, got 33",
    "int8(block=32)": "int8 has no option 'block'; its options are cache, per_channel",
    "fp16(x=1)": "fp16 has no option 'x'; its options are cache",
    "fp32(cache=int3)": "fp32: cache must be one of 'float', 'int8' or 'int4', got 'int3'",
    "int4,int8": "give one precision, not 'int4,int8'",
    "": "give one precision",
    "int4(": "cannot read the precision 'int4(' from column 1",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_precision_is_one_sentence(text: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_precision(text)
    assert WRONG[text] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", KINDS)
def test_a_precision_prints_as_it_is_read(name: str) -> None:
    assert str(parse_precision(name)) == name
    if name.startswith("int4"):
        assert str(parse_precision("int4(symmetric=true, block=32)")) == "int4(symmetric=true)"


def test_options_that_contradict_each_other_are_refused(bert_folder: Path, tmp_path: Path) -> None:
    cases = (
        ({"precision": "fp16", "passes": "quantize.int8"}, "leave one of them out"),
        ({"precision": "int8", "to": "torch"}, "precision='int8' is for ONNX models"),
        ({"text": tmp_path / "a.txt", "to": "pt2"}, "is for ONNX models"),
        ({"budget": -0.1}, "the budget is -0.1"),
        ({"budget": float("nan")}, "the budget is nan"),
        ({"precision": "int8", "text": tmp_path / "nowhere.txt"}, "the text cannot be read"),
        ({"provider": "GPUExecutionProvider"}, "no provider 'GPUExecutionProvider'"),
        ({"provider": "CPUExecutionProvider", "to": "torch"}, "for the target torch it may be cpu or cuda"),
    )
    for options, says in cases:
        with pytest.raises(ValueError, match=says.replace("(", r"\(")):
            attncompile.convert(bert_folder, tmp_path / "out", **options)  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()


def test_a_text_needs_a_model_that_reads_text(bert_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Some words.")
    with pytest.raises(InputError, match="the model reads no text"):
        attncompile.convert(bert_folder, tmp_path / "out", precision="int8", text=tmp_path / "a.txt")


def test_canary_a_result_that_is_not_finite_is_over_any_budget() -> None:
    quality, before = Quality(), torch.ones(1, 3, 4)
    after = before.clone()
    after[0, 1] = torch.nan
    quality.add(Call((), {}, "a call"), {"states": before}, {"states": after})
    assert quality.worst() == float("inf")
    assert over_budget(tuple(quality.entries(10.0))) is not None


def test_changes_are_counted_over_all_calls() -> None:
    quality = Quality()
    for size in (3, 5):
        before = torch.arange(4.0 * size).reshape(1, size, 4)
        quality.add(Call((), {}, f"{size} tokens of text"), {"states": before}, {"states": before * 1.25})
    entries = {entry.metric: entry.after for entry in quality.entries(None)}
    assert entries["relative change of states"] == pytest.approx(0.25)
    assert entries["largest change of states"] == 19 / 4
    assert entries["mean cosine similarity of states"] == pytest.approx(1.0)


@pytest.mark.slow
def test_minilm_of_int8_keeps_its_embeddings(minilm_folder: Path, tmp_path: Path) -> None:
    """On 500 sentences; the speed is a row of ``benchmarks/onnx_cpu.py``."""
    attncompile.convert(minilm_folder, tmp_path / "float32")
    attncompile.convert(minilm_folder, tmp_path / "int8", precision="int8")
    loaded = [session(tmp_path / name / "model.onnx", "cpu") for name in ("float32", "int8")]
    assert embedding_cosines(*loaded)["mean_cosine"] >= 0.995


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int4", "int8-weights", "fp16"])
def test_smollm2_reads_text_in_few_bits(
    smollm2_folder: Path, texts_folder: Path, tmp_path: Path, precision: str
) -> None:
    text = texts_folder / "kjv.txt"
    short = tmp_path / "text.txt"
    short.write_text(text.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    made = attncompile.convert(smollm2_folder, tmp_path / "out", precision=precision, text=short)
    found = {entry.metric: entry for entry in made.certificate.end_to_end}
    assert found["relative change of logits"].after <= (KINDS[precision].budget or 0.0)
    assert found["perplexity"].before is not None and found["perplexity"].inputs == "1024 tokens of text"
    assert 0.5 < found["share of positions with the same next token"].after <= 1.0
    assert attncompile.verify(tmp_path / "out").passed


def stored(folder: Path, ranges: float, *, cast: bool) -> ir.Model:
    """A layer on buffers with its cache in int8, and a second one whose cache is cast before it is read."""
    model = buffered()
    names = {f"past_{side}": f"past_key_values.0.{side}" for side in ("key", "value")}
    for value in model.graph.inputs:
        value.name = names.get(str(value.name), value.name)
    if cast:
        past = ir.Value(
            name="past_key_values.1.key", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["B", "C"])
        )
        node = ir.node("Cast", [past], attributes={"to": int(ir.DataType.FLOAT16)}, name="cast")
        node.outputs[0].name, node.outputs[0].dtype = "present.1.key", ir.DataType.FLOAT16
        model.graph.inputs.append(past)
        model.graph.append(node)
        model.graph.outputs.append(node.outputs[0])
    ir.save(model, folder / "plain.onnx")
    seen = {name: np.full((GROUPS, CHANNELS), ranges, np.float32) for name in names.values()}
    precision = parse_precision("fp32(cache=int8)")
    write_precise(folder / "plain.onnx", folder / "made.onnx", precision, (), (), "cpu", "the model", seen)
    return ir.load(folder / "made.onnx")


def test_no_layers_cache_is_left_in_floats_unsaid(tmp_path: Path) -> None:
    kinds = {value.dtype for value in stored(tmp_path, 2.0, cast=False).graph.inputs if "past" in str(value.name)}
    assert kinds == {ir.DataType.INT8}
    (tmp_path / "made.onnx").unlink()
    with pytest.raises(InputError, match=r"left past_key_values\.1\.key in floats, 1 of 3 caches .* leave cache="):
        stored(tmp_path, 2.0, cast=True)
    assert not (tmp_path / "made.onnx").exists()


def test_a_cache_with_elements_that_are_no_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"past_key_values\.0\.key: among the elements .* is nan.* the model; leave"):
        stored(tmp_path, float("nan"), cast=False)


@pytest.mark.parametrize("provider", ["cpu", "cuda", "CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_logits_stay_narrow_on_gpus(provider: str, tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(np.ones((8, 8), np.float32), "weight")
    node = onnx.helper.make_node("MatMul", ["past_key_values.0.key", "weight"], ["logits"])
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["P", 8])
        for name in ("past_key_values.0.key", "logits")
    ]
    graph = onnx.helper.make_graph([node], "model", values[:1], values[1:], [weight])
    opsets = [onnx.helper.make_opsetid("", 23)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "plain.onnx")
    made = tmp_path / "made.onnx"
    write_precise(tmp_path / "plain.onnx", made, parse_precision("fp16"), (), (), provider, "the model")
    kind = ir.load(made).graph.outputs[0].dtype
    assert kind is (ir.DataType.FLOAT if provider == "cpu" else ir.DataType.FLOAT16)
