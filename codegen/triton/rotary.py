"""Rotary maps before rounding: :class:`attncompile.kernels.rotary.RotaryRounding`, filled in from a Spec."""

from __future__ import annotations

from dataclasses import dataclass

from attncompile.codegen.triton.expressions import Scope, captured_tensors
from attncompile.codegen.triton.module import OPERAND_DTYPES, Kernel, constant, function_of, mentions
from attncompile.codegen.triton.names import ROTARY_NAMES, Names
from attncompile.codegen.triton.structure import Dense
from attncompile.codegen.triton.tiles import Tile
from attncompile.ir import Position, Quantize, Spec, simplify
from attncompile.ir.expr import Const, Expr, Size, symbols
from attncompile.kernels.quantize import power_of_two
from attncompile.kernels.rotary import SUMMED, RotaryRounding, warps_of


@dataclass(frozen=True)
class Map:
    """The functions of one rotary map, and what they are called with.

    Attributes:
        skeleton: the functions.
        results: names of the rotated tensors that they round.
        tensors: captured tensors in the order in which the launcher takes them; sizes: of the Spec, likewise.
    """

    skeleton: RotaryRounding
    results: tuple[str, ...]
    tensors: tuple[str, ...]
    sizes: tuple[str, ...]


def maps(spec: Spec, parts: Dense) -> tuple[Map, ...]:
    """The rotary maps before the rounding of a Spec: one, if queries and keys are rotated alike."""
    rounding = parts.rounding
    if rounding is None:
        return ()
    groups: dict[tuple[object, ...], list[tuple[str, Quantize, Position]]] = {}
    for name, step in (("query", rounding.query), ("key", rounding.key)):
        position = rounding.rotation(step)
        if position is not None:
            batch, _, length, _ = spec.types()[position.tensor].sizes
            alike = (position.cos, position.sin, position.channels, position.convention, batch, length)
            groups.setdefault(alike, []).append((name, step, position))
    return tuple(
        _map(spec, members, f"_{members[0][0]}" if len(groups) > 1 else "") for members in groups.values()
    )


def _map(spec: Spec, members: list[tuple[str, Quantize, Position]], suffix: str) -> Map:
    position, types = members[0][2], spec.types()
    batch, _, length, channels = types[position.tensor].sizes
    extents = {"b": batch, "i": length, "d": Const(position.channels)}
    cos, sin = simplify(position.cos, extents), simplify(position.sin, extents)
    names = Names(ROTARY_NAMES)
    pointers = {name: names.fresh(name) for name in captured_tensors(cos, sin)}
    read = sorted({node.name for expr in (*_read(spec, cos, sin), batch, length) for node in symbols(expr)
                   if isinstance(node, Size)})  # fmt: skip
    sizes = {name: names.fresh(name) for name in read}
    scope = Scope({name: name for name in "bid"}, sizes, pointers, types, extents)
    cosine, sine = function_of(f"cosine{suffix}", cos, scope), function_of(f"sine{suffix}", sin, scope)
    parameters = (*cosine.parameters, *sine.parameters)
    taken = {name: identifier for name, identifier in sizes.items() if mentions(identifier, *parameters)}
    skeleton = RotaryRounding(
        suffix=suffix,
        cosine=cosine,
        sine=sine,
        captured=tuple((identifier, len(types[name].axes)) for name, identifier in pointers.items()),
        sizes=tuple(taken.values()),
        interleaved=position.convention == "interleaved",
        channels=constant(channels),
        rotated=position.channels,
        smooth=any(step.smooth for _, step, _ in members),
    )
    return Map(skeleton, tuple(found.out for _, _, found in members), tuple(pointers), tuple(taken))


def _read(spec: Spec, *expressions: Expr) -> list[Expr]:
    """What may stand in the text of expressions: they themselves, and the sizes that their loads are clamped to."""
    types = spec.types()
    return [*expressions, *(size for name in captured_tensors(*expressions) for size in types[name].sizes)]


def rotary_kernels(spec: Spec, found: Map, step: Quantize) -> list[Kernel]:
    """Arguments of the kernels that rotate and round a tensor."""
    skeleton, types = found.skeleton, spec.types()
    pairs = zip(skeleton.pointers(), found.tensors, strict=True)
    captured = tuple((pointer, types[name].dtype) for pointer, name in pairs)
    strides = ("stride_b", "stride_h", "stride_i", "stride_d", *skeleton.strides())
    rest: dict[str, int | str | bool] = {"REST": skeleton.rest} if skeleton.rest else {}

    def kernel(name: str, block: int, own: tuple[tuple[str, str], ...], **more: int | str | bool) -> Kernel:
        constants = {"BLOCK": block, "TILE": power_of_two(block), "PAIRS": skeleton.pairs, **rest, **more}
        first = ("code_stride",) if len(own) > 1 else ()
        tile = Tile(block, block, warps_of(block, skeleton.channels), 2)
        return Kernel(
            f"{name}{skeleton.suffix}",
            (("tensor", "operand"), *own, *captured),
            strides,
            (*first, "H", "I", *skeleton.sizes),
            dict.fromkeys(OPERAND_DTYPES, constants),
            dict.fromkeys(OPERAND_DTYPES, tile),
        )

    codes = (("mean", "float32"), ("codes", step.dtype), ("scale", "float32"))
    rounding = kernel("rotate_quantize_blocks", step.block, codes, SMOOTH=step.smooth, E4M3=step.dtype == "float8_e4m3")
    return [*([kernel("rotate_sum_blocks", SUMMED, (("sums", "float32"),))] if step.smooth else []), rounding]


__all__ = ["Map", "maps", "rotary_kernels"]
