"""Elements that belong to a key are loaded once for a block, in scores and in masks."""

from __future__ import annotations

import os

import pytest
import torch

from attncompile.codegen.gluon import generate
from attncompile.codegen.gluon.tiles import SHARED_MEMORY
from attncompile.codegen.triton.ahead import cuobjdump
from attncompile.ir import parse_spec
from tests.cases import Case
from tests.codegen.hopper_on_cpu import run_on_cpu
from tests.kernels.comparison import measured


def _row(name: str, score: str, mask: str, *given: str) -> Case:
    lines = [
        f"{name}   attend  q[B,2,I,16]  k,v[B,2,J,16]  bfloat16",
        f"score  {score}",
        f"mask   {mask}",
        "norm   softmax (float32)",
        *(f"given  {each}" for each in given),
    ]
    ranges = {"kept": (0, 2), "kind": (0, 5), "document": (0, 2)}
    return Case(name, "\n  ".join(lines), {"B": 2, "I": 130, "J": 300}, ranges=ranges)


ROWS = (
    (_row("padding", "0.25·s", "kept[b, j] ≠ 0", "kept[B,J]:int64"), 1),
    (_row("bias", "0.25·s + bias[h, j]", "j ≤ i + 170", "bias[2,J]:float32"), 1),
    (_row("both", "0.25·s·gain[b, j]", "gain[b, j] > 0.0 and kept[b, j]", "gain[B,J]:float32", "kept[B,J]:bool"), 2),
    (_row("nested", "0.25·s + of_kind[kind[b, j]]", "true", "of_kind[5]:float32", "kind[B,J]:int32"), 1),
    (_row("ahead", "0.25·s", "kept[b, min(j + 7, J − 1)] and kept[b, j]", "kept[B,J]:bool"), 1),
    (_row("apart", "0.25·s", "kept[b, j] = kind[b, i] or kind[b, j] < 2", "kept[B,J]:int64", "kind[B,I]:int32"), 2),
    (_row("pairs", "0.25·s + bias[i, j]", "kept[b, j] = 1", "bias[I,J]:bfloat16", "kept[B,J]:uint8"), 1),
    (_row("of-queries", "0.25·s", "kept[b, max(i − j, 0)] and j ≤ i", "kept[B,I]:bool"), 0),
)


@pytest.mark.parametrize("case, count", ROWS, ids=lambda value: getattr(value, "name", None))
def test_loaded_once_for_a_block(case: Case, count: int) -> None:
    module = generate(case.spec)
    skeleton = module.skeleton
    assert len(skeleton.elements.keys) == count
    assert count == 0 or skeleton.visible is None or "pairs" in case.name or "j" not in skeleton.visible.parameters
    tensors = {n: t.to(torch.bfloat16) if n in "qkv" else t for n, t in case.tensors(3).items()}
    found = run_on_cpu(module, list(tensors.values()))
    assert all(outcome.passed for outcome in measured(case.spec, tensors, found, torch.bfloat16))


def test_more_than_there_are_names_for() -> None:
    """The others are loaded by each thread."""
    names = [f"kept{number}" for number in range(10)]
    mask = " and ".join(f"({name}[b, j] or {name}[b, min(i, J − 1)])" for name in names)
    case = _row("many", "0.25·s", mask, *(f"{name}[B,J]:bool" for name in names))
    module = generate(case.spec)
    assert len(module.skeleton.elements.keys) == len(module.skeleton.elements.rows) == 8
    tensors = {n: t.to(torch.bfloat16) if n in "qkv" else t for n, t in case.tensors(3).items()}
    tensors |= {name: torch.rand(tensors[name].shape) < 0.9 for name in names}
    found = run_on_cpu(module, list(tensors.values()))
    assert all(outcome.passed for outcome in measured(case.spec, tensors, found, torch.bfloat16))


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") not in ("", "0") or cuobjdump() is None, reason="nothing is compiled"
)
def test_they_fit_beside_the_widest_tile() -> None:
    """Elements of 8 bytes, where 2 KiB of shared memory are left."""
    from attncompile.codegen.gluon.ahead import compile_ahead

    spec = parse_spec(
        "x   attend  q,k,v[B,16,I,128]  bfloat16\n  score  0.09·s\n"
        "  mask   j ≤ i and document[b, j] = document[b, i]\n  norm   softmax (float32)\n"
        "  given  document[B,I]:int64"
    )
    kernel = compile_ahead(generate(spec), "bfloat16")[-1]
    assert kernel.spills == 0 and kernel.shared <= SHARED_MEMORY
