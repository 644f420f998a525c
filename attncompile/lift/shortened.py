"""The same region and Spec at shorter lengths, for proofs of graphs that were compiled for one long length.

Such a graph holds its lengths as numbers: in the shapes of values and in what its operations are given. An attention
map of 8192 queries and keys is too much to compute for a proof. So every number that is a length, a multiple of one or
near one is taken to be made of it, in the region and in the Spec alike, and both run at short lengths. A number that
only happens to be such a multiple makes the region fail, or differ from the Spec: then nothing is concluded, and the
sizes of the graph have to be run. Two functions of their lengths that agree at several short ones are held to agree at
the long one, as they are where a graph leaves its lengths open.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from attncompile.frontends.graph import Graph, Info
from attncompile.ir import Expr, Spec, TensorType
from attncompile.ir.attend import Attend
from attncompile.ir.expr import Const, rewrite
from attncompile.ir.types import Value
from attncompile.lift.program import Binding, Region

SHORTEST = 256
"""Lengths from which on numbers are shortened; shorter ones are confused with heads and channels too easily."""

LARGEST = 2**48
"""Above are numbers that stand for the end of anything."""

NEAR = 8
"""How far from a length, or twice one, a number is made of it: the keys of a cache and a few new ones."""

LARGEST_OPERANDS = 10**7
"""Elements of query, key and value above which they are shortened though the map is small: a step, a long cache."""

SHORT = ((13, 21), (24, 40), (192, 320))
"""Lengths tried, for the shortest and the next one; the last for regions that cut lengths into blocks."""


@dataclass(frozen=True)
class Shortening:
    """What numbers become.

    Attributes:
        lengths: the graph's lengths, and what they are shortened to.
    """

    lengths: Mapping[int, int]

    def __call__(self, number: int) -> int:
        """The number at the short lengths: itself where it is not made of a length."""
        if not SHORTEST <= number <= LARGEST:
            return number
        if number in self.lengths:
            return self.lengths[number]
        for length in sorted(self.lengths, reverse=True):
            times, rest = divmod(number, length)
            if rest == 0:
                return self(times) * self.lengths[length]
            if times in (1, 2) and rest <= NEAR:
                return times * self.lengths[length] + rest
            if times in (0, 1) and length - rest <= NEAR:
                return (times + 1) * self.lengths[length] - (length - rest)
        return number

    def __str__(self) -> str:
        return ", ".join(f"{length} as {short}" for length, short in self.lengths.items())

    def expression(self, expr: Expr) -> Expr:
        """An expression with its whole numbers shortened."""
        return rewrite(expr, self._constant)

    def _constant(self, expr: Expr) -> Expr | None:
        if isinstance(expr, Const) and type(expr.value) is int:
            return Const(self(expr.value))
        return None

    def spec(self, spec: Spec) -> Spec:
        """A Spec at the short lengths: heads and channels of operands stay."""
        captured = {value.name for value in spec.captured()}
        inputs = tuple(Value(v.name, self._type(v.type, v.name in captured)) for v in spec.inputs)
        operations = tuple(operation.with_expressions(self.expression) for operation in spec.operations)
        return replace(spec, inputs=inputs, operations=operations)

    def _type(self, kind: TensorType, everywhere: bool) -> TensorType:
        axes = (
            replace(axis, size=self.expression(axis.size)) if everywhere or axis.name in "ij" else axis
            for axis in kind.axes
        )
        return replace(kind, axes=tuple(axes))

    def graph(self, graph: Graph, region: Region, spec: Spec) -> Graph:
        """The graph as far as a proof reads it: shapes of the region's inputs, and what its nodes compute.

        Args:
            spec: the shortened Spec, whose axes say which of an operand's are lengths.
        """
        infos = {binding.value: self._info(graph.infos[binding.value], binding, spec) for binding in region.inputs}
        return replace(graph, infos={**graph.infos, **infos}, evaluate=graph.evaluate.resized(self))

    def _info(self, info: Info, binding: Binding, spec: Spec) -> Info:
        if binding.layout is None or binding.layout.runs:
            return replace(info, shape=tuple(map(self.expression, info.shape)))
        axes = {axis.name for axis in spec.types()[binding.name].axes} & set("ij")
        groups = binding.layout.groups
        return replace(
            info,
            shape=tuple(
                self.expression(size) if axes & set(group) else size
                for size, group in zip(info.shape, groups, strict=True)
            ),
        )


def shortenings(spec: Spec, hints: Mapping[str, int], largest_map: int) -> Iterator[Shortening]:
    """Ways to shorten the lengths that a Spec fixes, if they are worth it: one after the other.

    Args:
        spec: of the region.
        hints: values of its symbolic sizes in the example.
        largest_map: elements of an attention map from which on it is.
    """
    attend = spec.attend()
    if attend is None:
        return
    types = spec.types()
    operands = [types[name] for name in (attend.query, attend.key, attend.value)]
    fixed = {axis.size.value for kind in operands for axis in kind.axes
             if axis.name in "ij" and isinstance(axis.size, Const) and type(axis.size.value) is int}  # fmt: skip
    lengths = sorted(length for length in fixed if length >= SHORTEST)
    if not lengths or not _large(attend, types, hints, largest_map):
        return
    for short in SHORT:
        yield Shortening(dict(zip(lengths, short, strict=False)))


def _large(attend: Attend, types: Mapping[str, TensorType], hints: Mapping[str, int], largest_map: int) -> bool:
    operands = (attend.query, attend.key, attend.value)
    try:
        elements = sum(types[name].elements(hints) for name in operands)
        return attend.map_elements(types, hints) > largest_map or elements > LARGEST_OPERANDS
    except ValueError:  # a size that only data decide
        return False


__all__ = ["Shortening", "shortenings"]
