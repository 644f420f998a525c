"""Whether the warps of the Hopper backward kernel wait for one another, and for what they read: without a GPU.

The kernel runs in orders that a GPU would seldom take: each actor before all others for as long as it can go on, and at
random. In each, an access that nothing orders behind what it conflicts with is an error, as are an arrival too many at
a barrier, one of another number of threads, and a kernel in which nobody can go on.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch

from attncompile.codegen.gluon import generate_backward
from attncompile.codegen.gluon.backward import HopperGradients
from attncompile.kernels.operators import with_log_sum_exp
from tests.cases import Case
from tests.codegen.hopper_on_cpu import LAZY, run_on_cpu
from tests.codegen.hopper_schedule import Choose, Fault, at_random, by_rank
from tests.kernels.backward import arguments, measured_gradients, poisoned_results
from tests.kernels.comparison import Outcome, aligned_inputs
from tests.kernels.hopper_backward_cases import ROWS

ROWS_BY_NAME = {row.name: row for row in ROWS}
GROUPS = ("partition 0", "partition 1", "partition 2", "copies", "products")
"""Two warpgroups, the copying warp, what it copies, and what the warpgroups multiply."""


def _gradients(
    case: Case, module: HopperGradients, choose: Choose = LAZY, processors: int = 2
) -> tuple[list[Outcome], list[Any]]:
    """What the launcher gives for a row, beside the reference in float64."""
    spec = case.spec
    dtype = torch.float16 if "float16" in case.text.split() else torch.bfloat16
    tensors = case.tensors(0, dtype)
    training = with_log_sum_exp(spec)
    attend = training.attend()
    assert attend is not None
    norm = dataclasses.replace(attend.norm, empty="zero")
    forward = dataclasses.replace(training, operations=(dataclasses.replace(attend, norm=norm),))
    exact = dict(zip(training.outputs, forward.interpret(tensors, torch.float64), strict=True))
    results = {attend.out: exact[attend.out].to(dtype), attend.lse: exact[attend.lse].float()}
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(exact[n].shape, generator=generator).to(results[n].dtype) for n in spec.outputs]
    inputs = aligned_inputs(spec, tensors)
    with poisoned_results():
        got = run_on_cpu(
            module,
            [*arguments(training, spec, given, results), *inputs],
            processors,
            choose,
            function="attend_backward",
        )
    return measured_gradients(spec, tensors, given, got, dtype, results[attend.lse]), got


def _small(channels: int, mask: str = "j ≤ i") -> Case:
    """Two heads that share their keys: three tiles of keys for two thread blocks, some of them with one query block."""
    text = (
        f"x   attend  q[B,2,I,{channels}]  k,v[B,1,J,{channels}]  bfloat16\n  score  0.09·s\n  mask   {mask}\n"
        "  kv_head h // 2\n  norm   softmax (float32)"
    )
    return Case("small", text, {"B": 1, "I": 170, "J": 300})


_module = functools.cache(generate_backward)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_gradients(row: Case) -> None:
    """Each form of the kernel, in some order, at sizes that fill no tile."""
    module = generate_backward(row.spec)
    number = ROWS.index(row)
    sizes = ({"B": 1, "I": 1, "J": 1}, {"B": 1, "I": 130, "J": 141}, {"B": 2, "I": 70, "J": 131})
    for seed, each in enumerate((sizes[0], sizes[1 + number % 2])):
        outcomes, _ = _gradients(Case(row.name, row.text, each), module, at_random(2 * number + seed))
        assert all(outcome.passed for outcome in outcomes), (each, outcomes)


@pytest.mark.parametrize("channels", (64, 128))
def test_every_actor_first_and_last(channels: int) -> None:
    """Gradients of keys and values are the same to the bit, whoever goes first."""
    case = _small(channels)
    module = _module(case.spec)
    found = []
    # the two warpgroups run one program: exchanging them is left to chance
    orders = [order for order in itertools.permutations(GROUPS) if order.index(GROUPS[0]) < order.index(GROUPS[1])]
    chosen = [by_rank(order) for order in orders[::5]]
    for choose in (*chosen, *map(at_random, range(6))):
        outcomes, got = _gradients(case, module, choose)
        assert all(outcome.passed for outcome in outcomes), outcomes
        found.append(got[1:])
    assert all(torch.equal(one, other) for each in found for one, other in zip(each, found[0], strict=True))


@pytest.mark.parametrize("order", ("ahead", "middle", "behind"))
def test_orders_of_a_step(order: str) -> None:
    """What a warpgroup may do before it waits for the other's part."""
    for channels, queries in ((128, 64), (64, 128)):
        case = _small(channels)
        tile = dataclasses.replace(generate_backward(case.spec).skeleton.tile, order=order)
        assert (tile.channels, tile.queries) == (channels, queries)
        module = generate_backward(case.spec, tile=tile)
        for choose in (LAZY, by_rank(GROUPS[::-1]), at_random(3)):
            outcomes, _ = _gradients(case, module, choose)
            assert all(outcome.passed for outcome in outcomes), outcomes


BROKEN = {
    "products read before their queries are there": (
        "mbarrier.wait(query_ready.index(next_stage), next_phase, pred=more)",
        "pass",
    ),
    "products read before their gradients are there": ("mbarrier.wait(grad_ready.index(stage), phase)", "pass"),
    "keys are read before they are there": ("mbarrier.wait(key_ready, key_phase)", "pass"),
    "nobody frees queries": ("signal(QUERY_FREE + stage, GROUPS * 128 + 32)", "pass"),
    "nobody frees gradients": ("signal(GRAD_FREE + stage, GROUPS * 128 + 32)", "pass"),
    "copies do not wait for queries to be free": ("meet(free + stage, GROUPS * 128 + 32)", "pass"),
    "copies do not wait for gradients to be free": ("meet(GRAD_FREE + stage, GROUPS * 128 + 32)", "pass"),
    "copies do not wait for keys to be free": ("meet(KEY_FREE, GROUPS * 128 + 32)", "pass"),
    "differences of the other warpgroup are not waited for": (
        "meet(SHARED + buffer * GROUPS + (GROUP + 1) % GROUPS, GROUPS * 128)",
        "pass",
    ),
    "one place for differences": ("buffer ^ 1", "buffer"),
    "one barrier for both places of differences": ("SHARED + buffer * GROUPS", "SHARED"),
    "results overwrite keys that the other warpgroup reads": ("meet(DONE, GROUPS * 128)", "pass"),
    "stores are not shown to copies and products": ("fence_async_shared()", "pass"),
    "copies out are not waited for": ("tma.store_wait(0)", "pass"),
    "a barrier counts too few threads": ("meet(DONE, GROUPS * 128)", "meet(DONE, 128)"),
    "warpgroups count differently": ("meet(DONE, GROUPS * 128)", "meet(DONE, 256 + 32 * GROUP)"),
    "fewer bytes are announced than come": ("+ 2 * row_values", "+ 1 * row_values"),
    "the phase of keys is not turned": ("key_phase ^= 1", "pass"),
    "a product is not waited for": ("query_sum = warpgroup_mma_wait(0, deps=[query_sum])", "pass"),
    "queries are freed before a product has read them": (
        "key_sum, s, differences_0 = warpgroup_mma_wait(GROUPS, deps=[key_sum, next_products, differences_0])\n    "
        "signal(QUERY_FREE + stage, GROUPS * 128 + 32)",
        "signal(QUERY_FREE + stage, GROUPS * 128 + 32)\n    "
        "key_sum, s, differences_0 = warpgroup_mma_wait(GROUPS, deps=[key_sum, next_products, differences_0])",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_fault_shows(name: str) -> None:
    """This way of testing finds what it is for; what is not ordered shows in any order."""
    line, instead = BROKEN[name]
    case = _small(128)
    module = _module(case.spec)
    assert line in module.source
    broken = dataclasses.replace(module, source=module.source.replace(line, instead))
    # how often somebody comes to a barrier does depend on the order: one warpgroup has to be a step ahead
    ahead = by_rank(("partition 0", "copies", "products", "partition 2", "partition 1"))
    with pytest.raises((Fault, AttributeError)):  # a product that is not waited for has no numbers
        _gradients(case, broken, ahead if "one barrier" in name else LAZY)
