"""Small attention modules with rotary maps, as models write them, for everything that pulls those into a site."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from attncompile.backend.choose import choose_lowering
from attncompile.backend.rewrite import Decision, decide
from attncompile.frontends.aten import aten_graph
from attncompile.frontends.capture import capture_export
from attncompile.lift import lift_graph
from attncompile.passes import parse_passes


@dataclass(frozen=True)
class Shape:
    """How a module rotates.

    Attributes:
        pairs: ``half`` or ``interleaved``; rotated: channels of the 16 of a head that are.
        heads, groups: of queries, and of keys and values.
        keys: what becomes of rotated keys beside the attention: nothing, ``returned`` by the model, ``scaled`` by it
            behind a turn that the attention undoes, or ``cached`` behind those of earlier steps.
        own_angles: whether keys have other angles than queries.
        wide: whether the rotation is computed in float32, whatever the operands are.
        table: whether angles are read from a table at given positions.
    """

    pairs: str = "half"
    rotated: int = 16
    heads: int = 4
    groups: int = 2
    keys: str = ""
    own_angles: bool = False
    wide: bool = False
    table: bool = False


class Rotary(nn.Module):
    """One layer of attention; ``forward(x, past)`` gives the result, and the rotated keys where they are returned."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shape = shape
        self.q = nn.Linear(24, 16 * shape.heads, bias=False)
        self.k = nn.Linear(24, 16 * shape.groups, bias=False)
        self.v = nn.Linear(24, 16 * shape.groups, bias=False)
        count = shape.rotated // 2
        self.register_buffer("frequencies", 100.0 ** (-torch.arange(count) / count))

    def angles(self, positions: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[i,rotated]``."""
        found = positions[:, None].float() * (self.frequencies * factor)
        both = torch.cat([found, found], -1) if self.shape.pairs == "half" else found.repeat_interleave(2, -1)
        return both.cos(), both.sin()

    def rotated(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The tensor ``[b,h,i,d]`` with its first channels rotated."""
        kind = x.dtype
        if self.shape.wide:
            x = x.float()
        else:
            cos, sin = cos.to(kind), sin.to(kind)
        part, rest = x[..., : self.shape.rotated], x[..., self.shape.rotated :]
        if self.shape.pairs == "half":
            first, second = part.chunk(2, -1)
            turned = torch.cat([-second, first], -1)
        else:
            turned = torch.stack([-part[..., 1::2], part[..., 0::2]], -1).flatten(-2)
        return torch.cat([part * cos + turned * sin, rest], -1).to(kind)

    def forward(self, x: torch.Tensor, past: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        shape, (batch, length, _) = self.shape, x.shape
        q, k, v = (
            layer(x).view(batch, length, -1, 16).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        positions = torch.arange(length)
        angles = self.angles(positions, 1.0)
        others = self.angles(positions, 0.5) if shape.own_angles else angles
        if shape.table:
            cos, sin = self.angles(torch.arange(64), 1.0)
            angles = others = (cos[positions], sin[positions])
        q, k = self.rotated(q, *angles), self.rotated(k, *others)
        made = k
        if shape.keys == "cached":
            k = made = torch.cat([past, k], 2)
            v = torch.cat([past, v], 2)
        if shape.keys == "scaled":
            turned = k.transpose(2, 3)
            made, k = 2 * turned, turned.transpose(2, 3)
        k, v = (t.repeat_interleave(shape.heads // shape.groups, 1) for t in (k, v))
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(16), -1)
        out = (weights @ v).transpose(1, 2).flatten(2)
        return (out, made) if shape.keys else out


def inputs(
    shape: Shape, batch: int = 2, length: int = 7, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    """Random states and past keys."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, length, 24, generator=generator)
    past = torch.randn(batch, shape.groups, 3, 16, generator=generator)
    return x.to(dtype), past.to(dtype)


def decided_site(shape: Shape, passes: str) -> Decision:
    """What passes make of the module's site on a CPU."""
    captured = capture_export(Rotary(shape).eval(), inputs(shape), {})
    program = lift_graph(aten_graph(captured), "rotary", blocks=False)
    (decision,) = decide(program, parse_passes(passes), lambda spec: choose_lowering(spec, "cpu"), even_reference=True)
    return decision
