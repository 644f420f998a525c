"""What an ONNX file holds, for tests of conversions."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from attncompile.convert.clean import complaints


def operators(file: Path) -> list[str]:
    """Operator types of the nodes of a file and of the bodies in it, one entry for each node."""
    return [node.op_type for node in ir.load(file).graph.all_nodes()]


def assert_clean(folder: Path) -> None:
    """Nobody has anything to say against the models of a conversion, their exports without weights among them."""
    files = sorted(folder.glob("*.onnx"))
    assert files
    assert {file.name: [str(one) for one in complaints(file, "cpu")] for file in files} == {f.name: [] for f in files}
