"""A cache in one buffer: what is written, that it generates as PyTorch does, and what it does not take."""

from __future__ import annotations

import json
import runpy
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

import attncompile
from attncompile.convert.generator import GENERATOR
from attncompile.convert.runtime import session
from attncompile.frontends.errors import InputError
from attncompile.plan.schema import load_plan
from attncompile.verify import derive_tolerance, load_certificate
from tests.e2e.test_convert_cached import EXAMPLES, GROUPED, MORE, QUICK, Build, expected, prompts, tiny
from tests.onnx_files import assert_clean, operators
from tests.small_encoder_decoders import END, small

CAPACITY = 40
CHANNELS = 16


def wide() -> transformers.PreTrainedModel:
    """With heads of as many channels as the operator wants where it turns them."""
    return endless(lambda: tiny("llama", **GROUPED | {"head_dim": CHANNELS}))


def endless(build: Build) -> transformers.PreTrainedModel:
    """A model for which no token ends a text, so that rows stay of one length."""
    model = build()
    model.generation_config.eos_token_id = None
    return model



def in_place(
    loaded: onnxruntime.InferenceSession, ids: torch.Tensor, count: int, *, behind: bool = True
) -> torch.Tensor:
    """Greedy tokens of every row; each buffer is bound as past and present, and its address never changes. What lies
    ``behind`` the last key is not touched either.
    """
    entries = {entry.name: entry for entry in loaded.get_inputs()}
    binding = loaded.io_binding()
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    buffers = {}
    for name, entry in entries.items():
        if name.startswith("past_key_values."):
            kind = kinds[entry.type]
            room = np.full((len(ids), entry.shape[1], CAPACITY, entry.shape[3]), 7.0, dtype=kind)
            buffers[name] = onnxruntime.OrtValue.ortvalue_from_numpy(room)
            binding.bind_ortvalue_input(name, buffers[name])
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffers[name])
    places = {name: value.data_ptr() for name, value in buffers.items()}
    made, step, total = [], ids, 0
    for _ in range(count):
        total += step.shape[1]
        binding.bind_cpu_input("input_ids", step.numpy())
        binding.bind_cpu_input("attention_mask", np.ones((len(ids), total), dtype=np.int64))
        binding.bind_output("logits")
        loaded.run_with_iobinding(binding)
        logits = binding.get_outputs()[-1].numpy()  # bound last
        step = torch.from_numpy(logits[:, -1]).argmax(-1, keepdim=True)
        made.append(step)
    assert {name: value.data_ptr() for name, value in buffers.items()} == places
    # the keys of every token but the last are there, and nothing behind them was touched
    first = next(iter(buffers.values())).numpy()
    assert (not behind or (first[:, :, total:] == 7.0).all()) and not (first[:, :, :total] == 7.0).all()
    return torch.cat(made, dim=1)


def written(build: Build, folder: Path, **options: object) -> Path:
    endless(build).save_pretrained(folder / "checkpoint")
    made = attncompile.convert(folder / "checkpoint", folder / "out", shared_buffer=True, **options)  # type: ignore
    assert made.certificate.passed
    return folder / "out"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(wide, tmp_path_factory.mktemp("shared"))


def test_every_site_is_one_operator_with_all_that_belongs_to_it(llama: Path) -> None:
    sites = load_plan(llama / "plan.json").sites
    assert [site.operator for site in sites] == ["GroupQueryAttention in place"] * 2
    found = operators(llama / "model.onnx")
    assert found.count("GroupQueryAttention") == 2
    # no other form beside it, no copies of a cache, no rotary map and no product of one operand alone
    assert not {"If", "Slice", "RotaryEmbedding", "Cos", "Range"} & set(found)
    assert found.count("MatMul") == 2 * (1 + 1 + 3) + 1
    said = {entry.inputs for entry in load_certificate(llama / "certificate.json").end_to_end}
    assert {"batch 3, length 33 behind 0", "batch 2, length 1 behind 70", "batch 1, length 7 behind 12"} <= said
    assert not any("behind 33" in inputs for inputs in said)
    assert_clean(llama)
    assert attncompile.verify(llama).passed


def test_past_and_present_are_as_large_as_the_buffer(llama: Path) -> None:
    loaded = session(llama / "model.onnx", "cpu")
    assert {entry.name for entry in loaded.get_inputs()} >= {"input_ids", "attention_mask"}
    assert "position_ids" not in {entry.name for entry in loaded.get_inputs()}
    shapes = {entry.name: entry.shape for entry in (*loaded.get_inputs(), *loaded.get_outputs())}
    assert shapes["past_key_values.1.key"] == shapes["present.1.key"] == ["batch", 2, "capacity", CHANNELS]


def test_a_file_that_was_written_is_read_again(llama: Path, tmp_path: Path) -> None:
    """Its calls stay calls, and what is put in their place attends to the same keys of the same buffers."""
    sites = attncompile.lift(llama / "model.onnx").sites
    assert [site.status for site in sites] == ["lifted"] * 2
    assert all("j ≤ i + max(0, J − I)" in str(site.spec) for site in sites)
    attncompile.convert(llama / "model.onnx", tmp_path / "again")
    assert Counter(operators(tmp_path / "again" / "model.onnx")) == Counter(operators(llama / "model.onnx"))
    attncompile.convert(llama / "model.onnx", tmp_path / "plain", prefer="decomposed")
    assert "GroupQueryAttention" not in operators(tmp_path / "plain" / "model.onnx")
    for batch, length in ((1, 24), (3, 17)):
        ids, mask = prompts(batch, length, 0)
        found = in_place(session(tmp_path / "plain" / "model.onnx", "cpu"), ids, 12, behind=False)
        assert torch.equal(found, expected(wide(), ids, mask, 12))


@pytest.mark.parametrize("batch,length", [(1, 1), (1, 24), (3, 17)])
def test_the_buffer_is_written_where_it_lies(llama: Path, batch: int, length: int) -> None:
    ids, mask = prompts(batch, length, 0)
    found = in_place(session(llama / "model.onnx", "cpu"), ids, 12)
    assert torch.equal(found, expected(wide(), ids, mask, 12))


def test_onnxruntime_genai_generates_in_one_buffer(llama: Path) -> None:
    generators = pytest.importorskip("onnxruntime_genai")
    settings = json.loads((llama / GENERATOR).read_text())
    assert settings["search"]["past_present_share_buffer"] is True
    ids, mask = prompts(2, 9, 0)
    model = generators.Model(str(llama))
    parameters = generators.GeneratorParams(model)
    parameters.set_search_options(max_length=21, do_sample=False, batch_size=2)
    generator = generators.Generator(model, parameters)
    generator.append_tokens(ids.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    wanted = expected(wide(), ids, mask, 12)
    for row in range(2):
        found, tokens = list(map(int, generator.get_sequence(row)))[9:], wanted[row].tolist()
        count = tokens.index(END) + 1 if END in tokens else len(tokens)  # behind its end a row is filled up
        assert found[:count] == tokens[:count] and len(found) >= count > 1


def test_a_conversation_goes_on_behind_what_is_cached(llama: Path) -> None:
    """Several tokens behind a cache, of one row."""
    ids, mask = prompts(1, 20, 0)
    loaded = session(llama / "model.onnx", "cpu")
    feeds = {
        entry.name: np.zeros((1, 2, CAPACITY, CHANNELS), dtype=np.float32)
        for entry in loaded.get_inputs()
        if entry.name.startswith("past")
    }
    names = [entry.name for entry in loaded.get_outputs()]
    for start, stop in ((0, 11), (11, 20)):
        step = {"input_ids": ids[:, start:stop].numpy(), "attention_mask": np.ones((1, stop), dtype=np.int64)}
        results = dict(zip(names, loaded.run(None, feeds | step), strict=True))
        feeds = {name: results[name.replace("past_key_values", "present")] for name in feeds}
    with torch.no_grad():
        model = wide()
        eager = model.float()(input_ids=ids, attention_mask=mask).logits[:, 11:]
        exact = model.double()(input_ids=ids, attention_mask=mask).logits[:, 11:]
    found = torch.from_numpy(results["logits"])
    assert float((found.double() - exact).abs().max()) <= derive_tolerance(exact, eager, model.config.hidden_size).bound


def test_padding_gives_nan_in_its_row_alone(llama: Path) -> None:
    loaded = session(llama / "model.onnx", "cpu")
    ids, mask = prompts(3, 17, 6)
    feeds = {
        entry.name: np.zeros((3, 2, CAPACITY, CHANNELS), dtype=np.float32)
        for entry in loaded.get_inputs()
        if entry.name.startswith("past")
    }
    logits = loaded.run(["logits"], feeds | {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
    assert np.isnan(logits[2]).all() and np.isfinite(logits[:2]).all()


@pytest.mark.slow
def test_the_installed_version_is_not_the_only_one(tmp_path: Path) -> None:
    out = written(wide, tmp_path, onnxruntime="1.22")
    assert "GroupQueryAttention" in operators(out / "model.onnx")


def test_weights_of_four_bits_and_states_of_sixteen(tmp_path: Path) -> None:
    out = written(wide, tmp_path, precision="int4(block=16, states=fp16)")
    loaded = session(out / "model.onnx", "cpu")
    kinds = {entry.name: entry.type for entry in (*loaded.get_inputs(), *loaded.get_outputs())}
    assert kinds["logits"] == "tensor(float)"
    assert kinds["past_key_values.1.value"] == kinds["present.1.value"] == "tensor(float16)"
    # query, key and value are one product: five a layer, and the logits
    assert operators(out / "model.onnx").count("MatMulNBits") == 2 * 5 + 1
    assert in_place(loaded, prompts(1, 9, 0)[0], 3).shape == (1, 3)
    assert_clean(out)
    assert attncompile.verify(out).passed


KINDS: dict[str, Build] = {
    "gemma2": QUICK["gemma2"],
    **{name: MORE[name] for name in ("qwen2", "qwen3", "mistral", "gpt_neox", "opt", "phi3", "olmo2")},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_tokens_of_more_models(name: str, tmp_path: Path) -> None:
    out = written(KINDS[name], tmp_path)
    assert "GroupQueryAttention in place" in {site.operator for site in load_plan(out / "plan.json").sites}
    for batch, length in ((1, 1), (1, 24), (3, 17)):
        ids, mask = prompts(batch, length, 0)
        found = in_place(session(out / "model.onnx", "cpu"), ids, 12)
        assert torch.equal(found, expected(endless(KINDS[name]), ids, mask, 12)), (batch, length)


def test_what_has_no_such_cache_is_refused(tmp_path: Path) -> None:
    QUICK["llama"]().save_pretrained(tmp_path / "llama")
    small("t5").save_pretrained(tmp_path / "t5")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="--no-cache and --shared-buffer contradict each other"):
        attncompile.convert(tmp_path / "llama", out, cache=False, shared_buffer=True)
    with pytest.raises(InputError, match="shared_buffer=True is for the cache of an ONNX model"):
        attncompile.convert(tmp_path / "llama", out, to="torch", shared_buffer=True)
    with pytest.raises(InputError, match="stay as they are; --shared-buffer is for decoders alone"):
        attncompile.convert(tmp_path / "t5", out, shared_buffer=True)
    sizes = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=32)).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="BertModel does not generate") as encoder:
        attncompile.convert(tmp_path / "bert", out, shared_buffer=True)
    assert encoder.value.advice == "leave --shared-buffer (in Python shared_buffer=True) out"
    assert not out.exists()


def test_the_example_generates_in_place(llama: Path) -> None:
    example = runpy.run_path(str(EXAMPLES / "generate_in_place.py"))
    loaded = session(llama / "model.onnx", "cpu")
    ids, mask = prompts(1, 9, 0)
    wanted = expected(wide(), ids, mask, 8)[0].tolist()
    assert example["generate"](loaded, ids[0].tolist(), set(), 8) == wanted
    assert example["generate"](loaded, ids[0].tolist(), {wanted[2]}, 8) == wanted[: wanted.index(wanted[2]) + 1]


CACHES = {"int8": ("tensor(int8)", CHANNELS), "int4": ("tensor(uint8)", CHANNELS // 2)}


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_in_integers_is_judged_by_its_budget_and_written_in_place(cache: str, tmp_path: Path) -> None:
    made = attncompile.convert(
        saved(tmp_path), tmp_path / "out", shared_buffer=True, precision=f"fp32(cache={cache})", budget=1.0
    )
    loaded = session(tmp_path / "out" / "model.onnx", "cpu")
    shapes = {entry.name: (entry.type, entry.shape[-1]) for entry in (*loaded.get_inputs(), *loaded.get_outputs())}
    assert {shapes[name] for name in shapes if name.startswith(("past", "present"))} == {CACHES[cache]}
    assert shapes["logits"][0] == "tensor(float)"
    changes = [entry for entry in made.certificate.end_to_end if entry.metric == "relative change of logits"]
    assert changes and 0 < changes[0].after <= changes[0].tolerance == 1.0
    bits = cache.removeprefix("int")
    assert any(f"keys and values are cached in {bits} bits" in note for note in made.report.notes)
    assert attncompile.verify(tmp_path / "out").passed
    example = runpy.run_path(str(EXAMPLES / "generate_in_place.py"))
    raw = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    tokens = example["generate"](raw, prompts(1, 9, 0)[0][0].tolist(), set(), 8)
    assert len(tokens) == 8
    with pytest.raises(InputError, match=rf"--precision fp32\(cache={cache}\) changes an output by .* over the budget"):
        attncompile.convert(
            tmp_path / "checkpoint", tmp_path / "no", shared_buffer=True, precision=f"fp32(cache={cache})", budget=1e-6
        )
    assert not (tmp_path / "no").exists()


def test_a_cache_in_integers_beside_narrow_weights_and_states(tmp_path: Path) -> None:
    out = written(wide, tmp_path, precision="int8-weights(block=16, cache=int8)", budget=1.0)
    assert "MatMulNBits" in operators(out / "model.onnx")
    kinds = {entry.type for entry in session(out / "model.onnx", "cpu").get_inputs() if entry.name.startswith("past")}
    assert kinds == {"tensor(int8)"}
    assert_clean(out)


def test_a_cache_in_integers_is_refused_where_nothing_keeps_one(tmp_path: Path) -> None:
    folder, out = saved(tmp_path), tmp_path / "out"
    with pytest.raises(InputError, match="give --shared-buffer"):
        attncompile.convert(folder, out, precision="fp32(cache=int8)")
    with pytest.raises(InputError, match=r"ONNX Runtime 1\.24 refuses GroupQueryAttention in float32 on cpu"):
        attncompile.convert(folder, out, shared_buffer=True, precision="fp32(cache=int8)", onnxruntime="1.24")
    with pytest.raises(InputError, match="the cache of 2 of 2 layers is kept by plain operators"):
        attncompile.convert(folder, out, shared_buffer=True, precision="fp32(cache=int8)", prefer="decomposed")
    assert not out.exists()


def saved(folder: Path) -> Path:
    """The checkpoint of a small model in a folder."""
    endless(wide).save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


@pytest.mark.slow
def test_norms_of_heads_stay_in_front_and_rotary_maps_go_in(tmp_path: Path) -> None:
    out = written(lambda: tiny("qwen3", **GROUPED | {"head_dim": CHANNELS}), tmp_path)
    found = operators(out / "model.onnx")
    assert found.count("GroupQueryAttention") == 2 and "RotaryEmbedding" not in found
    assert found.count("RMSNormalization") == 2 * (2 + 2) + 1
