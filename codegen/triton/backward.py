"""Modules for the gradients of one attention: :class:`attncompile.kernels.backward.DenseBackward`, from a Spec."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from attncompile.codegen.triton.captured_gradients import Element, elements, expressions_of, summed_along
from attncompile.codegen.triton.expressions import Scope, captured_tensors, print_triton, refusal
from attncompile.codegen.triton.generate import GeneratedModule
from attncompile.codegen.triton.module import (
    CHECKS,
    OPERAND_DTYPES,
    REST,
    Binding,
    Kernel,
    Length,
    constant,
    device_functions_of,
    expectations,
    function_of,
    join,
    mentions,
    tiles_text,
)
from attncompile.codegen.triton.names import BACKWARD_NAMES, KERNEL_NAMES, LAUNCHER_NAMES
from attncompile.codegen.triton.runs import grows, key_runs, query_runs
from attncompile.codegen.triton.structure import Dense, dense, is_wide, why_not_spec
from attncompile.codegen.triton.tiles import LARGEST_HEAD, Tile, backward_tile, on_hip
from attncompile.codegen.triton.visits import BLOCK, possible, visits
from attncompile.ir import Spec, simplify
from attncompile.ir.derivative import derivative, real_loads
from attncompile.ir.expr import SCORE, TRUE, Apply, Const, Expr, Index, loads, symbols
from attncompile.ir.types import DTYPES
from attncompile.kernels.backward import DenseBackward, KernelText
from attncompile.kernels.backward_captured import pair_kernel, preparation
from attncompile.kernels.source import indented, signature

PREPARED = 64
"""Queries of a program of the kernel that goes before the others."""

SCATTERED = 1 << 24
"""Elements at a time when a table's gradient is summed in a fixed order."""


def why_not_backward(spec: Spec) -> str | None:
    """Why there are no generated backward kernels for the Spec, whatever the device, or ``None``."""
    reason = why_not_spec(spec)
    if reason:
        return reason
    names = [operation.keyword for operation in spec.operations]
    if names != ["attend"]:
        return f"backward kernels are generated for one attend; this Spec is {', '.join(names)}"
    if is_wide(spec):
        return f"backward kernels are generated for heads of up to {LARGEST_HEAD} channels"
    parts = dense(spec)
    if parts.divisor is not None:
        return f"backward kernels divide by no sum; the normaliser is {parts.attend.norm.kind}"
    try:
        slopes = [derivative(parts.score, SCORE)]
        for expr in expressions_of(parts).values():
            slopes += [derivative(expr, load) for load in real_loads(expr)]
    except ValueError as error:
        return str(error)
    return next((reason for reason in map(refusal, slopes) if reason), None)


@dataclass(frozen=True)
class _Parts:
    """What the module is made from."""

    spec: Spec
    dense: Dense
    binding: Binding
    lengths: Mapping[str, Length]
    skeleton: DenseBackward
    elements: tuple[Element, ...]
    kernels: tuple[KernelText, ...]
    wanted: frozenset[str]


def generate_backward(spec: Spec, wanted: Collection[str] | None = None) -> GeneratedModule:
    """The Triton module with the gradients of a Spec.

    Its function ``attend_backward`` takes the gradient of the result, for a softmax also the result and its
    log-sum-exp (and the gradient of that, where it is an output of the Spec), then the Spec's inputs; it returns a
    gradient for each input, ``None`` for those that are not wanted.

    Args:
        spec: one attention.
        wanted: names of the inputs whose gradients are wanted; all real ones when ``None``.

    Raises:
        ValueError: when there are no backward kernels for the Spec; says why.
    """
    reason = why_not_backward(spec)
    if reason:
        raise ValueError(f"no backward kernels for {spec.name}: {reason}")
    real = {value.name for value in spec.inputs if DTYPES[value.type.dtype].is_floating_point}
    chosen = frozenset(real if wanted is None else real & set(wanted))
    parts = _parts(dataclasses.replace(spec, name="attention"), chosen)
    tiles = {kind: _tiles(kind, parts) for kind in ("query", "key", "pair")}
    kernel_text = "\n\n\n".join(
        [f.source() for f in parts.skeleton.functions()] + [kernel.source() for kernel in parts.kernels]
    )
    tables = [
        tiles_text(tiles[kind], f"{what}: queries and keys per block, warps, pipeline stages", f"TILES_{kind.upper()}")
        for kind, what in _TABLES.items()
        if f"TILES_{kind.upper()}" in (body := "\n".join(_body(parts)))
    ]
    adds = [ADD_AT] if "add_at(" in body else []
    source = join(
        _documentation(parts),
        "\n".join([*tables, CHECKS]),
        TILE_OF,
        REST,
        *adds,
        *device_functions_of(kernel_text),
        kernel_text,
        _launcher(parts),
    )
    return GeneratedModule(f"attend_backward_{spec.fingerprint()}", source, _kernels(parts, tiles))


_TABLES = {"query": "gradient of the query", "key": "of key and value", "pair": "of what pairs load"}

TILE_OF = '''\
def tile_of(tiles, like):
    """Queries and keys of a block, warps and pipeline stages for operands like this one."""
    if like.dtype not in tiles:
        raise ValueError(f"the kernels take {', '.join(map(str, tiles))}, not {like.dtype}")
    queries, keys, warps, stages = tiles[like.dtype]
    if torch.version.hip:  # four waves of 64 lanes hold a tile of this size in registers
        queries, keys, warps, stages = min(queries, 64), min(keys, 64), min(warps, 4), 1
    if like.is_cuda:
        properties = torch.cuda.get_device_properties(like.device)
        if getattr(properties, "shared_memory_per_block_optin", 65536) < 160 * 1024:
            stages = 1
    return queries, keys, warps, stages'''

ADD_AT = '''\
def add_at(total, places, values):
    """Add values at their places in a tensor, in a fixed order."""
    total.view(-1).index_put_((places.flatten(),), values.flatten(), accumulate=True)'''


def _parts(spec: Spec, wanted: frozenset[str]) -> _Parts:
    parts = dense(spec)
    types = spec.types()
    binding = Binding.of(
        spec,
        captured_tensors(*expressions_of(parts).values(), parts.mask),
        (*KERNEL_NAMES, *BACKWARD_NAMES),
        (*LAUNCHER_NAMES, *BACKWARD_NAMES),
    )
    batch, heads, queries = parts.query.sizes[:3]
    sizes = {"H": heads, "I": queries, "J": parts.key.sizes[2], "G": parts.key.sizes[1], "B": batch}
    lengths = {letter: binding.length(letter, size) for letter, size in sizes.items()}
    extents = {"b": batch, "h": heads, "i": queries, "j": parts.key.sizes[2]}
    scope = Scope({n: n for n in "bhij"}, binding.sizes, binding.pointers, types, extents)
    found = elements(parts, wanted, types, binding, scope)
    skeleton = _skeleton(spec, parts, binding, lengths, scope, found)
    return _Parts(spec, parts, binding, lengths, skeleton, found, _texts(skeleton, parts, scope, wanted), wanted)


def _texts(skeleton: DenseBackward, parts: Dense, scope: Scope, wanted: frozenset[str]) -> tuple[KernelText, ...]:
    attend = parts.attend
    kernels = [preparation(skeleton)] if skeleton.softmax else []
    if attend.query in wanted or skeleton.along("rows", "score", "edit"):
        kernels.append(skeleton.query_kernel())
    if wanted & {attend.key, attend.value} or skeleton.along("keys"):
        kernels.append(skeleton.key_kernel())
    scalars = {n: n for n in ("b", "h", "row_first", "row_last", "key_first", "key_last")}
    extents = {**scope.extents, "row_first": scope.extents["i"], "row_last": scope.extents["i"]}
    seen = simplify(possible(simplify(parts.mask), BLOCK), extents)
    test = None if seen == TRUE else print_triton(seen, dataclasses.replace(scope, indices=scalars))
    for gradient in skeleton.along("pairs"):
        kernels.append(pair_kernel(skeleton, gradient, test.value if test else None, test.lines if test else ()))
    return tuple(kernels)


def _skeleton(
    spec: Spec,
    parts: Dense,
    binding: Binding,
    lengths: Mapping[str, Length],
    scope: Scope,
    found: tuple[Element, ...],
) -> DenseBackward:
    attend, types, extents = parts.attend, spec.types(), scope.extents
    queries, keys = parts.query.sizes[2], parts.key.sizes[2]
    by_query = visits(parts.mask, queries, keys)
    names = ("row_first", "row_last", "key_first", "key_last")
    block = dataclasses.replace(scope, indices={n: n for n in ("b", "h", *names)})
    key_limits, key_text = key_runs(by_query, block)
    # the queries that see a block of keys: the same question with the roles exchanged
    query_limits, query_text, by_key = query_runs(parts.mask, queries, keys, scope)
    slope = derivative(parts.score, SCORE)
    constant_slope = float(slope.value) if isinstance(slope, Const) else 1.0
    functions = {
        "score": None if parts.score == SCORE else function_of("score", parts.score, scope),
        "visible": None if parts.mask == TRUE else function_of("visible", parts.mask, scope),
        "edit": None if parts.edit is None else function_of("edit", parts.edit, scope),
        "sink": None if parts.sink is None else function_of("sink", parts.sink, scope),
        "slope": None if isinstance(slope, Const) else function_of("score_slope", slope, scope),
    }
    kv_head = simplify(attend.kv_head, extents)
    kv_text = print_triton(kv_head, block).value
    loop, reads = _head_loop(kv_head, kv_text, parts, lengths)
    called = [f for f in functions.values() if f]
    called += [f for e in found for f in (e.gradient.by, e.gradient.place) if f]
    parameters = [name for function in called for name in function.parameters]
    everything = (key_text, query_text, kv_text, loop or "", *parameters)
    seen = possible(simplify(parts.mask), BLOCK)
    everything = (*everything, *(s.name for s in symbols(seen)))  # type: ignore[attr-defined]
    return DenseBackward(
        normalizer=attend.norm.kind,
        scale=parts.scale,
        **functions,
        gain=parts.scale * constant_slope,
        kv_head=kv_text,
        heads=loop,
        reads=reads,
        key_runs=key_limits,
        query_runs=query_limits,
        last_rows_first=grows(by_query),
        last_keys_first=grows(by_key),
        captured=tuple((pointer, len(types[name].axes)) for name, pointer in binding.pointers.items()),
        gradients=tuple(element.gradient for element in found),
        lengths=tuple(length.name for length in lengths.values()),  # type: ignore[arg-type]
        sizes=tuple(s for s in binding.sizes.values() if mentions(s, *everything)),
        channels=constant(parts.query.sizes[3]),
        features=constant(parts.value.sizes[3]),
        clamped=any(loads(expr) for expr in (*expressions_of(parts).values(), parts.mask)),
        lse_gradient=bool(attend.lse) and attend.lse in spec.outputs,
    )


def _head_loop(kv_head: Expr, text: str, parts: Dense, lengths: Mapping[str, Length]) -> tuple[str | None, str | None]:
    """Head of the loop over the heads that read KV head ``g``, and a condition inside it."""
    heads, groups = lengths["H"].name, simplify(parts.key.sizes[1])
    match kv_head:
        case Index("h"):
            return None, None
        case Apply("floordiv", (Index("h"), Const(int(size)))):
            return f"for h in range(g * {size}, tl.minimum(g * {size} + {size}, {heads})):", None
        case Apply("mod", (Index("h"), Const(int(size)))) if groups == Const(size):
            return f"for h in range(g, {heads}, {size}):", None
        case _ if groups == Const(1):
            return f"for h in range(0, {heads}):", None
    return f"for h in range(0, {heads}):", f"{text} == g"


def _tiles(kind: str, parts: _Parts) -> dict[str, Tile]:
    skeleton = parts.skeleton
    widest = max(skeleton.padded(skeleton.channels), skeleton.padded(skeleton.features))
    return {dtype: backward_tile(kind, widest, size) for dtype, size in OPERAND_DTYPES.items()}


def _inputs(parts: _Parts) -> tuple[list[str], list[str]]:
    """Parameters of ``attend_backward`` before the Spec's inputs, and those."""
    results = ["out", "lse"] if parts.skeleton.softmax else []
    given = ["grad_out", *(["grad_lse"] if parts.skeleton.lse_gradient else [])]
    return [*given, *results], [parts.binding.tensors[value.name] for value in parts.spec.inputs]


def _documentation(parts: _Parts) -> str:
    before, inputs = _inputs(parts)
    scale = parts.dense.scale
    lines = [
        "Gradients of attention as Triton kernels, generated by attncompile.",
        "",
        str(parts.spec),
        "",
        f"attend_backward({', '.join([*before, *inputs])}) gives the gradients of the inputs.",
        "Differentiated, the log-sum-exp being that of the forward pass:",
        f"  ∂logit/∂s = {simplify(scale * derivative(parts.dense.score, SCORE))}",
    ]
    for element in parts.elements:
        slope = simplify((scale if element.gradient.source == "score" else 1.0) * element.slope)
        what = {"score": "logit", "edit": "weight/w", "sink": "sink"}[element.gradient.source]
        lines.append(f"  ∂{what}/∂{element.load} = {slope}")
    unwanted = [value.name for value in parts.spec.inputs if value.name not in parts.wanted]
    if unwanted:
        lines.append(f"No gradient is computed of {', '.join(unwanted)}: None stands in its place.")
    lines += ["A row without any visible key has gradients of zero.", _order(parts)]
    text = "\n".join(lines)
    return '"""' + text.replace("\\", "\\\\").replace('"""', "'''") + '\n"""'


def _order(parts: _Parts) -> str:
    scattered = [element for element in parts.elements if element.gradient.scattered]
    if not scattered:
        return "Every sum is taken in a fixed order: results are the same each time."
    names = ", ".join(dict.fromkeys(element.load.tensor for element in scattered))
    return (
        f"Sums are taken in a fixed order, but for the gradient of {names}: by atomic additions,\n"
        "unless torch.use_deterministic_algorithms is on."
    )


def _launcher(parts: _Parts) -> str:
    before, inputs = _inputs(parts)
    meanings = {
        "grad_out": "gradient of the result",
        "grad_lse": "gradient of its log-sum-exp",
        "out": "the result",
        "lse": "its log-sum-exp, float32",
    }
    arguments = [f"        {name}: {meanings[name]}" for name in before]
    arguments += [
        f"        {name}: {value.type}".replace("\\", "\\\\")
        for name, value in zip(inputs, parts.spec.inputs, strict=True)
    ]
    return "\n".join(
        [
            signature("def attend_backward", [*before, *inputs], ":"),
            '    """The gradients of this Spec\'s inputs, in order; None for those that are not computed.',
            "",
            "    Args:",
            *arguments,
            '    """',
            indented(_body(parts), 4),
        ]
    )


def _body(parts: _Parts) -> list[str]:
    attend, binding, skeleton = parts.dense.attend, parts.binding, parts.skeleton
    query, key, value = (binding.tensors[name] for name in (attend.query, attend.key, attend.value))
    roles = ((attend.query, "grad_query"), (attend.key, "grad_key"), (attend.value, "grad_value"))
    lead = [parts.lengths[letter].value for letter in "BHI"]
    shape = f"({', '.join([*lead, str(skeleton.features)])})"
    rows = f"({', '.join(lead)})"
    checked = [("grad_out", shape, f"({query}.dtype,)")]
    if skeleton.softmax:
        checked += [("out", shape, f"({query}.dtype,)"), ("lse", rows, "(torch.float32,)")]
    if skeleton.lse_gradient:
        checked += [("grad_lse", rows, "(torch.float32,)")]
    inputs = [(binding.tensors[v.name], v.name) for v in parts.spec.inputs]
    zeros = [f"torch.zeros_like({text})" if name in parts.wanted else "None" for text, name in inputs]
    kernels = {kernel.name: kernel for kernel in parts.kernels}
    lines = [
        *expectations(parts.spec, binding, query),
        *(f'expect("{name}", {name}, {sizes}, {kinds}, {query}.device)' for name, sizes, kinds in checked),
        f"if {query}.numel() == 0 or {value}.numel() == 0:",
        *("    " + line for line in _returned(zeros, 8)),
        *(f"{name} = {name}.contiguous()" for name, _, _ in checked if name.endswith("lse")),
        f"far = max(tensor.stride(2) for tensor in ({query}, {key}, {value}, grad_out))",
        "if far * 128 >= 2**31:",
        '    raise ValueError("queries, keys or values lie too far apart in memory; call contiguous() on them first")',
    ]
    calls: list[str] = []
    if skeleton.softmax:
        lines += [
            f"shift = torch.empty({rows}, dtype=torch.float32, device={query}.device)",
            f"delta = torch.empty({rows}, dtype=torch.float32, device={query}.device)",
        ]
    for element in parts.elements:
        lines += _memory(parts, element)
    if skeleton.softmax:
        grid = f"triton.cdiv({lead[2]}, {PREPARED}) * {lead[0]} * {lead[1]}"
        calls += _call(parts, kernels["prepare"], grid, [f"BLOCK_I={PREPARED}", "num_warps=4", "later=later"])
    for name, kind, outputs, count, block, groups in (
        ("query_gradient", "query", ["grad_query"], lead[2], "queries", lead[1]),
        (
            "key_value_gradient",
            "key",
            ["grad_key", "grad_value"],
            parts.lengths["J"].value,
            "keys",
            parts.lengths["G"].value,
        ),
    ):
        if name in kernels:
            like = {"grad_query": query, "grad_key": key, "grad_value": value}
            lines += [f"{output} = torch.empty_like({like[output]})" for output in outputs]
            calls.append(f"queries, keys, warps, stages = tile_of(TILES_{kind.upper()}, {query})")
            grid = f"triton.cdiv({count}, {block}) * {lead[0]} * {groups}"
            calls += _call(parts, kernels[name], grid, [*_TILED, "later=later"])
    calls.append("launch_rest(later)")
    for element in parts.elements:
        if element.gradient.along == "pairs":
            calls += _pairs_call(parts, element, kernels[f"{element.gradient.name}_gradient_of_pairs"], query)
    finish: list[str] = []
    results: list[str] = []
    for text, name in inputs:
        if name not in parts.wanted:
            results.append("None")
        else:
            own = [element for element in parts.elements if element.load.tensor == name]
            summands = [gradient for operand, gradient in roles if operand == name]
            summands += [_gathered(element, text, finish) for element in own]
            results.append(_sum(summands, text, captured=bool(own)))
    return [
        *lines,
        "later = []",
        f"with torch.cuda.device_of({query}):",
        *("    " + line for line in calls),
        *finish,
        *_returned(results, 4),
    ]


def _returned(results: list[str], inside: int) -> list[str]:
    """Lines that return a tuple."""
    if len(results) == 1:
        return [f"return ({results[0]},)"]
    return signature("return ", results, "", inside=inside).splitlines()


def _sum(summands: list[str], tensor: str, *, captured: bool) -> str:
    """Source of a gradient that several parts of the Spec add to, in the dtype of its tensor."""
    if not summands:
        return f"torch.zeros_like({tensor})"
    if not captured and len(summands) == 1:
        return summands[0]
    total = summands[0] if len(summands) == 1 else f"({' + '.join(summands)})"
    return f"{total}.to({tensor}.dtype)"


_TILED = ["BLOCK_I=queries", "BLOCK_J=keys", "num_warps=warps", "num_stages=stages"]


def _memory(parts: _Parts, element: Element) -> list[str]:
    """Launcher lines that make what a captured gradient is written to."""
    gradient, tensor = element.gradient, parts.binding.tensors[element.load.tensor]
    device = f"device={tensor}.device"
    name = gradient.name
    lead = [parts.lengths[letter].value for letter in "BH"]
    last = parts.lengths["J" if gradient.along == "keys" else "I"].value
    if gradient.along == "pairs":
        if not gradient.scattered:
            return [f"{name}_gradient = torch.empty({tensor}.shape, dtype={tensor}.dtype, {device})"]
        return [f"{name}_gradient = torch.zeros({tensor}.shape, dtype=torch.float32, {device})"]
    made = [f"{name}_sums = torch.empty(({', '.join([*lead, last])}), dtype=torch.float32, {device})"]
    if gradient.place:
        made += [
            f"{name}_places = torch.empty({name}_sums.shape, dtype=torch.int64, {device})",
            f"{name}_gradient = torch.zeros({tensor}.shape, dtype=torch.float32, {device})",
        ]
    return made


def _gathered(element: Element, tensor: str, lines: list[str]) -> str:
    """Source of a captured gradient in the shape of its tensor; may need lines before."""
    name = element.gradient.name
    if element.gradient.along == "pairs":
        return f"{name}_gradient"
    if element.gradient.place:
        lines.append(f"add_at({name}_gradient, {name}_places, {name}_sums)")
        return f"{name}_gradient"
    return f"{summed_along(element)}.reshape({tensor}.shape)"


def _pairs_call(parts: _Parts, element: Element, kernel: KernelText, query: str) -> list[str]:
    gradient = element.gradient
    name = gradient.name
    rows, keys = parts.lengths["I"].value, parts.lengths["J"].value
    kept = [parts.lengths[axis.upper()].value for axis in "bh" if axis not in gradient.summed]
    lead = " * ".join(kept) or "1"
    grid = f"triton.cdiv({rows}, queries) * triton.cdiv({keys}, keys) * {lead}"
    tile = f"queries, keys, warps, stages = tile_of(TILES_PAIR, {query})"
    given = {"row_start": "0", "row_stop": rows}
    if not gradient.scattered:
        return [tile, *_call(parts, kernel, grid, _TILED, given)]
    none = f"torch.empty(0, dtype=torch.float32, device={query}.device)"
    places = f"torch.empty(0, dtype=torch.int64, device={query}.device)"
    given |= {f"{name}_sums": none, f"{name}_places": places}
    atomic = _call(parts, kernel, grid, ["ATOMIC=True", *_TILED], given)
    given = {"row_start": "first_row", "row_stop": "last_row"}
    grid = f"triton.cdiv(last_row - first_row, queries) * triton.cdiv({keys}, keys) * {lead}"
    fixed = _call(parts, kernel, grid, ["ATOMIC=False", *_TILED], given)
    return [
        tile,
        "if torch.are_deterministic_algorithms_enabled():",
        f"    tall = max(1, {SCATTERED} // ({lead} * {keys} * queries)) * queries",
        f"    for first_row in range(0, {rows}, tall):",
        f"        last_row = min(first_row + tall, {rows})",
        f"        room = ({lead}, last_row - first_row, {keys})",
        f"        {name}_sums = torch.empty(room, dtype=torch.float32, device={query}.device)",
        f"        {name}_places = torch.empty(room, dtype=torch.int64, device={query}.device)",
        *("        " + line for line in fixed),
        f"        add_at({name}_gradient, {name}_places, {name}_sums)",
        "else:",
        *("    " + line for line in atomic),
    ]


def _call(
    parts: _Parts, kernel: KernelText, grid: str, options: Iterable[str], given: Mapping[str, str] | None = None
) -> list[str]:
    """Launcher lines that run a kernel."""
    attend, binding = parts.dense.attend, parts.binding
    values = {length.name: length.value for length in parts.lengths.values()}
    values |= {pointer: binding.tensors[name] for name, pointer in binding.pointers.items()}
    values |= {
        "query": binding.tensors[attend.query],
        "key": binding.tensors[attend.key],
        "value": binding.tensors[attend.value],
    }
    values |= given or {}
    arguments = [values.get(name, name) for name in (*kernel.pointers, *kernel.integers)]
    pointers, integers = arguments[: len(kernel.pointers)], arguments[len(kernel.pointers) :]
    stems = dict.fromkeys(stride.rsplit("_stride_", 1)[0] for stride in kernel.strides)
    strides = [f"*{values.get(stem, stem)}.stride()" for stem in stems]
    passed = [*pointers, *strides, *integers, *options, "enable_fp_fusion=True"]
    return signature("launch", [kernel.name, f"({grid},)", *passed], "", inside=16).splitlines()


def _kernels(parts: _Parts, tiles: Mapping[str, Mapping[str, Tile]]) -> tuple[Kernel, ...]:
    types = parts.spec.types()
    elements = {parts.binding.pointers[name]: types[name].dtype for name in parts.binding.pointers}
    for element in parts.elements:
        name, gradient = element.gradient.name, element.gradient
        elements[f"{name}_sums"], elements[f"{name}_places"] = "float32", "int64"
        direct = gradient.along == "pairs" and not gradient.scattered
        elements[f"{name}_gradient"] = types[element.load.tensor].dtype if direct else "float32"
    elements |= dict.fromkeys(("shift", "delta", "lse", "grad_lse"), "float32")
    made = []
    for kernel in parts.kernels:
        kind = {"query_gradient": "query", "key_value_gradient": "key"}.get(kernel.name, "pair")
        used = dict(tiles[kind])
        if kernel.name == "prepare":
            used = dict.fromkeys(used, Tile(PREPARED, PREPARED, 4, 1))
        constants = {
            dtype: {
                name: {"BLOCK_I": tile.queries, "BLOCK_J": tile.keys, "ATOMIC": True}[name] for name in kernel.constants
            }
            for dtype, tile in used.items()
        }
        pointers = tuple((pointer, elements.get(pointer, "operand")) for pointer in kernel.pointers)
        made.append(Kernel(kernel.name, pointers, kernel.strides, kernel.integers, constants, used, on_hip))
    return tuple(made)


__all__ = ["generate_backward", "why_not_backward"]
