"""Modules for one attention: :class:`attncompile.kernels.dense.DenseForward`, filled in from a Spec."""

from __future__ import annotations

from collections.abc import Mapping

from attncompile.codegen.triton.decode import few_queries
from attncompile.codegen.triton.expressions import Scope, captured_tensors, print_triton
from attncompile.codegen.triton.module import (
    CHECKS,
    OPERAND_DTYPES,
    TILE_OF,
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
from attncompile.codegen.triton.runs import key_runs
from attncompile.codegen.triton.structure import Dense, dense
from attncompile.codegen.triton.tiles import Tile, dense_tile
from attncompile.codegen.triton.visits import ROW_FIRST, ROW_LAST, visits
from attncompile.ir import Quantize, Spec, simplify
from attncompile.ir.expr import SCORE, TRUE, Apply, Expr, Index, Load, loads, symbols, walk
from attncompile.kernels import quantize
from attncompile.kernels.dense import DenseForward
from attncompile.kernels.source import signature

HEAVY = 12
"""With more operators than this in score and mask, more warps share a tile."""


def dense_module(spec: Spec) -> tuple[str, tuple[Kernel, ...]]:
    """Source and kernels of a Spec with one attention, which has a kernel."""
    parts = dense(spec)
    binding = Binding.of(spec, captured_tensors(*_expressions(parts)))
    _, heads, queries = parts.query.sizes[:3]
    lengths = (
        binding.length("H", heads),
        binding.length("I", queries),
        binding.length("J", parts.key.sizes[2]),
    )
    skeleton = _skeleton(spec, parts, binding, lengths)
    tiles = _tiles(skeleton, parts)
    inputs = [binding.tensors[value.name] for value in spec.inputs]
    kernel_text = skeleton.source()
    rounding = [quantize.SOURCE.rstrip()] if parts.quantized else []
    few = few_queries(spec, parts, binding, lengths, skeleton)
    source = join(
        documentation(spec, inputs, *([few.note] if few else [])),
        *([few.tables] if few else []),
        tiles_text(tiles, "queries and keys per block, warps, pipeline stages") + "\n" + CHECKS,
        TILE_OF,
        *(few.functions if few else []),
        *device_functions_of(kernel_text, *rounding),
        *rounding,
        kernel_text,
        *([few.source] if few else []),
        launcher(spec, inputs, _launch(spec, parts, binding, lengths, skeleton, few.launch if few else [])),
    )
    kernels = _kernels(parts, _pointer_types(spec, parts, binding, skeleton), skeleton, tiles)
    return source, (*(few.kernels if few else ()), *kernels)


def _expressions(parts: Dense) -> tuple[Expr, ...]:
    return tuple(expr for expr in (parts.score, parts.mask, parts.edit, parts.sink) if expr is not None)


def _skeleton(spec: Spec, parts: Dense, binding: Binding, lengths: tuple[Length, Length, Length]) -> DenseForward:
    attend, types = parts.attend, spec.types()
    batch, heads, queries = parts.query.sizes[:3]
    extents = {"b": batch, "h": heads, "i": queries, "j": parts.key.sizes[2]}
    pairs = Scope({n: n for n in "bhij"}, binding.sizes, binding.pointers, types, extents)
    scalars = {n: n for n in ("b", "h", "row_first", "row_last", "key_first", "key_last")}
    block = Scope(scalars, binding.sizes, binding.pointers, types, extents)
    found = visits(parts.mask, queries, parts.key.sizes[2])
    runs, runs_text = key_runs(found, block)
    score = None if parts.score == SCORE else function_of("score", parts.score, pairs)
    visible = None if parts.mask == TRUE else function_of("visible", parts.mask, pairs)
    edit = None if parts.edit is None else function_of("edit", parts.edit, pairs)
    sink = None if parts.sink is None else function_of("sink", parts.sink, pairs)
    kv_head = print_triton(simplify(attend.kv_head, extents), block).value
    parameters = [name for function in (score, visible, edit, sink) if function for name in function.parameters]
    return DenseForward(
        normalizer=attend.norm.kind,
        scale=parts.scale,
        score=score,
        visible=visible,
        edit=edit,
        sink=sink,
        kv_head=kv_head,
        runs=runs,
        latest_first=ROW_LAST in symbols(found.main.stop) and ROW_FIRST not in symbols(found.main.start),
        lse=bool(attend.lse) and attend.lse in spec.outputs,
        captured=tuple((pointer, len(types[name].axes)) for name, pointer in binding.pointers.items()),
        lengths=(lengths[0].name, lengths[1].name, lengths[2].name),
        sizes=tuple(s for s in binding.sizes.values() if mentions(s, runs_text, kv_head, *parameters)),
        channels=constant(parts.query.sizes[3]),
        features=constant(parts.value.sizes[3]),
        clamped=any(loads(expr) for expr in _expressions(parts)),
        quantized=parts.quantized and (parts.quantized[0].block, parts.quantized[1].block),
    )


def _tiles(skeleton: DenseForward, parts: Dense) -> dict[str, Tile]:
    nodes = [node for expr in _expressions(parts) for node in walk(expr)]
    by_key = any(isinstance(node, Load) and Index("j") in symbols(node) for node in nodes)
    heavy = by_key or sum(isinstance(node, Apply) for node in nodes) > HEAVY
    widest = max(skeleton.padded(skeleton.channels), skeleton.padded(skeleton.features))
    most_keys = _power_of_two(parts.quantized[1].block) if parts.quantized else None
    return {dtype: dense_tile(widest, size, most_keys=most_keys, heavy=heavy) for dtype, size in OPERAND_DTYPES.items()}


def _launch(
    spec: Spec,
    parts: Dense,
    binding: Binding,
    lengths: tuple[Length, Length, Length],
    skeleton: DenseForward,
    few: list[str],
) -> list[str]:
    attend = parts.attend
    heads, queries = lengths[0].value, lengths[1].value
    batch = binding.size(parts.query.sizes[0])
    value = binding.tensors[attend.value]
    rounding: list[str] = []
    scales: tuple[str, ...] = ()
    if parts.quantized:
        first, second = parts.quantized
        like, other = binding.tensors[first.tensor], binding.tensors[second.tensor]
        rounding = [
            f"whole_query, query_scale = quantize({like}, {first.block}, {first.smooth})",
            f"whole_key, key_scale = quantize({other}, {second.block}, {second.smooth})",
        ]
        query, key, scales = "whole_query", "whole_key", ("query_scale", "key_scale")
    else:
        like = query = binding.tensors[attend.query]
        key = binding.tensors[attend.key]
    captured = [binding.tensors[name] for name in binding.pointers]
    values = {length.name: length.value for length in lengths}
    values |= {"key_heads": binding.size(parts.key.sizes[1])}
    arguments = [
        *(query, key, value, *scales, "out", *(("lse",) if skeleton.lse else ()), *captured),
        *(f"*{name}.stride()" for name in (query, key, value, "out", *captured)),
        *(values.get(name, name) for name in skeleton.integers()),
        *("BLOCK_I=queries", "BLOCK_J=keys", "num_warps=warps", "num_stages=stages", "enable_fp_fusion=True"),
    ]
    lse = f"lse = torch.empty(({batch}, {heads}, {queries}), dtype=torch.float32, device={like}.device)"
    results = {attend.out: "out", attend.lse: "lse"}
    returned = f"return {', '.join(results[name] for name in spec.outputs)}"
    grid = f"triton.cdiv({queries}, queries) * {batch} * {heads}"
    return [
        *expectations(spec, binding, like),
        allocation("out", batch, queries, heads, skeleton.features, like),
        *([lse] if skeleton.lse else []),
        "if out.numel() == 0:",
        f"    {returned}",
        *few,
        f"queries, keys, warps, stages = tile_of({like}, {queries})",
        *rounding,
        f"if max({key}.stride(2), {value}.stride(2)) * keys >= 2**31:",
        '    raise ValueError("keys or values lie too far apart in memory; call contiguous() on them first")',
        f"with torch.cuda.device_of({like}):",
        *signature("launch", ["attend_forward", f"({grid},)", *arguments], "", 4, inside=4).splitlines(),
        returned,
    ]


def _pointer_types(spec: Spec, parts: Dense, binding: Binding, skeleton: DenseForward) -> tuple[tuple[str, str], ...]:
    product = "int8" if parts.quantized else "operand"
    own = {"query": product, "key": product, "value": "operand", "out": "operand"}
    own |= dict.fromkeys(("query_scale", "key_scale", "lse"), "float32")
    types = spec.types()
    captured = {pointer: types[name].dtype for name, pointer in binding.pointers.items()}
    return tuple((pointer, (own | captured)[pointer]) for pointer in skeleton.pointers())


def _kernels(
    parts: Dense, pointers: tuple[tuple[str, str], ...], skeleton: DenseForward, tiles: Mapping[str, Tile]
) -> tuple[Kernel, ...]:
    constants = {dtype: {"BLOCK_I": tile.queries, "BLOCK_J": tile.keys} for dtype, tile in tiles.items()}
    own = Kernel("attend_forward", pointers, skeleton.strides(), skeleton.integers(), constants, tiles)
    if not parts.quantized:
        return (own,)
    return (*(_rounding_kernel(each, skeleton.channels) for each in parts.quantized), own)


def _rounding_kernel(operation: Quantize, channels: int) -> Kernel:
    constants = {
        "BLOCK": operation.block,
        "TILE": _power_of_two(operation.block),
        "CHANNELS": _power_of_two(channels),
        "D": channels,
        "SMOOTH": operation.smooth,
    }
    tile = Tile(operation.block, operation.block, 4, 2)
    return Kernel(
        "quantize_blocks",
        (("tensor", "operand"), ("mean", "float32"), ("whole", "int8"), ("scale", "float32")),
        ("stride_b", "stride_h", "stride_i", "stride_d"),
        ("H", "I"),
        dict.fromkeys(OPERAND_DTYPES, constants),
        dict.fromkeys(OPERAND_DTYPES, tile),
    )


def _power_of_two(value: int) -> int:
    return max(16, 1 << (value - 1).bit_length())
