"""Modelled work of a Spec: operations and bytes at given sizes, before and after passes. Not a
measurement.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from attncompile.ir import Attend, Spec, simplify
from attncompile.ir.blocks import density
from attncompile.ir.expr import Const, Size, substitute
from attncompile.ir.rows import extents
from attncompile.ir.types import concrete


class Work(BaseModel):
    """Work of one Spec at some sizes.

    Attributes:
        flops: floating-point operations when hidden positions are skipped (a multiply-add counts 2).
        bytes: inputs read once and outputs written once.
        density: share of the attention map that is visible, 1 for a scan; an upper bound where the mask reads
            a tensor.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    flops: int
    bytes: int
    density: float


class CostRow(BaseModel):
    """Work before and after.

    Attributes:
        sizes: values of the symbolic sizes.
        before, after: work of both Specs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sizes: dict[str, int]
    before: Work
    after: Work

    @property
    def flops_saved(self) -> float:
        """Share of the operations that are saved; below 0 where there are more."""
        return 1.0 - self.after.flops / self.before.flops if self.before.flops else 0.0


def work(spec: Spec, sizes: Mapping[str, int]) -> Work:
    """The work of a Spec, attention counted for visible positions only.

    Args:
        spec: any Spec.
        sizes: a value for every symbolic size.

    Raises:
        ValueError: when a size has no value.
    """
    types = spec.types()
    flops, shares = 0, []
    for operation in spec.operations:
        share = 1.0
        if isinstance(operation, Attend):
            lengths = {name: concrete(size, sizes) for name, size in extents(operation, types).items()}
            mask = simplify(substitute(operation.mask, {Size(n): Const(v) for n, v in sizes.items()}))
            share = density(mask, lengths["i"], lengths["j"], sizes=sizes)
            shares.append(share)
        flops += round(operation.flops(types, sizes) * share)
    return Work(flops=flops, bytes=spec.bytes(sizes), density=sum(shares) / len(shares) if shares else 1.0)


def cost_row(before: Spec, after: Spec, sizes: Mapping[str, int]) -> CostRow:
    """The work of a Spec before and after passes, at the same sizes."""
    return CostRow(sizes=dict(sizes), before=work(before, sizes), after=work(after, sizes))
