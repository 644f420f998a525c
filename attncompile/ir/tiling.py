"""Orders of the tokens of a grid in which every run of so many tokens is a box of the grid.

A tile of an attention kernel is a run of tokens. In raster order it is a piece of a line; a window around it then
reaches much farther than the window around a box of as many tokens does.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch

from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import Const, Expr, Index, conjunction, where
from attncompile.ir.simplify import simplify

SLOT = Index("i")
"""A place in the new order; the same letter stands for a token in raster order where tokens are meant."""


@dataclass(frozen=True)
class Tiling:
    """An order of the tokens of a grid: box by box, and inside a box in raster order.

    With a ``dilation`` the positions of an axis that have equal remainders come together: boxes are made of those.
    Where boxes do not fill an axis, places past its end hold no token.

    Attributes:
        grid: sizes of the axes, the outermost first.
        box: sizes of a box.
        dilation: for each axis; 1 when left out.
    """

    grid: tuple[int, ...]
    box: tuple[int, ...]
    dilation: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.dilation:
            object.__setattr__(self, "dilation", (1,) * len(self.grid))
        if not len(self.grid) == len(self.box) == len(self.dilation) or min((*self.grid, *self.box)) < 1:
            raise ValueError(f"boxes {self.box} with dilation {self.dilation} do not fit the grid {self.grid}")

    @property
    def counts(self) -> tuple[int, ...]:
        """Boxes along each axis, of one remainder."""
        sizes = zip(self.grid, self.box, self.dilation, strict=True)
        lines = ((math.ceil(size / spread), side) for size, side, spread in sizes)
        return tuple(math.ceil(length / side) for length, side in lines)

    @property
    def tokens(self) -> int:
        """Tokens of the grid."""
        return math.prod(self.grid)

    @property
    def slots(self) -> int:
        """Places of the new order; some are empty where boxes do not fill the grid."""
        return math.prod((*self.counts, *self.box, *self.dilation))

    def coordinates(self, slot: Expr) -> tuple[Expr, ...]:
        """Coordinates of a place; those of an empty one lie outside the grid."""
        axes = range(len(self.grid))
        radices = (*self.dilation, *self.counts, *self.box)
        digits: list[Expr] = []
        for position, radix in enumerate(radices):
            inner = math.prod(radices[position + 1 :])
            outermost = math.prod(radices[:position]) == 1
            digits.append((slot // inner) if outermost else (slot // inner) % radix)
        extents: dict[str, Expr] = {"i": Const(self.slots), "j": Const(self.slots)}
        group, block, inside = (digits[len(axes) * n : len(axes) * (n + 1)] for n in range(3))
        found = ((block[a] * self.box[a] + inside[a]) * self.dilation[a] + group[a] for a in axes)
        return tuple(simplify(each, extents) for each in found)

    def inside(self, slot: Expr) -> tuple[Expr, ...]:
        """What must hold for a place not to be empty."""
        sides = zip(self.counts, self.box, self.dilation, strict=True)
        filled = [count * side * spread for count, side, spread in sides]
        coordinates = zip(self.coordinates(slot), self.grid, filled, strict=True)
        return tuple(each < size for each, size, most in coordinates if most > size)

    def token(self, slot: Expr) -> Expr:
        """The number in raster order of the token at a place, −1 where that is empty."""
        number: Expr = Const(0)
        for coordinate, size in zip(self.coordinates(slot), self.grid, strict=True):
            number = number * size + coordinate
        empty = self.inside(slot)
        extents: dict[str, Expr] = {"i": Const(self.slots), "j": Const(self.slots)}
        return simplify(where(conjunction(empty), number, -1) if empty else number, extents)

    def slot(self, token: Expr) -> Expr:
        """The place of a token."""
        outer: Expr = Const(0)
        inner: Expr = Const(0)
        block: Expr = Const(0)
        for axis, (size, side, spread) in enumerate(zip(self.grid, self.box, self.dilation, strict=True)):
            coordinate = token // math.prod(self.grid[axis + 1 :]) % size
            along = coordinate // spread
            outer = outer * spread + coordinate % spread
            block = block * self.counts[axis] + along // side
            inner = inner * side + along % side
        boxes, places = math.prod(self.counts), math.prod(self.box)
        extents: dict[str, Expr] = {"i": Const(self.tokens), "j": Const(self.tokens)}
        return simplify((outer * boxes + block) * places + inner, extents)


def why_not_rearranged(token: Expr, slot: Expr, tokens: int, slots: int) -> str | None:
    """Why two expressions over ``i`` do not move every token to a place of its own and back, or ``None``.

    The law: every place holds a token ``0 ≤ token(i) < tokens`` or is empty (any other number); each token stands at
    exactly one place; and ``slot`` says at which. Looked at for every place and every token.

    Args:
        token: number of the token at place ``i``.
        slot: place of token ``i``.
        tokens, slots: how many there are.
    """

    def values(expr: Expr, length: int) -> torch.Tensor:
        grid = {"i": torch.arange(length)}
        return evaluate(expr, Environment(grid, {})).to(torch.int64).expand(length)

    placed = values(token, slots)
    held = (placed >= 0) & (placed < tokens)
    counts = torch.bincount(placed[held], minlength=tokens)
    if int(counts.min()) != 1 or int(counts.max()) != 1:
        wrong = int((counts != 1).nonzero()[0])
        return f"token {wrong} of {tokens} stands at {int(counts[wrong])} of {slots} places"
    found = values(slot, tokens)
    if bool(((found < 0) | (found >= slots)).any()) or not torch.equal(placed[found], torch.arange(tokens)):
        return f"{slot} does not say where {token} places the tokens"
    return None


def read_tiling(token: Expr, tokens: int, slots: int, box: int) -> Tiling | None:
    """The order that an expression over ``i`` describes, if it is one of boxes of so many tokens without dilation.

    Every side of a box must be at least 2. The order that is found is compared with the expression at every place.
    """
    values = evaluate(token, Environment({"i": torch.arange(slots)}, {})).expand(slots)
    steps = [int(values[1 << power]) for power in range(box.bit_length() - 1)]  # where the doubled place leads
    sides: list[int] = []
    strides: list[int] = []
    for step in steps:
        if sides and step == strides[-1] * sides[-1]:
            sides[-1] *= 2
        else:
            strides.append(step)
            sides.append(2)
    strides, sides = strides[::-1], sides[::-1]
    if not strides or strides[-1] != 1 or min(strides) < 1 or math.prod(sides) != box or tokens % strides[0]:
        return None
    grid = [tokens // strides[0]]
    for outer, inner in itertools.pairwise(strides):
        if outer % inner:
            return None
        grid.append(outer // inner)
    found = Tiling(tuple(grid), tuple(sides))
    same = found.slots == slots and torch.equal(
        evaluate(found.token(SLOT), Environment({"i": torch.arange(slots)}, {})).expand(slots), values
    )
    return found if same else None


__all__ = ["SLOT", "Tiling", "read_tiling", "why_not_rearranged"]
