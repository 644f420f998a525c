"""Weights of a tensor type of its own, such as torchao's: calls with them are kept whole, attention is rewritten."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass

import attncompile
from attncompile.backend import FallbackWarning
from attncompile.frontends.torch_internals import is_wrapped
from attncompile.verify import derive_tolerance, require_within
from tests.backend.test_backend import masked_gradients, small_llama, tokens


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Rounded(torch.Tensor):
    """A matrix as integers of 8 bits with a scale for each row; operations get the numbers that they stand for."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Rounded:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, codes.shape, strides=codes.stride(), dtype=scale.dtype, device=codes.device
        )

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.codes, self.scale = codes, scale

    def plain(self) -> torch.Tensor:
        return self.codes.to(self.scale.dtype) * self.scale

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Rounded(shape={tuple(self.shape)})"  # torch's own computes, which a fake tensor cannot

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], context: None, size: Any, stride: Any) -> Rounded:
        return cls(inner["codes"], inner["scale"])

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.detach, torch.ops.aten.t, torch.ops.aten.clone):
            return cls(func(args[0].codes), func(args[0].scale))
        return func(*(one.plain() if isinstance(one, cls) else one for one in args), **(kwargs or {}))


def rounded(weight: torch.Tensor) -> Rounded:
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    return Rounded((weight.detach() / scale).round().to(torch.int8), scale)


def with_rounded_weights(model: Any) -> tuple[Any, Any]:
    """The model with rounded weights in all its linear layers, and in float64 with the numbers that they stand for."""
    wide = copy.deepcopy(model)
    wide.set_attn_implementation("sdpa")  # a row of padding is NaN in transformers' own attention in float64
    for layer, beside in zip(model.modules(), wide.modules(), strict=True):
        if isinstance(layer, nn.Linear):
            weight = rounded(layer.weight)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            beside.weight = nn.Parameter(weight.plain(), requires_grad=False)
    return model, wide.double()


def require_served(compiled: Callable[..., Any], count: int) -> None:
    """That every site runs in an operator."""
    operators = [site.operator for site in attncompile.explain(compiled).sites]
    assert operators and len(operators) % count == 0 and "original" not in operators


INDUCTOR = [("eager", "eager"), ("eager", "sdpa"), pytest.param("inductor", "sdpa", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("rest", "attention"), INDUCTOR)
def test_a_model_with_rounded_weights(rest: str, attention: str) -> None:
    model, wide = with_rounded_weights(small_llama(attention))
    compiled = attncompile.compile(model, dynamic=True, rest=rest)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for length in (9, 14):
            call = tokens(2, length)
            kept = call["attention_mask"].bool()
            exact, plain, found = (run(**call).logits[kept] for run in (wide, model, compiled))
            require_within(found, exact, derive_tolerance(exact, plain, 64).bound, "logits")
    require_served(compiled, 2)


@pytest.mark.parametrize("rest", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_what_is_not_rounded_trains(rest: str) -> None:
    model, wide = with_rounded_weights(small_llama().train())
    call = tokens(2, 9, "right")
    compiled = attncompile.compile(model, rest=rest)
    found, plain, exact = (
        masked_gradients(run, of, call) for run, of in ((compiled, model), (model, model), (wide, wide))
    )
    assert found and found.keys() == plain.keys() == exact.keys()
    for name, reference in exact.items():
        bound = derive_tolerance(reference, plain[name], call["input_ids"].numel()).bound
        require_within(found[name], reference, bound, name)
    require_served(compiled, 2)


class Turned(nn.Module):
    """Attention that turns its rounded weight itself, and has one call for query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(rounded(torch.randn(48, 16)), requires_grad=False)

    def forward(self, x: torch.Tensor, returns: str = "") -> Any:
        turned = self.weight.t()
        query, key, value = (x @ turned).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        out = torch.softmax(query @ key.mT / 8**0.5, -1) @ value + (x @ turned).sum()
        return (out, turned) if returns else out


@pytest.mark.parametrize("rest", ["eager", "inductor"])
def test_a_weight_that_is_turned_first(rest: str) -> None:
    model = Turned()
    wide = copy.deepcopy(model)
    wide.weight = nn.Parameter(model.weight.plain().double(), requires_grad=False)  # type: ignore[attr-defined]
    compiled = attncompile.compile(model, rest=rest)
    x = torch.randn(2, 7, 16)
    with torch.no_grad():
        exact, plain, found = wide(x.double()), model(x), compiled(x)
    require_within(found, exact, derive_tolerance(exact, plain, x[0].numel()).bound, "output")
    require_served(compiled, 1)


def test_what_cannot_be_kept_whole_is_said() -> None:
    model, x = Turned(), torch.randn(2, 7, 16)
    compiled = attncompile.compile(model, rest="eager")
    with torch.no_grad(), pytest.warns(FallbackWarning, match="it returns .* of type Rounded"):
        found, turned = compiled(x, "weight")
    with torch.no_grad():
        assert torch.equal(found, model(x))
    assert isinstance(turned, Rounded)


def test_attention_of_tensors_of_another_type_is_said() -> None:
    def attend(key: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(key.plain()[None], key, key)  # type: ignore[attr-defined]

    key = rounded(torch.randn(5, 8))
    compiled = attncompile.compile(attend, rest="eager")
    with torch.no_grad(), pytest.warns(FallbackWarning, match="a type of tensor that holds others says what it does"):
        found = compiled(key)
    assert torch.equal(found, attend(key))


# --- torchao, where it is installed ---------------------------------------------------------------------------------

STEP = 1 / 127
"""What a number of 8 bits that stands for the largest is rounded by, relative to it."""


def int4(quantization: Any) -> Any:
    """Weights of 4 bits, a scale for each 16 of them."""
    granularity = pytest.importorskip("torchao.quantization.granularity")
    return quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity.PerGroup(16))


QUANTISED: dict[str, tuple[Callable[[Any], Any], float]] = {
    "int8 weights": (lambda q: q.Int8WeightOnlyConfig(), torch.finfo(torch.float32).eps),
    "int4 weights": (int4, torch.finfo(torch.float32).eps),
    "int8 weights and inputs": (lambda q: q.Int8DynamicActivationInt8WeightConfig(), STEP),
}
"""How linear layers are quantised, and what they round their inputs by."""


class Seen(CustomGraphPass):
    """A pass of somebody else's, which remembers that it ran."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.graphs += 1

    def uuid(self) -> str:
        return "seen"


@pytest.mark.parametrize("rest", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", QUANTISED)
def test_weights_of_torchao(name: str, rest: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    config, step = QUANTISED[name]
    model = small_llama()
    quantization.quantize_(model, config(quantization))
    wide = small_llama()
    for layer, beside in zip(model.modules(), wide.modules(), strict=True):
        if isinstance(layer, nn.Linear) and is_wrapped(layer.weight):
            weight = getattr(layer.weight, "original_weight_tensor", layer.weight)
            beside.weight = nn.Parameter(weight.dequantize())  # type: ignore[operator]
    assert not torch.equal(wide.lm_head.weight, small_llama().lm_head.weight)
    wide = wide.double()
    compiled = attncompile.compile(model, dynamic=True, rest=rest)
    others = {"post_grad_custom_pre_pass": Seen(), "post_grad_custom_post_pass": Seen()}
    call = tokens(2, 9)
    kept = call["attention_mask"].bool()
    with torch.no_grad(), warnings.catch_warnings(), inductor.patch(fx_graph_cache=False, **others):
        warnings.simplefilter("error", FallbackWarning)
        exact, plain, found = (run(**call).logits[kept] for run in (wide, model, compiled))
        assert all(getattr(inductor, place) is own for place, own in others.items())
    error = derive_tolerance(exact, plain, 64)
    require_within(found, exact, dataclasses.replace(error, eps=step).bound, "logits")
    require_served(compiled, 2)
    assert rest == "eager" or all(own.graphs for own in others.values())
