"""From the facts of an attention call to its Spec: the same Spec as lifting finds in the model's graph."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from attncompile.ir import Attend, Axis, Expr, Index, Load, Normalizer, Size, Spec, TensorType, Value, grouped, simplify
from attncompile.ir.expr import ONE, SCORE, TRUE, ZERO, Const, apply, loads, rewrite, substitute
from attncompile.ir.text import parse_expr
from attncompile.ir.types import element_kind

QUERY_OFFSET, KEY_OFFSET = "query_offset", "key_offset"
"""Tensors of one element: the positions of the first query and of the first key, where sizes do not tell them."""

ADDED, BIAS, SINKS = "mask_values", "position_bias", "sinks"
"""What a Spec calls a mask of numbers and a bias, both added to the scores, and the logits of the sinks."""

SELECTED = "selected"
"""What a Spec calls truth values of the keys that a model has chosen for each query."""

ONE_ROW = " for all queries"
"""Behind the text of a mask that has one row, which all queries share."""

BESIDE = (ADDED, BIAS, SINKS, SELECTED)
"""Captured tensors that are not read by the text of a mask."""

_BATCH, _QUERIES, _KEYS = Size("B"), Size("I"), Size("J")
_FIRST_QUERY, _FIRST_KEY = Size("O"), Size("P")


@dataclass(frozen=True)
class Tensor:
    """A captured tensor of a call.

    Attributes:
        name: in the Spec; dtype: as Specs name them.
        extents: for each axis what its size equals: of the letters ``1``, ``B``, ``H``, ``I`` and ``J`` those that fit.
    """

    name: str
    dtype: str
    extents: tuple[str, ...]


@dataclass(frozen=True)
class Call:
    """What decides a Spec, without the numbers that change from call to call.

    Attributes:
        site: name of the Spec.
        heads, groups, channels, value_channels: sizes of the operands; dtype: of all three.
        square: whether there are as many keys as queries.
        mask: text over ``b i j O P``, see :class:`attncompile.hf.mask.StatedMask`, or a bare ``j ≤ i``; empty where
            nothing is masked.
        tensors: what the mask reads as ``t0``, ``t1``, and then those of :data:`BESIDE`.
        offset: how the position of the first query follows: ``zero``, ``sizes`` (the last query stands at the last
            key) or ``tensor``.
        key_offset: whether the first key's position is not 0.
        scale: factor of the scores; softcap: they become ``softcap · tanh(score / softcap)`` unless it is ``None``.
    """

    site: str
    heads: int
    groups: int
    channels: int
    value_channels: int
    dtype: str
    square: bool
    mask: str
    tensors: tuple[Tensor, ...]
    offset: str
    key_offset: bool
    scale: float
    softcap: float | None


@functools.lru_cache(maxsize=1024)
def specify(call: Call) -> Spec:
    """The Spec of a call.

    Its inputs are ``q k v``, the captured tensors of the call that it reads, in the order of the call, and after them
    :data:`QUERY_OFFSET` and :data:`KEY_OFFSET` where it reads them.

    Raises:
        ValueError: when the mask's text is no truth value, or the numbers of heads do not fit.
    """
    keys = _QUERIES if call.square else _KEYS
    sizes: dict[str, Expr] = {"b": _BATCH, "h": Const(call.heads), "i": _QUERIES, "j": keys}
    logits: Expr = apply("mul", call.scale, SCORE)
    if call.softcap is not None:
        logits = apply("mul", call.softcap, apply("tanh", apply("div", logits, call.softcap)))
    reading = _Reading(call, sizes, keys)
    for name in (BIAS, ADDED):
        if name in reading.types:
            logits = apply("add", logits, reading.element(name, "bhij"))
    mask = reading.mask(call.mask) if call.mask else TRUE
    if SELECTED in reading.types:
        mask = simplify(apply("and", mask, reading.element(SELECTED, "bhij")), sizes)
    sink = reading.element(SINKS, "h") if SINKS in reading.types else Const(-math.inf)
    attend = Attend(
        "q",
        "k",
        "v",
        simplify(logits, sizes),
        mask,
        sink=sink,
        kv_head=grouped(call.heads, call.groups),
        norm=Normalizer("softmax", call.dtype, "zero"),
    )
    shared = (Axis("b", _BATCH), Axis("g", Const(call.groups)), Axis("j", keys))
    operands = (
        ("q", (Axis("b", _BATCH), Axis("h", Const(call.heads)), Axis("i", _QUERIES), Axis("d", Const(call.channels)))),
        ("k", (*shared, Axis("d", Const(call.channels)))),
        ("v", (*shared, Axis("e", Const(call.value_channels)))),
    )
    inputs = tuple(Value(name, TensorType(axes, call.dtype)) for name, axes in operands)
    captured = reading.captured((attend.score, attend.mask, attend.sink))
    return Spec(call.site, (*inputs, *captured), (attend,)).verify()


class _Reading:
    """Expressions over the captured tensors of a call, and the types that follow from how they are read."""

    def __init__(self, call: Call, sizes: Mapping[str, Expr], keys: Expr) -> None:
        self.call, self.sizes, self.keys = call, sizes, keys
        self.types = {tensor.name: tensor for tensor in call.tensors}
        self.shapes: dict[str, list[Expr]] = {}

    def element(self, name: str, letters: str) -> Expr:
        """The element of a tensor at these indices; an axis of size 1 is read at 0."""
        return self._load(name, tuple(Index(letter) for letter in letters))

    def mask(self, text: str) -> Expr:
        """The mask of a text, with the positions of the first query and key written as sizes or read from tensors."""
        numbered = [tensor for tensor in self.call.tensors if tensor.name not in BESIDE]
        kinds = {f"t{number}": element_kind(tensor.dtype) for number, tensor in enumerate(numbered)}
        found = simplify(parse_expr(text.removesuffix(ONE_ROW), kinds), self.sizes)
        if text.endswith(ONE_ROW):
            found = substitute(found, {Index("i"): ZERO})
        first: Expr = {"zero": ZERO, "sizes": _FIRST_KEY + self.keys - _QUERIES}.get(
            self.call.offset, Load(QUERY_OFFSET, (ZERO,), element_kind("int64"))
        )
        found = simplify(substitute(found, {_FIRST_QUERY: first}), self.sizes)
        key = Load(KEY_OFFSET, (ZERO,), element_kind("int64")) if self.call.key_offset else ZERO
        found = simplify(substitute(found, {_FIRST_KEY: key}), self.sizes)

        def named(node: Expr) -> Expr | None:
            if isinstance(node, Load) and node.tensor in kinds:
                return self._load(numbered[int(node.tensor[1:])].name, node.indices)
            return None

        return simplify(rewrite(found, named), self.sizes)

    def _load(self, name: str, indices: tuple[Expr, ...]) -> Expr:
        tensor = self.types[name]
        shape = self.shapes.setdefault(name, [])
        places = []
        for axis, (index, fits) in enumerate(zip(indices, tensor.extents, strict=True)):
            letter = index.name.upper() if isinstance(index, Index) else ""
            own = Size(f"N{list(self.types).index(name)}_{axis}")
            if letter and letter in fits:
                size: Expr = self.sizes[letter.lower()]
            elif "1" in fits:
                index, size = ZERO, ONE
            else:
                size = own
            if len(shape) == axis:
                shape.append(size)
            elif shape[axis] == own:  # another element is read along an axis whose size is known
                shape[axis] = size
            places.append(index)
        return Load(name, tuple(places), element_kind(tensor.dtype))

    def captured(self, expressions: tuple[Expr, ...]) -> tuple[Value, ...]:
        """The captured tensors that expressions read, with their types."""
        read = {load.tensor for expr in expressions for load in loads(expr)}
        values = []
        for name, tensor in self.types.items():
            if name in read:
                axes = tuple(Axis(f"a{number}", size) for number, size in enumerate(self.shapes[name]))
                values.append(Value(name, TensorType(axes, tensor.dtype)))
        one = TensorType((Axis("a0", ONE),), "int64")
        return (*values, *(Value(name, one) for name in (QUERY_OFFSET, KEY_OFFSET) if name in read))
