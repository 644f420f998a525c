"""Skeleton of the dense forward kernel.

One program computes ``block_query`` queries of one head and walks over the keys once: ``softmax`` online in
base 2 with float32 sums, ``sigmoid`` and ``relu`` pointwise. Key blocks come in up to three runs: those that
every query sees in full, without any mask; those on an edge of the mask or past the last key, with it; and
none at all for the rest.

Follows: Dao 2023 (arXiv:2307.08691); online softmax, Milakov and Gimelshein 2018 (arXiv:1805.02867).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from attncompile.kernels.loops import QUERIES, KeyRuns, key_loops, own_block
from attncompile.kernels.source import device_function, indented, signature

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class DeviceFunction:
    """A function of ``b h i j`` (and ``s``) that the Spec decides.

    Attributes:
        name: ``score``, ``visible``, ``edit`` or ``sink``.
        docstring: the expression as the Spec prints it.
        parameters: identifiers that it takes; inside the kernel they have the same names.
        lines: statements before the last.
        value: source of the result.
    """

    name: str
    docstring: str
    parameters: tuple[str, ...]
    lines: tuple[str, ...]
    value: str

    def source(self) -> str:
        """The function as text."""
        head = signature(f"def {self.name}", self.parameters, ":")
        body = indented([*self.lines, f"return {self.value}"], 4)
        return f'@triton.jit\n{head}\n    """{self.docstring}"""\n{body}'


def pointwise(normalizer: str, logits: str) -> str:
    """Source of the weights of a normaliser that needs no other key; a hidden key's logit is −∞, its weight zero."""
    if normalizer == "sigmoid":
        return f"tl.sigmoid({logits})"
    if normalizer == "relu":
        return f"tl.maximum({logits}, 0.0)"
    return f'tl.where(logits > float("-inf"), {logits}, 0.0)'


SWALLOWING = 2.0**27
"""Logits of this magnitude have eight units between them in float32: what hides, no score.

A row's greatest logit times log2(e) is rounded, to 16 there, and an exponent may be half of that off: 2^8 is a weight
that float16 holds.
"""


def limited(logits: str, scale: float) -> str:
    """Source of logits where what is added hides keys: finite or −∞.

    What is lower than any score counts as the same power of two, whose exponents are exact: those of other numbers as
    low are rounded by more than a weight can be, and −3e38 times log2(e) is no number. A row that sees nothing else has
    equal weights, then. −∞ has none: the least normal number times a finite score is lost in the sum.

    Args:
        logits: identifier.
        scale: constant factor that is yet to be applied.
    """
    lowest = -SWALLOWING * 2.0 ** -math.floor(math.log2(scale))
    return f"tl.maximum({logits}, {lowest!r}) + {logits} * {2.0**-126!r}"


@dataclass(frozen=True)
class NarrowOperands:
    """Operands that are codes with scales.

    Attributes:
        dtype: of queries and keys, ``int8`` or ``float8_e4m3``.
        query_block, key_block: positions that share a scale.
        value_block: the same for values in e4m3, stored ``[B,G,E,J]``; ``None`` for values as they are.
    """

    dtype: str
    query_block: int
    key_block: int
    value_block: int | None

    def scales(self) -> tuple[str, ...]:
        """Pointers to scales."""
        return ("query_scale", "key_scale", *(("value_scale",) if self.value_block else ()))


@dataclass(frozen=True)
class DenseForward:
    """What a Spec decides about the kernel.

    Attributes:
        normalizer: ``softmax``; ``sigmoid``, ``relu`` or ``none``, which make a weight from its score alone; ``sum`` or
            ``l1``, whose weights are scores divided by their sum, or by that of their magnitudes.
        scale: constant factor of the logits that ``score`` leaves out; applied inside the exponential.
        score: the logit from the raw score, or ``None`` when it is the raw score.
        far_score: what ``score`` is in the part of the keys that needs no mask, where it is simpler there, or ``None``.
        visible: the mask, or ``None`` when all is visible.
        edit: factor of the normalised weight, or ``None``.
        sink: logit of a key without a value, over ``b h i``, or ``None``.
        divisor: what the sum becomes before it divides, over ``t b h i``, or ``None`` where nothing is divided by it.
        kv_head: source of the KV head over ``h``.
        runs: limits of the key loops.
        latest_first: start with the last queries: where they have the most keys.
        lse: whether the log-sum-exp is stored.
        hides: whether the logits may be −∞, or lower than any score, where that hides a key.
        taps: which of ``peak`` and ``entropy`` are stored, in this order.
        captured: identifier and number of axes of each captured tensor.
        lengths: identifiers of the numbers of heads, queries and keys.
        sizes: identifiers of other sizes.
        channels, features: number of channels of keys and of values.
        clamped: whether tensors are loaded by ``i`` or ``j``: past the last row or key their last element is
            read.
        narrow: operands that are codes with scales, or ``None``.
    """

    normalizer: str
    scale: float
    score: DeviceFunction | None
    visible: DeviceFunction | None
    edit: DeviceFunction | None
    sink: DeviceFunction | None
    divisor: DeviceFunction | None
    kv_head: str
    runs: KeyRuns
    latest_first: bool
    lse: bool
    captured: tuple[tuple[str, int], ...]
    lengths: tuple[str, str, str]
    sizes: tuple[str, ...]
    channels: int
    features: int
    clamped: bool
    narrow: NarrowOperands | None = None
    far_score: DeviceFunction | None = None
    taps: tuple[str, ...] = ()
    hides: bool = False

    def tap_pointers(self) -> tuple[str, ...]:
        """Pointers to the taps of rows."""
        return tuple({"peak": "peaks", "entropy": "entropies"}[tap] for tap in self.taps)

    @property
    def tapped(self) -> bool:
        """Whether the sum of weights times exponents is kept."""
        return "entropy" in self.taps

    @property
    def turned_values(self) -> bool:
        """Whether values are e4m3 codes ``[B,G,E,J]``."""
        return self.narrow is not None and self.narrow.value_block is not None

    @property
    def softmax(self) -> bool:
        """Whether the normaliser sums over the keys."""
        return self.normalizer == "softmax"

    def padded(self, extent: int) -> int:
        """Tile size for a number of channels: a power of two that the matrix units take."""
        least = 32 if self.narrow else 16
        return max(least, 1 << (extent - 1).bit_length())

    def pointers(self) -> tuple[str, ...]:
        """Pointer arguments in order."""
        scales = self.narrow.scales() if self.narrow else ()
        return (
            "query",
            "key",
            "value",
            *scales,
            "out",
            *(("lse",) if self.lse else ()),
            *self.tap_pointers(),
            *(name for name, _ in self.captured),
        )

    def strides(self) -> tuple[str, ...]:
        """Stride arguments in order."""
        values = "bgej" if self.turned_values else "bgje"
        operands = [
            f"{name}_stride_{axis}"
            for name, axes in (("query", "bhid"), ("key", "bgjd"), ("value", values), ("out", "bhie"))
            for axis in axes
        ]
        captured = [f"{name}_stride_{axis}" for name, rank in self.captured for axis in range(rank)]
        return (*operands, *captured)

    def integers(self) -> tuple[str, ...]:
        """Size arguments in order."""
        heads = ("key_heads",) if self.narrow else ()
        return tuple(dict.fromkeys((*self.lengths, *self.sizes, *heads)))

    def constants(self) -> tuple[str, ...]:
        """Compile-time arguments in order."""
        return ("BLOCK_I", "BLOCK_J")

    def device_functions(self) -> tuple[str, ...]:
        """Device functions that the skeleton itself calls."""
        if not self.softmax:
            return ()
        usual = "update_hiding" if self.hides else "update"
        update = "update_narrow" if self.turned_values else "update_edited" if self.edit else usual
        update = "update_tapped" if self.tapped else update
        return (update, *(["join_sink"] if self.sink else []))

    def source(self) -> str:
        """The functions and the kernel as text."""
        own = [device_function(name) for name in self.device_functions()]
        functions = (self.score, self.far_score, self.visible, self.edit, self.sink, self.divisor)
        spec = [function.source() for function in functions if function]
        return "\n\n\n".join([*own, *spec, self._kernel()])

    def _kernel(self) -> str:
        parameters = [
            *self.pointers(),
            *self.strides(),
            *self.integers(),
            *(f"{name}: tl.constexpr" for name in self.constants()),
        ]
        blocks = [self._setup(), self._query(), *key_loops(self.runs, self.lengths[2], self._step), self._store()]
        body = "\n\n".join(indented(block, 4) for block in blocks)
        return "\n".join(
            [
                "@triton.jit",
                signature("def attend_forward", parameters, ":"),
                '    """One program: BLOCK_I queries of one head over all the keys that they may see."""',
                body,
            ]
        )

    def _setup(self) -> list[str]:
        heads, queries, _ = self.lengths
        return [
            *own_block(QUERIES, queries, ("h", heads), self.latest_first, self.clamped),
            f"g = {self.kv_head}",
            "lanes = tl.arange(0, BLOCK_J)",
            f"channels = tl.arange(0, {self.padded(self.channels)})",
            f"features = tl.arange(0, {self.padded(self.features)})",
            *(
                f"real_{axis} = ({axis} < {extent})[None, :]"
                for axis, extent in (("channels", self.channels), ("features", self.features))
                if self.padded(extent) != extent
            ),
        ]

    def _query(self) -> list[str]:
        _, queries, keys = self.lengths
        asked = self._inside(f"(rows < {queries})[:, None]", "channels")
        lines = [
            "# Offsets of batch row and head may pass 2^31.",
            "query += tl.cast(b, tl.int64) * query_stride_b + tl.cast(h, tl.int64) * query_stride_h",
            "key += tl.cast(b, tl.int64) * key_stride_b + tl.cast(g, tl.int64) * key_stride_g",
            "value += tl.cast(b, tl.int64) * value_stride_b + tl.cast(g, tl.int64) * value_stride_g",
            "out += tl.cast(b, tl.int64) * out_stride_b + tl.cast(h, tl.int64) * out_stride_h",
            "query_rows = tl.cast(rows, tl.int64)[:, None] * query_stride_i",
            "query_offsets = query_rows + channels[None, :] * query_stride_d",
            f"query_tile = tl.load(query + query_offsets, mask={asked}, other={self._zero('query')})",
            "key_offsets = lanes[:, None] * key_stride_j + channels[None, :] * key_stride_d",
            "value_offsets = lanes[:, None] * value_stride_j + features[None, :] * value_stride_e",
        ]
        if self.narrow:
            blocks = self.narrow
            lines += [
                f"query_scale += tl.cast(program // blocks, tl.int64) * tl.cdiv({queries}, {blocks.query_block})",
                f"query_scales = tl.load(query_scale + tl.minimum(rows, {queries} - 1) // {blocks.query_block})",
                f"key_scale += (tl.cast(b, tl.int64) * key_heads + g) * tl.cdiv({keys}, {blocks.key_block})",
            ]
            if blocks.value_block:
                lines.append(
                    f"value_scale += (tl.cast(b, tl.int64) * key_heads + g) * tl.cdiv({keys}, {blocks.value_block})"
                )
        lines.append(f"accumulator = tl.zeros([BLOCK_I, {self.padded(self.features)}], tl.float32)")
        if self.softmax:
            lines += [
                'peak = tl.full([BLOCK_I], float("-inf"), tl.float32)',
                "total = tl.zeros([BLOCK_I], tl.float32)",
                *(["moment = tl.zeros([BLOCK_I], tl.float32)"] if self.tapped else []),
            ]
        elif self.divisor:
            lines.append("total = tl.zeros([BLOCK_I], tl.float32)")
        return lines

    def _inside(self, condition: str, axis: str) -> str:
        extent = self.channels if axis == "channels" else self.features
        if self.padded(extent) == extent:
            return condition
        bound = f"real_{axis}"
        return f"{condition} & {bound}" if condition else bound

    def _zero(self, tensor: str) -> str:
        """What is read past the end of a tensor: an integer is not converted to e4m3."""
        e4m3 = self.turned_values if tensor == "value" else self.narrow and self.narrow.dtype == "float8_e4m3"
        return "0.0" if e4m3 else "0"

    def _load(self, tensor: str, axis: str, masked: bool) -> str:
        mask = self._inside("inside" if masked else "", axis)
        guard = f", mask={mask}, other={self._zero(tensor)}" if mask else ""
        return f"tl.load({tensor} + offset * {tensor}_stride_j + {tensor}_offsets{guard})"

    def _step(self, masked: bool) -> list[str]:
        keys = self.lengths[2]
        clamp = self.clamped and masked
        lines = [
            "keys = start + lanes",
            f"j = tl.minimum(keys, {keys} - 1)[None, :]" if clamp else "j = keys[None, :]",
            *([f"inside = (keys < {keys})[:, None]"] if masked else []),
            "offset = tl.cast(start, tl.int64)",
            f"key_tile = {self._load('key', 'channels', masked)}",
        ]
        if self.narrow:
            kind = "int32" if self.narrow.dtype == "int8" else "float32"
            lines += [
                f"products = tl.dot(query_tile, tl.trans(key_tile), out_dtype=tl.{kind})",
                f"key_scales = tl.load(key_scale + tl.minimum(keys, {keys} - 1) // {self.narrow.key_block})",
                "s = products.to(tl.float32) * (query_scales[:, None] * key_scales[None, :])",
            ]
        else:
            lines.append('s = tl.dot(query_tile, tl.trans(key_tile), input_precision="ieee")')
        score = self.score if masked else self.far_score or self.score
        if score:
            lines += signature(f"logits = {score.name}", score.parameters, "", inside=8).splitlines()
        logits = "logits" if self.score else "s"
        if masked:
            if self.visible:
                lines += signature("shown = visible", self.visible.parameters, "", inside=8).splitlines()
            shown = f"shown & (keys < {keys})[None, :]" if self.visible else f"(keys < {keys})[None, :]"
            lines.append(f'logits = tl.where({shown}, {logits}, float("-inf"))')
        elif not self.score:
            lines.append("logits = s")
        lines.append(f"value_tile = {self._load('value', 'features', masked)}")
        if self.narrow and self.narrow.value_block:
            lines.append(
                f"value_scales = tl.load(value_scale + tl.minimum(keys, {keys} - 1) // {self.narrow.value_block})"
            )
        return lines + self._join()

    def _join(self) -> list[str]:
        if self.softmax:
            arguments = [
                "accumulator",
                "peak",
                "total",
                *(["moment"] if self.tapped else []),
                "logits",
                *(["factor"] if self.edit else ["1.0"] if self.tapped else []),
                "value_tile",
                *(["value_scales"] if self.turned_values else []),
                repr(self.scale * LOG2E),
            ]
            results = "accumulator, peak, total, moment" if self.tapped else "accumulator, peak, total"
            call = signature(f"{results} = {self.device_functions()[0]}", arguments, "", inside=8)
            return [*self._factor(), *call.splitlines()]
        scaled = "logits" if self.scale == 1.0 else f"logits * {self.scale!r}"
        plain = pointwise(self.normalizer, scaled)
        summed = {"sum": "weights", "l1": "tl.abs(weights)"}.get(self.normalizer)
        return [
            *self._factor(),
            f"weights = {plain}",
            *([f"total += tl.sum({summed}, 1)"] if summed else []),
            *(["weights *= factor"] if self.edit else []),
            'accumulator = tl.dot(weights.to(value_tile.dtype), value_tile, accumulator, input_precision="ieee")',
        ]

    def _factor(self) -> list[str]:
        return signature("factor = edit", self.edit.parameters, "", inside=8).splitlines() if self.edit else []

    def _store(self) -> list[str]:
        queries = self.lengths[1]
        lines = ["# Before a sink joins them.", "row_peak = peak"] if self.taps else []
        lines += ["row_total = total"] if self.tapped else []
        if self.sink:
            lines += [
                *signature("sink_logit = sink", self.sink.parameters, "", inside=4).splitlines(),
                "sink_logit = tl.reshape(sink_logit + tl.zeros([BLOCK_I, 1], tl.float32), [BLOCK_I])",
                f"accumulator, peak, total = join_sink(accumulator, peak, total, sink_logit * {LOG2E!r})",
            ]
        if self.softmax:
            total = "total * 256.0" if self.turned_values else "total"
            lines += [
                "# A row that saw no key gives zeros.",
                f"accumulator = accumulator / tl.where(total == 0.0, 1.0, {total})[:, None]",
            ]
        if self.divisor:
            lines += [
                "t = total[:, None]",
                *signature("whole = divisor", self.divisor.parameters, "", inside=4).splitlines(),
                "# A row whose weights are all zero gives zeros.",
                "accumulator = accumulator / tl.where(whole == 0.0, 1.0, whole)",
            ]
        lines += [
            "out_rows = tl.cast(rows, tl.int64)[:, None] * out_stride_i",
            "out_offsets = out_rows + features[None, :] * out_stride_e",
            "tl.store(out + out_offsets, accumulator.to(out.dtype.element_ty), "
            f"mask={self._inside(f'(rows < {queries})[:, None]', 'features')})",
        ]
        if self.lse:
            lines += [
                f"lse += tl.cast(program // blocks, tl.int64) * {queries}",
                f"tl.store(lse + rows, (peak + tl.log2(total)) * {1 / LOG2E!r}, mask=rows < {queries})",
            ]
        return [*lines, *self._store_taps()]

    def _store_taps(self) -> list[str]:
        queries = self.lengths[1]
        store = f"tl.cast(program // blocks, tl.int64) * {queries}"
        lines = []
        if "peak" in self.taps:
            lines += [
                f"peaks += {store}",
                f"tl.store(peaks + rows, row_peak * {1 / LOG2E!r}, mask=rows < {queries})",
            ]
        if self.tapped:
            lines += [
                "# What the keys have of the whole weight; a sink has the rest, and counts for nothing here.",
                "share = tl.exp2(row_peak - peak) / total" if self.sink else "share = 1.0 / total",
                "entropy = (peak - row_peak + tl.log2(total)) * (row_total * share) - moment * share"
                if self.sink
                else "entropy = tl.log2(total) - moment * share",
                f"entropy = tl.where(row_total > 0.0, entropy * {1 / LOG2E!r}, 0.0)",
                f"entropies += {store}",
                f"tl.store(entropies + rows, entropy, mask=rows < {queries})",
            ]
        return lines


__all__ = ["LOG2E", "DenseForward", "DeviceFunction", "KeyRuns", "NarrowOperands"]
