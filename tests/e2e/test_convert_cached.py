"""Language models with their cache: one ONNX model whose greedy tokens are those of PyTorch's own generation."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper

import attncompile
from attncompile.codegen.onnx.choose import largest_prompt_threshold, threshold_of
from attncompile.convert.calibration import BEYOND, LONGEST, calls, longest_prompt
from attncompile.convert.generator import GENERATOR, write_generator
from attncompile.convert.runtime import session
from attncompile.frontends.cached import with_cache
from attncompile.frontends.checkpoint import open_model
from attncompile.frontends.errors import InputError
from attncompile.plan.schema import load_plan
from attncompile.verify import load_certificate
from tests.onnx_files import assert_clean

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
WINDOW = 9

Build = Callable[[], transformers.PreTrainedModel]


def tiny(kind: str, **changes: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **changes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


QUICK: Mapping[str, Build] = {
    "llama": lambda: tiny("llama", **GROUPED),
    "gemma2": lambda: tiny("gemma2", **GROUPED, sliding_window=WINDOW, query_pre_attn_scalar=8),
}
MORE: Mapping[str, Build] = {
    "qwen2": lambda: tiny("qwen2", **GROUPED),
    "qwen3": lambda: tiny("qwen3", **GROUPED),
    "mistral": lambda: tiny("mistral", **GROUPED, sliding_window=WINDOW),
    "gemma3_text": lambda: tiny("gemma3_text", **GROUPED, sliding_window=WINDOW),
    "gpt_neox": lambda: tiny("gpt_neox", **SMALL),
    "opt": lambda: tiny("opt", **SMALL, ffn_dim=64, word_embed_proj_dim=48),
    "bloom": lambda: tiny("bloom", vocab_size=99, hidden_size=48, n_layer=2, n_head=6, pad_token_id=0),
    "phi3": lambda: tiny("phi3", **GROUPED),
    "olmo2": lambda: tiny("olmo2", **GROUPED),
}


def greedy(loaded: onnxruntime.InferenceSession, ids: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    """Tokens that follow in each row, a prompt at once and then one at a time; ends of texts are not looked at."""
    entries = {entry.name: entry for entry in loaded.get_inputs()}
    names = [entry.name for entry in loaded.get_outputs()]
    feeds = {
        name: np.zeros((len(ids), entry.shape[1], 0, entry.shape[3]), dtype=np.float32)
        for name, entry in entries.items()
        if name.startswith("past_key_values.")
    }
    made, step = [], ids
    for _ in range(count):
        feeds["input_ids"], feeds["attention_mask"] = step.numpy(), mask.numpy()
        if "position_ids" in entries:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            feeds["position_ids"] = positions[:, mask.shape[1] - step.shape[1] :].numpy()
        results = dict(zip(names, loaded.run(None, feeds), strict=True))
        for name in names:
            if name != "logits":
                feeds[name.replace("present", "past_key_values")] = results[name]
        step = torch.from_numpy(results["logits"][:, -1]).argmax(-1, keepdim=True)
        made.append(step)
        mask = torch.cat([mask, torch.ones_like(step)], dim=1)
    return torch.cat(made, dim=1)


def expected(model: Any, ids: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    """What transformers generates; no token ends a text, so that rows stay of one length."""
    settings = transformers.GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        found = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    return found[:, ids.shape[1] :]


def prompts(batch: int, length: int, padded: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[-1, :padded] = 0
    return ids.masked_fill(mask == 0, 0), mask


def assert_generates_alike(build: Build, folder: Path, prefer: str) -> Path:
    model, checkpoint, out = build(), folder / "checkpoint", folder / "out"
    model.generation_config.eos_token_id = None
    model.save_pretrained(checkpoint)
    conversion = attncompile.convert(checkpoint, out, prefer=prefer, cache=True)  # type: ignore[arg-type]
    assert conversion.certificate.passed
    assert_clean(out)
    loaded = session(out / "model.onnx", "cpu")
    for batch, length, padded in ((1, 1, 0), (1, 24, 0), (3, 17, 6)):
        ids, mask = prompts(batch, length, padded)
        assert torch.equal(greedy(loaded, ids, mask, 12), expected(model, ids, mask, 12)), (batch, length, padded)
    return out


@pytest.mark.parametrize("name", QUICK)
def test_tokens_are_those_of_pytorch(name: str, tmp_path: Path) -> None:
    out = assert_generates_alike(QUICK[name], tmp_path, "fused")
    sites = load_plan(out / "plan.json").sites
    assert [site.operator for site in sites] == ["GroupQueryAttention"] * 2
    assert [site.site for site in sites] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    said = {entry.inputs for entry in load_certificate(out / "certificate.json").end_to_end}
    assert {"batch 3, length 33 behind 0", "batch 2, length 1 behind 70", "batch 3, length 5 behind 33"} <= said
    assert "batch 1, length 128 behind 0" in said  # as many positions as the model has
    attributes = {
        attribute.name: attribute.value
        for node in ir.load(out / "model.onnx").graph.all_nodes()
        if node.op_type == "GroupQueryAttention"
        for attribute in node.attributes.values()
    }
    if name == "gemma2":
        assert attributes["softcap"] == 50.0 and attributes["local_window_size"] == WINDOW
    assert attncompile.verify(out).passed


@pytest.mark.slow
@pytest.mark.parametrize("prefer", ["fused", "fastest"])
@pytest.mark.parametrize("name", MORE)
def test_tokens_of_more_models(name: str, prefer: str, tmp_path: Path) -> None:
    assert_generates_alike(MORE[name], tmp_path, prefer)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    # so many positions that a prompt may be worth the operator
    tiny("llama", **GROUPED | {"max_position_embeddings": 2048}).save_pretrained(folder / "llama")
    attncompile.convert(folder / "llama", folder / "out")
    return folder / "out"


def test_a_decoder_gets_a_cache_unless_told(llama: Path) -> None:
    loaded = session(llama / "model.onnx", "cpu")
    past = [entry.name for entry in loaded.get_inputs() if entry.name.startswith("past")]
    assert past == [f"past_key_values.{layer}.{side}" for layer in (0, 1) for side in ("key", "value")]
    shapes = {entry.name: entry.shape for entry in loaded.get_outputs()}
    assert shapes["present.1.value"] == ["batch", 2, "past + length", 8]
    assert shapes["logits"] == ["batch", "length", 99]
    operators = [site.operator for site in load_plan(llama / "plan.json").sites]
    assert all(operator.startswith("GroupQueryAttention from ") for operator in operators)
    said = {entry.inputs for entry in load_certificate(llama / "certificate.json").end_to_end}
    beyond = max(map(threshold_of, operators)) + BEYOND
    assert f"batch 1, length {beyond} behind 0" in said and beyond < LONGEST


@pytest.mark.parametrize(("kind", "grouped"), [("llama", True), ("gpt_neox", False), ("mixed", None)])
def test_the_longest_prompt_is_beyond_what_a_model_of_such_heads_may_get(
    kind: str, grouped: bool | None, tmp_path: Path
) -> None:
    """Logits and scores of every token beyond that are memory and time which show nothing."""
    (QUICK | MORE)["gpt_neox" if kind == "gpt_neox" else "llama"]().save_pretrained(tmp_path)
    opened = with_cache(open_model(tmp_path))
    if kind == "mixed":  # one layer keeps a head for each query head
        heads = opened.config.num_attention_heads
        opened = replace(opened, widths=(opened.widths[0], ((heads, 8), (heads, 8))))
    assert opened.grouped is grouped
    assert longest_prompt(opened, "cpu") == largest_prompt_threshold("cpu", grouped) + BEYOND
    assert longest_prompt(opened) <= LONGEST


def test_a_model_with_fewer_positions_reads_as_many_as_it_has(tmp_path: Path) -> None:
    QUICK["llama"]().save_pretrained(tmp_path)
    opened = with_cache(open_model(tmp_path))
    for shift, length in ((0, 128), (5, 123)):
        lengths = [call.kwargs["input_ids"].shape[1] for call in calls(opened, shift)]
        assert max(lengths) == length and len(lengths) == 7


def test_the_generators_configuration_names_what_the_model_has(llama: Path) -> None:
    model = json.loads((llama / GENERATOR).read_text())["model"]
    decoder, loaded = model["decoder"], session(llama / model["decoder"]["filename"], "cpu")
    inputs, outputs = ({entry.name for entry in side} for side in (loaded.get_inputs(), loaded.get_outputs()))
    for side, names in (("inputs", inputs), ("outputs", outputs)):
        patterns = decoder[side].values()
        layers = range(decoder["num_hidden_layers"])
        assert names == {name % layer if "%d" in name else name for name in patterns for layer in layers}
    assert (decoder["num_key_value_heads"], decoder["head_size"], model["eos_token_id"]) == (2, 8, 2)


@pytest.mark.parametrize(
    ("provider", "told"),
    [("cpu", []), ("cuda", [{"cuda": {"enable_cuda_graph": "0"}}]), ("TensorrtExecutionProvider", [])],
)
def test_the_generator_is_told_what_to_run_on(provider: str, told: list[Any], llama: Path, tmp_path: Path) -> None:
    model = with_cache(open_model(llama.parent / "llama"))
    assert write_generator(model, ["model.onnx"], tmp_path, provider) == []
    decoder = json.loads((tmp_path / GENERATOR).read_text())["model"]["decoder"]
    assert decoder["session_options"] == {"log_id": "onnxruntime-genai", "provider_options": told}


def test_the_example_generates(llama: Path) -> None:
    example = runpy.run_path(str(EXAMPLES / "generate_onnx.py"))
    model, loaded = QUICK["llama"](), session(llama / "model.onnx", "cpu")
    ids, mask = prompts(1, 9, 0)
    wanted = expected(model, ids, mask, 8)[0].tolist()
    assert example["generate"](loaded, ids[0].tolist(), set(), 8) == wanted
    assert example["generate"](loaded, ids[0].tolist(), {wanted[2]}, 8) == wanted[: wanted.index(wanted[2]) + 1]


@pytest.mark.parametrize(
    "body",
    [b"", b"nonsense", b"[]", b"{}", b'{"prompt": 5}', b'{"prompt": ""}', b'{"prompt": "a", "tokens": 0}',
     b'{"prompt": "a", "tokens": true}'],
    ids=repr,
)  # fmt: skip
def test_the_service_says_what_it_takes(body: bytes) -> None:
    """Anything else is an answer of its own, and not an end of the connection."""
    request = runpy.run_path(str(EXAMPLES / "serve_onnx.py"))["request"]
    assert request(b'{"prompt": "a"}') == ("a", 32) and request(b'{"prompt": "a", "tokens": 3}') == ("a", 3)
    with pytest.raises(ValueError, match=r"send|Expecting"):
        request(body)


def test_the_example_generates_with_states_in_float16(llama: Path, tmp_path: Path) -> None:
    example = runpy.run_path(str(EXAMPLES / "generate_onnx.py"))
    attncompile.convert(llama.parent / "llama", tmp_path / "out", precision="fp16")
    loaded = session(tmp_path / "out" / "model.onnx", "cpu")
    assert {entry.type for entry in loaded.get_inputs() if entry.name.startswith("past")} == {"tensor(float16)"}
    ids, mask = prompts(1, 9, 0)
    wanted = narrow_greedy(loaded, ids, mask, 8)
    assert example["generate"](loaded, ids[0].tolist(), set(), 8) == wanted


def narrow_greedy(loaded: onnxruntime.InferenceSession, ids: torch.Tensor, mask: torch.Tensor, count: int) -> list[int]:
    """Tokens of one row without any cache: the whole text in each call, its past empty and in float16."""
    made: list[int] = []
    for _ in range(count):
        text = torch.cat([ids, torch.tensor([made], dtype=ids.dtype)], dim=1)
        feeds = {"input_ids": text.numpy(), "attention_mask": np.ones(text.shape, dtype=np.int64)}
        for entry in loaded.get_inputs():
            if entry.name == "position_ids":
                feeds[entry.name] = np.arange(text.shape[1])[None]
            elif entry.name not in feeds:
                feeds[entry.name] = np.zeros((1, entry.shape[1], 0, entry.shape[3]), dtype=np.float16)
        made.append(int(loaded.run(["logits"], feeds)[0][0, -1].argmax()))
    return made


def in_bfloat16(folder: Path, *, shared: bool) -> onnxruntime.InferenceSession:
    """A model that says of each token how many are before it, its cache and its logits in bfloat16."""
    kind, whole = TensorProto.BFLOAT16, TensorProto.INT64
    size = ["batch", 1, "past", 1]
    given = [helper.make_tensor_value_info("input_ids", whole, ["batch", "length"]),
             helper.make_tensor_value_info("attention_mask", whole, ["batch", "total"]),
             helper.make_tensor_value_info("past_key_values.0.key", kind, size)]  # fmt: skip
    after = size if shared else ["batch", 1, "total", 1]
    results = [helper.make_tensor_value_info("logits", kind, ["batch", "length", 99]),
               helper.make_tensor_value_info("present.0.key", kind, after)]  # fmt: skip
    nodes = [helper.make_node("Shape", ["attention_mask"], ["sizes"], start=1),
             helper.make_node("Mul", ["input_ids", "none"], ["zeros"]),
             helper.make_node("Add", ["zeros", "sizes"], ["counts"]),
             helper.make_node("OneHot", ["counts", "depth", "values"], ["hot"]),
             helper.make_node("Cast", ["hot"], ["logits"], to=kind),
             helper.make_node("Unsqueeze", ["zeros", "axes"], ["new"]),
             helper.make_node("Cast", ["new"], ["narrow"], to=kind),
             helper.make_node("Identity", ["past_key_values.0.key"], ["present.0.key"]) if shared
             else helper.make_node("Concat", ["past_key_values.0.key", "narrow"], ["present.0.key"], axis=2),
    ]  # fmt: skip
    known = {"none": 0, "depth": 99, "values": np.array([-2.0, 1.0], np.float32), "axes": [1, 3]}
    constants = [numpy_helper.from_array(np.array(value), name) for name, value in known.items()]
    graph = helper.make_graph(nodes, "counting", given, results, constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    return session(folder / "model.onnx", "cpu")


@pytest.mark.parametrize("name", ["generate_onnx", "generate_in_place"])
def test_the_examples_read_bfloat16(name: str, tmp_path: Path) -> None:
    """A cache and logits in a type that NumPy does not have, and a model that takes no positions."""
    generate = runpy.run_path(str(EXAMPLES / f"{name}.py"))["generate"]
    counting = in_bfloat16(tmp_path, shared=name == "generate_in_place")
    assert generate(counting, [5, 5, 5], set(), 4) == [3, 4, 5, 6]


def test_onnxruntime_genai_generates(llama: Path) -> None:
    generators = pytest.importorskip("onnxruntime_genai")
    ids, mask = prompts(1, 9, 0)
    model = generators.Model(str(llama))
    settings = generators.GeneratorParams(model)
    settings.set_search_options(max_length=17, do_sample=False)
    generator = generators.Generator(model, settings)
    generator.append_tokens(ids[0].numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = list(map(int, generator.get_sequence(0)))[9:]
    assert found == expected(QUICK["llama"](), ids, mask, 8)[0].tolist()[: len(found)]


def test_what_has_no_cache_is_told_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=99, **size))
    bert.save_pretrained(tmp_path / "bert")
    opened = open_model(tmp_path / "bert")
    with pytest.raises(InputError, match="BertModel does not generate: bert; pass --no-cache"):
        with_cache(opened)
    with pytest.raises(InputError, match="no cache to convert with"):
        attncompile.convert(tmp_path / "bert", tmp_path / "out", cache=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_smollm2_generates_in_onnx_runtime(smollm2_folder: Path, tmp_path: Path) -> None:
    attncompile.convert(smollm2_folder, tmp_path / "out")
    opened = open_model(smollm2_folder)
    tokenizer = opened.tokenizer
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    loaded = session(tmp_path / "out" / "model.onnx", "cpu")
    for texts in (["The capital of France is", "Once upon a time there was a little"], ["def add(a, b):"]):
        call = tokenizer(texts, return_tensors="pt", padding=True)
        opened.model.generation_config.eos_token_id = None
        wanted = expected(opened.model, call["input_ids"], call["attention_mask"], 16)
        assert torch.equal(greedy(loaded, call["input_ids"], call["attention_mask"], 16), wanted)
