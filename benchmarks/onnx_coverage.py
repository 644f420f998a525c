"""How many attention sites of ONNX models become one operator of ONNX Runtime, and compute the same as before.

    python -m benchmarks.onnx_coverage --sample 120 [--exporter dynamo,torchscript] [--files MODEL.onnx …] [--write]

Exports of tiny random models (`benchmarks.zoo.build`), and files as they are, are rewritten for the CPU with
``--prefer fused``. What a lifted site ends in is counted in the model that comes out: one attention operator, several
of which one runs, or plain operators with the reason for each. Every Spec is then run alone, in the operator that was
taken, on drawn inputs, and compared with its definition in float64 (`attncompile.verify`: tolerances follow from the
dtype and the length of the sums); and the whole model is compared with what it computed before.

Each model is a forked process of its own with a limit on time and memory. Rows are appended to a ``.jsonl`` file, from
which an interrupted run goes on; ``--write`` puts all rows of it into `benchmarks/results/onnx_coverage.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Before torch: one thread per process, and no search for models on the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import onnx
import onnx_ir
import onnxruntime
import torch
import transformers
import transformers.modeling_utils  # every process forked from here has it
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from attncompile.codegen.onnx.capabilities import ATTEND_ROWS, SCAN_ROWS
from attncompile.convert.calibration import Call, calls
from attncompile.convert.evidence import Outcome
from attncompile.convert.onnx_rewrite import FUSED, Rewritten, rewrite_onnx
from attncompile.convert.onnx_sites import site_certificates
from attncompile.frontends.checkpoint import open_model
from benchmarks.coverage import commit, mixed, read_rows, read_table, sampled, versions
from benchmarks.zoo.build import BuildError, build
from benchmarks.zoo.captures import CLOSE, Arguments, difference, in_runtime, quiet, torch_onnx, torchscript_onnx
from benchmarks.zoo.processes import Row, Task, run_tasks, said

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "onnx_coverage.json"
ROWS = Path(tempfile.gettempdir()) / "attncompile_onnx_coverage.jsonl"
FILE = "file"
"""What stands in the place of an exporter for a file that somebody else has written."""

Exporter = Callable[[torch.nn.Module, Sequence[Any], Arguments], onnx_ir.Model]
EXPORTERS: Mapping[str, Exporter] = {"dynamo": torch_onnx, "torchscript": torchscript_onnx}
OPERATORS = frozenset({row.operator for row in (*ATTEND_ROWS, *SCAN_ROWS)} | FUSED) - {"decomposition"}
PLAIN = "plain operators"


# --- one row ------------------------------------------------------------------------------------------------------


def measure(task: Task) -> Row:
    """Rewrite one model and count what its sites end in."""
    torch.set_num_threads(1)
    if task["capture"] == FILE:
        opened = open_model(Path(task["path"]))
        return judged(Path(task["path"]).read_bytes(), calls(opened)[0])
    try:
        model, args, kwargs = build(task["model_type"], task["attention"])
    except BuildError as error:
        return {"error": f"build: {str(error)[:300]}"}
    try:
        exported = EXPORTERS[task["capture"]](model, args, kwargs)
    except BaseException as error:
        return {"error": said(error), "stage": "export"}
    return judged(onnx_ir.to_proto(exported).SerializeToString(), Call(tuple(args), kwargs, "example"))


def judged(stored: bytes, call: Call) -> Row:
    """The row of a model."""
    try:
        expected = in_runtime(stored, call)
    except Exception as error:
        return {"error": f"the model does not run as it was given: {said(error)}", "stage": "export"}
    with quiet():
        model = onnx_ir.from_proto(onnx.load_from_string(stored))
        rewritten = rewrite_onnx(model, "model", (), "cpu", "fused", False, ())
    actual = in_runtime(onnx_ir.to_proto(rewritten.model).SerializeToString(), call)
    unequal = [one.site for one in site_certificates(rewritten, "cpu") if not one.passed]
    apart: float | None = difference(list(expected.values()), [actual[name] for name in expected])
    if any(node.op_type.startswith("Random") for node in rewritten.model.graph.all_nodes()):
        apart = None  # ONNX Runtime draws other numbers as soon as a node has another place
    return counted(rewritten) | {"unequal": unequal, "error_end_to_end": apart}


def counted(rewritten: Rewritten) -> Row:
    """What lifted sites end in, and why they end in plain operators where they do."""
    lifted = [one for one in rewritten.outcomes if one.site.status == "lifted"]
    endings = [(ending(rewritten.model, one), one) for one in lifted]
    plain = [(str(one.site.spec), one.reason) for end, one in endings if end == PLAIN]
    return {
        "lifted": len(lifted),
        "operators": dict(Counter(end for end, _ in endings)),
        "plain": [{"spec": spec, "reason": reason, "sites": n} for (spec, reason), n in Counter(plain).items()],
    }


def ending(model: onnx_ir.Model, outcome: Outcome) -> str:
    """What computes a site in a rewritten model: an operator, several in the branches of an ``If``, or plain ones."""
    name, region = outcome.site.name, outcome.site.region
    own = [node for node in model.graph.all_nodes() if node.metadata_props.get("attncompile.site") == name]
    if not own and region is not None:
        wanted = {entry.value for entry in region.outputs}
        own = [node for node in model.graph.all_nodes() if any(value.name in wanted for value in node.outputs)]
    found = sorted(Counter(_attentions(own)))
    return " or ".join(found) if found else PLAIN


def _attentions(nodes: Sequence[onnx_ir.Node]) -> Iterator[str]:
    for node in nodes:
        if node.op_type in OPERATORS:
            yield node.op_type
        for attribute in node.attributes.values():
            if attribute.type is onnx_ir.AttributeType.GRAPH:
                yield from _attentions(list(attribute.as_graph()))


# --- the run ------------------------------------------------------------------------------------------------------


def stratified(table: Mapping[str, Mapping[str, Any]], size: int) -> list[str]:
    """Model types, of each modality as large a share as it has among all; every run takes the same."""
    return sampled(sorted(table, key=lambda kind: (table[kind]["modality"], kind)), size)


def plan(options: argparse.Namespace, types: Sequence[str], done: Sequence[tuple[str, ...]]) -> list[Task]:
    """What is to be measured and is not in the rows yet."""
    tasks: list[Task] = [
        {"model_type": file.name, "attention": "", "capture": FILE, "path": str(file)} for file in options.files
    ]
    tasks += [
        {"model_type": kind, "attention": "eager", "capture": exporter}
        for exporter in options.exporter.split(",")
        for kind in sorted(types, key=mixed)
    ]
    return [
        task
        for task in tasks
        if options.redo or (task["model_type"], task["attention"], task["capture"]) not in set(done)
    ]


def run(options: argparse.Namespace, types: Sequence[str]) -> None:
    """Measure what is missing and append it to the rows."""
    tasks = plan(options, types, list(read_rows(options.rows)))
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    stamp = {"date": time.strftime("%Y-%m-%d"), "commit": commit()}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    totals = Counter[str]()
    with Progress(*columns) as progress, options.rows.open("a") as out:
        bar = progress.add_task("operators", total=len(tasks))
        for task, row in run_tasks(tasks, measure, jobs=options.jobs, limit=options.limit):
            out.write(json.dumps({k: v for k, v in task.items() if k != "path"} | row | stamp, default=str) + "\n")
            out.flush()
            totals.update(lifted=row.get("lifted", 0), one=one_operator(row))
            told = f"{totals['one']}/{totals['lifted']} {task['model_type'][:24]:24}"
            progress.update(bar, advance=1, description=told)


def one_operator(row: Row) -> int:
    """Sites of a row that ended in one attention operator."""
    return sum(n for end, n in row.get("operators", {}).items() if end in OPERATORS)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The counts of some rows, with the reasons of sites that did not become one operator, most frequent first."""
    whole = [row for row in rows if "error" not in row]
    lifted, one = sum(row["lifted"] for row in whole), sum(map(one_operator, whole))
    ends = [row["error_end_to_end"] for row in whole if row["error_end_to_end"] is not None]
    reasons, operators = Counter[str](), Counter[str]()
    for row in whole:
        operators.update(row["operators"])
        for entry in row["plain"]:
            reasons[entry["reason"]] += entry["sites"]
    return {
        "models": len(rows),
        "not exported": sum(row.get("stage") == "export" or row["error"].startswith("build") for row in rows
                            if "error" in row),
        "failed": sum(row.get("stage") != "export" and not row["error"].startswith("build") for row in rows
                      if "error" in row),
        "lifted": lifted,
        "one operator": one,
        "share": round(one / lifted, 4) if lifted else None,
        "operators": dict(operators.most_common()),
        "sites beyond their tolerance": sum(len(row["unequal"]) for row in whole),
        "models beyond 1e-3 end to end": sum(not apart <= CLOSE for apart in ends),
        "largest difference end to end": max(ends, default=None),
        "models that draw random numbers": len(whole) - len(ends),
        "why plain operators": dict(reasons.most_common()),
    }  # fmt: skip


def write(rows: Sequence[Row]) -> None:
    """All rows and their sums into the results."""
    rows = sorted(rows, key=lambda row: (row["capture"], row["model_type"]))
    names = dict.fromkeys(row["capture"] for row in rows)
    record = {
        "versions": versions() | {"onnxruntime": onnxruntime.__version__},
        "summary": {name: summary([row for row in rows if row["capture"] == name]) for name in names},
    }
    head = json.dumps(record, indent=1)[:-2]
    body = ",\n".join(json.dumps(row) for row in rows)
    RESULTS.write_text(f'{head},\n "rows": [\n{body}\n]}}\n')


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types")
    parser.add_argument("--all", action="store_true", help="every type of benchmarks/zoo/sites.tsv")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="N types of it, by shares of modality")
    parser.add_argument("--exporter", default="torchscript", help=f"of {','.join(EXPORTERS)}")
    parser.add_argument("--files", nargs="*", type=Path, default=[], metavar="MODEL.onnx", help="files as they are")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=int, default=180, help="seconds per row")
    parser.add_argument("--redo", action="store_true", help="measure what is in the rows already")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the .jsonl that is appended to")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name} from all rows")
    options = parser.parse_args(arguments)
    unknown = set(options.exporter.split(",")) - {*EXPORTERS}
    if unknown:
        parser.error(f"--exporter: {', '.join(sorted(unknown))} is none of {', '.join(EXPORTERS)}")
    missing = [str(file) for file in options.files if not file.is_file()]
    if missing:
        parser.error(f"--files: there is no {', '.join(missing)}")
    table = read_table()
    types = [*options.types, *(table if options.all else stratified(table, options.sample) if options.sample else [])]
    if not types and not options.files and not options.write:
        parser.error("name model types, or give --all, --sample N or --files")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if types or options.files:
        for exporter in options.exporter.split(",") if types else ():  # what is loaded lazily, before forking
            EXPORTERS[exporter](torch.nn.Linear(2, 2).eval(), (), {"input": torch.ones(2, 2)})
        run(options, types)
    rows = list(read_rows(options.rows).values())
    print(json.dumps(summary(rows), indent=1))
    if options.write:
        write(rows)


if __name__ == "__main__":
    main()
