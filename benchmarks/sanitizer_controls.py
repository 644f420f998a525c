"""Kernels that are none of ours and known to be right: what a tool says of them is said of what they are made of.

``hand_over`` passes numbers between warps as the description of ``bar`` in the PTX ISA has it; ``specialized`` is the
least kernel of Gluon with warps of their own tasks, which Triton sends their tasks through shared memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

HAND_OVER = """
extern "C" __global__ void hand_over(int* given, int rounds) {
    __shared__ int places[2][128];
    int own = threadIdx.x % 128;
    for (int round = 0; round < rounds; round++) {
        int stage = round % 2;
        if (threadIdx.x < 128) {
            if (round >= 2) asm volatile("bar.sync %0, 256;" : : "r"(3 + stage) : "memory");
            places[stage][own] = own + round;
            asm volatile("bar.arrive %0, 256;" : : "r"(1 + stage) : "memory");
        } else {
            asm volatile("bar.sync %0, 256;" : : "r"(1 + stage) : "memory");
            given[round * 128 + own] = places[stage][127 - own];
            asm volatile("bar.arrive %0, 256;" : : "r"(3 + stage) : "memory");
        }
    }
}
"""
"""Four warps give four others numbers through two places."""


def hand_over(rounds: int) -> bool:
    """Run it for so many rounds; whether all numbers arrive."""
    kernel = torch.cuda._compile_kernel(HAND_OVER, "hand_over")
    given = torch.zeros(rounds, 128, dtype=torch.int32, device="cuda")
    kernel((1, 1, 1), (256, 1, 1), (given, rounds))
    torch.cuda.synchronize()
    wanted = torch.arange(127, -1, -1) + torch.arange(rounds)[:, None]
    return bool((given.cpu() == wanted).all())


@gluon.jit
def _first(given):
    gl.store(given, 1)


@gluon.jit
def _second(given):
    gl.store(given + 1, 2)


@gluon.jit
def _specialized(given):
    gl.warp_specialize([(_first, (given,)), (_second, (given,))], [4], [24])


def specialized() -> bool:
    """Run it; whether both tasks were done."""
    given = torch.zeros(2, dtype=torch.int32, device="cuda")
    _specialized[1,](given, num_warps=4)
    torch.cuda.synchronize()
    return bool(given.tolist() == [1, 2])


CONTROLS: Mapping[str, Callable[[], bool]] = {
    **{f"hand-over-{rounds}": functools.partial(hand_over, rounds) for rounds in (1, 2, 3, 8)},
    "specialized": specialized,
}
