"""The record of the slow tests says what pytest said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import slow_tests

FIRST = """<testsuites><testsuite>
<testcase classname="tests.backend.test_one" name="test_a[x]" time="3.25"/>
<testcase classname="tests.backend.test_one" name="test_b" time="1">
<failure message="assert 1 == 2&#10;more"/></testcase>
<testcase classname="tests.e2e.test_two" name="test_c" time="0.5"><skipped message="could not import 'hqq'"/></testcase>
</testsuite></testsuites>"""

SECOND = """<testsuite><testcase classname="tests.backend.test_one" name="test_b" time="2"/>
<testcase time="0.01"/></testsuite>"""


def test_counts_reasons_and_a_second_run(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("first.xml", "second.xml")]
    for file, text in zip(files, (FIRST, SECOND), strict=True):
        file.write_text(text, encoding="utf-8")
    first = slow_tests.summary(slow_tests.outcomes(files[:1]))
    assert first["not_passed"] == {
        "tests/backend/test_one.py::test_b": "failed: assert 1 == 2",
        "tests/e2e/test_two.py::test_c": "skipped: could not import 'hqq'",
    }
    slow_tests.main([str(tmp_path / "out.json"), *map(str, files), "--note", "in two parts"])
    both = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert (both["passed"], both["failed"], both["skipped"]) == (2, 0, 1)
    assert both["rows"][0] == {
        "file": "tests/backend/test_one.py", "passed": 2, "failed": 0, "skipped": 0, "seconds": 5,
    }  # fmt: skip
    assert next(iter(both["longest"])) == "tests/backend/test_one.py::test_a[x]"
    assert both["torch"] and both["python"] and both["note"] == "in two parts"


@pytest.mark.parametrize("text", ["", "no markup", "<testsuite/>"])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file.xml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit):
        slow_tests.main([str(tmp_path / "out.json"), str(file)])
    assert "file.xml" in capsys.readouterr().err and not (tmp_path / "out.json").exists()
