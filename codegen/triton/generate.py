"""From a Spec to a Triton module: kernel, launcher and documentation in one file that needs only torch and triton."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from attncompile.codegen.triton.expressions import (
    Printed,
    Scope,
    captured_tensors,
    print_triton,
    size_names,
    stride_name,
)
from attncompile.codegen.triton.names import Names
from attncompile.codegen.triton.structure import dense, gives_zeros, scan, why_not_spec
from attncompile.codegen.triton.tiles import Tile, dense_tile, scan_tile
from attncompile.codegen.triton.visits import ROW_FIRST, ROW_LAST, KeyRange, visits
from attncompile.ir import Spec, simplify
from attncompile.ir.expr import SCORE, TRUE, Apply, Const, Expr, Index, Load, Size, loads, symbols, walk
from attncompile.ir.operators import Kind
from attncompile.ir.types import DTYPES, TensorType, Value, element_kind
from attncompile.kernels import quantize as quantize_skeleton
from attncompile.kernels.dense import DenseForward, DeviceFunction, KeyRuns
from attncompile.kernels.scan import ScanForward
from attncompile.kernels.source import WIDTH, device_function, indented, signature

_LOCALS = (
    "query",
    "key",
    "value",
    "out",
    "lse",
    "query_scale",
    "key_scale",
    "program",
    "blocks",
    "block",
    "b",
    "h",
    "g",
    "i",
    "j",
    "s",
    "w",
    "d",
    "row_first",
    "row_last",
    "rows",
    "lanes",
    "channels",
    "features",
    "query_offsets",
    "query_tile",
    "key_offsets",
    "value_offsets",
    "accumulator",
    "real_channels",
    "real_features",
    "inside",
    "offset",
    "shown",
    "peak",
    "total",
    "start",
    "keys",
    "key_tile",
    "value_tile",
    "products",
    "logits",
    "weights",
    "factor",
    "key_heads",
    "number",
    "before",
    "after",
    "full_start",
    "full_stop",
    "main_start",
    "main_stop",
    "first_start",
    "first_stop",
    "first_count",
    "key_first",
    "key_last",
    "BLOCK_I",
    "BLOCK_J",
    "BLOCK_E",
    "CHUNK",
    "part",
    "tile",
    "stages",
    "warps",
    "largest",
    "REAL",
    "WHOLE",
    "TRUTH",
    "sizes_of",
    "quantize",
    "query_scales",
    "key_scales",
    "state",
    "norm",
    "result",
    "x",
)
_KINDS = {Kind.FLOAT: "REAL", Kind.INT: "WHOLE", Kind.BOOL: "TRUTH"}
_TORCH_DTYPES = {2: ("float16", "bfloat16"), 4: ("float32",)}


@dataclass(frozen=True)
class Kernel:
    """A kernel's arguments, for compiling it ahead of time.

    Attributes:
        name: the function's name in the module.
        pointers: identifier and element type of each pointer; ``operand`` stands for the type of query, key and value.
        strides, integers: identifiers.
        constants: per element type of the operands, the value of each compile-time argument.
        tiles: per element type of the operands, how it is launched.
    """

    name: str
    pointers: tuple[tuple[str, str], ...]
    strides: tuple[str, ...]
    integers: tuple[str, ...]
    constants: Mapping[str, Mapping[str, int | str | bool]]
    tiles: Mapping[str, Tile]


@dataclass(frozen=True)
class GeneratedModule:
    """Source of a Triton module.

    Attributes:
        name: a valid module name, the same for equal computations.
        source: the text; its function ``attend`` takes the Spec's inputs in order and returns its outputs.
        kernels: what it launches.
    """

    name: str
    source: str
    kernels: tuple[Kernel, ...]

    @property
    def digest(self) -> str:
        """Hash of the text."""
        return hashlib.sha256(self.source.encode()).hexdigest()


def generate(spec: Spec) -> GeneratedModule:
    """The Triton module of a Spec.

    The same Spec gives the same text; the Spec's name is no part of it.

    Raises:
        ValueError: when there is no kernel for the Spec; says why.
    """
    reason = why_not_spec(spec)
    if reason:
        raise ValueError(f"no Triton kernel for {spec.name}: {reason}")
    spec = dataclasses.replace(spec, name="attention")
    body, kernels = (_scan_module if spec.scan() else _dense_module)(spec)
    return GeneratedModule(f"{spec.operations[-1].keyword}_{spec.fingerprint()}", body, kernels)


@dataclass(frozen=True)
class _Binding:
    """Identifiers of a Spec's tensors and sizes, and how the launcher reads the sizes."""

    tensors: Mapping[str, str]
    pointers: Mapping[str, str]
    sizes: Mapping[str, str]
    names: Names

    @classmethod
    def of(cls, spec: Spec, captured: Iterable[str]) -> _Binding:
        names = Names(_LOCALS)
        size_symbols = dict.fromkeys(
            node.name
            for value in spec.inputs
            for size in value.type.sizes
            for node in symbols(size)
            if isinstance(node, Size)
        )
        sizes = {name: names.fresh(name) for name in sorted(size_symbols)}
        # the launcher has few names of its own, so an input keeps its name there even when it is called "value"
        launcher = Names(
            (*sizes.values(), "out", "lse", "tile", "quantize", "sizes_of", "REAL", "WHOLE", "TRUTH")
        )
        tensors = {value.name: launcher.fresh(value.name) for value in spec.inputs}
        pointers = {name: names.fresh(name) for name in captured}
        return cls(tensors, pointers, sizes, names)

    def size(self, expr: Expr) -> str:
        """A size expression in Python."""
        printed = print_triton(simplify(expr), Scope({}, self.sizes, {}, {}))
        return printed.value


def _documentation(spec: Spec, notes: Iterable[str]) -> str:
    text = "\n".join(["Attention as a Triton kernel, generated by attncompile.", "", str(spec), "", *notes])
    return '"""' + text.replace("\\", "\\\\").replace('"""', "'''") + '\n"""'


def _notes(spec: Spec, inputs: Iterable[str]) -> list[str]:
    notes = [
        f"attend({', '.join(inputs)}) gives {', '.join(spec.outputs)}. Forward only: no gradients are recorded.",
        "Products in float16 or bfloat16 are summed in float32; float32 inputs are multiplied in float32.",
    ]
    if gives_zeros(spec):
        notes.append(
            "A row without any visible key gives zeros"
            + (" and a log-sum-exp of −∞." if "lse" in spec.outputs else ".")
        )
    return notes


def _expectations(spec: Spec, binding: _Binding, first: str) -> list[str]:
    """Launcher lines that read the sizes and check every input."""
    lines: list[str] = []
    seen: set[str] = set()
    for value in spec.inputs:
        targets = []
        for size in value.type.sizes:
            new = isinstance(size, Size) and size.name not in seen
            if new and isinstance(size, Size):
                seen.add(size.name)
            targets.append(binding.sizes[size.name] if new and isinstance(size, Size) else "_")
        name = binding.tensors[value.name]
        if any(target != "_" for target in targets):
            lines.append(
                f"{', '.join(targets)}{',' if len(targets) == 1 else ''} = "
                f"sizes_of({json.dumps(value.name)}, {name}, {len(targets)})"
            )
    operands = _operands(spec)
    for value in spec.inputs:
        sizes = ", ".join(binding.size(size) for size in value.type.sizes)
        sizes = f"({sizes},)" if len(value.type.sizes) == 1 else f"({sizes})"
        kinds = f"({first}.dtype,)" if value.name in operands else _KINDS[element_kind(value.type.dtype)]
        lines.append(
            f"expect({json.dumps(value.name)}, {binding.tensors[value.name]}, {sizes}, {kinds}, {first}.device)"
        )
    return lines


def _operands(spec: Spec) -> set[str]:
    captured = {value.name for value in spec.captured()}
    return {value.name for value in spec.inputs} - captured


_CHECKS = '''\
REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WHOLE = (torch.int8, torch.uint8, torch.int32, torch.int64)
TRUTH = (torch.bool,)


def sizes_of(name, tensor, axes):
    """The sizes of a tensor that should have so many axes."""
    if tensor.dim() != axes:
        raise ValueError(f"{name} should have {axes} axes, but has shape {tuple(tensor.shape)}")
    return tensor.shape


def expect(name, tensor, sizes, dtypes, device):
    """Raise ValueError unless the tensor has these sizes, one of these dtypes, and is on the device."""
    if tuple(tensor.shape) != sizes:
        raise ValueError(f"{name} should be of shape {sizes}, but is {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes or tensor.device != device:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} should be {expected} on {device}, but is {tensor.dtype} on {tensor.device}")'''

_TILE = '''\
def tile_of(tensor, length):
    """Queries and keys of a block, warps and pipeline stages for operands like this one."""
    if tensor.dtype not in TILES:
        raise ValueError(f"the kernel takes {', '.join(map(str, TILES))}, not {tensor.dtype}")
    queries, keys, warps, stages = TILES[tensor.dtype]
    if length < queries:
        queries, warps = max(16, triton.next_power_of_2(length)), min(warps, 4)
    if tensor.is_cuda:
        properties = torch.cuda.get_device_properties(tensor.device)
        if getattr(properties, "shared_memory_per_block_optin", 65536) < 160 * 1024:
            stages = min(stages, 2)
    return queries, keys, warps, stages'''


def _tiles_text(tiles: Mapping[str, Tile], comment: str) -> str:
    rows = "\n".join(
        f"    torch.{dtype}: ({t.queries}, {t.keys}, {t.warps}, {t.stages})," for dtype, t in tiles.items()
    )
    return f"TILES = {{  # {comment}\n{rows}\n}}"


def _function(
    name: str, expr: Expr, scope: Scope, extra: tuple[str, ...] = (), value: str = "{}"
) -> DeviceFunction:
    printed = print_triton(expr, scope)
    found = symbols(expr)
    indices = [scope.indices[n] for n in scope.indices if Index(n) in found]
    # tail lanes are clamped with the extents of their axes, which the printed text may then mention
    used_sizes = [scope.sizes[name] for name in scope.sizes if _mentions(printed, scope.sizes[name])]
    tensors = captured_tensors(expr)
    pointers = [scope.tensors[t] for t in tensors]
    strides = [
        stride_name(scope.tensors[t], axis)
        for t in tensors
        for axis in range(len(scope.types[t].axes))
        if _mentions(printed, stride_name(scope.tensors[t], axis))
    ]
    leading = [*extra, *(["s"] if SCORE in found and "s" not in extra else [])]
    documentation = "\n    ".join(textwrap.wrap(_quoted(str(expr)), WIDTH - 12, break_on_hyphens=False))
    return DeviceFunction(
        name,
        documentation,
        (*leading, *indices, *used_sizes, *pointers, *strides),
        printed.lines,
        value.format(printed.value),
    )


def _mentions(printed: Printed, name: str) -> bool:
    return any(re.search(rf"\b{re.escape(name)}\b", text) for text in (*printed.lines, printed.value))


def _quoted(text: str) -> str:
    text = text.replace("\\", "\\\\").replace('"', "'")
    return text if text.endswith(".") else f"{text}."


def _device_functions(*texts: str) -> list[str]:
    names = ("tanh", "round_half_even", "floor_divide", "floor_modulo")
    return [device_function(name) for name in names if any(f"{name}(" in text for text in texts)]


def _dense_module(spec: Spec) -> tuple[str, tuple[Kernel, ...]]:
    parts = dense(spec)
    attend = parts.attend
    expressions = [parts.score, parts.mask, *([parts.edit] if parts.edit is not None else [])]
    captured = captured_tensors(*expressions)
    binding = _Binding.of(spec, captured)
    types = spec.types()
    lengths: list[str] = []
    values: dict[str, str] = {ident: ident for ident in binding.sizes.values()}
    for letter, size in zip(
        "HIJ", (parts.query.sizes[1], parts.query.sizes[2], parts.key.sizes[2]), strict=True
    ):
        known = isinstance(size, Size)
        name = binding.sizes[size.name] if isinstance(size, Size) else binding.names.fresh(letter)
        if not known:
            values[name] = binding.size(size)
        lengths.append(name)
    extents = {
        "b": parts.query.sizes[0],
        "h": parts.query.sizes[1],
        "i": parts.query.sizes[2],
        "j": parts.key.sizes[2],
    }
    scope = Scope({n: n for n in "bhij"}, binding.sizes, binding.pointers, types, extents)
    scalars = {n: n for n in ("b", "h", "row_first", "row_last", "key_first", "key_last")}
    limits = Scope(scalars, binding.sizes, binding.pointers, types, extents)
    score = None
    if parts.score != SCORE:
        plain = SCORE not in symbols(parts.score)
        score = _function(
            "score", parts.score, scope, ("s",) if plain else (), "tl.zeros_like(s) + ({})" if plain else "{}"
        )
    visible = _function("visible", parts.mask, scope) if parts.mask != TRUE else None
    edit = _function("edit", parts.edit, scope) if parts.edit is not None else None
    found = visits(parts.mask, parts.query.sizes[2], parts.key.sizes[2])

    lines: list[str] = []

    def text(expr: Expr) -> str:
        printed = print_triton(expr, limits)
        lines.extend(printed.lines)
        return printed.value

    def pair(found: KeyRange | None) -> tuple[str, str] | None:
        return None if found is None else (text(found.start), text(found.stop))

    main = pair(found.main)
    assert main is not None
    runs = KeyRuns(
        pair(found.first),
        main,
        pair(found.full),
        None if found.test == TRUE else text(found.test),
        tuple(lines),
    )
    used = {name for f in (score, visible, edit) if f for name in f.parameters}
    texts = "\n".join([*lines, *main, *(runs.first or ()), *(runs.full or ()), runs.test or ""])
    sizes = [ident for name, ident in binding.sizes.items() if ident in used or _word(ident, texts)]
    kv_head = print_triton(simplify(attend.kv_head, extents), limits).value
    sizes += [ident for ident in binding.sizes.values() if ident not in sizes and _word(ident, kv_head)]
    channels, features = _constant(parts.query.sizes[3]), _constant(parts.value.sizes[3])
    quantized = (parts.quantized[0].block, parts.quantized[1].block) if parts.quantized else None
    skeleton = DenseForward(
        normalizer=attend.norm.kind,
        scale=parts.scale,
        score=score,
        visible=visible,
        edit=edit,
        kv_head=kv_head,
        runs=runs,
        latest_first=_grows(found.main),
        lse=bool(attend.lse and attend.lse in spec.outputs),
        captured=tuple((binding.pointers[name], len(types[name].axes)) for name in captured),
        lengths=(lengths[0], lengths[1], lengths[2]),
        sizes=tuple(dict.fromkeys(sizes)),
        channels=channels,
        features=features,
        clamped=any(loads(e) for e in expressions),
        quantized=quantized,
    )
    widest = max(skeleton.padded(channels), skeleton.padded(features))
    most_keys = _power_of_two(parts.quantized[1].block) if parts.quantized else None
    tiles = {
        dtype: dense_tile(widest, size, most_keys=most_keys, heavy=_heavy(expressions))
        for size, names in _TORCH_DTYPES.items()
        for dtype in names
    }

    if parts.quantized:
        query, key = (binding.tensors[q.tensor] for q in parts.quantized)
    else:
        query, key = binding.tensors[attend.query], binding.tensors[attend.key]
    value = binding.tensors[attend.value]
    batch = binding.size(parts.query.sizes[0])
    heads, queries = values[lengths[0]], values[lengths[1]]
    launch = [f"queries, keys, warps, stages = tile_of({query}, {queries})"]
    if parts.quantized:
        first, second = parts.quantized
        launch += [
            f"whole_query, query_scale = quantize({query}, {first.block}, {first.smooth})",
            f"whole_key, key_scale = quantize({key}, {second.block}, {second.smooth})",
        ]
        query_in, key_in = "whole_query", "whole_key"
        values["key_heads"] = binding.size(parts.key.sizes[1])
    else:
        query_in, key_in = query, key
    arguments = [
        query_in,
        key_in,
        value,
        *(("query_scale", "key_scale") if parts.quantized else ()),
        "out",
        *(("lse",) if skeleton.lse else ()),
        *(binding.tensors[n] for n in captured),
        f"*{query_in}.stride()",
        f"*{key_in}.stride()",
        f"*{value}.stride()",
        "*out.stride()",
        *(f"*{binding.tensors[n]}.stride()" for n in captured),
        *(values[n] for n in skeleton.integers()),
        "BLOCK_I=queries",
        "BLOCK_J=keys",
        "num_warps=warps",
        "num_stages=stages",
        "enable_fp_fusion=True",
    ]
    grid = f"triton.cdiv({queries}, queries) * {batch} * {heads}"
    body = [
        *_expectations(spec, binding, query),
        f"out = torch.empty(({batch}, {queries}, {heads}, {features}), dtype={query}.dtype, "
        f"device={query}.device).transpose(1, 2)",
        *(
            [f"lse = torch.empty(({batch}, {heads}, {queries}), dtype=torch.float32, device={query}.device)"]
            if skeleton.lse
            else []
        ),
        "if out.numel() == 0:",
        f"    return {_returned(spec, attend.out, attend.lse)}",
        *launch,
        f"with torch.cuda.device_of({query}):",
        *signature(f"attend_forward[({grid},)]", arguments, "", 4, inside=4).splitlines(),
        f"return {_returned(spec, attend.out, attend.lse)}",
    ]
    inputs = [binding.tensors[v.name] for v in spec.inputs]
    notes = _notes(spec, inputs)
    helpers = [quantize_skeleton.SOURCE.rstrip()] if parts.quantized else []
    kernel_text = skeleton.source()
    sections = [
        _documentation(spec, notes),
        "import torch\nimport triton\nimport triton.language as tl",
        _tiles_text(tiles, "queries and keys per block, warps, pipeline stages") + "\n" + _CHECKS,
        _TILE,
        *_device_functions(kernel_text, *helpers),
        *helpers,
        kernel_text,
        _launcher(spec, inputs, body),
    ]
    pointers = _pointer_types(skeleton.pointers(), binding, types, parts.quantized is not None)
    kernel = Kernel(
        "attend_forward",
        pointers,
        skeleton.strides(),
        skeleton.integers(),
        {d: {"BLOCK_I": t.queries, "BLOCK_J": t.keys} for d, t in tiles.items()},
        tiles,
    )
    kernels = [kernel]
    if parts.quantized:
        kernels.insert(0, _quantize_kernel(parts.quantized[1].block, channels, parts.quantized[1].smooth))
    return _join(sections), tuple(kernels)


def _quantize_kernel(block: int, channels: int, smooth: bool) -> Kernel:
    constants = {
        "BLOCK": block,
        "TILE": _power_of_two(block),
        "CHANNELS": _power_of_two(channels),
        "D": channels,
        "SMOOTH": smooth,
    }
    dtypes = [d for names in _TORCH_DTYPES.values() for d in names]
    return Kernel(
        "quantize_blocks",
        (("tensor", "operand"), ("mean", "float32"), ("whole", "int8"), ("scale", "float32")),
        ("stride_b", "stride_h", "stride_i", "stride_d"),
        ("H", "I"),
        {d: constants for d in dtypes},
        {d: Tile(block, block, 4, 2) for d in dtypes},
    )


def _scan_module(spec: Spec) -> tuple[str, tuple[Kernel, ...]]:
    operation = scan(spec)
    types = spec.types()
    query, key, value = (types[n] for n in (operation.query, operation.key, operation.value))
    decay = simplify(operation.decay)
    captured = captured_tensors(decay)
    binding = _Binding.of(spec, captured)
    extents = {"h": query.sizes[1]}
    scope = Scope({"h": "h"}, binding.sizes, binding.pointers, types, extents)
    function = _function("decay_factor", decay, scope)
    if Index("h") not in symbols(decay) and not loads(decay):
        function = dataclasses.replace(function, value=f"tl.cast({function.value}, tl.float32)")
    kv_head = print_triton(simplify(operation.kv_head, extents), scope).value
    values: dict[str, str] = {ident: ident for ident in binding.sizes.values()}
    lengths = []
    for letter, size in zip("HI", (query.sizes[1], query.sizes[2]), strict=True):
        name = binding.sizes[size.name] if isinstance(size, Size) else binding.names.fresh(letter)
        if not isinstance(size, Size):
            values[name] = binding.size(size)
        lengths.append(name)
    sizes = [i for i in binding.sizes.values() if i in function.parameters or _word(i, kv_head)]
    skeleton = ScanForward(
        decay=function,
        scale=operation.scale,
        feature=operation.feature,
        normalize=operation.normalize,
        kv_head=kv_head,
        captured=tuple((binding.pointers[n], len(types[n].axes)) for n in captured),
        heads=lengths[0],
        length=lengths[1],
        sizes=tuple(sizes),
        channels=_constant(query.sizes[3]),
        features=_constant(value.sizes[3]),
    )
    tiles = {
        d: scan_tile(skeleton.padded_channels(), size) for size, names in _TORCH_DTYPES.items() for d in names
    }
    first = binding.tensors[operation.query]
    batch, heads, length = binding.size(query.sizes[0]), values[lengths[0]], values[lengths[1]]
    operands = [binding.tensors[n] for n in (operation.query, operation.key, operation.value)]
    arguments = [
        *operands,
        "out",
        *(binding.tensors[n] for n in captured),
        *(f"*{n}.stride()" for n in operands),
        "*out.stride()",
        *(f"*{binding.tensors[n]}.stride()" for n in captured),
        *(values[n] for n in skeleton.integers()),
        "CHUNK=chunk",
        "BLOCK_E=features",
        "num_warps=warps",
        "num_stages=stages",
        "enable_fp_fusion=True",
    ]
    body = [
        *_expectations(spec, binding, first),
        f"out = torch.empty(({batch}, {length}, {heads}, {skeleton.features}), dtype={first}.dtype, "
        f"device={first}.device).transpose(1, 2)",
        "if out.numel() == 0:",
        "    return out",
        f"if {first}.dtype not in TILES:",
        f"""    raise ValueError(f"the kernel takes {{', '.join(map(str, TILES))}}, not {{{first}.dtype}}")""",
        f"chunk, features, warps, stages = TILES[{first}.dtype]",
        f"with torch.cuda.device_of({first}):",
        *signature(
            f"scan_forward[({batch} * {heads}, triton.cdiv({skeleton.features}, features))]",
            arguments,
            "",
            4,
            inside=4,
        ).splitlines(),
        "return out",
    ]
    inputs = [binding.tensors[v.name] for v in spec.inputs]
    kernel_text = skeleton.source()
    sections = [
        _documentation(spec, _notes(spec, inputs)),
        "import torch\nimport triton\nimport triton.language as tl",
        _tiles_text(tiles, "positions per chunk, value channels per program, warps, pipeline stages")
        + "\n"
        + _CHECKS,
        *_device_functions(kernel_text),
        kernel_text,
        _launcher(spec, inputs, body),
    ]
    kernel = Kernel(
        "scan_forward",
        _pointer_types(skeleton.pointers(), binding, types, False),
        skeleton.strides(),
        skeleton.integers(),
        {d: {"CHUNK": t.queries, "BLOCK_E": t.keys} for d, t in tiles.items()},
        tiles,
    )
    return _join(sections), (kernel,)


def _join(sections: Iterable[str]) -> str:
    documentation, imports, *rest = sections
    return "\n\n".join([documentation, imports]) + "\n\n" + "\n\n\n".join(rest) + "\n"


def _launcher(spec: Spec, inputs: list[str], body: list[str]) -> str:
    shapes = "\n".join(
        f"        {name}: {value.type}" for name, value in zip(inputs, spec.inputs, strict=True)
    )
    gives = ", ".join(spec.outputs)
    head = signature("def attend", inputs, ":")
    types = spec.types()
    shown = "; ".join(f"{name} {types[name]}" for name in spec.outputs)
    return (
        f'{head}\n    """The attention of this Spec; gives {gives}.\n\n    Args:\n{_escape(shapes)}\n\n    Returns:\n'
        f'        {_escape(shown)}\n    """\n{indented(body, 4)}'
    )


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"""', "'''")


def _returned(spec: Spec, out: str, lse: str) -> str:
    names = {out: "out", lse: "lse"}
    return ", ".join(names[name] for name in spec.outputs)


def _pointer_types(
    pointers: Iterable[str], binding: _Binding, types: Mapping[str, TensorType], quantized: bool
) -> tuple[tuple[str, str], ...]:
    own = {
        "query": "int8" if quantized else "operand",
        "key": "int8" if quantized else "operand",
        "value": "operand",
        "query_scale": "float32",
        "key_scale": "float32",
        "out": "operand",
        "lse": "float32",
    }
    by_pointer = {pointer: types[name].dtype for name, pointer in binding.pointers.items()}
    return tuple((p, by_pointer.get(p) or own[p]) for p in pointers)


def _constant(size: Expr) -> int:
    found = simplify(size)
    if not isinstance(found, Const):
        raise ValueError(f"{size} is not constant")
    return int(found.value)


def _grows(main: KeyRange) -> bool:
    """Whether later queries have more keys."""
    return ROW_LAST in symbols(main.stop) and ROW_FIRST not in symbols(main.start)


def _heavy(expressions: Iterable[Expr]) -> bool:
    """Whether the expressions load something for every key, or have many operators."""
    nodes = [node for expr in expressions for node in walk(expr)]
    by_key = any(isinstance(node, Load) and Index("j") in symbols(node) for node in nodes)
    return by_key or sum(isinstance(node, Apply) for node in nodes) > 12


def _power_of_two(value: int) -> int:
    return max(16, 1 << (value - 1).bit_length())


def _word(name: str, text: str) -> bool:
    return bool(re.search(rf"\b{re.escape(name)}\b", text))


__all__ = ["DTYPES", "WIDTH", "GeneratedModule", "Kernel", "Value", "generate", "size_names"]
