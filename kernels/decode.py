"""Skeleton of the decode kernel: few queries, long caches.

All query positions of all query heads that share a KV head are the rows of one tile, so that every key is read once.
The visible keys of a batch row are cut into ``splits`` equal parts; one program computes one part of one tile and
writes its unnormalised sum with the peak and the total of its softmax, and a second kernel joins the parts of a row in
a fixed order: results do not depend on timing.

Keys and values may lie behind index tables, and in narrow types. A scale that differs by channel or by token factors
out of the products, so the codes themselves are multiplied, in float16, where each of them is exact; a scale that
differs by both is applied to the tile.

Follows: Flash-Decoding (Dao et al. 2023); Milakov and Gimelshein 2018 (arXiv:1805.02867).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from attncompile.kernels.dense import LOG2E, DeviceFunction, KeyRuns, limited
from attncompile.kernels.source import indented, signature
from attncompile.kernels.stored import Stored


@dataclass(frozen=True)
class Decode:
    """What a Spec decides about the kernel.

    Attributes:
        scale: constant factor of the logits that ``score`` leaves out.
        score, visible, edit, sink: as in :class:`attncompile.kernels.dense.DenseForward`.
        unlimited: whether ``score`` may be lower than a score can be, where that hides a key.
        group: query heads that share a KV head.
        contiguous: whether they follow each other; otherwise they are ``key_heads`` apart.
        key, value: how they are stored.
        runs: limits of the keys; ``full`` is not used.
        lse: whether the log-sum-exp is stored.
        captured: identifier and number of axes of each captured tensor.
        lengths: identifiers of the numbers of heads, queries and keys.
        sizes: identifiers of other sizes.
        lines: statements that the rows of keys and values rely on.
        turned: whether the products have their rows along the second axis, and keys and channels along the first.
            Matrix units take at least 16 of the first and 8 of the second, so that few rows waste less.
    """

    scale: float
    score: DeviceFunction | None
    visible: DeviceFunction | None
    edit: DeviceFunction | None
    sink: DeviceFunction | None
    unlimited: bool
    group: int
    contiguous: bool
    key: Stored
    value: Stored
    runs: KeyRuns
    lse: bool
    captured: tuple[tuple[str, int], ...]
    lengths: tuple[str, str, str]
    sizes: tuple[str, ...]
    lines: tuple[str, ...] = ()
    turned: bool = False

    @property
    def _row(self) -> str:
        """Index that spreads a value of each row over a tile."""
        return "[None, :]" if self.turned else "[:, None]"

    @property
    def _other(self) -> str:
        """Index that spreads a value of each key or channel over a tile."""
        return "[:, None]" if self.turned else "[None, :]"

    @property
    def _axis(self) -> int:
        """Axis of a tile along which its keys or channels lie."""
        return 0 if self.turned else 1

    @property
    def least_rows(self) -> int:
        """Rows of a tile at least."""
        return 8 if self.turned else 16

    def _shape(self, other: str) -> str:
        """Shape of a tile of all rows and so many keys or channels."""
        return f"[{other}, BLOCK_I]" if self.turned else f"[BLOCK_I, {other}]"

    def _dot(self, row_tile: str, tile: str, more: str = "") -> str:
        """The product of a tile that has the rows with one of keys or values."""
        first, second = (tile, row_tile) if self.turned else (row_tile, tile)
        return f'tl.dot({first}, {second}{more}, input_precision="ieee")'

    def pointers(self) -> tuple[str, ...]:
        """Pointer arguments of the first kernel in order."""
        return ("query", "key", "value", "partial", "peaks", "totals", *(name for name, _ in self.captured))

    def strides(self) -> tuple[str, ...]:
        """Stride arguments of the first kernel in order."""
        captured = [f"{name}_stride_{axis}" for name, rank in self.captured for axis in range(rank)]
        return (*(f"query_stride_{a}" for a in "bhid"), *self.key.strides(), *self.value.strides(), *captured)

    def integers(self) -> tuple[str, ...]:
        """Size arguments of the first kernel in order."""
        return tuple(dict.fromkeys((*self.lengths, *self.sizes, "key_heads", "splits")))

    def constants(self) -> tuple[str, ...]:
        """Compile-time arguments of the first kernel in order; ``CAPABILITY`` is 0 on other GPUs than NVIDIA's."""
        codes = any(each.form != "real" for each in (self.key, self.value))
        return ("BLOCK_I", "BLOCK_J", *(["CAPABILITY"] if codes else []))

    def sink_captured(self) -> tuple[tuple[str, int], ...]:
        """Captured tensors that the sink reads."""
        read = self.sink.parameters if self.sink else ()
        return tuple(each for each in self.captured if each[0] in read)

    def merge_pointers(self) -> tuple[str, ...]:
        """Pointer arguments of the second kernel in order."""
        lse = ("lse",) if self.lse else ()
        return ("partial", "peaks", "totals", "out", *lse, *(name for name, _ in self.sink_captured()))

    def merge_strides(self) -> tuple[str, ...]:
        """Stride arguments of the second kernel in order."""
        captured = [f"{name}_stride_{axis}" for name, rank in self.sink_captured() for axis in range(rank)]
        return (*(f"out_stride_{axis}" for axis in "bhie"), *captured)

    def merge_integers(self) -> tuple[str, ...]:
        """Size arguments of the second kernel in order."""
        read = self.sink.parameters if self.sink else ()
        return tuple(dict.fromkeys((*self.lengths[:2], *(s for s in self.sizes if s in read), "splits")))

    def functions(self) -> tuple[DeviceFunction, ...]:
        """The functions that belong to the storage alone."""
        terms = (self.key.scale, self.key.shift, self.value.scale, self.value.shift)
        return tuple(term.function for term in terms if term)

    def source(self) -> str:
        """The storage's functions and both kernels as text."""
        own = [function.source() for function in self.functions()]
        return "\n\n\n".join([*own, self._kernel(), self._merge()])

    def _kernel(self) -> str:
        parameters = [
            *self.pointers(),
            *self.strides(),
            *self.integers(),
            *(f"{name}: tl.constexpr" for name in self.constants()),
        ]
        blocks = [self._setup(), self._query(), self._limits(), self._loop(), self._store()]
        return "\n".join(
            [
                "@triton.jit",
                signature("def attend_split", parameters, ":"),
                '    """One program: one part of the visible keys for the queries that share a KV head."""',
                "\n\n".join(indented(block, 4) for block in blocks),
            ]
        )

    def _setup(self) -> list[str]:
        _, queries, _ = self.lengths
        head = f"g * {self.group} + row // {queries}" if self.contiguous else f"row // {queries} * key_heads + g"
        narrow = any(each.form != "real" and each.factored for each in (self.key, self.value))
        return [
            *(
                [
                    "# Codes are exact in float16, and queries and weights are divided by what might not fit.",
                    "PRODUCT: tl.constexpr = tl.float32 if query.dtype.element_ty == tl.float32 else tl.float16",
                    *(
                        [
                            "# In float16 the products are of codes that are made positive, in units of so much.",
                            "RAISED: tl.constexpr = 1.0 if PRODUCT == tl.float16 else 0.0",
                            "UNIT: tl.constexpr = 16777216.0 if CAPABILITY > 0 and PRODUCT == tl.float16 else 1.0",
                        ]
                        if any(each.excess and each.factored for each in (self.key, self.value))
                        else []
                    ),
                ]
                if narrow
                else []
            ),
            "program = tl.program_id(0)",
            "split = program % splits",
            f"blocks = tl.cdiv({self.group} * {queries}, BLOCK_I)",
            "block = program // splits % blocks",
            "g = program // splits // blocks % key_heads",
            "b = program // splits // blocks // key_heads",
            "rows = block * BLOCK_I + tl.arange(0, BLOCK_I)",
            f"row = tl.minimum(rows, {self.group} * {queries} - 1)",
            "# The first and the last query of the tile; all of them where it holds rows of several heads.",
            "row_first = block * BLOCK_I",
            f"row_last = tl.minimum(row_first + BLOCK_I, {self.group} * {queries}) - 1",
            f"several = row_first // {queries} != row_last // {queries}",
            f"row_first = tl.where(several, 0, row_first % {queries})",
            f"row_last = tl.where(several, {queries} - 1, row_last % {queries})",
            f"i = (row % {queries}){self._row}",
            f"h = ({head}){self._row}",
            "lanes = tl.arange(0, BLOCK_J)",
            *(["far_lanes = lanes.to(tl.int64)"] if self.key.even or self.value.even else []),
            f"channels = tl.arange(0, {self.key.padded})",
            f"features = tl.arange(0, {self.value.padded})",
        ]

    def _query(self) -> list[str]:
        key = self.key
        _, queries, _ = self.lengths
        asked = f"(rows < {self.group} * {queries}){self._row}"
        if key.padded != key.width:
            asked += f" & (channels < {key.width}){self._other}"
        lines = [
            "query_rows = tl.cast(b, tl.int64) * query_stride_b + tl.cast(h, tl.int64) * query_stride_h",
            "query_rows += tl.cast(i, tl.int64) * query_stride_i",
        ]
        for number, part in enumerate(key.parts):
            lines += [
                f"query_offsets = query_rows + {key.place(number)}{self._other} * query_stride_d",
                f"query_tile{part} = tl.load(query + query_offsets, mask={asked}, other=0.0)",
            ]
        if key.form != "real" and key.factored:
            lines += self._query_for_codes()
        tiles = "".join(
            f"accumulator{part} = tl.zeros({self._shape(str(self.value.padded))}, tl.float32)\n"
            for part in self.value.parts
        )
        if self.value.factored and self.value.excess:
            padded = self.value.padded
            shape = f"[{padded}, BLOCK_J]" if self.turned else f"[BLOCK_J, {padded}]"
            lines.append(f"excess = tl.full({shape}, {-self.value.excess!r} * RAISED / UNIT, PRODUCT)")
        return [
            *lines,
            *tiles.splitlines(),
            'peak = tl.full([BLOCK_I], float("-inf"), tl.float32)',
            "total = tl.zeros([BLOCK_I], tl.float32)",
        ]

    def _query_for_codes(self) -> list[str]:
        """Channel scales and shifts of the keys move to the query; its rows are divided by a power of two.

        What makes logits of the products are two numbers of each row: a factor, and what is subtracted then.
        """
        key, lines = self.key, []
        tiles = [f"query_tile{part}" for part in key.parts]
        lines += [f"{tile} = {tile}.to(tl.float32)" for tile in tiles]
        if key.shift:
            for number, tile in enumerate(tiles):
                lines += key.shift.read("by_channel", "0", f"{key.lane(number)}{self._other}")
                lines.append(f"query_shift {'+=' if number else '='} tl.sum({tile} * by_channel, {self._axis})")
        if key.scale and key.scale.reads == "channel":
            for number, tile in enumerate(tiles):
                lines += key.scale.read("by_channel", "0", f"{key.lane(number)}{self._other}")
                lines.append(f"{tile} = {tile} * by_channel")
        lines.append(f"query_peak = tl.max(tl.abs({tiles[0]}), {self._axis})")
        lines += [f"query_peak = tl.maximum(query_peak, tl.max(tl.abs({tile}), {self._axis}))" for tile in tiles[1:]]
        lines.append("query_peak = power_above(query_peak)")
        largest = max(key.multiple(number) for number in range(len(tiles)))
        for number, tile in enumerate(tiles):
            more = largest // key.multiple(number)
            times = f" * {float(more)!r}" if more > 1 else ""
            lines.append(f"{tile} = ({tile} / query_peak{self._row}{times}).to(PRODUCT)")
            if key.excess:
                summed = f"{key.excess / more!r} * RAISED * tl.sum({tile}.to(tl.float32), {self._axis})"
                lines.append(f"query_excess {'+=' if number else '='} {summed}")
        if key.excess:
            unit = f"(UNIT / {largest})" if largest > 1 else "UNIT"
            lines += ["query_excess *= query_peak", f"query_peak *= {unit}"]
        return [*lines, *(f"{name} *= {self.factor!r}" for name in self._query_terms() if self.factor != 1.0)]

    def _query_terms(self) -> list[str]:
        """The numbers of each row that make logits of products with codes."""
        key = self.key
        return ["query_peak", *(["query_excess"] if key.excess else []), *(["query_shift"] if key.shift else [])]

    @property
    def factor(self) -> float:
        """What the products with codes are multiplied by for logits in base 2; 1 where a score is yet to be taken."""
        return 1.0 if self.score else self.scale * LOG2E

    def _limits(self) -> list[str]:
        runs = self.runs

        def whole(text: str) -> str:
            """Limits that are read from tensors may have 64 bits."""
            return f"tl.cast({text}, tl.int32)" if runs.lines and not text.isidentifier() and text != "0" else text

        start, stop = map(whole, runs.main)
        lines = [
            "# The visible keys, cut into parts of as many tiles.",
            *runs.lines,
            f"main_start = {start}",
            f"main_stop = {stop}" if start == "0" else f"main_stop = tl.maximum({stop}, main_start)",
        ]
        count = "tl.cdiv(tl.maximum(main_stop - main_start, 0), BLOCK_J)"
        if runs.first:
            lines += [
                "# A range before it, as far as it does not reach into it.",
                f"first_start = {whole(runs.first[0])}",
                f"first_stop = tl.minimum({whole(runs.first[1])}, main_start)",
                "first_count = tl.cdiv(tl.maximum(first_stop - first_start, 0), BLOCK_J)",
            ]
            count = f"first_count + {count}"
        return [*lines, f"count = {count}", "share = tl.cdiv(count, splits)"]

    def _loop(self) -> list[str]:
        keys = self.lengths[2]
        step = []
        if self.runs.first:
            step += [
                "start = first_start + number * BLOCK_J",
                "stop = first_stop",
                "if number >= first_count:",
                "    start = main_start + (number - first_count) * BLOCK_J",
                "    stop = main_stop",
            ]
        else:
            step += ["start = main_start + number * BLOCK_J", "stop = main_stop"]
        body = [
            "keys = start + lanes",
            "inside = keys < stop",
            f"keys = tl.minimum(keys, {keys} - 1)",
            f"j = keys{self._other}",
            *dict.fromkeys(self.lines),
            *self.key.load(across=not self.turned),
            *self._scores(),
            *self.value.load(across=self.turned),
            *self._weights(),
        ]
        if self.runs.test:
            limits = "key_first, key_last = start, start + BLOCK_J - 1"
            step += [limits, *self.runs.test_lines, f"if {self.runs.test}:"]
            body = _deeper(body)
        return [
            "for number in range(split * share, tl.minimum(split * share + share, count)):",
            *_deeper([*step, *body]),
        ]

    def _scores(self) -> list[str]:
        key = self.key
        lines: list[str] = []
        for number, part in enumerate(key.parts):
            more = ", s" if lines else ""
            lines += key.numbers(number, across=not self.turned)
            lines.append(f"s = {self._dot(f'query_tile{part}', f'key_tile{part}', more)}")
        if key.form != "real" and key.factored:
            scale = ""
            if key.scale and key.scale.reads == "token":
                lines += key.scale.read("by_key", "j", "0")
                scale = " * by_key"
            shift = f" + query_shift{self._row}" if key.shift else ""
            product = f"s * query_peak{self._row}" + (f" - query_excess{self._row}" if key.excess else "")
            product = f"({product})" if scale and key.excess else product
            lines.append(f"s = {product}{scale}{shift}")
        if self.score:
            lines += signature("logits = score", self.score.parameters, "", inside=8).splitlines()
            if self.unlimited:
                lines.append(f"logits = {limited('logits', self.scale)}")
        shown = f"inside{self._other}"
        if self.visible:
            lines += signature("shown = visible", self.visible.parameters, "", inside=8).splitlines()
            shown += " & shown"
        logits = "logits" if self.score else "s"
        return [*lines, f'logits = tl.where({shown}, {logits}, float("-inf"))']

    def _weights(self) -> list[str]:
        value = self.value
        by_token = value.factored and value.scale is not None and value.scale.reads == "token"
        lines = []
        if by_token and value.scale:
            lines += value.scale.read("by_key", "j", "0")
            lines.append(f"value_scales = tl.where(inside{self._other}, by_key, 0.0)")
        call, scales = ("weigh_scaled", "value_scales, ") if by_token else ("weigh", "")
        applied = self.key.form != "real" and self.key.factored
        factor = repr(self.scale * LOG2E / (self.factor if applied else 1.0))
        lines.append(f"weights, rescale, peak, total = {call}(peak, total, logits, {scales}{factor}, {self._axis})")
        if self.edit:
            lines += signature("factor = edit", self.edit.parameters, "", inside=8).splitlines()
            lines.append("weights = weights * factor")
        narrow = value.form != "real" and value.factored
        lines.append(f"weights = weights.to({'PRODUCT' if narrow else 'query.dtype.element_ty'})")
        if narrow and value.excess:
            lines += [
                "# What the values of these keys exceed goes first: matrix units cut off what is far below a sum.",
                f"too_much = {self._dot('weights', 'excess')}",
            ]
        for number, part in enumerate(value.parts):
            total, more = f"accumulator{part}", ""
            if narrow and value.excess:
                more = " + too_much" if value.multiple(number) == 1 else f" + {value.multiple(number)}.0 * too_much"
            lines += value.numbers(number, across=self.turned)
            lines.append(f"{total} = {total} * rescale{self._row}{more}")
            lines.append(f"{total} = {self._dot('weights', f'value_tile{part}', f', {total}')}")
        return lines

    def _store(self) -> list[str]:
        value = self.value
        heads, queries, _ = self.lengths
        written = f"(rows < {self.group} * {queries}){self._row}"
        if value.padded != value.width:
            written += f" & (features < {value.width}){self._other}"
        lines = [f"place = ((tl.cast(b, tl.int64) * {heads} + h) * {queries} + i) * splits + split"]
        for number, part in enumerate(value.parts):
            if value.factored and value.excess:
                multiple = value.multiple(number)
                unit = f"(UNIT / {multiple})" if multiple > 1 else "UNIT"
                lines.append(f"accumulator{part} = accumulator{part} * {unit}")
            if value.factored and value.scale and value.scale.reads == "channel":
                lines += value.scale.read("by_channel", "0", f"{value.lane(number)}{self._other}")
                lines.append(f"accumulator{part} = accumulator{part} * by_channel")
            lines += [
                f"part_offsets = place * {value.channels} + {value.place(number)}{self._other}",
                f"tl.store(partial + part_offsets, accumulator{part}, mask={written})",
            ]
        rows = f"mask=rows < {self.group} * {queries}"
        return [
            *lines,
            "place = tl.reshape(place, [BLOCK_I])",
            f"tl.store(peaks + place, peak, {rows})",
            f"tl.store(totals + place, total, {rows})",
        ]

    def _merge(self) -> str:
        heads, queries, _ = self.lengths
        channels = self.value.channels
        padded = max(16, 1 << (channels - 1).bit_length())
        asked = "" if padded == channels else f" & (features < {channels})[None, :]"
        end = "" if padded == channels else f", mask=features < {channels}"
        lines = [
            "program = tl.program_id(0)",
            f"i = program % {queries}",
            f"h = program // {queries} % {heads}",
            f"b = program // {queries} // {heads}",
            "lanes = tl.arange(0, BLOCK_S)",
            f"features = tl.arange(0, {padded})",
            f"accumulator = tl.zeros([{padded}], tl.float32)",
            'peak = tl.full([1], float("-inf"), tl.float32)',
            "total = tl.zeros([1], tl.float32)",
            "for start in range(0, splits, BLOCK_S):",
            "    inside = start + lanes < splits",
            "    place = tl.cast(program, tl.int64) * splits + start + lanes",
            '    part_peak = tl.load(peaks + place, mask=inside, other=float("-inf"))',
            "    part_total = tl.load(totals + place, mask=inside, other=0.0)",
            f"    part_offsets = place[:, None] * {channels} + features[None, :]",
            f"    part = tl.load(partial + part_offsets, mask=inside[:, None]{asked}, other=0.0)",
            "    new_peak = tl.maximum(peak, tl.max(part_peak, 0))",
            '    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # no part has seen a key yet',
            "    weights = tl.exp2(part_peak - shift)",
            "    rescale = tl.exp2(peak - shift)",
            "    total = total * rescale + tl.sum(part_total * weights, 0)",
            "    accumulator = accumulator * rescale + tl.sum(part * weights[:, None], 0)",
            "    peak = new_peak",
        ]
        if self.sink:
            lines += [
                *signature("sink_logit = sink", self.sink.parameters, "", inside=4).splitlines(),
                f"sink_logit = tl.zeros([1], tl.float32) + sink_logit * {LOG2E!r}",
                "new_peak = tl.maximum(peak, sink_logit)",
                'shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # no key, and a sink of -inf',
                "accumulator = accumulator * tl.exp2(peak - shift)",
                "total = total * tl.exp2(peak - shift) + tl.exp2(sink_logit - shift)",
                "peak = new_peak",
            ]
        lines += [
            "# A row that saw no key gives zeros.",
            "accumulator = accumulator / tl.where(total == 0.0, 1.0, total)",
            "out += tl.cast(b, tl.int64) * out_stride_b + tl.cast(h, tl.int64) * out_stride_h",
            "out += tl.cast(i, tl.int64) * out_stride_i",
            f"tl.store(out + features * out_stride_e, accumulator.to(out.dtype.element_ty){end})",
        ]
        if self.lse:
            lines.append(f"tl.store(lse + program + tl.arange(0, 1), (peak + tl.log2(total)) * {1 / LOG2E!r})")
        parameters = [
            *self.merge_pointers(),
            *self.merge_strides(),
            *self.merge_integers(),
            "BLOCK_S: tl.constexpr",
        ]
        return "\n".join(
            [
                "@triton.jit",
                signature("def merge_splits", parameters, ":"),
                '    """One program: the parts of one row, joined by their peaks and totals."""',
                indented(lines, 4),
            ]
        )


def _deeper(lines: Iterable[str]) -> list[str]:
    return ["    " + line for line in lines]


SPLITS_OF = '''\
def splits_of(like, programs, tiles, warps):
    """Into how many parts the visible keys are cut.

    Eight warps run on a multiprocessor at a time, of two programs at least. The parts make WAVES to 4 waves of
    programs; of these numbers it is the one with the least time, which is waves for each part, and a twentieth for the
    start and end of each wave. A part has at least LEAST_TILES tiles of keys, and there are at most 128.
    """
    slots = 8
    if like.is_cuda:
        slots = max(2, 8 // warps) * torch.cuda.get_device_properties(like.device).multi_processor_count
    most = min(triton.cdiv(tiles, LEAST_TILES), 128)
    best, least = 1, math.inf
    for waves in range(WAVES, 5):
        splits = max(1, min(waves * slots // programs, most))
        time = math.ceil(programs * splits / slots) / splits * (1 + waves / 20)
        if time < least:
            best, least = splits, time
    return best'''


__all__ = ["SPLITS_OF", "Decode"]
