"""What each ATen operation does to elements: one row per operation.

A row is a function of a :class:`~attncompile.frontends.aten_builder.Builder` and the arguments of the call; it emits
the nodes that state the call and returns the name of the last one. A new operation is one line in the table of its
family and one line in ``tests/frontends/test_aten.py``.
"""

from __future__ import annotations

from attncompile.frontends.aten_attention import ATTENTION
from attncompile.frontends.aten_builder import Row
from attncompile.frontends.aten_creation import CREATION
from attncompile.frontends.aten_formulas import FORMULAS
from attncompile.frontends.aten_movement import MOVEMENT
from attncompile.frontends.aten_pointwise import POINTWISE
from attncompile.frontends.aten_reduction import REDUCTION
from attncompile.frontends.aten_selection import SELECTION

ROWS: dict[str, Row] = {**POINTWISE, **FORMULAS, **CREATION, **MOVEMENT, **SELECTION, **REDUCTION, **ATTENTION}
"""ATen operation (without overload) to the statement of what it does."""
