"""``plan.json`` and the modelled work of a site."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attncompile.passes import parse_passes, run_passes
from attncompile.plan import Plan, Refused, SitePlan, cost_row, load_plan, save_plan, work
from tests.cases import BY_NAME, CASES, Case
from tests.tampering import change


def site(name: str) -> SitePlan:
    spec = BY_NAME["causal"].spec
    result = run_passes(spec, parse_passes("fuse,sparsify.window(size=4),linearize.decay"))
    return SitePlan(
        site=name, fingerprint=spec.fingerprint(), before=str(spec), after=str(result.spec), operator="sdpa",
        reason="the score is linear in s", applied=result.applied,
        refused=tuple(Refused(call=call, reason=reason) for call, reason in result.refused),
        cost=cost_row(spec, result.spec, {"B": 1, "I": 64}),
    )


def example(*names: str) -> Plan:
    return Plan(model="tiny", target="torch", provider="cpu", passes="fuse,sparsify.window(size=4)",
                sites=tuple(site(name) for name in names))


def test_round_trip(tmp_path: Path) -> None:
    plan = example("layers.0.attn")
    path = tmp_path / "plan.json"
    save_plan(plan, path)
    assert load_plan(path) == plan
    assert load_plan(path).digest() == plan.digest()
    assert json.loads(path.read_text())["schema"] == 1


def test_two_plans_of_the_same_sites_are_the_same_text(tmp_path: Path) -> None:
    first, second = example("layers.10", "layers.2"), example("layers.2", "layers.10")
    save_plan(first, tmp_path / "a.json")
    save_plan(second, tmp_path / "b.json")
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    assert [entry.site for entry in first.sites] == ["layers.2", "layers.10"]
    assert first.site("layers.10").operator == "sdpa"
    with pytest.raises(ValueError, match=r"has no site 'layers.3'; it has layers.2, layers.10"):
        first.site("layers.3")


@pytest.mark.parametrize(("path", "value", "message"), [
    (("passes",), "fus", r"not valid at passes: unknown pass 'fus' \(did you mean 'fuse'\?\)"),
    (("passes",), "__import__('os')", "not valid at passes: unknown pass '__import__'"),
    (("sites", 0, "applied", 0), "sparsify.window(size=0)", "at sites.0.applied: .*size must be at least 1"),
    (("sites", 0, "fingerprint"), "0" * 16, "does not have the fingerprint 0000"),
    (("sites", 0, "after"), "attend", "not valid at sites.0"),
    (("sites", 0, "rolled_back"), True, "layers.0 was rolled back, but is computed by sdpa"),
    (("target",), "tpu", "not valid at target: Input should be 'onnx', 'torch' or 'pt2'"),
    (("sites", 1, "site"), "layers.0", "the site layers.0 is planned twice"),
    (("schema",), 7, "not valid at schema"),
    (("surprise",), 1, "not valid at surprise"),
])
def test_what_is_no_plan(tmp_path: Path, path: tuple[str | int, ...], value: object, message: str) -> None:
    file = tmp_path / "plan.json"
    save_plan(example("layers.0", "layers.1"), file)
    change(file, path, value)
    with pytest.raises(ValueError, match=message):
        load_plan(file)


def test_work_by_hand() -> None:
    causal = work(BY_NAME["causal"].spec, {"B": 1, "I": 4})
    assert causal.density == 10 / 16
    # 4 heads · 10 visible pairs · (16 + 16) channels · 2
    assert causal.flops == 4 * 10 * 32 * 2
    assert causal.bytes == 4 * (4 * 4 * 16) * 4
    full = work(BY_NAME["full"].spec, {"B": 1, "I": 4})
    assert (full.density, full.flops) == (1.0, 4 * 16 * 32 * 2)


def test_a_window_saves_work() -> None:
    spec = BY_NAME["causal"].spec
    after = run_passes(spec, parse_passes("sparsify.window(size=64, sinks=0)")).spec
    row = cost_row(spec, after, {"B": 1, "I": 1024})
    # causal: 1024·1025/2 pairs; window: 64 for each query but the first 63
    assert row.before.density == 1025 / 2048
    assert row.after.density == (1024 * 64 - 63 * 64 / 2) / 1024**2
    assert row.flops_saved == pytest.approx(1 - row.after.density / row.before.density, rel=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_row_has_a_cost(case: Case) -> None:
    found = work(case.spec, case.sizes)
    assert found.flops >= 0 and found.bytes > 0 and 0 < found.density <= 1
