"""Moving tokens to other places: the operation whose result holds at place ``i`` the token that an expression names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import Const, Expr, Index
from attncompile.ir.operation import Operation, Tensors, Types, find, operand, result
from attncompile.ir.operators import Kind
from attncompile.ir.ops import OPERATIONS
from attncompile.ir.simplify import simplify
from attncompile.ir.types import Axis, TensorType, concrete


@dataclass(frozen=True)
class Regroup(Operation):
    """``out[b,h,i,d] = tensor[b,h,at(i),d]`` where ``0 ≤ at(i)`` is a token of the tensor, 0 elsewhere.

    Attributes:
        tensor: ``[b,h,i,d]``.
        at: integer expression over ``i``.
        size: places of the result.
    """

    keyword: ClassVar[str] = "regroup"

    tensor: str = operand("bhid")
    at: Expr = Index("i")
    size: Expr = Const(1)
    out: str = result("out")

    def infer(self, types: Types) -> dict[str, TensorType]:
        found = find(types, self.tensor, "regroup", 4)
        self.check_captured(types, frozenset("i"))
        self.check_kind("at", Kind.INT)
        self.check_kind("size", Kind.INT)
        if self.captured():
            raise ValueError(f"regroup: {self.at} loads a tensor; places are known without one")
        axis = Axis(found.axes[2].name, simplify(self.size))
        return {self.out: TensorType((*found.axes[:2], axis, found.axes[3]), found.dtype)}

    def reference(self, tensors: Tensors, sizes: Mapping[str, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        tensor = tensors[self.tensor].to(dtype)
        places = concrete(self.size, sizes)
        grid = {"i": torch.arange(places, device=tensor.device)}
        at = evaluate(self.at, Environment(grid, sizes, device=tensor.device)).to(torch.int64).expand(places)
        held = (at >= 0) & (at < tensor.shape[2])
        moved = tensor[:, :, at.clamp(0, max(tensor.shape[2] - 1, 0))]
        return {self.out: torch.where(held[:, None], moved, torch.zeros((), dtype=dtype, device=tensor.device))}


OPERATIONS[Regroup.keyword] = Regroup

__all__ = ["Regroup"]
