"""The export that a conversion to ONNX was made from, as a folder of its own: a peer for benchmarks.

    python -m benchmarks.onnx_plain CONVERTED OUT

It is torch's export with its cache, no site replaced, under the same names, so the conversion's ``genai_config.json``
serves it too. The original must still be where it was.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from attncompile.convert.onnx import parts_of
from attncompile.convert.part import kept_export
from attncompile.convert.source import read_source, reopen


def write_plain(converted: Path, out: Path) -> None:
    """Write the folder, which must not exist."""
    source = read_source(converted)
    parts, _ = parts_of(reopen(converted), source.cache, shared=source.shared, last=source.last_logits)
    out.mkdir(parents=True)
    for part in parts:
        with kept_export(part, converted) as file:
            shutil.copy(file, out / part.file)
            for data in file.parent.glob(f"{file.name}.*"):  # the model names this file
                shutil.copy(data, out / data.name)
    for path in converted.iterdir():
        if path.is_file() and ".onnx" not in path.name:
            shutil.copy(path, out / path.name)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m benchmarks.onnx_plain CONVERTED OUT")
    write_plain(Path(sys.argv[1]), Path(sys.argv[2]))
