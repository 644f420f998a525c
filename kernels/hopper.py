"""Skeleton of the dense forward kernel for Hopper GPUs, in Gluon.

A thread block is one warp that copies tiles into shared memory (TMA) and two or three warpgroups that multiply
them (WGMMA), each for 64 queries of its own. Blocks live as long as the kernel and take their tiles from a list,
the longest first. Three things run at the same time: the exponentials of one key block, the product of the
weights of the block before with its values, and another warpgroup's products; the first product of the next
tile runs under the end of this one.

Follows: Dao 2023 (arXiv:2307.08691); Shah et al. 2024 (arXiv:2407.08608).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from attncompile.kernels.dense import LOG2E, DeviceFunction, KeyRuns, NarrowOperands
from attncompile.kernels.hopper_boxes import Boxes
from attncompile.kernels.hopper_codes import WEIGHT_UNIT, WORDS, CodeText
from attncompile.kernels.hopper_digits import KeyDigits
from attncompile.kernels.hopper_elements import WORDS as ELEMENT_WORDS
from attncompile.kernels.hopper_elements import Elements
from attncompile.kernels.hopper_lines import device_source, filled, hopper_function, listed
from attncompile.kernels.hopper_marks import RECENT, ROOM, MarkBlocks
from attncompile.kernels.hopper_runs import COUNTED, LISTS, known, listed_blocks, visited_blocks
from attncompile.kernels.hopper_text import CONSUMER, FULL, KERNEL, LOGITS, PAIRS, PRODUCER, STEP, STORED
from attncompile.kernels.source import signature

IMPORTS = """\
import functools
import heapq

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.8 renamed these, and 3.9 dropped the old names.
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global"""

RING = ("barrier_text", "signal", "meet", "unpacked", "following", "fill")
"""Functions of :mod:`attncompile.kernels.hopper_device` that every kernel calls."""
WEIGHING = {
    "softmax": ("own_sums", "rescale_text", "rescale_operands", "rescaled"),
    "sigmoid": ("reciprocal",),
    "relu": (),
}
"""By normaliser, functions of :mod:`attncompile.kernels.hopper_device` that make weights."""
WIDE_VALUES = ("pair_text", "paired", "two_weights")
"""Functions of :mod:`attncompile.kernels.hopper_device` for values of 16 bits."""
NARROW_VALUES = ("packed", "four_weights", "kept", "power_exponent", "inverse_power")
"""Functions of :mod:`attncompile.kernels.hopper_device` for values in e4m3."""


MOST_STAGES = 3
"""Each stage has named barriers of its own, and as many lie between the first of the keys' and of the values'."""


@dataclass(frozen=True)
class HopperTile:
    """How the kernel divides its work.

    Attributes:
        groups: warpgroups that compute, 64 queries each.
        keys: keys of a block.
        stages: key and value blocks in shared memory.
        buffers: query tiles in shared memory: with two, the next is there before this one is done.
        turns: whether warpgroups take turns at the matrix unit, so that one's exponentials run under another's
            products.
        registers: of a thread of a computing warpgroup; the copying warp keeps 24.
        limit: registers of a thread when the block starts.
        staged: whether results leave through shared memory and TMA; otherwise each thread stores its own.
        early: whether a step waits for its keys itself, instead of the step before.
        ahead: whether the products of the next key block run under the softmax of this one too, which takes the
            registers of two blocks' scores; only for values of 8 bits.
        loaded: whether queries of 8 bits are multiplied from registers.
        settled: whether a step's exponentials are kept in front of its last wait, where a compiler would rather have
            them behind it: next to nothing runs under them there.
        chains: whether a row's greatest score is found by four chains of comparisons instead of one.
    """

    groups: int
    keys: int
    stages: int
    buffers: int
    turns: bool
    registers: int
    limit: int
    staged: bool
    early: bool = False
    ahead: bool = False
    loaded: bool = False
    settled: bool = False
    chains: bool = False

    @property
    def queries(self) -> int:
        """Queries of a tile."""
        return 64 * self.groups


@dataclass(frozen=True)
class HopperForward:
    """What a Spec decides about the kernel.

    Attributes:
        tile: how the work is divided.
        scale: constant factor of the logits that ``score`` leaves out.
        score: the logit from the raw score, or ``None`` when it is the raw score.
        far_score: what ``score`` is in blocks that are not on an edge, where it is simpler there; ``None`` where not.
        bounded: whether ``score`` is limited from below.
        hides: whether ``score`` may be −∞ where it hides a key, so that a row's peak is what is limited.
        visible: the mask, or ``None`` when all is visible.
        inside: whether keys past the last one are hidden by a comparison of their own.
        sink: logit of a key without a value, over ``b h i``, or ``None``.
        kv_head: source of the KV head over ``h``.
        runs: limits of the key loops.
        lse: whether the log-sum-exp is stored.
        captured: identifier and number of axes of each captured tensor.
        lengths: identifiers of the numbers of heads, queries and keys.
        sizes: identifiers of other sizes.
        channels, features: number of channels of keys and of values.
        clamped: whether tensors are loaded by ``i`` or ``j``.
        marks: what lists the key blocks of each tile beforehand, or ``None`` when ``runs`` has limits for them.
        boxes: how tiles lie in a grid of tokens, or ``None`` where a tile is a run of them.
        digits: the mask as a product that is added to the scores, or ``None`` where it is ``visible``. Results then
            leave through the place of the queries, since the product's operand needs room.
        narrow: operands that are codes with scales, or ``None``.
        elements: those of captured tensors that belong to a key or to a query, loaded before the products.
        normalizer: ``softmax``; or ``sigmoid`` or ``relu``, which make a weight from its score alone, so that there is
            no greatest score to keep, no sum, and nothing to rescale.
    """

    tile: HopperTile
    scale: float
    score: DeviceFunction | None
    far_score: DeviceFunction | None
    bounded: bool
    hides: bool
    visible: DeviceFunction | None
    inside: bool
    sink: DeviceFunction | None
    kv_head: str
    runs: KeyRuns
    lse: bool
    captured: tuple[tuple[str, int], ...]
    lengths: tuple[str, str, str]
    sizes: tuple[str, ...]
    channels: int
    features: int
    clamped: bool
    marks: MarkBlocks | None = None
    boxes: Boxes | None = None
    digits: KeyDigits | None = None
    narrow: NarrowOperands | None = None
    elements: Elements = field(default_factory=Elements)
    normalizer: str = "softmax"

    @property
    def softmax(self) -> bool:
        """Whether the normaliser sums over the keys."""
        return self.normalizer == "softmax"

    @property
    def turned_values(self) -> bool:
        """Whether values are e4m3 codes ``[B,G,E,J]``."""
        return self.narrow is not None and self.narrow.value_block is not None

    @property
    def channel_space(self) -> int:
        """Channels of a query or key tile: a power of two; TMA fills the rest with zeros."""
        return max(32 if self.narrow else 16, 1 << (self.channels - 1).bit_length())

    @property
    def feature_space(self) -> int:
        """Channels of a value tile."""
        return max(16, 1 << (self.features - 1).bit_length())

    def descriptors(self) -> tuple[str, ...]:
        """Arguments that are tensor descriptors, in order."""
        return ("query", "key", "value", *(("out",) if self.tile.staged else ()))

    def pointers(self) -> tuple[str, ...]:
        """Pointer arguments in order, the work list last."""
        scales = self.narrow.scales() if self.narrow else ()
        own = (*(() if self.tile.staged else ("out",)), *(("lse",) if self.lse else ()), *scales)
        lists = ("counts", "places", "order") if self.marks else ()
        return (*own, *(name for name, _ in self.captured), *lists, "work")

    def strides(self) -> tuple[str, ...]:
        """Stride arguments in order."""
        out = () if self.tile.staged else tuple(f"out_stride_{axis}" for axis in "bhi")
        return (*out, *(f"{name}_stride_{axis}" for name, rank in self.captured for axis in range(rank)))

    def integers(self) -> tuple[str, ...]:
        """Size arguments in order."""
        heads = ("key_heads",) if self.narrow else ()
        return tuple(dict.fromkeys((*self.lengths, *self.sizes, *heads)))

    @property
    def work_size(self) -> str:
        """The argument behind the work: how many entries a thread block's row has, or how many tiles there are."""
        return "tile_count" if self.marks else "work_width"

    def read(self) -> tuple[str, ...]:
        """Arguments that expressions may read."""
        captured = [name for name, _ in self.captured]
        return (*captured, *(s for s in self.strides() if not s.startswith("out_stride_")), *self.integers())

    def context(self) -> tuple[str, ...]:
        """Arguments that every function gets: what expressions may read, and the lists of key blocks."""
        return (*(("counts", "places", "order") if self.marks else ()), *self.read())

    def constants(self) -> str:
        """Definitions of the constants that the functions read."""
        unit, base = (1.0, "") if self.normalizer == "relu" else (LOG2E, " · log2(e)")
        tile, scale = self.tile, self.scale * unit
        empty = "-(2.0**99)" if self._codes.in_exponent else f"-(2.0**99) * {scale!r}"
        products = 32 if self.narrow else 16
        weights = 32 if self.turned_values else 16
        rows: tuple[tuple[str, str, str], ...] = (
            ("GROUPS", f"{tile.groups}", "warpgroups that compute, 64 queries each"),
            ("BLOCK_I", f"{tile.queries}", "queries of a tile"),
            ("BLOCK_J", f"{tile.keys}", "keys of a block"),
            ("STAGES", f"{tile.stages}", "key and value blocks in shared memory"),
            ("BUFFERS", f"{tile.buffers}", "query tiles in shared memory"),
            ("CHANNELS", f"{self.channel_space}", f"of query and key: {self.channels}, padded"),
            ("FEATURES", f"{self.feature_space}", f"of value: {self.features}, padded"),
            ("SCALE", f"{scale!r}", f"constant factor of the logits{base}"),
            ("HIDDEN", "-(2.0**100)", "a masked score: a power of two, so that HIDDEN · SCALE is exact"),
            *(
                (
                    ("LOWEST", "-(2.0**98)", "scores lie above it"),
                    ("EMPTY", empty, "the peak of a row that saw no key lies below it"),
                )
                if self.softmax
                else ()
            ),
            ("TURN", "6", "named barriers: a warpgroup may use the matrix unit"),
            ("KEY_FREE", "9", "a stage's keys are done with"),
            ("VALUE_FREE", "12", "a stage's values are done with"),
            *self._codes.blocks(),
        )
        if self.marks:
            rows += (
                ("ROOM", f"{ROOM}", "key blocks that the list of a tile has room for"),
                ("RECENT", f"{RECENT}", "tiles that a thread block remembers"),
            )
        if self.digits:
            rows += (("DIGITS", f"{self.digits.columns}", "values of the digits of a key's place in a block, padded"),)
        lines = [f"{name} = gl.constexpr({value})  # {said}" for name, value, said in rows]
        layout = "gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, {0}, {1}])"
        lines += [
            f"SCORES = gl.constexpr({layout.format(tile.keys, products)})",
            *(["OWN_ROWS = gl.constexpr(gl.DotOperandLayout(0, SCORES.value, 4))"] if self.tile.loaded else []),
            f"OUTPUT = gl.constexpr({layout.format(self.feature_space, weights)})",
            f"WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, OUTPUT.value, {weights // 8}))",
            *(["KEY_LANES = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))"] if self.elements.keys else []),
            *([f"HIDING = gl.constexpr({layout.format(self.digits.columns, 16)})"] if self.digits else []),
        ]
        return "\n".join(lines)

    @property
    def _codes(self) -> CodeText:
        """The lines about scales."""
        return CodeText(
            self.narrow, self.score is not None, self.lengths[2], self.kv_head, self.tile.chains, self.hides
        )

    @property
    def _keys_early(self) -> bool:
        """Whether the keys that a tile visits first, whose elements are read, are known before it begins."""
        return self.marks is not None and bool(self.elements.keys)

    @property
    def _settled(self) -> bool:
        """Whether a step's exponentials are kept in front of its last wait."""
        return self.softmax and (self.tile.settled or self.tile.ahead)

    def _filled(self, template: str, **parts: list[str]) -> str:
        """A template with its markers replaced, in lines that fit; see :mod:`attncompile.kernels.hopper_text`."""
        options = {
            "turns": self.tile.turns,
            "staged": self.tile.staged,
            "two buffers": self.tile.buffers == 2,
            "one buffer": self.tile.buffers == 1,
            "early": self.tile.early,
            "late": not self.tile.early and not self.tile.ahead,
            "ahead": self.tile.ahead,
            "behind": not self.tile.ahead,
            "loaded": self.tile.loaded,
            "placed": not self.tile.loaded,
            "settled": self._settled,
            "narrow": self.narrow is not None,
            "softmax": self.softmax,
            "summed wide values": not self.turned_values and self.softmax,
            "wide": self.narrow is None,
            "narrow values": self.turned_values,
            "narrow values behind": self.turned_values and not self.tile.ahead,
            "wide values": not self.turned_values,
            "listed": self.marks is not None,
            "listed selected": self.marks is not None and self.digits is None and self.narrow is None,
            "wide limits": self.marks is None and self.narrow is None,
            "narrow limits": self.marks is None and self.narrow is not None,
            "narrow listed": self.marks is not None and self.narrow is not None,
            "limits": self.marks is None,
            "digits": self.digits is not None,
            "known early": self.digits is not None or self._keys_early,
            "no digits": self.digits is None,
            "no digits behind": self.digits is None and not self.tile.ahead,
            "staged apart": self.tile.staged and self.digits is None,
        }
        return filled(template, options, self._named, parts)

    def _named(self, line: str) -> str:
        """A line with the markers of arguments replaced."""
        heads, queries, keys = self.lengths
        scales = self.narrow.scales() if self.narrow else ()
        launched = [name for name in self.pointers() if name == "lse" or name in scales]
        if self.digits:
            line = line.replace("out_tiles, ", "digit_tile, ")
        own = ["query_tile"] if self.tile.loaded else ["query_tiles", "query_slot"]
        own += ["digit_tile"] if self.digits else []
        if not self.tile.staged:
            line = line.replace("out_tiles, ", "")
            launched += [name for name in self.strides() if name.startswith("out_stride_")]
        if not self.softmax:
            line = line.replace("new_peak, total, ", "").replace("peak, total, ", "").replace(", peak, total", "")
        ahead = self.tile.ahead
        line = line.replace(" AND_SCORES", ", s" if ahead else "").replace("FURTHER", "2" if ahead else "1")
        line = line.replace(" AHEAD", " ``s`` are its products: this step makes those of the next." if ahead else "")
        starts = ("block_start(number, KNOWN)", "full_start + (number - edges) * BLOCK_J")
        for marker, start in zip(("EDGE_START", "FULL_START"), starts, strict=True):
            line = line.replace(marker, "start" if self.marks else start)
        lists = {
            "CONTEXT": self.context(),
            "KNOWN": known(self.runs, self.marks),
            "COUNTED": COUNTED,
            "TILE": ("row_first", "b", "h", *(COUNTED if self.marks else ())),
            "LAUNCHED": launched,
            "QUERY_OPERAND": own,
            "WORK": ("work", "tile_count") if self.marks else ("work",),
            "BY_ROW": self.elements.of_rows,
            "BY_BOTH": self.elements.names,
            "SCALES": ["query_factor", *(f"{name}s" for name in scales[1:])] if scales else [],
        }
        line = listed(line, lists)
        if self.turned_values:
            line = re.sub(r"VALUE_PLACE\((.*?), (\w+)\)", r"[\1, 0, \2]", line)
            line = line.replace("VALUE_BOX", "1, 1, FEATURES, BLOCK_J")
        line = line.replace("VALUE_PLACE(", "KEY_PLACE(").replace("VALUE_BOX", "KEY_BOX, FEATURES")
        query_box, key_box = "1, 1, 64", "1, 1, BLOCK_J"
        if self.boxes:
            lead = self.boxes.lead()
            query_box, key_box = (
                ", ".join(map(str, (*lead, *box))) for box in (self.boxes.query_box, self.boxes.key_box)
            )
            line = line.replace("QUERY_PLACE(", "query_place(").replace("KEY_PLACE(", "key_place(")
        else:
            line = re.sub(r"(QUERY|KEY)_PLACE\((.*?)\)", r"[\2, 0]", line)
        line = line.replace("QUERY_BOX", query_box).replace("KEY_BOX", key_box)
        for marker, text in (("HEADS", heads), ("QUERIES", queries), ("LENGTH_J", keys)):
            line = line.replace(marker, text)
        carried, operand = r"paired(\1, value_tiles.dtype)", r"two_weights(\1, value_tiles.dtype)"
        if self.turned_values:
            carried, operand = r"packed(\1)", r"four_weights(\1)"
        line = re.sub(r"CARRIED\((\w+)\)", carried, line)
        line = re.sub(r"OPERAND\((\w+)\)", operand, line)
        line = line.replace("PRODUCTS", self._codes.products).replace("OUT_DTYPE", self._out_dtype)
        return line.replace("KV_HEAD", self.kv_head).replace("EXTENT", str(self.features))

    @property
    def _out_dtype(self) -> str:
        """What results are stored as: values of 16 bits have that type too."""
        if self.narrow is None:
            return "value_tiles.dtype"
        return "out_tiles.dtype" if self.tile.staged else "out.dtype.element_ty"

    def _blocks(self) -> str:
        if self.marks:
            return listed_blocks(self.marks, self.context(), self.lengths)
        return visited_blocks(self.runs, self.context(), self.lengths)

    def _logits(self) -> str:
        _, queries, keys = self.lengths
        functions = (self.score, self.far_score, self.visible)
        read = {name for function in functions if function for name in function.parameters}
        positions = []
        if "i" in read:
            limited = f"gl.minimum(rows, {queries} - 1)" if self.clamped else "rows"
            positions.append(f"i = gl.expand_dims({limited}, 1)")
        if "j" in read:
            positions.append("j = start + columns")
            if self.clamped:
                positions += ["if EDGE:", f"    j = gl.minimum(j, {keys} - 1)"]
        score = [signature("s = score", self.score.parameters, "")] if self.score else []
        if self.far_score:
            far = signature("s = far_score", self.far_score.parameters, "", inside=4)
            score = ["if EDGE:", *(f"    {line}" for line in score), "else:", f"    {far}"]
        if self.bounded and self.softmax:
            score.append("s = gl.maximum(s, LOWEST)")
        mask = [signature("shown = visible", self.visible.parameters, "")] if self.visible else []
        if self.inside:
            inside = f"{keys} - near > far"
            mask.append(f"shown = shown & ({inside})" if self.visible else f"shown = {inside}")
        mask.append("s = gl.where(shown, s, HIDDEN)" if mask else "pass")
        return self._filled(LOGITS, positions=positions, score=score, mask=mask)

    def _step(self) -> str:
        columns = self.elements.spread(edge=False)
        return self._filled(
            STEP,
            block_scales=self._codes.block_scales(),
            own_elements=self.elements.load_keys("start", "EDGE", self.read()),
            columns=columns if self.elements.spread_early else [],
            columns_late=[] if self.elements.spread_early else columns,
            scaled=self._codes.scaled(edge=False),
            highest=self._codes.highest("highest", edge=False) if self.softmax else [],
            exponentials=self._weights("new_peak", edge=False),
        )

    def _weights(self, peak: str, *, edge: bool) -> list[str]:
        """The weights of a block from its scores."""
        if self.normalizer == "sigmoid":
            return ["p = reciprocal(1.0 + gl.exp2(s * -SCALE))"]
        if self.normalizer == "relu":
            return ["p = gl.maximum(s * SCALE, 0.0)"]
        return self._codes.exponentials(peak, edge=edge)

    def _consumer(self) -> str:
        unit = repr(WEIGHT_UNIT) if self.turned_values else ""
        if self.sink:
            arguments = ["rows" if name == "i" else name for name in self.sink.parameters]
            if "i" in self.sink.parameters and self.clamped:
                arguments = [f"gl.minimum(rows, {self.lengths[1]} - 1)" if a == "rows" else a for a in arguments]
            sink = [
                "# One key more, whose value is zero.",
                signature("sink_logit = sink", arguments, f" * {LOG2E!r}"),
                "joined_peak = gl.maximum(peak, sink_logit)",
                "kept = gl.exp2(peak - joined_peak)",
                "total = total * kept + gl.exp2(sink_logit - joined_peak)",
                f"factor = gl.where(peak > EMPTY, kept{' * ' + unit if unit else ''} / total, 0.0)",
            ]
        else:
            given = f"{unit or '1.0'} / total"
            sink = ["# A row that saw no key gives zeros.", f"factor = gl.where(peak > EMPTY, {given}, 0.0)"]
        peak = "joined_peak" if self.sink else "peak"
        lse = [
            f"row_lse = ({peak} + gl.log2(total)) * {1 / LOG2E!r}",
            f'row_lse = gl.where({peak} > EMPTY, row_lse, float("-inf"))',
            "lse_row = (b * HEADS + h).to(gl.int64) * QUERIES",
            "gl.store(lse + lse_row + rows, row_lse, mask=rows < QUERIES)",
        ]
        stored = [] if self.tile.staged else STORED.strip("\n").splitlines()
        full = self._filled(PAIRS if self.tile.ahead else FULL) if self.runs.full or self.marks else ""
        elements, context, early = self.elements, self.read(), self._keys_early
        first_key = f"first_block({', '.join(COUNTED)})"
        own = elements.load_keys("block_start(0, KNOWN)", "True", context)
        return self._filled(
            CONSUMER,
            sink=sink if self.softmax else [],
            lse=[self._named(line) for line in lse] if self.lse else [],
            full=full.splitlines(),
            first_elements=[
                *elements.load_rows("tile", context),
                *(elements.load_keys(first_key, "True", context) if early else []),
            ],
            own_elements=[] if early else [self._named(line) for line in own],
            columns=elements.spread(edge=True),
            next_elements=[
                *elements.load_rows("next_tile", context),
                *(elements.load_keys(first_key, "True", context, b="next_b", h="next_h") if early else []),
            ],
            tile_scales=self._codes.tile_scales(),
            first_highest=self._codes.highest("peak", edge=True) if self.softmax else [],
            first_exponentials=self._weights("peak", edge=True),
            stored=[self._named(line) for line in stored],
        )

    def _kernel(self) -> str:
        tile = self.tile
        own = "query_tiles, key_tiles, value_tiles"
        barriers = "query_ready, query_free, key_ready, value_ready"
        unspecialized = [self.work_size, *self.integers(), *(s for s in self.strides() if s.startswith("out_"))]
        template = (
            KERNEL.replace("UNSPECIALIZED", ", ".join(f'"{name}"' for name in unspecialized))
            .replace("DESCRIPTORS", ", ".join(self.descriptors()))
            .replace("POINTERS", ", ".join(self.pointers()))
            .replace("STRIDES, ", "".join(f"{name}, " for name in self.strides()))
            .replace("WORK_SIZE", self.work_size)
            .replace("SIZES", ", ".join(self.integers()))
            .replace("WARPS", str([4] * (tile.groups - 1) + [1]))
            .replace("REGISTERS", str([tile.registers] * (tile.groups - 1) + [24]))
        )
        consumers = [
            self._named(f"(consumer, ({own}, out_tiles, out, {barriers}, LAUNCHED, WORK, CONTEXT, {group})),")
            for group in range(tile.groups)
        ]
        producer = [self._named(f"(producer, (query, key, value, {own}, {barriers}, WORK, CONTEXT)),")]
        return self._filled(template, consumers=consumers, producer=producer)

    def source(self) -> str:
        """The functions and the kernel as text."""
        functions = (*self.elements.functions(), self.score, self.far_score, self.visible, self.sink)
        spec = [function.source() for function in functions if function]
        return "\n\n\n".join(
            [
                *(hopper_function(name) for name in (*RING, *WEIGHING[self.normalizer])),
                *([hopper_function("query_factors")] if self.narrow else []),
                *(hopper_function(name) for name in (NARROW_VALUES if self.turned_values else WIDE_VALUES)),
                *([hopper_function("settled")] if self._settled else []),
                *([hopper_function("in_columns")] if self.elements.keys else []),
                *([hopper_function("highest_of")] if self.tile.chains and self.softmax else []),
                *(text.replace("@triton.jit", "@gluon.jit", 1) for text in spec),
                *self.elements.source(self.read(), self.lengths),
                *([self.marks.source(self.read(), self.lengths)] if self.marks else []),
                *([self.boxes.source()] if self.boxes else []),
                *([self.digits.source(self.context())] if self.digits else []),
                self._blocks(),
                self._logits(),
                self._step(),
                self._consumer(),
                self._filled(PRODUCER),
                self._kernel(),
            ]
        )


TEMPLATES = (LOGITS, STEP, CONSUMER, FULL, PAIRS, STORED, PRODUCER, KERNEL)

_TEXTS = (IMPORTS, device_source(), *TEMPLATES, WORDS, ELEMENT_WORDS, *LISTS)
RESERVED = frozenset(re.findall(r"[a-z_]\w*|[A-Z]+_?\w*", "\n".join(_TEXTS)))
"""Identifiers that the skeleton uses itself."""
