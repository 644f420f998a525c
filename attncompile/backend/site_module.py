"""A lifted site as a module in the native graph: native tensors in, native tensors out, the lowering between."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch

from attncompile.codegen.lowering import Lowering
from attncompile.codegen.pytorch import visible_mask
from attncompile.codegen.pytorch.autocast import autocast_dtype
from attncompile.frontends.graph import Info
from attncompile.ir import Spec, TensorType
from attncompile.ir.expr import Const, Expr
from attncompile.ir.types import DTYPES
from attncompile.lift.program import Layout, Region


def to_spec_axes(native: torch.Tensor, layout: Layout, kind: TensorType, sizes: dict[Expr, int]) -> torch.Tensor:
    """A native tensor in the axis order of its Spec type, as views where possible.

    Args:
        native: the tensor in the model's own layout.
        layout: where the Spec's axes are in it.
        kind: the Spec type.
        sizes: sizes seen so far, by expression; needed for axes that the native tensor lacks, and added to.
    """
    lengths: dict[str, int] = {}
    for group, extent in zip(layout.groups, layout.extents(native.shape), strict=True):
        fixed = {axis: int(size.value) for axis in group if isinstance(size := kind.size(axis), Const)}
        open_axes = [axis for axis in group if axis not in fixed]
        lengths |= fixed
        if len(open_axes) == 1:
            lengths[open_axes[0]] = extent // math.prod(fixed.values())
        else:
            lengths |= {axis: sizes.get(kind.size(axis), -1) for axis in open_axes}
    split = native if layout.plain else native.reshape([lengths[axis] for axis in layout.axes])
    names = [axis.name for axis in kind.axes]
    present = [name for name in names if name in layout.axes]
    result = split.permute([layout.axes.index(name) for name in present])
    for name in names:
        if name not in present:
            result = result.unsqueeze(names.index(name))
    sizes.update(
        {entry.size: extent for entry, extent in zip(kind.axes, result.shape, strict=True) if entry.name in present}
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
    result: torch.Tensor,
    layout: Layout,
    kind: TensorType,
    native_shape: tuple[Expr, ...],
    sizes: Mapping[Expr, int],
) -> torch.Tensor:
    """A Spec result in the model's own layout.

    Args:
        result: with the axes of its Spec type.
        layout: where they are in the native tensor.
        kind: the Spec type.
        native_shape: the shape that the graph gives it.
        sizes: native sizes that are known from the inputs.

    Raises:
        ValueError: when several sizes of one run of axes are not among them.
    """
    names = [axis.name for axis in kind.axes]
    order = [names.index(axis) for axis in layout.axes]
    rest = [place for place in range(len(names)) if place not in order]  # axes of size 1 that the model does not have
    ordered = result.permute([*order, *rest])
    if not rest and layout.plain:
        return ordered
    shape: list[int] = []
    for group, (start, stop) in zip(layout.groups, layout.places(), strict=True):
        whole = math.prod(result.shape[names.index(axis)] for axis in group)
        found = [_known(size, sizes) for size in native_shape[start:stop]]
        missing = [place for place, size in enumerate(found) if size is None]
        if len(missing) > 1:
            raise ValueError(f"the sizes {native_shape[start:stop]} of an output do not follow from its inputs' shapes")
        for place in missing:
            found[place] = whole // max(math.prod(size for size in found if size is not None), 1)
        shape += [size for size in found if size is not None]
    return ordered.reshape(shape)


def _known(size: Expr, sizes: Mapping[Expr, int]) -> int | None:
    return int(size.value) if isinstance(size, Const) else sizes.get(size)


def operand_names(spec: Spec) -> frozenset[str]:
    """The values that go into products: no coordinates, and nothing that a mask or score reads."""
    return frozenset(name for operation in spec.operations for name in operation.operands())


def spec_tensors(
    region: Region,
    types: Mapping[str, TensorType],
    operands: Collection[str],
    native: Sequence[torch.Tensor],
    rounded: Collection[str] = (),
) -> list[torch.Tensor]:
    """Native tensors as a Spec's inputs, operands as autocast would hand them to the model's own products.

    No product of ours is one that autocast knows: a generated kernel would go on in float32 where the model asked
    for 16 bits.

    Args:
        region: where the Spec's inputs are in the graph, one for each native tensor.
        types: of the Spec's values.
        operands: see :func:`operand_names`.
        native: the graph's tensors.
        rounded: further inputs that autocast rounds.
    """
    sizes: dict[Expr, int] = {}
    found = list(native)
    laid_out = [(n, entry) for n, entry in enumerate(region.inputs) if entry.layout is not None]
    # those that lack an axis last: how often they are repeated is known from the others
    for place, binding in sorted(laid_out, key=lambda entry: -len(entry[1].layout.axes if entry[1].layout else ())):
        assert binding.layout is not None
        found[place] = to_spec_axes(native[place], binding.layout, types[binding.name], sizes)
    for place, binding in enumerate(region.inputs):
        narrow = autocast_dtype(native[place])
        multiplied = binding.layout is not None and binding.name in operands
        if narrow is not None and (multiplied or binding.name in rounded):
            found[place] = found[place].to(narrow)
    return found


class SiteModule(torch.nn.Module):
    """Computes a site with its lowering.

    Called with the native tensors of ``region.inputs`` in order, and what it shares with other sites, if it does:
    ``shares`` names the option of the lowering that takes it. ``rounded`` names further inputs that
    autocast rounds: the mask that is given to a call of torch's own.
    """

    def __init__(
        self,
        spec: Spec,
        region: Region,
        lowering: Lowering,
        given: Sequence[Info],
        natives: Sequence[Info],
        shares: Literal["", "mask", "lists"] = "",
        *,
        rounded: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.spec, self.region, self.lowering = spec, region, lowering
        self.given, self.natives, self.shares = tuple(given), tuple(natives), shares
        self.types = spec.types()
        self.operands, self.rounded = operand_names(spec), rounded

    def spec_tensors(self, native: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The native tensors as the Spec's inputs, see :func:`spec_tensors`."""
        return spec_tensors(self.region, self.types, self.operands, native, self.rounded)

    def forward(self, *native: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        tensors = native[: len(self.region.inputs)]
        options = {self.shares: native[-1]} if self.shares else {}
        result = self.lowering.run(*self.spec_tensors(tensors), **options)
        made = (result,) if isinstance(result, torch.Tensor) else tuple(result)
        shapes = zip(self.given, tensors, strict=True)
        sizes = {size: n for info, tensor in shapes for size, n in zip(info.shape, tensor.shape, strict=True)}
        outputs = []
        for binding, found, info in zip(self.region.outputs, made, self.natives, strict=True):
            assert binding.layout is not None
            native_axes = to_native_axes(found, binding.layout, self.types[binding.name], info.shape, sizes)
            stated = len(made) > 1 or any(autocast_dtype(tensor) is not None for tensor in tensors)
            outputs.append(native_axes.to(DTYPES[info.dtype]) if stated else native_axes)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


class SharedModule(torch.nn.Module):
    """Makes what several sites share, from the native tensors of one of them: an additive mask, or lists of blocks."""

    def __init__(self, site: SiteModule) -> None:
        super().__init__()
        self.inputs_of = [site]  # a list, so that the site is not registered twice as a child

    def forward(self, *native: torch.Tensor) -> torch.Tensor | None:
        site = self.inputs_of[0]
        given = site.spec_tensors(native)
        if site.shares == "lists":
            assert site.lowering.lists is not None
            return site.lowering.lists.make(*given)
        tensors: Mapping[str, torch.Tensor] = {
            binding.name: tensor for binding, tensor in zip(site.region.inputs, given, strict=True)
        }
        return visible_mask(site.spec, tensors)
