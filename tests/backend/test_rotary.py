"""torch.compile with rotary maps inside the attention: models as transformers writes them, values and gradients."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GPTJConfig, GPTJForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from attncompile import explain
from attncompile.backend import FallbackWarning, attncompile
from attncompile.backend.choose import choose_lowering
from attncompile.codegen.lowering import Lowering, SharedLists
from attncompile.codegen.pytorch import rotating_first
from attncompile.codegen.triton.structure import why_not_spec
from attncompile.ir import Spec
from attncompile.ir.prologue import rotated_tensors, without_positions
from attncompile.ir.sample import random_tensors
from attncompile.verify import check_site, require_as_good_as_eager
from tests.lift.rotary_models import Shape, decided_site

SIZES: dict[str, Any] = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
TOKENS = torch.randint(0, 50, (2, 19), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def llama() -> LlamaForCausalLM:
    """Four heads on two, pairs half a head apart."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=2)).eval()


def neox() -> GPTNeoXForCausalLM:
    """Half of the channels are rotated."""
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=64, rotary_pct=0.5)).eval()


def gptj() -> GPTJForCausalLM:
    """Pairs of neighbours, half of the channels."""
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=50, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, bos_token_id=0, eos_token_id=1
    )
    return GPTJForCausalLM(config).eval()


MODELS = {"llama": (llama, "half", 16), "neox": (neox, "half", 8), "gptj": (gptj, "interleaved", 8)}


def compiled(model: torch.nn.Module, passes: str) -> Any:
    return torch.compile(model, backend=attncompile, options={"passes": passes, "rest": "eager"})


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_the_same(name: str) -> None:
    model = MODELS[name][0]()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        wanted = model(TOKENS, use_cache=False).logits
        torch.testing.assert_close(compiled(model, "fuse.rotary")(TOKENS, use_cache=False).logits, wanted)


@pytest.mark.parametrize(
    "name, form", (("llama", "quantize.int8"), ("neox", "quantize.fp8"), ("gptj", "quantize.int8"))
)
def test_rounding_behind_the_map_is_rounding_after_it(name: str, form: str) -> None:
    """The same codes, whether the graph rotates or the Spec does: both in float32, on the same tables."""
    model = MODELS[name][0]()
    with torch.no_grad():
        wanted = compiled(model, form)(TOKENS, use_cache=False).logits
        torch._dynamo.reset()
        run = compiled(model, f"fuse.rotary, {form}")
        found = run(TOKENS, use_cache=False).logits
    said = str(explain(run))
    # one text for all layers: q and k, before and after the passes
    assert said.count("position  ") == 4 and said.count("pass fuse.rotary") == 1
    # codes are equal but for those whose number lies at an edge: far less than what rounding itself moves
    exact = model(TOKENS, use_cache=False).logits
    assert (found - wanted).abs().max() <= 0.2 * (wanted - exact).abs().max()


def test_keys_of_a_cache_are_rotated_outside() -> None:
    model = llama()
    with torch.no_grad():
        run = compiled(model, "fuse.rotary")
        found = run(TOKENS, use_cache=True)
        wanted = model(TOKENS, use_cache=True)
    torch.testing.assert_close(found.logits, wanted.logits)
    for mine, plain in zip(found.past_key_values.layers, wanted.past_key_values.layers, strict=True):
        torch.testing.assert_close(mine.keys, plain.keys)
    said = str(explain(run))
    assert "position  q[" in said and "position  k[" not in said and "k: " in said and "stays outside" in said


def test_a_site_beyond_its_budget_keeps_its_maps() -> None:
    """Exact passes alone are run on the site as it was lifted, so that none finds its own work done already."""
    model = llama()
    options = {"passes": "fuse.rotary, quantize.int8", "rest": "eager", "budget": 1e-9}
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = torch.compile(model, backend=attncompile, options=options)
        torch.testing.assert_close(run(TOKENS, use_cache=False).logits, model(TOKENS, use_cache=False).logits)
    complaints = [str(each.message) for each in said if isinstance(each.message, FallbackWarning)]
    assert len(complaints) == 1 and "budget" in complaints[0]
    text = str(explain(run))
    assert "pass fuse.rotary" in text and "quantize" not in text and "position  k[" in text


def test_gradients_go_through_the_map() -> None:
    model = llama().train()
    double = copy.deepcopy(model).double()
    exact, plain, mine = (
        gradients(run, of) for run, of in ((double, double), (model, model), (compiled(model, "fuse.rotary"), model))
    )
    for name, gradient in mine.items():
        length = TOKENS.numel() * model.get_parameter(name).shape[-1]
        require_as_good_as_eager(gradient, exact[name], plain[name], length, f"the gradient of {name}")


def gradients(run: Any, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    run(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.gpu
@pytest.mark.parametrize("padded", (False, True))
def test_a_model_on_a_gpu(padded: bool) -> None:
    """Rotated where it is rounded, a model is as near to its float64 self as when its graph rotates."""
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 512, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=256, num_key_value_heads=2)).cuda().eval()
    ids = torch.randint(0, 50, (2, 300), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, : 90 if padded else 0] = 0
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    shown = mask.bool()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(**given).logits[shown]
        narrow = model.to(torch.bfloat16)
        errors = {}
        for passes in ("quantize.int8", "fuse.rotary, quantize.int8"):
            torch._dynamo.reset()
            run = compiled(narrow, passes)
            errors[passes] = float((run(**given).logits[shown].double() - exact).norm())
            assert ("position  k[" in str(explain(run))) == ("rotary" in passes)
    assert errors["fuse.rotary, quantize.int8"] <= 1.5 * errors["quantize.int8"]


def test_a_lowering_without_a_place_for_maps_gets_rotated_tensors() -> None:
    spec = decided_site(Shape(rotated=6), "fuse.rotary").spec
    assert spec is not None
    inner = without_positions(spec)
    seen: list[tuple[torch.Size, ...]] = []

    def make(*tensors: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(tensor.shape for tensor in tensors))
        return tensors[0]

    rest = choose_lowering(inner, "cpu")
    whole = rotating_first(spec, Lowering("test", "test", "it is asked for", None, rest.run, SharedLists("", (), make)))
    assert check_site("site", spec, whole.run, operator="test").passed
    tensors = random_tensors(spec, {"B": 2, "I": 5})
    best = rest.run(*rotated_tensors(spec, tensors).values())
    torch.testing.assert_close(whole.run(*tensors.values()), best)
    assert whole.lists is not None
    whole.lists.make(*tensors.values())
    assert seen == [tuple(tensor.shape for tensor in rotated_tensors(spec, tensors).values())]


def test_a_spec_says_that_maps_alone_have_no_kernel() -> None:
    spec: Spec | None = decided_site(Shape(), "fuse.rotary").spec
    assert spec is not None and "nothing is rounded" in (why_not_spec(spec) or "")
