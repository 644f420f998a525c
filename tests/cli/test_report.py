"""The report: put together from a program, its plan and its certificate; as JSON, text and one page."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from attncompile.ir import Refusal, Spec, parse_spec, print_spec
from attncompile.lift import Program, Site
from attncompile.plan import Plan, Refused, SitePlan
from attncompile.report import Measurement, Report, read_report, report_of, write_report
from attncompile.verify import Certificate, SiteCase, SiteCertificate, measured
from tests.cases import CASES

SPECS = {case.name: case.spec for case in CASES}


def renamed(spec: Spec, name: str) -> Spec:
    return parse_spec(print_spec(spec).replace(spec.name, name, 1))


def window(name: str) -> Spec:
    return renamed(SPECS["window"], name)


def causal(name: str) -> Spec:
    return renamed(SPECS["causal"], name)


def case(error: float) -> SiteCase:
    return SiteCase(
        seed=0,
        masks="ones",
        sizes={"B": 2},
        dtype="float32",
        max_abs=error,
        max_rel=error,
        misplaced=0,
        tolerance=1.0,
        passed=True,
    )


@pytest.fixture
def report() -> Report:
    """Two sites that got a window, one that a pass refused, one that was not lifted."""
    sites = [Site(f"layer.{n}", "lifted", causal(f"layer.{n}"), source="model.py:3  a @ b") for n in range(3)]
    refusal = Refusal("wrong-axis", "it runs over <queries>", hint="transpose it")
    program = Program("tiny", None, (*sites, Site("layer.3", "refused", refusal=refusal)), ("a note",))
    plans = [
        SitePlan(
            site=f"layer.{n}",
            fingerprint=causal("x").fingerprint(),
            before=print_spec(causal(f"layer.{n}")),
            after=print_spec(window(f"layer.{n}")),
            operator="Attention-23",
            reason="1.3 times faster",
            applied=("sparsify.window(size=4)",),
        )
        for n in range(2)
    ]
    kept = SitePlan(
        site="layer.2",
        fingerprint=causal("x").fingerprint(),
        before=print_spec(causal("layer.2")),
        after="",
        operator="original",
        reason="nothing was faster",
        refused=(Refused(call="quantize.int8", reason="its scores are biased"),),
    )
    plan = Plan(model="tiny", target="onnx", provider="cpu", passes="fuse", sites=(*plans, kept))
    certificate = Certificate(
        model="tiny",
        target="onnx",
        plan=plan.digest(),
        sites=tuple(
            SiteCertificate(
                site=f"layer.{n}",
                spec=print_spec(window(f"layer.{n}")),
                fingerprint=window("x").fingerprint(),
                status="checked",
                operator="Attention-23",
                cases=(case(1e-6 * (n + 1)), case(1e-9)),
            )
            for n in range(2)
        ),
        end_to_end=(measured("max_abs logits", None, 2e-6, "3 calls", 1e-4),),
    )
    latency = Measurement(name="latency 1×128", before=20.0, after=10.0, unit="ms", note="median of 9")
    return report_of(
        program,
        plan,
        certificate,
        changes={"layer.0": 0.02},
        change_inputs="512 tokens",
        measurements=[latency],
    )


def test_sites_carry_what_was_done_and_measured(report: Report) -> None:
    first, second, kept, refused = report.sites
    assert parse_spec(first.spec) == causal("layer.0")
    assert parse_spec(first.spec_after) == window("layer.0")
    assert (first.operator, first.why) == ("Attention-23", "1.3 times faster")
    assert (first.max_error, second.max_error) == (1e-6, 2e-6)
    assert (first.change, first.change_inputs, second.change) == (0.02, "512 tokens", None)
    assert (kept.operator, kept.why, kept.max_error) == ("", "nothing was faster", None)
    assert [(outcome.name, outcome.applied, outcome.reason) for outcome in kept.passes] == [
        ("quantize.int8", False, "its scores are biased")
    ]
    assert (refused.spec, refused.reason, refused.hint) == ("", "it runs over <queries>", "transpose it")
    assert [row.name for row in report.measurements] == ["max_abs logits", "latency 1×128"]


def test_json_reads_back(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    assert read_report(tmp_path / "report.json") == report
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="report"):
        read_report(tmp_path / "report.json")


def test_text_says_operators_refusals_and_numbers(report: Report) -> None:
    lines = str(report).splitlines()
    assert "2 sites as Attention-23: 1.3 times faster" in lines
    assert "1 site kept as it was: nothing was faster" in lines
    assert "1 site kept as it was: it runs over <queries>" in lines
    assert "quantize.int8 refused at 1 site: its scores are biased" in lines
    assert "largest change of a site's output 0.02 (layer.0, 512 tokens)" in lines
    assert "latency 1×128 20 ms → 10 ms (2.00 times less)" in lines


class Page(HTMLParser):
    """Balanced tags, and everything that would be fetched or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [str(value) for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_draws_the_masks(report: Report) -> None:
    page = Page()
    text = report.to_html()
    page.feed(text)
    assert page.open == []
    assert page.fetched == []
    assert "script" not in page.tags
    assert "<queries>" not in text
    assert "&lt;queries&gt;" in text
    assert page.tags.count("svg") >= 2
    assert "rect" in page.tags
