"""A lifted site as a module in the native graph: native tensors in, native tensors out, the lowering between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from attncompile.codegen.lowering import Lowering
from attncompile.codegen.pytorch import visible_mask
from attncompile.frontends.graph import Info
from attncompile.ir import Spec, TensorType
from attncompile.ir.expr import Const, Expr
from attncompile.ir.types import DTYPES
from attncompile.lift.program import Layout, Region


def to_spec_axes(
    native: torch.Tensor, layout: Layout, kind: TensorType, sizes: dict[Expr, int]
) -> torch.Tensor:
    """A native tensor in the axis order of its Spec type, as views where possible.

    Args:
        native: the tensor in the model's own layout.
        layout: where the Spec's axes are in it.
        kind: the Spec type.
        sizes: sizes seen so far, by expression; needed for axes that the native tensor lacks, and added to.
    """
    lengths: dict[str, int] = {}
    for group, extent in layout.spans(native.shape):
        for axis in group:
            size = kind.size(axis)
            lengths[axis] = int(size.value) if isinstance(size, Const) else extent if len(group) == 1 else -1
    wanted = [lengths[axis] for axis in layout.axes]
    split = native if layout.groups == tuple((axis,) for axis in layout.axes) else native.reshape(wanted)
    names = [axis.name for axis in kind.axes]
    present = [name for name in names if name in layout.axes]
    result = split.permute([layout.axes.index(name) for name in present])
    for name in names:
        if name not in present:
            result = result.unsqueeze(names.index(name))
    sizes.update(
        {
            entry.size: extent
            for entry, extent in zip(kind.axes, result.shape, strict=True)
            if entry.name in present
        }
    )
    if len(present) < len(names):
        result = result.expand(
            [
                -1
                if entry.name in present
                else int(entry.size.value)
                if isinstance(entry.size, Const)
                else sizes.get(entry.size, 1)
                for entry in kind.axes
            ]
        )
    return result


def to_native_axes(
    result: torch.Tensor, layout: Layout, kind: TensorType, native_shape: tuple[Expr, ...]
) -> torch.Tensor:
    """A Spec result in the model's own layout."""
    names = [axis.name for axis in kind.axes]
    order = [names.index(axis) for axis in layout.axes]
    rest = [
        place for place in range(len(names)) if place not in order
    ]  # axes of size 1 that the model does not have
    ordered = result.permute([*order, *rest])
    if not rest and layout.groups == tuple((axis,) for axis in layout.axes):
        return ordered
    shape: list[int] = []
    goes_on = [not group for group in layout.groups[1:]] + [False]
    for group, size, more in zip(layout.groups, native_shape, goes_on, strict=True):
        if isinstance(size, Const):
            shape.append(int(size.value))
        elif len(group) == 1 and not more:
            shape.append(result.shape[names.index(group[0])])
        else:
            shape.append(-1)
    return ordered.reshape(shape)


class SiteModule(torch.nn.Module):
    """Computes a site with its lowering.

    Called with the native tensors of ``region.inputs`` in order, and a shared mask when ``takes_mask``.
    """

    def __init__(
        self, spec: Spec, region: Region, lowering: Lowering, natives: Sequence[Info], takes_mask: bool
    ) -> None:
        super().__init__()
        self.spec, self.region, self.lowering = spec, region, lowering
        self.natives, self.takes_mask = tuple(natives), takes_mask
        self.types = spec.types()

    def spec_tensors(self, native: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """The native tensors as the Spec's inputs."""
        sizes: dict[Expr, int] = {}
        found = list(native)
        operands = [(n, entry) for n, entry in enumerate(self.region.inputs) if entry.layout is not None]
        # those that lack an axis last: how often they are repeated is known from the others
        for place, binding in sorted(operands, key=lambda entry: -len(entry[1].layout.axes if entry[1].layout else ())):
            assert binding.layout is not None
            found[place] = to_spec_axes(native[place], binding.layout, self.types[binding.name], sizes)
        return found

    def forward(self, *native: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        tensors = native[: len(self.region.inputs)]
        options = {"mask": native[-1]} if self.takes_mask else {}
        result = self.lowering.run(*self.spec_tensors(tensors), **options)
        made = (result,) if isinstance(result, torch.Tensor) else tuple(result)
        outputs = []
        for binding, found, info in zip(self.region.outputs, made, self.natives, strict=True):
            assert binding.layout is not None
            native_axes = to_native_axes(found, binding.layout, self.types[binding.name], info.shape)
            outputs.append(native_axes if len(made) == 1 else native_axes.to(DTYPES[info.dtype]))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


class MaskModule(torch.nn.Module):
    """Builds the additive mask that several sites share, from the native tensors of one of them."""

    def __init__(self, site: SiteModule) -> None:
        super().__init__()
        self.inputs_of = [site]  # a list, so that the site is not registered twice as a child

    def forward(self, *native: torch.Tensor) -> torch.Tensor | None:
        site = self.inputs_of[0]
        tensors: Mapping[str, torch.Tensor] = {
            binding.name: tensor
            for binding, tensor in zip(site.region.inputs, site.spec_tensors(native), strict=True)
        }
        return visible_mask(site.spec, tensors)
