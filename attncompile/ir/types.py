"""Types of the values in a Spec: tensors whose axes have names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import Const, Expr, Size, walk
from attncompile.ir.operators import Kind

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3": torch.float8_e4m3fn,
    "int64": torch.int64,
    "int32": torch.int32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


def element_kind(dtype: str) -> Kind:
    """How an expression reads an element of a tensor of this dtype."""
    if dtype == "bool":
        return Kind.BOOL
    return Kind.FLOAT if dtype.startswith(("float", "bfloat")) else Kind.INT


@dataclass(frozen=True)
class Axis:
    """One axis: what it runs over, and its size.

    The letters are ``b`` batch, ``h`` head, ``g`` KV head, ``i`` query, ``j`` key, ``d`` and ``e`` channel.
    """

    name: str
    size: Expr


@dataclass(frozen=True)
class TensorType:
    """Named axes and a dtype (a key of :data:`DTYPES`)."""

    axes: tuple[Axis, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; the known ones are {', '.join(DTYPES)}")

    @property
    def sizes(self) -> tuple[Expr, ...]:
        """The axis sizes in order."""
        return tuple(axis.size for axis in self.axes)

    def size(self, name: str) -> Expr:
        """The size of the named axis.

        Raises:
            ValueError: when there is no such axis.
        """
        for axis in self.axes:
            if axis.name == name:
                return axis.size
        raise ValueError(f"no axis {name!r} in {self}; the axes are {[a.name for a in self.axes]}")

    def elements(self, sizes: Mapping[str, int]) -> int:
        """Number of elements for given values of the symbolic sizes."""
        return math.prod(concrete(size, sizes) for size in self.sizes)

    def bytes(self, sizes: Mapping[str, int]) -> int:
        """Storage in bytes for given values of the symbolic sizes."""
        return self.elements(sizes) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"[{','.join(str(axis.size) for axis in self.axes)}] {self.dtype}"


@dataclass(frozen=True)
class Value:
    """A named tensor of a Spec."""

    name: str
    type: TensorType


def tensor_type(axes: str, sizes: tuple[Expr | int | str, ...], dtype: str = "float32") -> TensorType:
    """Build a type from axis letters and sizes: ``tensor_type("bhid", ("B", 32, "I", 128))``.

    A string size becomes a symbolic size, an integer a constant one.

    Raises:
        ValueError: when the letters and sizes differ in number.
    """
    if len(axes) != len(sizes):
        raise ValueError(f"{len(axes)} axes ({axes}) but {len(sizes)} sizes {sizes}")

    def as_expr(size: Expr | int | str) -> Expr:
        if isinstance(size, str):
            return Size(size)
        return Const(size) if isinstance(size, int) else size

    return TensorType(tuple(Axis(name, as_expr(size)) for name, size in zip(axes, sizes, strict=True)), dtype)


def concrete(size: Expr, sizes: Mapping[str, int]) -> int:
    """The value of a size expression.

    Raises:
        ValueError: when a symbol has no value.
    """
    return int(evaluate(size, Environment(sizes=sizes)))


def solved_size(size: Expr, extent: int, known: Mapping[str, int]) -> dict[str, int]:
    """The one unknown symbol of a size such as ``4·S + 1``, which an axis of this extent has; empty when there is no
    such symbol, or it is not linear.
    """
    unknown = {node.name for node in walk(size) if isinstance(node, Size)} - set(known)
    if len(unknown) != 1:
        return {}
    (name,) = unknown
    try:
        start, step = (concrete(size, {**known, name: value}) for value in (0, 1))
        value = (extent - start) // (step - start)
        return {name: value} if concrete(size, {**known, name: value}) == extent else {}
    except (ZeroDivisionError, RuntimeError):  # constant in this symbol, or a quotient that has no value there
        return {}


def bind_sizes(types: Mapping[str, TensorType], tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Read the symbolic sizes off actual tensors, and check every axis against them.

    Raises:
        ValueError: naming tensor, axis and both sizes on the first disagreement.
    """
    found: dict[str, int] = {}
    first: dict[str, str] = {}
    for name, kind in types.items():
        if name not in tensors:
            raise ValueError(f"no tensor given for {name!r} {kind}; there are {sorted(tensors)}")
        shape = tuple(tensors[name].shape)
        if len(shape) != len(kind.axes):
            raise ValueError(f"{name} should have {len(kind.axes)} axes {kind}, but has shape {shape}")
        for axis, extent in zip(kind.axes, shape, strict=True):
            if not isinstance(axis.size, Size):
                continue
            symbol = axis.size.name
            known = found.setdefault(symbol, extent)
            place = first.setdefault(symbol, f"axis {axis.name} of {name}")
            if known != extent:
                raise ValueError(
                    f"axis {axis.name} of {name} is {extent}, but {symbol} is {known} as {place}"
                )
    for name, kind in types.items():
        for axis, extent in zip(kind.axes, tensors[name].shape, strict=True):
            found.update(solved_size(axis.size, extent, found))
    for name, kind in types.items():
        for axis, extent in zip(kind.axes, tensors[name].shape, strict=True):
            size = concrete(axis.size, found)
            if size != extent:
                stated = "" if isinstance(axis.size, Const) else f"{axis.size} = "
                raise ValueError(f"axis {axis.name} of {name} is {extent}, but should be {stated}{size}")
    return found
