"""What an ONNX file holds, for tests of conversions."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir


def operators(file: Path) -> list[str]:
    """Operator types of the nodes of a file and of the bodies in it, one entry for each node."""
    return [node.op_type for node in ir.load(file).graph.all_nodes()]
