"""The page on Hugging Face models runs, and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.search(r"```python\n(?P<code>.*?)```\n\n```\n(?P<printed>.*?)```", PAGE.read_text(), re.S)
    assert shown is not None
    exec(compile(shown["code"], str(PAGE), "exec"), {})
    assert capsys.readouterr().out == shown["printed"]
