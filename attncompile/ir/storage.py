"""Keys and values as a cache stores them: read through an index table, and in narrow types with scales.

Both are stated with index expressions, so that one operation holds every layout: pages of any shape behind a block
table, and scales per head, token, channel, block or group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from attncompile.ir.evaluate import Environment, evaluate, index_grid
from attncompile.ir.expr import Const, Expr, Index, Load
from attncompile.ir.operation import Operation, Tensors, Types, find, operand, result
from attncompile.ir.operators import Kind
from attncompile.ir.ops import OPERATIONS
from attncompile.ir.simplify import simplify
from attncompile.ir.spec import Spec
from attncompile.ir.types import Axis, TensorType, Value, concrete, element_kind

LARGEST = {"float8_e4m3": 448.0, "int8": 127.0, "int4": 7.0}
"""Largest magnitude of a code by storage type; int8 and int4 leave out their lowest number to stay symmetric."""


@dataclass(frozen=True)
class Gather(Operation):
    """``out[b,g,j,d] = store[at_0, at_1, …]``, where each ``at`` is an index expression over ``b g j d``.

    A paged cache ``pages[P,16,G,D]`` behind a block table ``table[B,M]`` is read at ``table[b, j // 16], j % 16, g, d``
    with sizes ``B, G, 16·M, D``. An index outside the store reads its nearest element, as loads do everywhere.

    Attributes:
        store: a tensor with one axis for each index.
        at: integer expressions over ``b g j d`` and captured tensors.
        sizes: sizes of the axes ``b g j d`` of the result.

    Follows: Kwon et al. 2023 (arXiv:2309.06180).
    """

    keyword: ClassVar[str] = "gather"

    store: str = operand("")
    at: tuple[Expr, ...] = ()
    sizes: tuple[Expr, ...] = ()
    out: str = result("out")

    def expressions(self) -> tuple[Expr, ...]:
        return (*self.at, *self.sizes)

    def infer(self, types: Types) -> dict[str, TensorType]:
        store = find(types, self.store, "gather", len(self.at))
        if len(self.sizes) != 4:
            raise ValueError(f"gather: sizes are those of the axes b, g, j and d, got {len(self.sizes)}")
        self.check_captured(types, frozenset("bgjd"))
        for expr in self.expressions():
            if expr.kind is not Kind.INT:
                raise ValueError(f"gather: {expr} is {expr.kind}, should be int")
        axes = tuple(Axis(name, simplify(size)) for name, size in zip("bgjd", self.sizes, strict=True))
        return {self.out: TensorType(axes, store.dtype)}

    def reference(self, tensors: Tensors, sizes: Mapping[str, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        store = tensors[self.store]
        store = store.to(dtype) if store.is_floating_point() else store
        extents = [concrete(size, sizes) for size in self.sizes]
        grid = index_grid(dict(zip("bgjd", extents, strict=True)), store.device)
        environment = Environment(grid, sizes, tensors, dtype=dtype, device=store.device)
        positions = tuple(
            evaluate(index, environment).to(torch.int64).clamp(0, max(extent - 1, 0))
            for index, extent in zip(self.at, store.shape, strict=True)
        )
        return {self.out: store[positions].expand(extents)}


@dataclass(frozen=True)
class Dequantize(Operation):
    """``out[b,g,j,d] = scale(b,g,j,d) · code[b,g,j,d] + shift(b,g,j,d)``: a narrow store, read as real numbers.

    With ``bits`` 4 each byte of the store holds two signed numbers from −8 to 7: byte ``c`` of ``D/2`` holds channel
    ``c`` in its low and channel ``c + D/2`` in its high four bits. A scale that reads ``j`` is per token, one that
    reads ``d`` per channel, ``j // 64`` per block; a shift holds what was subtracted before rounding: the mean of the
    keys, or a zero point.

    Attributes:
        code: ``[b,g,j,d]`` in ``float8_e4m3`` or ``int8``, or packed in ``uint8``.
        scale, shift: real expressions over ``b g j d`` and captured tensors.
        bits: 8, or 4 for a packed store.
        dtype: float dtype of the result.

    Follows: KIVI (arXiv:2402.02750) for scales per channel and per token; smoothing as in arXiv:2410.02367.
    """

    keyword: ClassVar[str] = "dequantize"

    code: str = operand("bgjd")
    scale: Expr = Const(1.0)
    shift: Expr = Const(0.0)
    bits: int = 8
    dtype: str = "float32"
    out: str = result("out")

    def infer(self, types: Types) -> dict[str, TensorType]:
        code = find(types, self.code, "dequantize", 4)
        stored = {8: ("float8_e4m3", "int8"), 4: ("uint8",)}
        if self.bits not in stored:
            raise ValueError(f"dequantize: bits are 8 or 4, got {self.bits}")
        if code.dtype not in stored[self.bits]:
            raise ValueError(
                f"dequantize: a store of {self.bits} bits is {' or '.join(stored[self.bits])}, "
                f"but {self.code} is {code.dtype}"
            )
        if element_kind(self.dtype) is not Kind.FLOAT:
            raise ValueError(f"dequantize: the result is real, got {self.dtype}")
        self.check_captured(types, frozenset("bgjd"))
        self.check_kind("scale", Kind.FLOAT)
        self.check_kind("shift", Kind.FLOAT)
        channels = code.axes[3].size * (8 // self.bits)
        axes = tuple(Axis(name, simplify(size)) for name, size in zip("bgjd", (*code.sizes[:3], channels), strict=True))
        return {self.out: TensorType(axes, self.dtype)}

    def reference(self, tensors: Tensors, sizes: Mapping[str, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        code = tensors[self.code]
        code = (unpack(code) if self.bits == 4 else code).to(dtype)
        grid = index_grid(dict(zip("bgjd", code.shape, strict=True)), code.device)
        environment = Environment(grid, sizes, tensors, dtype=dtype, device=code.device)
        return {self.out: evaluate(self.scale, environment) * code + evaluate(self.shift, environment)}


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two signed numbers of four bits in a byte: channel ``c`` low, channel ``c + D/2`` high.

    Args:
        codes: int8 ``[…, D]`` from −8 to 7, with an even number of channels.

    Returns:
        uint8 ``[…, D/2]``.

    Raises:
        ValueError: for an odd number of channels.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"channels are packed in pairs, but there are {codes.shape[-1]}")
    low, high = codes.to(torch.int16).chunk(2, dim=-1)
    return ((low & 15) | (high & 15) << 4).to(torch.uint8)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`pack`: int8 ``[…, D]``."""
    wide = packed.to(torch.int16)
    codes = torch.cat([wide & 15, wide >> 4], dim=-1)
    return (torch.where(codes > 7, codes - 16, codes)).to(torch.int8)


@dataclass(frozen=True)
class Narrowed:
    """A tensor in a narrow storage type.

    Attributes:
        codes: ``[b,g,j,d]`` in float8_e4m3 or int8; ``[b,g,j,d/2]`` uint8 for int4.
        scale: float32 ``[b,g,d]`` per channel, ``[b,g,j]`` per token.
        shift: float32 mean over the tokens ``[b,g,d]``, or ``None``.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor | None


def narrow(
    tensor: torch.Tensor,
    storage: Literal["float8_e4m3", "int8", "int4"],
    by: Literal["channel", "token"],
    smooth: bool = False,
) -> Narrowed:
    """Round keys or values ``[b,g,j,d]`` to a storage type, ties to even.

    ``code = round((x − mean) / scale)`` with ``scale = max|x − mean| / m`` over all tokens of a channel, or all
    channels of a token, of one head; ``m`` is 448, 127 or 7. The mean over tokens is subtracted when ``smooth``.

    Raises:
        ValueError: for an unknown storage type or granularity, or an odd number of channels in int4.
    """
    if storage not in LARGEST or by not in ("channel", "token"):
        raise ValueError(f"storage is one of {', '.join(LARGEST)}, by channel or token; got {storage} by {by}")
    x = tensor.to(torch.float32)
    shift = x.mean(dim=2) if smooth else None
    x = x if shift is None else x - shift[:, :, None]
    axis, largest = (2 if by == "channel" else 3), LARGEST[storage]
    scale = x.abs().amax(dim=axis, keepdim=True) / largest
    ratio = (x / torch.where(scale > 0, scale, 1.0)).clamp(-largest, largest)
    codes = ratio.to(torch.float8_e4m3fn) if storage == "float8_e4m3" else ratio.round().to(torch.int8)
    return Narrowed(pack(codes) if storage == "int4" else codes, scale.squeeze(axis), shift)


def with_narrow_store(
    spec: Spec,
    name: str,
    storage: Literal["float8_e4m3", "int8", "int4"],
    by: Literal["channel", "token"],
    smooth: bool = False,
) -> Spec:
    """The Spec whose keys or values are read from a narrow store.

    In place of the input it takes ``{name}_codes``, ``{name}_scale`` and, when ``smooth``, ``{name}_shift``: what
    :func:`narrow` makes of it with the same arguments.

    Args:
        spec: with the input as an operand.
        name: an input ``[b,g,j,d]``.
        storage, by, smooth: as in :func:`narrow`.

    Raises:
        ValueError: when there is no such operand, its number of channels is odd (int4), or a new name is in use.
    """
    captured = {value.name for value in spec.captured()}
    operands = {value.name: value.type for value in spec.inputs if value.name not in captured}
    if name not in operands or len(operands[name].axes) != 4:
        raise ValueError(f"{spec.name}: {name!r} is no operand with four axes; there are {', '.join(operands)}")
    if storage not in LARGEST or by not in ("channel", "token"):
        raise ValueError(f"storage is one of {', '.join(LARGEST)}, by channel or token; got {storage} by {by}")
    kind = operands[name]
    batch, groups, tokens, channels = kind.sizes
    last = simplify(channels // 2) if storage == "int4" else channels
    if storage == "int4" and simplify(last * 2) != simplify(channels):
        raise ValueError(f"{spec.name}: {name} has {channels} channels; int4 packs them in pairs")
    axes = (*kind.axes[:3], Axis(kind.axes[3].name, last))
    along = (Index("d"), channels) if by == "channel" else (Index("j"), tokens)
    given = {f"{name}_scale": along, **({f"{name}_shift": (Index("d"), channels)} if smooth else {})}
    codes = Value(f"{name}_codes", TensorType(axes, "uint8" if storage == "int4" else storage))
    added = [
        Value(other, TensorType(tuple(Axis(f"a{n}", s) for n, s in enumerate((batch, groups, size))), "float32"))
        for other, (_, size) in given.items()
    ]
    terms = [Load(other, (Index("b"), Index("g"), index), Kind.FLOAT) for other, (index, _) in given.items()]
    read = Dequantize(codes.name, terms[0], terms[1] if smooth else Const(0.0), 4 if storage == "int4" else 8,
                      kind.dtype, name)  # fmt: skip
    inputs = tuple(codes if value.name == name else value for value in spec.inputs)
    return Spec(spec.name, (*inputs, *added), (read, *spec.operations), spec.outputs).verify()


OPERATIONS.update({kind.keyword: kind for kind in (Gather, Dequantize)})

__all__ = ["LARGEST", "Dequantize", "Gather", "Narrowed", "narrow", "pack", "unpack", "with_narrow_store"]
