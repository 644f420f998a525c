"""Modules for one scan: the skeleton :class:`attncompile.kernels.scan.ScanForward` filled in from a Spec."""

from __future__ import annotations

import dataclasses

from attncompile.codegen.triton.expressions import Scope, captured_tensors, print_triton
from attncompile.codegen.triton.module import (
    CHECKS,
    OPERAND_DTYPES,
    Binding,
    Kernel,
    Length,
    allocation,
    constant,
    device_functions_of,
    documentation,
    expectations,
    function_of,
    join,
    launcher,
    mentions,
    tiles_text,
)
from attncompile.codegen.triton.structure import scan
from attncompile.codegen.triton.tiles import TunedTile, scan_tile, with_tuned
from attncompile.ir import Scan, Spec, simplify
from attncompile.ir.expr import TRUE
from attncompile.kernels.scan import ScanForward
from attncompile.kernels.source import signature


def scan_module(spec: Spec, tuned: TunedTile | None = None) -> tuple[str, tuple[Kernel, ...]]:
    """Source and kernels of a Spec with one scan, which has a kernel."""
    operation, types = scan(spec), spec.types()
    binding = Binding.of(spec, captured_tensors(operation.decay, operation.mask))
    _, heads, positions = types[operation.query].sizes[:3]
    lengths = (binding.length("H", heads), binding.length("I", positions))
    skeleton = _skeleton(spec, operation, binding, lengths)
    found = {dtype: scan_tile(skeleton.padded_channels(), size) for dtype, size in OPERAND_DTYPES.items()}
    tiles = with_tuned(found, "scan", tuned)
    inputs = [binding.tensors[value.name] for value in spec.inputs]
    kernel_text = skeleton.source()
    source = join(
        documentation(spec, inputs),
        tiles_text(tiles, "positions per chunk, value channels per program, warps, stages") + "\n" + CHECKS,
        *device_functions_of(kernel_text),
        kernel_text,
        launcher(spec, inputs, _launch(spec, operation, binding, lengths, skeleton)),
    )
    captured = {pointer: types[name].dtype for name, pointer in binding.pointers.items()}
    kernel = Kernel(
        "scan_forward",
        tuple((pointer, captured.get(pointer, "operand")) for pointer in skeleton.pointers()),
        skeleton.strides(),
        skeleton.integers(),
        {dtype: {"CHUNK": tile.queries, "BLOCK_E": tile.keys} for dtype, tile in tiles.items()},
        tiles,
    )
    return source, (kernel,)


def _skeleton(spec: Spec, operation: Scan, binding: Binding, lengths: tuple[Length, Length]) -> ScanForward:
    types = spec.types()
    query, value = types[operation.query], types[operation.value]
    extents = {"b": query.sizes[0], "h": query.sizes[1], "j": query.sizes[2]}
    scope = Scope({name: name for name in extents}, binding.sizes, binding.pointers, types, extents)
    decay = function_of("decay_factor", simplify(operation.decay), scope)
    decay = dataclasses.replace(decay, value=f"tl.cast({decay.value}, tl.float32)")  # it may be a plain number
    mask = simplify(operation.mask, extents)
    visible = None if mask == TRUE else function_of("visible", mask, scope)
    kv_head = print_triton(simplify(operation.kv_head, extents), scope).value
    parameters = [name for function in (decay, visible) if function for name in function.parameters]
    return ScanForward(
        decay=decay,
        visible=visible,
        scale=operation.scale,
        feature=operation.feature,
        normalize=operation.normalize,
        kv_head=kv_head,
        captured=tuple((pointer, len(types[name].axes)) for name, pointer in binding.pointers.items()),
        heads=lengths[0].name,
        length=lengths[1].name,
        sizes=tuple(s for s in binding.sizes.values() if mentions(s, kv_head, *parameters)),
        channels=constant(query.sizes[3]),
        features=constant(value.sizes[3]),
    )


def _launch(
    spec: Spec, operation: Scan, binding: Binding, lengths: tuple[Length, Length], skeleton: ScanForward
) -> list[str]:
    first = binding.tensors[operation.query]
    batch = binding.size(spec.types()[operation.query].sizes[0])
    heads, length = (each.value for each in lengths)
    operands = [binding.tensors[name] for name in (operation.query, operation.key, operation.value)]
    captured = [binding.tensors[name] for name in binding.pointers]
    values = {each.name: each.value for each in lengths}
    arguments = [
        *(*operands, "out", *captured),
        *(f"*{name}.stride()" for name in (*operands, "out", *captured)),
        *(values.get(name, name) for name in skeleton.integers()),
        *("CHUNK=chunk", "BLOCK_E=features", "num_warps=warps", "num_stages=stages", "enable_fp_fusion=True"),
    ]
    grid = f"{batch} * {heads}, triton.cdiv({skeleton.features}, features)"
    return [
        *expectations(spec, binding, first),
        allocation("out", batch, length, heads, skeleton.features, first),
        "if out.numel() == 0:",
        "    return out",
        f"if {first}.dtype not in TILES:",
        f"""    raise ValueError(f"the scan takes {{', '.join(map(str, TILES))}}, not {{{first}.dtype}}")""",
        f"chunk, features, warps, stages = TILES[{first}.dtype]",
        f"with torch.cuda.device_of({first}):",
        *signature("launch", ["scan_forward", f"({grid})", *arguments], "", 4, inside=4).splitlines(),
        "return out",
    ]
