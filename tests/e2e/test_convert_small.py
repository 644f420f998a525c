"""Whole conversions of small checkpoints: what is written, that it agrees, and that damage is noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import safetensors.torch
import torch

import attncompile
from attncompile.codegen.onnx import tried
from attncompile.convert.calibration import Call
from attncompile.convert.comparison import ABSOLUTE
from attncompile.convert.frame import Options
from attncompile.convert.onnx import _chosen_for
from attncompile.convert.runtime import run, session
from attncompile.frontends.checkpoint import open_model
from attncompile.frontends.errors import InputError
from attncompile.ir import parse_spec
from attncompile.plan.schema import load_plan
from attncompile.verify import load_certificate, require_as_good_as_eager
from tests.backend.test_backend import small_llama, tokens
from tests.onnx_files import assert_clean, operators


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "llama"
    small_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama_onnx(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "llama-onnx"
    attncompile.convert(llama_folder, out, to="onnx", cache=False)
    return out


@pytest.fixture(scope="module")
def llama_torch(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "llama-torch"
    attncompile.convert(llama_folder, out, to="torch")
    return out


def test_an_onnx_folder_is_complete_and_judged(llama_onnx: Path) -> None:
    names = {path.name for path in llama_onnx.iterdir()}
    assert {
        "model.onnx",
        "plan.json",
        "report.json",
        "report.html",
        "certificate.json",
        "config.json",
    } <= names
    certificate, plan = load_certificate(llama_onnx / "certificate.json"), load_plan(llama_onnx / "plan.json")
    assert certificate.passed and certificate.plan == plan.digest()
    assert len(plan.sites) == len(certificate.sites) == 2
    judged = [entry for entry in certificate.end_to_end if entry.tolerance is not None]
    rewriting = [entry for entry in judged if "before and after rewriting" in entry.metric]
    assert rewriting and all(entry.tolerance == ABSOLUTE[torch.float32] for entry in rewriting)
    assert {entry.metric.partition(" in ")[0] for entry in judged} == {"error of logits against float64"}
    assert_clean(llama_onnx)
    assert json.loads((llama_onnx / "report.json").read_text())["sites"][0]["why"]


def test_an_onnx_model_takes_any_batch_length_and_padding(llama_onnx: Path) -> None:
    loaded, model = session(llama_onnx / "model.onnx", "cpu"), small_llama()
    assert [entry.shape for entry in loaded.get_inputs()] == [["batch", "length"]] * 2
    for batch, length, padding in ((1, 1, "left"), (1, 40, "left"), (4, 23, "left"), (3, 12, "right")):
        call = Call((), tokens(batch, length, padding), "")
        kept = call.kept()
        with torch.no_grad():
            expected = model(**call.kwargs).logits
        np.testing.assert_allclose(run(loaded, call)["logits"][kept], expected[kept], atol=ABSOLUTE[torch.float32])


def test_holes_in_the_mask_stay_right(llama_onnx: Path) -> None:
    call = Call((), tokens(2, 24), "")
    call.kwargs["attention_mask"][0, 5:9] = 0
    kept = call.kwargs["attention_mask"].bool()
    with torch.no_grad():
        expected = small_llama()(**call.kwargs).logits
    actual = run(session(llama_onnx / "model.onnx", "cpu"), call)["logits"]
    np.testing.assert_allclose(actual[kept], expected[kept], atol=ABSOLUTE[torch.float32])


def test_verification_passes_and_notices_damage(llama_onnx: Path, tmp_path: Path) -> None:
    assert attncompile.verify(llama_onnx).passed
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in llama_onnx.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    model = onnx.load(damaged / "model.onnx")
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
    onnx.save(model, damaged / "model.onnx")
    certificate = attncompile.verify(damaged)
    assert not certificate.passed and "logits" in certificate.failures()[0]


@pytest.mark.parametrize("prefer", ["fused", "decomposed"])
def test_the_form_can_be_chosen(bert_folder: Path, tmp_path: Path, prefer: str) -> None:
    out = tmp_path / prefer
    conversion = attncompile.convert(bert_folder, out, prefer=prefer)
    assert conversion.certificate.passed
    fused = {"Attention", "MultiHeadAttention", "GroupQueryAttention"} & set(operators(out / "model.onnx"))
    assert bool(fused) == (prefer == "fused")
    assert_clean(out)


def test_onnx_goes_in_and_out(bert_folder: Path, tmp_path: Path) -> None:
    attncompile.convert(bert_folder, tmp_path / "plain", prefer="decomposed")
    conversion = attncompile.convert(tmp_path / "plain" / "model.onnx", tmp_path / "again", prefer="fused")
    assert conversion.certificate.passed and len(conversion.report.sites) == 2
    assert_clean(tmp_path / "again")
    assert attncompile.verify(tmp_path / "again").passed
    once_more = attncompile.convert(tmp_path / "again" / "model.onnx", tmp_path / "third", prefer="fused").report
    assert any(note.startswith("nothing was rewritten") for note in once_more.notes)
    assert [row for row in once_more.measurements if row.unit == "ms"] == []


def test_a_small_model_may_have_its_weights_in_a_file_beside_it(tmp_path: Path) -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 23]>
        g (float[B,S,8] x) => (float[B,S,8] y) <float[8] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
            z = Mul(x, w)  y = Attention<q_num_heads = 2, kv_num_heads = 2>(z, x, x) }"""
    )
    ir.save(model, tmp_path / "own.onnx", external_data="own.data", size_threshold_bytes=0)
    assert (tmp_path / "own.data").exists()
    assert attncompile.convert(tmp_path / "own.onnx", tmp_path / "out", to="onnx").certificate.passed


def test_a_window_becomes_an_attribute_and_is_told(llama_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "window"
    passes = "fuse,sparsify.window(size=8, sinks=0)"
    conversion = attncompile.convert(llama_folder, out, passes=passes, prefer="fastest", cache=False)
    found = (node for node in ir.load(out / "model.onnx").graph.all_nodes() if node.op_type == "GroupQueryAttention")
    windows = [node.attributes["local_window_size"].as_int() for node in found]
    assert len(windows) == 2 and len(set(windows)) == 1
    assert "j > i − 8" in load_plan(out / "plan.json").sites[0].after
    report = conversion.report
    assert all(site.relative_error is not None and site.relative_error > 0 for site in report.sites)
    assert any(row.name.startswith("largest difference of logits") and row.after > 1e-3 for row in report.measurements)


def test_a_window_equals_the_windowed_model(llama_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "window"
    attncompile.convert(llama_folder, out, passes="fuse,sparsify.window(size=8, sinks=0)", cache=False)
    call = tokens(1, 30)
    call["attention_mask"].fill_(1)
    position = torch.arange(30)
    visible = (position[None] <= position[:, None]) & (position[None] > position[:, None] - 8)
    with torch.no_grad():
        expected = small_llama()(input_ids=call["input_ids"], attention_mask=visible[None, None]).logits
    actual = run(session(out / "model.onnx", "cpu"), Call((), call, ""))["logits"]
    np.testing.assert_allclose(actual, expected, atol=ABSOLUTE[torch.float32])


def test_linearising_a_softmax_checkpoint_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    conversion = attncompile.convert(llama_folder, tmp_path / "refused", passes="fuse,linearize.decay", cache=False)
    plan = load_plan(tmp_path / "refused" / "plan.json")
    assert all(any("linearize.decay" in r.call for r in site.refused) for site in plan.sites)
    assert conversion.certificate.passed


@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_linearising_a_padded_export_can_be_forced(llama_folder: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / "linear"
    passes = "linearize.decay"
    conversion = attncompile.convert(llama_folder, out, to=to, passes=passes, allow_untrained=True, cache=False)
    scans = [parse_spec(site.after).scan() for site in load_plan(out / "plan.json").sites]
    assert len(scans) == 2 and all(scan is not None and "attention_mask[b, j]" in str(scan.mask) for scan in scans)
    assert conversion.certificate.passed


def test_projections_are_quantised(bert_folder: Path, tmp_path: Path) -> None:
    conversion = attncompile.convert(bert_folder, tmp_path / "int8", passes="fuse,quantize.int8")
    assert "MatMulInteger" in operators(tmp_path / "int8" / "model.onnx")
    assert_clean(tmp_path / "int8")
    assert any("INT8" in note for note in conversion.report.notes)


def test_a_torch_folder_runs_generates_and_verifies(llama_torch: Path) -> None:
    names = {path.name for path in llama_torch.iterdir()}
    assert {
        "model.safetensors",
        "plan.json",
        "report.json",
        "certificate.json",
        "kernels",
        "config.json",
    } <= names
    plain, hopper = sorted((llama_torch / "kernels").glob("*.py"), key=lambda file: len(file.name))
    assert hopper.stem == f"{plain.stem}_hopper" and "gluon" in hopper.read_text()
    for kernel in (plain, hopper):
        assert "def attend(" in kernel.read_text()
        compile(kernel.read_text(), str(kernel), "exec")
    loaded, model, call = attncompile.load(llama_torch), small_llama(), tokens(2, 9)
    with torch.no_grad():
        expected = model.generate(**call, max_new_tokens=5, do_sample=False)
        assert torch.equal(loaded.generate(**call, max_new_tokens=5, do_sample=False), expected)
    assert attncompile.verify(llama_torch).passed


OWN = """
import torch
from torch import nn

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.qkv = nn.Linear(24, 72)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4)
        w = (q @ k.mT / 6 ** 0.5).softmax(-1)
        return (w @ v).transpose(1, 2).flatten(2)

def build():
    return Own().eval(), (torch.randn(2, 11, 24),), {}
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A file with a function ``build``."""
    source = tmp_path / "own.py"
    source.write_text(OWN)
    return source


def test_a_module_of_ones_own_is_saved_as_a_program(own: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    attncompile.convert(f"{own}:build", out, to="torch")
    opened = open_model(f"{own}:build")
    (x,), _ = opened.example(2, 11)
    with torch.no_grad():
        expected, actual = opened.model(x), attncompile.load(out)(x)
        exact = opened.model.double()(x.double())
    require_as_good_as_eager(actual, exact, expected, 24, "the saved program")
    assert attncompile.verify(out).passed


def test_a_saved_program_with_keywords_takes_other_sizes(own: Path, tmp_path: Path) -> None:
    own.write_text(OWN.replace("(torch.randn(2, 11, 24),), {}", '(), {"x": torch.randn(2, 11, 24)}'))
    attncompile.convert(f"{own}:build", tmp_path / "out", to="torch")
    opened = open_model(f"{own}:build")
    _, call = opened.example(3, 17)
    with torch.no_grad():
        expected, actual = opened.model(**call), attncompile.load(tmp_path / "out")(**call)
        exact = opened.model.double()(call["x"].double())
    require_as_good_as_eager(actual, exact, expected, 24, "the saved program")


@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_a_changed_original_is_not_taken_for_a_wrong_result(own: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    attncompile.convert(f"{own}:build", out, to=to)  # type: ignore[arg-type]
    own.write_text(OWN.replace("manual_seed(1)", "manual_seed(2)"))
    with pytest.raises(InputError, match="weights of the original are not those that were converted"):
        attncompile.verify(out)
    own.unlink()
    with pytest.raises(InputError, match="no such file"):
        attncompile.verify(out)


def test_damaged_weights_of_a_torch_folder_are_noticed(llama_torch: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(llama_torch, tmp_path / "damaged"))
    weights = safetensors.torch.load_file(damaged / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    weights[name] = weights[name] * 1.01
    safetensors.torch.save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="the weights in it are not those that were converted"):
        attncompile.verify(damaged)


def test_a_changed_kernel_is_refused_and_never_run(llama_torch: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(llama_torch, tmp_path / "changed"))
    for kernel in (changed / "kernels").glob("*.py"):
        kernel.write_text("raise SystemExit('this must not run')\n")
        for use in (attncompile.load, attncompile.verify):
            with pytest.raises(InputError, match="it is not what is generated for the plan"):
                use(changed)
        kernel.unlink()
    attncompile.load(changed)


def test_a_pickle_is_read_again_only_with_permission(bert_folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(bert_folder, tmp_path / "pickled"))
    torch.save(safetensors.torch.load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    attncompile.convert(source, tmp_path / "out", allow_pickle=True)
    with pytest.raises(InputError, match="--allow-pickle"):
        attncompile.verify(tmp_path / "out")
    assert attncompile.verify(tmp_path / "out", allow_pickle=True).passed


def test_the_export_is_kept_without_weights(llama_onnx: Path) -> None:
    kept = onnx.load(llama_onnx / "unrewritten.onnx")
    onnx.checker.check_model(kept)
    stored = sum(len(tensor.raw_data) for tensor in kept.graph.initializer)
    assert stored < 0.1 * sum(parameter.nbytes for parameter in small_llama().parameters())
    marked = [entry for entry in kept.graph.input if entry.metadata_props]
    assert {entry.key for value in marked for entry in value.metadata_props} >= {"attncompile.parameter"}


def test_lossy_sites_are_measured_on_text(minilm_folder: Path, tmp_path: Path) -> None:
    passes = "fuse,sparsify.window(size=64, sinks=0)"
    on_torch = attncompile.convert(minilm_folder, tmp_path / "torch", to="torch", passes=passes).report.sites
    on_onnx = attncompile.convert(minilm_folder, tmp_path / "onnx", passes=passes).report.sites
    for one, other in zip(on_torch, on_onnx, strict=True):
        assert one.change_inputs == other.change_inputs == "512 tokens of text"
        assert one.change is not None and one.change_max is not None and one.change > 1e-3
        assert other.change == pytest.approx(one.change, rel=1e-3)
        assert other.change_max == pytest.approx(one.change_max, rel=1e-3)


def test_a_model_without_text_says_that_its_inputs_are_random(own: Path, tmp_path: Path) -> None:
    passes = "fuse,sparsify.window(size=4, sinks=0)"
    report = attncompile.convert(f"{own}:build", tmp_path / "out", to="torch", passes=passes).report
    assert report.sites[0].change_inputs == "random inputs" and report.sites[0].change_max is None
    assert any("takes no text" in note for note in report.notes)


def test_nothing_is_written_when_it_fails(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="prefer"):
        attncompile.convert(llama_folder, tmp_path / "out", to="torch", prefer="fused")
    with pytest.raises(InputError, match="cache=True"):
        attncompile.convert(llama_folder, tmp_path / "out", to="torch", cache=True)
    assert not list(tmp_path.iterdir())


def test_a_file_that_onnx_runtime_cannot_load_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a\x12\x00")
    with pytest.raises(InputError, match="cannot load"):
        session(tmp_path / "model.onnx", "cpu")


def test_the_runtime_is_one_that_was_tried() -> None:
    assert tried.column("cpu", tried.installed()) is not None


def test_a_conversion_for_an_old_runtime_needs_nothing_newer(llama_folder: Path, tmp_path: Path) -> None:
    """Windows count one key more in GroupQueryAttention of 1.22, which has no Attention and no opset 23 either."""
    oldest = tried.versions()[0]
    out = tmp_path / "out"
    made = attncompile.convert(
        llama_folder, out, cache=False, prefer="fused", passes="fuse,sparsify.window(size=4)", onnxruntime=oldest
    )
    model = onnx.load(out / "model.onnx")
    assert model.opset_import[0].version <= tried.newest_opset(oldest)
    assert model.ir_version <= tried.newest_ir_version(oldest)
    assert not {"Attention", "GroupQueryAttention", "RMSNormalization"} & set(operators(out / "model.onnx"))
    said = "\n".join(made.report.notes)
    assert f"chosen for ONNX Runtime {oldest}" in said or oldest == tried.installed()
    assert attncompile.verify(out).passed


def test_a_model_that_an_old_runtime_does_not_read_is_refused(llama_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"opset 23, and ONNX Runtime 1\.22 takes up to 22"):
        attncompile.convert(llama_onnx / "model.onnx", tmp_path / "out", onnxruntime="1.22")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("version,says", [("1.20", "was not tried"), ("new", "is no version")])
def test_a_runtime_of_which_nothing_is_known_is_refused(
    llama_folder: Path, tmp_path: Path, version: str, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        attncompile.convert(llama_folder, tmp_path / "out", onnxruntime=version)
    assert not list(tmp_path.iterdir())


def test_other_targets_have_no_onnx_runtime(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ONNX operators"):
        attncompile.convert(llama_folder, tmp_path / "out", to="torch", onnxruntime="1.30")


def test_a_version_that_was_not_tried_is_told_with_the_one_that_was() -> None:
    newest, oldest = tried.versions()[-1], tried.versions()[0]
    (told,) = _chosen_for(Options(onnxruntime="9.9"))
    assert "for ONNX Runtime 9.9" in told and f"tried with {newest}, the last one before it that was tried" in told
    (told,) = _chosen_for(Options(onnxruntime=oldest))
    assert f"for ONNX Runtime {oldest}, by what was tried with it;" in told
    assert _chosen_for(Options(onnxruntime=tried.installed())) == []
