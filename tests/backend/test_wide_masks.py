"""Numbers that are added to scores in a wider type than the operands' keep their digits, and stay finite.

A model of 16 bits with a bias in float32, and one under autocast, whose products round their operands and whose sums do
not. What autocast rounds itself, the mask that is given to a call of torch's own, is rounded as the model does it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import attncompile
from attncompile.backend import FallbackWarning
from attncompile.verify import derive_tolerance, require_within

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

ROWS, HEADS, LENGTH, CHANNELS = 2, 3, 12, 8
SUM = LENGTH + CHANNELS
"""Terms of the sums on the way to an element."""


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def spelled_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    scores = query @ key.transpose(-1, -2) * CHANNELS**-0.5 + added
    return torch.softmax(scores, dim=-1).to(value.dtype) @ value


def one_call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(query, key, value, attn_mask=added)


def several_layers(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """The mask is made once for all of them; a row that sees nothing reaches the others through the second."""
    state = spelled_out(query, key, value, added)
    return spelled_out(state, state, state, added)


def large() -> torch.Tensor:
    """A bias whose differences 16 bits do not hold."""
    return 1000 + torch.randn(ROWS, 1, LENGTH, LENGTH)


def lowest() -> torch.Tensor:
    """A mask of the lowest float32, beyond what 16 bits hold, with rows that see no key."""
    added = torch.zeros(ROWS, 1, LENGTH, LENGTH)
    added[1, :, :, :4] = added[1, :, :4] = torch.finfo(torch.float32).min
    return added


def operands(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, HEADS, LENGTH, CHANNELS)
    return [torch.randn(shape, generator=generator).bfloat16().to(dtype) for _ in range(3)]


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)],
    ids=["bfloat16", "float16", "autocast"],
)
@pytest.mark.parametrize("added", [large, lowest])
@pytest.mark.parametrize("attention", [spelled_out, one_call, several_layers])
def test_what_is_added_keeps_its_type(
    attention: Attention, added: Callable[[], torch.Tensor], dtype: torch.dtype, autocast: bool
) -> None:
    mask = added()
    exact = attention(*operands(torch.float64), mask.double())
    compiled = attncompile.compile(attention, rest="eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        plain, found = (run(*operands(dtype), mask) for run in (attention, compiled))
    assert found.dtype == plain.dtype
    require_within(found, exact, derive_tolerance(exact, plain, SUM).bound, "result")
    sites = attncompile.explain(compiled).sites
    assert sites and all(site.operator == "sdpa" for site in sites)


@pytest.mark.parametrize("rest", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("added", [large, lowest])
def test_gradients_under_autocast(added: Callable[[], torch.Tensor], rest: str) -> None:
    mask = added()

    def of(run: Attention, dtype: torch.dtype, autocast: bool) -> list[torch.Tensor]:
        given = [operand.requires_grad_() for operand in operands(dtype)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            made = run(*given, mask.to(dtype))
        made.to(dtype).square().sum().backward()
        return [operand.grad for operand in given if operand.grad is not None]

    compiled = attncompile.compile(spelled_out, rest=rest)
    exact, plain = of(spelled_out, torch.float64, False), of(spelled_out, torch.float32, True)
    for found, wide, near in zip(of(compiled, torch.float32, True), exact, plain, strict=True):
        bound = derive_tolerance(wide, near.bfloat16(), SUM * ROWS).bound
        require_within(found, wide, bound, "gradient")
    assert all(site.operator != "original" for site in attncompile.explain(compiled).sites)
