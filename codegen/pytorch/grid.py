"""Expressions over a part of the attention map, evaluated without gathering what is a plain view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attncompile.ir import Expr, Kind, Spec, TensorType, simplify
from attncompile.ir.evaluate import Environment
from attncompile.ir.expr import Const, Index, Load, Size
from attncompile.ir.types import solved_size

AXES = ("b", "h", "i", "j")
Range = tuple[Any, Any]
"""First position and the one after the last; integers, symbolic ones while a graph is traced."""


def read_sizes(spec: Spec, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The symbolic sizes of a Spec, read off actual tensors; symbolic integers stay symbolic while a graph is
    traced.

    Raises:
        ValueError: naming the tensor, when a rank or a known size disagrees with the Spec.
    """
    found: dict[str, Any] = {}
    for value in spec.inputs:
        shape = tensors[value.name].shape
        if len(shape) != len(value.type.axes):
            raise ValueError(f"{spec.name}: {value.name} should be {value.type}, but has shape "
                             f"{tuple(shape)}")
        for axis, extent in zip(value.type.axes, shape, strict=True):
            if isinstance(axis.size, Size):
                expected = found.setdefault(axis.size.name, extent)
            else:
                expected = axis.size.value if isinstance(axis.size, Const) else extent
            # comparing a symbolic integer would tie the traced graph to one size
            if isinstance(extent, int) and isinstance(expected, int) and extent != expected:
                raise ValueError(f"{spec.name}: axis {axis.name} of {value.name} is {extent}, but "
                                 f"{axis.size} is {expected} elsewhere")
    for value in spec.inputs:
        for axis, extent in zip(value.type.axes, tensors[value.name].shape, strict=True):
            if isinstance(axis.size, Size | Const):
                continue  # nothing more to learn, and this runs in every call
            if isinstance(extent, int) and all(isinstance(size, int) for size in found.values()):
                found.update(solved_size(axis.size, extent, found))
    return found


@dataclass(frozen=True)
class View:
    """A load that reads whole axes: ``tensor[b, 0, i, j]`` is a permuted view.

    Attributes:
        load: the expression.
        axes: for each axis of the tensor the index it runs along, or an empty text where element 0 is read.
    """

    load: Load
    axes: tuple[str, ...]

    def on(self, tensor: torch.Tensor, rows: Range | None, columns: Sequence[Range] | None) -> torch.Tensor:
        """The elements on a part of the map, ``[b,h,i,j]`` with size 1 for axes that are not read."""
        for position in reversed([p for p, name in enumerate(self.axes) if not name]):
            tensor = tensor.select(position, 0)
        present = [name for name in self.axes if name]
        tensor = tensor.permute([present.index(name) for name in AXES if name in present])
        for position, name in enumerate(AXES):
            if name not in present:
                tensor = tensor.unsqueeze(position)
        if rows is not None and "i" in present:
            tensor = tensor[:, :, rows[0]:rows[1]]
        if columns is not None and "j" in present:
            tensor = take(tensor, 3, columns)
        return tensor


def as_view(load: Load, captured: TensorType, sizes: Mapping[str, Expr]) -> View | None:
    """The load as a view, where each of its indices is a different whole axis of the map or 0."""
    names: list[str] = []
    for index, axis in zip(load.indices, captured.axes, strict=True):
        if index == Const(0):
            names.append("")
        elif (isinstance(index, Index) and index.name in sizes and index.name not in names
              and simplify(axis.size) == simplify(sizes[index.name])):
            names.append(index.name)
        else:
            return None
    return View(load, tuple(names))


def take(tensor: torch.Tensor, dim: int, ranges: Sequence[Range]) -> torch.Tensor:
    """The given ranges of one axis, one after the other; a single range is a view."""
    parts = [tensor.narrow(dim, first, after - first) for first, after in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


@dataclass(frozen=True)
class Map:
    """The attention map of one call.

    Attributes:
        tensors: all tensors of the call by name.
        sizes: values of the symbolic sizes.
        extents: number of positions along ``b h i j``.
        views: loads that are views.
        device: where the tensors are.
    """

    tensors: Mapping[str, torch.Tensor]
    sizes: Mapping[str, Any]
    extents: tuple[Any, Any, Any, Any]
    views: tuple[View, ...]
    device: torch.device

    def environment(
        self, dtype: torch.dtype, rows: Range | None = None, columns: Sequence[Range] | None = None
    ) -> Environment:
        """What expressions over ``b h i j`` mean on a part of the map.

        Args:
            dtype: float dtype of the arithmetic.
            rows: the queries, all when ``None``.
            columns: ranges of keys, all when ``None``.
        """
        batch, heads, queries, keys = self.extents
        positions = {
            "b": torch.arange(batch, device=self.device),
            "h": torch.arange(heads, device=self.device),
            "i": torch.arange(*(rows or (0, queries)), device=self.device),
            "j": torch.cat([torch.arange(*part, device=self.device) for part in columns or ((0, keys),)]),
        }
        indices = {
            name: positions[name].reshape([-1 if axis == name else 1 for axis in AXES]) for name in AXES
        }
        given: dict[Expr, torch.Tensor] = {}
        for view in self.views:
            part = view.on(self.tensors[view.load.tensor], rows, columns)
            given[view.load] = part.to(_dtype(view.load.element, dtype))
        for name, size in self.sizes.items():
            if not isinstance(size, int):
                given[Size(name)] = torch.full((), size, dtype=torch.int64, device=self.device)
        return Environment(indices, self.sizes, self.tensors, dtype=dtype, device=self.device, given=given)


def _dtype(kind: Kind, real: torch.dtype) -> torch.dtype:
    return {Kind.BOOL: torch.bool, Kind.INT: torch.int64, Kind.FLOAT: real}[kind]


__all__ = ["AXES", "Map", "Range", "View", "as_view", "read_sizes", "take"]
