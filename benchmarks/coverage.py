"""How much of the attention in transformers is found: every model type, every way to get a graph.

    python -m benchmarks.coverage --all [--capture export,dynamo,onnx-dynamo,onnx-torchscript] [--attention eager,sdpa]
    python -m benchmarks.coverage --sample 40 --peers 10
    python -m benchmarks.coverage llama t5 --redo

Tiny random models (`benchmarks.zoo.build`) run once under a counter that knows nothing of lifting
(`benchmarks.zoo.truth`); their graphs are lifted; the model then runs again with the lowered Specs in place of every
lifted site and must give the same outputs. Each row is a forked process of its own with a limit on time and memory.
Rows are appended to a ``.jsonl`` file, from which an interrupted run goes on; `docs/coverage.md` and
`benchmarks/results/coverage.json` are written from all rows in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before torch: one thread per process, and no search for models on the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
import transformers.modeling_utils  # every process forked from here has it
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.zoo.build import BuildError, build, model_types
from benchmarks.zoo.captures import CAPTURES, CLOSE, Finding, warm_up
from benchmarks.zoo.modality import modality_of
from benchmarks.zoo.page import write_page
from benchmarks.zoo.peers import PEERS
from benchmarks.zoo.processes import Row, Task, run_tasks, said
from benchmarks.zoo.truth import Truth, count

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
ROWS = Path(tempfile.gettempdir()) / "attncompile_coverage.jsonl"
PAGE = ROOT / "docs" / "coverage.md"
TABLE = ROOT / "benchmarks" / "zoo" / "sites.tsv"
ATTENTIONS = ("eager", "sdpa")
KEY = ("model_type", "attention", "capture")


def read_table() -> dict[str, dict[str, Any]]:
    """`sites.tsv`: per model type the true sites of the eager and the sdpa form, and the modality."""
    lines = [line.split("\t") for line in TABLE.read_text().splitlines() if not line.startswith("#")]
    names = lines[0]
    return {
        row[0]: {name: int(cell) if cell.isdigit() else cell for name, cell in zip(names, row, strict=True)}
        for row in lines[1:]
    }


def versions() -> dict[str, str]:
    """Versions of what took part."""
    names = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "attncompile")
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in names:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that is measured, or nothing outside of a repository."""
    asked = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return asked.stdout.strip() if asked.returncode == 0 else ""


# --- one row ------------------------------------------------------------------------------------------------------


def measure(task: Task) -> Row:
    """Build a model, count its attentions, and count what one capture (or one peer) finds of them."""
    torch.set_num_threads(1)
    row: Row = {"seconds": {}}
    start = time.perf_counter()
    try:
        model, args, kwargs = build(task["model_type"], task["attention"])
    except BuildError as error:
        return {"error": f"build: {str(error)[:600]}", "stage": "build"}
    row["seconds"]["build"] = round(time.perf_counter() - start, 3)
    row["class"] = type(model).__name__
    row["inputs"] = sorted(kwargs)
    row["modality"] = modality_of(model.config, kwargs)
    try:
        truth = count(model, args, kwargs)
    except Exception as error:
        return row | {"error": f"truth: {said(error)}", "stage": "truth"}
    row |= {"truth": len(truth.attentions), "decomposed": truth.decomposed, "fused": truth.fused}
    capture = task["capture"]
    if capture == "truth":
        return row
    start = time.perf_counter()
    try:
        if capture in PEERS:
            row["found"] = PEERS[capture](model, args, kwargs)
            row["seconds"]["peer"] = round(time.perf_counter() - start, 3)
            return row
        finding = CAPTURES[capture](model, args, kwargs)
    except BaseException as error:
        row["seconds"]["capture"] = round(time.perf_counter() - start, 3)
        return row | {"error": said(error), "stage": "capture"}
    return row | _counts(finding, truth, row["seconds"])


def _counts(finding: Finding, truth: Truth, seconds: dict[str, float]) -> Row:
    """The counts of a finding beside the truth."""
    seconds |= {"capture": round(finding.capture_s, 3), "lift": round(finding.lift_s, 3)}
    # attention that has no softmax is outside of what the truth counts
    beyond = [one for one in finding.sites if one.status != "refused" and one.norm not in ("", "softmax")]
    within = [one for one in finding.sites if one not in beyond]
    by_status = Counter(one.status for one in within)
    found = by_status["lifted"] + by_status["observed"]
    missed = max(0, len(truth.attentions) - found)
    refusals = [
        {key: value for key, value in asdict(one).items() if value and key != "norm"}
        for one in within
        if one.status == "refused" or one.kind
    ]
    unseen = Counter(one.module for one in truth.attentions) - Counter(one.name for one in within)
    changed = finding.error is not None and not finding.error <= CLOSE
    return {
        "lifted": by_status["lifted"],
        "observed": by_status["observed"],
        "refused": by_status["refused"],
        "beyond": len(beyond),
        "missed": missed,
        "more_than_truth": max(0, found - len(truth.attentions)),
        "unseen_modules": sorted(unseen.elements())[:8] if missed > by_status["refused"] else [],
        "refusals": refusals,
        "graphs": finding.graphs,
        "notes": finding.notes[:4],
        "replaced": finding.replaced,
        "error_end_to_end": finding.error,
        "unchecked": finding.unchecked,
        "wrong": int(changed),
    }


# --- the run ------------------------------------------------------------------------------------------------------


def sampled(types: Sequence[str], size: int) -> list[str]:
    """Types spread evenly over the list, so that every run takes the same."""
    return [types[position * len(types) // size] for position in range(min(size, len(types)))]


def mixed(model_type: str) -> int:
    """Sorts types so that an interrupted run has seen some of every family."""
    return zlib.crc32(model_type.encode())


def plan(options: argparse.Namespace, types: Sequence[str], done: set[tuple[str, ...]]) -> list[Task]:
    """What is to be measured and is not in the rows yet. A type without an sdpa form is measured as eager alone."""
    captures, table = options.capture.split(","), read_table() if TABLE.exists() else {}
    tasks = [
        {"model_type": kind, "attention": attention, "capture": capture}
        for attention in options.attention.split(",")
        for capture in captures
        for kind in sorted(types, key=mixed)
        if capture == "truth" or table.get(kind, {}).get(attention) != "-"
    ]
    tasks += [
        {"model_type": kind, "attention": "eager", "capture": peer}
        for kind in sampled(types, options.peers)
        for peer in PEERS
    ]
    return [task for task in tasks if options.redo or tuple(task[name] for name in KEY) not in done]


def read_rows(path: Path) -> dict[tuple[str, ...], Row]:
    """The newest row for each type, attention and capture."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {tuple(row[name] for name in KEY): row for row in rows}


def run(options: argparse.Namespace, types: Sequence[str]) -> None:
    """Measure what is missing and append it to the rows."""
    tasks = plan(options, types, set(read_rows(options.rows)))
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    stamp = {"versions": versions(), "date": time.strftime("%Y-%m-%d"), "commit": commit()}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    totals = Counter[str]()
    with Progress(*columns) as progress, options.rows.open("a") as out:
        bar = progress.add_task("coverage", total=len(tasks))
        for task, row in run_tasks(tasks, measure, jobs=options.jobs, limit=options.limit):
            out.write(json.dumps(task | row | stamp, default=str) + "\n")
            out.flush()
            totals.update(
                sites=row.get("truth", 0), found=min(row.get("truth", 0), row.get("lifted", 0) + row.get("observed", 0))
            )
            progress.update(
                bar, advance=1, description=f"{totals['found']}/{totals['sites']} {task['model_type'][:24]:24}"
            )


def write_table(rows: Sequence[Row]) -> None:
    """Write `sites.tsv` from rows that counted the truth; "-" where a type has no sdpa form of its own."""
    kinds: dict[str, dict[str, Any]] = {}
    for row in rows:
        if "truth" in row:
            own = row["attention"] == "eager" or row["fused"]
            cells = kinds.setdefault(row["model_type"], {"modality": row["modality"]})
            cells[row["attention"]] = row["truth"] if own else "-"
    lines = [f"# transformers {transformers.__version__}", "model_type\teager\tsdpa\tmodality"]
    for kind, cells in sorted(kinds.items()):
        if cells.get("eager") or cells.get("sdpa", "-") not in (0, "-"):
            shown = (kind, cells.get("eager", "-"), cells.get("sdpa", "-"), cells["modality"])
            lines.append("\t".join(map(str, shown)))
    TABLE.write_text("\n".join(lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types")
    parser.add_argument("--all", action="store_true", help="every type of sites.tsv")
    parser.add_argument("--every-type", action="store_true", help="every type of transformers, for sites.tsv")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="N types spread over sites.tsv")
    parser.add_argument("--capture", default="export", help=f"of {','.join(CAPTURES)}, or truth to count alone")
    parser.add_argument("--attention", default="eager", help=f"of {','.join(ATTENTIONS)}")
    parser.add_argument("--peers", type=int, default=0, metavar="N", help="count other tools on N of the types")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=int, default=180, help="seconds per row")
    parser.add_argument("--redo", action="store_true", help="measure what is in the rows already")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the .jsonl that is appended to")
    parser.add_argument("--table", action="store_true", help="write sites.tsv from the rows")
    parser.add_argument("--pages", action="store_true", help="write the page and the JSON even if types were named")
    options = parser.parse_args(arguments)
    unknown = set(options.capture.split(",")) - {*CAPTURES, "truth"}
    if unknown:
        parser.error(f"--capture: {', '.join(sorted(unknown))} is none of {', '.join(CAPTURES)}")
    if set(options.attention.split(",")) - set(ATTENTIONS):
        parser.error(f"--attention takes {' and '.join(ATTENTIONS)}")
    table = read_table() if TABLE.exists() else {}
    types = list(options.types)
    if options.every_type:
        types += model_types()
    elif options.all or options.sample:
        types += sampled(list(table), options.sample) if options.sample else list(table)
    if not types and not options.pages and not options.table:
        parser.error("name model types, or give --all or --sample N")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if types:
        warm_up([*options.capture.split(","), *(["onnx-dynamo", "dynamo"] if options.peers else [])])
        run(options, types)
    rows = list(read_rows(options.rows).values())
    if options.table:
        write_table(rows)
    if options.all or options.pages:
        write_page(rows, read_table(), PAGE, RESULTS)


if __name__ == "__main__":
    main()
