"""The operations around an Attend as ONNX nodes: rotary positions, caches, projections."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from attncompile.codegen.onnx.attend import Made, Place, arranged
from attncompile.codegen.onnx.expressions import Writer
from attncompile.codegen.onnx.layouts import Operand, single_groups
from attncompile.codegen.onnx.reading import fixed
from attncompile.ir.expr import Const
from attncompile.ir.operation import Operation
from attncompile.ir.ops import Cache, Position, Project, Quantize
from attncompile.ir.refusal import Refusal, RefusalError


def _writer(place: Place, tensor: str, axes: tuple[str, ...] = ("b", "h", "i", "d")) -> Writer:
    kind = place.types[tensor]
    extents = dict(zip(axes, kind.sizes, strict=False))
    return Writer(place.build, place.types, place.operands, axes, extents, kind.dtype, place.shared)


def _axes(place: Place, name: str) -> tuple[str, ...]:
    return tuple(axis.name for axis in place.types[name].axes)


def position(step: Position, place: Place) -> Made:
    """``x cos + partner(x) sin`` on the first channels."""
    build, kind = place.build, place.types[step.tensor]
    writer = _writer(place, step.tensor)
    # the tables run over the rotated channels only
    writer.extents = {**writer.extents, "d": Const(step.channels)}
    x = arranged(writer, place, step.tensor, single_groups)
    channels = fixed(kind.sizes[3])
    rest: ir.Value | None = None
    if channels != step.channels:
        cuts = build.constant([step.channels]), build.constant([2**31 - 1])
        rest = build("Slice", x, *cuts, build.constant([3]))
        x = build("Slice", x, build.constant([0]), cuts[0], build.constant([3]))
    half = step.channels // 2
    if step.convention == "half":
        first, second = build("Split", x, build.constant([half, half]), outputs=2, axis=-1)
        partner = build("Concat", build("Neg", second), first, axis=-1)
    else:
        pairs = build("Reshape", x, build.constant([0, 0, -1, half, 2]))
        even, odd = build("Split", pairs, build.constant([1, 1]), outputs=2, axis=-1)
        turned = build("Concat", build("Neg", odd), even, axis=-1)
        heads = fixed(kind.sizes[1])
        partner = build(
            "Reshape", turned, build.constant([0, heads if heads is not None else 0, -1, step.channels])
        )
    straight = build("Mul", x, writer.write(step.cos))
    out = build("Add", straight, build("Mul", partner, writer.write(step.sin)))
    if rest is not None:
        out = build("Concat", out, rest, axis=-1)
    return {step.out: Operand(out, single_groups(_axes(place, step.out)))}


def cache(step: Cache, place: Place) -> Made:
    """Past and new along the positions."""
    writer = _writer(place, step.new)
    past, new = (arranged(writer, place, name, single_groups) for name in (step.past, step.new))
    return {
        step.out: Operand(place.build("Concat", past, new, axis=2), single_groups(_axes(place, step.out)))
    }


def project(step: Project, place: Place) -> Made:
    """A linear map into heads, left flat."""
    build = place.build
    kernel = build("Transpose", place.operands[step.kernel].value, perm=[1, 0])
    made = build("MatMul", place.operands[step.tensor].value, kernel)
    if step.bias:
        made = build("Add", made, place.operands[step.bias].value)
    batch, head, position_axis, channel = _axes(place, step.out)
    return {step.out: Operand(made, ((batch,), (position_axis,), (head, channel)))}


def quantize(step: Quantize, place: Place) -> Made:
    """Rounding to INT8 and back with one scale per block of positions, in plain operators."""
    if step.dtype != "int8":
        raise RefusalError(Refusal("no-onnx-form", f"rounding to {step.dtype} has no ONNX form"))
    build, kind = place.build, place.types[step.tensor]
    writer = _writer(place, step.tensor)
    x = arranged(writer, place, step.tensor, single_groups)
    if step.smooth:
        x = build("Sub", x, build("ReduceMean", x, build.constant([2]), keepdims=1))
    length = writer.size(kind.sizes[2])
    block = build.constant([step.block])
    # -length mod block: how many positions the last block lacks
    lacking = build("Mod", build("Neg", length), block)
    pads = build("Concat", build.constant([0] * 6), lacking, build.constant([0]), axis=0)
    padded = build("Pad", x, pads)
    heads, channels = fixed(kind.sizes[1]), fixed(kind.sizes[3])
    blocks = build("Reshape", padded, build.constant([0, 0, -1, step.block, channels or 0]))
    largest = build("ReduceMax", build("Abs", blocks), build.constant([3, 4]), keepdims=1)
    scale = build("Div", largest, build.constant(127.0, writer.dtype))
    one, zero = build.constant(1.0, writer.dtype), build.constant(0.0, writer.dtype)
    divisor = build("Where", build("Greater", scale, zero), scale, one)
    whole = build("Round", build("Div", blocks, divisor))
    limits = build.constant(-127.0, writer.dtype), build.constant(127.0, writer.dtype)
    spread = build("Mul", build("Clip", whole, *limits), scale)
    joined = build("Reshape", spread, build.constant([0, heads or 0, -1, channels or 0]))
    cut = build("Slice", joined, build.constant([0]), length, build.constant([2]))
    return {step.out: Operand(cut, single_groups(_axes(place, step.out)))}


STEPS: dict[type[Operation], Callable[..., Made]] = {
    Position: position,
    Cache: cache,
    Project: project,
    Quantize: quantize,
}
"""How each operation that is neither an Attend nor a Scan is written."""
