"""The lists of key blocks, made by Triton's interpreter and compared with the mask itself."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from attncompile.codegen.gluon import generate
from attncompile.codegen.gluon.generate import HopperModule
from attncompile.codegen.triton.cache import load_module
from attncompile.codegen.triton.lower import lower, shared_lists
from attncompile.codegen.triton.moved import regrouped_parts
from attncompile.ir.evaluate import evaluate
from tests.cases import Case
from tests.codegen.hopper_on_cpu import run_on_cpu
from tests.kernels.comparison import measured
from tests.kernels.neighbourhood_cases import NEIGHBOURHOODS

ROOT = Path(__file__).resolve().parents[2]


def _row(name: str, mask: str, given: str = "", heads: int = 2) -> Case:
    lines = [
        f"{name}   attend  q[B,{heads},I,16]  k,v[B,{heads},J,16]  bfloat16",
        "score  0.25·s",
        f"mask   {mask}",
        "norm   softmax (float32)",
        *([f"given  {given}"] if given else []),
    ]
    ranges = {"document": (0, 2), "length": (1, 700), "last": (0, 600), "listed": (0, 2), "kinds": (0, 12)}
    return Case(name, "\n  ".join(lines), {"B": 2, "I": 500, "J": 700}, ranges=ranges)


ROWS = (
    _row("documents", "j ≤ i and document[b, j] = document[b, min(i, J − 1)]", "document[B,J]:int64"),
    _row("padding", "j ≤ i + 200 and attention_mask[b, j] ≠ 0", "attention_mask[B,J]:int64"),
    _row("truth", "visible[b, j]", "visible[B,J]:bool"),
    _row("by-head", "j ≤ last[h, i]", "last[2,I]:int32"),
    _row("lengths", "j < length[b]", "length[B]:int32"),
    _row("blocks", "i // 200 = j // 200"),
    _row("given-blocks", "given[h, i // 128, j // 128]", "given[2,(I+127)//128,(J+127)//128]:bool"),
    _row("given-causal", "j ≤ i and listed[b, i // 64, j // 128] ≠ 0", "listed[B,(I+63)//64,(J+127)//128]:uint8"),
    _row("given-kinds", "kinds[0, i // 64, j // 64 // 2] < 3", "kinds[1,(I+63)//64,(J+127)//128]:int32"),
    _row("three-ranges", "j ≤ i and (j < 4 or j > i − 90 or j // 128 = 2)"),
)
BOXES = tuple(next(row for row in NEIGHBOURHOODS if row.name == name) for name in ("plane", "strided", "causal-frames"))
ROWS += tuple(
    Case(row.name, str(found.attention).replace("_boxes", ""), {"B": row.batch})
    for row in BOXES
    if (found := regrouped_parts(row.moved(128, 128)))
)
NEVER_WHOLE = ("three-ranges", *(row.name for row in BOXES))
"""Rows whose windows are smaller than a tile."""
PLAIN = ("j ≤ i", "j ≤ i and (j > i − 40 or j < 2)", "true", "j ≤ i and (i − j) % 7 = 0")


def test_limits_in_closed_form_need_no_lists() -> None:
    for mask in PLAIN:
        assert generate(_row("x", mask).spec).skeleton.marks is None, mask


def sorted_documents(case: Case) -> dict[str, Any]:
    """Inputs whose documents and padding lie in runs, as they do."""
    tensors = case.tensors()
    for name in ("document", "attention_mask", "visible", "last"):
        if name in tensors:
            tensors[name] = tensors[name].sort(-1).values
    if "attention_mask" in tensors:
        tensors["attention_mask"] = tensors["attention_mask"].flip(-1)
    return tensors


def answer(room: int = 0) -> None:
    """For each row: the blocks that the kernel lists, beside what the mask says of every block.

    Args:
        room: how many blocks a list holds, where it is not as generated.
    """
    from types import SimpleNamespace

    for case in ROWS:
        spec = case.spec
        module: HopperModule = generate(spec)
        loaded, skeleton = load_module(module), module.skeleton
        tensors = sorted_documents(case)
        sizes = {"B": 2, "I": tensors["q"].shape[2], "J": tensors["k"].shape[2], **case.sizes}
        attend = spec.attend()
        assert attend is not None and skeleton.marks is not None
        if room:
            loaded.ROOM = SimpleNamespace(value=room)
        rows, keys = skeleton.tile.queries, skeleton.tile.keys
        tiles, blocks = -(-sizes["I"] // rows), -(-sizes["J"] // keys)
        heads = 2 if skeleton.marks.by_head else 1
        captured = [tensors[name.removesuffix("_2").removesuffix("_3")] for name, _ in skeleton.captured]
        values = {"H": 2, **sizes}
        strides = [step for tensor in captured for step in tensor.stride()]
        read = [*captured, *strides, *(values[name] for name in skeleton.integers())]
        counts, places, order = loaded.list_parts(None, tensors["q"], sizes["B"] * heads * tiles, blocks)
        loaded.block_lists(counts, places, tiles, blocks, read)
        loaded.tile_order(counts, order, tiles)
        assert places.shape[1] == (room or blocks)
        shown = evaluate(attend.mask, attend.environment(tensors, sizes, tensors["q"].dtype))
        shown = shown.expand(sizes["B"], 2, sizes["I"], sizes["J"])
        faults = []
        for number, (edges, total) in enumerate(counts.tolist()):
            edge = places[number, :edges].tolist() if edges >= 0 else list(range(-1 - edges, -1 - edges + total))
            full = places[number, places.shape[1] - (total - edges) :].tolist() if edges >= 0 else []
            b, h, tile = number // tiles // heads, number // tiles % heads, number % tiles
            for block in range(blocks):
                part = shown[b, h, tile * rows : (tile + 1) * rows, block * keys : (block + 1) * keys]
                whole = bool(part.all()) and (block + 1) * keys <= sizes["J"]
                if (bool(part.any()) and block not in edge + full) or (block in full and not whole):
                    faults.append([number, block, "hidden" if block not in edge + full else "shown"])
            if len(set(edge + full)) != total:
                faults.append([number, edge, full])
        costs = counts[:, 1].view(-1, tiles)
        longest_first = torch.argsort(costs, descending=True, stable=True)
        complete = torch.equal(order[1:].view(-1, tiles), longest_first.to(order.dtype))
        complete = complete and int(order[0]) == int((costs[0] > costs[0].max() // 2).sum())
        visited = int(counts[:, 1].sum()), int((counts[:, 1] - counts[:, 0])[counts[:, 0] >= 0].sum())
        print(json.dumps([case.name, faults, complete, visited, len(counts) * blocks]))


def found(tmp_path: Path, room: int = 0) -> list[Any]:
    """What :func:`answer` prints in a process of its own."""
    pytest.importorskip("triton.experimental.gluon")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "ATTNCOMPILE_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"from tests.codegen.test_gluon_marks import answer; answer({room})"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == [row.name for row in ROWS]
    return rows


def test_lists_hold_every_block_that_is_seen(tmp_path: Path) -> None:
    for name, faults, complete, (visited, full), everything in found(tmp_path):
        assert not faults and complete, (name, faults)
        assert visited < everything, f"{name} skips nothing"
        assert full > 0 or name in NEVER_WHOLE, f"{name} has no block without a mask"


def test_lists_without_room_for_all_blocks_visit_every_block_between_the_limits(tmp_path: Path) -> None:
    for name, faults, complete, _, _ in found(tmp_path, room=2):
        assert not faults and complete, (name, faults)


SHARED = ("documents", "padding", "by-head", "given-causal")


@pytest.mark.parametrize("name", SHARED)
def test_calls_share_lists(name: str) -> None:
    """Lists that are handed in give what a call's own give; those of another mask are what is read."""
    row = next(row for row in ROWS if row.name == name)
    case = dataclasses.replace(row, sizes={"B": 1, "I": 300, "J": 400})
    module = generate(case.spec)
    room = module.list_room
    assert room is not None
    tensors = {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in sorted_documents(case).items()}
    memory = torch.full((room.words(1, 2, 300, 400),), -7, dtype=torch.int32)
    run_on_cpu(module, [memory, *tensors.values()], function="mask_lists")
    found = run_on_cpu(module, list(tensors.values()), lists=memory)
    assert all(outcome.passed for outcome in measured(case.spec, tensors, found, torch.bfloat16))
    assert torch.equal(found, run_on_cpu(module, list(tensors.values())))
    others = {n: torch.zeros_like(t) for n, t in tensors.items() if not t.is_floating_point()}
    if name == "padding":  # where nothing is visible nothing is visited: lists, and not the mask, decide that
        run_on_cpu(module, [memory, *{**tensors, **others}.values()], function="mask_lists")
        hidden = run_on_cpu(module, list(tensors.values()), lists=memory)
        assert not torch.equal(hidden, found)


def test_what_calls_on_a_hopper_gpu_share() -> None:
    documents = next(row for row in ROWS if row.name == "documents").spec
    with mock.patch("attncompile.codegen.triton.lower.on_hopper", lambda _: True):
        found = lower(documents, "cuda").lists
    assert found is not None and found.reads == ("document",) and "document" in found.key
    assert lower(documents, "cuda").lists is None  # another GPU
    for name, mask in (("limits", "j ≤ i"), ("sizes", "j ≤ i and (j < 4 or j > i − 90 or j // 128 = 2)")):
        assert shared_lists(_row(name, mask).spec) is None, name


@pytest.mark.parametrize("name", [row.name for row in ROWS if "given" in row.text])
def test_memory_suffices_for_few_queries(name: str) -> None:
    """What is known from the kernel for many queries is enough for the one for few."""
    spec = next(row for row in ROWS if row.name == name).spec
    many, few = (generate(spec, queries=queries).list_room for queries in (16384, 1024))
    assert many is not None and few is not None
    for sizes in ((1, 1, 1, 1), (3, 7, 500, 700), (2, 8, 2048, 8192)):
        assert many.for_any_length().words(*sizes) >= max(many.words(*sizes), few.words(*sizes))


def test_lists_that_depend_on_sizes_alone_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton.experimental.gluon")
    monkeypatch.setenv("ATTNCOMPILE_CACHE", str(tmp_path))
    loaded = load_module(generate(next(row for row in ROWS if row.name == "three-ranges").spec))
    assert not hasattr(load_module(generate(next(row for row in ROWS if row.name == "documents").spec)), "kept_lists")
    recording = False
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: recording)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: mock.Mock())
    made = iter(range(9))

    def lists(*sizes: int) -> object:
        return loaded.kept_lists("cuda:0", *sizes, make=lambda: next(made))

    assert [lists(1, 500), lists(1, 500), lists(2, 500)] == [0, 0, 1]
    recording = True
    assert [lists(1, 500), lists(3, 500), lists(3, 500)] == [0, 2, 3]  # what a graph makes is not there before it runs
    recording = False
    assert lists(3, 500) == 4
