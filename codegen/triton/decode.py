"""Modules for few queries and long caches: :class:`attncompile.kernels.decode.Decode`, filled in from a Spec."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from attncompile.codegen.triton.expressions import Scope, captured_tensors, print_triton
from attncompile.codegen.triton.module import (
    CHECKS,
    OPERAND_DTYPES,
    REST,
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
)
from attncompile.codegen.triton.runs import key_runs
from attncompile.codegen.triton.storage import Storage, decode_reason, group_of, storage_of
from attncompile.codegen.triton.structure import Dense, dense, hides
from attncompile.codegen.triton.tiles import Tile, TunedTile, decode_tile, with_tuned
from attncompile.codegen.triton.visits import ROWS, KeyRange, Visits, extreme, visits
from attncompile.ir import Spec, simplify
from attncompile.ir.expr import SCORE, TRUE, Apply, Const, Expr, Index, apply, conjuncts, loads, substitute, symbols
from attncompile.ir.operators import Kind
from attncompile.ir.simplify import Simplifier
from attncompile.ir.types import TensorType
from attncompile.kernels.decode import SPLITS_OF, Decode
from attncompile.kernels.dense import DenseForward, DeviceFunction
from attncompile.kernels.source import signature
from attncompile.kernels.stored import PAIRS_OF, Form, Reads, Stored, Term

FEW_QUERIES, LONG_CACHE = 16, 512
"""A Spec that the dense kernel computes too goes to the decode kernel with at most so many queries and at least so many
keys."""

MOST_ROWS, MERGED = 64, 16
"""Rows of a tile at most, and parts that the second kernel reads at a time."""

DEVICE = ("weigh", "weigh_scaled", "power_above", "from_int8", "from_int4", "from_e4m3")


def decode_expressions(spec: Spec, parts: Dense) -> tuple[Expr, ...]:
    """Everything the kernel evaluates."""
    stores = [expr for each in _storages(spec, parts) for expr in each.expressions()]
    found = (parts.score, parts.mask, parts.edit, parts.sink, *stores)
    return tuple(expr for expr in found if expr is not None)


def _storages(spec: Spec, parts: Dense) -> tuple[Storage, Storage]:
    found = storage_of(spec, parts.attend.key), storage_of(spec, parts.attend.value)
    assert found[0] is not None and found[1] is not None  # storage_reason has seen to it
    return found[0], found[1]


def decode_module(spec: Spec, tuned: TunedTile | None = None) -> tuple[str, tuple[Kernel, ...]]:
    """Source and kernels of a Spec whose keys or values come from a store."""
    parts = dense(spec)
    binding = Binding.of(spec, captured_tensors(*decode_expressions(spec, parts)))
    _, heads, queries = parts.query.sizes[:3]
    lengths = (
        binding.length("H", heads),
        binding.length("I", queries),
        binding.length("J", parts.key.sizes[2]),
    )
    functions = _functions(spec, parts, binding)
    skeleton = decode_skeleton(spec, parts, binding, lengths, *functions, unlimited=hides(parts))
    tiles = decode_tiles(skeleton, tuned)
    inputs = [binding.tensors[value.name] for value in spec.inputs]
    own = [function.source() for function in functions if function]
    text = "\n\n\n".join([*own, skeleton.source()])
    query = binding.tensors[parts.attend.query]
    lines = [
        *expectations(spec, binding, query),
        *_outputs(parts, binding, lengths, skeleton, query),
        "if out.numel() == 0:",
        f"    {_returned(spec, parts)}",
        *decode_launch(spec, parts, binding, lengths, skeleton, tiles),
    ]
    source = join(
        documentation(spec, inputs),
        decode_tiles_text(tiles, tables=any(each.gather for each in _storages(spec, parts))) + "\n" + CHECKS,
        REST,
        SPLITS_OF,
        *([PAIRS_OF] if any("pairs_of(" in line for line in lines) else []),
        *decode_device_functions(text),
        *device_functions_of(text),
        text,
        launcher(spec, inputs, lines),
    )
    return source, decode_kernels(spec, parts, binding, skeleton, tiles)


@dataclass(frozen=True)
class FewQueries:
    """What a dense module has in addition, for few queries and many keys.

    Attributes:
        note: when they run, for the documentation.
        tables: constants of the module.
        functions: of launcher and device.
        source: both kernels.
        launch: launcher lines that run them and return when the sizes say so.
        kernels: for compiling ahead of time.
    """

    note: str
    tables: str
    functions: tuple[str, ...]
    source: str
    launch: list[str]
    kernels: tuple[Kernel, ...]


def few_queries(
    spec: Spec,
    parts: Dense,
    binding: Binding,
    lengths: tuple[Length, Length, Length],
    forward: DenseForward,
    tuned: TunedTile | None = None,
) -> FewQueries | None:
    """The decode kernels beside a dense one, with the functions of its Spec; ``None`` where they do not fit, and where
    there are always as many queries as keys.
    """
    as_many = simplify(parts.query.sizes[2]) == simplify(parts.key.sizes[2])
    if as_many or parts.rounding or decode_reason(spec) is not None:
        return None
    skeleton = decode_skeleton(
        spec,
        parts,
        binding,
        lengths,
        forward.score,
        forward.visible,
        forward.edit,
        forward.sink,
        unlimited=forward.hides,
    )
    tiles = decode_tiles(skeleton, tuned)
    text = skeleton.source()
    launch = decode_launch(spec, parts, binding, lengths, skeleton, tiles, inside=8)
    return FewQueries(
        f"With at most {FEW_QUERIES} queries and at least {LONG_CACHE} keys the keys are cut into parts.",
        f"FEW_QUERIES, LONG_CACHE = {FEW_QUERIES}, {LONG_CACHE}  # what the kernel that cuts the keys is for\n"
        + decode_tiles_text(tiles),
        (REST, SPLITS_OF, *decode_device_functions(text)),
        text,
        [
            f"if {lengths[1].value} <= FEW_QUERIES and {lengths[2].value} >= LONG_CACHE:",
            *("    " + line for line in launch),
        ],
        decode_kernels(spec, parts, binding, skeleton, tiles),
    )


def decode_device_functions(text: str) -> list[str]:
    """Source of the device functions that the kernels' text calls, and of what those call."""
    own = device_functions_of(text, names=DEVICE)
    return [*device_functions_of(*own, names=("e4m3_number", "asked_byte")), *own]


def _functions(spec: Spec, parts: Dense, binding: Binding) -> tuple[DeviceFunction | None, ...]:
    extents = {"b": parts.query.sizes[0], "h": parts.query.sizes[1], "i": parts.query.sizes[2]}
    scope = Scope(
        {n: n for n in "bhij"}, binding.sizes, binding.pointers, spec.types(), {**extents, "j": parts.key.sizes[2]}
    )
    rows = (("score", parts.score), ("visible", parts.mask), ("edit", parts.edit), ("sink", parts.sink))
    return tuple(
        None if expr is None or expr in (SCORE, TRUE) else function_of(name, expr, scope) for name, expr in rows
    )


def decode_skeleton(
    spec: Spec,
    parts: Dense,
    binding: Binding,
    lengths: tuple[Length, Length, Length],
    score: DeviceFunction | None,
    visible: DeviceFunction | None,
    edit: DeviceFunction | None,
    sink: DeviceFunction | None,
    *,
    unlimited: bool,
) -> Decode:
    """The kernels of a Spec that the decode kernel computes."""
    attend, types = parts.attend, spec.types()
    batch, heads, queries = parts.query.sizes[:3]
    group = group_of(attend, heads, parts.key.sizes[1])
    assert group is not None  # decode_reason has seen to it
    extents = {"b": batch, "h": heads, "i": queries, "j": parts.key.sizes[2]}
    scalars = {n: n for n in ("b", "row_first", "row_last", "key_first", "key_last")}
    block = Scope(scalars, binding.sizes, binding.pointers, types, extents)
    runs, runs_text = key_runs(decode_visits(parts.mask, queries, parts.key.sizes[2]), block)
    numbers: Counter[str] = Counter()
    stores = _storages(spec, parts)
    keys, key_lines = _stored("key", stores[0], parts.key, parts.query.sizes[3], binding, types, numbers)
    values, value_lines = _stored("value", stores[1], parts.value, parts.value.sizes[3], binding, types, numbers)
    rows = [text for each in (keys, values) for text in each.rows if text]
    terms = [term.function for each in (keys, values) for term in (each.scale, each.shift) if term]
    functions = [*(function for function in (score, visible, edit, sink) if function), *terms]
    parameters = [name for function in functions for name in function.parameters]
    texts = (runs_text, *parameters, *rows, *key_lines, *value_lines)
    return Decode(
        scale=parts.scale,
        score=score,
        visible=visible,
        edit=edit,
        sink=sink,
        unlimited=unlimited,
        group=group.heads,
        contiguous=group.contiguous,
        key=keys,
        value=values,
        runs=runs,
        lse=bool(attend.lse) and attend.lse in spec.outputs,
        captured=tuple((pointer, len(types[name].axes)) for name, pointer in binding.pointers.items()),
        lengths=(lengths[0].name, lengths[1].name, lengths[2].name),
        sizes=tuple(size for size in binding.sizes.values() if mentions(size, *texts)),
        lines=(*key_lines, *value_lines),
        turned=turned(keys, values),
    )


def turned(key: Stored, value: Stored) -> bool:
    """Whether the rows lie along the second axis of the products; see :class:`attncompile.kernels.decode.Decode`."""
    return key.form != "real" and value.form != "real"


def decode_visits(mask: Expr, query_length: Expr, key_length: Expr) -> Visits:
    """The keys that all queries of a batch row visit together; none of them is in ``full``.

    Conditions that differ by head give no limit, since a tile's rows belong to several. A limit that is loaded, such as
    the length of a batch row, counts here: one program reads it once. So does the position of a single query, which
    says how far a static cache is filled.
    """
    if query_length == Const(1):
        mask = substitute(mask, {Index("i"): Const(0)})
    starts: list[Expr] = []
    stops: list[Expr] = []
    kept: list[Expr] = []
    for part in conjuncts(simplify(mask)):
        if Index("h") in symbols(part):
            continue
        match part:
            case Apply("lt" | "le" | "gt" | "ge" as operator, (Index("j"), limit)) if _is_loaded(limit):
                upper = operator in ("lt", "le")
                found = extreme(simplify(limit + 1) if operator in ("le", "gt") else limit, upper, ROWS)
                if found is not None:
                    (stops if upper else starts).append(found)
            case _:
                kept.append(part)
    plain = visits(apply("and", *kept) if len(kept) > 1 else kept[0] if kept else TRUE, query_length, key_length)

    def limited(limits: KeyRange) -> KeyRange:
        start = apply("max", limits.start, *starts) if starts else limits.start
        return KeyRange(start, apply("min", limits.stop, *stops) if stops else limits.stop)

    first = plain.first and limited(plain.first)
    return dataclasses.replace(plain, first=first, main=limited(plain.main), full=None)


def _is_loaded(limit: Expr) -> bool:
    """Whether a limit of ``j`` is an integer that reads tensors, and nothing that differs by key."""
    return limit.kind is Kind.INT and Index("j") not in symbols(limit) and bool(loads(limit))


def _stored(
    name: str,
    storage: Storage,
    read: TensorType,
    channels: Expr,
    binding: Binding,
    types: Mapping[str, TensorType],
    numbers: Counter[str],
) -> tuple[Stored, list[str]]:
    """How keys or values are read, and the lines that their rows rely on."""
    extents = {"b": read.sizes[0], "g": read.sizes[1], "j": read.sizes[2], "d": channels}
    scope = Scope({"b": "b", "g": "g", "j": "keys"}, binding.sizes, binding.pointers, types, extents)
    at = storage.gather.at if storage.gather else tuple(map(Index, "bgjd"))
    lines: list[str] = []
    rows: list[str | None] = []
    for index, axis in zip(at, types[storage.name].axes, strict=True):
        if index == Index("d"):
            rows.append(None)
            continue
        printed = print_triton(_clamped(simplify(index, extents), axis.size, extents), scope, numbers)
        lines.extend(printed.lines)
        rows.append(printed.value)
    width = constant(channels)
    dequantize = storage.dequantize
    if dequantize is None:
        return Stored(name, tuple(rows), width), lines
    form: Form = "int4" if dequantize.bits == 4 else types[storage.name].dtype  # type: ignore[assignment]
    scale = _term(f"{name}_scale", simplify(dequantize.scale, extents), 1.0, binding, types, extents)
    shift = _term(f"{name}_shift", simplify(dequantize.shift, extents), 0.0, binding, types, extents)
    factored = scale is None or scale.reads != "both"
    factored &= shift is None or (name == "key" and shift.reads == "channel")
    return Stored(name, tuple(rows), width, form, scale, shift, factored), lines


def _clamped(index: Expr, size: Expr, extents: Mapping[str, Expr]) -> Expr:
    """The index, moved into its axis unless it is proven to be inside."""
    simplifier = Simplifier(extents)
    if not simplifier.nonnegative(index):
        index = apply("max", index, Const(0))
    if not simplifier.nonnegative(size - 1 - index):
        index = apply("min", index, simplify(size - 1))
    return index


def _term(
    name: str,
    expr: Expr,
    neutral: float,
    binding: Binding,
    types: Mapping[str, TensorType],
    extents: Mapping[str, Expr],
) -> Term | None:
    if expr == Const(neutral):
        return None
    scope = Scope({n: n for n in "bgjd"}, binding.sizes, binding.pointers, types, extents)
    by_token, by_channel = (Index(n) in symbols(expr) for n in "jd")
    reads: Reads = "both" if by_token and by_channel else "token" if by_token else "channel"
    return Term(function_of(name, expr, scope), reads)


def decode_tiles(skeleton: Decode, tuned: TunedTile | None = None) -> dict[str, Tile]:
    """How the first kernel is launched, by element type of the query."""
    stores = (skeleton.key, skeleton.value)
    wide = any(each.form == "real" and len(each.parts) > 1 for each in stores)
    four_bits = all(each.form == "int4" and each.factored for each in stores)
    found = {
        dtype: decode_tile(sum(each.bytes_of_a_key(size) for each in stores), wide, four_bits and size == 2)
        for dtype, size in OPERAND_DTYPES.items()
    }
    return with_tuned(found, "decode", tuned)


def decode_tiles_text(tiles: Mapping[str, Tile], *, tables: bool = False) -> str:
    """The table ``DECODE_TILES`` of a module and the constants beside it.

    One wave of programs is fastest (measured on an H200): each more costs its start and its end again. Where ``tables``
    say which rows to read, two waves hide how long that takes.
    """
    rows = "\n".join(f"    torch.{dtype}: ({t.keys}, {t.warps}, {t.stages})," for dtype, t in tiles.items())
    return (
        f"DECODE_TILES = {{  # keys per tile, warps, pipeline stages\n{rows}\n}}\n"
        f"WAVES, LEAST_TILES = {2 if tables else 1}, 4  # see splits_of"
    )


def _outputs(
    parts: Dense, binding: Binding, lengths: tuple[Length, Length, Length], skeleton: Decode, query: str
) -> list[str]:
    batch, heads, queries = binding.size(parts.query.sizes[0]), lengths[0].value, lengths[1].value
    lines = [allocation("out", batch, queries, heads, skeleton.value.channels, query)]
    if skeleton.lse:
        lines.append(f"lse = torch.empty(({batch}, {heads}, {queries}), dtype=torch.float32, device={query}.device)")
    return lines


def _returned(spec: Spec, parts: Dense) -> str:
    results = {parts.attend.out: "out", parts.attend.lse: "lse"}
    return f"return {', '.join(results[name] for name in spec.outputs)}"


def decode_launch(
    spec: Spec,
    parts: Dense,
    binding: Binding,
    lengths: tuple[Length, Length, Length],
    skeleton: Decode,
    tiles: Mapping[str, Tile],
    inside: int = 4,
) -> list[str]:
    """Launcher lines that run both kernels and return; outputs are allocated. They will be indented by ``inside``."""
    stores = [binding.tensors[each.name] for each in _storages(spec, parts)]
    query = binding.tensors[parts.attend.query]
    heads, queries, keys = (length.value for length in lengths)
    batch, key_heads = binding.size(parts.query.sizes[0]), binding.size(parts.key.sizes[1])
    own = {pointer: binding.tensors[name] for name, pointer in binding.pointers.items()}
    values = {length.name: length.value for length in lengths} | {"key_heads": key_heads}
    captured = [own[name] for name, _ in skeleton.captured]
    merged = [own[name] for name, _ in skeleton.sink_captured()]
    known = "CAPABILITY" in skeleton.constants()
    capability = [f"CAPABILITY=capability_of({query})"] if known else []
    first = [
        *(query, *stores, "partial", "peaks", "totals", *captured),
        *(f"*{name}.stride()" for name in (query, *stores, *captured)),
        *(values.get(name, name) for name in skeleton.integers()),
        *(
            "BLOCK_I=rows",
            "BLOCK_J=block",
            *capability,
            "num_warps=warps",
            "num_stages=stages",
            "enable_fp_fusion=True",
            "later=later",
        ),
    ]
    second = [
        *("partial", "peaks", "totals", "out", *(("lse",) if skeleton.lse else ()), *merged),
        *(f"*{name}.stride()" for name in ("out", *merged)),
        *(values.get(name, name) for name in skeleton.merge_integers()),
        *(f"BLOCK_S={MERGED}", "num_warps=4", "enable_fp_fusion=True", "later=later"),
    ]
    rows = f"{skeleton.group} * {queries}" if skeleton.group > 1 else queries
    merging = f"{batch} * {heads} * {queries}"
    pairs_of = [
        f"{name} = pairs_of({json.dumps(storage.name)}, {name})"
        for name, each, storage in zip(stores, (skeleton.key, skeleton.value), _storages(spec, parts), strict=True)
        if each.form != "real"
    ]
    return [
        f"if {query}.dtype not in DECODE_TILES:",
        f"    raise ValueError(f\"the kernel takes {{', '.join(map(str, DECODE_TILES))}}, not {{{query}.dtype}}\")",
        f"block, warps, stages = DECODE_TILES[{query}.dtype]",
        *dict.fromkeys(pairs_of),
        f"rows = max({skeleton.least_rows}, min({MOST_ROWS}, triton.next_power_of_2({rows})))",
        *(["warps = max(warps, min(rows // 4, 4))"] if any(tile.warps < 4 for tile in tiles.values()) else []),
        f"programs = {batch} * {key_heads} * triton.cdiv({rows}, rows)",
        f"splits = splits_of({query}, programs, triton.cdiv({keys}, block), warps)",
        f"peaks = torch.empty(2 * out.numel() // {skeleton.value.channels} * splits, dtype=torch.float32, "
        f"device={query}.device)",
        "peaks, totals = peaks.chunk(2)",
        f"partial = torch.empty(out.numel() * splits, dtype=torch.float32, device={query}.device)",
        "later = []",
        f"with torch.cuda.device_of({query}):",
        *signature("launch", ["attend_split", "(programs * splits,)", *first], "", 4, inside=inside).splitlines(),
        *signature("launch", ["merge_splits", f"({merging},)", *second], "", 4, inside=inside).splitlines(),
        "    launch_rest(later)",
        _returned(spec, parts),
    ]


def decode_kernels(
    spec: Spec, parts: Dense, binding: Binding, skeleton: Decode, tiles: Mapping[str, Tile]
) -> tuple[Kernel, ...]:
    """What the launcher runs, for compiling ahead of time."""
    types = spec.types()
    own = {"query": "operand", "out": "operand", "partial": "float32", "peaks": "float32", "totals": "float32"}
    own["lse"] = "float32"
    for name, storage in zip(("key", "value"), _storages(spec, parts), strict=True):
        own[name] = "operand" if storage.dequantize is None else "int16"
    own |= {pointer: types[name].dtype for name, pointer in binding.pointers.items()}
    rows = max(skeleton.least_rows, min(MOST_ROWS, 1 << (skeleton.group - 1).bit_length()))
    tiles = {n: dataclasses.replace(tile, warps=max(tile.warps, min(rows // 4, 4))) for n, tile in tiles.items()}
    split = Kernel(
        "attend_split",
        tuple((name, own[name]) for name in skeleton.pointers()),
        skeleton.strides(),
        skeleton.integers(),
        {dtype: {"BLOCK_I": rows, "BLOCK_J": tile.keys} for dtype, tile in tiles.items()},
        tiles,
    )
    merge = Kernel(
        "merge_splits",
        tuple((name, own[name]) for name in skeleton.merge_pointers()),
        skeleton.merge_strides(),
        skeleton.merge_integers(),
        {dtype: {"BLOCK_S": MERGED} for dtype in tiles},
        dict.fromkeys(tiles, Tile(16, 16, 4, 1)),
    )
    return (merge, split)


__all__ = [
    "FEW_QUERIES",
    "LONG_CACHE",
    "decode_device_functions",
    "decode_expressions",
    "decode_kernels",
    "decode_launch",
    "decode_module",
    "decode_skeleton",
    "decode_tiles",
    "decode_tiles_text",
]
