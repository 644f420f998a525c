"""Rounding queries, keys and values before the attention: text of the kernels, lines of the launcher."""

from __future__ import annotations

from attncompile.codegen.triton.module import OPERAND_DTYPES, Binding, Kernel
from attncompile.codegen.triton.structure import Dense
from attncompile.codegen.triton.tiles import Tile
from attncompile.ir import Quantize, Spec
from attncompile.ir.types import DTYPES
from attncompile.kernels import quantize
from attncompile.kernels.dense import NarrowOperands

E4M3_CAPABILITY = (8, 9)
"""Least compute capability whose matrix units take float8 e4m3."""


def narrow_operands(parts: Dense) -> NarrowOperands | None:
    """What the skeletons need to know about rounded operands."""
    rounding = parts.rounding
    if rounding is None:
        return None
    value_block = rounding.value.block if rounding.value else None
    return NarrowOperands(rounding.query.dtype, rounding.query.block, rounding.key.block, value_block)


def rounding_texts(parts: Dense) -> list[str]:
    """The kernels that round, each with its launcher."""
    if parts.rounding is None:
        return []
    return [quantize.BLOCKS, *([quantize.VALUES] if parts.rounding.value else [])]


def rounding_lines(parts: Dense, binding: Binding, *, shuffled: bool) -> list[str]:
    """Launcher lines that make ``query_codes``, ``query_scale`` and so on.

    Args:
        parts: what is rounded.
        binding: identifiers.
        shuffled: whether keys of the turned values are in the order of a WGMMA accumulator.
    """
    rounding = parts.rounding
    if rounding is None:
        return []
    lines = []
    for name, step in (("query", rounding.query), ("key", rounding.key)):
        arguments = f"{binding.tensors[step.tensor]}, {DTYPES[step.dtype]}, {step.block}, {step.smooth}"
        lines.append(f"{name}_codes, {name}_scale = quantize({arguments})")
    if rounding.value:
        arguments = f"{binding.tensors[rounding.value.tensor]}, {rounding.value.block}, {shuffled}"
        lines.append(f"value_codes, value_scale = quantize_values({arguments})")
    return lines


def e4m3_check(parts: Dense, like: str) -> list[str]:
    """Launcher lines that refuse a device without e4m3."""
    if parts.rounding is None or not parts.rounding.e4m3:
        return []
    return [
        f"if {like}.is_cuda and (torch.version.hip or torch.cuda.get_device_capability({like}.device) "
        f"< {E4M3_CAPABILITY}):",
        '    raise ValueError("products in float8 e4m3 need an NVIDIA GPU of compute capability 8.9 or higher")',
    ]


def why_no_e4m3(spec: Spec, capability: tuple[int, int] | None) -> str | None:
    """Why a GPU cannot multiply what the Spec rounds, or ``None``.

    Args:
        spec: the Spec.
        capability: compute capability of an NVIDIA GPU; ``None`` for another.
    """
    if not any(isinstance(step, Quantize) and step.dtype == "float8_e4m3" for step in spec.operations):
        return None
    if capability is not None and capability >= E4M3_CAPABILITY:
        return None
    found = "this is another" if capability is None else f"this one has {capability[0]}.{capability[1]}"
    return f"products in float8 e4m3 need an NVIDIA GPU of compute capability 8.9 or higher, {found}"


def rounding_kernels(parts: Dense, channels: int, features: int) -> tuple[Kernel, ...]:
    """Arguments of the kernels that round."""
    rounding = parts.rounding
    if rounding is None:
        return ()
    made = [_blocks_kernel(step, channels) for step in (rounding.query, rounding.key)]
    return (*made, *([_values_kernel(rounding.value, features)] if rounding.value else []))


def _blocks_kernel(step: Quantize, channels: int) -> Kernel:
    constants: dict[str, int | str | bool] = {
        "BLOCK": step.block,
        "TILE": power_of_two(step.block, 1),
        "CHANNELS": power_of_two(channels, 1),
        "D": channels,
        "SMOOTH": step.smooth,
        "E4M3": step.dtype == "float8_e4m3",
    }
    return Kernel(
        "quantize_blocks",
        (("tensor", "operand"), ("mean", "float32"), ("codes", step.dtype), ("scale", "float32")),
        ("stride_b", "stride_h", "stride_i", "stride_d"),
        ("code_stride", "H", "I"),
        dict.fromkeys(OPERAND_DTYPES, constants),
        dict.fromkeys(OPERAND_DTYPES, Tile(step.block, step.block, 4, 2)),
    )


def _values_kernel(step: Quantize, features: int) -> Kernel:
    constants: dict[str, int | str | bool] = {
        "BLOCK": step.block,
        "TILE": power_of_two(step.block, 1),
        "FEATURES": power_of_two(features, 1),
        "E": features,
        "SHUFFLED": False,
    }
    return Kernel(
        "quantize_value_blocks",
        (("tensor", "operand"), ("codes", "float8_e4m3"), ("scale", "float32")),
        ("stride_b", "stride_g", "stride_j", "stride_e"),
        ("G", "J", "length"),
        dict.fromkeys(OPERAND_DTYPES, constants),
        dict.fromkeys(OPERAND_DTYPES, Tile(step.block, step.block, 8, 2)),
    )


def power_of_two(value: int, least: int = 16) -> int:
    """The least power of two that is no less, and at least ``least``."""
    return max(least, 1 << (value - 1).bit_length())
