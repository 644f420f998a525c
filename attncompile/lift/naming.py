"""Names of sizes and captured tensors as they appear in a Spec."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from attncompile.frontends.graph import Graph
from attncompile.ir import Axis, Expr, Load, Size, TensorType, Value, simplify
from attncompile.ir.expr import TOTAL, TRUE, WEIGHT, Apply, Const, loads, rewrite, substitute, walk
from attncompile.ir.simplify import polynomial

_TAKEN = ("q", "k", "v", "out", "s", "w", "t", "true", "false", "inf", "nan")
"""Names that mean something else in a Spec."""


class Naming:
    """Names of sizes and captured tensors as they appear in a Spec.

    Args:
        graph: the graph.
        named: sizes of axes with what they are called where they are symbolic, such as ``J`` for that of the keys.
        extents: index of a statement to the size of its axis, so that bounds are known under the new names.
    """

    def __init__(self, graph: Graph, named: Sequence[tuple[str, Expr]], extents: Mapping[str, Expr]) -> None:
        self.graph = graph
        # a native size that is called as an axis of the Spec is set apart first
        self.sizes: dict[Expr, Expr] = {Size(n): Size(f"{n}0") for n, _ in named if n in graph.size_names}
        done: set[Expr] = set()
        for name, native in named:
            size = simplify(substitute(native, self.sizes))
            free = [node for node in walk(size) if isinstance(node, Size) and node not in done]
            if isinstance(size, Const) or not free:
                continue
            done.add(Size(name))
            poly = polynomial(size)
            atoms = [*free, *(mono[0] for mono in poly if len(mono) == 1 and isinstance(mono[0], Apply))]
            for atom in atoms:
                if poly.get((atom,)) == 1 and not any(atom in mono for mono in poly if mono != (atom,)):
                    # past and new keys: J is what the tensor shows, the part without a name is what remains; of
                    # S // 8 + 1 it is the quotient that has a name
                    self._call(atom, simplify(Size(name) - (size - atom)))
                    break
            else:
                self._call(native, Size(name))
        self.tensors: dict[str, str] = {}
        self.extents = {axis: self.size(size) for axis, size in extents.items()}

    def _call(self, size: Expr, name: Expr) -> None:
        """Write a size by a name from now on, also where it was set apart before."""
        self.sizes = {native: simplify(substitute(shown, {size: name})) for native, shown in self.sizes.items()}
        self.sizes[size] = name

    def size(self, size: Expr) -> Expr:
        return simplify(substitute(size, self.sizes))

    def type(self, letters: str, sizes: Sequence[Expr], native: str) -> TensorType:
        axes = tuple(Axis(letter, self.size(size)) for letter, size in zip(letters, sizes, strict=True))
        return TensorType(axes, self.graph.infos[native].dtype)

    def expr(self, expr: Expr) -> Expr:
        for load in loads(expr):
            if load.tensor not in self.tensors:
                self.tensors[load.tensor] = self._name(load.tensor)

        def renamed(node: Expr) -> Expr | None:
            if isinstance(node, Load) and node.tensor in self.tensors:
                return Load(self.tensors[node.tensor], node.indices, node.element)
            return self.sizes.get(node)

        # once more under the sizes' names: that J is not 0 is plain, of n // 4 - 2 it was not
        return simplify(rewrite(expr, renamed), self.extents) if expr not in (TRUE, WEIGHT, TOTAL) else expr

    def _name(self, native: str) -> str:
        given = self.graph.inputs.get(native)
        name = re.sub(r"[^\w.]", "_", given.name if given else native)
        name = name if re.match(r"[A-Za-z_]", name) else f"t_{name}"
        while name in self.tensors.values() or name in _TAKEN or re.fullmatch(r"[kv]\d+(_\d+)?", name):
            name += "_"
        return name

    def captured(self) -> list[tuple[Value, str]]:
        found = []
        for native, name in self.tensors.items():
            info = self.graph.infos[native]
            axes = tuple(Axis(f"a{n}", self.size(size)) for n, size in enumerate(info.shape))
            found.append((Value(name, TensorType(axes, info.dtype)), native))
        return found
