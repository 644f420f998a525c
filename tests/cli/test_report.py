"""The report: as JSON, as text, and as one page that stands alone; and a certificate as text."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from attncompile.convert.timing import slower
from attncompile.ir import print_spec
from attncompile.report import (
    Measurement,
    PassOutcome,
    Report,
    SiteReport,
    certificate_text,
    read_report,
    write_report,
)
from attncompile.verify import Certificate, SiteCase, SiteCertificate, measured
from tests.cases import CASES

SPECS = {case.name: case.spec for case in CASES}


def text(case: str, name: str) -> str:
    """The printed Spec of a row of the table, under another name."""
    return print_spec(SPECS[case]).replace(case, name, 1)


@pytest.fixture
def report() -> Report:
    """Two sites that got a window, one that a pass refused, one that was not lifted."""
    windowed = [
        SiteReport(
            name=f"layer.{n}",
            status="lifted",
            spec=text("causal", f"layer.{n}"),
            spec_after=text("window", f"layer.{n}"),
            passes=(PassOutcome(name="sparsify.window(size=4)", applied=True),),
            operator="Attention-23",
            why="1.3 times faster",
            max_error=1e-6 * (n + 1),
            relative_error=1e-6,
            change=0.02 * (n + 1),
            change_inputs="512 tokens",
            source="model.py:3  a @ b",
            block=(f"queries ─ linear layer.{n}.q.weight", "attend(q, k, v)"),
        )
        for n in range(2)
    ]
    kept = SiteReport(
        name="layer.2",
        status="lifted",
        spec=text("causal", "layer.2"),
        passes=(PassOutcome(name="quantize.int8", applied=False, reason="its scores are biased"),),
        why="nothing was faster",
    )
    refused = SiteReport(
        name="layer.3",
        status="refused",
        reason="it runs over <queries>",
        hint="transpose it",
        nearest="softmax <1>",
        check="wrong-axis: it runs over the keys",
    )
    latency = Measurement(name="latency 1×128", before=20.0, after=10.0, unit="ms", note="median of 9")
    return Report(
        model="tiny",
        target="onnx",
        provider="cpu",
        sites=(*windowed, kept, refused),
        measurements=(latency,),
        notes=("a note",),
    )


def test_json_reads_back(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    assert read_report(tmp_path / "report.json") == report
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="report"):
        read_report(tmp_path / "report.json")


def test_sites_kept_for_one_reason_are_told_together(report: Report) -> None:
    kept = next(site for site in report.sites if site.why == "nothing was faster")
    again = kept.model_copy(update={"name": "layer.4"})
    text = str(report.model_copy(update={"sites": (*report.sites, again)}))
    assert "2 sites kept as they were: nothing was faster" in text.splitlines()


def test_a_loss_is_told_in_digits_that_show_it() -> None:
    rows = [
        Measurement(name="latency 1×8", before=0.201, after=0.2249, unit="ms", note=""),
        Measurement(name="latency 1×128", before=20.0, after=123.45, unit="ms", note=""),
        Measurement(name="latency 1×16", before=20.0, after=20.9, unit="ms", note="within a twentieth"),
        Measurement(name="size", before=1.0, after=2.0, unit="MB", note=""),
    ]
    assert slower(rows) == [
        "SLOWER than before: latency 1×8 went from 0.201 to 0.225 ms on this machine",
        "SLOWER than before: latency 1×128 went from 20.0 to 123.5 ms on this machine",
    ]


def test_text_says_operators_refusals_and_numbers(report: Report) -> None:
    lines = str(report).splitlines()
    assert "2 sites as Attention-23: 1.3 times faster" in lines
    assert "1 site kept as it was: nothing was faster" in lines
    assert "1 site kept as it was: it runs over <queries>" in lines
    assert "sparsify.window(size=4) applied at 2 sites" in lines
    assert "quantize.int8 refused at 1 site: its scores are biased" in lines
    assert "largest change of a site's output 0.04 relative (layer.1, on 512 tokens)" in lines
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
    shown = report.to_html()
    page.feed(shown)
    assert page.open == []
    assert page.fetched == []
    assert "script" not in page.tags
    assert "<queries>" not in shown
    assert "&lt;queries&gt;" in shown
    assert page.tags.count("svg") >= 2
    assert "softmax &lt;1&gt;" in shown and "wrong-axis: it runs over the keys" in shown
    assert shown.count("linear layer.0.q.weight") + shown.count("linear layer.1.q.weight") == 1  # one for both
    assert "rect" in page.tags


def certificate(error: float) -> Certificate:
    case = SiteCase(
        seed=0,
        masks="ones",
        sizes={"B": 2},
        dtype="float32",
        max_abs=error,
        max_rel=error,
        misplaced=0,
        tolerance=1e-5,
        passed=error <= 1e-5,
    )
    spec = SPECS["causal"]
    checked = SiteCertificate(
        site="causal",
        spec=print_spec(spec),
        fingerprint=spec.fingerprint(),
        status="checked",
        operator="Attention-23",
        cases=(case,),
    )
    unchanged = SiteCertificate(
        site="other", spec="", fingerprint="", status="unchanged", operator="original", reason="not lifted"
    )
    numbers = (measured("largest difference of logits", None, 2e-6, "batch 1, length 9", 1e-4),)
    return Certificate(model="tiny", target="onnx", plan="0", sites=(checked, unchanged), end_to_end=numbers)


def test_a_certificate_is_told_in_lines() -> None:
    assert certificate_text(certificate(1e-6)).splitlines() == [
        "1 site as Attention-23: error at most 1e-06 where 1e-05 is allowed, in 1 case",
        "1 site unchanged: not lifted",
        "largest difference of logits 2e-06 (1 input) where 0.0001 is allowed",
        "verified",
    ]


def test_a_lossy_conversion_is_not_called_the_same() -> None:
    lossy = certificate(1e-6).model_copy(
        update={"end_to_end": (measured("mean cosine similarity of logits", None, 0.9, "512 tokens", None),)}
    )
    *_, number, verdict = certificate_text(lossy).splitlines()
    assert number == "mean cosine similarity of logits, 512 tokens 0.9"
    assert verdict == "verified: every site computes its Spec; the whole is approximate and only measured"


def test_a_failed_certificate_says_what_failed() -> None:
    *_, failure, verdict = certificate_text(certificate(1e-3)).splitlines()
    assert failure.startswith("FAILED: causal (Attention-23)")
    assert verdict == "NOT VERIFIED"
