"""The host's side of a Hopper module: what it refuses, who computes which tile, and the launch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from attncompile.codegen.gluon.lists import ListLines
from attncompile.codegen.triton.expressions import Dialect, Scope, print_triton
from attncompile.codegen.triton.module import Binding, Length, allocation, expectations
from attncompile.codegen.triton.moved import Regrouped
from attncompile.codegen.triton.names import LAUNCHER_NAMES
from attncompile.codegen.triton.rounding import rounding_lines
from attncompile.codegen.triton.structure import Dense
from attncompile.codegen.triton.visits import Visits
from attncompile.ir import Spec
from attncompile.ir.expr import Expr, Index, Load, walk
from attncompile.kernels.hopper import HopperForward
from attncompile.kernels.source import signature

PYTHON = Dialect(
    "",
    {
        "min": "min({0}, {1})",
        "max": "max({0}, {1})",
        "where": "({1} if {0} else {2})",
        "and": "({0} and {1})",
        "or": "({0} or {1})",
        "not": "(not {0})",
        "floordiv": "({0} // {1})",
        "mod": "({0} % {1})",
    },
)
"""Integer expressions on the host."""

_HOST = '''\
HALF = (torch.float16, torch.bfloat16)
ROUNDED = NAMES  # these are copied into codes first  # if rounded


class Refused(ValueError):
    """The kernel cannot read these tensors where they lie."""


def why_not(query, key, value):
    """Why the kernel cannot read these tensors where they lie, or None."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        sizes, strides = tensor.shape, tensor.stride()
        if tensor.dtype not in HALF:
            return f"the kernel takes float16 and bfloat16; the {name} is {tensor.dtype}"
        if sizes[2] == 0:
            return f"the {name} is empty"
        if sizes[1] > 65535:
            return f"the {name} has {sizes[1]} heads; the work list has room for 65535"
        if name in ROUNDED:  # if rounded
            continue  # if rounded
        if tensor.data_ptr() % 16:
            return f"the {name} does not begin at a multiple of 16 bytes"
        if strides[3] != 1:
            return f"channels of the {name} lie {strides[3]} elements apart"
        for axis in range(3):
            if (strides[axis] % 8 or strides[axis] <= 0) and sizes[axis] > 1:
                return f"axis {axis} of the {name} has stride {strides[axis]}, no multiple of 16 bytes"
    return None


@functools.lru_cache(maxsize=64)
def tile_layout(rows, channels):  # if whole
    """How a tile lies in shared memory."""  # if whole
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, channels], gl.float16)  # if whole
def tile_layout(rows, channels, element=2):  # if rounded
    """How a tile of elements of so many bytes lies in shared memory."""  # if rounded
    like = gl.int8 if element == 1 else gl.float16  # if rounded
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, channels], like)  # if rounded


DESCRIBED = {}  # descriptors without their tensors


def descriptor(tensor, rows, channels):
    """What the copying unit needs to know: it fills with zeros, or leaves out, what lies past the tensor's end."""
    key = tensor.shape, tensor.stride(), tensor.dtype, rows, channels
    if key not in DESCRIBED:
        strides = [stride if size > 1 else ALIGNED for size, stride in zip(tensor.shape, tensor.stride())]
        strides[3] = 1
        block = [1, 1, rows, channels]
        made = TensorDescriptor(tensor, list(tensor.shape), strides, block, tile_layout(rows, channels))  # if whole
        layout = tile_layout(rows, channels, tensor.itemsize)  # if rounded
        made = TensorDescriptor(tensor, list(tensor.shape), strides, block, layout)  # if rounded
        if len(DESCRIBED) >= 4096:
            DESCRIBED.clear()
        DESCRIBED[key] = {name: value for name, value in vars(made).items() if name != "base"}
    # its constructor checks at length what why_not and the first of its kind have been asked
    made = TensorDescriptor.__new__(TensorDescriptor)
    vars(made).update(DESCRIBED[key], base=tensor)
    return made
'''


def host(parts: Dense) -> str:
    """The functions that look at query, key and value, and describe them to the copying unit.

    Where operands are rounded, other kernels make codes of them, wherever they lie; elements have 8 or 16 bits then.
    """
    names = ("query", "key", "value")[: len(parts.rounding.steps) if parts.rounding else 0]
    option = "rounded" if names else "whole"
    lines = [line.partition("  # if ") for line in _HOST.splitlines()]
    text = "\n".join(line for line, _, condition in lines if condition in ("", option)) + "\n"
    # an axis of one place gets a stride that is a multiple of 16 bytes
    return text.replace("NAMES", repr(names)).replace("ALIGNED", "16" if names else "8")


WORK_LIST = '''\
@functools.lru_cache(maxsize=256)
def work_list(device, batch, heads, queries, *sizes):
    """Tiles of each thread block, those with most keys first, each for the block that is free first; then −1."""
    blocks = triton.cdiv(queries, BLOCK_I.value)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    free = [(0.0, row) for row in range(min(processors, batch * heads * blocks))]
    rows = [[] for _ in free]
    costs = {}
    for head in range(batch * heads):
        h = head % heads if BY_HEAD else 0
        if h not in costs:
            counts = []
            for block in range(blocks):
                first = block * BLOCK_I.value
                keys = key_count(first, min(first + BLOCK_I.value, queries) - 1, h, *sizes)
                counts.append((keys / BLOCK_J.value + 1.5, block))
            costs[h] = sorted(counts, reverse=True)
        for cost, block in costs[h]:
            busy, row = free[0]
            rows[row].append((head // heads << 40) | (head % heads << 24) | block)
            heapq.heapreplace(free, (busy + cost, row))
    width = max(map(len, rows)) + 2
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int64, device=device)'''

_WORDS = """
    HALF ROUNDED Refused DESCRIBED KEPT kept_lists make vars work reason why_not work_list descriptor
    counts places order lists tiles blocks block_lists list_parts mask_lists memory tile_order rows tile_count
    programs extremes start stop first_start first_stop
"""
LAUNCHER_WORDS = frozenset(LAUNCHER_NAMES) | frozenset(_WORDS.split())
"""Identifiers of the launcher."""


def key_count(found: Visits, binding: Binding, keys: str, sizes: Iterable[str]) -> str:
    """The functions that tell the host how many keys a tile visits.

    Args:
        found: which it visits.
        binding: identifiers.
        keys: identifier of their number.
        sizes: that the limits of the key loops may read.
    """
    ranges = [found.main] if found.first is None else [found.first, found.main]
    nodes = [node for limits in ranges for e in (limits.start, limits.stop) for node in walk(e)]
    unknown = any(isinstance(node, Load) or node == Index("b") for node in nodes)
    names = {name: name for name in ("h", "row_first", "row_last")}
    scope = Scope(names, binding.sizes, {}, {}, dialect=PYTHON)
    lines: list[str] = []
    numbers: Counter[str] = Counter()

    def text(expr: Expr) -> str:
        printed = print_triton(expr, scope, numbers)
        lines.extend(printed.lines)
        return printed.value

    if unknown:
        body = [f"return {keys}  # the tensors that decide lie on the device"]
    else:
        lines.append(f"start, stop = {text(found.main.start)}, {text(found.main.stop)}")
        counted = "max(stop - start, 0)"
        if found.first:
            lines.append(f"first_start, first_stop = {text(found.first.start)}, {text(found.first.stop)}")
            counted += " + max(min(first_stop, start) - first_start, 0)"
        body = [*lines, f"return {counted}"]
    by_head = not unknown and any(node == Index("h") for node in nodes)
    return "\n".join(
        [
            f"BY_HEAD = {by_head}  # whether heads differ in the keys that they visit",
            "",
            "",
            signature("def key_count", ["row_first", "row_last", "h", *sizes], ":"),
            '    """About how many keys a tile visits: decides the order of the work."""',
            *(f"    {line}" for line in body),
        ]
    )


def several_kernels(parts: Dense, skeleton: HopperForward) -> bool:
    """Whether a call runs kernels before the attention, all of which its first call compiles at the same time."""
    return bool(parts.rounding or (skeleton.marks and skeleton.captured))


def list_lines(
    parts: Dense,
    binding: Binding,
    lengths: tuple[Length, Length, Length],
    skeleton: HopperForward,
    moved: Regrouped | None = None,
) -> ListLines:
    """The launcher's lines about lists; arguments as of :func:`launch_lines`."""
    values = _values(parts, binding, lengths)
    return ListLines.of(parts, binding, lengths, skeleton, _operands(parts, binding, moved)[0], values)


def _operands(parts: Dense, binding: Binding, moved: Regrouped | None) -> list[str]:
    """Parameters of query, key and value, as they are before anything is done to them."""
    attend, rounding = parts.attend, parts.rounding
    before = {name: move.tensor for name, move in moved.before.items()} if moved else {}
    before |= {step.out: rounding.source(step) for step in rounding.steps} if rounding else {}
    return [binding.tensors[before.get(name, name)] for name in (attend.query, attend.key, attend.value)]


def _values(parts: Dense, binding: Binding, lengths: tuple[Length, Length, Length]) -> dict[str, str]:
    """What stands for the kernel's sizes in the launcher."""
    return {length.name: length.value for length in lengths} | {"key_heads": binding.size(parts.key.sizes[1])}


def launch_lines(
    spec: Spec,
    parts: Dense,
    binding: Binding,
    lengths: tuple[Length, Length, Length],
    skeleton: HopperForward,
    moved: Regrouped | None = None,
) -> list[str]:
    """Body of the launcher.

    Args:
        spec: the whole.
        parts: of its attention.
        binding: identifiers.
        lengths: heads, queries and keys.
        skeleton: the kernel.
        moved: how tokens are moved, where the kernel reads them in boxes.
    """
    attend, tile, boxes = parts.attend, skeleton.tile, skeleton.boxes
    heads, queries = lengths[0].value, lengths[1].value
    batch = binding.size(parts.query.sizes[0])
    rounding = parts.rounding
    query, key, value = _operands(parts, binding, moved)
    copied = ("query_codes", "key_codes") if rounding else (query, key)
    tokens = binding.size(spec.types()[moved.after.out].sizes[2]) if moved else queries
    captured = [binding.tensors[name] for name in binding.pointers]
    values = _values(parts, binding, lengths)
    sizes = [values.get(name, name) for name in skeleton.integers()]
    channels, features = "CHANNELS.value", "FEATURES.value"
    described = {"query": "64", "key": "BLOCK_J.value"}
    function = "descriptor"
    if boxes:
        function = "box_descriptor"
        described = {"query": f"{(*boxes.lead(), *boxes.query_box)}", "key": f"{(*boxes.lead(), *boxes.key_box)}"}
    arguments = [
        f"{function}({copied[0]}, {described['query']}, {channels})",
        f"{function}({copied[1]}, {described['key']}, {channels})",
        f"{function}(value_codes, {features}, {described['key']})"
        if skeleton.turned_values
        else f"{function}({value}, {described['key']}, {features})",
        f"{function}(out, {described['query']}, {features})" if tile.staged else "out",
        *(["lse"] if skeleton.lse else []),
        *(skeleton.narrow.scales() if skeleton.narrow else ()),
        *captured,
        *(["counts", "places", "order", "work", "tile_count"] if skeleton.marks else ["work", "work.shape[1]"]),
        *([] if tile.staged else ["*out.stride()[:3]"]),
        *(f"*{name}.stride()" for name in captured),
        *sizes,
        "num_warps=4",
        f"maxnreg={tile.limit}",
        *(["later=later"] if several_kernels(parts, skeleton) else []),
    ]
    blocks = "rows" if skeleton.marks else "work.shape[0]"
    lse = f"lse = torch.empty(({batch}, {heads}, {queries}), dtype=torch.float32, device={query}.device)"
    results = {attend.out: "out", attend.lse: "lse"} | ({moved.after.out: "out"} if moved else {})
    returned = f"return {', '.join(results[name] for name in spec.outputs)}"
    listed = signature(
        "work = work_list", [f"{query}.device", batch, heads, queries, *sizes], "", inside=4
    ).splitlines()
    marked: list[str] = []
    if skeleton.marks:
        marked = list_lines(parts, binding, lengths, skeleton, moved).before(bool(captured))
    return [
        *expectations(spec, binding, query),
        *(
            [f"out = torch.empty(({batch}, {heads}, {tokens}, {skeleton.features}), dtype={query}.dtype, "
             f"device={query}.device)"]
            if boxes and boxes.merged
            else [allocation("out", batch, tokens, heads, skeleton.features, query)]
        ),
        *([lse] if skeleton.lse else []),
        "if out.numel() == 0:",
        f"    {returned}",
        f"reason = why_not({query}, {key}, {value})",
        "if reason:",
        "    raise Refused(reason)",
        *(["later = []"] if several_kernels(parts, skeleton) else []),
        *rounding_lines(spec, parts, binding, shuffled=True),
        *([] if skeleton.marks else listed),
        f"with torch.cuda.device_of({query}):",
        *marked,
        *signature("launch", ["attend_forward", f"({blocks},)", *arguments], "", 4, inside=4).splitlines(),
        *(["    launch_rest(later)"] if several_kernels(parts, skeleton) else []),
        returned,
    ]
