"""What every generated Gluon module is, as text."""

from __future__ import annotations

import ast
import dataclasses

from attncompile.ir import Spec
from attncompile.kernels.source import WIDTH


def check_text(source: str, spec: Spec, last: str, *markers: str) -> None:
    """Fail unless the module stands alone, states its Spec, and no line of it is too long or unfinished.

    Args:
        source: of the module.
        spec: what it computes.
        last: the function that ends it.
        markers: what the skeleton's templates have to fill.
    """
    tree = ast.parse(source)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= {"concurrent", "functools", "heapq", "torch", "triton"}
    documentation = ast.get_docstring(tree) or ""
    for line in str(dataclasses.replace(spec, name="attention")).splitlines():
        assert line.strip() in documentation
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert len(defined) == len(set(defined)) and defined[-1] == last
    code = source.partition('"""\n\nimport')[2].splitlines()
    assert max(map(len, code)) <= WIDTH
    assert not [marker for marker in (*markers, "CONTEXT", "KNOWN", "# <", "# if ") if marker in source]
