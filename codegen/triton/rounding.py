"""Rounding queries, keys and values before the attention: text of the kernels, lines of the launcher."""

from __future__ import annotations

from attncompile.codegen.triton.module import OPERAND_DTYPES, Binding, Kernel
from attncompile.codegen.triton.rotary import Map, maps, rotary_kernels
from attncompile.codegen.triton.structure import Dense
from attncompile.codegen.triton.tiles import Tile
from attncompile.ir import Quantize, Spec
from attncompile.ir.types import DTYPES
from attncompile.kernels import quantize
from attncompile.kernels.dense import NarrowOperands
from attncompile.kernels.source import signature

E4M3_CAPABILITY = (8, 9)
"""Least compute capability whose matrix units take float8 e4m3."""


def narrow_operands(parts: Dense) -> NarrowOperands | None:
    """What the skeletons need to know about rounded operands."""
    rounding = parts.rounding
    if rounding is None:
        return None
    value_block = rounding.value.block if rounding.value else None
    return NarrowOperands(rounding.query.dtype, rounding.query.block, rounding.key.block, value_block)


def rounding_texts(spec: Spec, parts: Dense) -> list[str]:
    """The kernels that round, each with its launcher; those of operands behind a rotary map rotate them too."""
    rounding = parts.rounding
    if rounding is None:
        return []
    plain = any(rounding.rotation(step) is None for step in (rounding.query, rounding.key))
    found = [quantize.CODES, *([quantize.BLOCKS] if plain else [])]
    found += [each.skeleton.source() for each in maps(spec, parts)]
    return [*found, *([quantize.VALUES] if rounding.value else [])]


def rounding_lines(spec: Spec, parts: Dense, binding: Binding, *, shuffled: bool) -> list[str]:
    """Launcher lines that make ``query_codes``, ``query_scale`` and so on, some of them by :func:`launch_rest`.

    Args:
        spec: the whole.
        parts: what is rounded.
        binding: identifiers.
        shuffled: whether keys of the turned values are in the order of a WGMMA accumulator.
    """
    rounding = parts.rounding
    if rounding is None:
        return []
    lines: list[str] = []
    for name, step in (("query", rounding.query), ("key", rounding.key)):
        found = _map_of(maps(spec, parts), step)
        function = f"rotate_quantize{found.skeleton.suffix}" if found else "quantize"
        more = [binding.tensors[each] for each in found.tensors] if found else []
        more += [binding.sizes[each] for each in found.sizes] if found else []
        given = [binding.tensors[rounding.source(step)], *more]
        given += [str(DTYPES[step.dtype]), str(step.block), str(step.smooth), "later"]
        lines += signature(f"{name}_codes, {name}_scale = {function}", given, "", inside=4).splitlines()
    if rounding.value:
        arguments = f"{binding.tensors[rounding.value.tensor]}, {rounding.value.block}, {shuffled}, later"
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


def _map_of(found: tuple[Map, ...], step: Quantize) -> Map | None:
    """The map of the tensor that a step rounds."""
    return next((each for each in found if step.tensor in each.results), None)


def rounding_kernels(spec: Spec, parts: Dense, channels: int, features: int) -> tuple[Kernel, ...]:
    """Arguments of the kernels that round."""
    rounding = parts.rounding
    if rounding is None:
        return ()
    made: list[Kernel] = []
    for step in (rounding.query, rounding.key):
        found = _map_of(maps(spec, parts), step)
        made += rotary_kernels(spec, found, step) if found else [_blocks_kernel(step, channels)]
    return (*made, *([_values_kernel(rounding.value, features)] if rounding.value else []))


def _blocks_kernel(step: Quantize, channels: int) -> Kernel:
    constants: dict[str, int | str | bool] = {
        "BLOCK": step.block,
        "TILE": quantize.power_of_two(step.block),
        "CHANNELS": quantize.power_of_two(channels),
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
        "TILE": quantize.power_of_two(step.block),
        "FEATURES": quantize.power_of_two(features),
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

