"""Write the page and the JSON of the coverage benchmark from its rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.zoo.captures import CAPTURES, CLOSE
from benchmarks.zoo.peers import PEERS

Row = Mapping[str, Any]
Table = Mapping[str, Mapping[str, Any]]
MODALITIES = ("text", "vision", "audio", "multimodal", "other")
HEADS = (
    *("types", "sites", "lifted", "observed", "found"),
    *("of captured", "refused", "not captured", "unchecked", "wrong"),
)


def true_sites(row: Row, table: Table) -> int:
    """True sites of a row; of one that ended before they were counted, what the table says."""
    if "truth" in row:
        return int(row["truth"])
    known = table.get(row["model_type"], {}).get(row["attention"], 0)
    return known if isinstance(known, int) else 0


def found_sites(row: Row) -> int:
    """Sites lifted or observed, at most the true ones."""
    return min(row.get("truth", 0), row.get("lifted", 0) + row.get("observed", 0))


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _table(heads: Sequence[str], lines: Iterable[Sequence[Any]]) -> list[str]:
    return [_line(heads), "|" + "|".join(["---"] + ["---:"] * (len(heads) - 1)) + "|", *map(_line, lines), ""]


def _totals(rows: Sequence[Row], table: Table) -> tuple[Any, ...]:
    sites = sum(true_sites(row, table) for row in rows)
    failed = sum(true_sites(row, table) for row in rows if "error" in row)
    return (
        len(rows),
        sites,
        sum(row.get("lifted", 0) for row in rows),
        sum(row.get("observed", 0) for row in rows),
        _percent(sum(map(found_sites, rows)), sites),
        _percent(sum(map(found_sites, rows)), sites - failed),
        sum(row.get("refused", 0) for row in rows),
        failed,
        sum(bool(row.get("unchecked")) for row in rows),
        sum(row.get("wrong", 0) for row in rows),
    )


def _one_form(rows: Sequence[Row], table: Table) -> list[str]:
    def kind(row: Row) -> str:
        return str(row.get("modality") or table.get(row["model_type"], {}).get("modality", "other"))

    groups = [(name, [row for row in rows if kind(row) == name]) for name in MODALITIES]
    lines = [(name, *_totals(group, table)) for name, group in groups if group]
    return _table(("modality", *HEADS), [*lines, ("**all**", *_totals(rows, table))])


def _shortened(text: str, length: int = 110) -> str:
    flat = " ".join(text.split()).replace("|", "\\|")
    return flat if len(flat) <= length else flat[: length - 1] + "…"


def _misses(rows: Sequence[Row], table: Table) -> list[str]:
    """Every site that was not found, by reason."""
    reasons: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        lost = true_sites(row, table) - found_sites(row)
        if lost <= 0:
            continue
        if "error" in row:
            reasons.setdefault(("not captured", _shortened(row["error"])), Counter())[row["model_type"]] += lost
            continue
        refused = [one for one in row["refusals"] if one.get("status") == "refused"][:lost]
        for one in refused:
            reasons.setdefault((one["kind"], _shortened(one["reason"])), Counter())[row["model_type"]] += 1
        if lost > len(refused):
            reasons.setdefault(("no site", "nothing of it is in the graph that was captured"), Counter())[
                row["model_type"]
            ] += lost - len(refused)
    lines = [
        (
            kind,
            reason,
            sum(types.values()),
            _shortened(", ".join(f"{name} {n}" for name, n in sorted(types.items())), 160),
        )
        for (kind, reason), types in sorted(reasons.items(), key=lambda entry: -sum(entry[1].values()))
    ]
    return _table(("kind", "reason", "sites", "types"), lines) if lines else ["Nothing was missed.", ""]


def _changed(rows: Sequence[Row]) -> list[str]:
    lines = [
        (row["model_type"], row["attention"], row["capture"], f"{row['error_end_to_end']:.1e}")
        for row in rows
        if row.get("wrong")
    ]
    if not lines:
        return []
    return [
        "## Outputs that changed",
        "",
        *_table(("type", "attention", "capture", "largest relative difference"), lines),
    ]


def _more(rows: Sequence[Row]) -> list[str]:
    """Where more was lifted than the counter counts, which has its own definition of attention."""
    lines = [
        (
            row["model_type"],
            row["attention"],
            row["capture"],
            row["truth"],
            row["lifted"] + row["observed"],
            row["beyond"],
        )
        for row in rows
        if row.get("more_than_truth") or row.get("beyond")
    ]
    if not lines:
        return []
    heads = ("type", "attention", "capture", "sites", "found with softmax", "found without")
    return ["## More than counted", "", *_table(heads, lines)]


def _peers(rows: Sequence[Row], table: Table) -> list[str]:
    counted = [row for row in rows if row["capture"] in PEERS]
    if not counted:
        return []
    types = {row["model_type"] for row in counted}
    ours = [
        row for row in rows if row["model_type"] in types and row["attention"] == "eager" and row["capture"] in CAPTURES
    ]
    lines: list[Sequence[Any]] = []
    for name in CAPTURES:
        own = [row for row in ours if row["capture"] == name]
        if own:
            sites = sum(true_sites(row, table) for row in own)
            found = sum(map(found_sites, own))
            lines.append((f"attncompile, {name}", len(own), sites, found, _percent(found, sites), "–"))
    for name in PEERS:
        own = [row for row in counted if row["capture"] == name]
        sites = sum(true_sites(row, table) for row in own)
        found = sum(min(row.get("truth", 0), row.get("found", 0)) for row in own)
        lines.append((name, len(own), sites, found, _percent(found, sites), sum("error" in row for row in own)))
    return [
        "## Beside other tools",
        "",
        "The same models in the same run. Inductor: replacements by `fuse_attention`; onnxscript: attention operators",
        "after its fusions for ONNX Runtime. More than the truth counts as the truth; a tool that fails counts zero.",
        "",
        *_table(("tool", "types", "sites", "found", "share", "failed"), lines),
    ]


def _costs(rows: Sequence[Row]) -> list[str]:
    lines = []
    for name in CAPTURES:
        own = [row for row in rows if row["capture"] == name and "lift" in row.get("seconds", {})]
        if own:
            capture = sum(row["seconds"]["capture"] for row in own)
            lift = sum(row["seconds"]["lift"] for row in own)
            peak = max(row["peak_mb"] for row in own)
            lines.append(
                (name, len(own), f"{capture:.0f}", f"{lift:.0f}", _percent(int(1000 * lift), int(1000 * capture)), peak)
            )
    heads = ("capture", "rows", "capture, s", "lift, s", "lift / capture", "largest process, MB")
    return ["## Cost", "", *_table(heads, lines)] if lines else []


def _commits(rows: Sequence[Row]) -> str:
    counted = Counter(row.get("commit") or "before it was noted" for row in rows)
    return ", ".join(f"{name} ({number})" for name, number in counted.most_common())


def write_page(rows: Sequence[Row], table: Table, page: Path, results: Path) -> None:
    """Write both files.

    Args:
        rows: the newest row of each type, attention and capture.
        table: the true sites.
        page: the Markdown to write.
        results: the JSON to write.
    """
    rows = sorted(rows, key=lambda row: (row["attention"], row["capture"], row["model_type"]))
    own = [row for row in rows if row["capture"] in CAPTURES]
    newest: Row = max(rows, key=lambda row: row["date"]) if rows else {"versions": {}, "date": ""}
    said = ", ".join(f"{name} {number}" for name, number in newest["versions"].items())
    lines = [
        "# Coverage",
        "",
        "Written by `python -m benchmarks.coverage --all`; do not edit.",
        "",
        f"{newest['date']}; {said}. Rows by commit: {_commits(rows)}.",
        "",
        "Every transformers model type with attention, tiny and random. *Sites* are the attentions that one forward",
        "pass computes, counted from what it does to tensors by code that knows nothing of lifting",
        "(`benchmarks/zoo/truth.py`). *Found* is lifted or observed. *Wrong* counts rows in which the model's outputs",
        f"change by more than {CLOSE:g} of their largest element when the lowered Specs run in place of lifted sites:",
        "as PyTorch calls for export and dynamo, in ONNX Runtime as the fused operators where there are any for ONNX.",
        "*Not captured* are the sites of models for which the capture itself failed, or gave an ONNX model that ONNX",
        "Runtime does not run; *unchecked* the models for which the check did.",
        "",
        "## Totals",
        "",
    ]
    forms = sorted(
        {(row["attention"], row["capture"]) for row in own}, key=lambda form: (form[0], [*CAPTURES].index(form[1]))
    )
    groups = {form: [row for row in own if (row["attention"], row["capture"]) == form] for form in forms}
    totals = [(f"{a}, {c}", *_totals(group, table)) for (a, c), group in groups.items()]
    for attention in sorted({row["attention"] for row in own}):
        pieces = {row["model_type"]: row for row in groups.get((attention, "dynamo"), [])}
        whole = groups.get((attention, "export"), [])
        either = [pieces.get(row["model_type"], row) if "error" in row else row for row in whole]
        if either and pieces:
            totals.append((f"**{attention}, export, else dynamo**", *_totals(either, table)))
    lines += _table(("form", *HEADS), totals)
    for (attention, capture), group in groups.items():
        lines += [f"## {attention}, {capture}", "", *_one_form(group, table), "What was missed:", ""]
        lines += _misses(group, table)
    lines += _changed(own) + _more(own) + _peers(rows, table) + _costs(own)
    page.write_text("\n".join(lines).rstrip() + "\n")
    head = json.dumps({"versions": newest["versions"], "date": newest["date"]})[:-1]
    body = ",\n".join(json.dumps({key: value for key, value in row.items() if key != "versions"}) for row in rows)
    results.write_text(f'{head}, "rows": [\n{body}\n]}}\n')
