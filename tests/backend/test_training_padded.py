"""Gradients of padded batches with the loss of transformers: those of the model, in rows that see no key too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, Gemma2Config, Gemma2ForCausalLM

import attncompile
from attncompile.codegen.pytorch.empty_rows import PASSED
from attncompile.verify import derive_tolerance, require_within
from tests.backend.test_backend import small_llama, tokens
from tests.backend.test_calls import InFloat64

LONGEST_SUM = 99
"""Terms of the longest sum: the vocabulary, in the loss."""

slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@contextlib.contextmanager
def softmax_in_float64() -> Iterator[None]:
    """Eager models of transformers compute their softmax in float32, where the lowest number of float64 is −∞."""
    plain = torch.nn.functional.softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", lambda logits, dim, dtype=None: plain(logits, dim=dim))
        yield


def gradients(model: Any, run: Any, call: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the loss that transformers computes; labels of padding are left out, as its collators do."""
    labels = torch.where(call["attention_mask"] == 1, call["input_ids"], -100)
    run(**call, labels=labels, use_cache=False).loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def exact_gradients(model: Any, call: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the model itself in float64, where only norms and the loss stay in float32."""
    wide = model.double()
    with softmax_in_float64():
        return gradients(wide, wide, call)


def plain_gradients(model: Any, call: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the model itself in float32: how far rounding takes them."""
    return gradients(model, model, call)


@pytest.mark.parametrize(
    ("attention", "padding"), [("eager", "right"), ("sdpa", "right"), ("sdpa", "left"), ("eager", "left")]
)
def test_gradients_of_a_padded_batch_are_those_of_the_model(attention: str, padding: str) -> None:
    """Padding at the left: the row before the first token sees no key, and predicts it."""
    call = tokens(2, 12, padding)
    ours = small_llama(attention)
    truth, eager = (of(small_llama(attention), call) for of in (exact_gradients, plain_gradients))
    compiled = attncompile.compile(ours, dynamic=True, rest="eager")
    found = gradients(ours, compiled, call)
    assert all(site.operator != "original" for site in attncompile.explain(compiled).sites)
    assert found.keys() == eager.keys() == truth.keys() and len(found) > 15
    for name, gradient in found.items():
        bound = derive_tolerance(truth[name], eager[name], LONGEST_SUM).bound
        require_within(gradient, truth[name], bound, f"the gradient of {name}")


def small_bloom() -> Any:
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=99, hidden_size=32, n_layer=1, n_head=4, hidden_dropout=0.0, attention_dropout=0.0, pad_token_id=0
    )
    return BloomForCausalLM._from_config(config, attn_implementation="eager").train()


def small_gemma() -> Any:
    """A layer with a window of 4 and one without; no softcap, which no operator on a CPU computes."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        attn_logit_softcapping=None,
        pad_token_id=0,
    )
    return Gemma2ForCausalLM._from_config(config, attn_implementation="eager").train()


def llama() -> Any:
    return small_llama("eager")


@pytest.mark.parametrize(
    ("build", "padding"),
    [
        (llama, "left"),
        pytest.param(llama, "right", marks=slow),
        (small_bloom, "left"),
        pytest.param(small_bloom, "right", marks=slow),
        (small_gemma, "left"),
        pytest.param(small_gemma, "right", marks=slow),
    ],
)
def test_in_float64_gradients_of_added_masks_agree_to_its_rounding(build: Callable[[], Any], padding: str) -> None:
    call, ours = tokens(2, 12, padding), build().double()
    truth, eager = exact_gradients(build(), call), plain_gradients(build(), call)
    compiled = attncompile.compile(ours, dynamic=True, rest="eager")
    found = gradients(ours, compiled, call)
    sites = attncompile.explain(compiled).sites
    assert sites and all(site.operator != "original" and PASSED in site.reason for site in sites)
    assert found.keys() == truth.keys()
    for name, gradient in found.items():
        bound = derive_tolerance(truth[name], eager[name], LONGEST_SUM, torch.float64).bound
        require_within(gradient, truth[name], bound, f"the gradient of {name}")


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=slow)])
def test_checkpointed_blocks_pass_them_on_too(reentrant: bool) -> None:
    call, ours = tokens(2, 12, "left"), llama().double().train()
    truth, eager = exact_gradients(llama().train(), call), plain_gradients(llama().train(), call)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    compiled = attncompile.compile(ours, rest="eager")
    found = gradients(ours, compiled, call)
    sites = attncompile.explain(compiled).sites
    assert sites and all(PASSED in site.reason for site in sites)
    for name, gradient in found.items():
        bound = derive_tolerance(truth[name], eager[name], LONGEST_SUM, torch.float64).bound
        require_within(gradient, truth[name], bound, f"the gradient of {name}")


def test_inference_and_causal_training_are_rewritten_without_it() -> None:
    call, model = tokens(2, 12, "left"), llama()
    compiled = attncompile.compile(model, dynamic=True, rest="eager")
    with torch.no_grad():
        compiled(**call, use_cache=False)
    compiled(input_ids=call["input_ids"], use_cache=False).logits.sum().backward()
    sites = attncompile.explain(compiled).sites
    assert len(sites) == 4 and all(site.operator != "original" and PASSED not in site.reason for site in sites)


@slow
def test_inductor_compiles_the_gradients() -> None:
    """Both directions traced with symbolic sizes. Norms and the loss are in float32, and Inductor rounds them in
    another order."""
    call, ours = tokens(2, 12, "left"), llama().double()
    eager = exact_gradients(llama(), call)
    wide = llama().double()
    with InFloat64():
        truth = gradients(wide, wide, call)
    compiled = torch.compile(ours, backend="attncompile", dynamic=True)
    found = gradients(ours, compiled, call)
    for name, gradient in found.items():
        bound = derive_tolerance(truth[name], eager[name].float(), LONGEST_SUM).bound
        require_within(gradient, truth[name], bound, f"the gradient of {name}")
