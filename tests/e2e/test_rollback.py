"""One site of several is lowered wrongly: it goes back to what it was and is reported, the rest stays and is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch

import attncompile
from attncompile.cli import main
from attncompile.cli.errors import DEFECT, MISUSED
from attncompile.convert import onnx_rewrite
from attncompile.convert.artifact import Conversion
from attncompile.convert.onnx_rewrite import ROLLED_BACK
from attncompile.convert.runtime import session
from attncompile.plan.schema import load_plan
from attncompile.verify import load_certificate
from tests.e2e.test_convert_cached import GROUPED, QUICK, WINDOW, expected, greedy, prompts, tiny
from tests.e2e.test_convert_encoder_decoder import assert_generates_alike
from tests.e2e.test_shared_buffer import in_place, wide
from tests.onnx_files import assert_clean, operators
from tests.small_encoder_decoders import small
from tests.tampered_lowerings import (
    CHANGES,
    not_a_number,
    of_another_shape,
    scaled,
    scaled_behind_a_cache,
    tamper,
    too_small_for_float16,
    unknown_operator,
)

SECOND = "model.layers.1.self_attn"


def named(name: str) -> Callable[..., bool]:
    return lambda site, spec, row: site == name


def windowed(site: str, spec: object, row: object) -> bool:
    return f"− {WINDOW}" in str(spec)


def assert_reported(made: Conversion, back: str, reason: str, kept: dict[str, str]) -> None:
    """In the plan, certificate, both reports, the text and the model's metadata; every other site by its operator."""
    assert made.folder is not None and made.certificate.passed
    plan, certificate = load_plan(made.folder / "plan.json"), load_certificate(made.folder / "certificate.json")
    planned = plan.site(back)
    assert planned.rolled_back and planned.operator == "original" and reason in planned.reason
    assert {site.site: site.operator for site in plan.sites if site.site != back} == kept
    assert not any(site.rolled_back for site in plan.sites if site.site != back)
    statuses = {site.site: site.status for site in certificate.sites}
    assert statuses == {back: "rolled back"} | dict.fromkeys(kept, "checked")
    report = json.loads((made.folder / "report.json").read_text())
    told = {site["name"]: site for site in report["sites"]}
    assert told[back]["rolled_back"] and reason in told[back]["why"] and not told[back]["operator"]
    page = (made.folder / "report.html").read_text()
    assert "1 rolled back" in page and "Rolled back to what it was" in page
    assert f"{back} ROLLED BACK to what it was: {planned.reason}" in str(made)
    files = [path for path in made.folder.glob("*.onnx") if not path.name.startswith("unrewritten")]
    metadata = {key: value for file in files for key, value in ir.load(file).metadata_props.items()}
    assert metadata[f"{ROLLED_BACK}.{back}"] == planned.reason
    assert_clean(made.folder)
    verified = attncompile.verify(made.folder)
    assert verified.passed and {site.site: site.status for site in verified.sites} == statuses


def assert_computed_once(said: list[str], forms: set[str]) -> None:
    """Every call of the original and of the export, however many forms of the result were tried."""
    known = [stage for stage in said if stage.startswith(("running the original", "running the export"))]
    assert len(known) == len(set(known))
    assert {stage.partition(": ")[0].removeprefix("running ") for stage in known} == forms
    results = [stage for stage in said if stage.startswith("running the result")]
    assert len(results) > len(set(results))  # there were several forms, on the same calls


@pytest.fixture(scope="module")
def plain(bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that comes as a file."""
    out = tmp_path_factory.mktemp("given") / "plain"
    attncompile.convert(bert_folder, out, prefer="decomposed")
    return out / "model.onnx"


@pytest.mark.parametrize("how", CHANGES)
def test_of_a_file_one_site_goes_back(how: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (f"encoder.layer.{number}.attention.self" for number in (0, 1))
    tamper(monkeypatch, CHANGES[how], named(second), alone=False)
    made = attncompile.convert(plain, tmp_path / "out", prefer="fused")
    reason = {"wrong values": "in the whole model: largest difference", "NaN": " is inf on "}
    assert_reported(made, second, reason.get(how, "NoSuchAttention"), {first: "Attention"})
    assert str(tmp_path) not in str(made.report)
    assert operators(tmp_path / "out" / "model.onnx").count("Softmax") == 1


def test_a_site_that_makes_the_file_invalid_goes_back(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (f"encoder.layer.{number}.attention.self" for number in (0, 1))
    tamper(monkeypatch, of_another_shape, named(first), alone=False)
    made = attncompile.convert(plain, tmp_path / "out", prefer="fused")
    assert_reported(made, first, "onnx.checker: [ShapeInferenceError]", {second: "Attention"})


@pytest.mark.parametrize("how", CHANGES)
def test_a_site_that_fails_alone_goes_back_without_a_search(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    QUICK["gemma2"]().save_pretrained(tmp_path / "checkpoint")
    tamper(monkeypatch, CHANGES[how], windowed, alone=True)
    said: list[str] = []
    made = attncompile.convert(
        tmp_path / "checkpoint", tmp_path / "out", prefer="fused", cache=True, progress=said.append
    )
    assert not any("finding the sites" in stage for stage in said)
    reason = {"wrong values": "alone is off from its Spec by", "NaN": "NaN or infinite on one side only"}
    kept = {SECOND: "GroupQueryAttention"}
    assert_reported(made, "model.layers.0.self_attn", reason.get(how, "NoSuchAttention"), kept)


@pytest.mark.parametrize("change", [scaled_behind_a_cache, not_a_number])
def test_a_cache_stays_whole_behind_a_site_that_goes_back(
    change: Callable[..., ir.Value], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = QUICK["llama"]()
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "checkpoint")
    tamper(monkeypatch, change, named(SECOND), alone=False)
    made = attncompile.convert(tmp_path / "checkpoint", tmp_path / "out", prefer="fused", cache=True)
    assert_reported(made, SECOND, "in the whole model", {"model.layers.0.self_attn": "GroupQueryAttention"})
    loaded = session(tmp_path / "out" / "model.onnx", "cpu")
    shapes = {entry.name: entry.shape for entry in (*loaded.get_inputs(), *loaded.get_outputs())}
    assert shapes["past_key_values.0.key"][1:2] == shapes["past_key_values.1.key"][1:2] == [2]
    for batch, length, padded in ((1, 24, 0), (3, 17, 6)):
        ids, mask = prompts(batch, length, padded)
        assert torch.equal(greedy(loaded, ids, mask, 8), expected(model, ids, mask, 8))


def test_a_shared_buffer_is_written_in_place_by_a_site_that_went_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide().save_pretrained(tmp_path / "checkpoint")
    tamper(monkeypatch, scaled, named(SECOND), alone=False)
    made = attncompile.convert(tmp_path / "checkpoint", tmp_path / "out", shared_buffer=True)
    kept = {"model.layers.0.self_attn": "GroupQueryAttention in place"}
    assert_reported(made, SECOND, "in the whole model", kept)
    loaded = session(tmp_path / "out" / "model.onnx", "cpu")
    for batch, length in ((1, 24), (3, 17)):
        ids, mask = prompts(batch, length, 0)
        assert torch.equal(in_place(loaded, ids, 12), expected(wide(), ids, mask, 12))


def test_a_cache_in_integers_goes_back_in_every_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide().save_pretrained(tmp_path / "checkpoint")
    tamper(monkeypatch, scaled, named(SECOND), alone=False)
    said: list[str] = []
    made = attncompile.convert(
        tmp_path / "checkpoint",
        tmp_path / "out",
        shared_buffer=True,
        precision="fp32(cache=int8)",
        budget=1.0,
        progress=said.append,
    )
    assert_computed_once(said, {"the export", "the original", "the original in float64"})
    assert any("cached in floats in all layers, which share one form" in note for note in made.report.notes)
    kept = {"model.layers.0.self_attn": "GroupQueryAttention in place"}
    assert_reported(made, SECOND, "in the whole model", kept)
    assert load_plan(tmp_path / "out" / "plan.json").precision == "fp32"
    kinds = {entry.type for entry in session(tmp_path / "out" / "model.onnx", "cpu").get_inputs()}
    assert kinds == {"tensor(int64)", "tensor(float)"}


def test_what_fails_in_another_precision_alone_goes_back(
    bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (f"encoder.layer.{number}.attention.self" for number in (0, 1))
    tamper(monkeypatch, too_small_for_float16, named(first), alone=False)
    said: list[str] = []
    made = attncompile.convert(
        bert_folder, tmp_path / "out", prefer="fused", precision="fp16", progress=said.append
    )
    assert_reported(made, first, "in fp16: ", {second: "Attention"})
    assert_computed_once(said, {"the export", "the original", "the original in float64"})
    assert said.count("finding attention") == 1


def test_of_an_encoder_decoder_what_fails_in_steps_alone_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small("whisper").save_pretrained(tmp_path / "checkpoint")
    back = "model.decoder.layers.1.self_attn"
    tamper(monkeypatch, scaled_behind_a_cache, named(back), alone=False)
    said: list[str] = []
    made = attncompile.convert(tmp_path / "checkpoint", tmp_path / "out", prefer="fused", progress=said.append)
    operator = {site.site: site.operator for site in load_plan(tmp_path / "out" / "plan.json").sites}
    kept = {site: found for site, found in operator.items() if site != back}
    assert "original" not in kept.values() and len(kept) == 4
    assert_reported(made, back, "in steps: ", kept)
    assert_generates_alike("whisper", tmp_path / "out")
    forms = ("the export{}", "the original{}", "the original{} in float64")
    parts = {form.format(f" of the {part}") for form in forms for part in ("encoder", "decoder")}
    assert_computed_once(
        said, {*parts, "the export in steps", "the original in steps", "the original in steps in float64"}
    )
    assert said.count("measuring of the encoder") == 1  # none of its sites went back


def test_with_a_lossy_site_goes_what_was_done_to_it(
    bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (f"encoder.layer.{number}.attention.self" for number in (0, 1))
    tamper(monkeypatch, not_a_number, named(first), alone=False)
    passes = "fuse,sparsify.window(size=8, sinks=0)"
    made = attncompile.convert(bert_folder, tmp_path / "out", passes=passes, prefer="fused")
    plan = load_plan(tmp_path / "out" / "plan.json")
    assert plan.site(first).rolled_back and plan.site(first).after == plan.site(first).before
    refused = {one.call.partition("(")[0]: one.reason for one in plan.site(first).refused}
    assert refused["sparsify.window"] == "the site was rolled back"
    assert plan.site(second).after != plan.site(second).before and not plan.site(second).rolled_back
    assert "sparsify.window applied at 1 site" in str(made).replace("(size=8, sinks=0)", "")


def test_the_command_line_tells_and_succeeds(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = "encoder.layer.0.attention.self"
    tamper(monkeypatch, scaled, named(site), alone=False)
    assert main(["convert", str(plain), "-o", str(tmp_path / "out"), "--prefer", "fused"]) == 0
    assert f"{site} ROLLED BACK to what it was: in the whole model: largest difference" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert f"{site} rolled back: in the whole model: largest difference" in capsys.readouterr().out


def test_what_is_wrong_without_any_site_is_refused(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tidy = onnx_rewrite.tidy

    def wrongly(model: ir.Model, *rest: object) -> object:
        done = tidy(model, *rest)  # type: ignore[arg-type]
        sums = next(node for node in model.graph if node.op_type == "LayerNormalization")
        sums.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)
        return done

    monkeypatch.setattr(onnx_rewrite, "tidy", wrongly)
    assert main(["convert", str(plain), "-o", str(tmp_path / "out"), "--prefer", "fused"]) != 0
    said = capsys.readouterr().err
    assert "does not agree with the original" in said and "with no site rewritten too" in said
    assert "nothing was written" in said and list(tmp_path.iterdir()) == []


def test_a_fault_of_our_own_is_not_the_files(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*given: object) -> object:
        raise KeyError("of ours")

    monkeypatch.setattr(onnx_rewrite, "tidy", fails)
    arguments = ["convert", str(plain), "-o", str(tmp_path / "out")]
    assert main(arguments) == DEFECT
    said = capsys.readouterr().err
    assert "KeyError" in said and "defect of attncompile: please report it" in said
    with pytest.raises(KeyError) as raised:
        attncompile.convert(plain, tmp_path / "out")
    (note,) = raised.value.__notes__
    assert "ONNX Runtime take model.onnx as it is" in note and "please report" in note

    def wrongly_declared(value: onnx.ValueInfoProto) -> None:
        value.type.tensor_type.shape.dim[-1].dim_value = 3

    model = onnx.load(plain)
    wrongly_declared(model.graph.output[0])
    onnx.save(model, tmp_path / "wrong.onnx")
    assert main(["convert", str(tmp_path / "wrong.onnx"), "-o", str(tmp_path / "out")]) == MISUSED
    said = capsys.readouterr().err
    assert "the model contradicts itself (onnx.checker: " in said and "KeyError" in said and "wrong.onnx" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("change", [scaled, unknown_operator])
def test_all_sites_of_a_kind_go_back_in_few_attempts(
    change: Callable[..., ir.Value], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", **GROUPED | {"num_hidden_layers": 12})
    model.save_pretrained(tmp_path / "checkpoint")
    tamper(monkeypatch, change, lambda site, spec, row: site.startswith("model.layers."), alone=False)
    said: list[str] = []
    made = attncompile.convert(
        tmp_path / "checkpoint", tmp_path / "out", prefer="fused", cache=True, progress=said.append
    )
    assert all(site.rolled_back for site in made.report.sites) and len(made.report.sites) == 12
    assert sum("finding the sites" in stage for stage in said) <= 12
    loaded = session(tmp_path / "out" / "model.onnx", "cpu")
    ids, mask = prompts(2, 11, 3)
    assert torch.equal(greedy(loaded, ids, mask, 4), expected(model, ids, mask, 4))
