"""What every operation of a Spec has: operands, results, expressions, and the checks that they fit.

Each is a frozen dataclass whose fields are marked as operands (names of tensors), results or attributes; from
these marks come its printed form, its parser and the verifier. ``reference`` is the definition: plain
PyTorch, differentiable, in whatever float dtype it is given.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from attncompile.ir.expr import Const, Expr, Index, Load, Score, Size, Total, Weight, loads, substitute, walk
from attncompile.ir.operators import Kind
from attncompile.ir.simplify import simplify
from attncompile.ir.types import Axis, TensorType, concrete, element_kind

Types = Mapping[str, TensorType]
Tensors = Mapping[str, torch.Tensor]


def operand(axes: str) -> Any:
    """A field that names a tensor with these axes."""
    return dataclasses.field(metadata={"role": "operand", "axes": axes})


def optional_operand(axes: str) -> Any:
    """A field that names a tensor with these axes, or is empty."""
    return dataclasses.field(default="", metadata={"role": "operand", "axes": axes})


def result(default: str) -> Any:
    """A field that names a result; an empty name means it is not computed."""
    return dataclasses.field(default=default, metadata={"role": "result"})


@dataclass(frozen=True)
class Operation(ABC):
    """One step of a Spec."""

    keyword: ClassVar[str]

    def operands(self) -> tuple[str, ...]:
        """Names of the tensors it reads, captured ones last."""
        named = [getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata.get("role") == "operand"]
        return tuple(dict.fromkeys([n for n in named if n] + [load.tensor for load in self.captured()]))

    def results(self) -> tuple[str, ...]:
        """Names of the tensors it makes."""
        named = [getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata.get("role") == "result"]
        return tuple(name for name in named if name)

    def expressions(self) -> tuple[Expr, ...]:
        """The index expressions among its attributes."""
        values = [getattr(self, f.name) for f in dataclasses.fields(self)]
        return tuple(value for value in values if isinstance(value, Expr))

    def with_expressions(self, change: Callable[[Expr], Expr]) -> Self:
        """The operation with every index expression among its attributes changed."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Expr)}
        return dataclasses.replace(self, **changed)

    def captured(self) -> tuple[Load, ...]:
        """Loads of tensors in its expressions."""
        return tuple(dict.fromkeys(load for expr in self.expressions() for load in loads(expr)))

    @abstractmethod
    def infer(self, types: Types) -> dict[str, TensorType]:
        """Types of the results.

        Raises:
            ValueError: when the operands do not fit; names the tensor, the axis and both sizes.
        """

    @abstractmethod
    def reference(self, tensors: Tensors, sizes: Mapping[str, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The results, computed plainly in ``dtype``."""

    def flops(self, types: Types, sizes: Mapping[str, int]) -> int:
        """Floating-point operations (a multiply-add counts 2); 0 where the work is negligible."""
        return 0

    def check_captured(self, types: Types, symbols: frozenset[str]) -> None:
        """Check the expressions: every load fits its tensor, and only the given symbols occur.

        Raises:
            ValueError: naming the load or symbol at fault.
        """
        for expr in self.expressions():
            for node in walk(expr):
                match node:
                    case Load(tensor, indices, element):
                        if tensor not in types:
                            raise ValueError(
                                f"{self.keyword}: {expr} loads {tensor!r}, which is not a tensor of the "
                                f"Spec ({', '.join(sorted(types))})"
                            )
                        if len(types[tensor].axes) != len(indices) or element_kind(types[tensor].dtype) is not element:
                            raise ValueError(f"{self.keyword}: {node} ({element}) does not fit {tensor}{types[tensor]}")
                        for index in indices:
                            if index.kind is not Kind.INT:
                                raise ValueError(
                                    f"{self.keyword}: index {index} of {node} is {index.kind}, should be int"
                                )
                    case Index() | Score() | Weight() | Total() if str(node) not in symbols:
                        raise ValueError(
                            f"{self.keyword}: {expr} reads {str(node)!r}; only "
                            f"{', '.join(sorted(symbols))} have a meaning here"
                        )

    def check_kind(self, name: str, kind: Kind) -> None:
        """Check that the expression of a field has a kind.

        Raises:
            ValueError: naming the field, the expression and both kinds.
        """
        expr = getattr(self, name)
        if expr.kind is not kind:
            raise ValueError(f"{self.keyword}: {name} {expr} is {expr.kind}, should be {kind}")

    def check_kv_heads(self, kv_head: Expr, heads: Expr, key: str, groups: Axis) -> None:
        """Check that every query head reads a KV head that exists, where the numbers are constant.

        Raises:
            ValueError: naming the expression, the head it reaches and the number of KV heads.
        """
        symbolic = any(isinstance(node, Size) for node in walk(kv_head))
        if symbolic or not isinstance(heads, Const) or not isinstance(groups.size, Const):
            return
        least, last = _reached(kv_head, int(heads.value))
        if least < 0 or last >= groups.size.value:
            raise ValueError(
                f"{self.keyword}: kv_head {kv_head} of {heads} query heads reaches from {least} to {last}, "
                f"but axis {groups.name} of {key} is {groups.size}"
            )


@functools.lru_cache(maxsize=1024)
def _reached(kv_head: Expr, heads: int) -> tuple[int, int]:
    """The first and the last KV head that so many query heads read; asked again whenever types are inferred."""
    # one number at a time: a tensor would have no values under a fake tensor mode
    found = [concrete(substitute(kv_head, {Index("h"): Const(head)}), {}) for head in range(heads)]
    return min(found), max(found)


def same_size(what: str, left: tuple[str, Axis], right: tuple[str, Axis]) -> None:
    """Require two axes to be of one size.

    Raises:
        ValueError: naming both tensors, axes and sizes.
    """
    (left_name, left_axis), (right_name, right_axis) = left, right
    if simplify(left_axis.size) != simplify(right_axis.size):
        raise ValueError(
            f"{what}: axis {left_axis.name} of {left_name} is {left_axis.size}, "
            f"but axis {right_axis.name} of {right_name} is {right_axis.size}"
        )


def find(types: Types, name: str, what: str, rank: int) -> TensorType:
    """The type of a tensor, checked for its rank.

    Raises:
        ValueError: when the tensor is missing or has another rank.
    """
    if name not in types:
        raise ValueError(f"{what} reads {name!r}, which nothing defines; there are {sorted(types)}")
    if len(types[name].axes) != rank:
        raise ValueError(f"{what}: {name} should have {rank} axes, but is {name}{types[name]}")
    return types[name]


def attention_types(
    types: Types, what: str, query: str, key: str, value: str
) -> tuple[TensorType, TensorType, TensorType]:
    """Types of a query ``[b,h,i,d]``, a key ``[b,g,j,d]`` and a value ``[b,g,j,e]`` that fit each other.

    Raises:
        ValueError: naming both tensors, axes and sizes where they do not.
    """
    found = find(types, query, what, 4), find(types, key, what, 4), find(types, value, what, 4)
    for axis in (3, 0):
        same_size(what, (query, found[0].axes[axis]), (key, found[1].axes[axis]))
    for axis in range(3):
        same_size(what, (key, found[1].axes[axis]), (value, found[2].axes[axis]))
    return found
