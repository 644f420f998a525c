"""Skeletons of the backward kernels of one attention.

With ``weights w = norm(logits)``, ``products = grad_out·vᵀ`` and an edit ``w·factor`` of the weights, the gradient of a
logit is

- softmax: ``w · (products · factor − delta)`` with ``delta = Σ_e out·grad_out − grad_lse``,
- sigmoid: ``w · (1 − w) · products · factor``; relu: ``products · factor`` where the logit is positive,

and that of the raw score is this times ``d score/d s``. The weights are computed again from the log-sum-exp of the
forward pass, so nothing of the attention map is stored. One kernel walks over the keys of a block of queries (gradient
of the query), another over the queries that see a block of keys, for each head that reads them (gradients of key and
value): each result is summed by one program in a fixed order.

Follows: Dao 2023 (arXiv:2307.08691), algorithm 2, in two kernels instead of one with atomic sums.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from attncompile.kernels.dense import LOG2E, DeviceFunction, pointwise
from attncompile.kernels.loops import KEYS, QUERIES, KeyRuns, deeper, key_loops, own_block
from attncompile.kernels.source import indented, signature


@dataclass(frozen=True)
class CapturedGradient:
    """The gradient of one load of a captured tensor.

    Attributes:
        name: stem of its identifiers: ``{name}_sums``, ``{name}_places``, ``{name}_gradient``.
        pointer: the kernel's pointer to the tensor.
        rank: axes of the tensor.
        source: ``score``, ``edit`` or ``sink``: the expression that loads it.
        along: ``rows`` (summed over the keys), ``keys`` (summed over the queries) or ``pairs`` (neither).
        by: derivative of that expression by the element, or ``None`` where it is constant.
        scale: constant factor.
        place: where the element lies in ``{name}_gradient``; ``None`` where the launcher sums along whole axes.
        summed: for pairs: the axes among ``b h`` that the load does not depend on.
        scattered: for pairs: whether several positions may load one element.
    """

    name: str
    pointer: str
    rank: int
    source: str
    along: str
    by: DeviceFunction | None
    scale: float
    place: DeviceFunction | None
    summed: tuple[str, ...] = ()
    scattered: bool = False

    def gradient_strides(self) -> tuple[str, ...]:
        """Identifiers of the strides of ``{name}_gradient``."""
        return tuple(f"{self.name}_gradient_stride_{axis}" for axis in range(self.rank))

    def contribution(self) -> list[str]:
        """Lines that set ``{name}_part`` to what each position of a tile adds, but for the scale."""
        base = "weights * products" if self.source == "edit" else "logit_gradient"
        if self.by is None:
            return [f"{self.name}_part = {base}"]
        call = signature(f"{self.name}_by = {self.by.name}", self.by.parameters, "", inside=12).splitlines()
        return [*call, f"{self.name}_part = {base} * {self.name}_by"]

    def place_call(self, base: str) -> list[str]:
        """Lines that set ``{name}_place`` to where the elements lie, from the pointer ``base`` or from 0."""
        assert self.place is not None
        arguments = [base if each == f"{self.name}_gradient" else each for each in self.place.parameters]
        return signature(f"{self.name}_place = {self.place.name}", arguments, "", inside=12).splitlines()

    def stored(self, value: str) -> str:
        """The value times the constant factor."""
        return value if self.scale == 1.0 else f"{value} * {self.scale!r}"


@dataclass(frozen=True)
class KernelText:
    """A kernel: its name, its arguments by kind, its source."""

    name: str
    pointers: tuple[str, ...]
    strides: tuple[str, ...]
    integers: tuple[str, ...]
    constants: tuple[str, ...]
    docstring: str
    body: tuple[str, ...]

    def arguments(self) -> tuple[str, ...]:
        """All arguments but the compile-time ones, in order."""
        return (*self.pointers, *self.strides, *self.integers)

    def source(self) -> str:
        """The kernel as text."""
        parameters = [*self.arguments(), *(f"{name}: tl.constexpr" for name in self.constants)]
        head = signature(f"def {self.name}", parameters, ":")
        return f'@triton.jit\n{head}\n    """{self.docstring}"""\n{indented(self.body, 4)}'


AXES = {
    "query": "bhid",
    "key": "bgjd",
    "value": "bgje",
    "out": "bhie",
    "grad_out": "bhie",
    "grad_query": "bhid",
    "grad_key": "bgjd",
    "grad_value": "bgje",
}
"""Axes of the operands and of what belongs to them."""


def operand_strides(names: Iterable[str]) -> tuple[str, ...]:
    """Identifiers of the strides of operands; other pointers are contiguous."""
    return tuple(f"{name}_stride_{axis}" for name in names if name in AXES for axis in AXES[name])


@dataclass(frozen=True)
class DenseBackward:
    """What a Spec decides about the backward kernels.

    Attributes:
        normalizer: ``softmax``, ``sigmoid``, ``relu`` or ``none``.
        scale: constant factor of the logits that ``score`` leaves out.
        score, visible, edit, sink: as in :class:`attncompile.kernels.dense.DenseForward`.
        slope: derivative of ``score`` by the raw score, or ``None`` where it is constant.
        gain: constant factor of the gradient of the raw score: the scale, and a constant slope.
        kv_head: source of the KV head over ``h``.
        heads: head of the loop over the heads that read KV head ``g``; ``None`` where that is ``h = g`` alone.
        reads: condition over ``h`` and ``g`` inside that loop, or ``None``.
        key_runs: keys that a block of queries visits.
        query_runs: queries that a block of keys visits.
        last_rows_first, last_keys_first: start with the last block: where there is most to do.
        captured: identifier and number of axes of each captured tensor.
        gradients: what is differentiated besides query, key and value.
        lengths: identifiers of the numbers of heads, queries, keys, KV heads and batch rows.
        sizes: identifiers of other sizes.
        channels, features: number of channels of keys and of values.
        clamped: whether tensors are loaded by ``i`` or ``j``.
        lse_gradient: whether the log-sum-exp has a gradient.
    """

    normalizer: str
    scale: float
    score: DeviceFunction | None
    visible: DeviceFunction | None
    edit: DeviceFunction | None
    sink: DeviceFunction | None
    slope: DeviceFunction | None
    gain: float
    kv_head: str
    heads: str | None
    reads: str | None
    key_runs: KeyRuns
    query_runs: KeyRuns
    last_rows_first: bool
    last_keys_first: bool
    captured: tuple[tuple[str, int], ...]
    gradients: tuple[CapturedGradient, ...]
    lengths: tuple[str, str, str, str, str]
    sizes: tuple[str, ...]
    channels: int
    features: int
    clamped: bool
    lse_gradient: bool

    @property
    def softmax(self) -> bool:
        """Whether the normaliser sums over the keys."""
        return self.normalizer == "softmax"

    def padded(self, extent: int) -> int:
        """Tile size for a number of channels: a power of two that the matrix units take."""
        return max(16, 1 << (extent - 1).bit_length())

    def functions(self) -> tuple[DeviceFunction, ...]:
        """What the kernels call, each once."""
        found = [self.score, self.slope, self.visible, self.edit, self.sink]
        for gradient in self.gradients:
            found += [gradient.by, gradient.place]
        return tuple(dict.fromkeys(function for function in found if function))

    def along(self, direction: str, *sources: str) -> tuple[CapturedGradient, ...]:
        """The captured gradients that a kernel of this direction computes."""
        return tuple(g for g in self.gradients if g.along == direction and (not sources or g.source in sources))

    def inputs(self) -> tuple[str, ...]:
        """Pointers that every kernel reads."""
        return ("query", "key", "value", "grad_out", *(("shift", "delta") if self.softmax else ()))

    def kernel(
        self,
        name: str,
        pointers: Iterable[str],
        gradients: Iterable[CapturedGradient],
        docstring: str,
        groups: Iterable[list[str]],
        integers: Iterable[str] = (),
        constants: tuple[str, ...] = ("BLOCK_I", "BLOCK_J"),
    ) -> KernelText:
        """A kernel with all its arguments.

        Args:
            name: of the function.
            pointers: identifiers, operands first.
            gradients: whose buffers it takes too.
            docstring: its first line.
            groups: groups of lines.
            integers: further integer arguments.
            constants: compile-time arguments.
        """
        gradients, pointers = tuple(gradients), tuple(pointers)
        buffers = [buffer for gradient in gradients for buffer in self.buffers(gradient)]
        places = [stride for gradient in gradients if gradient.place for stride in gradient.gradient_strides()]
        body: list[str] = []
        for group in groups:
            body += ["", *group] if body else group
        read = frozenset(re.findall(r"\w+", "\n".join(body)))
        captured = [(pointer, rank) for pointer, rank in self.captured if pointer in read]
        strides = [f"{pointer}_stride_{axis}" for pointer, rank in captured for axis in range(rank)]
        return KernelText(
            name,
            (*pointers, *(pointer for pointer, _ in captured), *buffers),
            (*operand_strides(pointers), *strides, *places),
            tuple(each for each in dict.fromkeys((*self.lengths, *self.sizes, *integers)) if each in read),
            constants,
            docstring,
            tuple(body),
        )

    def buffers(self, gradient: CapturedGradient) -> tuple[str, ...]:
        """Identifiers of the memory that a captured gradient is written to."""
        if gradient.along == "pairs" and not gradient.scattered:
            return (f"{gradient.name}_gradient",)
        both = (f"{gradient.name}_sums", f"{gradient.name}_places")
        if gradient.along == "pairs":
            return (f"{gradient.name}_gradient", *both)
        return both if gradient.place else both[:1]

    def inside(self, condition: str, axis: str) -> str:
        """The condition, and that the channel exists."""
        extent = self.channels if axis == "channels" else self.features
        if self.padded(extent) == extent:
            return condition
        return f"{condition} & real_{axis}" if condition else f"real_{axis}"

    def columns(self) -> list[str]:
        """Lines that number the channels."""
        return [
            f"channels = tl.arange(0, {self.padded(self.channels)})",
            f"features = tl.arange(0, {self.padded(self.features)})",
            *(
                f"real_{axis} = ({axis} < {extent})[None, :]"
                for axis, extent in (("channels", self.channels), ("features", self.features))
                if self.padded(extent) != extent
            ),
        ]

    def offsets(self, name: str, positions: str, offsets: str) -> list[str]:
        """Lines that set ``offsets`` to those of a tile of an operand, without batch row and head."""
        along, across = AXES[name][2], AXES[name][3]
        columns = "channels" if across == "d" else "features"
        row, column = f"{positions}[:, None] * {name}_stride_{along}", f"{columns}[None, :] * {name}_stride_{across}"
        if len(offsets) + len(row) + len(column) < 100:
            return [f"{offsets} = {row} + {column}"]
        return [f"{offsets} = {row}", f"{offsets} = {offsets} + {column}"]

    def base(self, name: str, head: str = "") -> list[str]:
        """Lines that move a pointer to batch row and head (they may lie more than 2^31 elements on).

        Args:
            name: the pointer.
            head: identifier of the result, if not the pointer itself.
        """
        steps = [f"tl.cast({axis}, tl.int64) * {name}_stride_{axis}" for axis in AXES[name][:2]]
        if not head:
            return [f"{name} += {' + '.join(steps)}"]
        return [f"{head} = {name} + {steps[0]}", f"{head} += {steps[1]}"]

    def tile(self, name: str, mask: str, pointer: str = "") -> list[str]:
        """Lines that load a tile at ``{name}_offsets`` from ``offset`` on; ``grad_out`` fills ``grad_tile``."""
        along, across = AXES[name][2], AXES[name][3]
        guard = self.inside(mask, "channels" if across == "d" else "features")
        tile = "grad_tile" if name == "grad_out" else f"{name}_tile"
        tail = f", mask={guard}, other=0" if guard else ""
        return [
            f"at = {pointer or name} + offset * {name}_stride_{along}",
            f"{tile} = tl.load(at + {name}_offsets{tail})",
        ]

    def own_tile(self, name: str, positions: str, length: str, at: str = "", real: str = "") -> list[str]:
        """Lines that load the tile of a block's own positions; ``grad_out`` fills ``grad_tile``.

        Args:
            name: of the operand.
            positions: identifier of the positions.
            length: identifier of their number.
            at: pointer to start from, if not the operand's.
            real: what is appended to the load, such as a cast.
        """
        axis = "channels" if AXES[name][3] == "d" else "features"
        tile = "grad_tile" if name == "grad_out" else f"{name}_tile"
        mask = self.inside(f"({positions} < {length})[:, None]", axis)
        return [
            *self.offsets(name, f"tl.cast({positions}, tl.int64)", f"{name}_own"),
            f"{tile} = tl.load({at or name} + {name}_own, mask={mask}, other=0){real}",
        ]

    def store(self, name: str, total: str, positions: str, length: str) -> list[str]:
        """Lines that store the gradient of a block's own positions."""
        axis = "channels" if AXES[name][3] == "d" else "features"
        return [
            *self.offsets(name, f"tl.cast({positions}, tl.int64)", f"{name}_own"),
            f"inside = {self.inside(f'({positions} < {length})[:, None]', axis)}",
            f"tl.store({name} + {name}_own, {total}.to({name}.dtype.element_ty), mask=inside)",
        ]

    def row_values(self, base: str, mask: str, shape: str) -> list[str]:
        """Lines that read the normaliser and delta of each query; queries past the last one get weight 0."""
        if not self.softmax:
            return []
        guards = (f', mask={mask}, other=float("inf")', f", mask={mask}, other=0.0") if mask else ("", "")
        return [
            f"row_shift = tl.load(shift + {base} + rows{guards[0]}){shape}",
            f"row_delta = tl.load(delta + {base} + rows{guards[1]}){shape}",
        ]

    def weights(self, limit: str | None) -> list[str]:
        """Lines from ``s`` to ``weights``, which the edit's ``factor`` does not yet multiply.

        Args:
            limit: condition for positions that exist; ``None`` where all do and the mask hides none.
        """
        lines: list[str] = []
        if self.score:
            lines += signature("logits = score", self.score.parameters, "", inside=16).splitlines()
        else:
            lines.append("logits = s")
        if limit is not None:
            shown = limit
            if self.visible:
                lines += signature("shown = visible", self.visible.parameters, "", inside=16).splitlines()
                shown = f"shown & {limit}"
            lines.append(f'logits = tl.where({shown}, logits, float("-inf"))')
        if self.edit:
            lines += signature("factor = edit", self.edit.parameters, "", inside=16).splitlines()
        scaled = "logits" if self.scale == 1.0 else f"logits * {self.scale!r}"
        weights = pointwise(self.normalizer, scaled)
        if self.softmax:
            weights = f"tl.exp2(logits * {self.scale * LOG2E!r} - row_shift)"
        return [*lines, f"weights = {weights}"]

    def logit_gradient(self) -> str:
        """Line that sets ``logit_gradient`` from ``weights`` and ``products``."""
        edited = "products * factor" if self.edit else "products"
        value = {
            "softmax": f"weights * ({edited} - row_delta)",
            "sigmoid": f"{edited} * weights * (1.0 - weights)",
            "relu": f"tl.where(logits > 0.0, {edited}, 0.0)",
            "none": f'tl.where(logits > float("-inf"), {edited}, 0.0)',
        }
        return f"logit_gradient = {value[self.normalizer]}"

    def score_gradient(self) -> list[str]:
        """Lines that set ``score_gradient``: of the raw score, but for the constant gain."""
        if not self.slope:
            return ["score_gradient = logit_gradient"]
        call = signature("slope = score_slope", self.slope.parameters, "", inside=16).splitlines()
        return [*call, "score_gradient = logit_gradient * slope"]

    def query_kernel(self) -> KernelText:
        """The gradient of the query, and what is summed over the keys."""
        heads, queries, keys = self.lengths[:3]
        rows = self.along("rows", "score", "edit")
        setup = [
            *own_block(QUERIES, queries, ("h", heads), self.last_rows_first, self.clamped),
            f"g = {self.kv_head}",
            "lanes = tl.arange(0, BLOCK_J)",
            *self.columns(),
        ]
        tiles = [
            "# Offsets of batch row and head may pass 2^31.",
            *(line for name in ("query", "key", "value", "grad_out", "grad_query") for line in self.base(name)),
            *self.own_tile("query", "rows", queries),
            *self.own_tile("grad_out", "rows", queries),
            *self.offsets("key", "lanes", "key_offsets"),
            *self.offsets("value", "lanes", "value_offsets"),
            f"row_base = tl.cast(program // blocks, tl.int64) * {queries}",
            *self.row_values("row_base", f"rows < {queries}", "[:, None]"),
            f"query_sum = tl.zeros([BLOCK_I, {self.padded(self.channels)}], tl.float32)",
            *(f"{each.name}_sum = tl.zeros([BLOCK_I], tl.float32)" for each in rows),
        ]

        def step(masked: bool) -> list[str]:
            clamp = self.clamped and masked
            inside = "inside" if masked else ""
            return [
                "keys = start + lanes",
                f"j = tl.minimum(keys, {keys} - 1)[None, :]" if clamp else "j = keys[None, :]",
                *([f"inside = (keys < {keys})[:, None]"] if masked else []),
                "offset = tl.cast(start, tl.int64)",
                *self.tile("key", inside),
                *self.tile("value", inside),
                's = tl.dot(query_tile, tl.trans(key_tile), input_precision="ieee")',
                *self.weights(f"(keys < {keys})[None, :]" if masked else None),
                'products = tl.dot(grad_tile, tl.trans(value_tile), input_precision="ieee")',
                self.logit_gradient(),
                *self.score_gradient(),
                'query_sum = tl.dot(score_gradient.to(key_tile.dtype), key_tile, query_sum, input_precision="ieee")',
                *(line for each in rows for line in self._summed(each)),
            ]

        store = [
            f"query_sum = query_sum * {self.gain!r}",
            *self.store("grad_query", "query_sum", "rows", queries),
            *(line for each in rows for line in self.store_sums(each, "row_base + rows", f"rows < {queries}", "I")),
        ]
        return self.kernel(
            "query_gradient",
            (*self.inputs(), "grad_query"),
            rows,
            "One program: the gradient of BLOCK_I queries of one head, over all the keys that they see.",
            [setup, tiles, *key_loops(self.key_runs, keys, step, KEYS), store],
        )

    @staticmethod
    def _summed(gradient: CapturedGradient) -> list[str]:
        return [*gradient.contribution(), f"{gradient.name}_sum += tl.sum({gradient.name}_part, 1)"]

    @staticmethod
    def store_sums(gradient: CapturedGradient, where: str, mask: str, axis: str) -> list[str]:
        """Lines that store the sums of a block, and where their elements lie.

        Args:
            gradient: of which load.
            where: offsets in the buffers.
            mask: which positions exist.
            axis: ``I`` or ``J``.
        """
        name = gradient.name
        lines = [f"tl.store({name}_sums + {where}, {gradient.stored(f'{name}_sum')}, mask={mask})"]
        if gradient.place:
            lines += gradient.place_call("tl.cast(0, tl.int64)")
            lines += [
                f"{name}_place = tl.reshape({name}_place + tl.zeros([BLOCK_{axis}, 1], tl.int64), [BLOCK_{axis}])",
                f"tl.store({name}_places + {where}, {name}_place, mask={mask})",
            ]
        return lines

    def key_kernel(self) -> KernelText:
        """The gradients of key and value, and what is summed over the queries."""
        heads, queries, keys, groups, _ = self.lengths
        columns = self.along("keys")
        setup = [
            *own_block(KEYS, keys, ("g", groups), self.last_keys_first, self.clamped),
            "lanes = tl.arange(0, BLOCK_I)",
            *self.columns(),
        ]
        tiles = [
            "# Offsets of batch row and head may pass 2^31.",
            *(line for name in ("key", "value", "grad_key", "grad_value") for line in self.base(name)),
            *self.own_tile("key", "keys", keys),
            *self.own_tile("value", "keys", keys),
            *self.offsets("query", "lanes", "query_offsets"),
            *self.offsets("grad_out", "lanes", "grad_out_offsets"),
            f"key_sum = tl.zeros([BLOCK_J, {self.padded(self.channels)}], tl.float32)",
            f"value_sum = tl.zeros([BLOCK_J, {self.padded(self.features)}], tl.float32)",
        ]

        def step(masked: bool) -> list[str]:
            clamp = self.clamped and masked
            inside = "inside" if masked else ""
            edited = "(weights * factor)" if self.edit else "weights"
            return [
                "rows = start + lanes",
                f"i = tl.minimum(rows, {queries} - 1)[None, :]" if clamp else "i = rows[None, :]",
                *([f"inside = (rows < {queries})[:, None]"] if masked else []),
                "offset = tl.cast(start, tl.int64)",
                *self.tile("query", inside, "query_head"),
                *self.tile("grad_out", inside, "grad_out_head"),
                *self.row_values("row_base", f"rows < {queries}" if masked else "", "[None, :]"),
                "# A row of these tiles is a key, a column a query.",
                's = tl.dot(key_tile, tl.trans(query_tile), input_precision="ieee")',
                *self.weights(f"(rows < {queries})[None, :]" if masked else None),
                f'value_sum = tl.dot({edited}.to(grad_tile.dtype), grad_tile, value_sum, input_precision="ieee")',
                'products = tl.dot(value_tile, tl.trans(grad_tile), input_precision="ieee")',
                self.logit_gradient(),
                *self.score_gradient(),
                'key_sum = tl.dot(score_gradient.to(query_tile.dtype), query_tile, key_sum, input_precision="ieee")',
                *(line for each in columns for line in self._summed(each)),
            ]

        per_head = [
            f"row_base = (tl.cast(b, tl.int64) * {heads} + h) * {queries}",
            *self.base("query", "query_head"),
            *self.base("grad_out", "grad_out_head"),
            *(f"{each.name}_sum = tl.zeros([BLOCK_J], tl.float32)" for each in columns),
        ]
        for group in key_loops(self.query_runs, queries, step, QUERIES):
            per_head += group
        if columns:
            per_head.append(f"key_base = (tl.cast(b, tl.int64) * {heads} + h) * {keys}")
        for each in columns:
            per_head += self.store_sums(each, "key_base + keys", f"keys < {keys}", "J")
        if self.heads is None:
            looped = ["h = g", *per_head]
        else:
            inner = [f"if {self.reads}:", *deeper(per_head)] if self.reads else per_head
            looped = ["# Every head that reads these keys.", self.heads, *deeper(inner)]
        store = [
            f"key_sum = key_sum * {self.gain!r}",
            *self.store("grad_key", "key_sum", "keys", keys),
            *self.store("grad_value", "value_sum", "keys", keys),
        ]
        return self.kernel(
            "key_value_gradient",
            (*self.inputs(), "grad_key", "grad_value"),
            columns,
            "One program: the gradients of BLOCK_J keys and values, over all the queries of all heads that see them.",
            [setup, tiles, looped, store],
        )


__all__ = ["CapturedGradient", "DenseBackward", "KernelText", "operand_strides"]
