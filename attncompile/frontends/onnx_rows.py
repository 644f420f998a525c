"""What each ONNX operator does to elements: one row per operator."""

from __future__ import annotations

from collections.abc import Mapping

from attncompile.frontends.onnx_attention import CALLS, CONTRIB_CALLS
from attncompile.frontends.onnx_builder import Row
from attncompile.frontends.onnx_movement import MOVEMENT
from attncompile.frontends.onnx_pointwise import POINTWISE
from attncompile.frontends.onnx_products import CONTRIB_PRODUCTS, PRODUCTS
from attncompile.frontends.onnx_reduction import REDUCTION
from attncompile.frontends.onnx_selection import SELECTION

ROWS: dict[str, Row] = {**POINTWISE, **MOVEMENT, **SELECTION, **PRODUCTS, **REDUCTION, **CALLS}
"""Operators of the standard set."""
CONTRIB_ROWS: dict[str, Row] = {**CONTRIB_PRODUCTS, "Trilu": SELECTION["Trilu"], **CONTRIB_CALLS}
"""Operators of ONNX Runtime's own set (com.microsoft)."""

EVERY_OUTPUT = frozenset({"Split", "Dropout"})
"""Operators whose rows state every output; of the others only the first is stated."""


def rows_of(domain: str) -> Mapping[str, Row]:
    """The table of an operator set."""
    return {"": ROWS, "ai.onnx": ROWS, "com.microsoft": CONTRIB_ROWS}.get(domain, {})
