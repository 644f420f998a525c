"""The torch.compile back end on small models: equal to eager, and clear about what it leaves alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, StaticCache

from attncompile import compile as compile_model
from attncompile import explain
from attncompile.backend import FallbackWarning, attncompile, read_options
from attncompile.backend.rewrite import Decision
from attncompile.verify import derive_tolerance, require_within


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small_llama(attention: str = "sdpa", **changes: Any) -> LlamaForCausalLM:
    """Two layers, six query heads on two KV heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()


def small_bert(attention: str = "eager") -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return BertModel._from_config(config, attn_implementation=attention).eval()


def tokens(batch: int, length: int, padding: str = "left") -> dict[str, torch.Tensor]:
    """Token ids and a mask whose last row is padded."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 99, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.int64)
    hidden = length // 3
    mask[-1, slice(0, hidden) if padding == "left" else slice(length - hidden, length)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def require_operators(model: nn.Module) -> None:
    """That an operator computes each site of a model's graphs: what equals the model is not the model itself."""
    sites = explain(model).sites
    assert sites and all(site.operator != "original" for site in sites), sites


def seen_by(decisions: list[Decision]) -> Any:
    """Record the decisions of a compilation."""
    from attncompile import backend

    original = backend.decide

    def recording(*args: Any, **kwargs: Any) -> tuple[Decision, ...]:
        made = original(*args, **kwargs)
        decisions.extend(made)
        return made

    return recording


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_decoder_equals_eager_where_rows_see_a_key(
    attention: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attncompile import backend

    decisions: list[Decision] = []
    monkeypatch.setattr(backend, "decide", seen_by(decisions))
    model = small_llama(attention)
    compiled = torch.compile(model, backend=attncompile, dynamic=dynamic, options={"rest": "eager"})
    with torch.no_grad():
        for length in (11, 17):
            call = tokens(2, length)
            kept = call["attention_mask"].bool()
            torch.testing.assert_close(compiled(**call).logits[kept], model(**call).logits[kept])
    assert decisions and all(decision.lowering is not None for decision in decisions)
    assert str(decisions[0].spec.attend().kv_head) == "h // 3"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_encoder_equals_eager(attention: str) -> None:
    model = small_bert(attention)
    compiled = torch.compile(model, backend=attncompile, dynamic=True, options={"rest": "eager"})
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for length in (9, 14):
            call = tokens(3, length, "right")
            torch.testing.assert_close(compiled(**call).last_hidden_state, model(**call).last_hidden_state)
    require_operators(model)


def test_inductor_compiles_the_rest() -> None:
    model = small_llama()
    compiled = torch.compile(model, backend=attncompile, dynamic=True)
    call = tokens(2, 12)
    kept = call["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(compiled(**call).logits[kept], model(**call).logits[kept])
    require_operators(model)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generation_gives_the_tokens_of_eager(attention: str) -> None:
    model = small_llama(attention)
    call = tokens(2, 7)
    with torch.no_grad():
        expected = model.generate(**call, max_new_tokens=8, do_sample=False)
        model.forward = torch.compile(
            model.forward, backend=attncompile, dynamic=True, options={"rest": "eager"}
        )
        assert torch.equal(model.generate(**call, max_new_tokens=8, do_sample=False), expected)
    require_operators(model)


def masked_gradients(run: Any, model: nn.Module, call: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of the mean square of what a decoder gives for the tokens that are there."""
    model.zero_grad()
    logits = run(**call).logits
    (logits * call["attention_mask"][..., None]).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rest", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["evaluation", "training", "checkpointed"])
def test_gradients_are_those_of_eager(mode: str, rest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from attncompile import backend

    decisions: list[Decision] = []
    monkeypatch.setattr(backend, "decide", seen_by(decisions))
    model = small_llama().train(mode != "evaluation")
    if mode == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    call = tokens(2, 9, "right")
    compiled = torch.compile(model, backend=attncompile, options={"rest": rest})

    wide = small_llama().double()
    wide.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    found, eager, exact = (
        masked_gradients(run, of, call) for run, of in ((compiled, model), (model, model), (wide, wide))
    )
    assert len(decisions) == 2 and all(decision.lowering for decision in decisions)
    assert found.keys() == eager.keys() == exact.keys()
    for name, reference in exact.items():
        # a parameter's gradient is a sum over all tokens
        bound = derive_tolerance(reference, eager[name], call["input_ids"].numel()).bound
        require_within(found[name], reference, bound, name)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_keeps_the_original_and_its_random_numbers(checkpointed: bool) -> None:
    model = small_bert().train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, backend=attncompile, options={"rest": "eager"})
    call = tokens(2, 8, "right")

    def gradients(run: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        run(**call).last_hidden_state.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with pytest.warns(FallbackWarning, match="keep their original computation.*dropout"):
        found = gradients(compiled)
    expected = gradients(model)
    for name, gradient in found.items():  # ahead of time, what nothing depends on has a gradient of zeros
        assert torch.equal(gradient, expected.get(name, torch.zeros_like(gradient))), name


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("rest", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_attention_beside_checkpointed_blocks_is_rewritten_too(gradients: bool, rest: str) -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inside = torch.utils.checkpoint.checkpoint(self.attend, self.attend(x), use_reentrant=False)
            return self.attend(inside)

        def attend(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.linear(x) @ x.transpose(-1, -2), dim=-1) @ x

    model, x = Beside(), torch.randn(2, 5, 16)
    compiled = compile_model(model, rest=rest)
    with torch.set_grad_enabled(gradients):
        found = compiled(x)
    torch.testing.assert_close(found, model(x))
    assert [site.operator for site in explain(compiled).sites] == ["sdpa"] * 3
    if gradients:
        wide = copy.deepcopy(model).double()
        exact, eager, own = (
            torch.autograd.grad(run(y).square().sum(), list(of.parameters()))
            for run, of, y in ((wide, wide, x.double()), (model, model, x), (compiled, model, x))
        )
        for reference, plain, gradient in zip(exact, eager, own, strict=True):
            require_within(gradient, reference, derive_tolerance(reference, plain, x.numel()).bound, "gradient")


def test_returned_weights_keep_the_original_and_say_so() -> None:
    model = small_bert()
    compiled = torch.compile(model, backend=attncompile, options={"rest": "eager"})
    call = tokens(2, 8, "right")
    with torch.no_grad(), pytest.warns(FallbackWarning, match="keep their original computation"):
        actual = compiled(**call, output_attentions=True)
        expected = model(**call, output_attentions=True)
    for one, other in zip(actual.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(one, other)


def test_a_graph_without_attention_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    compiled = torch.compile(model, backend=attncompile, options={"rest": "eager"})
    x = torch.randn(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        torch.testing.assert_close(compiled(x), model(x))


def test_a_call_that_nothing_states_is_one_site_and_named() -> None:
    """``flex_attention`` gives three results, and is one attention."""
    from torch.nn.attention.flex_attention import flex_attention

    def banded(x: torch.Tensor) -> torch.Tensor:
        found = flex_attention(x, x, x, score_mod=lambda s, b, h, i, j: torch.where(i >= j, s, -torch.inf))
        assert isinstance(found, torch.Tensor)
        return found

    x = torch.randn(2, 3, 7, 8)
    compiled = compile_model(banded, rest="eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        with pytest.warns(FallbackWarning, match="1 of 1 attention sites .*flex_attention .* spell the attention out"):
            found = compiled(x)
        torch.testing.assert_close(found, banded(x))


def test_an_unsupported_device_runs_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from attncompile import backend

    monkeypatch.setattr(backend, "_device", lambda inputs: "xpu")
    model = small_bert("sdpa")
    compiled = torch.compile(model, backend=attncompile, options={"rest": "eager"})
    call = tokens(2, 8, "right")
    with torch.no_grad(), pytest.warns(FallbackWarning, match="'xpu' is not supported"):
        torch.testing.assert_close(compiled(**call).last_hidden_state, model(**call).last_hidden_state)


def test_a_defect_of_ours_does_not_take_the_model_down(monkeypatch: pytest.MonkeyPatch) -> None:
    from attncompile import backend

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(backend, "lift_graph", broken)
    model = small_bert("sdpa")
    compiled = torch.compile(model, backend=attncompile, options={"rest": "eager"})
    call = tokens(2, 8, "right")
    with torch.no_grad(), pytest.warns(FallbackWarning, match="internal error .RuntimeError: a defect"):
        torch.testing.assert_close(compiled(**call).last_hidden_state, model(**call).last_hidden_state)


def test_a_window_changes_what_is_computed() -> None:
    model = small_llama()
    options = {"rest": "eager", "passes": "fuse,sparsify.window(size=4, sinks=0)"}
    compiled = torch.compile(model, backend=attncompile, options=options)
    call = tokens(1, 16)
    call["attention_mask"].fill_(1)
    windowed = small_llama()
    windowed.load_state_dict(model.state_dict())
    position = torch.arange(16)
    visible = (position[None] <= position[:, None]) & (position[None] > position[:, None] - 4)
    with torch.no_grad():
        actual = compiled(**call).logits
        expected = windowed(input_ids=call["input_ids"], attention_mask=visible[None, None]).logits
        assert not torch.allclose(actual, model(**call).logits, atol=1e-3)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rset": "eager"}, "unknown option 'rset'.*did you mean 'rest'"),
        ({"rest": "tensorrt"}, "option 'rest'.*'tensorrt'"),
        ({"verbose": "loud"}, "option 'verbose'.*'loud'"),
    ],
)
def test_wrong_options_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_options(given)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_inputs_keep_their_identity(checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it CUDA graphs copy all weights in each call, and refuse to write to a static cache."""
    from torch._functorch import aot_autograd

    found: list[list[int]] = []
    collect = aot_autograd.run_functionalized_fw_and_collect_metadata

    def seen(*args: Any, **given: Any) -> Any:
        found.append(sorted(given["static_input_indices"]))
        return collect(*args, **given)

    monkeypatch.setattr(aot_autograd, "run_functionalized_fw_and_collect_metadata", seen)

    def compiled_by(backend: Any) -> list[int]:
        found.clear()
        torch._dynamo.reset()
        model = small_llama()
        call: dict[str, Any] = {"input_ids": torch.full((1, 1), 3)}
        if checkpointed:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
            call["use_cache"] = False
        else:
            call["past_key_values"] = cache = StaticCache(model.config, max_cache_len=16)
            heads = model.config.num_key_value_heads
            cache.early_initialization(1, heads, model.config.head_dim, torch.float32, torch.device("cpu"))
        # a graph that another test has compiled would be found by its hash, and not looked at again
        with torch.set_grad_enabled(checkpointed), torch._functorch.config.patch(enable_autograd_cache=False):
            torch.compile(lambda: model(**call).logits, backend=backend, dynamic=False)()
        assert len(found) == 1
        return found[0]

    theirs = compiled_by("aot_eager")
    ours = compiled_by(lambda *given: attncompile(*given, options={"rest": "inductor"}))
    assert len(theirs) > 8 and ours == theirs
