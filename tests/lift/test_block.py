"""What surrounds a site is read off its graph: tiny modules, one for each thing that models put around attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from attncompile.frontends.aten import aten_graph
from attncompile.frontends.capture import capture_export
from attncompile.ir import Position, Project
from attncompile.lift import Program, Site, lift_graph
from attncompile.lift.frequencies import Frequencies, classify_frequencies
from attncompile.lift.render import render_site
from attncompile.lift.step import Step, as_data

HEADS, CHANNELS, LENGTH, PAST = 4, 8, 7, 5
WIDTH = 40


def heads(x: torch.Tensor, count: int = HEADS) -> torch.Tensor:
    return x.view(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
    return (weights @ v).transpose(1, 2).flatten(2)


class RootMeanSquare(nn.Module):
    """RMSNorm spelled as transformers does."""

    def __init__(self, channels: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)).to(x.dtype)


class OneMore(RootMeanSquare):
    """RMSNorm with a weight that counts from one (Gemma)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.epsilon) * (1.0 + self.weight)


class Euclidean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(x, dim=-1)


def angles(length: int, frequencies: torch.Tensor, pairs: str, size: float) -> tuple[torch.Tensor, torch.Tensor]:
    found = torch.arange(length)[:, None] * frequencies
    both = torch.cat([found, found], -1) if pairs == "half" else found.repeat_interleave(2, -1)
    return both.cos() * size, both.sin() * size


def turned(x: torch.Tensor, pairs: str) -> torch.Tensor:
    if pairs == "half":
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)
    return torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)


class Block(nn.Module):
    """Attention with its surroundings; everything but the plain linear maps is optional."""

    def __init__(
        self,
        norm: Callable[[int], nn.Module] | None = None,
        norm_first: bool = True,
        over_all_heads: bool = False,
        pairs: str = "",
        frequencies: torch.Tensor | None = None,
        size: float = 1.0,
        rotated: int = CHANNELS,
        packed: bool = False,
        rank: int = 0,
        gate: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        inner = HEADS * CHANNELS
        self.packed, self.over_all_heads, self.norm_first = packed, over_all_heads, norm_first
        self.pairs, self.size, self.rotated = pairs, size, rotated
        if packed:
            self.qkv = nn.Linear(WIDTH, 3 * inner, bias=bias)
        elif rank:
            self.q = nn.Sequential(nn.Linear(WIDTH, rank, bias=False), nn.Linear(rank, inner, bias=bias))
        else:
            self.q = nn.Linear(WIDTH, inner, bias=bias)
        if not packed:
            self.k, self.v = nn.Linear(WIDTH, inner, bias=bias), nn.Linear(WIDTH, inner, bias=bias)
        width = inner if over_all_heads else CHANNELS
        self.q_norm, self.k_norm = (norm(width), norm(width)) if norm else (None, None)
        default = 10000.0 ** (-torch.arange(0, rotated, 2) / rotated)
        self.register_buffer("frequencies", default if frequencies is None else frequencies)
        self.g = nn.Linear(WIDTH, inner) if gate else None
        self.o = nn.Linear(inner, WIDTH, bias=bias)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        if not self.pairs:
            return x
        cos, sin = angles(x.shape[2], self.frequencies, self.pairs, self.size)
        moved, rest = x[..., : self.rotated], x[..., self.rotated :]
        made = moved * cos + turned(moved, self.pairs) * sin
        return torch.cat([made, rest], -1) if rest.shape[-1] else made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1) if self.packed else (self.q(x), self.k(x), self.v(x))
        if self.q_norm is not None and self.over_all_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = heads(q), heads(k), heads(v)
        each = self.q_norm is not None and not self.over_all_heads
        if each and self.norm_first:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotate(q), self.rotate(k)
        if each and not self.norm_first:
            q, k = self.q_norm(q), self.k_norm(k)
        out = attend(q, k, v)
        if self.g is not None:
            out = out * torch.sigmoid(self.g(x))
        return self.o(out)


def lifted(module: nn.Module, *inputs: torch.Tensor) -> Site:
    torch.manual_seed(0)
    args = inputs or (torch.randn(2, LENGTH, WIDTH),)
    captured = capture_export(module.eval(), args, {})
    program: Program = lift_graph(aten_graph(captured), "tiny")
    (site,) = program.sites
    assert site.status == "lifted", site.refusal
    return site


def of(site: Site, operand: str, *kinds: str) -> list[Step]:
    return [step for step in site.steps if step.operand == operand and (not kinds or step.kind in kinds)]


def kinds(site: Site) -> dict[str, list[str]]:
    return {name: [step.kind for step in of(site, name)] for name in ("q", "k", "v", "out")}


def test_separate_projections_and_the_output_projection() -> None:
    site = lifted(Block(bias=True))
    assert kinds(site) == {"q": ["linear"], "k": ["linear"], "v": ["linear"], "out": ["linear"]}
    assert [(s.facts["kernel"], s.facts["bias"]) for s in site.steps] == [
        (f"{name}.weight", f"{name}.bias") for name in ("q", "k", "v", "o")
    ]
    assert (of(site, "q")[0].facts["inputs"], of(site, "q")[0].facts["outputs"]) == (WIDTH, HEADS * CHANNELS)
    assert [type(operation) for operation in site.block] == [Project] * 3


def test_a_packed_projection_says_which_outputs_are_read() -> None:
    site = lifted(Block(packed=True))
    (q,), (k,), (v,) = (of(site, name) for name in "qkv")
    assert {step.facts["kernel"] for step in (q, k, v)} == {"qkv.weight"}
    assert [step.facts["form"] for step in (q, k, v)] == ["packed"] * 3
    assert [step.facts["reads"] for step in (q, k, v)] == ["d + 8·h", "d + 8·h + 32", "d + 8·h + 64"]


def test_a_low_rank_projection() -> None:
    site = lifted(Block(rank=6))
    first, second = of(site, "q")
    assert (first.facts["outputs"], second.facts["inputs"]) == (6, 6)
    assert [step.facts["kernel"] for step in (first, second)] == ["q.0.weight", "q.1.weight"]


NORMS: dict[str, tuple[Callable[[int], nn.Module], str, float, int]] = {
    "rms": (RootMeanSquare, "rms", 1e-5, 1),
    "rms of torch": (lambda channels: nn.RMSNorm(channels, eps=1e-6), "rms", 1e-6, 1),
    "rms with one more": (OneMore, "rms", 1e-5, 1),
    "layer": (nn.LayerNorm, "layer", 1e-5, 2),
    "layer without weights": (lambda c: nn.LayerNorm(c, elementwise_affine=False, eps=1e-4), "layer", 1e-4, 0),
    "euclidean": (lambda channels: Euclidean(), "l2", 0.0, 0),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_queries_and_keys(name: str) -> None:
    norm, form, epsilon, weights = NORMS[name]
    site = lifted(Block(norm=norm))
    for operand in "qk":
        linear, found = of(site, operand)
        assert (linear.kind, found.kind) == ("linear", "norm")
        assert found.facts["form"] == form
        assert found.facts["epsilon"] == pytest.approx(epsilon, rel=0.02)
        assert (found.facts["channels"], found.facts["over"]) == (CHANNELS, "head")
        assert len(found.facts["weights"]) == weights
    assert kinds(site)["v"] == ["linear"]


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_norms_before_and_after_the_rotation(pairs: str, norm_first: bool) -> None:
    site = lifted(Block(norm=RootMeanSquare, pairs=pairs, norm_first=norm_first))
    order = ["linear", "norm", "rotary"] if norm_first else ["linear", "rotary", "norm"]
    assert kinds(site) == {"q": order, "k": order, "v": ["linear"], "out": ["linear"]}
    (rotary,) = of(site, "q", "rotary")
    assert (rotary.facts["convention"], rotary.facts["channels"]) == (pairs, CHANNELS)
    assert rotary.facts["base"] == 10000


def test_a_norm_over_all_heads() -> None:
    site = lifted(Block(norm=RootMeanSquare, over_all_heads=True, pairs="half"))
    (norm,) = of(site, "k", "norm")
    assert (norm.facts["channels"], norm.facts["over"]) == (HEADS * CHANNELS, "position")
    assert kinds(site)["q"] == ["linear", "norm", "rotary"]


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
def test_a_rotation_of_some_channels(pairs: str) -> None:
    site = lifted(Block(pairs=pairs, rotated=4))
    (rotary,) = of(site, "q", "rotary")
    assert (rotary.facts["channels"], rotary.facts["of"]) == (4, CHANNELS)
    assert "4 of 8 channels" in str(rotary)
    assert [type(operation) for operation in site.block] == [Position, Project, Position, Project, Project]


def test_scaled_frequencies_are_told_from_the_graph() -> None:
    plain = 500.0 ** (-torch.arange(0, CHANNELS, 2) / CHANNELS)
    site = lifted(Block(pairs="half", frequencies=plain / 4, size=1.2))
    (rotary,) = of(site, "q", "rotary")
    assert (rotary.facts["base"], rotary.facts["scaling"]) == (500, "linear")
    assert rotary.facts["factor"] == pytest.approx(4, rel=1e-3)
    assert rotary.facts["attention_factor"] == pytest.approx(1.2, rel=1e-4)


def exact(base: float, count: int = 32) -> torch.Tensor:
    return base ** (-torch.arange(count, dtype=torch.float64) / count)


def yarn(base: float, factor: float, low: int, high: int) -> torch.Tensor:
    ramp = ((torch.arange(32, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return exact(base) * ((1 - ramp) + ramp / factor)


def llama3(base: float, factor: float, original: int = 8192) -> torch.Tensor:
    """Llama 3.1: frequencies whose waves are longer than the trained length are divided."""
    turns = original * exact(base) / (2 * math.pi)
    smooth = ((turns - 1.0) / (4.0 - 1.0)).clamp(0, 1)
    return exact(base) * ((1 - smooth) / factor + smooth)


FREQUENCIES = {
    "plain": (exact(10000), Frequencies(10000)),
    "another base": (exact(1e6), Frequencies(1e6)),
    "linear": (exact(10000) / 8, Frequencies(10000, "linear", 8)),
    "yarn": (yarn(10000, 16, 8, 20), Frequencies(10000, "yarn", 16)),
    "llama3": (llama3(500000, 8), Frequencies(500000, "llama3", 8)),
    "longrope": (
        exact(10000) / torch.linspace(1.1, 40, 32, dtype=torch.float64) ** 2,
        Frequencies(None, "each channel"),
    ),
}


@pytest.mark.parametrize("name", FREQUENCIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_frequencies(name: str, dtype: torch.dtype) -> None:
    given, expected = FREQUENCIES[name]
    found = classify_frequencies(given.to(dtype))
    assert found is not None
    assert found.scaling == expected.scaling
    assert found.base == (expected.base and pytest.approx(expected.base, rel=1e-2))
    assert found.factor == pytest.approx(expected.factor, rel=1e-2)


def test_what_is_no_table_of_frequencies() -> None:
    assert classify_frequencies(torch.tensor([1.0])) is None
    assert classify_frequencies(torch.tensor([0.0, 1.0])) is None
    assert classify_frequencies(torch.tensor([0.5, 1.0, 2.0])) is None


class Cached(Block):
    """Keys and values of earlier steps before the new ones."""

    def forward(self, x: torch.Tensor, k_past: torch.Tensor, v_past: torch.Tensor) -> Any:
        q, k, v = heads(self.q(x)), self.rotate(heads(self.k(x))), heads(self.v(x))
        k, v = torch.cat([k_past, k], 2), torch.cat([v_past, v], 2)
        return self.o(attend(q, k, v)), k, v


def test_a_cache_that_grows() -> None:
    past = torch.randn(2, HEADS, PAST, CHANNELS)
    site = lifted(Cached(pairs="half"), torch.randn(2, LENGTH, WIDTH), past, past.clone())
    assert kinds(site) == {
        "q": ["linear"],
        "k": ["linear", "rotary", "cache"],
        "v": ["linear", "cache"],
        "out": ["linear"],
    }
    assert [of(site, name, "cache")[0].facts["past"] for name in "kv"] == ["k_past", "v_past"]


class Static(Block):
    """A cache of fixed size into which the new keys and values are written."""

    def forward(self, x: torch.Tensor, k_past: torch.Tensor, v_past: torch.Tensor, at: torch.Tensor) -> Any:
        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        k, v = k_past.index_copy(2, at, k), v_past.index_copy(2, at, v)
        seen = torch.arange(k.shape[2])[None, :] <= at[:, None]
        logits = (q @ k.transpose(-1, -2)).masked_fill(~seen, float("-inf"))
        return self.o((torch.softmax(logits, -1) @ v).transpose(1, 2).flatten(2)), k, v


def test_a_cache_of_fixed_size() -> None:
    past = torch.randn(2, HEADS, 16, CHANNELS)
    site = lifted(Static(), torch.randn(2, 1, WIDTH), past, past.clone(), torch.tensor([3]))
    assert kinds(site)["k"] == kinds(site)["v"] == ["linear", "cache"]
    assert of(site, "k", "cache")[0].facts == {"form": "written in place", "past": "k_past"}


@pytest.mark.parametrize("function", ["sigmoid", "silu"])
def test_an_output_gate(function: str) -> None:
    class Gated(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = attend(heads(self.q(x)), heads(self.k(x)), heads(self.v(x)))
            assert self.g is not None
            gate = torch.sigmoid(self.g(x)) if function == "sigmoid" else nn.functional.silu(self.g(x))
            return self.o(out * gate)

    site = lifted(Gated(gate=True))
    gate, output = of(site, "out")
    assert (gate.kind, output.kind) == ("gate", "linear")
    assert gate.facts == {"function": function, "kernel": "g.weight", "bias": "g.bias"}


class Latent(nn.Module):
    """Multi-head latent attention: low-rank keys and values, and a rotated part that all heads share."""

    def __init__(self, rank: int = 12, plain: int = 8, rotated: int = 4) -> None:
        super().__init__()
        self.rank, self.plain, self.rotated = rank, plain, rotated
        self.q = nn.Linear(WIDTH, HEADS * (plain + rotated), bias=False)
        self.kv_a = nn.Linear(WIDTH, rank + rotated, bias=False)
        self.kv_norm = RootMeanSquare(rank)
        self.kv_b = nn.Linear(rank, HEADS * 2 * plain, bias=False)
        self.o = nn.Linear(HEADS * plain, WIDTH, bias=False)
        self.register_buffer("frequencies", 10000.0 ** (-torch.arange(0, rotated, 2) / rotated))

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        cos, sin = angles(x.shape[2], self.frequencies, "half", 1.0)
        return x * cos + turned(x, "half") * sin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q_plain, q_rotated = heads(self.q(x)).split([self.plain, self.rotated], -1)
        latent, k_rotated = self.kv_a(x).split([self.rank, self.rotated], -1)
        k_plain, v = heads(self.kv_b(self.kv_norm(latent))).chunk(2, -1)
        k_rotated = self.rotate(k_rotated[:, None]).expand(-1, HEADS, -1, -1)
        q, k = torch.cat([q_plain, self.rotate(q_rotated)], -1), torch.cat([k_plain, k_rotated], -1)
        return self.o(attend(q, k, v))


def test_latent_attention() -> None:
    site = lifted(Latent())
    plain, rotated = ([s for s in of(site, "k") if s.part == part] for part in ("channels 0–7", "channels 8–11"))
    assert [step.kind for step in plain] == ["linear", "norm", "linear"]
    assert [step.kind for step in rotated] == ["linear", "rotary"]
    assert plain[0].facts["kernel"] == rotated[0].facts["kernel"] == "kv_a.weight"
    assert plain[2].facts["kernel"] == "kv_b.weight"
    assert [s.kind for s in of(site, "v")] == ["linear", "norm", "linear"]
    assert [(s.part, s.kind) for s in of(site, "q")] == [
        ("channels 0–7", "linear"),
        ("channels 8–11", "linear"),
        ("channels 8–11", "rotary"),
    ]


def test_a_block_as_text_and_as_data() -> None:
    site = lifted(Block(norm=RootMeanSquare, pairs="half", gate=True))
    lines = render_site(site, 16, block=True).splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("  block"))
    assert [line.strip() for line in lines[first : first + 10]] == [
        "block  queries ┬ linear q.weight [40 → 32]",
        "├ RMSNorm over the 8 channels of each head, ε 1e-05, q_norm.weight",
        "└ rotary, 8 channels, half, base 10000",
        "keys    ┬ linear k.weight [40 → 32]",
        "├ RMSNorm over the 8 channels of each head, ε 1e-05, k_norm.weight",
        "└ rotary, 8 channels, half, base 10000",
        "values  ─ linear v.weight [40 → 32]",
        "attend(q, k, v)",
        "output  ┬ gate: times sigmoid of linear g.weight + g.bias",
        "└ linear o.weight [32 → 40]",
    ]
    data = as_data(site.steps)
    assert [row["kind"] for row in data if row["operand"] == "q"] == ["linear", "norm", "rotary"]
    assert data[2]["base"] == 10000
