"""Rows of neighbourhood attention at awkward shapes, their tokens moved into boxes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attncompile.ir import Spec, parse_spec
from attncompile.ir.neighbourhood import neighbourhood
from attncompile.ir.rearrange import arranged, best_arrangement, read_grid
from tests.cases import Case


@dataclass(frozen=True)
class Neighbourhood:
    """One row.

    Attributes:
        name: the test id.
        grid, window: sizes of the axes.
        dilation, stride, causal: of each axis; empty where there is none.
        batch, heads, groups, channels: sizes; ``groups`` is the number of query heads that share a key head.
        score: the score, over coordinates too.
    """

    name: str
    grid: tuple[int, ...]
    window: tuple[int, ...]
    dilation: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    causal: tuple[bool, ...] = ()
    batch: int = 1
    heads: int = 2
    groups: int = 1
    channels: int = 16
    score: str = "0.125·s"

    @property
    def case(self) -> Case:
        """The row in raster order."""
        mask = neighbourhood(
            self.grid, self.window, dilation=self.dilation, stride=self.stride, causal=self.causal
        )
        tokens, keys = math.prod(self.grid), self.heads // self.groups
        lines = [
            f"{self.name}   attend  q[{self.batch},{self.heads},{tokens},{self.channels}]  "
            f"k,v[{self.batch},{keys},{tokens},{self.channels}]  bfloat16",
            f"score  {self.score}",
            f"mask   {mask}",
            *([f"kv_head h // {self.groups}"] if self.groups > 1 else []),
            "norm   softmax (float32)",
        ]
        return Case(self.name, "\n  ".join(lines), {})

    def moved(self, queries: int, keys: int) -> Spec:
        """The Spec with its tokens in boxes of so many queries and keys, whether that pays or not."""
        spec = parse_spec(self.case.text)
        attend = spec.attend()
        assert attend is not None
        grid = read_grid(attend.mask, math.prod(self.grid))
        assert grid is not None
        return arranged(spec, best_arrangement(grid, queries, keys))


NEIGHBOURHOODS = (
    Neighbourhood("plane", (16, 24), (5, 7)),
    Neighbourhood("even-window", (12, 20), (4, 6), batch=2),
    Neighbourhood("odd-grid", (17, 23), (5, 8), groups=2, channels=24),
    Neighbourhood("dilated", (10, 13), (3, 4), (2, 3), (1, 2)),
    Neighbourhood("dilated-even", (12, 20), (3, 5), (2, 2), channels=32),
    Neighbourhood("strided", (16, 24), (8, 8), (), (4, 8), channels=128),
    Neighbourhood("wider-than-the-grid", (6, 7, 5), (3, 9, 2), (), (), (True, False, False)),
    Neighbourhood("volume", (5, 6, 10), (3, 5, 5), batch=2),
    Neighbourhood("causal-frames", (5, 8, 8), (3, 5, 3), (), (), (True, False, False), groups=2),
    Neighbourhood("line-bias", (12, 11), (5, 5), score="0.125·s − 0.05·abs(float(i % 11 − j % 11))"),
)
NEIGHBOURHOODS_BY_NAME = {row.name: row for row in NEIGHBOURHOODS}
