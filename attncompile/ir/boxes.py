"""Boxes of query and key positions, and what a mask does in each of them.

What a mask loads is unknown unless the tensor is given. Then the elements that a box reads are bounded by
their least and their largest, found in a sparse table (least and largest of every run of 2ⁿ elements), so
that padding and documents are decided without looking at every position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from attncompile.ir.expr import ZERO, Expr, Index, Load, rewrite, symbols
from attncompile.ir.intervals import Interval, bounds, classify
from attncompile.ir.simplify import simplify

_PART = 1 << 13
"""Boxes that are worked on at a time."""

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Boxes:
    """Boxes of positions, first and last of both sides.

    Attributes:
        tile: which tile each box is part of.
        query_low, query_high, key_low, key_high: float64, one number per box; both ends belong to the box.
    """

    tile: Numbers
    query_low: Numbers
    query_high: Numbers
    key_low: Numbers
    key_high: Numbers

    def __len__(self) -> int:
        return len(self.tile)

    def __getitem__(self, which: Numbers | slice) -> Boxes:
        return Boxes(*(getattr(self, f.name)[which] for f in fields(self)))

    @property
    def are_points(self) -> Numbers:
        """Which boxes are one position."""
        points: Numbers = (self.query_low == self.query_high) & (self.key_low == self.key_high)
        return points

    @property
    def positions(self) -> Numbers:
        """How many positions each box holds."""
        count: Numbers = (self.query_high - self.query_low + 1) * (self.key_high - self.key_low + 1)
        return count

    def parts(self) -> Iterator[Boxes]:
        """The boxes, some thousands at a time: arithmetic on them keeps a number for every node and box."""
        for start in range(0, len(self), _PART):
            yield self[slice(start, start + _PART)]

    def point(self, query: float, key: float) -> Boxes:
        """The position at these fractions of each box."""
        i = np.round(self.query_low + query * (self.query_high - self.query_low))
        j = np.round(self.key_low + key * (self.key_high - self.key_low))
        return Boxes(self.tile, i, i, j, j)

    def halves(self) -> Boxes:
        """Each box cut in two across its longer side."""
        tall = self.query_high - self.query_low >= self.key_high - self.key_low
        middle_query = np.floor((self.query_low + self.query_high) / 2)
        middle_key = np.floor((self.key_low + self.key_high) / 2)
        first = (
            self.tile,
            self.query_low,
            np.where(tall, middle_query, self.query_high),
            self.key_low,
            np.where(tall, self.key_high, middle_key),
        )
        second = (
            self.tile,
            np.where(tall, middle_query + 1, self.query_low),
            self.query_high,
            np.where(tall, self.key_low, middle_key + 1),
            self.key_high,
        )
        return Boxes(*(np.concatenate(sides) for sides in zip(first, second, strict=True)))


class _Extremes:
    """Least and largest element of any run of a line of numbers."""

    def __init__(self, line: Numbers) -> None:
        self.levels = [(line, line)]
        run = 1
        while 2 * run <= len(line):
            low, high = self.levels[-1]
            self.levels.append((np.minimum(low[:-run], low[run:]), np.maximum(high[:-run], high[run:])))
            run *= 2

    def between(self, first: Numbers, last: Numbers) -> Interval:
        """Bounds of the elements from ``first`` to ``last``, both included."""
        first, last = np.broadcast_arrays(first, last)
        level = np.floor(np.log2(last - first + 1)).astype(np.int64)
        low, high = np.empty(first.shape), np.empty(first.shape)
        for n in np.unique(level):
            here = level == n
            start, end = first[here], last[here] - (1 << int(n)) + 1
            least, largest = self.levels[int(n)]
            low[here] = np.minimum(least[start], least[end])
            high[here] = np.maximum(largest[start], largest[end])
        return Interval(low, high)


def _narrow(line: Numbers) -> Numbers:
    """Whole numbers in the smallest type that holds them: there is a copy for every power of two."""
    if line.dtype == np.bool_:
        return line.astype(np.int8)
    if np.issubdtype(line.dtype, np.integer):
        return line.astype(np.result_type(np.min_scalar_type(line.min()), np.min_scalar_type(line.max())))
    return line.astype(np.float64)


def _places(index: Expr, box: Mapping[str, Interval], extent: int) -> tuple[Numbers, Numbers]:
    """First and last element that an index reads in boxes of positions, clamped into the axis."""
    found = bounds(index, box)
    low, high = (
        np.clip(np.nan_to_num(np.asarray(side, dtype=float), posinf=extent, neginf=0), 0, extent - 1)
        for side in (found.low, found.high)
    )
    return low.astype(np.int64), high.astype(np.int64)


@dataclass(frozen=True)
class _Line:
    """A load of known elements along one moving index.

    Attributes:
        name: what the load is called in the mask.
        index: over ``i`` and ``j``.
        extremes: of the elements along that index.
    """

    name: str
    index: Expr
    extremes: _Extremes

    def range(self, box: Mapping[str, Interval]) -> Interval:
        """Bounds of the elements that boxes of positions read."""
        return self.extremes.between(*_places(self.index, box, len(self.extremes.levels[0][0])))


@dataclass(frozen=True)
class _Grid:
    """A load of known elements along several moving indices: bounded as a whole, exact at a position."""

    name: str
    indices: tuple[Expr, ...]
    elements: Numbers

    def range(self, box: Mapping[str, Interval]) -> Interval:
        """Bounds of the elements that boxes of positions read."""
        places = [_places(index, box, extent) for index, extent in zip(self.indices, self.elements.shape, strict=True)]
        first = np.broadcast_arrays(*(low for low, _ in places))
        exact = np.logical_and.reduce(np.broadcast_arrays(*(low == high for low, high in places)))
        found = self.elements[tuple(first)]
        low, high = self.elements.min(), self.elements.max()
        return Interval(np.where(exact, found, low), np.where(exact, found, high))


class Sight:
    """A mask over ``i`` and ``j``, ready to be classified in boxes of positions.

    Args:
        mask: truth value over ``b h i j``.
        given: ranges of other symbols and of tensor elements.
        tensors: tensors that it loads, as far as they are known. Elements along one moving index are bounded
            exactly; those along two (a mask that is a matrix) as a whole, until a box is one position.
    """

    def __init__(
        self, mask: Expr, given: Mapping[str, Interval], tensors: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self.given = given
        self.known: list[_Line | _Grid] = []
        self.extremes: dict[tuple[str, str], _Extremes] = {}
        self.mask = simplify(mask)
        if tensors:
            self.mask = rewrite(self.mask, lambda node: self._replaced(node, tensors))

    def _replaced(self, node: Expr, tensors: Mapping[str, torch.Tensor]) -> Expr | None:
        if not isinstance(node, Load) or node.tensor not in tensors:
            return None
        tensor = tensors[node.tensor]
        moving = [n for n, index in enumerate(node.indices) if symbols(index) & {Index("i"), Index("j")}]
        place: list[int | slice] = [slice(None)] * len(node.indices)
        for axis, (index, extent) in enumerate(zip(node.indices, tensor.shape, strict=True)):
            if axis not in moving:
                low, high = _places(index, self.given, extent)
                if np.any(low != high):
                    return None
                place[axis] = int(low)
        elements = tensor[tuple(place)].numpy()
        if not elements.size or np.isnan(elements).any():
            return None
        name = f"{node.tensor}@{len(self.known)}"
        if len(moving) > 1:
            self.known.append(_Grid(name, tuple(node.indices[axis] for axis in moving), elements))
        else:
            line = (node.tensor, str(place))
            if line not in self.extremes:
                self.extremes[line] = _Extremes(_narrow(elements.reshape(-1)))
            index = node.indices[moving[0]] if moving else ZERO
            self.known.append(_Line(name, index, self.extremes[line]))
        return Load(name, node.indices, node.element)

    def classify(self, queries: Interval, keys: Interval) -> np.ndarray[Any, np.dtype[np.int8]]:
        """Visibility of the mask where queries and keys lie in these ranges."""
        box = {**self.given, "i": queries, "j": keys}
        for load in self.known:
            box[load.name] = load.range(box)
        return classify(self.mask, box)

    def in_boxes(self, boxes: Boxes) -> np.ndarray[Any, np.dtype[np.int8]]:
        """Visibility of the mask in each box."""
        found = [
            np.broadcast_to(
                self.classify(Interval(part.query_low, part.query_high), Interval(part.key_low, part.key_high)),
                len(part),
            )
            for part in boxes.parts()
        ]
        return np.concatenate(found) if found else np.zeros(0, np.int8)
