"""One training step of architectures of every kind: the compiled model's gradients are those of the model itself."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
import transformers

import attncompile
from attncompile.verify.tolerance import Tolerance, largest
from benchmarks.coverage import read_table
from benchmarks.zoo.build import build

TABLE = read_table()
RATE = 0.1
"""Learning rate of the step."""

Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Architecture:
    """A model type that is trained.

    Attributes:
        kind: transformers' name for it.
        head: which of transformers' Auto classes makes it; empty is a model that gives a loss by itself.
        kept: what the reason says of sites that keep their original computation on a CPU; empty where none does.
        observed: whether their weights leave the graph.
        graphs: how many graphs with attention Dynamo makes, where it breaks around each layer and equal layers share
            one; 0 where one graph has all of them.
        quick: whether its test is among those that always run.
    """

    kind: str
    head: str
    kept: str = ""
    observed: bool = False
    graphs: int = 0
    quick: bool = False


LANGUAGE, MASKED, TRANSLATION = "ForCausalLM", "ForMaskedLM", "ForSeq2SeqLM"
PICTURE, SPEECH, SOUND = "ForImageClassification", "ForSpeechSeq2Seq", "ForAudioClassification"
BESIDE = "scaled_dot_product_attention has no place for"

ARCHITECTURES = (
    Architecture("llama", LANGUAGE, quick=True),  # grouped heads
    Architecture("gpt2", LANGUAGE),
    Architecture("gpt_oss", LANGUAGE, f"{BESIDE} the sink", quick=True),
    Architecture("gemma2", LANGUAGE, f"{BESIDE} a score that is not linear", quick=True),  # softcap, windows
    Architecture("mistral", LANGUAGE),  # windows
    Architecture("bloom", LANGUAGE, quick=True),  # ALiBi, and a function with a gradient of its own
    Architecture("mpt", LANGUAGE),  # ALiBi
    Architecture("falcon", LANGUAGE),
    Architecture("deepseek_v3", LANGUAGE),  # latent attention
    Architecture("qwen3", LANGUAGE),
    Architecture("phi3", LANGUAGE),
    Architecture("olmo2", LANGUAGE),
    Architecture("cohere2", LANGUAGE),
    Architecture("gptj", LANGUAGE),
    Architecture("bert", MASKED),
    Architecture("roberta", MASKED),
    Architecture("albert", MASKED),  # one layer's weights, used twice
    Architecture("modernbert", MASKED),  # local and global layers
    Architecture("deberta-v2", MASKED),  # relative positions in the score
    Architecture("esm", MASKED),
    Architecture("t5", TRANSLATION, quick=True),  # a learned relative bias that layers share
    Architecture("bart", TRANSLATION),
    Architecture("marian", TRANSLATION),
    Architecture("whisper", SPEECH),
    Architecture("audio-spectrogram-transformer", SOUND),
    # leaves out layers at random when it is trained, so Dynamo breaks around each, and the weights leave the graph
    Architecture("wav2vec2", SOUND, "is needed outside", observed=True, graphs=1),
    Architecture("vit", PICTURE),
    Architecture("dinov2", PICTURE),
    Architecture("beit", PICTURE, quick=True),  # a table of relative positions
    Architecture("swin", PICTURE),  # shifted windows with a table
    Architecture("clip", ""),
    Architecture("siglip", ""),
)


def without_chance(config: Any) -> None:
    """No dropout, and nothing masked at random: two runs then compute the same."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            without_chance(value)
        elif isinstance(value, float) and ("drop" in name or (name.startswith("mask_") and name.endswith("_prob"))):
            setattr(config, name, 0.0)


def trainable(architecture: Architecture, attention: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A tiny model in training mode with eager attention, and the arguments of a call that gives a loss."""
    base, _, inputs = build(architecture.kind, "eager")
    config = copy.deepcopy(base.config)
    without_chance(config)
    torch.manual_seed(0)
    auto = getattr(transformers, f"AutoModel{architecture.head}", None) if architecture.head else None
    maker = auto.from_config if auto is not None else type(base)._from_config
    model = maker(config, attn_implementation=attention, dtype=torch.float32).train()
    if architecture.head in (LANGUAGE, MASKED):
        inputs["labels"] = inputs["input_ids"].clone()
    elif architecture.head in (TRANSLATION, SPEECH):
        inputs["labels"] = inputs["decoder_input_ids"].clone()
    elif architecture.head:
        inputs["labels"] = torch.tensor([0, 1])
    else:
        inputs["return_loss"] = True
    return model, inputs


def gradients(run: Callable[..., Any], model: torch.nn.Module, inputs: Mapping[str, Any]) -> Gradients:
    """Gradients of the loss by parameter, those that are not recorded left out."""
    model.zero_grad()
    run(**copy.deepcopy(dict(inputs))).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def widened(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same call in float64."""
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def bounds(
    model: torch.nn.Module, exact: Gradients, plain: list[Gradients], inputs: Mapping[str, Any]
) -> dict[str, float]:
    """How far each gradient may be from the exact one: as far as the model's own implementations are, and one sum more.

    The terms of all sums on the way there and back are counted together: a matrix is summed over on one side forward,
    on the other backward, and a gradient over all elements of the call. What a bias sums are the terms of its module's
    other gradients, which may cancel, so the scale is that of the module.
    """
    shapes = [parameter.shape for parameter in model.parameters() if parameter.dim() > 1]
    terms = sum(sum(shape) for shape in shapes) + max(
        value.numel() for value in inputs.values() if isinstance(value, torch.Tensor)
    )
    scales: dict[str, float] = {}
    for name, gradient in exact.items():
        module = name.rpartition(".")[0]
        scales[module] = max(scales.get(module, 0.0), largest(gradient))
    return {
        name: Tolerance(
            eager_error=max(largest(run[name].double() - gradient) for run in plain),
            length=terms,
            eps=torch.finfo(torch.float32).eps,
            scale=scales[name.rpartition(".")[0]],
        ).bound
        for name, gradient in exact.items()
    }


def check(architecture: Architecture, rest: Literal["eager", "inductor"]) -> None:
    torch._dynamo.reset()
    model, inputs = trainable(architecture, "eager")
    wide = copy.deepcopy(model).double()
    exact = gradients(wide, wide, widened(inputs))
    plain = [gradients(model, model, inputs)]
    try:
        other, _ = trainable(architecture, "sdpa")
        other.load_state_dict(model.state_dict())
        plain.append(gradients(other, other, inputs))
    except ValueError:  # this model has no other implementation
        pass
    compiled = attncompile.compile(model, rest=rest)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = gradients(compiled, model, inputs)

    sites = attncompile.explain(compiled).sites
    assert len(sites) == (architecture.graphs or TABLE[architecture.kind]["eager"])
    for site in sites:
        assert site.status == ("observed" if architecture.observed else "lifted"), (site.name, site.reason)
        assert (site.operator == "original") == bool(architecture.kept), (site.name, site.operator, site.reason)
        assert architecture.kept in site.reason
    assert found.keys() == exact.keys()
    for name, bound in bounds(model, exact, plain, inputs).items():
        error = largest(found[name].double() - exact[name])
        assert error <= bound and found[name].isfinite().all(), (name, error, bound)

    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name in found:
            torch.testing.assert_close(parameter, before[name] - RATE * found[name])


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, id=a.kind, marks=() if a.quick else pytest.mark.slow) for a in ARCHITECTURES],
)
def test_a_step_takes_the_models_own_gradients(architecture: Architecture) -> None:
    check(architecture, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "bloom", "bert", "t5", "vit"])
def test_a_step_through_inductor_takes_the_models_own_gradients(kind: str) -> None:
    check(next(architecture for architecture in ARCHITECTURES if architecture.kind == kind), "inductor")
