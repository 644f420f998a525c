"""The three real checkpoints and the two third-party files, end to end; slow where a run takes over half a minute."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import attncompile
from attncompile.backend import FallbackWarning
from attncompile.frontends.checkpoint import open_model


@pytest.mark.parametrize(("name", "sites"), [("minilm-int8.onnx", 6), ("paraphrase-minilm-l3.onnx", 3)])
def test_third_party_files_go_in_and_out(onnx_files: dict[str, Path], tmp_path: Path, name: str, sites: int) -> None:
    source = next(path for path in onnx_files.values() if path.name == name)
    assert attncompile.lift(source).count("lifted") == sites
    conversion = attncompile.convert(source, tmp_path / "out")
    assert conversion.certificate.passed and len(conversion.report.sites) == sites
    assert attncompile.verify(tmp_path / "out").passed


def test_minilm_becomes_onnx(minilm_folder: Path, tmp_path: Path) -> None:
    conversion = attncompile.convert(minilm_folder, tmp_path / "out")
    assert conversion.certificate.passed
    assert [site.operator for site in conversion.report.sites] != [""] * 6
    assert attncompile.verify(tmp_path / "out").passed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2_folder", "whisper_folder"])
@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_large_checkpoints_convert_and_verify(
    name: str, to: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    conversion = attncompile.convert(request.getfixturevalue(name), tmp_path / "out", to=to)  # type: ignore[arg-type]
    assert conversion.certificate.passed
    assert all(site.status == "lifted" for site in conversion.report.sites)
    assert attncompile.verify(tmp_path / "out").passed


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_smollm2_generates_the_tokens_of_eager(smollm2_folder: Path, attention: str) -> None:
    opened = open_model(smollm2_folder, attn_implementation=attention)  # type: ignore[arg-type]
    model, tokenizer = opened.model.eval(), opened.tokenizer
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    call = tokenizer(
        ["The capital of France is", "Once upon a time there was a little"], return_tensors="pt", padding=True
    )
    with torch.no_grad(), warnings.catch_warnings():
        expected = model.generate(**call, max_new_tokens=16, do_sample=False)
        warnings.simplefilter("error", FallbackWarning)
        model.forward = attncompile.compile(model.forward, dynamic=True, rest="eager")
        assert torch.equal(model.generate(**call, max_new_tokens=16, do_sample=False), expected)


@pytest.mark.slow
def test_smollm2_continues_twenty_texts_like_eager(smollm2_folder: Path, texts_folder: Path) -> None:
    opened = open_model(smollm2_folder, attn_implementation="sdpa")
    model, tokenizer = opened.model.eval(), opened.tokenizer
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    text = (texts_folder / "essays.txt").read_text(encoding="utf-8")
    # of many lengths, so that most rows are padded
    prompts = [text[start : start + 40 + 13 * number] for number, start in enumerate(range(0, 40000, 2000))]
    call = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.no_grad(), warnings.catch_warnings():
        expected = model.generate(**call, max_new_tokens=64, do_sample=False)
        warnings.simplefilter("error", FallbackWarning)
        model.forward = attncompile.compile(model.forward, dynamic=True, rest="eager")
        found = model.generate(**call, max_new_tokens=64, do_sample=False)
    rows = [number for number, same in enumerate((found == expected).all(dim=1).tolist()) if not same]
    assert expected.shape[0] == 20 and not rows, f"the continuations of texts {rows} differ"


@pytest.mark.slow
def test_whisper_transcribes_like_eager(whisper_folder: Path) -> None:
    opened = open_model(whisper_folder)
    model = opened.model.eval()
    _, kwargs = opened.example(1, 4)
    features = kwargs["input_features"]
    with torch.no_grad(), warnings.catch_warnings():
        expected = model.generate(features, max_new_tokens=16, do_sample=False)
        warnings.simplefilter("error", FallbackWarning)
        model.forward = attncompile.compile(model.forward, dynamic=True, rest="eager")
        assert torch.equal(model.generate(features, max_new_tokens=16, do_sample=False), expected)
