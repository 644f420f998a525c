"""From a Spec to a Gluon module for Hopper: kernel, launcher and documentation in one self-contained file."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from attncompile.codegen.gluon.boxes import boxes_of
from attncompile.codegen.gluon.cells import FIRST_ROW, START, keys_of_cells, read_once
from attncompile.codegen.gluon.columns import FAR, NEAR, fold_columns
from attncompile.codegen.gluon.digits import DIGIT, digits_of
from attncompile.codegen.gluon.elements import OWN_KEY, Early
from attncompile.codegen.gluon.launch import (
    LAUNCHER_WORDS,
    WORK_LIST,
    host,
    key_count,
    launch_lines,
    list_lines,
    several_kernels,
)
from attncompile.codegen.gluon.lists import LISTS_GIVEN, ListRoom
from attncompile.codegen.gluon.marks import marks
from attncompile.codegen.gluon.structure import arranged, codes_of, may_be_infinite, padded, tile_for, why_not_spec
from attncompile.codegen.gluon.tiles import SHARED_MEMORY, SHORT, shared_bytes
from attncompile.codegen.triton.dense import key_runs
from attncompile.codegen.triton.expressions import Dialect, Scope, captured_tensors, print_triton
from attncompile.codegen.triton.generate import GeneratedModule
from attncompile.codegen.triton.module import (
    CHECKS,
    REST,
    REST_IMPORT,
    Binding,
    Kernel,
    Length,
    constant,
    device_functions_of,
    documentation,
    function_of,
    launcher,
    mentions,
    score_function,
)
from attncompile.codegen.triton.moved import regrouped_parts
from attncompile.codegen.triton.names import MODULE_NAMES
from attncompile.codegen.triton.regroup import around
from attncompile.codegen.triton.rounding import narrow_operands, rounding_texts
from attncompile.codegen.triton.saturated import Saturated
from attncompile.codegen.triton.structure import Dense, dense, hides
from attncompile.codegen.triton.visits import visits
from attncompile.ir import Spec, simplify
from attncompile.ir.blocks import key_bounds
from attncompile.ir.expr import SCORE, TRUE, Apply, Const, loads, walk
from attncompile.ir.simplify import Simplifier
from attncompile.kernels.hopper import IMPORTS, MOST_STAGES, RESERVED, HopperForward, HopperTile
from attncompile.kernels.hopper_boxes import WORDS, Boxes
from attncompile.kernels.hopper_digits import MOST
from attncompile.kernels.hopper_digits import WORDS as DIGIT_WORDS
from attncompile.kernels.hopper_lines import hopper_function
from attncompile.kernels.hopper_marks import KEPT, MarkBlocks
from attncompile.kernels.quantize import DEVICE_FUNCTIONS as ROUNDING_FUNCTIONS

GLUON = Dialect("gl.", {"sigmoid": "(1.0 / (1.0 + gl.exp(-{0})))"})
"""Gluon has Triton's functions under another name, but no sigmoid."""

LIGHT = 3
"""With no more operators than this in score and mask, three warpgroups share the registers."""


@dataclass(frozen=True)
class HopperModule(GeneratedModule):
    """Source of a Gluon module.

    Attributes:
        skeleton: what the Spec decided.
        elements: element type of each pointer.
        moving: kernels that move tokens before and after.
    """

    skeleton: HopperForward
    elements: dict[str, str]
    moving: tuple[Kernel, ...] = ()

    @property
    def list_room(self) -> ListRoom | None:
        """What lists of key blocks take that calls may share, or ``None`` where there are none."""
        return None if self.moving else ListRoom.of(self.skeleton)


def generate(
    spec: Spec, tile: HopperTile | None = None, *, queries: int = SHORT, in_place: bool = False
) -> HopperModule:
    """The Gluon module of a Spec.

    The same Spec gives the same text; the Spec's name is no part of it.

    Args:
        spec: one attention.
        tile: how the work is divided, when not as :mod:`attncompile.codegen.gluon.tiles` says.
        queries: about how many queries there will be; any number is computed.
        in_place: whether tokens that are moved into boxes of a grid are read and written where they lie, instead of
            being copied before and after.

    Raises:
        ValueError: when there is no kernel for the Spec; says why.
    """
    reason = why_not_spec(spec)
    if reason:
        raise ValueError(f"no Hopper kernel for {spec.name}: {reason}")
    spec = dataclasses.replace(spec, name="attention")
    moved = regrouped_parts(spec)
    attention = moved.attention if moved else spec
    parts = dense(attention)
    tile = tile or _tile(parts, queries)
    if not 1 <= tile.stages <= MOST_STAGES:
        raise ValueError(f"a tile of {tile.stages} stages: there are barriers for 1 to {MOST_STAGES}")
    boxes = boxes_of(spec, moved, tile, GLUON) if moved and in_place else None
    if moved and boxes is None:
        inner = generate(attention, tile)
        source, moving = around(spec, moved, inner.source)
        return dataclasses.replace(inner, name=f"hopper_{spec.fingerprint()}", source=source, moving=moving)
    expressions = tuple(expr for expr in (parts.score, parts.mask, parts.sink) if expr is not None)
    reserved = (*MODULE_NAMES, *RESERVED, *WORDS, *DIGIT_WORDS, *MarkBlocks.words())
    binding = Binding.of(spec, captured_tensors(*expressions), reserved, LAUNCHER_WORDS)
    lengths = (
        binding.length("H", parts.query.sizes[1]),
        binding.length("I", parts.query.sizes[2]),
        binding.length("J", parts.key.sizes[2]),
    )
    skeleton = _skeleton(attention, parts, binding, lengths, tile, boxes)
    kernel_text = skeleton.source()
    inputs = [binding.tensors[value.name] for value in spec.inputs]
    found = visits(parts.mask, parts.query.sizes[2], parts.key.sizes[2])
    shared = list_lines(parts, binding, lengths, skeleton, moved) if ListRoom.of(skeleton) else None
    lists = [skeleton.marks.host(), *([] if skeleton.captured else [KEPT])] if skeleton.marks else []
    counted = key_count(found, binding, skeleton.lengths[2], skeleton.integers())
    rounding = rounding_texts(spec, parts)
    several = several_kernels(parts, skeleton)
    sections = (
        _documentation(spec, inputs, kernel_text),
        IMPORTS.replace("import triton\n", "import triton\nimport triton.language as tl\n", 1)
        if skeleton.marks or rounding
        else IMPORTS,
        skeleton.constants() + "\n" + CHECKS,
        *([REST] if several else []),
        *gluon_functions(kernel_text),
        *device_functions_of(*rounding, names=ROUNDING_FUNCTIONS),
        *rounding,
        kernel_text,
        host(parts),
        *([boxes.host()] if boxes else []),
        *(lists if skeleton.marks else [WORK_LIST, counted]),
        *([shared.function(spec, binding)] if shared else []),
        launcher(
            spec,
            inputs,
            launch_lines(spec, parts, binding, lengths, skeleton, moved),
            LISTS_GIVEN if shared else None,
        ),
    )
    source = sections[0] + "\n\n" + sections[1] + "\n\n" + "\n\n\n".join(sections[2:]) + "\n"
    if several:
        source = source.replace("import functools\n", f"{REST_IMPORT}\nimport functools\n", 1)
    types = spec.types()
    elements = {pointer: types[name].dtype for name, pointer in binding.pointers.items()}
    elements |= {"out": "operand", "lse": "float32", "work": "int64"}
    elements |= dict.fromkeys(("counts", "places", "order"), "int32")
    elements |= dict.fromkeys(("query_scale", "key_scale", "value_scale"), "float32")
    kernel = Kernel(
        "attend_forward",
        tuple((pointer, elements[pointer]) for pointer in skeleton.pointers()),
        skeleton.strides(),
        (skeleton.work_size, *skeleton.integers()),
        {},
        {},
    )
    return HopperModule(f"hopper_{spec.fingerprint()}", source, (kernel,), skeleton, elements)


def generate_fastest(spec: Spec, tile: HopperTile | None = None, *, queries: int = SHORT) -> HopperModule:
    """The Gluon module that is expected to be fastest.

    Where the mask is a neighbourhood on a grid of fixed size, that is one whose tiles are boxes of the grid, if these
    leave enough to skip: read where they lie, or else, if the copies pay too, copied before and after. Tokens that the
    Spec itself moves are read where they lie, if its boxes can be.

    Args:
        spec: as it is called; its inputs and results stay the same.
        tile, queries: as in :func:`generate`.

    Raises:
        ValueError: when there is no kernel for the Spec; says why.
    """
    if regrouped_parts(spec):
        return generate(spec, tile, queries=queries, in_place=True)
    moved = arranged(spec, in_place=True)
    if moved is spec or why_not_spec(moved):
        return generate(spec, tile, queries=queries)
    module = generate(moved, tile, queries=queries, in_place=True)
    if module.skeleton.boxes is not None:
        return module
    return generate(arranged(spec), tile, queries=queries)


def _skeleton(
    spec: Spec,
    parts: Dense,
    binding: Binding,
    lengths: tuple[Length, Length, Length],
    tile: HopperTile,
    boxes: Boxes | None,
) -> HopperForward:
    attend, types = parts.attend, spec.types()
    batch, heads, queries = parts.query.sizes[:3]
    keys = parts.key.sizes[2]
    extents = {"b": batch, "h": heads, "i": queries, "j": keys}
    names = ("b", "h", "i", "j", NEAR.name, FAR.name, FIRST_ROW.name, START.name, OWN_KEY.name)
    indices = {name: name for name in names}
    # a warpgroup's queries may all lie behind the last one
    firsts = {START.name: keys, OWN_KEY.name: keys, FIRST_ROW.name: Const(1 << 30)}
    pairs = Scope(indices, binding.sizes, binding.pointers, types, {**extents, **firsts}, GLUON)
    scalars = {n: n for n in ("b", "h", "row_first", "row_last")}
    block = Scope(scalars, binding.sizes, binding.pointers, types, extents, GLUON)
    far = Saturated.of(parts.score, parts.mask, queries, keys)
    found = dataclasses.replace(far.found if far else visits(parts.mask, queries, keys), test=TRUE)
    runs, runs_text = key_runs(found, block)
    score_text, mask_text = (fold_columns(read_once(expr, tile), keys=tile.keys) for expr in (parts.score, parts.mask))
    sink = None if parts.sink is None else function_of("sink", parts.sink, pairs)
    kv_head = print_triton(simplify(attend.kv_head, extents), block).value
    listed = marks(parts.mask, queries, keys, binding.pointers, binding.sizes, types, extents, tile)
    marks_text = listed.texts() if listed else ""
    expressions = tuple(expr for expr in (parts.score, parts.mask, parts.sink) if expr is not None)
    channels, features = constant(parts.query.sizes[3]), constant(parts.value.sizes[3])
    within = Simplifier({"b": batch, "h": heads, "i": queries})
    filled = isinstance(simplify(keys), Const) and constant(keys) % tile.keys == 0
    inside = not filled and not any(within.nonnegative(keys - limit) for limit in key_bounds(parts.mask).upper)
    digits = None
    if listed and not inside and _by_product(parts, tile, channels, features):
        indices = {name: name for name in ("b", "h", "i", START.name, DIGIT.name)}
        extents_by_digit = {"b": batch, "h": heads, "i": queries, START.name: keys}
        by_digit = Scope(indices, binding.sizes, binding.pointers, types, extents_by_digit, GLUON)
        digits = digits_of(parts.mask, tile.keys, by_digit)
    room = SHARED_MEMORY - shared_bytes(tile, padded(channels), padded(features), codes_of(parts))
    early = Early.of(score_text, TRUE if digits else mask_text, pairs, tile, room)
    named = dataclasses.replace(pairs, given=early.names)
    score = None if parts.score == SCORE else score_function(parts, "score", score_text, named)
    visible = None if parts.mask == TRUE else function_of("visible", mask_text, named)
    elements = early.functions(pairs)
    far_text = None if far is None else fold_columns(read_once(far.score, tile), keys=tile.keys)
    far_score = None if far_text is None else score_function(parts, "far_score", far_text, named)
    functions = (score, far_score, visible, sink, *elements.functions())
    parameters = [name for function in functions if function for name in function.parameters]
    return HopperForward(
        tile=tile,
        scale=parts.scale,
        score=score,
        far_score=far_score,
        bounded=may_be_infinite(parts.score) and not hides(parts),
        hides=hides(parts),
        visible=None if digits else visible,
        inside=inside,
        sink=sink,
        kv_head=kv_head,
        runs=runs,
        lse=bool(attend.lse) and attend.lse in spec.outputs,
        captured=tuple((pointer, len(types[name].axes)) for name, pointer in binding.pointers.items()),
        lengths=(lengths[0].name, lengths[1].name, lengths[2].name),
        sizes=tuple(s for s in binding.sizes.values() if mentions(s, runs_text, kv_head, marks_text, *parameters)),
        channels=channels,
        features=features,
        clamped=any(loads(expr) for expr in expressions),
        marks=listed,
        boxes=boxes,
        digits=digits,
        narrow=narrow_operands(parts),
        elements=elements,
        normalizer=attend.norm.kind,
    )


def _documentation(spec: Spec, inputs: list[str], kernel: str) -> str:
    notes = "Products in float16 or bfloat16 are summed in float32."
    if "tanh(" in kernel:
        notes += " tanh is that of the special-function unit: relative error at most 2^-11."
    if "hidden_digits(" in kernel:
        notes += " The mask is added to products of query and key, which have to lie between -2^98 and 2^98."
    text = documentation(spec, inputs).replace("as a Triton kernel", "as a Gluon kernel for Hopper GPUs", 1)
    return re.sub(r"^Products in .*$", notes, text, count=1, flags=re.MULTILINE)


def _tile(parts: Dense, queries: int) -> HopperTile:
    short = queries < SHORT and parts.mask != TRUE
    return tile_for(parts, light=_light(parts), short=short, keys=keys_of_cells(parts.score, parts.mask))


def _by_product(parts: Dense, tile: HopperTile, channels: int, features: int) -> bool:
    """Whether there is room to apply the mask by a product: results leave through the place of the queries then."""
    channels, features = padded(channels), padded(features)
    room = shared_bytes(dataclasses.replace(tile, staged=False), channels, features) + 2 * tile.keys * MOST
    together = tile.staged and tile.buffers == 2 and channels == features and not parts.rounding
    return parts.score == SCORE and together and room <= SHARED_MEMORY


def _light(parts: Dense) -> bool:
    operators = [node for expr in (parts.score, parts.mask) for node in walk(expr) if isinstance(node, Apply)]
    reads = any(loads(expr) for expr in (parts.score, parts.mask))
    return parts.score == SCORE and not reads and len(operators) <= LIGHT


def gluon_functions(text: str) -> list[str]:
    """Functions that expressions call, in Gluon."""
    found = []
    for source in device_functions_of(text):
        name = source.partition("def ")[2].partition("(")[0]
        if name == "tanh":
            found.append(hopper_function(name))
        else:
            found.append(GLUON.call(source).replace("@triton.jit", "@gluon.jit"))
    return found


__all__ = ["GLUON", "HopperModule", "generate", "generate_fastest"]
