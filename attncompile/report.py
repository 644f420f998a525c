"""The report of a conversion: what was done at each site and why, as data, as text and as one page."""

from __future__ import annotations

import html
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from attncompile.ir import parse_spec
from attncompile.ir.expr import TRUE
from attncompile.ir.picture import drawn_svg, mask_tiles
from attncompile.ir.types import concrete
from attncompile.lift.guard import find_guard
from attncompile.lift.render import map_sizes, mask_tiles_of
from attncompile.verify.certificate import (
    Certificate,
    SiteCertificate,
    read_record,
    tool_versions,
    write_record,
)

SCHEMA = 1
PICTURE_LENGTH = 1024
"""Positions of the mask pictures; sizes that the Spec fixes stay as they are."""


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, ser_json_inf_nan="strings")


class PassOutcome(_Data):
    """One pass at one site: applied, or refused with a reason."""

    name: str
    applied: bool
    reason: str = ""


class SiteReport(_Data):
    """What became of one site.

    Attributes:
        name: path of the site in the model.
        status: ``lifted``, ``observed`` or ``refused``.
        spec: what it computed before, printed; empty for a refused site.
        spec_after: what it computes now, printed; empty where the original was kept.
        passes: every pass that was asked for, in order.
        operator: what computes it now, such as ``Attention-23``; empty where the original was kept.
        why: why this operator, and why not the others.
        rolled_back: it was rewritten, and the result failed in the way that ``why`` says: the original was put back.
        max_error: largest absolute error of what computes it now against its Spec in float64, over the inputs
            of the certificate; None where the original was kept.
        relative_error: the same as a share of the largest output.
        change: relative distance of the output from the original's, where a lossy pass changed the function:
            ``‖after − before‖ / ‖before‖`` on real text, the largest difference as a share of the largest output on
            random inputs; None where none did. Measured on `change_inputs`.
        change_max: largest absolute difference of both on real text; None where there was none.
        source: source line in the model.
        reason, hint: why it was refused or only observed, and what would help.
        nearest: of a refused site, the nearest thing to attention that was recognised.
        check: the condition that failed, as its kind and a sentence.
        block: the operations around it, one a line, in the order of data flow.
    """

    name: str
    status: Literal["lifted", "observed", "refused"]
    spec: str = ""
    spec_after: str = ""
    passes: tuple[PassOutcome, ...] = ()
    operator: str = ""
    why: str = ""
    rolled_back: bool = False
    max_error: float | None = None
    relative_error: float | None = None
    change: float | None = None
    change_max: float | None = None
    change_inputs: str = ""
    source: str = ""
    reason: str = ""
    hint: str = ""
    nearest: str = ""
    check: str = ""
    block: tuple[str, ...] = ()


class Measurement(_Data):
    """One number of the whole model, before and after: an error, a perplexity, a size, a latency.

    Attributes:
        name: what is measured, such as ``latency 16×128``.
        unit: of both numbers; empty for a plain number.
        before: of the original; None where only the change has a meaning (an error).
        after: of the result.
        note: how it was measured.
    """

    name: str
    after: float
    before: float | None = None
    unit: str = ""
    note: str = ""


def machine() -> str:
    """Processor, cores and system in a few words: latencies mean nothing without it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()}, {cores} cores, {platform.system()} {platform.machine()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or "unknown processor"


class Report(_Data):
    """The whole conversion.

    Attributes:
        model: what was converted.
        target: ``onnx``, ``torch`` or ``pt2``; provider: ``cpu`` or ``cuda``.
        passes: what was asked for, as it was written.
        sites: in graph order.
        measurements: end to end, before and after.
        machine: where latencies were measured.
        versions: of the tools that took part.
        notes: what the reader should know.
    """

    schema_version: int = Field(default=SCHEMA, alias="schema")
    model: str
    target: str
    provider: str = ""
    passes: str = "fuse"
    sites: tuple[SiteReport, ...]
    measurements: tuple[Measurement, ...] = ()
    machine: str = Field(default_factory=machine)
    versions: dict[str, str] = Field(default_factory=tool_versions)
    notes: tuple[str, ...] = ()

    def to_text(self) -> str:
        """A few lines for the terminal: operators, refusals and measurements."""
        return "\n".join(_text_lines(self))

    def __str__(self) -> str:
        return self.to_text()

    def to_html(self) -> str:
        """One page without scripts or outside resources; mask pictures are inline SVG."""
        return _page(self)


def write_report(report: Report, folder: Path) -> None:
    """Write ``report.json`` and ``report.html``."""
    write_record(report, folder / "report.json")
    (folder / "report.html").write_text(report.to_html(), encoding="utf-8")


def read_report(file: Path) -> Report:
    """Read ``report.json`` back. Raises ValueError, in one sentence, when it is none."""
    return read_record(Report, file, "report")


# --- text ---------------------------------------------------------------------------------------------------


def _text_lines(report: Report) -> list[str]:
    lines = []
    kept = [site for site in report.sites if not site.operator]
    by_operator: dict[tuple[str, str], int] = {}
    for site in report.sites:
        if site.operator:
            by_operator[site.operator, site.why] = by_operator.get((site.operator, site.why), 0) + 1
    for (operator, why), count in by_operator.items():
        lines.append(f"{_count(count, 'site')} as {operator}" + (f": {why}" if why else ""))
    lines += [f"{site.name} ROLLED BACK to what it was: {site.why}" for site in kept if site.rolled_back]
    reasons: dict[str, int] = {}
    for site in kept:
        if site.rolled_back:
            continue
        text = site.reason or site.why or "; ".join(p.reason for p in site.passes if not p.applied)
        reasons[text] = reasons.get(text, 0) + 1
    lines += [
        f"{_count(count, 'site')} kept as {'it was' if count == 1 else 'they were'}: {text}"
        for text, count in reasons.items()
    ]
    applied = [outcome.name for site in report.sites for outcome in site.passes if outcome.applied]
    lines += [f"{name} applied at {_count(applied.count(name), 'site')}" for name in dict.fromkeys(applied)]
    refused = [(p.name, p.reason) for site in report.sites for p in site.passes if not p.applied]
    lines += [
        f"{name} refused at {_count(refused.count((name, why)), 'site')}: {why}" for name, why in dict.fromkeys(refused)
    ]
    errors = [site.max_error for site in report.sites if site.max_error is not None]
    if errors:
        lines.append(f"largest error of a site against its Spec {max(errors):.2g}")
    changes = [site for site in report.sites if site.change is not None]
    if changes:
        worst = max(changes, key=lambda site: site.change or 0.0)
        absolute = "" if worst.change_max is None else f", at most {worst.change_max:.2g} an element"
        lines.append(
            f"largest change of a site's output {worst.change:.2g} relative{absolute} ({worst.name}, on "
            f"{worst.change_inputs})"
        )
    lines += _distance_lines([(row.name, row.after) for row in report.measurements if row.before is None])
    pairs = [(row.name, row.before, row.after) for row in report.measurements if row.before is not None]
    lines += _error_lines([pair for pair in pairs if pair[0].startswith(_ERROR)])
    lines += [
        _measurement_text(row)
        for row in report.measurements
        if row.before is not None and not row.name.startswith(_ERROR)
    ]
    return lines + [f"note: {note}" for note in report.notes]


def _measurement_text(row: Measurement) -> str:
    assert row.before is not None
    change = f"{_number(row.before, row.unit)} → {_number(row.after, row.unit)}"
    return f"{row.name} {change}{_ratio(row.before, row.after)}"


def _distance_lines(rows: Sequence[tuple[str, float]]) -> list[str]:
    """Numbers without a before; the largest of something on several inputs (named after a comma) once."""
    found: dict[str, list[float]] = {}
    for name, value in rows:
        found.setdefault(name.partition(",")[0] if name.startswith("largest") else name, []).append(value)
    return [
        f"{name} {max(values):.2g} ({_count(len(values), 'input')})"
        if name.startswith("largest")
        else f"{name} {values[0]:.4g}"
        for name, values in found.items()
    ]


_ERROR = "error of "
"""How the names of errors before and after begin; what they were measured on follows the first comma."""


def _error_lines(rows: Sequence[tuple[str, float, float]]) -> list[str]:
    """Errors before and after, one line for each on the input where it grew most (or shrank least)."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, before, after in rows:
        found.setdefault(name.partition(",")[0], []).append((before, after))
    lines = []
    for name, pairs in found.items():
        before, after = max(pairs, key=lambda pair: pair[1] - pair[0])
        where = f"worst of {len(pairs)} inputs" if len(pairs) > 1 else "1 input"
        lines.append(f"{name} {before:.2g} → {after:.2g} ({where})")
    return lines


def _ratio(before: float, after: float) -> str:
    """How many times less or more, where it is at least one per cent; worse is said as plainly as better."""
    if min(before, after) <= 0 or max(before, after) / min(before, after) < 1.01:
        return ""
    return f" ({before / after:.2f} times less)" if before > after else f" ({after / before:.2f} times MORE)"


def _number(value: float, unit: str) -> str:
    return f"{value:.4g}{' ' if unit else ''}{unit}"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def certificate_text(certificate: Certificate) -> str:
    """A certificate as a few lines: operators with their largest error, the whole model, and the verdict."""
    lines = []
    by_operator: dict[str, list[SiteCertificate]] = {}
    lines += [f"{site.site} rolled back: {site.reason}" for site in certificate.sites if site.status == "rolled back"]
    for site in certificate.sites:
        if site.status == "rolled back":
            continue
        by_operator.setdefault(site.operator if site.status == "checked" else "", []).append(site)
    for operator, sites in by_operator.items():
        cases = [case for site in sites for case in site.cases]
        if not operator:
            lines.append(f"{_count(len(sites), 'site')} unchanged: {sites[0].reason}")
            continue
        worst = max(cases, key=lambda case: case.max_abs / case.tolerance if case.tolerance else case.max_abs)
        lines.append(
            f"{_count(len(sites), 'site')} as {operator}: error at most {worst.max_abs:.2g} where "
            f"{worst.tolerance:.2g} is allowed, in {_count(len(cases), 'case')}"
        )
    for allowed in dict.fromkeys(entry.tolerance for entry in certificate.end_to_end if entry.before is None):
        rows = [
            (f"{entry.metric}, {entry.inputs}", entry.after)
            for entry in certificate.end_to_end
            if entry.before is None and entry.tolerance == allowed
        ]
        suffix = f" where {allowed:.2g} is allowed" if allowed is not None else ""
        lines += [line + suffix for line in _distance_lines(rows)]
    pairs = [(e.metric, e.inputs, e.before, e.after) for e in certificate.end_to_end if e.before is not None]
    lines += _error_lines([(f"{m}, {on}", b, a) for m, on, b, a in pairs if m.startswith(_ERROR)])
    lines += [f"{m}, {on}: {b:.4g} → {a:.4g}" for m, on, b, a in pairs if not m.startswith(_ERROR)]
    lines += [f"FAILED: {failure}" for failure in certificate.failures()]
    judged = not certificate.end_to_end or any(entry.tolerance is not None for entry in certificate.end_to_end)
    approximate = "" if judged else ": every site computes its Spec; the whole is approximate and only measured"
    return "\n".join([*lines, f"verified{approximate}" if certificate.passed else "NOT VERIFIED"])


# --- the page -----------------------------------------------------------------------------------------------

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
pre { background: #f5f5f2; padding: .7rem; overflow-x: auto; border-radius: 4px; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.site { border-top: 1px solid #ddd; padding: .8rem 0; }
.site { display: grid; grid-template-columns: 1fr auto; gap: 1rem; }
.status { border-radius: 3px; padding: 0 .4rem; color: #fff; font-size: .85rem; }
.lifted { background: #2f7d4f; } .observed { background: #a06a00; } .refused { background: #b03030; }
.quiet { color: #666; }
figure { margin: 0; text-align: center; } figcaption { color: #666; font-size: .8rem; }
"""


def _page(report: Report) -> str:
    say = html.escape
    head = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{say(report.model)}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{say(report.model)} → {say(report.target)}"
        f"{' on ' + say(report.provider) if report.provider else ''}</h1>\n"
    )
    counts = ", ".join(
        f"{sum(site.status == status for site in report.sites)} {status}"
        for status in ("lifted", "observed", "refused")
    )
    rolled_back = sum(site.rolled_back for site in report.sites)
    counts += f", {rolled_back} rolled back" if rolled_back else ""
    total = _count(len(report.sites), "attention site")
    summary = f"<p>{total}: {counts}. Passes: <code>{say(report.passes)}</code>.</p>\n"
    parts = [head, summary, _measurement_table(report), "<h2>Sites</h2>\n"]
    parts += [_site_block(names, site) for names, site in _alike(report.sites)]
    if report.notes:
        items = "".join(f"<li>{say(note)}</li>" for note in report.notes)
        parts.append(f"<h2>Notes</h2><ul>{items}</ul>\n")
    tools = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    parts.append(
        f'<p class="quiet">Measured on {say(report.machine)}; latencies hold for this machine only. '
        f"{say(tools)}.</p>\n</body></html>\n"
    )
    return "".join(parts)


def _measurement_table(report: Report) -> str:
    if not report.measurements:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(row.name)}</td>"
        f'<td class="number">{"" if row.before is None else html.escape(_number(row.before, row.unit))}</td>'
        f'<td class="number">{html.escape(_number(row.after, row.unit))}</td>'
        f'<td class="quiet">{html.escape(row.note)}</td></tr>'
        for row in report.measurements
    )
    heads = "<tr><th></th><th>before</th><th>after</th><th></th></tr>"
    return f"<h2>End to end</h2><table>{heads}{rows}</table>\n"


_NUMBER = re.compile(r"\d+")


def _alike(sites: tuple[SiteReport, ...]) -> list[tuple[list[str], SiteReport]]:
    """Sites that differ by name and measured numbers alone, each with the one of largest error."""
    groups: dict[str, list[SiteReport]] = {}
    for site in sites:
        plain = site.model_copy(
            update={
                "name": "",
                "max_error": None,
                "relative_error": None,
                "change": None,
                "change_max": None,
                "spec": site.spec.replace(site.name, "", 1),
                "spec_after": site.spec_after.replace(site.name, "", 1),
                "block": tuple(_NUMBER.sub("·", line) for line in site.block),
            }
        )
        groups.setdefault(plain.model_dump_json(), []).append(site)
    return [
        (
            [site.name for site in group],
            max(group, key=lambda site: (site.change or 0.0, site.max_error or 0.0)),
        )
        for group in groups.values()
    ]


def _site_block(names: list[str], site: SiteReport) -> str:
    say = html.escape
    title = say(names[0]) if len(names) == 1 else f"{say(names[0])} … {say(names[-1])} ({len(names)} sites)"
    lines = [
        f'<p><strong>{title}</strong> <span class="status {site.status}">{site.status}</span><br>'
        f'<span class="quiet">{say(site.source)}</span></p>'
    ]
    if site.spec:
        lines.append(f"<pre>{say(site.spec)}</pre>")
    if site.spec_after and site.spec_after != site.spec:
        lines.append(f"<p>became</p><pre>{say(site.spec_after)}</pre>")
    guard = find_guard(parse_spec(site.spec)) if site.spec else None
    if guard is not None:
        lines.append(f'<p class="quiet">{say(str(guard))}; used for the picture alone</p>')
    if site.block:
        text = say("\n".join(site.block))
        lines.append(f"<details><summary>operations around it</summary><pre>{text}</pre></details>")
    if site.nearest:
        lines.append(f"<p>Found: {say(site.nearest)}</p>")
    if site.reason:
        lines.append(f"<p>{say(site.reason)}{'; ' + say(site.hint) if site.hint else ''}</p>")
    if site.check:
        lines.append(f'<p class="quiet">Failed check: {say(site.check)}</p>')
    if site.rolled_back:
        lines.append(f"<p><strong>Rolled back to what it was</strong>: {say(site.why)}</p>")
    if site.operator:
        because = f": {say(site.why)}" if site.why else ""
        lines.append(f"<p>Computed by <strong>{say(site.operator)}</strong>{because}</p>")
    for outcome in site.passes:
        said = "applied" if outcome.applied else "refused"
        because = f", {say(outcome.reason)}" if outcome.reason else ""
        lines.append(f"<p>{say(outcome.name)}: {said}{because}</p>")
    if site.max_error is not None:
        relative = f", {site.relative_error:.2g} relative" if site.relative_error is not None else ""
        lines.append(f"<p>Error against its Spec {site.max_error:.2g}{relative}</p>")
    if site.change is not None:
        on = f" on {say(site.change_inputs)}" if site.change_inputs else ""
        absolute = "" if site.change_max is None else f", at most {site.change_max:.2g} an element"
        lines.append(f"<p>Output changed by {site.change:.2g} relative{absolute}{on}</p>")
    drawn = "".join(_figure(text) for text in dict.fromkeys((site.spec, site.spec_after)) if text)
    return f'<section class="site"><div>{"".join(lines)}</div><div>{drawn}</div></section>\n'


def _figure(spec_text: str) -> str:
    """The mask of a printed Spec as inline SVG: dark where all is visible, light where part is."""
    spec = parse_spec(spec_text)
    attend = spec.attend()
    if attend is None:
        return ""
    sizes = map_sizes(spec, PICTURE_LENGTH)
    types = spec.types()
    queries, keys = (concrete(types[name].sizes[2], sizes) for name in (attend.query, attend.key))
    tiles = mask_tiles_of(spec, PICTURE_LENGTH, guard=find_guard(spec))
    if tiles is None:
        tiles = mask_tiles(TRUE, queries, keys)
    return f"<figure>{drawn_svg(tiles)}<figcaption>{queries} queries × {keys} keys</figcaption></figure>"
