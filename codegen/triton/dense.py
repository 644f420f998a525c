"""Modules for one attention: :class:`attncompile.kernels.dense.DenseForward`, filled in from a Spec."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from attncompile.codegen.triton.decode import few_queries
from attncompile.codegen.triton.expressions import DEVICE_FUNCTIONS, Scope, captured_tensors, print_triton
from attncompile.codegen.triton.module import (
    CHECKS,
    OPERAND_DTYPES,
    REST,
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
    score_function,
    tiles_text,
)
from attncompile.codegen.triton.rounding import (
    e4m3_check,
    narrow_operands,
    rounding_kernels,
    rounding_lines,
    rounding_texts,
)
from attncompile.codegen.triton.runs import grows, key_runs, query_runs
from attncompile.codegen.triton.saturated import Saturated
from attncompile.codegen.triton.structure import Dense, dense, hides
from attncompile.codegen.triton.tiles import Tile, TunedTile, dense_tile, with_tuned
from attncompile.codegen.triton.visits import ROW_FIRST, ROW_LAST, visits
from attncompile.ir import Spec, simplify
from attncompile.ir.expr import SCORE, TRUE, Apply, Expr, Index, Load, loads, symbols, walk
from attncompile.ir.prologue import input_behind
from attncompile.kernels import quantize
from attncompile.kernels.dense import DenseForward
from attncompile.kernels.source import signature
from attncompile.kernels.taps import ColumnMass

HEAVY = 12
"""With more operators than this in score and mask, more warps share a tile."""


def dense_module(spec: Spec, tuned: TunedTile | None = None) -> tuple[str, tuple[Kernel, ...]]:
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
    tiles = with_tuned(_tiles(skeleton, parts), "dense", tuned)
    inputs = [binding.tensors[value.name] for value in spec.inputs]
    mass = _mass(spec, parts, binding, skeleton)
    kernel_text = "\n\n\n".join([skeleton.source(), *([mass.source()] if mass else [])])
    rounding = rounding_texts(spec, parts)
    few = few_queries(spec, parts, binding, lengths, skeleton, tuned)
    source = join(
        documentation(spec, inputs, *([few.note] if few else [])),
        *([few.tables] if few else []),
        tiles_text(tiles, "queries and keys per block, warps, pipeline stages") + "\n" + CHECKS,
        TILE_OF,
        *dict.fromkeys([*([REST] if rounding or mass else []), *(few.functions if few else [])]),
        *device_functions_of(kernel_text, *rounding, names=(*DEVICE_FUNCTIONS, *quantize.DEVICE_FUNCTIONS)),
        *rounding,
        kernel_text,
        *([few.source] if few else []),
        launcher(spec, inputs, _launch(spec, parts, binding, lengths, skeleton, few.launch if few else [], mass)),
    )
    kernels = _kernels(spec, parts, _pointer_types(spec, parts, binding, skeleton), skeleton, tiles, mass)
    return source, (*(few.kernels if few else ()), *kernels)


def _expressions(parts: Dense) -> tuple[Expr, ...]:
    found = (parts.score, parts.mask, parts.edit, parts.sink, parts.divisor)
    return tuple(expr for expr in found if expr is not None)


def _skeleton(spec: Spec, parts: Dense, binding: Binding, lengths: tuple[Length, Length, Length]) -> DenseForward:
    attend, types = parts.attend, spec.types()
    batch, heads, queries = parts.query.sizes[:3]
    extents = {"b": batch, "h": heads, "i": queries, "j": parts.key.sizes[2]}
    pairs = Scope({n: n for n in "bhij"}, binding.sizes, binding.pointers, types, extents)
    scalars = {n: n for n in ("b", "h", "row_first", "row_last", "key_first", "key_last")}
    block = Scope(scalars, binding.sizes, binding.pointers, types, extents)
    far = Saturated.of(parts.score, parts.mask, queries, parts.key.sizes[2])
    found = far.found if far else visits(parts.mask, queries, parts.key.sizes[2])
    runs, runs_text = key_runs(found, block)
    # where weights are only summed and multiplied with values, rows see to what hides keys: no score takes longer
    by_row = hides(parts) and parts.edit is None and parts.rounding is None and not attend.taps
    of_scores = functools.partial(function_of if by_row else functools.partial(score_function, parts), scope=pairs)
    score = None if parts.score == SCORE else of_scores("score", parts.score)
    far_score = of_scores("far_score", far.score) if far else None
    visible = None if parts.mask == TRUE else function_of("visible", parts.mask, pairs)
    edit = None if parts.edit is None else function_of("edit", parts.edit, pairs)
    sink = None if parts.sink is None else function_of("sink", parts.sink, pairs)
    divisor = None if parts.divisor is None else function_of("divisor", parts.divisor, pairs)
    kv_head = print_triton(simplify(attend.kv_head, extents), block).value
    functions = (score, far_score, visible, edit, sink, divisor)
    parameters = [name for function in functions if function for name in function.parameters]
    return DenseForward(
        normalizer=attend.norm.kind,
        scale=parts.scale,
        score=score,
        visible=visible,
        edit=edit,
        sink=sink,
        divisor=divisor,
        kv_head=kv_head,
        runs=runs,
        latest_first=ROW_LAST in symbols(found.main.stop) and ROW_FIRST not in symbols(found.main.start),
        lse=attend.lse in spec.outputs or attend.mass in spec.outputs,
        taps=tuple(tap for tap in ("peak", "entropy") if getattr(attend, tap) in spec.outputs),
        captured=tuple((pointer, len(types[name].axes)) for name, pointer in binding.pointers.items()),
        lengths=(lengths[0].name, lengths[1].name, lengths[2].name),
        sizes=tuple(s for s in binding.sizes.values() if mentions(s, runs_text, kv_head, *parameters)),
        channels=constant(parts.query.sizes[3]),
        features=constant(parts.value.sizes[3]),
        clamped=any(loads(expr) for expr in _expressions(parts)),
        narrow=narrow_operands(parts),
        far_score=far_score,
        hides=by_row,
    )


def _mass(spec: Spec, parts: Dense, binding: Binding, skeleton: DenseForward) -> ColumnMass | None:
    """The kernel that sums the weights of each key, where the Spec gives that."""
    attend = parts.attend
    if attend.mass not in spec.outputs:
        return None
    (batch, heads, queries), keys = parts.query.sizes[:3], parts.key.sizes[2]
    extents = {"b": batch, "h": heads, "i": queries, "j": keys}
    scope = Scope({}, binding.sizes, binding.pointers, spec.types(), extents)
    runs, text, found = query_runs(parts.mask, queries, keys, scope)
    sizes = tuple(s for s in binding.sizes.values() if s in skeleton.sizes or mentions(s, text))
    return ColumnMass(dataclasses.replace(skeleton, sizes=sizes), runs, grows(found))


def _tiles(skeleton: DenseForward, parts: Dense) -> dict[str, Tile]:
    nodes = [node for expr in _expressions(parts) for node in walk(expr)]
    by_key = any(isinstance(node, Load) and Index("j") in symbols(node) for node in nodes)
    # rounding weights takes registers: four warps have too few of them where there are two pipeline stages
    heavy = by_key or skeleton.turned_values or sum(isinstance(node, Apply) for node in nodes) > HEAVY
    widest = max(skeleton.padded(skeleton.channels), skeleton.padded(skeleton.features))
    blocks = [quantize.power_of_two(step.block, 16) for step in parts.rounding.steps[1:]] if parts.rounding else []
    if skeleton.turned_values:  # whatever the operands were, tiles hold bytes; products run over at least 32 keys
        tile = dense_tile(widest, 2, most_keys=max(32, min(blocks)), heavy=heavy)
        return dict.fromkeys(OPERAND_DTYPES, tile)
    most_keys = min(blocks, default=None)
    return {dtype: dense_tile(widest, size, most_keys=most_keys, heavy=heavy) for dtype, size in OPERAND_DTYPES.items()}


def _launch(
    spec: Spec,
    parts: Dense,
    binding: Binding,
    lengths: tuple[Length, Length, Length],
    skeleton: DenseForward,
    few: list[str],
    mass: ColumnMass | None,
) -> list[str]:
    attend = parts.attend
    heads, queries = lengths[0].value, lengths[1].value
    batch = binding.size(parts.query.sizes[0])
    rounding = rounding_lines(spec, parts, binding, shuffled=False)
    scales = skeleton.narrow.scales() if skeleton.narrow else ()
    like = binding.tensors[input_behind(spec, attend.query)]
    query, key = ("query_codes", "key_codes") if parts.rounding else (like, binding.tensors[attend.key])
    value = "value_codes" if skeleton.turned_values else binding.tensors[attend.value]
    captured = [binding.tensors[name] for name in binding.pointers]
    values = {length.name: length.value for length in lengths}
    values |= {"key_heads": binding.size(parts.key.sizes[1])}
    arguments = [
        *(query, key, value, *scales, "out", *(("lse",) if skeleton.lse else ()), *skeleton.tap_pointers(), *captured),
        *(f"*{name}.stride()" for name in (query, key, value, "out", *captured)),
        *(values.get(name, name) for name in skeleton.integers()),
        *("BLOCK_I=queries", "BLOCK_J=keys", "num_warps=warps", "num_stages=stages", "enable_fp_fusion=True"),
    ]
    rows, options = f"({batch}, {heads}, {queries})", f"dtype=torch.float32, device={like}.device"
    lse = [f"{name} = torch.empty({rows}, {options})" for name in ("lse",) if skeleton.lse]
    lse += [f"{name} = torch.empty({rows}, {options})" for name in skeleton.tap_pointers()]
    results = {attend.out: "out", attend.lse: "lse", attend.peak: "peaks", attend.entropy: "entropies"}
    results |= {attend.mass: "mass"}
    summed: list[str] = []
    if mass:
        length = lengths[2].value
        lse.append(f"mass = torch.zeros(({batch}, {heads}, {length}), {options})")
        given = [
            *(query, key, "lse", "mass", *captured),
            *(f"*{name}.stride()" for name in (query, key, *captured)),
            *(values.get(name, name) for name in mass.forward.integers()),
            *("BLOCK_I=queries", "BLOCK_J=keys", "num_warps=warps", "num_stages=stages"),
        ]
        blocks = f"(triton.cdiv({length}, keys) * {batch} * {heads},)"
        summed = signature("launch", ["column_mass", blocks, *given, "later=later"], "", 4, inside=4).splitlines()
    returned = f"return {', '.join(results[name] for name in spec.outputs)}"
    grid = f"triton.cdiv({queries}, queries) * {batch} * {heads}"
    several = ["later = []"] if rounding or mass else []
    waits = ["later=later"] if several else []
    return [
        *expectations(spec, binding, like),
        allocation("out", batch, queries, heads, skeleton.features, like),
        *lse,
        "if out.numel() == 0:",
        f"    {returned}",
        *few,
        *e4m3_check(parts, like),
        f"queries, keys, warps, stages = tile_of({like}, {queries})",
        *several,
        *rounding,
        f"if max({key}.stride(2), {value}.stride({3 if skeleton.turned_values else 2})) * keys >= 2**31:",
        '    raise ValueError("keys or values lie too far apart in memory; call contiguous() on them first")',
        f"with torch.cuda.device_of({like}):",
        *signature("launch", ["attend_forward", f"({grid},)", *arguments, *waits], "", 4, inside=4).splitlines(),
        *summed,
        *(["    launch_rest(later)"] if several else []),
        returned,
    ]


def _pointer_types(spec: Spec, parts: Dense, binding: Binding, skeleton: DenseForward) -> dict[str, str]:
    """Element type of each pointer that a kernel may have."""
    product = skeleton.narrow.dtype if skeleton.narrow else "operand"
    value = "float8_e4m3" if skeleton.turned_values else "operand"
    own = {"query": product, "key": product, "value": value, "out": "operand"}
    own |= dict.fromkeys(("query_scale", "key_scale", "value_scale", "lse", "peaks", "entropies", "mass"), "float32")
    types = spec.types()
    captured = {pointer: types[name].dtype for name, pointer in binding.pointers.items()}
    return own | captured


def _kernels(
    spec: Spec,
    parts: Dense,
    types: Mapping[str, str],
    skeleton: DenseForward,
    tiles: Mapping[str, Tile],
    mass: ColumnMass | None,
) -> tuple[Kernel, ...]:
    constants = {dtype: {"BLOCK_I": tile.queries, "BLOCK_J": tile.keys} for dtype, tile in tiles.items()}
    made = []
    for name, kernel in (("column_mass", mass), ("attend_forward", skeleton)):
        if kernel is not None:
            pointers = tuple((pointer, types[pointer]) for pointer in kernel.pointers())
            integers = (kernel.forward if isinstance(kernel, ColumnMass) else kernel).integers()
            made.append(Kernel(name, pointers, kernel.strides(), integers, constants, tiles))
    return (*rounding_kernels(spec, parts, skeleton.channels, skeleton.features), *made)
