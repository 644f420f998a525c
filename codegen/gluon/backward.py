"""From a Spec to a Gluon module with its gradients: :class:`attncompile.kernels.hopper_backward.HopperBackward`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

from attncompile.codegen.gluon.columns import FAR, NEAR, fold_columns
from attncompile.codegen.gluon.generate import GLUON, gluon_functions
from attncompile.codegen.gluon.launch import LAUNCHER_WORDS, WORK_LIST, host, key_count
from attncompile.codegen.gluon.structure import GRANULE, effort
from attncompile.codegen.triton.backward import why_not_backward as why_not_triton
from attncompile.codegen.triton.expressions import Scope
from attncompile.codegen.triton.generate import GeneratedModule
from attncompile.codegen.triton.module import (
    CHECKS,
    REST,
    REST_IMPORT,
    Binding,
    Length,
    constant,
    expectations,
    function_of,
    mentions,
)
from attncompile.codegen.triton.names import BACKWARD_NAMES, MODULE_NAMES
from attncompile.codegen.triton.runs import key_runs
from attncompile.codegen.triton.structure import Dense, dense
from attncompile.codegen.triton.visits import visits
from attncompile.ir import Spec, simplify
from attncompile.ir.derivative import derivative, real_loads
from attncompile.ir.expr import SCORE, TRUE, Apply, Const, Expr, Index, loads, substitute
from attncompile.kernels.hopper import IMPORTS
from attncompile.kernels.hopper_backward import (
    KEYS,
    LIMIT,
    RESERVED,
    BackwardTile,
    HopperBackward,
    exchanged,
)
from attncompile.kernels.source import indented, signature

TILES = (BackwardTile(128, 64, 2, "ahead"), BackwardTile(64, 128, 2, "ahead"))
"""By channels, the fewest first."""

PART = 64
"""Queries of a product."""

MOST_EFFORT = 8
"""Instructions of score and slope for each pair: a softcap takes 6. All but a few registers hold sums."""


@dataclass(frozen=True)
class HopperGradients(GeneratedModule):
    """Source of a Gluon module with gradients.

    Attributes:
        skeleton: what the Spec decided.
    """

    skeleton: HopperBackward


def why_not_backward(spec: Spec, wanted: Collection[str] | None = None) -> str | None:
    """Why there is no Hopper kernel for the gradients of a Spec, or ``None``.

    Args:
        spec: one attention.
        wanted: names of the inputs whose gradients are wanted; all real ones when ``None``.
    """
    reason = why_not_triton(spec)
    if reason:
        return reason
    parts = dense(spec)
    attend = parts.attend
    if attend.norm.kind != "softmax":
        return f"the Hopper kernel's gradients are those of softmax, not of {attend.norm.kind}"
    if parts.edit is not None:
        return f"the Hopper kernel has no gradient of an edit of weights such as {attend.weight}"
    operands = (attend.query, attend.key, attend.value)
    if len(set(operands)) < 3:
        return f"{attend.query}, {attend.key} and {attend.value} are not three tensors, whose gradients would be added"
    missing = [name for name in operands if wanted is not None and name not in wanted]
    if missing:
        return f"the Hopper kernel computes the gradients of query, key and value together; {missing[0]} needs none"
    for expr in (parts.score, parts.sink):
        for load in real_loads(expr) if expr is not None else ():
            if wanted is None or load.tensor in wanted:
                return f"the gradient of {load} is summed by plain Triton's kernels"
    for name, found in zip(operands, (parts.query, parts.key, parts.value), strict=True):
        channels = constant(found.sizes[3])
        if channels % GRANULE:
            return f"{name} has {channels} channels; TMA copies rows of multiples of {GRANULE}"
        if channels > (most := TILES[-1].channels):
            return f"{name} has {channels} channels; gradients of keys and values fit into registers up to {most}"
    if _heads(parts, "", "") is None:
        return f"heads read the keys of {attend.kv_head}; the Hopper kernel walks over h // n or h mod n"
    seen = visits(simplify(_exchanged(parts.mask)), parts.key.sizes[2], parts.query.sizes[2])
    if seen.test != TRUE:
        return f"which queries see a block of keys has no limits in closed form: {parts.mask}"
    return _why_not_expressions(parts)


def _why_not_expressions(parts: Dense) -> str | None:
    slope = derivative(parts.score, SCORE)
    for expr in (parts.score, parts.mask):
        for load in loads(expr):
            return f"{load} is read by plain Triton's kernels; the Hopper kernel was measured without such tensors"
    taken = sum(effort(_exchanged(expr), PART) for expr in (parts.score, slope))
    taken = max(taken, effort(_exchanged(parts.mask), PART))
    if taken > MOST_EFFORT:
        return f"score and slope take about {taken} instructions for each pair; the Hopper kernel is for {MOST_EFFORT}"
    return None


def generate_backward(
    spec: Spec, wanted: Collection[str] | None = None, tile: BackwardTile | None = None
) -> HopperGradients:
    """The Gluon module with the gradients of a Spec.

    Its function ``attend_backward`` is that of :func:`attncompile.codegen.triton.backward.generate_backward`; it raises
    ``Refused`` for tensors that TMA cannot read where they lie, and where deterministic algorithms are asked for.

    Args:
        spec: one attention.
        wanted: names of the inputs whose gradients are wanted; all real ones when ``None``.
        tile: how the work is divided, if not as usual.

    Raises:
        ValueError: when there is no such kernel for the Spec; says why.
    """
    reason = why_not_backward(spec, wanted)
    if reason:
        raise ValueError(f"no Hopper backward kernel for {spec.name}: {reason}")
    spec = dataclasses.replace(spec, name="attention")
    parts = dense(spec)
    binding = Binding.of(
        spec,
        (),
        (*MODULE_NAMES, *BACKWARD_NAMES, *RESERVED),
        (*LAUNCHER_WORDS, *BACKWARD_NAMES, *_WORDS),
    )
    lengths = (
        binding.length("H", parts.query.sizes[1]),
        binding.length("I", parts.query.sizes[2]),
        binding.length("J", parts.key.sizes[2]),
    )
    skeleton = _skeleton(spec, parts, binding, lengths, tile or _tile(parts))
    text = skeleton.source()
    found = visits(_exchanged(parts.mask), parts.key.sizes[2], parts.query.sizes[2])
    count = exchanged(key_count(found, binding, skeleton.lengths[1], skeleton.integers()))
    sections = (
        _documentation(spec, parts),
        IMPORTS.replace("import triton\n", "import triton\nimport triton.language as tl\n", 1).replace(
            "import functools\n", f"{REST_IMPORT}\nimport functools\n", 1
        ),
        skeleton.constants() + "\n" + CHECKS,
        *gluon_functions(text),
        text,
        REST,
        host(parts),
        exchanged(WORK_LIST),
        count,
        _launcher(spec, parts, binding, lengths, skeleton),
    )
    source = sections[0] + "\n\n" + sections[1] + "\n\n" + "\n\n\n".join(sections[2:]) + "\n"
    return HopperGradients(f"hopper_backward_{spec.fingerprint()}", source, (), skeleton)


_WORDS = frozenset(
    """query_sums row_values blocks room attend_backward_kernel prepare finish readable row_layout row_descriptor
    query_count""".split()  # noqa: SIM905
)
"""Identifiers of the launcher."""


def _tile(parts: Dense) -> BackwardTile:
    widest = max(constant(found.sizes[3]) for found in (parts.query, parts.value))
    return next(tile for tile in TILES if widest <= tile.channels)


def _exchanged(expr: Expr) -> Expr:
    """The expression with the roles of query and key exchanged."""
    return substitute(expr, {Index("i"): Index("j"), Index("j"): Index("i")})


def folded(expr: Expr) -> Expr:
    """The expression with the queries of a block split, which are the columns of its products."""
    return _exchanged(fold_columns(simplify(_exchanged(expr)), keys=PART))


def _heads(parts: Dense, heads: str, groups: str) -> tuple[tuple[str, str, str], str | None] | None:
    """Range of the heads that read KV head ``g``, and when one has none; ``None`` where they are no range."""
    extents = {"h": parts.query.sizes[1]}
    found, count = simplify(parts.attend.kv_head, extents), simplify(parts.key.sizes[1])
    match found:
        case Index("h"):
            return ("g", "g + 1", "1"), f"{groups} > {heads}"
        case Apply("floordiv", (Index("h"), Const(int(size)))):
            last = f"gl.minimum(g * {size} + {size}, {heads})"
            return (f"g * {size}", last, "1"), f"({groups} - 1) * {size} >= {heads}"
        case Apply("mod", (Index("h"), Const(int(size)))) if count == Const(size):
            return ("g", heads, f"{size}"), f"{groups} > {heads}"
        case _ if count == Const(1):
            return ("0", heads, "1"), None
    return None


def _skeleton(
    spec: Spec, parts: Dense, binding: Binding, lengths: tuple[Length, Length, Length], tile: BackwardTile
) -> HopperBackward:
    batch, heads, queries = parts.query.sizes[:3]
    keys = parts.key.sizes[2]
    extents = {"b": batch, "h": heads, "i": queries, "j": keys}
    indices = {name: name for name in ("b", "h", "i", "j", NEAR.name, FAR.name)}
    pairs = Scope(indices, binding.sizes, {}, {}, extents, GLUON)
    scalars = {n: n for n in ("b", "h", "row_first", "row_last")}
    turned = {"b": batch, "h": heads, "i": keys, "j": queries}
    block = Scope(scalars, binding.sizes, {}, {}, turned, GLUON)
    found = dataclasses.replace(visits(simplify(_exchanged(parts.mask)), keys, queries), test=TRUE)
    runs, runs_text = key_runs(found, block)
    slope = derivative(parts.score, SCORE)
    steady = isinstance(slope, Const)
    score = None if parts.score == SCORE else function_of("score", folded(parts.score), pairs)
    rising = None if steady else function_of("score_slope", folded(slope), pairs)
    visible = None if parts.mask == TRUE else function_of("visible", folded(parts.mask), pairs)
    ranges = _heads(parts, lengths[0].name, "")
    assert ranges is not None  # why_not_backward has seen to it
    parameters = [name for function in (score, rising, visible) if function for name in function.parameters]
    return HopperBackward(
        tile=tile,
        scale=parts.scale,
        score=score,
        slope=rising,
        gain=parts.scale * (float(slope.value) if isinstance(slope, Const) else 1.0),
        visible=visible,
        inside=not (isinstance(simplify(keys), Const) and constant(keys) % KEYS == 0),
        heads=ranges[0],
        runs=runs,
        lengths=(lengths[0].name, lengths[1].name, lengths[2].name),
        sizes=tuple(s for s in binding.sizes.values() if mentions(s, runs_text, *ranges[0], *parameters)),
        channels=constant(parts.query.sizes[3]),
        features=constant(parts.value.sizes[3]),
        lse_gradient=bool(parts.attend.lse) and parts.attend.lse in spec.outputs,
    )


def _documentation(spec: Spec, parts: Dense) -> str:
    before, inputs = _arguments(spec, {value.name: value.name for value in spec.inputs})
    lines = [
        "Gradients of attention as a Gluon kernel for Hopper GPUs, generated by attncompile.",
        "",
        str(spec),
        "",
        f"attend_backward({', '.join([*before, *inputs])}) gives the gradients of the inputs.",
        "Differentiated, the log-sum-exp being that of the forward pass:",
        f"  ∂logit/∂s = {simplify(parts.scale * derivative(parts.score, SCORE))}",
        "A row without any visible key has gradients of zero.",
        "The gradient of the query is summed by atomic additions, in no fixed order: where",
        "torch.use_deterministic_algorithms is on, the kernel refuses. Keys' and values' are the same each time.",
    ]
    text = "\n".join(lines)
    return '"""' + text.replace("\\", "\\\\").replace('"""', "'''") + '\n"""'


def _arguments(spec: Spec, tensors: dict[str, str]) -> tuple[list[str], list[str]]:
    """Parameters of ``attend_backward`` before the Spec's inputs, and those."""
    attend = spec.attend()
    assert attend is not None
    given = ["grad_out", *(["grad_lse"] if attend.lse and attend.lse in spec.outputs else [])]
    return [*given, "out", "lse"], [tensors[value.name] for value in spec.inputs]


READABLE = '''\
@functools.lru_cache(maxsize=1)
def row_layout():
    """How a block's row values lie in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


def row_descriptor(tensor):
    """What the copying unit needs to know of the row values."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 64], row_layout())


def readable(tensor):
    """The tensor, copied where the copying unit could not read it."""
    return tensor.contiguous() if why_not(tensor, tensor, tensor) else tensor'''


def _launcher(
    spec: Spec,
    parts: Dense,
    binding: Binding,
    lengths: tuple[Length, Length, Length],
    skeleton: HopperBackward,
) -> str:
    before, inputs = _arguments(spec, dict(binding.tensors))
    lines = [
        signature("def attend_backward", [*before, *inputs], ":"),
        '    """The gradients of this Spec\'s inputs, in order; None for those that are not computed.',
        "",
        "    Args:",
        "        grad_out: gradient of the result",
        *(["        grad_lse: gradient of its log-sum-exp"] if skeleton.lse_gradient else []),
        "        out: the result",
        "        lse: its log-sum-exp, float32",
        *(
            f"        {name}: {value.type}".replace("\\", "\\\\")
            for name, value in zip(inputs, spec.inputs, strict=True)
        ),
        '    """',
        indented(_body(spec, parts, binding, lengths, skeleton), 4),
    ]
    return READABLE + "\n\n\n" + "\n".join(lines)


def _body(
    spec: Spec,
    parts: Dense,
    binding: Binding,
    lengths: tuple[Length, Length, Length],
    skeleton: HopperBackward,
) -> list[str]:
    attend = parts.attend
    operands = (attend.query, attend.key, attend.value)
    query, key, value = (binding.tensors[name] for name in operands)
    batch, groups = binding.size(parts.query.sizes[0]), binding.size(parts.key.sizes[1])
    heads, queries, keys = (length.value for length in lengths)
    values = {length.name: length.value for length in lengths}
    sizes = [values.get(name, name) for name in skeleton.integers()]
    rows = f"({batch}, {heads}, {queries})"
    checked = [("out", f"({batch}, {heads}, {queries}, {skeleton.features})", f"({query}.dtype,)")]
    checked.append(("grad_out", *checked[0][1:]))
    given = ["lse", *(["grad_lse"] if skeleton.lse_gradient else [])]
    checked += [(name, rows, "(torch.float32,)") for name in given]
    made = dict(zip(operands, ("grad_query", "grad_key", "grad_value"), strict=True))
    inputs = [(value.name, binding.tensors[value.name]) for value in spec.inputs]
    returned = [made.get(name, "None") for name, _ in inputs]
    zeros = [f"torch.zeros_like({tensor})" if name in made else "None" for name, tensor in inputs]
    ranges = _heads(parts, heads, groups)
    crowded = ranges[1] if ranges else None
    device = f"device={query}.device"
    constants = ["CHANNELS=CHANNELS.value", "BLOCK_I=BLOCK_I.value"]
    before = signature(
        "launch",
        ["prepare", f"({batch} * {heads} * blocks,)", "out", "grad_out", *given, "row_values", "query_sums", heads,
         queries, "blocks", "*out.stride()", "*grad_out.stride()", f"EXTENT={skeleton.features}", *constants,
         "num_warps=8", "later=later"],
        "", 4, inside=4,
    )  # fmt: skip
    arguments = [
        f"descriptor({query}, BLOCK_I.value, CHANNELS.value)",
        f"descriptor({key}, 64, CHANNELS.value)",
        f"descriptor({value}, 64, CHANNELS.value)",
        "descriptor(grad_out, BLOCK_I.value, CHANNELS.value)",
        "row_descriptor(row_values)",
        "descriptor(grad_key, 64, CHANNELS.value)",
        "descriptor(grad_value, 64, CHANNELS.value)",
        "query_sums",
        "work",
        "work.shape[1]",
        *sizes,
        "num_warps=4",
        f"maxnreg={LIMIT}",
        "later=later",
    ]
    between = signature("launch", ["attend_backward_kernel", "(work.shape[0],)", *arguments], "", 4, inside=4)
    after = signature(
        "launch",
        ["finish", f"({batch} * {heads} * blocks,)", "query_sums", "grad_query", heads, queries, "blocks",
         "*grad_query.stride()[:3]", f"EXTENT={skeleton.channels}", *constants, "num_warps=8", "later=later"],
        "", 4, inside=4,
    )  # fmt: skip
    return [
        *expectations(spec, binding, query),
        *(f'expect("{name}", {name}, {shape}, {kinds}, {query}.device)' for name, shape, kinds in checked),
        f"if {query}.numel() == 0 or {value}.numel() == 0:",
        *signature("return ", zeros, "", inside=8, indent=4).splitlines(),
        f"reason = why_not({query}, {key}, {value})",
        "if torch.are_deterministic_algorithms_enabled():",
        '    reason = "the gradient of the query is summed in no fixed order"',
        *([f"if {crowded}:", '    reason = "no head reads the last keys"'] if crowded else []),
        "if reason:",
        "    raise Refused(reason)",
        "grad_out = readable(grad_out)",
        *(f"{name} = {name}.contiguous()" for name in given),
        f"blocks = triton.cdiv({queries}, BLOCK_I.value)",
        *(f"{result} = torch.empty_like({binding.tensors[name]})" for name, result in made.items()),
        f"rows = {batch} * {heads} * blocks * BLOCK_I.value // 32",
        f"row_values = torch.empty((rows, 64), dtype=torch.float32, {device})",
        "room = row_values.numel() // 2 * CHANNELS.value",
        f"query_sums = torch.empty(room, dtype=torch.float32, {device})",
        *signature("work = work_list", [f"{query}.device", batch, groups, keys, *sizes], "", inside=4).splitlines(),
        "later = []",
        f"with torch.cuda.device_of({query}):",
        *before.splitlines(),
        *between.splitlines(),
        *after.splitlines(),
        "    launch_rest(later)",
        *signature("return ", returned, "", inside=4).splitlines(),
    ]


__all__ = ["HopperGradients", "generate_backward", "why_not_backward"]
