"""docs/torch.md names every option of the back end, and none that it does not have."""

from __future__ import annotations

import re
from pathlib import Path

from attncompile.backend import Options

PAGE = Path(__file__).parents[2] / "docs" / "torch.md"


def test_every_option_is_documented() -> None:
    rows = re.findall(r"^\| (`.*?`) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(Options.model_fields)
