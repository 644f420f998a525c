"""What the slow tests gave, for the record.

    python -m pytest -m slow tests/backend --junitxml backend.xml
    python -m pytest -m slow tests/e2e/test_real.py --junitxml real.xml
    python -m benchmarks.slow_tests results.json backend.xml real.xml [--note TEXT]

They take hours and some need packages that CI does not install, so CI does not run them: this says which passed, with
which versions. A test that stands in several of pytest's files counts as it is in the last. Nothing is measured: the
seconds are those of pytest, on a machine that may have done something else too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import machine

PACKAGES = ("transformers", "tokenizers", "onnxruntime", "torchao", "optimum-quanto", "hqq")
"""Whose versions are told beside torch's, where they are installed."""

LONGEST = 10
"""How many of the tests that took longest are told."""


@dataclass(frozen=True)
class Outcome:
    """What became of one test.

    Attributes:
        file: its module, such as ``tests/backend/test_generation.py``.
        name: of the function, with its parameters.
        status: ``passed``, ``failed`` or ``skipped``.
        seconds: that it took.
        said: why it was skipped, or the first line of its failure.
    """

    file: str
    name: str
    status: str
    seconds: float
    said: str = ""


def outcomes(files: Iterable[Path]) -> list[Outcome]:
    """The tests in files of pytest's ``--junitxml``, each once.

    Raises:
        ValueError: for a file that is none of these, or that holds no test.
    """
    found: dict[tuple[str, str], Outcome] = {}
    for file in files:
        try:
            # what was interrupted has no name, and says nothing
            cases = [case for case in ElementTree.parse(file).iter("testcase") if case.get("name")]
        except (OSError, ElementTree.ParseError) as error:
            raise ValueError(f"{file} is no file that pytest --junitxml has written: {error}") from None
        if not cases:
            raise ValueError(f"{file} holds no test; was anything selected?")
        for case in cases:
            made = _outcome(case)
            found[made.file, made.name] = made
    return list(found.values())


def _outcome(case: ElementTree.Element) -> Outcome:
    file = case.get("classname", "").replace(".", "/") + ".py"
    seconds = float(case.get("time", 0.0))
    for tag, status in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        part = case.find(tag)
        if part is not None:
            said = part.get("message", "").strip().partition("\n")[0]
            return Outcome(file, case.get("name", ""), status, seconds, said)
    return Outcome(file, case.get("name", ""), "passed", seconds)


def summary(tests: Iterable[Outcome]) -> dict[str, Any]:
    """Counts in all and by file, what did not pass with the reason, and what took longest."""
    tests = list(tests)
    rows = []
    for file in sorted({test.file for test in tests}):
        own = [test for test in tests if test.file == file]
        rows.append({"file": file, **_counts(own), "seconds": round(sum(test.seconds for test in own))})
    longest = sorted(tests, key=lambda test: -test.seconds)[:LONGEST]
    return {
        **_counts(tests),
        "rows": rows,
        "not_passed": {_named(test): f"{test.status}: {test.said}" for test in tests if test.status != "passed"},
        "longest": {_named(test): round(test.seconds) for test in longest},
    }


def _counts(tests: Iterable[Outcome]) -> dict[str, int]:
    counted = Counter(test.status for test in tests)
    return {status: counted[status] for status in ("passed", "failed", "skipped")}


def _named(test: Outcome) -> str:
    return f"{test.file}::{test.name}"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main(arguments: list[str] | None = None) -> None:
    """Read pytest's files and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--note", default="", help="what else the reader should know")
    parser.add_argument("files", type=Path, nargs="+", help="files that pytest --junitxml has written")
    options = parser.parse_args(arguments)
    try:
        found = summary(outcomes(options.files))
    except ValueError as error:
        parser.error(str(error))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    facts = {**machine(), **_versions(), "commit": commit.stdout.strip()}
    if options.note:
        facts["note"] = options.note
    options.output.write_text(json.dumps({**facts, **found}, indent=1) + "\n", encoding="utf-8")
    print({status: found[status] for status in ("passed", "failed", "skipped")})


if __name__ == "__main__":
    main()
