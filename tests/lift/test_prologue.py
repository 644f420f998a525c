"""Rotary maps become part of a site: what is pulled in, what stays outside and why, and that both compute the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from attncompile.backend.choose import choose_lowering
from attncompile.backend.rewrite import decide, rewrite
from attncompile.frontends.aten import aten_graph
from attncompile.frontends.capture import Captured, capture_export
from attncompile.ir import parse_spec, print_spec
from attncompile.ir.prologue import without_positions
from attncompile.lift import Program, lift_graph
from attncompile.lift.prologue import RotaryMaps, RotatedSite
from attncompile.passes import parse_passes
from tests.lift.rotary_models import Rotary, Shape, inputs


def lifted(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Captured, Program]:
    captured = capture_export(Rotary(shape).to(dtype).eval(), inputs(shape, dtype=dtype), {})
    return captured, lift_graph(aten_graph(captured), "rotary", blocks=False)


def rotated(shape: Shape, dtype: torch.dtype = torch.float32) -> RotatedSite:
    program = lifted(shape, dtype)[1]
    (site,) = program.sites
    assert site.status == "lifted", site.refusal
    return RotaryMaps(program.graph).of(site)


@pytest.mark.parametrize("pairs", ("half", "interleaved"))
@pytest.mark.parametrize("channels", (16, 6))
def test_queries_and_keys_are_pulled_in(pairs: str, channels: int) -> None:
    found = rotated(Shape(pairs=pairs, rotated=channels))
    assert [p.tensor for p in found.prologue.positions] == ["q", "k"] and not found.prologue.refused
    assert {(p.convention, p.channels) for p in found.prologue.positions} == {(pairs, channels)}
    spec = found.site.spec
    assert spec is not None and found.site.proof is not None and found.site.status == "lifted"
    assert found.site.proof.max_error < 1e-9
    # tables are loaded, not computed again in every head
    assert not {node for p in found.prologue.positions for node in ("cos(", "sin(") if node in f"{p.cos} {p.sin}"}
    assert parse_spec(print_spec(spec)).fingerprint() == spec.fingerprint()
    region = found.site.region
    assert region is not None and [b.name for b in region.inputs] == [v.name for v in spec.inputs]


def test_the_rest_of_the_spec_is_the_one_before() -> None:
    program = lifted(Shape())[1]
    (site,) = program.sites
    after = RotaryMaps(program.graph).of(site).site.spec
    assert after is not None and site.spec is not None
    text = print_spec(without_positions(after)).replace("_rotated", "")
    assert parse_spec(text).fingerprint() == site.spec.fingerprint()


def test_different_maps_for_queries_and_keys() -> None:
    found = rotated(Shape(own_angles=True))
    query, key = found.prologue.positions
    assert query.cos != key.cos and query.sin != key.sin
    assert len(found.prologue.inputs) == 2 + 4


# keys that somebody else needs rotated stay outside; queries go in all the same
@pytest.mark.parametrize(
    "keys, said",
    (("returned", "the model returns it rotated, so it is made anyway"),
     ("scaled", "mul_6 (mul) needs it rotated too, so it is made anyway"),  # not the turn, which needs nothing
     ("cached", "no rotary map")),
)  # fmt: skip
def test_keys_that_are_made_anyway_stay_outside(keys: str, said: str) -> None:
    found = rotated(Shape(keys=keys))
    assert [p.tensor for p in found.prologue.positions] == ["q"]
    ((name, reason),) = found.prologue.refused
    assert name == "k" and said in reason
    spec = found.site.spec
    assert spec is not None and [v.name for v in spec.inputs][:3] == ["q", "k", "v"]


def test_a_rotation_in_float32_reads_what_was_before_the_cast() -> None:
    found = rotated(Shape(wide=True), torch.bfloat16)
    assert [p.tensor for p in found.prologue.positions] == ["q", "k"]
    kinds = {value.name: value.type.dtype for value in found.prologue.inputs}
    assert kinds["q"] == kinds["k"] == "bfloat16" and set(kinds.values()) == {"bfloat16", "float32"}


class NoRotation(Rotary):
    def rotated(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        part = x[..., : self.shape.rotated]
        return part * cos + part.roll(1, -1) * sin  # no pairs


def test_what_is_no_rotation_stays_outside() -> None:
    shape = Shape()
    captured = capture_export(NoRotation(shape).eval(), inputs(shape), {})
    program = lift_graph(aten_graph(captured), "rotary", blocks=False)
    found = RotaryMaps(program.graph).of(program.sites[0])
    assert not found.prologue.positions and found.site == program.sites[0]
    reasons = [reason for _, reason in found.prologue.refused]
    assert reasons == ["q: no rotary map makes it", "k: no rotary map makes it"]


SHAPES = {
    "half": Shape(),
    "interleaved": Shape(pairs="interleaved"),
    "partial": Shape(rotated=6),
    "partial-interleaved": Shape(pairs="interleaved", rotated=10, heads=2),
    "two-maps": Shape(own_angles=True),
    "table": Shape(table=True),
    "returned": Shape(keys="returned"),
    "cached": Shape(keys="cached"),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_rewritten_graph_computes_the_same(shape: Shape) -> None:
    captured, program = lifted(shape)
    decisions = decide(program, parse_passes("fuse.rotary"), lambda spec: choose_lowering(spec, "cpu"))
    (decision,) = decisions
    assert decision.passes is not None and decision.passes.applied == ("fuse.rotary",)
    stays = shape.keys != ""
    assert ("k: " in decision.reason and "stays outside" in decision.reason) == stays
    module = rewrite(captured.graph_module, program, decisions)
    given = inputs(shape)
    replaced = dataclasses.replace(captured, graph_module=module)
    wanted = Rotary(shape).eval()(*given)
    for found, best in zip(_all(replaced.run(given, {})), _all(wanted), strict=True):
        torch.testing.assert_close(found, best)
    kept = {str(node.target) for node in module.graph.nodes}
    assert not stays or any("cat" in name or "mul" in name for name in kept)


def _all(result: object) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    assert isinstance(result, list | tuple)
    return [each for each in result if isinstance(each, torch.Tensor)]
