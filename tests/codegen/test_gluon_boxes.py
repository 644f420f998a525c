"""Tiles that are boxes of a grid: what the copying unit would read is what the new order puts there."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path

import pytest
import torch

from attncompile.codegen.gluon import generate, generate_fastest
from attncompile.codegen.gluon.boxes import first_part
from attncompile.codegen.gluon.structure import padded
from attncompile.codegen.triton.cache import load_module
from attncompile.codegen.triton.moved import regrouped_parts
from attncompile.ir import Attend, parse_spec
from attncompile.ir.evaluate import Environment, evaluate
from tests.kernels.neighbourhood_cases import NEIGHBOURHOODS, Neighbourhood

BOXED = tuple(row for row in NEIGHBOURHOODS if generate(row.moved(128, 128), in_place=True).skeleton.boxes)


def test_most_orders_are_boxes() -> None:
    assert {row.name for row in BOXED} >= {"plane", "odd-grid", "strided", "wider-than-the-grid"}
    assert all(generate(row.moved(128, 128)).skeleton.boxes is None for row in BOXED)


WIDE = Neighbourhood("wide-plane", (32, 128), (6, 6), channels=64)


def test_boxes_are_taken_unasked_where_they_leave_much_less_to_visit() -> None:
    spec = WIDE.case.spec
    module = generate_fastest(spec, queries=4096)
    assert module.skeleton.boxes is not None and not module.moving
    plain = generate(spec, queries=4096)
    signatures = {each.source.partition("\ndef attend(")[2].partition(")")[0] for each in (module, plain)}
    assert len(signatures) == 1, "both are called alike"


def test_copies_are_taken_where_tokens_cannot_be_read_in_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Neighbourhood("large-plane", (128, 128), (16, 16), channels=64).case.spec
    monkeypatch.setattr(importlib.import_module("attncompile.codegen.gluon.generate"), "boxes_of", lambda *_: None)
    assert generate_fastest(spec, queries=16384).moving
    assert not generate_fastest(WIDE.case.spec, queries=4096).moving, "a few hundred keys fewer are not worth copies"


@pytest.mark.parametrize("text", ("lse    lse\n  gives  out, lse", ""))
def test_raster_order_stays_where_boxes_do_not_pay(text: str) -> None:
    row = WIDE if text else Neighbourhood("small-plane", (16, 16), (3, 3), channels=64)
    spec = parse_spec(f"{row.case.text}\n  {text}")
    assert generate_fastest(spec) == generate(spec)


@pytest.mark.parametrize(
    "box, parts, own",
    (((8, 16), 2, (4, 16)), ((1, 128), 2, (1, 64)), ((2, 8, 8), 2, (1, 8, 8)), ((3, 64), 2, None), ((4, 8), 1, (4, 8))),
)
def test_part_of_a_box_that_a_warpgroup_computes(
    box: tuple[int, ...], parts: int, own: tuple[int, ...] | None
) -> None:
    assert first_part(box, parts) == own


@pytest.mark.parametrize("row", BOXED, ids=lambda row: row.name)
def test_boxes_hold_the_tokens_of_their_places(
    row: Neighbourhood, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton.experimental.gluon")
    monkeypatch.setenv("ATTNCOMPILE_CACHE", str(tmp_path))
    spec = row.moved(128, 128)
    parts = regrouped_parts(spec)
    module = generate(spec, in_place=True)
    boxes = module.skeleton.boxes
    assert parts is not None and boxes is not None
    attend = parts.attention.operations[0]
    assert isinstance(attend, Attend)
    loaded = load_module(module)
    for name, side, (lines, places), index in (
        (attend.query, boxes.query_box, boxes.query_place, "i"),
        (attend.key, boxes.key_box, boxes.key_place, "j"),
    ):
        move = parts.before[name]
        size = int(str(move.size))
        token = evaluate(move.at, Environment({"i": torch.arange(size)}, {})).expand(size)
        heads = int(str(parts.attention.types()[name].sizes[1]))
        tokens = spec.types()[move.tensor].sizes[2]
        tensor = torch.randn(row.batch, heads, int(str(tokens)), row.channels, dtype=torch.bfloat16)
        described = loaded.box_descriptor(tensor, (*boxes.lead(), *side), padded(row.channels))
        assert described.block_shape == [*boxes.lead(), *side, padded(row.channels)]
        view = torch.as_strided(described.base, described.shape, described.strides)
        step = len(list(itertools.product(*map(range, side))))
        for first in range(0, size, step):
            scope: dict[str, int] = {index: first}
            exec("\n".join(line.replace("gl.", "") for line in lines), {}, scope)
            corner = [scope[place] for place in places]
            for b, h in ((0, 0), (row.batch - 1, heads - 1)):
                lead = [b * heads + h] if boxes.merged else [b, h]
                for number, offset in enumerate(itertools.product(*map(range, side))):
                    at = [c + o for c, o in zip(corner, offset, strict=True)]
                    held = all(place < limit for place, limit in zip(at, boxes.grid, strict=True))
                    found = int(token[first + number])
                    assert held == (found >= 0)
                    if held:
                        assert torch.equal(view[tuple([*lead, *at])], tensor[b, h, found])
