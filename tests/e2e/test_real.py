"""The three real checkpoints and the two third-party files, end to end; slow where a run takes over half a minute."""

from __future__ import annotations

import warnings
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import attncompile
from attncompile.backend import FallbackWarning
from attncompile.frontends.checkpoint import open_model
from attncompile.verify import derive_tolerance, require_within
from tests.backend.test_generation import require_rewritten


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
    require_rewritten(model.forward)


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
    require_rewritten(model.forward)
    rows = [number for number, same in enumerate((found == expected).all(dim=1).tolist()) if not same]
    assert expected.shape[0] == 20 and not rows, f"the continuations of texts {rows} differ"


@pytest.mark.slow
def test_whisper_transcribes_like_eager(whisper_folder: Path, speech_file: Path) -> None:
    model = open_model(whisper_folder).model.eval()
    with wave.open(str(speech_file)) as opened:
        rate, samples = opened.getframerate(), opened.readframes(opened.getnframes())
    sound = np.frombuffer(samples, dtype=np.int16) / 32768
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(whisper_folder)
    texts = [extractor(sound[start * rate :], sampling_rate=rate, return_tensors="pt") for start in (0, 4, 7)]
    features = torch.cat([text["input_features"] for text in texts])
    with torch.no_grad(), warnings.catch_warnings():
        expected = {beams: model.generate(features, num_beams=beams, do_sample=False) for beams in (1, 3)}
        warnings.simplefilter("error", FallbackWarning)
        model.forward = attncompile.compile(model.forward, dynamic=True, rest="eager")
        for beams, tokens in expected.items():
            assert torch.equal(model.generate(features, num_beams=beams, do_sample=False), tokens), beams
    require_rewritten(model.forward)
    tokenizer = transformers.AutoTokenizer.from_pretrained(whisper_folder)
    text = tokenizer.decode(expected[1][0], skip_special_tokens=True).strip()
    assert text == "Ever tried, ever failed. No matter, try again. Fail again. Fail better."


@pytest.mark.slow
@pytest.mark.parametrize("rest", ["eager", "inductor"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_minilm_embeds_like_eager(minilm_folder: Path, texts_folder: Path, attention: Any, rest: Any) -> None:
    opened = open_model(minilm_folder, attn_implementation=attention)
    model, tokenizer = opened.model.eval(), opened.tokenizer
    wide = open_model(minilm_folder, attn_implementation=attention).model.eval().double()
    text = (texts_folder / "essays.txt").read_text(encoding="utf-8")
    compiled = attncompile.compile(model, dynamic=True, rest=rest)
    for count, length in ((20, 300), (3, 1500)):
        pieces = [text[2000 * number :][: length * (number + 1) // count] for number in range(count)]
        call = tokenizer(pieces, return_tensors="pt", padding=True, truncation=True, max_length=256)
        kept = call["attention_mask"][..., None]

        def embedded(run: Any, call: Any = call, kept: torch.Tensor = kept) -> torch.Tensor:
            with torch.no_grad():
                states = run(**call).last_hidden_state
            mean = (states * kept).sum(1) / kept.sum(1)
            return torch.nn.functional.normalize(mean, dim=-1)

        with warnings.catch_warnings():
            warnings.simplefilter("error", FallbackWarning)
            found = embedded(compiled)
        exact, plain = embedded(wide), embedded(model)
        require_within(found, exact, derive_tolerance(exact, plain, model.config.intermediate_size).bound, "embeddings")
    sites = attncompile.explain(compiled).sites
    assert len(sites) == model.config.num_hidden_layers and all(site.operator == "sdpa" for site in sites)
