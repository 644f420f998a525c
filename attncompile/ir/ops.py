"""Operations around an attention (positions, projections, caches, rounding), and the table of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from attncompile.ir import e4m3
from attncompile.ir.attend import Attend
from attncompile.ir.evaluate import Environment, evaluate, index_grid
from attncompile.ir.expr import Const, Expr
from attncompile.ir.operation import Operation, Tensors, Types, find, operand, optional_operand, result, same_size
from attncompile.ir.operators import Kind
from attncompile.ir.scan import Scan
from attncompile.ir.simplify import simplify
from attncompile.ir.types import Axis, TensorType, concrete


@dataclass(frozen=True)
class Position(Operation):
    """Rotary position map of query or key, on the first ``channels`` of the ``d`` axis; the others pass
    through.

    ``out[d] = x[d]·cos(b,i,d) + partner(x, d)·sin(b,i,d)``, where the partner of channel ``d`` is, with
    ``R = channels``: for ``half`` ``−x[d + R/2]`` in the first half and ``x[d − R/2]`` in the second; for
    ``interleaved`` ``−x[d + 1]`` at even and ``x[d − 1]`` at odd channels.

    Attributes:
        tensor: ``[b,h,i,d]``.
        cos, sin: real expressions over ``b i d`` and captured tensors.
        channels: number of rotated channels ``R`` (even).
        convention: ``half`` (Llama, NeoX) or ``interleaved`` (GPT-J).

    Follows: Su et al. 2021 (arXiv:2104.09864).
    """

    keyword: ClassVar[str] = "position"

    tensor: str = operand("bhid")
    cos: Expr = Const(1.0)
    sin: Expr = Const(0.0)
    channels: int = 0
    convention: str = "half"
    out: str = result("out")

    def infer(self, types: Types) -> dict[str, TensorType]:
        found = find(types, self.tensor, "position", 4)
        size = simplify(found.axes[3].size)
        if self.channels % 2 or self.channels < 0 or (isinstance(size, Const) and self.channels > size.value):
            raise ValueError(f"position: channels must be even and at most {size}, got {self.channels}")
        if self.convention not in ("half", "interleaved"):
            raise ValueError(f"position: unknown convention {self.convention!r}; choose half or interleaved")
        self.check_kind("cos", Kind.FLOAT)
        self.check_kind("sin", Kind.FLOAT)
        self.check_captured(types, frozenset("bid"))
        return {self.out: found}

    def reference(
        self, tensors: Tensors, sizes: Mapping[str, int], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        x = tensors[self.tensor].to(dtype)
        rotated, rest = x[..., : self.channels], x[..., self.channels :]
        grid = index_grid({"b": x.shape[0], "h": 1, "i": x.shape[2], "d": self.channels}, x.device)
        environment = Environment(grid, sizes, tensors, dtype=dtype, device=x.device)
        cos, sin = evaluate(self.cos, environment), evaluate(self.sin, environment)
        if self.convention == "half":
            first, second = rotated.chunk(2, dim=-1)
            partner = torch.cat([-second, first], dim=-1)
        else:
            even, odd = rotated[..., 0::2], rotated[..., 1::2]
            partner = torch.stack([-odd, even], dim=-1).flatten(-2)
        return {self.out: torch.cat([rotated * cos + partner * sin, rest], dim=-1)}


@dataclass(frozen=True)
class Project(Operation):
    """Linear map of the model's state into heads.

    ``out[b,h,i,d] = Σ_c tensor[b,i,c] · kernel[h·D + d, c] + bias[h·D + d]``.

    Attributes:
        tensor: ``[b,i,c]``; kernel: ``[o,c]`` with ``o = heads · D``; bias: ``[o]`` or empty.
        heads: number of heads that the output axis is split into.
    """

    keyword: ClassVar[str] = "project"

    tensor: str = operand("bic")
    kernel: str = operand("oc")
    bias: str = optional_operand("o")
    heads: int = 1
    out: str = result("out")

    def infer(self, types: Types) -> dict[str, TensorType]:
        state, kernel = find(types, self.tensor, "project", 3), find(types, self.kernel, "project", 2)
        same_size("project", (self.tensor, state.axes[2]), (self.kernel, kernel.axes[1]))
        if self.bias:
            same_size(
                "project",
                (self.kernel, kernel.axes[0]),
                (self.bias, find(types, self.bias, "project", 1).axes[0]),
            )
        outputs = simplify(kernel.axes[0].size)
        if self.heads < 1:
            raise ValueError(f"project: heads must be at least 1, got {self.heads}")
        if isinstance(outputs, Const) and outputs.value % self.heads:
            raise ValueError(f"project: {outputs} outputs do not split into {self.heads} heads")
        channels = simplify(outputs // self.heads)
        return {
            self.out: TensorType(
                (state.axes[0], Axis("h", Const(self.heads)), state.axes[1], Axis("d", channels)), state.dtype
            )
        }

    def reference(
        self, tensors: Tensors, sizes: Mapping[str, int], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        made = tensors[self.tensor].to(dtype) @ tensors[self.kernel].to(dtype).T
        if self.bias:
            made = made + tensors[self.bias].to(dtype)
        return {self.out: made.reshape(*made.shape[:2], self.heads, -1).transpose(1, 2)}

    def flops(self, types: Types, sizes: Mapping[str, int]) -> int:
        return 2 * types[self.tensor].elements(sizes) * concrete(types[self.kernel].sizes[0], sizes)


@dataclass(frozen=True)
class Cache(Operation):
    """Keys or values of earlier steps, followed by the new ones along ``j``.

    Several groups of keys that one softmax runs over, such as blocks of a window and global tokens, are put together
    the same way, one after the other.

    Attributes:
        past: ``[b,g,p,d]``; new: ``[b,g,i,d]``.
    """

    keyword: ClassVar[str] = "cache"

    past: str = operand("bgpd")
    new: str = operand("bgid")
    out: str = result("out")

    def infer(self, types: Types) -> dict[str, TensorType]:
        past, new = find(types, self.past, "cache", 4), find(types, self.new, "cache", 4)
        for axis in (0, 1, 3):
            same_size("cache", (self.past, past.axes[axis]), (self.new, new.axes[axis]))
        length = simplify(past.axes[2].size + new.axes[2].size)
        return {self.out: TensorType((new.axes[0], new.axes[1], Axis("j", length), new.axes[3]), new.dtype)}

    def reference(
        self, tensors: Tensors, sizes: Mapping[str, int], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        return {self.out: torch.cat([tensors[self.past].to(dtype), tensors[self.new].to(dtype)], dim=2)}


ROUNDED_DTYPES = ("int8", "float8_e4m3")
"""What ``Quantize`` rounds to."""


@dataclass(frozen=True)
class Quantize(Operation):
    """Round a tensor to a narrow type with one scale per block of positions; the result is read dequantised.

    ``out = scale · round(x' / scale)`` over each block of ``block`` positions and all channels of one head, with
    ``x' = x − mean_j x`` when ``smooth``. For ``int8`` the scale is ``max|x'| / 127`` and numbers are whole; for
    ``float8_e4m3`` it is the least power of two that brings ``|x'|`` to at most 448, and numbers have four
    significant bits.

    Smoothing keys obeys a law: a logit ``a·(q·k_j) + c_j`` with ``a`` the same for all keys becomes less by
    ``a·(q·mean)``, which is the same for all keys too, and a softmax does not see it.

    Attributes:
        tensor: ``[b,h,i,d]``.
        dtype: ``int8`` or ``float8_e4m3``.
        block: positions per scale.
        smooth: subtract the mean over positions first.

    Follows: SageAttention (arXiv:2410.02367); e4m3 as in :mod:`attncompile.ir.e4m3`.
    """

    keyword: ClassVar[str] = "quantize"

    tensor: str = operand("bhid")
    dtype: str = "int8"
    block: int = 64
    smooth: bool = False
    out: str = result("out")

    def infer(self, types: Types) -> dict[str, TensorType]:
        found = find(types, self.tensor, "quantize", 4)
        if self.dtype not in ROUNDED_DTYPES:
            raise ValueError(f"quantize: unknown dtype {self.dtype!r}; choose one of {', '.join(ROUNDED_DTYPES)}")
        if self.block < 1:
            raise ValueError(f"quantize: block must be at least 1, got {self.block}")
        return {self.out: found}

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes ``[b,h,i,d]`` (in the dtype of ``x``) and scales ``[b,h,ceil(i/block)]``."""
        codes, scale = self._rounded(self._centred(x))
        return codes, scale[:, :, :: self.block]

    def _rounded(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes ``[b,h,i,d]`` and the scale of each position ``[b,h,i]``.

        Positions are told their block in the place of being cut into blocks: no size has to be a multiple of another,
        so that lengths stay free where this is exported.
        """
        most = x.abs().amax(dim=3)
        block = torch.arange(x.shape[2], device=x.device) // self.block
        largest = torch.zeros_like(most).scatter_reduce(2, block.expand_as(most), most, "amax")[:, :, block]
        if self.dtype == "float8_e4m3":
            scale = e4m3.power_scale(largest)
            return e4m3.e4m3(x / scale[..., None]), scale
        scale = largest / 127
        divisor = torch.where(scale > 0, scale, torch.ones_like(scale))[..., None]
        return (x / divisor).round().clamp(-127, 127), scale

    def reference(
        self, tensors: Tensors, sizes: Mapping[str, int], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        codes, scale = self._rounded(self._centred(tensors[self.tensor].to(dtype)))
        return {self.out: codes * scale[..., None]}

    def _centred(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(dim=2, keepdim=True) if self.smooth else x


OPERATIONS: dict[str, type[Operation]] = {
    kind.keyword: kind for kind in (Attend, Scan, Position, Project, Cache, Quantize)
}
