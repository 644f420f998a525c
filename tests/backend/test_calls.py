"""Valid and invalid calls of compiled models, drawn at random: the results, or the error, of the model as it is."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import attncompile
import attncompile.hf
from attncompile.verify import derive_tolerance, require_within
from tests.backend.test_generation import require_rewritten, small


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@dataclass(frozen=True)
class Call:
    """A call of a decoder.

    Attributes:
        batch, length: of the token ids; either may be 0.
        mask: the mask of padding: none, all ones, left or right padding, a row of zeros, holes, or one of a wrong
            length.
        dtype: of the mask.
        cache: none, a dynamic one, or a static one with room for so many tokens.
        weights: ``nan`` puts a NaN among the projections of the keys.
        kind: of the decoder; two of them have a window, one a score that is not linear.
        model: dtype of the decoder.
    """

    batch: int
    length: int
    mask: str
    dtype: torch.dtype
    cache: str | int
    weights: str
    kind: str
    model: torch.dtype


MASKS = ("none", "ones", "left", "right", "empty row", "holes", "too long", "too short")
LONGEST_SUM = 64
"""Terms of the longest sum in the model: the inner channels of its perceptrons."""

ALL_CHECKS = list(hypothesis.HealthCheck)

CALLS = st.builds(
    Call,
    batch=st.integers(0, 3),
    length=st.integers(0, 9),
    mask=st.sampled_from(MASKS),
    dtype=st.sampled_from([torch.int64, torch.bool, torch.float32]),
    cache=st.sampled_from(["none", "none", "dynamic", 4, 12]),
    weights=st.sampled_from(["plain", "plain", "plain", "nan"]),
    kind=st.sampled_from(["llama", "mistral", "gemma2"]),
    model=st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)


def mask_of(call: Call) -> torch.Tensor | None:
    if call.mask == "none":
        return None
    length = call.length + {"too long": 2, "too short": -1}.get(call.mask, 0)
    mask = torch.ones(call.batch, max(length, 0), dtype=torch.int64)
    if call.mask == "left":
        mask[-1:, : length // 2] = 0
    elif call.mask == "right":
        mask[-1:, length // 2 :] = 0
    elif call.mask == "empty row":
        mask[:1] = 0
    elif call.mask == "holes":
        mask[:, 1::3] = 0
    return mask.to(call.dtype)


class InFloat64(TorchFunctionMode):
    """What a model computes in float32 whatever its dtype, in float64: norms, and the softmax of transformers' own
    attention, where the lowest float64 of a mask becomes −∞, and a row of padding NaN.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if given.get("dtype") is torch.float32:
            given["dtype"] = torch.float64
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*(torch.float64 if value is torch.float32 else value for value in args), **given)


def outcome(model: Any, forward: Any, call: Call) -> torch.Tensor | str:
    """The logits, or that there was an error: of which type depends on whether Dynamo or the model met it first."""
    generator = torch.Generator().manual_seed(call.length)
    ids = torch.randint(3, 99, (call.batch, call.length), generator=generator)
    cache: Any = None
    if call.cache == "dynamic":
        cache = DynamicCache(config=model.config)
    elif isinstance(call.cache, int):
        cache = StaticCache(model.config, max_cache_len=call.cache)
    try:
        with torch.no_grad():
            found = forward(input_ids=ids, attention_mask=mask_of(call), past_key_values=cache)
        return found.logits  # type: ignore[no-any-return]
    except Exception:
        return "an error"


def compared(
    call: Call,
    door: str,
    rows: torch.Tensor | None,
    found: torch.Tensor | str,
    expected: torch.Tensor | str,
    exact: Any,
) -> None:
    """Require an error where there was one, else as small an error against float64 as the model's own."""
    if isinstance(found, str) or isinstance(expected, str):
        same = isinstance(found, str) and isinstance(expected, str)
        assert same, f"{call} through {door}: {found} instead of {expected}"
        return
    if rows is not None and rows.shape == found.shape[:2]:
        # a row of padding sees no key or, where it sees itself, nobody reads it
        found, expected, exact = found[rows], expected[rows], exact[rows]
    # what the model itself makes NaN is its own behaviour: in float64 transformers' softmax in float32 makes −∞ of the
    # lowest number, which hides all of a row of padding, and the next layer's products spread what comes of that
    seen = expected.isfinite()
    if call.weights == "nan":
        # whether a NaN is seen differs between PyTorch's own kernels; a number that both give has to be the same one
        seen &= found.isfinite() & exact.isfinite()
    found, expected, exact = found[seen], expected[seen], exact[seen]
    if found.numel():
        # the softmax that this decoder spells out is in float32 whatever its dtype
        spelt_out = call.kind == "gemma2" and call.model is torch.float64
        rounded = expected.float() if spelt_out else expected
        require_within(found, exact, derive_tolerance(exact, rounded, LONGEST_SUM).bound, f"{call} through {door}")


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=ALL_CHECKS)
@hypothesis.given(call=CALLS)
def test_any_call_gives_what_the_model_gives(call: Call) -> None:
    check(call)


def test_a_padded_row_of_a_model_that_spells_out_its_attention() -> None:
    check(Call(2, 2, "left", torch.int64, "none", "plain", "gemma2", torch.float32))


def test_a_softmax_in_float32_of_a_model_in_float64() -> None:
    check(Call(2, 4, "none", torch.int64, "none", "plain", "gemma2", torch.float64))


def test_a_padded_row_that_the_model_itself_makes_nan() -> None:
    check(Call(1, 5, "left", torch.int64, "none", "plain", "gemma2", torch.float64))


@pytest.mark.parametrize("length", (1, 4))
def test_a_mask_that_hides_the_last_token_of_a_model_that_spells_out_its_attention(length: int) -> None:
    """Of one token nothing is left to see: zeros here, the mean of the values there."""
    check(Call(1, length, "too short", torch.int64, "none", "plain", "gemma2", torch.float32))


@pytest.mark.slow
@hypothesis.settings(max_examples=300, deadline=None, suppress_health_check=ALL_CHECKS)
@hypothesis.given(call=CALLS)
def test_very_many_calls_give_what_the_model_gives(call: Call) -> None:
    check(call)


def check(call: Call) -> None:
    """The call through both doors: the compiled model, and the model loaded with our attention."""
    torch._dynamo.reset()
    usual = "eager" if call.kind == "gemma2" else "sdpa"
    model, loaded = decoder(call, usual), decoder(call, "attncompile")
    expected = outcome(model, model.forward, call)
    run = attncompile.compile(model.forward, dynamic=True, rest="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {
            "torch.compile": outcome(model, run, call),
            "attn_implementation": outcome(loaded, loaded.forward, call),
        }
    logits = found["torch.compile"]
    if isinstance(logits, torch.Tensor) and logits.numel():  # what gives the model's numbers is not the model itself
        assert attncompile.explain(run).sites, call
        if call.mask != "too short":  # a mask that shows nothing of one token is kept, and told
            require_rewritten(run)
    model = model.double()
    with InFloat64():
        exact = outcome(model, model.forward, call)
    for door, result in found.items():
        compared(call, door, read_rows(call), result, expected, exact)


def read_rows(call: Call) -> torch.Tensor | None:
    """Which rows of the logits count, by batch row and token: none of padding, and none before the first token that a
    mask shows that ends before the tokens do, which hides those behind its end.
    """
    mask = mask_of(call)
    if mask is None or mask.shape[1] >= call.length:
        return None if mask is None else mask.bool()
    return torch.nn.functional.pad(mask.bool(), (0, call.length - mask.shape[1])).cumsum(-1) > 0


def decoder(call: Call, attention: str) -> Any:
    """The decoder of a call, always with the same weights."""
    model = small(call.kind, attention).to(call.model)
    if call.weights == "nan":
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight[0, 0] = torch.nan
    return model


PLAIN = Call(2, 5, "none", torch.int64, "none", "plain", "llama", torch.float32)


@pytest.mark.parametrize("kind", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "change",
    [
        {"length": 0},
        {"length": 0, "mask": "ones", "cache": "dynamic"},
        {"batch": 0},
        {"batch": 0, "mask": "left"},
        {"batch": 1, "mask": "empty row"},
        {"mask": "empty row"},
        {"batch": 1, "mask": "empty row", "cache": 12, "dtype": torch.bool},
        {"length": 9, "cache": 4},
        {"length": 9, "cache": 4, "mask": "left"},
        {"weights": "nan"},
        {"weights": "nan", "mask": "left"},
        {"mask": "too short"},
        {"mask": "too long", "cache": "dynamic"},
    ],
    ids=str,
)
def test_bad_input_by_name(change: dict[str, Any], kind: str) -> None:
    check(dataclasses.replace(PLAIN, kind=kind, **change))


# --- what PyTorch itself does not compute -------------------------------------------------------------------


def spelled_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.softmax(query @ key.mT, dim=-1) @ value


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("attention", [spelled_out, torch.nn.functional.scaled_dot_product_attention])
def test_a_dtype_that_the_model_refuses_is_refused(attention: Any, dtype: torch.dtype) -> None:
    operands = [torch.randn(1, 2, 5, 8).to(dtype) for _ in range(3)]

    def run(*given: torch.Tensor) -> Any:
        return attention(*given)

    with pytest.raises(RuntimeError):
        run(*operands)
    with pytest.raises(RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attncompile.compile(run, rest="eager")(*operands)


def test_a_device_without_memory_gives_what_the_model_gives() -> None:
    operands = [torch.randn(1, 2, 5, 8, device="meta") for _ in range(3)]
    with pytest.warns(attncompile.backend.FallbackWarning, match="device 'meta' is not supported"):
        found = attncompile.compile(spelled_out, rest="eager")(*operands)
    assert (found.device.type, found.shape) == ("meta", (1, 2, 5, 8))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_a_dtype_that_sdpa_refuses_is_refused_by_the_interface(dtype: torch.dtype) -> None:
    """With SDPA's own error."""
    operands = [torch.randn(1, 2, 5, 8).to(dtype) for _ in range(3)]
    layer = small("llama").model.layers[0].self_attn
    with pytest.raises(RuntimeError) as wanted:
        sdpa_attention_forward(layer, *operands, None)
    with pytest.raises(RuntimeError) as found, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attncompile.hf.attention_forward(layer, *operands, None)
    assert str(found.value) == str(wanted.value)


def test_a_model_without_memory_gives_what_the_model_gives() -> None:
    loaded = small("llama", "attncompile").to("meta")
    ids = torch.ones(2, 5, dtype=torch.int64, device="meta")
    with pytest.warns(attncompile.backend.FallbackWarning, match="device meta is not supported"):
        found = loaded(input_ids=ids).logits
    assert (found.device.type, found.shape) == ("meta", (2, 5, 99))
