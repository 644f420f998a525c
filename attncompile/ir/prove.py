"""Proofs that an integer is never negative, from the ranges of index symbols and sizes.

Symbolic where interval analysis is numeric: ``H·I − h·I − i − 1 ≥ 0`` holds for all ``h < H`` and ``i < I``.
    Each atom
is moved to its worse end until only sizes are left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from attncompile.ir.expr import Apply, Expr, Index, Size
from attncompile.ir.operators import Kind
from attncompile.ir.polynomial import (
    Polynomial,
    constant,
    constant_value,
    depth_first,
    negated,
    plus,
    polynomial,
    single,
    split,
    times,
    without,
)


@dataclass(frozen=True)
class Prover:
    """What is known about the symbols.

    Attributes:
        extents: index name to the size of its axis: ``0 ≤ index < size``. Any index is at least 0.
        positive: sizes known to be at least 1. Any size is at least 0.
    """

    extents: Mapping[str, Polynomial] = field(default_factory=dict)
    positive: frozenset[Expr] = frozenset()

    @classmethod
    def of(cls, extents: Mapping[str, Expr]) -> Prover:
        """The prover for axes of these sizes: an axis that is indexed is not empty."""
        sizes = {name: polynomial(size) for name, size in extents.items()}
        factors = {atom for poly in sizes.values() if len(poly) == 1 for mono in poly for atom in mono}
        return cls(sizes, frozenset(atom for atom in factors if isinstance(atom, Size)))

    def assuming_positive(self, sizes: Iterable[Expr]) -> Prover:
        """The prover that also knows these sizes to be at least 1."""
        return replace(self, positive=self.positive | frozenset(sizes))

    def nonnegative(self, poly: Polynomial) -> bool:
        """Whether the polynomial is proven to be at least 0."""
        if self._plainly_nonnegative(poly):
            return True
        least = self.least(poly)
        return least is not None and self._plainly_nonnegative(least)

    def least(self, poly: Polynomial) -> Polynomial | None:
        """A lower bound over sizes alone, or ``None`` when some part has none."""
        for atom in depth_first(poly):
            factor: Polynomial = {}
            rest: Polynomial = {}
            for mono, value in poly.items():
                reduced = without(mono, (atom,))
                if reduced is None:
                    rest[mono] = value
                else:
                    factor[reduced] = value
            if any(atom in mono for mono in factor):
                return None
            if self._plainly_nonnegative(factor) and self._starts_at_zero(atom):
                poly = rest
            elif self._plainly_nonnegative(negated(factor)) and (last := self._last(atom)) is not None:
                poly = plus(rest, times(factor, last))
            else:
                return None
        return poly

    def _plainly_nonnegative(self, poly: Polynomial) -> bool:
        """Whether no atom and no coefficient is negative, counting positive sizes from 1."""
        if poly and not self.positive and min(poly.values()) < 0:
            return False
        counted: Polynomial = {}
        for mono, value in poly.items():
            product = constant(value)
            for atom in mono:
                if not self._starts_at_zero(atom):
                    return False
                shifted: Polynomial = {(atom,): 1}
                if atom in self.positive:
                    shifted[()] = 1
                product = times(product, shifted)
            counted = plus(counted, product)
        return all(value > 0 for value in counted.values())

    def _starts_at_zero(self, atom: Expr) -> bool:
        match atom:
            case Index() | Size() | Apply("abs"):
                return True
            case Apply("mod" | "floordiv" as operator, (dividend, divisor)):
                by = single(polynomial(divisor))
                return by is not None and (
                    operator == "mod" or self.assuming_positive(by[0]).nonnegative(polynomial(dividend))
                )
            case Apply("max", arguments) if atom.kind is Kind.INT:
                return any(self.nonnegative(polynomial(argument)) for argument in arguments)
            case Apply("min", arguments) | Apply("where", (_, *arguments)) if atom.kind is Kind.INT:
                return all(self.nonnegative(polynomial(argument)) for argument in arguments)
        return False

    def _last(self, atom: Expr) -> Polynomial | None:
        """An upper bound of the atom over sizes alone, or ``None``."""
        match atom:
            case Index(name) if name in self.extents:
                return plus(self.extents[name], constant(-1))
            case Apply("mod" | "floordiv" as operator, (dividend, divisor)):
                by = single(polynomial(divisor))
                if by is None:
                    return None
                if operator == "mod":
                    return plus(polynomial(divisor), constant(-1))
                return self._last_quotient(polynomial(dividend), by)
        return None

    def _last_quotient(self, dividend: Polynomial, by: tuple[tuple[Expr, ...], int]) -> Polynomial | None:
        below = self.assuming_positive(by[0]).least(negated(dividend))
        if below is None:
            return None
        # x ≤ last and last + 1 = q · k give x // k ≤ q - 1; a constant remainder rounds down
        quotient, rest = split(plus(negated(below), constant(1)), *by)
        left = constant_value(rest)
        if left is None or (left and by[0]):
            return None
        return plus(quotient, constant(-1 if left == 0 else 0))
