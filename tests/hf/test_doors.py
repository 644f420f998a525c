"""Two doors, one Spec: what a call through the interface states, and what lifting finds in the model's graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import attncompile
import attncompile.hf
from attncompile.ir import Spec
from benchmarks.zoo.build import build
from tests.hf.doors import notations

SDPA, SPELLED_OUT = "sdpa", "eager"

DECODERS = [
    ("llama", SDPA),
    ("mistral", SDPA),
    ("gemma2", SPELLED_OUT),
    ("gpt_oss", SPELLED_OUT),
    ("qwen3", SDPA),
]
"""Model types, and the implementation of transformers whose graph is lifted: SDPA has no softcap and no sinks."""

QUICK = ["bert", "vit", "gpt2", "phi"]
OTHERS = [
    "bart",
    "clip",
    "cohere",
    "cohere2",
    "deepseek_v3",
    "dinov2",
    "distilbert",
    "electra",
    "gemma3_text",
    "gpt_neox",
    "granite",
    "llama4_text",
    "mixtral",
    "modernbert",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "roberta",
    "siglip",
    "smollm3",
    "stablelm",
    "starcoder2",
]


class Step(torch.nn.Module):
    """A decoder called with what a cache holds, as tensors."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        cache = DynamicCache()
        for number, (key, value) in enumerate(past):
            cache.update(key, value, number)
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache)
        return found.last_hidden_state


def stated(model: torch.nn.Module, *args: Any, **kwargs: Any) -> dict[str, Spec]:
    """The Specs of one call, by layer."""
    before = {site.name: [] for site in attncompile.hf.explain(model).sites}
    with torch.no_grad():
        model(*args, **kwargs)
    found: dict[str, list[Spec]] = before
    for site in attncompile.hf.explain(model).sites:
        assert site.spec is not None, site
        found.setdefault(site.name, []).append(site.spec)
    return {name: specs[-1] for name, specs in found.items()}


def lifted(model: torch.nn.Module, *args: Any, **kwargs: Any) -> dict[str, Spec]:
    """The Specs of a graph, by layer."""
    found: dict[str, Spec] = {}
    for site in attncompile.lift(model, args, kwargs).sites:
        assert site.spec is not None, site.refusal
        found.setdefault(site.name, site.spec)
    return found


def require_same(one: dict[str, Spec], other: dict[str, Spec], *, spelled_out: bool) -> None:
    """Every stated layer is the lifted one; a name in the graph may go on behind that of the layer."""
    assert one
    for name, spec in one.items():
        beside = [other[found] for found in other if found == name or found.startswith(f"{name}.")]
        assert beside, f"{name} is not among {list(other)}"
        mine, theirs = notations(spec, beside[0], spelled_out=spelled_out)
        assert mine == theirs, name


CALLS = [(new, padded) for new in (20, 3, 1) for padded in (True, False)]
"""Numbers of new tokens (20 without a past, fewer behind 17), and whether rows are padded."""


@pytest.mark.parametrize(
    ("kind", "how", "new", "padded"),
    [
        pytest.param(kind, how, *call, marks=() if kind == "llama" or call == (3, True) else pytest.mark.slow)
        for kind, how in DECODERS
        for call in CALLS
    ],
)
def test_prefill_and_decode(kind: str, how: str, new: int, padded: bool) -> None:
    ours, theirs = build(kind, "attncompile")[0], build(kind, how)[0]  # type: ignore[arg-type]
    config = theirs.config
    past = []
    if new < 20:
        heads, width = config.num_key_value_heads, config.head_dim
        past = [(torch.randn(2, heads, 17, width), torch.randn(2, heads, 17, width)) for _ in theirs.layers]
    ids = torch.randint(5, 90, (2, new))
    mask = torch.ones(2, new + (17 if past else 0), dtype=torch.int64)
    mask[1, :4] = 0
    call = (ids, mask if padded else None, past)
    attncompile.hf.forget()
    require_same(stated(Step(ours), *call), lifted(Step(theirs), *call), spelled_out=how == SPELLED_OUT)


@pytest.mark.parametrize("kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)])
def test_one_forward_pass(kind: str) -> None:
    ours, _, inputs = build(kind, "attncompile")  # type: ignore[arg-type]
    theirs = build(kind, "sdpa")[0]
    attncompile.hf.forget()
    require_same(stated(ours, **inputs), lifted(theirs, **inputs), spelled_out=False)


def test_a_scale_that_the_model_applies_itself_stays_with_its_queries() -> None:
    """Whisper multiplies the queries before the call; the graph shows where, the call does not."""
    ours, _, inputs = build("whisper", "attncompile")  # type: ignore[arg-type]
    theirs = build("whisper", "sdpa")[0]
    attncompile.hf.forget()
    one, other = stated(ours, **inputs), lifted(theirs, **inputs)
    assert len(one) == len(other) == 6
    # what a traced decoder without a cache asks of its positions (packed sequences?) is answered before the call
    for name, spec in ((name, spec) for name, spec in one.items() if "encoder." in name or "encoder_attn" in name):
        mine, their = notations(spec, other[name])
        assert "\nscore: s\n" in mine and mine.replace("score: s", "score: 0.25·s") == their
