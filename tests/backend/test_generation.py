"""``generate()`` of Hugging Face models with a compiled forward pass gives the tokens of the model as it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, CompileConfig, set_seed

import attncompile
from attncompile.backend import FallbackWarning
from tests.backend.test_backend import tokens

SMALL = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "mistral": {**SMALL, "sliding_window": 5},
    "qwen3": {**SMALL, "head_dim": 8},
    "gemma2": {**SMALL, "head_dim": 8, "sliding_window": 5},
    "gemma3_text": {**SMALL, "head_dim": 8, "sliding_window": 5},
    "gpt_oss": {**SMALL, "head_dim": 8, "sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1},
    "gpt_neox": {**SMALL, "rotary_pct": 0.5},
    "gpt2": {"vocab_size": 99, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 128, "bos_token_id": 1,
             "eos_token_id": 2, "pad_token_id": 0},
    "bloom": {"vocab_size": 99, "hidden_size": 48, "n_layer": 2, "n_head": 6, "pad_token_id": 0, "bos_token_id": 1,
              "eos_token_id": 2},
    "opt": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 48},
}  # fmt: skip
CACHES = ("dynamic", "static")
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 9},
}
QUICK = {("llama", "dynamic", "beams"), ("mistral", "static", "greedy"), ("gemma2", "dynamic", "sampling")}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(kind: str, attention: str = "eager") -> Any:
    """A tiny random decoder of a type."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **MODELS[kind])
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def generated(model: Any, call: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """Six new tokens for each row."""
    set_seed(0)
    with torch.no_grad():
        return model.generate(**call, max_new_tokens=6, min_new_tokens=6, **options)  # type: ignore[no-any-return]


def compiled(model: Any, **options: Any) -> Callable[..., Any]:
    return attncompile.compile(model.forward, dynamic=True, rest="eager", **options)


def require_rewritten(run: Callable[..., Any]) -> None:
    """That every site of a compiled call runs in an operator, or says that no operator is faster on a CPU."""
    sites = attncompile.explain(run).sites
    kept = [site for site in sites if site.operator == "original"]
    unexpected = {site.name: site.reason for site in kept if "no operator is known to be faster" not in site.reason}
    assert sites and not unexpected, unexpected


@pytest.mark.parametrize(
    ("kind", "cache", "search"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in ((kind, cache, search) for kind in MODELS for cache in CACHES for search in SEARCHES)
    ],
)
def test_tokens_equal_those_of_the_model_as_it_is(kind: str, cache: str, search: str) -> None:
    model = small(kind)
    call = tokens(2, 7)
    options = {**SEARCHES[search], "cache_implementation": cache if cache != "dynamic" else None,
               "disable_compile": True}  # fmt: skip
    expected = generated(model, call, **options)
    model.forward = compiled(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        assert torch.equal(generated(model, call, **options), expected)
    require_rewritten(model.forward)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "cache", "search", "attention"),
    [
        ("llama", "dynamic", "greedy", "sdpa"),
        ("llama", "static", "beams", "eager"),
        ("mistral", "static", "greedy", "eager"),
        ("gemma2", "dynamic", "sampling", "eager"),
    ],
)
def test_tokens_are_the_same_with_inductor_for_the_rest(kind: str, cache: str, search: str, attention: str) -> None:
    call = tokens(2, 7)
    options = {**SEARCHES[search], "cache_implementation": cache if cache != "dynamic" else None,
               "disable_compile": True}  # fmt: skip
    expected = generated(small(kind, attention), call, **options)
    model = small(kind, attention)
    model.forward = attncompile.compile(model.forward, dynamic=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        assert torch.equal(generated(model, call, **options), expected)
    require_rewritten(model.forward)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "cache"), [("llama", None), ("llama", "static"), ("mistral", "static"), ("gemma2", None)]
)
def test_prompts_that_are_padded_on_the_right(kind: str, cache: str | None) -> None:
    model, call = small(kind), tokens(3, 9, "right")
    options = {"do_sample": False, "cache_implementation": cache, "disable_compile": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = generated(model, call, **options)
        model.forward = compiled(model)
        with torch.inference_mode():
            assert torch.equal(generated(model, call, **options), expected)
    require_rewritten(model.forward)


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["no_grad", "inference_mode", "autocast"])
def test_logits_of_padded_rows_in_every_dtype(padding: str, dtype: torch.dtype, way: str) -> None:
    model = small("llama", "sdpa").to(dtype)
    call = tokens(3, 12, padding)
    kept = call["attention_mask"].bool()
    contexts = {
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }
    run = attncompile.compile(model, dynamic=True, rest="eager", verify="full")
    with contexts[way], warnings.catch_warnings():
        expected = model(**call).logits[kept]
        warnings.simplefilter("error", FallbackWarning)
        found = run(**call).logits[kept]
    require_rewritten(run)
    assert found.dtype == expected.dtype
    exact = small("llama", "sdpa").double()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    with torch.no_grad():
        reference = exact(**call).logits[kept]
    error, allowed = (float((logits.double() - reference).norm()) for logits in (found, expected))
    # as good as the model itself, up to one rounding of the result
    assert error <= allowed + torch.finfo(expected.dtype).eps * float(reference.norm())


def test_generate_compiles_its_own_step_with_our_back_end() -> None:
    model, call = small("llama", "sdpa"), tokens(2, 7)
    options = {"cache_implementation": "static", "do_sample": False}
    expected = generated(model, call, **options, disable_compile=True)
    config = CompileConfig(backend="attncompile", mode=None, options={"rest": "eager"})
    config._compile_all_devices = True
    assert torch.equal(generated(model, call, **options, compile_config=config), expected)
    assert [site.operator for site in attncompile.explain(model).sites] == ["sdpa", "sdpa"]


def test_the_whole_graph_is_one() -> None:
    model = small("llama", "sdpa")
    run = torch.compile(model, backend="attncompile", fullgraph=True, dynamic=True, options={"rest": "eager"})
    call = tokens(2, 9)
    with torch.no_grad():
        kept = call["attention_mask"].bool()
        torch.testing.assert_close(run(**call).logits[kept], model(**call).logits[kept])
    require_rewritten(run)


def test_one_compilation_serves_all_lengths_and_another_all_steps() -> None:
    model = small("llama", "sdpa")
    run = compiled(model)
    original, model.forward = model.forward, run
    for length in (7, 9, 12):
        expected_model = small("llama", "sdpa")
        call = tokens(2, length)
        assert torch.equal(generated(model, call, do_sample=False), generated(expected_model, call, do_sample=False))
    queries = [(site.sizes or {}).get("I", 1) for site in attncompile.explain(run).sites]
    assert len(attncompile.explain(run).compilations) <= 3, "a prefill, a step, and a first step at most"
    assert min(queries) == 1 < max(queries)
    model.forward = original


@pytest.mark.slow
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", ["t5", "bart", "whisper"])
def test_encoder_decoders_generate_the_same(kind: str, cache: str, search: str) -> None:
    torch.manual_seed(0)
    sizes = {
        "t5": {"d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 6, "vocab_size": 99,
               "decoder_start_token_id": 0},
        "bart": {"d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 6,
                 "decoder_attention_heads": 6, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 99,
                 "max_position_embeddings": 128},
        "whisper": {"d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 6,
                    "decoder_attention_heads": 6, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 99,
                    "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 40,
                    "decoder_start_token_id": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                    "suppress_tokens": None, "begin_suppress_tokens": None},
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **sizes[kind])
    if kind == "whisper":
        from transformers import WhisperForConditionalGeneration

        model: Any = WhisperForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
        call = {"input_features": torch.randn(2, 16, 40)}
    else:
        model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").eval()
        call = tokens(2, 9, "right")
    options = {**SEARCHES[search], "cache_implementation": cache if cache != "dynamic" else None,
               "disable_compile": True}  # fmt: skip
    expected = generated(model, call, **options)
    model.forward = compiled(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        assert torch.equal(generated(model, call, **options), expected)
    require_rewritten(model.forward)
