"""Every spelling is lifted to the Spec that its row states, proven, and right on real numbers."""

from __future__ import annotations

import pytest
import torch

from attncompile.frontends.aten import aten_graph
from attncompile.frontends.capture import Captured
from attncompile.ir import Operation, Position, Size, parse_spec, print_expr, print_spec
from attncompile.lift import Site, lift_graph
from attncompile.lift.prove import AGREEMENT, canonical, difference
from tests.lift.forms import Form
from tests.lift.spellings import SPELLINGS
from tests.recorded import recorded

DEFAULTS = {"mask": "true", "kv_head": "h", "weight": "w", "sink": "−inf", "divisor": "t"}


def stated(site: Site) -> dict[str, str]:
    """What a site says, attribute by attribute, as its printed Spec does."""
    assert site.spec is not None, site.refusal
    attend = site.spec.attend()
    assert attend is not None
    fields = ("score", "mask", "fill", "weight", "sink", "divisor", "kv_head")
    expressions = {name: print_expr(getattr(attend, name)) for name in fields}
    types = site.spec.types()
    sizes = {name: f"[{','.join(str(size) for size in types[name].sizes)}]" for name in ("q", "k", "v")}
    return {**expressions, **sizes, "norm": str(attend.norm), "lse": attend.lse}


def block(operations: tuple[Operation, ...]) -> tuple[str, ...]:
    return tuple(f"position {op.convention}" if isinstance(op, Position) else op.keyword for op in operations)


@pytest.mark.parametrize("form", SPELLINGS.rows, ids=lambda form: form.name)
def test_spelling(form: Form) -> None:
    captured = form.capture()
    program = lift_graph(aten_graph(captured), form.name, captured.notes)
    expected = dict(form.expected)
    status, count = expected.pop("status", "lifted"), expected.pop("sites", 1)
    reason, around = expected.pop("reason", ""), expected.pop("block", None)
    rotated = expected.pop("rotated", None)
    assert [site.status for site in program.sites] == [status] * count, [site.refusal for site in program.sites]
    for site in program.sites:
        found = stated(site)
        assert {name: found[name] for name in {**DEFAULTS, **expected}} == {**DEFAULTS, **expected}
        assert site.proof is not None and site.proof.cases and site.proof.max_error <= AGREEMENT[torch.float64]
        assert site.spec is not None and parse_spec(print_spec(site.spec)) == site.spec
        assert reason in (site.refusal.reason if site.refusal else "")
        if around is not None:
            assert block(site.block) == around
        if rotated is not None:
            assert {op.channels for op in site.block if isinstance(op, Position)} == {rotated}
    agrees_on_real_inputs(captured, form, program.sites)


def agrees_on_real_inputs(captured: Captured, form: Form, sites: tuple[Site, ...]) -> None:
    """Read operands and results of the captured model on its example inputs, and compare with the Spec in
    float64.

    The model runs in its own dtype, so the two agree to float32 rounding of sums of few terms.
    """
    values = {name: value.detach() for name, value in recorded(captured, form.inputs).items()}
    for site in sites:
        assert site.spec is not None and site.region is not None
        types = site.spec.types()
        sizes = {"B": 2, "I": 7, "J": 7}
        for binding in site.region.inputs:
            if binding.layout is not None:
                extents = binding.layout.extents(values[binding.value].shape)
                for group, extent in zip(binding.layout.groups, extents, strict=True):
                    if len(group) == 1 and isinstance(size := types[binding.name].size(group[0]), Size):
                        sizes[size.name] = int(extent)
        tensors = {
            b.name: canonical(values[b.value], b.layout, types[b.name], sizes) if b.layout else values[b.value]
            for b in site.region.inputs
        }
        for binding, result in zip(site.region.outputs, site.spec.interpret(tensors), strict=True):
            assert binding.layout is not None
            actual = canonical(values[binding.value], binding.layout, types[binding.name], sizes)
            # an eager row of one dtype rounds: nothing else tells them apart
            assert difference(actual.double(), result) < 64 * torch.finfo(torch.float32).eps
