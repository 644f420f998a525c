"""Skeleton of the backward kernel for Hopper GPUs, in Gluon.

A thread block holds a tile of keys and values in shared memory, 64 of them for each of two warpgroups, and goes over
the blocks of queries that see any of them, for each head that reads them; one more warp copies these in (TMA). With a
row of each product a key, a column a query, and ``weights`` computed again from the log-sum-exp,

- ``products = value · grad_outᵀ`` and ``differences = weights · slope · (products − delta)``,
- ``grad_value += weights · grad_out`` and ``grad_key += differences · query``, whose sums stay in registers, as do the
  left factors,
- ``grad_query += differencesᵀ · key``, for which the warpgroups share their differences in shared memory: each computes
  a part of it and adds that to sums in float32, by atomic additions of four neighbours.

A kernel that goes before computes ``delta = Σ_e out·grad_out``, one that comes after stores the queries' gradients.

Follows: Dao 2023 (arXiv:2307.08691), algorithm 2; Shah et al. 2024 (arXiv:2407.08608).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from attncompile.kernels.dense import LOG2E, DeviceFunction
from attncompile.kernels.hopper_backward_text import (
    AFTER,
    BEFORE,
    CONSUMER,
    KERNEL,
    LOOP,
    NEXT,
    PART,
    PRODUCER,
    PRODUCTS,
    REST,
    STEP,
    WEIGHTS,
)
from attncompile.kernels.hopper_lines import device_source, filled, hopper_function, listed, tidy
from attncompile.kernels.hopper_runs import known, visited_blocks
from attncompile.kernels.loops import KeyRuns
from attncompile.kernels.source import signature

RING = ("barrier_text", "signal", "meet", "unpacked", "following", "fill", "add_text", "add_operands", "add_to")
"""Functions of :mod:`attncompile.kernels.hopper_device` that the kernel calls."""

_EXCHANGED = {"key": "query", "keys": "queries", "row_first": "key_first", "row_last": "key_last"}
_EXCHANGED |= {"BLOCK_I": "BLOCK_J", "key_blocks": "query_blocks", "key_count": "query_count"}
_EXCHANGED |= {after: before for before, after in _EXCHANGED.items()}


def exchanged(text: str) -> str:
    """Source about the keys that a tile of queries visits, for the queries that a tile of keys visits."""
    return re.sub(r"\w+", lambda found: _EXCHANGED.get(found[0], found[0]), text)


GROUPS, KEYS = 2, 128
"""Warpgroups that compute, keys of a tile."""
REGISTERS, LIMIT = 240, 168
"""Registers of a thread of a computing warpgroup (the copying warp keeps 24), and of any when the block starts."""


@dataclass(frozen=True)
class BackwardTile:
    """How the kernel divides its work.

    Attributes:
        queries: queries of a block.
        channels: of query, key, value, padded.
        stages: query blocks in shared memory, two at most: there are named barriers for so many.
        order: what a warpgroup does before it waits for the other's differences: see ``REST`` in the text.
    """

    queries: int
    channels: int
    stages: int
    order: str

    @property
    def parts(self) -> int:
        """Products of 64 queries that a block is made of."""
        return self.queries // 64

    @property
    def by_channels(self) -> bool:
        """Whether a warpgroup computes the queries' gradients for some of the channels, or for some of the queries."""
        return self.channels == 64 * GROUPS


@dataclass(frozen=True)
class HopperBackward:
    """What a Spec decides about the kernel.

    Attributes:
        tile: how the work is divided.
        scale: constant factor of the logits that ``score`` leaves out.
        score: the logit from the raw score, or ``None`` when it is the raw score.
        slope: derivative of ``score`` by the raw score, or ``None`` where it is constant.
        gain: constant factor of the gradient of the raw score.
        visible: the mask, or ``None`` when all is visible.
        inside: whether keys past the last one are hidden by a comparison of their own.
        heads: first, last and distance of the heads that read KV head ``g``: sources of a range.
        runs: limits of the loops over queries, as of a kernel with queries and keys exchanged.
        lengths: identifiers of the numbers of heads, queries and keys.
        sizes: identifiers of other sizes.
        channels, features: number of channels of keys and of values.
        lse_gradient: whether the log-sum-exp has a gradient.
    """

    tile: BackwardTile
    scale: float
    score: DeviceFunction | None
    slope: DeviceFunction | None
    gain: float
    visible: DeviceFunction | None
    inside: bool
    heads: tuple[str, str, str]
    runs: KeyRuns
    lengths: tuple[str, str, str]
    sizes: tuple[str, ...]
    channels: int
    features: int
    lse_gradient: bool

    def descriptors(self) -> tuple[str, ...]:
        """Arguments that are tensor descriptors, in order."""
        return ("query", "key", "value", "grad_out", "row_values", "grad_key", "grad_value")

    def integers(self) -> tuple[str, ...]:
        """Size arguments in order: what expressions may read."""
        return tuple(dict.fromkeys((*self.lengths, *self.sizes)))

    def constants(self) -> str:
        """Definitions of the constants that the functions read."""
        rows = (
            ("GROUPS", f"{GROUPS}", "warpgroups that compute, 64 keys each"),
            ("BLOCK_I", f"{self.tile.queries}", "queries of a block"),
            ("BLOCK_J", f"{KEYS}", "keys of a tile"),
            ("STAGES", f"{self.tile.stages}", "query blocks in shared memory"),
            ("CHANNELS", f"{self.tile.channels}", f"of query {self.channels}, of value {self.features}, padded"),
            ("SCALE", f"{self.scale * LOG2E!r}", "constant factor of the logits · log2(e)"),
            ("GAIN", f"{self.gain!r}", "constant factor of the gradients of query and key"),
            ("LOG2E", f"{LOG2E!r}", "log2(e)"),
            ("QUERY_FREE", "6", "named barriers: a stage's queries are done with"),
            ("GRAD_FREE", "8", "a stage's gradients are done with"),
            ("SHARED", "10", "a warpgroup's differences are in shared memory; in turn, as one may be a step ahead"),
            ("DONE", "14", "no warpgroup reads the keys any more"),
            ("KEY_FREE", "15", "keys and values are done with"),
        )
        lines = [f"{name} = gl.constexpr({value})  # {said}" for name, value, said in rows]
        layout = "gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, {0}, 16])"
        columns = 64 if self.tile.by_channels else self.tile.channels
        return "\n".join(
            [
                *lines,
                f"SCORES = gl.constexpr({layout.format(64)})",
                f"GRADIENT = gl.constexpr({layout.format(self.tile.channels)})",
                f"QUERY_GRADIENT = gl.constexpr({layout.format(columns)})",
                "WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, GRADIENT.value, 2))",
                "DIFFERENCES = gl.constexpr(gl.NVMMASharedLayout.get_default_for([64, 64], gl.float16))",
            ]
        )

    def _filled(self, template: str, **parts: list[str]) -> str:
        return filled(template, {"lse": self.lse_gradient}, self._named, parts)

    def _lines(self, text: str) -> list[str]:
        return [self._named(line) for line in text.strip("\n").splitlines()]

    def _named(self, line: str) -> str:
        """A line with the markers of arguments replaced."""
        heads, queries, keys = self.lengths
        line = listed(line, {"CONTEXT": self.integers(), "KNOWN": known(self.runs, None)})
        right = "key_tiles.index(part + again).reshape([64, CHANNELS])"
        left, shape = f"difference_tiles.index({self._differences('part', 'GROUP')}).permute((1, 0))", "[64, CHANNELS]"
        if self.tile.by_channels:
            left = f"{right}.slice(64 * GROUP, 64, 1).permute((1, 0))"
            right, shape = f"difference_tiles.index({self._differences('part', '0')})", "[64, 64]"
        last = self.tile.parts - 1
        for marker, text in (
            ("QUERY_LEFT", left),
            ("QUERY_RIGHT", right),
            ("QUERY_SUM", shape),
            ("LAST_DIFFERENCES", f"differences_{last}"),
            ("LAST_LEFT", f"left_{last}"),
            ("LAST_QUERIES", self._rows("query_tile", last)),
            ("NEXT_PART", self._rows("query_tiles.index(next_stage).reshape([BLOCK_I, CHANNELS])", 0)),
            ("FIRST_PART", self._rows("query_tiles.index(stage).reshape([BLOCK_I, CHANNELS])", 0)),
            ("DIFFERENCE_TILES", f"2 * GROUPS * {self.tile.parts}"),
            ("ROWS", f"{2 * self.tile.parts}"),
            ("PERMUTED", "(1, 4, 6, 0, 2, 5, 3)" if self.tile.by_channels else "(0, 2, 5, 3, 1, 4, 6)"),
            ("COLUMNS", "BLOCK_I" if self.tile.by_channels else "CHANNELS"),
            ("ROW_BLOCKS", f"gl.cdiv({queries}, BLOCK_I)"),
            ("FIRST_HEAD", self.heads[0]),
            ("LAST_HEAD", self.heads[1]),
            ("NEXT_HEAD", self.heads[2]),
            ("HEADS", heads),
            ("LENGTH_J", keys),
            ("GIVEN", "out, grad_out, lse, grad_lse" if self.lse_gradient else "out, grad_out, lse"),
            ("OUT_STRIDES", ", ".join(f"{name}_stride_{axis}" for name in ("out", "grad_out") for axis in "bhie")),
        ):
            line = re.sub(rf"\b{marker}\b", text.replace("\\", r"\\"), line)
        return line

    def _weights(self) -> str:
        keys = self.lengths[2]
        read = {n for function in (self.score, self.slope, self.visible) if function for n in function.parameters}
        positions = []
        if "j" in read:
            positions.append("j = gl.expand_dims(keys, 1)")
        if "i" in read:
            positions.append("i = start + columns")
        slope = [signature("slope = score_slope", self.slope.parameters, "")] if self.slope else []
        score = [signature("s = score", self.score.parameters, "")] if self.score else []
        mask = [signature("shown = visible", self.visible.parameters, "")] if self.visible else []
        if self.inside:
            inside = f"gl.expand_dims(keys < {keys}, 1)"
            mask.append(f"shown = shown & {inside}" if self.visible else f"shown = {inside}")
        mask.append("weights = gl.where(shown, weights, 0.0)" if mask else "pass")
        text = self._filled(WEIGHTS, positions=positions, slope=slope, score=score, mask=mask)
        return text.replace("RISING", "(weights * slope).to(DTYPE)" if self.slope else "weights.to(DTYPE)")

    def _step(self) -> str:
        tile = self.tile
        parts: list[str] = []
        for number in range(tile.parts):
            parts += self._part(number)
        rest = {"next": self._lines(NEXT), "products": self._lines(PRODUCTS)}
        return self._filled(STEP, parts=parts, rest=self._filled(REST[tile.order], **rest).splitlines())

    def _part(self, number: int) -> list[str]:
        """A step's lines for 64 queries."""
        last = number == self.tile.parts - 1
        following, after = [], []
        waited = ["products", "value_sum"]
        if not last:
            text = NEXT.split("pred=more)\n")[1].replace("NEXT_PART", self._rows("query_tile", number + 1))
            following = self._lines(text)
            after = [
                f"key_sum = warpgroup_mma("
                f"differences_{number}, {self._rows('query_tile', number)}, key_sum, is_async=True)",
                f"s, value_sum, key_sum, left_{number} = warpgroup_mma_wait("
                f"2, deps=[next_products, value_sum, key_sum, left_{number}])",
            ]
            waited.append("next_products")
        elif number:
            waited += ["key_sum", f"left_{number - 1}", f"differences_{number - 1}"]
        names = ", ".join(waited)
        wait = [f"{names} = warpgroup_mma_wait({1 if last else 2}, deps=[{names}])"]
        text = self._filled(PART, next_part=following, after=after, wait=wait)
        for marker, value in (
            ("GRAD_PART", self._rows("grad_tile", number)),
            ("ROW + 1", f"stage * {2 * self.tile.parts} + {2 * number + 1}"),
            ("ROW", f"stage * {2 * self.tile.parts} + {2 * number}"),
            ("start + BEGIN", f"start + {64 * number}" if number else "start"),
            ("PLACE", self._differences("GROUP", str(number))),
            ("_NUMBER", f"_{number}"),
        ):
            text = text.replace(marker, value)
        return text.splitlines()

    def _rows(self, tile: str, number: int) -> str:
        """Source of 64 queries of a block."""
        return tile if self.tile.parts == 1 else f"{tile}.slice({64 * number}, 64, 0)"

    def _differences(self, group: str, part: str) -> str:
        """Source of the place of a warpgroup's differences for 64 queries."""
        if self.tile.parts == 1:
            return f"buffer * GROUPS + {group}"
        return f"(buffer * GROUPS + {group}) * {self.tile.parts} + {part}"

    def _consumer(self) -> str:
        hidden = f"key_first + BLOCK_J > {self.lengths[2]}" if self.inside else "key_first < 0"
        edges = "0" if self.visible is None else "gl.minimum(gl.maximum(edges, 1), blocks)"
        masked = [f"masked = gl.where({hidden}, blocks, {edges})" if self.inside else f"masked = {edges}"]
        if self.inside:
            masked.insert(0, "# Keys past the last one are hidden in every block.")
        loops = self._loop("0", "masked", "True")
        if self.runs.full:
            loops += self._loop("masked", "blocks", "False")
        else:
            masked = ["masked = blocks"]
        return self._filled(CONSUMER, masked=masked, loops=loops)

    def _loop(self, first: str, last: str, masked: str) -> list[str]:
        """Lines that go over some of the query blocks of a head, with the mask or without."""
        text = LOOP.replace("FIRST_NUMBER", first).replace("LAST_NUMBER", last).replace("MASKED", masked)
        return self._lines(text)

    def _kernel(self) -> str:
        own = "query_tiles, grad_tiles, row_tiles, key_tiles, value_tiles"
        barriers = "query_ready, grad_ready, key_ready"
        template = (
            KERNEL.replace("UNSPECIALIZED", ", ".join(f'"{name}"' for name in ("work_width", *self.integers())))
            .replace("DESCRIPTORS", ", ".join(self.descriptors()))
            .replace("SIZES", ", ".join(self.integers()))
            .replace("WARPS", str([4] * (GROUPS - 1) + [1]))
            .replace("REGISTERS", str([REGISTERS] * (GROUPS - 1) + [24]))
        )
        consumers = [
            self._named(
                f"(consumer, (grad_key, grad_value, {own}, difference_tiles, {barriers}, query_sums, work, CONTEXT, "
                f"{group})),"
            )
            for group in range(GROUPS)
        ]
        producer = [
            self._named(f"(producer, (query, key, value, grad_out, row_values, {own}, {barriers}, work, CONTEXT)),")
        ]
        return self._filled(template, consumers=consumers, producer=producer)

    def source(self) -> str:
        """The functions and the kernels as text."""
        _, queries, keys = self.lengths
        expressions = [function.source() for function in (self.score, self.slope, self.visible) if function]
        blocks = exchanged(visited_blocks(self.runs, self.integers(), (self.lengths[0], keys, queries)))
        return "\n\n\n".join(
            [
                *(hopper_function(name).replace("BLOCK_I", "BLOCK_J") for name in RING),
                *(text.replace("@triton.jit", "@gluon.jit", 1) for text in expressions),
                blocks,
                self._weights(),
                self._step(),
                self._consumer(),
                self._filled(PRODUCER),
                self._kernel(),
                tidy(self._filled(BEFORE).splitlines()),
                tidy(self._filled(AFTER).splitlines()),
            ]
        )


RESERVED = frozenset(
    re.findall(
        r"[a-z_]\w*|[A-Z]+_?\w*",
        "\n".join((device_source(), WEIGHTS, STEP, CONSUMER, LOOP, PRODUCER, KERNEL, BEFORE, AFTER)),
    )
)
"""Identifiers that the skeleton uses itself."""
