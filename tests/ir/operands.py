"""Attentions of all shapes, for the tests of operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from attncompile.ir import (
    Attend,
)
from attncompile.ir.expr import Expr
from attncompile.ir.operators import Kind
from attncompile.ir.text import parse_expr

KINDS = {"keep": Kind.BOOL, "bias": Kind.FLOAT, "gate": Kind.FLOAT}
LOWEST = torch.finfo(torch.float32).min


def expr(text: str) -> Expr:
    return parse_expr(text, KINDS)


@dataclass(frozen=True)
class Shape:
    """Sizes of an attention: batch, query heads, KV heads, queries, keys, channels of query and value."""

    B: int = 2
    H: int = 2
    G: int = 2
    I: int = 5  # noqa: E741
    J: int = 5
    D: int = 4
    E: int = 4


SHAPES = [
    Shape(),
    Shape(B=1, H=1, G=1, I=1, J=1, D=1, E=1),
    Shape(I=1, J=7),
    Shape(I=7, J=3),
    Shape(H=6, G=2),
    Shape(H=4, G=1, I=3, J=6, D=3, E=5),
]


def operands(shape: Shape) -> dict[str, torch.Tensor]:
    double = torch.float64
    return {
        "q": torch.randn(shape.B, shape.H, shape.I, shape.D, dtype=double),
        "k": torch.randn(shape.B, shape.G, shape.J, shape.D, dtype=double),
        "v": torch.randn(shape.B, shape.G, shape.J, shape.E, dtype=double),
        "keep": torch.rand(shape.B, shape.J) < 0.6,
        "bias": torch.randn(shape.H, shape.I, shape.J, dtype=double),
        "gate": torch.rand(shape.H, dtype=double),
    }


Score = Callable[[float, int, int, int, int], float]
Visible = Callable[[int, int, int, int], bool]


PLAIN = Attend("q", "k", "v", lse="lse")
