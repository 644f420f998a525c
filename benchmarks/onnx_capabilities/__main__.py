"""Try every attention operator on every version of ONNX Runtime, and write the table and its page.

    python -m benchmarks.onnx_capabilities                        # the installed version: print it, write nothing
    python -m benchmarks.onnx_capabilities --versions FOLDER      # all of them, installed into FOLDER where missing
    python -m benchmarks.onnx_capabilities --provider cuda --write   # where onnxruntime-gpu is installed

Rows and versions that are not tried keep what the table says of them.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from attncompile.codegen.onnx import tried
from attncompile.codegen.onnx.tried import COLUMNS, Outcome, Tried, minor_version
from benchmarks.onnx_capabilities.attempt import Attempt
from benchmarks.onnx_capabilities.page import page
from benchmarks.onnx_capabilities.trial import PROVIDERS, Row, Verdict, all_attempts, judge, prepare

ROOT = Path(__file__).resolve().parents[2]
TABLE, PAGE = ROOT / "codegen" / "onnx" / tried.TABLE, ROOT / "docs" / "onnx-operators.md"
RELEASES = tuple(f"1.{minor}" for minor in range(22, 33))
"""Versions that the table has columns for; the newest patch release of each is tried."""

_RAISED_BY = re.compile(
    r"(?:(?:const|static|virtual|void|bool|T\*?|\S+::\S+) )*[\w<>~*]+(?:::[\w<>~]+)+\((?:[^()]|\([^()]*\))*\)"
    r"(?: const)?(?: \[with [^\]]*\])? "
)
"""The C++ function that raised an error, as ONNX Runtime writes it in front of what is wrong."""

ELSEWHERE = "no kernel of this provider: only the CPU has one"

SAID = 160
"""Characters of an error that are kept."""

Key = tuple[str, str, str, int, str, str]


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.onnx_capabilities", description=__doc__)
    parser.add_argument("--versions", type=Path, help="folder with a folder for each version, installed if missing")
    parser.add_argument("--releases", nargs="+", default=list(RELEASES), help="versions to try (with --versions)")
    parser.add_argument("--provider", choices=sorted(PROVIDERS), default="cpu")
    parser.add_argument("--operator", action="append", help="try this operator only; may be given again")
    parser.add_argument("--write", action="store_true", help="write table and page without --versions, too")
    given = parser.parse_args(arguments)
    attempts = [one for one in all_attempts() if not given.operator or one.operator in given.operator]
    if not attempts:
        parser.error(f"no such operator; they are {', '.join(sorted({one.operator for one in all_attempts()}))}")
    sites: list[Path | None] = [None]
    if given.versions is not None:
        package = "onnxruntime-gpu" if given.provider == "cuda" else "onnxruntime"
        sites = [site for release in given.releases if (site := _installed(given.versions, package, release))]
    with tempfile.TemporaryDirectory(prefix="onnx-capabilities-") as scratch:
        rows = prepare(Path(scratch), attempts)
        found: dict[str, list[Verdict]] = {}
        for site in sites:
            version, verdicts = judge(Path(scratch), rows, site, given.provider)
            found[version] = verdicts
            counts = {name: sum(v.outcome == name for v in verdicts) for name in tried.OUTCOMES}
            print(version, ", ".join(f"{count} {name}" for name, count in counts.items() if count), flush=True)
    if given.versions is None and not given.write:
        for version, verdicts in found.items():
            for row, verdict in zip(rows, verdicts, strict=True):
                key = _key(row.attempt, row.dtype, given.provider)
                print(version, *key[1:], verdict.outcome, verdict.said, sep="\t")
        return
    _write(rows, found, given.provider, complete=not given.operator)


def _installed(folder: Path, package: str, release: str) -> Path | None:
    """The folder of the newest patch release, installed where it is missing; ``None`` where there is none."""
    site = folder / f"{package}-{release}"
    if not site.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        wanted = ["--target", str(site), f"{package}=={release}.*"]
        done = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{package} {release}: skipped, {done.stderr.strip().splitlines()[-1]}", flush=True)
            return None
    return site


def _key(attempt: Attempt, dtype: str, provider: str) -> Key:
    opset = attempt.opset if not attempt.domain and attempt.operator != "IR version" else 0
    return provider, attempt.domain, attempt.operator, opset, attempt.feature, dtype


def _write(rows: Sequence[Row], found: Mapping[str, Sequence[Verdict]], provider: str, *, complete: bool) -> None:
    """Merge what was found into the table, and make the page of it."""
    old = {_key_of(row): row for row in (tried.table() if TABLE.exists() else ())}
    exact = _exact_versions() | {minor_version(version): version for version in found}
    made: dict[Key, Tried] = {}
    for place, row in enumerate(rows):
        key = _key(row.attempt, row.dtype, provider)
        known = old.get(key)
        outcomes: dict[str, Outcome] = dict(known.outcomes) if known else {}
        said = known.said if known else ""
        for version, verdicts in found.items():
            outcomes[minor_version(version)] = verdicts[place].outcome
        newest_first = sorted(found, key=_number, reverse=True)
        told = [verdicts.said for version in newest_first if (verdicts := found[version][place]).outcome != "right"]
        if all(outcome == "right" for outcome in outcomes.values()):
            said = ""
        elif told:
            said = _cleaned(told[0])
        made[key] = Tried(*key, outcomes=outcomes, said=said)
    kept = {key: row for key, row in old.items() if key not in made and (not complete or row.provider != provider)}
    order = {_key(one, dtype, name): place for place, (name, one, dtype) in enumerate(
        (name, one, dtype) for name in ("cpu", "cuda") for one in all_attempts() for dtype in one.dtypes)}  # fmt: skip
    whole = sorted((made | kept).items(), key=lambda entry: order.get(entry[0], len(order)))
    table = [row for _, row in whole]
    versions = sorted({version for row in table for version in row.outcomes}, key=_number)
    TABLE.write_text(_text(table, versions, exact), encoding="utf-8")
    PAGE.write_text(page(table, versions, exact), encoding="utf-8")


def _key_of(row: Tried) -> Key:
    return row.provider, row.domain, row.operator, row.opset, row.feature, row.dtype


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _text(rows: Sequence[Tried], versions: Sequence[str], exact: Mapping[str, str]) -> str:
    today = datetime.date.today().isoformat()
    lines = [
        f"# written by benchmarks/onnx_capabilities, {today}: what was found by trying, never from documentation",
        "# tried: " + " ".join(exact[version] for version in versions),
        "\t".join((*COLUMNS, *versions)),
    ]
    for row in rows:
        cells = (row.provider, row.domain, row.operator, str(row.opset), row.feature, row.dtype, row.said)
        lines.append("\t".join((*cells, *(row.outcomes.get(version, "") for version in versions))))
    return "\n".join(lines) + "\n"


def _exact_versions() -> dict[str, str]:
    """The patch releases that the table names, by minor version."""
    if not TABLE.exists():
        return {}
    named = re.search(r"^# tried: (.*)$", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    return {minor_version(version): version for version in named[1].split()} if named else {}


def _cleaned(said: str) -> str:
    """An error without codes, places in ONNX Runtime's source, and names of scratch files."""
    said = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", said)
    said = re.sub(r"Non-zero status code returned while running (\w+) node\. Name:'\w*' Status Message: ", "", said)
    said = re.sub(r"Load model from \S+ failed:\s*", "", said)
    said = re.sub(r"/onnxruntime_src/\S+:\d+ ", "", said)
    said = _RAISED_BY.sub("", said, count=1)
    said = re.sub(r"This session contains graph nodes that are assigned to the default CPU EP.*", ELSEWHERE, said)
    said = re.sub(r"In Node, .* Error (?=Unrecognized|Node)", "", said)
    said = re.sub(r"ONNX Runtime only \*guarantees\* .*? opset versions\. ", "", said)
    said = re.sub(r" node with name '\w*'", "", said)
    said = re.sub(r"\s+", " ", said).strip()
    return said if len(said) <= SAID else said[: SAID - 1] + "…"


if __name__ == "__main__":
    main()
