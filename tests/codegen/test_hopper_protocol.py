"""Whether the warps of the Hopper kernel wait for one another, and for what they read: without a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attncompile.codegen.gluon import generate, generate_fastest, hopper_tiles_to_try
from attncompile.codegen.gluon.generate import HopperModule
from attncompile.ir import Spec, parse_spec
from attncompile.passes import parse_passes, run_passes
from tests.codegen.hopper_on_cpu import LAZY, run_on_cpu
from tests.codegen.hopper_schedule import Choose, Fault, at_random, by_rank
from tests.kernels.comparison import measured

MASKS = ("true", "j ≤ i", "j ≤ i and j > i − 300", "j ≤ i + 400")
FORMS = (
    *((form, 32, mask) for form in ("", "quantize.int8(values=true)", "quantize.int8") for mask in MASKS[:3:2]),
    *(("quantize.fp8", channels, mask) for channels in (32, 128) for mask in MASKS),
)
NORMALISERS = (
    *(("sigmoid", channels, "s − 5.0", mask) for channels in (32, 128) for mask in MASKS),
    ("sigmoid", 64, "s + slopes[h]·float(j − i)", "j ≤ i"),
    *(("relu", channels, "s", mask) for channels, mask in zip((64, 96), MASKS[1:3], strict=True)),
)
EAGER = by_rank(("products", "copies", "partition 3", "partition 2", "partition 1", "partition 0"))
"""Copies and products end at once, and the copying warp is as far ahead as it can be."""


def _spec(form: str, mask: str, channels: int) -> Spec:
    spec = parse_spec(
        f"x   attend  q[B,2,I,{channels}]  k,v[B,1,J,{channels}]  bfloat16\n  score  0.125·s\n  mask   {mask}\n"
        "  kv_head h // 2\n  norm   softmax (float32)"
    )
    return run_passes(spec, parse_passes(form)).spec if form else spec


def _passes(spec: Spec, module: HopperModule, queries: int, keys: int, choose: Choose = LAZY) -> bool:
    """Whether the result is right. Where weights are rounded as the Spec says, no other rounding is allowed for."""
    generator = torch.Generator().manual_seed(queries)
    tensors = {}
    for value in spec.inputs:
        if value.name == "slopes":
            tensors["slopes"] = torch.tensor([0.25, 0.0625])
            continue
        heads, length = (2, queries) if value.name == "q" else (1, keys)
        channels = module.skeleton.channels
        tensors[value.name] = torch.randn(1, heads, length, channels, generator=generator).to(torch.bfloat16)
    found = run_on_cpu(module, list(tensors.values()), choose=choose)
    if module.skeleton.turned_values:
        wide = {name: tensor.float() for name, tensor in tensors.items()}
        return all(outcome.passed for outcome in measured(spec, wide, found, torch.float32))
    return all(outcome.passed for outcome in measured(spec, tensors, found, torch.bfloat16))


@pytest.mark.parametrize("form, channels, mask", FORMS)
def test_every_query_meets_its_keys(form: str, channels: int, mask: str) -> None:
    """Tiles of one key block to ten, some of them without a key."""
    spec = _spec(form, mask, channels)
    module = generate(spec, queries=16384)
    for choose, queries, keys in ((EAGER, 1, 1), (at_random(1), 130, 257), (LAZY, 500, 1200)):
        assert _passes(spec, module, queries, keys, choose), (queries, keys)


@pytest.mark.parametrize("norm, channels, score, mask", NORMALISERS)
def test_weights_without_a_sum(norm: str, channels: int, score: str, mask: str) -> None:
    """Normalisers that make a weight from its score alone; a query that sees no key gives zeros."""
    given = "\n  given  slopes[2]:float32" if "slopes" in score else ""
    spec = parse_spec(
        f"x   attend  q[B,2,I,{channels}]  k,v[B,1,J,{channels}]  bfloat16\n  score  0.125·({score})\n"
        f"  mask   {mask}\n  kv_head h // 2\n  norm   {norm} (float32){given}"
    )
    for length in (1024, 16384):
        module = generate(spec, queries=length)
        for choose, queries, keys in ((EAGER, 1, 1), (LAZY, 130, 257), (at_random(2), 300, 700)):
            assert _passes(spec, module, queries, keys, choose), (length, queries, keys)


WAITS = (
    "mbarrier.wait(key_ready.index(last_stage), last_phase, pred=more)",
    "mbarrier.wait(value_ready.index(stage), phase)",
    "signal(KEY_FREE + next_stage, GROUPS * 128 + 32)",
    "signal(VALUE_FREE + stage, GROUPS * 128 + 32)",
)


@pytest.mark.parametrize("line", WAITS)
def test_a_missing_line_shows(line: str) -> None:
    """This way of testing finds what it is for."""
    spec = _spec("quantize.fp8", "j ≤ i", 128)
    module = generate(spec, queries=16384)
    assert line in module.source
    broken = dataclasses.replace(module, source=module.source.replace(f"{line}\n", "pass\n"))
    with pytest.raises(Fault):
        _passes(spec, broken, 500, 1200)


@pytest.mark.parametrize("channels", (64, pytest.param(128, marks=pytest.mark.slow)))
def test_tiles_that_tuning_tries(channels: int) -> None:
    """Every fifth of them, in an order of its own: each number of stages and buffers is among those."""
    spec = _spec("", "j ≤ i", channels)
    table = generate_fastest(spec, queries=16384).skeleton.tile
    tiles = hopper_tiles_to_try(spec, table)
    for number, tile in enumerate(tiles[::5]):
        choose = (EAGER, LAZY, at_random(number))[number % 3]
        assert _passes(spec, generate(spec, tile), 200, 700, choose), tile
