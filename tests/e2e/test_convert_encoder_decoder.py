"""Encoder-decoders with both caches: two ONNX models whose greedy tokens are those of PyTorch's own generation."""

from __future__ import annotations

import json
import runpy
import wave
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import attncompile
from attncompile.convert import generator
from attncompile.convert.runtime import session
from attncompile.frontends.checkpoint import open_model
from attncompile.frontends.encoder_decoder import with_cross_cache
from attncompile.frontends.errors import InputError
from attncompile.plan.schema import load_plan
from attncompile.verify import load_certificate
from tests.onnx_files import assert_clean
from tests.small_encoder_decoders import PAD, SMALL, START, encoder_inputs, small

EXAMPLE = Path(__file__).parents[2] / "examples" / "transcribe_onnx.py"
QUICK = ("whisper", "t5")
FILES = ["encoder.onnx", "decoder.onnx"]


def converted(kind: str, folder: Path, **options: Any) -> Path:
    checkpoint, out = folder / kind, folder / f"{kind}-out"
    small(kind).save_pretrained(checkpoint)
    assert attncompile.convert(checkpoint, out, **options).certificate.passed
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("encoder-decoders")


@pytest.fixture(scope="module")
def whisper(folder: Path) -> Path:
    return converted("whisper", folder)


def greedy(out: Path, inputs: dict[str, torch.Tensor], prompt: torch.Tensor, count: int) -> torch.Tensor:
    """Tokens that follow in each row; ends of texts are not looked at."""
    encoder, decoder = (session(out / file, "cpu") for file in FILES)
    encoded = encoder.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    names = [entry.name for entry in decoder.get_outputs()]
    feeds = {
        output.name.replace("present", "past_key_values"): value
        for output, value in zip(encoder.get_outputs(), encoded, strict=True)
        if output.name != "last_hidden_state"
    }
    for entry in decoder.get_inputs():
        if entry.name.endswith(("decoder.key", "decoder.value")):
            feeds[entry.name] = np.zeros((len(prompt), entry.shape[1], 0, entry.shape[3]), dtype=np.float32)
    if "attention_mask" in inputs:  # the encoder's own, where it gives one
        feeds.setdefault("encoder_attention_mask", inputs["attention_mask"].numpy())
    made, step = [], prompt
    for _ in range(count):
        results = dict(zip(names, decoder.run(None, feeds | {"input_ids": step.numpy()}), strict=True))
        feeds |= {name.replace("present", "past_key_values"): results[name] for name in names if name != "logits"}
        step = torch.from_numpy(results["logits"][:, -1]).argmax(-1, keepdim=True)
        made.append(step)
    return torch.cat(made, dim=1)


def expected(model: Any, inputs: dict[str, torch.Tensor], prompt: torch.Tensor, count: int) -> torch.Tensor:
    """What a loop over the whole model gives, without any cache."""
    ids = prompt
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(**inputs, decoder_input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, prompt.shape[1] :]


def generated(model: Any, inputs: dict[str, torch.Tensor], prompt: torch.Tensor, count: int) -> torch.Tensor:
    """What transformers' own generation gives, with its caches and its way to encode.

    The cache is handed in: the one that it would make has as many layers as the encoder, where T5's decoder has more.
    Settings take the place of the model's own, which would fill what they leave open: BART forces a last token.
    Features that are no model's main input are embeddings to its own generate: Pop2Piano's encoder would not see them.
    """
    if model.main_input_name not in inputs and "input_features" in inputs:
        inputs = {"inputs_embeds" if name == "input_features" else name: one for name, one in inputs.items()}
    settings = model.generation_config = transformers.GenerationConfig(
        max_new_tokens=count, pad_token_id=PAD, bos_token_id=START, decoder_start_token_id=int(prompt[0, 0])
    )
    with torch.no_grad():
        ids = transformers.GenerationMixin.generate(
            model,
            **inputs,
            decoder_input_ids=prompt,
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            generation_config=settings,
        )
    return ids[:, prompt.shape[1] :]


def assert_generates_alike(kind: str, out: Path) -> None:
    model = small(kind)
    for batch, length, prompt in ((1, 9, 1), (3, 17, 1), (2, 11, 4)):
        inputs = encoder_inputs(kind, batch, length)
        ids = torch.arange(3, 3 + batch * prompt).reshape(batch, prompt)
        found = greedy(out, inputs, ids, 12)
        assert torch.equal(found, expected(model, inputs, ids, 12)), (batch, length, prompt)
        if batch == 1:
            assert torch.equal(found, generated(model, inputs, ids, 12)), (batch, length, prompt)


@pytest.mark.parametrize("kind", QUICK)
def test_tokens_are_those_of_pytorch(kind: str, folder: Path, request: pytest.FixtureRequest) -> None:
    out = request.getfixturevalue("whisper") if kind == "whisper" else converted(kind, folder, cache=True)
    assert_generates_alike(kind, out)
    assert_clean(out)
    assert attncompile.verify(out).passed


@pytest.mark.slow
@pytest.mark.parametrize("prefer", ["fused", "decomposed"])
@pytest.mark.parametrize("kind", [kind for kind in SMALL if kind not in QUICK])
def test_tokens_of_more_models(kind: str, prefer: str, tmp_path: Path) -> None:
    assert_generates_alike(kind, converted(kind, tmp_path, cache=True, prefer=prefer))


def test_one_folder_holds_both_with_their_evidence(whisper: Path) -> None:
    shapes = {
        file: {entry.name: entry.shape for entry in [*loaded.get_inputs(), *loaded.get_outputs()]}
        for file, loaded in ((file, session(whisper / file, "cpu")) for file in FILES)
    }
    assert shapes["encoder.onnx"]["present.1.encoder.key"] == ["batch", 4, 30, 8]
    assert shapes["decoder.onnx"]["past_key_values.1.encoder.key"] == ["batch", 4, 30, 8]
    assert shapes["decoder.onnx"]["present.1.decoder.value"] == ["batch", 4, "past + length", 8]
    assert shapes["decoder.onnx"]["logits"] == ["batch", "length", 99]
    sites = load_plan(whisper / "plan.json").sites
    assert [site.site for site in sites] == [
        "model.decoder.layers.0.encoder_attn",
        "model.decoder.layers.0.self_attn",
        "model.decoder.layers.1.encoder_attn",
        "model.decoder.layers.1.self_attn",
        "model.encoder.layers.0.self_attn",
    ]
    said = {entry.inputs for entry in load_certificate(whisper / "certificate.json").end_to_end}
    assert "encoder: batch 3, length 33" in said and "decoder: batch 3, length 5 behind 33" in said
    assert "encoder and decoder, 5 steps: batch 3, length 33" in said


def test_what_is_encoded_is_read_as_it_lies(whisper: Path) -> None:
    """No step of generation may turn, or copy, the keys and values that were computed once."""
    graph = ir.load(whisper / "decoder.onnx").graph
    readers = {
        past: {use.node.op_type for value in graph.inputs if past in (value.name or "") for use in value.uses()}
        for past in (".encoder.", ".decoder.")
    }
    # the shape of one of them says how many positions the encoder gave
    assert readers[".encoder."] - {"Shape"} == {"Attention"}
    assert readers[".decoder."] - {"Shape"} == {"MultiHeadAttention"}
    assert "If" not in [node.op_type for node in graph]


def test_a_damaged_part_is_noticed(whisper: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in whisper.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    model = ir.load(damaged / "decoder.onnx")
    weight = next(value for name, value in model.graph.initializers.items() if name.endswith("fc1.bias"))
    assert weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy() + np.float32(1.0), name=weight.name)
    ir.save(model, damaged / "decoder.onnx")
    failures = attncompile.verify(damaged).failures()
    assert any("decoder" in failure for failure in failures)
    assert not any("on encoder: " in failure for failure in failures)


def test_the_forward_pass_is_there_for_the_asking(folder: Path) -> None:
    out = converted("bart", folder, cache=False)
    assert (out / "model.onnx").is_file() and not any((out / file).exists() for file in FILES)


def test_a_cache_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    config = transformers.BartConfig(**SMALL["bart"])
    transformers.BartModel(config).save_pretrained(tmp_path / "bart")
    with pytest.raises(InputError, match="no cache to convert with: BartModel does not generate"):
        attncompile.convert(tmp_path / "bart", tmp_path / "out", cache=True)
    assert not (tmp_path / "out").exists()


def test_why_the_generator_cannot_take_it_is_told(whisper: Path) -> None:
    notes = json.loads((whisper / "report.json").read_text())["notes"]
    (told,) = [note for note in notes if generator.GENERATOR in note]
    assert "gives an encoder 3000 frames" in told and "encoder.onnx and decoder.onnx run in ONNX Runtime alone" in told


def test_the_generators_configuration_names_what_the_models_have(
    whisper: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator, "FRAMES", 60)
    transformers.WhisperFeatureExtractor(feature_size=8).save_pretrained(folder / "whisper")
    _, decoder = with_cross_cache(open_model(folder / "whisper"))
    assert generator.write_generator(decoder, FILES, tmp_path) == []
    parts = json.loads((tmp_path / generator.GENERATOR).read_text())["model"]
    assert parts["type"] == "whisper" and parts["eos_token_id"] == 2
    for part in ("encoder", "decoder"):
        loaded, layers = session(whisper / parts[part]["filename"], "cpu"), range(2)
        for side, entries in (("inputs", loaded.get_inputs()), ("outputs", loaded.get_outputs())):
            patterns = parts[part][side].values()
            named = {name % layer if "%d" in name else name for name in patterns for layer in layers}
            assert named == {entry.name for entry in entries}
    sequence = json.loads((tmp_path / generator.SOUND).read_text())["feature_extraction"]["sequence"]
    assert sequence[-1]["operation"]["attrs"] == {"n_fft": 400, "hop_length": 160, "chunk_size": 30, "n_mel": 8}


def test_the_example_generates(whisper: Path) -> None:
    transcribe = runpy.run_path(str(EXAMPLE))["transcribe"]
    features = encoder_inputs("whisper", 1, 60)["input_features"]
    wanted = expected(small("whisper"), {"input_features": features}, torch.tensor([[START, 7]]), 8)[0].tolist()
    assert transcribe(whisper, features.numpy(), [START, 7], {}, 8) == wanted
    end = wanted.index(wanted[2]) + 1
    assert transcribe(whisper, features.numpy(), [START, 7], {"eos_token_id": wanted[2]}, 8) == wanted[:end]
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        assert transcribe(whisper, features.numpy(), [START, 7], {name: wanted[:1]}, 1) != wanted[:1]


def sound_of(file: Path) -> tuple[np.ndarray, int]:
    with wave.open(str(file)) as opened:
        samples = np.frombuffer(opened.readframes(opened.getnframes()), dtype=np.int16)
        return samples / 32768, opened.getframerate()


@pytest.mark.slow
def test_whisper_transcribes_in_onnx_runtime(whisper_folder: Path, speech_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    attncompile.convert(whisper_folder, out, cache=True)
    assert {site.operator for site in load_plan(out / "plan.json").sites} == {"MultiHeadAttention"}
    transcribe = runpy.run_path(str(EXAMPLE))["transcribe"]
    sound, rate = sound_of(speech_file)
    features = transformers.WhisperFeatureExtractor.from_pretrained(whisper_folder)
    eager = transformers.WhisperForConditionalGeneration.from_pretrained(
        whisper_folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    settings = json.loads((out / "generation_config.json").read_text())
    texts = []
    for start, prompt in ((0, [50257, 50362]), (0, [50257]), (4, [50257, 50362]), (7, [50257, 50362])):
        call = features(sound[start * rate :], sampling_rate=rate, return_tensors="np")["input_features"]
        with torch.no_grad():
            made = eager.generate(
                torch.from_numpy(call), decoder_input_ids=torch.tensor([prompt]), max_new_tokens=60, do_sample=False
            )
        found = [token for token in transcribe(out, call, prompt, settings, 60) if token != settings["eos_token_id"]]
        assert found == [token for token in made[0].tolist() if token != settings["eos_token_id"]], (start, prompt)
        texts.append(found)
    tokenizer = transformers.AutoTokenizer.from_pretrained(whisper_folder)
    assert tokenizer.decode(texts[0]).strip() == (
        "Ever tried, ever failed. No matter, try again. Fail again. Fail better."
    )


@pytest.mark.slow
def test_whisper_listens_in_onnxruntime_genai(whisper_folder: Path, speech_file: Path, tmp_path: Path) -> None:
    generators = pytest.importorskip("onnxruntime_genai")
    attncompile.convert(whisper_folder, tmp_path / "out")
    model = generators.Model(str(tmp_path / "out"))
    processor = model.create_multimodal_processor()
    for beams in (1, 3):
        settings = generators.GeneratorParams(model)
        settings.set_search_options(max_length=60, do_sample=False, num_beams=beams)
        running = generators.Generator(model, settings)
        prompt = ["<|startoftranscript|><|notimestamps|>"]
        running.set_inputs(processor(prompt, audios=generators.Audios.open(str(speech_file))))
        while not running.is_done():
            running.generate_next_token()
        assert "Fail again. Fail better." in processor.decode(running.get_sequence(0))
