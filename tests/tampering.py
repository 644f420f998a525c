"""A JSON file changed at one place, as somebody might by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def change(file: Path, path: Sequence[str | int], value: object) -> None:
    """Write another value at a path of keys and positions."""
    content = json.loads(file.read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(content))
