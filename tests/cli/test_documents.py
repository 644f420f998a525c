"""The documents say what is true: links lead somewhere, lists match the code, examples run."""

from __future__ import annotations

import re
import runpy
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tests.cli.conftest import Run

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#]+)(?:#[^)]*)?\)")
INSPECTED = re.compile(
    r"^\$ attncompile inspect (?P<target>examples/\S+)(?P<options>.*)\n(?P<shown>(?s:.*?))```", re.M
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    missing = [
        m["path"] for m in LINK.finditer(document.read_text()) if not (document.parent / m["path"]).exists()
    ]
    assert missing == []


def test_the_page_on_passes_is_what_the_command_prints(run: Run) -> None:
    assert f"```\n{run('passes').out}```" in (ROOT / "docs" / "passes.md").read_text()


def test_the_tour_shows_what_inspect_prints(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = list(INSPECTED.finditer((ROOT / "README.md").read_text()))
    assert found
    for shown in found:
        assert run("inspect", shown["target"], *shown["options"].split()).out == shown["shown"]


def test_every_exit_code_is_documented() -> None:
    from attncompile import cli

    text = (ROOT / "docs" / "cli.md").read_text()
    codes = (cli.DONE, cli.FAILED, cli.MISUSED, cli.NOTHING_FOUND, cli.DEFECT, cli.INTERRUPTED)
    assert [code for code in codes if f"\n| {code} | " not in text] == []


def test_masks_and_passes_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "masks_and_passes.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "mask   j ≤ i and (j > i − 1024 or j < 4)" in out
    assert "i // 1024 = j // 1024" in out


def test_compile_a_model_runs(capsys: pytest.CaptureFixture[str]) -> None:
    if "attncompile" not in {point.name for point in entry_points(group="torch_dynamo_backends")}:
        pytest.skip("a checkout that is not installed")
    runpy.run_path(str(ROOT / "examples" / "compile_a_model.py"), run_name="__main__")
    assert "model.layers.1.self_attn" in capsys.readouterr().out
