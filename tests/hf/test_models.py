"""Models with ``attn_implementation="attncompile"``: the numbers and tokens of transformers' own attention."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BloomConfig, BloomModel

import attncompile.hf
from attncompile.backend import FallbackWarning
from attncompile.verify import derive_tolerance, require_within
from benchmarks.zoo.build import build
from tests.backend.test_backend import small_llama, tokens

TYPES = ["llama", "gemma2", "gemma3_text", "gpt_oss", "bert", "bart", "whisper", "t5", "vit", "clip", "qwen3", "doge"]
GENERATING = ["llama", "mistral", "gemma2", "gpt_oss", "bart", "t5"]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    attncompile.hf.forget()
    yield
    torch._dynamo.reset()


def results(found: Any) -> list[torch.Tensor]:
    """The real tensors of a model's output."""
    if isinstance(found, torch.Tensor):
        return [found] if found.is_floating_point() else []
    values = found.values() if isinstance(found, dict) else found if isinstance(found, list | tuple) else ()
    return [tensor for value in values for tensor in results(value)]


@pytest.mark.parametrize("kind", TYPES)
def test_numbers(kind: str) -> None:
    ours, _, inputs = build(kind, "attncompile")  # type: ignore[arg-type]
    theirs = build(kind, "eager")[0]
    wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        found, plain = results(ours(**copy.deepcopy(inputs))), results(theirs(**copy.deepcopy(inputs)))
        truth = results(theirs.double()(**wide))
    assert len(found) == len(plain) == len(truth) > 0
    for one, other, exact in zip(found, plain, truth, strict=True):
        # what transformers computes in float32 whatever the model's dtype is no more exact in the yardstick
        tolerance = derive_tolerance(exact.double(), other, 64)
        require_within(one, exact.double(), tolerance.bound, kind)
    sites = attncompile.hf.explain(ours).sites
    assert sites and all(site.spec is not None for site in sites)


def generating(kind: str, how: str) -> Any:
    """A tiny model that generates."""
    config = build(kind, "eager")[0].config
    config.use_cache = True
    torch.manual_seed(0)
    family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = family.from_config(config, attn_implementation=how).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.decoder_start_token_id = 1
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", GENERATING)
def test_tokens(kind: str, options: dict[str, Any]) -> None:
    call = {**tokens(3, 12), "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
    if kind in ("bart", "t5"):
        call["attention_mask"] = tokens(3, 12, "right")["attention_mask"]
    ours, theirs = generating(kind, "attncompile"), generating(kind, "eager")
    found = ours.generate(**call, return_dict_in_generate=True, output_logits=True)
    expected = theirs.generate(**call, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(site.spec is not None for site in attncompile.hf.explain(ours).sites)


@pytest.mark.parametrize("window", [5, 30])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_cache_of_the_last_tokens(cache: str, window: int) -> None:
    """Twelve tokens and twenty more: the window is full before the first step, or on the way."""
    made = []
    for how in ("eager", "attncompile"):
        model = generating("mistral", how)
        model.config.sliding_window = window
        made.append(
            model.generate(
                **tokens(3, 12), max_new_tokens=20, min_new_tokens=20, do_sample=False, cache_implementation=cache
            )
        )
    assert torch.equal(*made)
    first = [site for site in attncompile.hf.explain(model).sites if site.name == "model.layers.0.self_attn"]
    assert 1 < len(first) < 5, "a Spec for each way the window lies, not for each step"


@pytest.mark.parametrize(
    ("backend", "dynamic"), [("eager", None), ("aot_eager", None), ("aot_eager", True), ("attncompile", None)]
)
def test_in_one_graph(backend: str, dynamic: bool | None) -> None:
    ours, theirs, wide = small_llama("attncompile"), small_llama("eager"), small_llama("sdpa").double()
    compiled = torch.compile(ours, backend=backend, fullgraph=True, dynamic=dynamic)
    for length in (12, 16):
        call = tokens(3, length)
        shown = call["attention_mask"].bool()
        with torch.no_grad():
            found, plain = compiled(**call).logits[shown], theirs(**call).logits[shown]
            truth = wide(**call).logits[shown]
        require_within(found, truth, derive_tolerance(truth, plain, 48).bound, "logits")
    (first, _) = attncompile.hf.explain(ours).sites[:2]
    assert first.compiled and "j ≤ i and attention_mask[b, j]" in str(first)


def test_compiled_by_inductor_and_trained() -> None:
    ours, theirs = small_llama("attncompile").train(), small_llama("eager").train()
    wide = small_llama("eager").double().train()
    call = tokens(3, 12, "right")
    labels = call["input_ids"].masked_fill(call["attention_mask"] == 0, -100)
    for model in (torch.compile(ours, fullgraph=True), theirs, wide):
        model(**call, labels=labels, use_cache=False).loss.backward()
    require_equal_gradients(ours, theirs, wide)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_training_step(checkpointed: bool) -> None:
    ours, theirs = small_llama("attncompile").train(), small_llama("eager").train()
    wide = small_llama("eager").double().train()
    if checkpointed:
        ours.gradient_checkpointing_enable()
    call = tokens(3, 12, "right")
    labels = call["input_ids"].masked_fill(call["attention_mask"] == 0, -100)
    for model in (ours, theirs, wide):
        model(**call, labels=labels, use_cache=False).loss.backward()
    require_equal_gradients(ours, theirs, wide)


def test_a_learned_bias_trains() -> None:
    made = []
    for how in ("attncompile", "eager"):
        model, _, inputs = build("t5", how)  # type: ignore[arg-type]
        made.append(model.train())
    wide = copy.deepcopy(made[1]).double()
    for model in (*made, wide):
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
            elif isinstance(getattr(part, "dropout", None), float):
                part.dropout = 0.0
        model(**copy.deepcopy(inputs)).last_hidden_state.square().mean().backward()
    require_equal_gradients(*made, wide, 2 * 48)


def require_equal_gradients(
    ours: torch.nn.Module, theirs: torch.nn.Module, wide: torch.nn.Module, terms: int = 48
) -> None:
    """Gradients of weights are sums over all tokens, those of tokens over the channels: so many ``terms`` at most."""
    for (name, one), other, exact in zip(ours.named_parameters(), theirs.parameters(), wide.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and exact.grad is not None, name
        bound = derive_tolerance(exact.grad, other.grad, terms).bound
        require_within(one.grad, exact.grad, bound, name)


@pytest.mark.parametrize("padded", [True, False])
def test_static_generation_with_a_compiled_step(padded: bool) -> None:
    """One graph for the prompt and one for all steps."""
    graphs: list[torch.fx.GraphModule] = []

    def counted(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    ours, theirs = small_llama("attncompile"), small_llama("eager")
    call = {**tokens(3, 12), "max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    if not padded:
        del call["attention_mask"]
    expected = theirs.generate(**call)
    ours.forward = torch.compile(ours.forward, backend=counted, fullgraph=True)  # type: ignore[method-assign]
    assert torch.equal(ours.generate(**call, cache_implementation="static"), expected)
    assert len(graphs) == 2
    sites = attncompile.hf.explain(ours).sites
    assert all(site.compiled and site.spec is not None for site in sites)
    assert any("j ≤ i + query_offset[0]" in str(site.spec) for site in sites)


def test_packed_sequences() -> None:
    """Positions that begin again say where sequences end: each is computed as if it were alone."""
    ours = small_llama("attncompile")
    ids = tokens(1, 12)["input_ids"]
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        both = ours(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        apart = torch.cat([ours(input_ids=part).logits[0] for part in (ids[:, :5], ids[:, 5:])])
        exact = copy.deepcopy(ours).double()
        truth = torch.cat([exact(input_ids=part).logits[0] for part in (ids[:, :5], ids[:, 5:])])
    require_within(both, truth, derive_tolerance(truth, apart, 48).bound, "logits")
    assert any("mask_0[b, i] = mask_0[b, j]" in str(s.spec) or "mask_0[b, j] = mask_0[b, i]" in str(s.spec)
               for s in attncompile.hf.explain(ours).sites)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = small_llama("attncompile")
    model.save_pretrained(tmp_path)
    assert "attncompile" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="attncompile")
    call = tokens(3, 12)
    with torch.no_grad():
        assert torch.equal(again(**call).logits, model(**call).logits)
    assert len(attncompile.hf.explain(again).sites) == 2


def test_switched_on_later() -> None:
    model = small_llama("eager")
    model.set_attn_implementation("attncompile")
    with torch.no_grad():
        model(**tokens(2, 8))
    assert len(attncompile.hf.explain(model).sites) == 2


# --- what is told -----------------------------------------------------------------------------------------------------


def test_both_doors_tell_the_same_costs_in_the_same_words() -> None:
    """Without padding, whose mask is of another dtype in the graph."""
    call, later = ({"input_ids": tokens(2, length)["input_ids"]} for length in (11, 13))
    torch_door = attncompile.compile(small_llama("sdpa"), dynamic=True, rest="eager")
    ours, model = small_llama("attncompile"), small_llama("attncompile")
    in_a_graph = torch.compile(model, backend="eager", dynamic=True)
    with torch.no_grad():
        # first, or it tells that Dynamo compiles the same code again
        torch_door(**call), in_a_graph(**call), ours(**call)
        ours(**later)
    told = [attncompile.hf.explain(ours), attncompile.hf.explain(in_a_graph), attncompile.explain(torch_door)]
    costs = [[site.cost() for site in explanation.sites] for explanation in told]
    assert [len(found) for found in costs] == [2, 2, 2]
    first = costs[2][0]
    assert first is not None and first.sizes == {"B": 2, "I": 11} and first.after.flops > 0
    assert all(cost == first for found in costs for cost in found)
    lines = [[line for line in str(explanation).splitlines() if "at: " not in line][2:] for explanation in told]
    assert lines[0] == lines[1] == lines[2] and lines[0][-1].startswith("    costs 25.3 kFLOP and ")
    names = [str(explanation).splitlines()[1].strip() for explanation in told]
    assert names[0] == names[2] and names[1] == f"{names[0]}, in a compiled graph"


def test_costs_are_at_the_first_call_of_each_kind() -> None:
    model = small_llama("attncompile")
    for length in (7, 9):
        attncompile.hf.forget()
        torch._dynamo.reset()
        model.generate(**tokens(2, length), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        costs = [site.cost() for site in attncompile.hf.explain(model).sites if "layers.0" in site.name]
        assert [cost and cost.sizes for cost in costs] == [{"B": 2, "I": length}, {"B": 2, "I": 1, "J": length + 1}]


def test_what_stays_as_it_was_has_no_cost() -> None:
    """Nothing was stated, so that there is nothing to count."""
    ours = small_llama("attncompile")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        ours(**tokens(2, 8), output_attentions=True)
    sites = attncompile.hf.explain(ours).sites
    assert [(site.operator, site.cost()) for site in sites] == [("original", None)] * 2


# --- what is left to the model ----------------------------------------------------------------------------------------


def test_weights_that_are_asked_for() -> None:
    ours, theirs, call = small_llama("attncompile"), small_llama("eager"), tokens(2, 8, "right")
    with torch.no_grad(), pytest.warns(FallbackWarning, match=r"LlamaAttention keeps .* \(its weights are asked for\)"):
        found = ours(**call, output_attentions=True).attentions
    with torch.no_grad():
        expected = theirs(**call, output_attentions=True).attentions
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert "original\n    why: its weights are asked for" in str(attncompile.hf.explain(ours))


@pytest.mark.parametrize("compiled", [False, True])
def test_dropout(compiled: bool) -> None:
    """The same seed drops the same weights as in the model's own call of SDPA."""
    ours, theirs = (small_llama(how, attention_dropout=0.5).train() for how in ("attncompile", "sdpa"))
    call = tokens(2, 8, "right")
    run = torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours
    with pytest.warns(FallbackWarning, match="weights are dropped at random in training"):
        torch.manual_seed(3)
        found = run(**call, use_cache=False).logits
    torch.manual_seed(3)
    expected = theirs(**call, use_cache=False).logits
    assert torch.equal(found, expected)


def test_a_model_that_spells_out_its_attention() -> None:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)
    ours = BloomModel._from_config(config, attn_implementation="attncompile").eval()
    theirs = BloomModel._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    theirs.load_state_dict(ours.state_dict())
    call = tokens(2, 8)
    with torch.no_grad(), pytest.warns(FallbackWarning, match="not call attention through transformers' interface"):
        found = ours(**call).last_hidden_state
    with torch.no_grad():
        assert torch.equal(found, theirs(**call).last_hidden_state)
    assert "runs as it is written" in str(attncompile.hf.explain(ours))


def test_a_model_with_another_attention_is_told_so() -> None:
    """As one that was switched over, which transformers refuses for models that spell their attention out."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)
    model = BloomModel._from_config(config, attn_implementation="eager").eval()
    model.set_attn_implementation("attncompile")
    with torch.no_grad():
        model(**tokens(2, 8))
    text = str(attncompile.hf.explain(model))
    assert "the model runs with 'eager'" in text and "call the model first" not in text, text


def test_a_layer_that_reads_more_than_the_interface_says() -> None:
    ours, _, inputs = build("inkling2_text", "attncompile")  # type: ignore[arg-type]
    theirs = build("inkling2_text", "eager")[0]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        found, expected = results(ours(**copy.deepcopy(inputs))), results(theirs(**copy.deepcopy(inputs)))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert {site.reason for site in attncompile.hf.explain(ours).sites} == {"its own attention reads sinks"}


def test_a_defect_of_ours_leaves_the_model_running(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> str:
        raise RuntimeError("broken")

    monkeypatch.setattr("attncompile.hf.attention._remembered", broken)
    ours, theirs, call = small_llama("attncompile"), small_llama("sdpa"), tokens(2, 8)
    with torch.no_grad(), pytest.warns(FallbackWarning, match="internal error: RuntimeError: broken. Please report"):
        found = ours(**call).logits
    with torch.no_grad():
        assert torch.equal(found, theirs(**call).logits)


def test_what_torch_refuses_is_refused() -> None:
    layer, query = torch.nn.Identity(), torch.randn(2, 3, 4, 8)
    with pytest.warns(FallbackWarning, match="dtypes"), pytest.raises(RuntimeError):
        attncompile.hf.attention_forward(layer, query, query.half(), query.half(), None)
    with pytest.warns(FallbackWarning, match="another size"), pytest.raises(RuntimeError):
        attncompile.hf.attention_forward(layer, query, query, query, torch.ones(2, 1, 4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="chooses blocks of keys"):
        attncompile.hf.attention_forward(layer, query, query, query, None, block_indices=torch.zeros(2, 1))


def test_without_the_import_transformers_says_what_there_is() -> None:
    code = (
        "import attncompile, sys\n"
        "assert 'transformers' not in sys.modules\n"
        "from transformers import LlamaConfig, LlamaModel\n"
        "LlamaModel._from_config(LlamaConfig(num_hidden_layers=1), attn_implementation='attncompile')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'ValueError: Specified `attn_implementation="attncompile"` is not supported' in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "mistral"])
def test_on_a_card(kind: str, dtype: torch.dtype) -> None:
    ours, theirs = (generating(kind, how).cuda() for how in ("attncompile", "eager"))
    call = {name: tensor.cuda() for name, tensor in tokens(3, 200, "right").items()}
    shown = call["attention_mask"].bool()
    with torch.no_grad():
        truth = copy.deepcopy(theirs).double()(**call).logits[shown]
        found, plain = ours.to(dtype)(**call).logits[shown], theirs.to(dtype)(**call).logits[shown]
        again = torch.compile(ours, backend="aot_eager", fullgraph=True)(**call, use_cache=False).logits[shown]
    for one in (found, again):
        require_within(one, truth, derive_tolerance(truth, plain, 200).bound, kind)
    ours.float().train()(**call, use_cache=False).logits.sum().backward()
    steps = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    for cache in ("dynamic", "static"):
        made = ours.eval().generate(**call, **steps, cache_implementation=cache)
        assert torch.equal(made, theirs.float().generate(**call, **steps, cache_implementation="dynamic"))
