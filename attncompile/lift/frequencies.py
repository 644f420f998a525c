"""What the angles of a rotary position map say: base, scaling and attention factor, read off their values.

The angle of channel pair ``n`` of ``R/2`` at position ``t`` is ``t·f_n``. Unscaled, ``f_n = base^(−2n/R)``. The known
scalings divide frequencies by a factor: all of them (linear), or the low ones with a ramp between, which is straight
in the channel (YaRN, arXiv:2309.00071) or in the frequency (Llama 3.1); anything else is a factor for each channel
(LongRoPE, arXiv:2402.13753). A changed base (dynamic NTK) cannot be told from another base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from attncompile.frontends.graph import Graph
from attncompile.ir import Expr, Index, Kind, Position, Size
from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import loads, symbols

Scaling = Literal["none", "linear", "yarn", "llama3", "each channel"]


@dataclass(frozen=True)
class Frequencies:
    """The frequencies of a rotary map.

    Attributes:
        base: of the unscaled frequencies; None where a factor for each channel hides it.
        scaling: which of the known scalings they follow.
        factor: by which the lowest frequency is divided.
        attention: factor of the rotated vectors (YaRN's ``mscale``), 1 for a plain rotation.
    """

    base: float | None
    scaling: Scaling = "none"
    factor: float = 1.0
    attention: float = 1.0

    def __str__(self) -> str:
        parts = [f"base {self.base:g}"] if self.base is not None else []
        if self.scaling == "each channel":
            parts.append("scaled by a factor for each channel")
        elif self.scaling != "none":
            parts.append(f"{self.scaling} scaling by {self.factor:.4g}")
        if self.attention != 1.0:
            parts.append(f"attention factor {self.attention:.4g}")
        return ", ".join(parts)


def read_frequencies(graph: Graph, position: Position) -> Frequencies | None:
    """Base and scaling of a rotary map over native values; None where its angles are no constants of the graph.

    Cosine and sine are evaluated at positions 1, 2 and 3: the angle must be the multiple of that at 1.
    """
    seen = [_at(graph, position, step) for step in (1, 2, 3)]
    if any(pair is None for pair in seen):
        return None
    (cos, sin), *later = [pair for pair in seen if pair is not None]
    angle, size = torch.atan2(sin, cos), torch.hypot(cos, sin)
    attention = float(size[0])
    if attention <= 0 or not torch.allclose(size, size[:1].expand_as(size), rtol=1e-4):
        return None
    for step, (later_cos, later_sin) in enumerate(later, start=2):
        expected = torch.stack([torch.cos(step * angle), torch.sin(step * angle)]) * attention
        if not torch.allclose(torch.stack([later_cos, later_sin]), expected, atol=1e-3 * attention):
            return None
    half = position.channels // 2
    pairs = angle[:half] if position.convention == "half" else angle[0::2]
    found = classify_frequencies(pairs)
    if found is None:
        return None
    return Frequencies(found.base, found.scaling, found.factor, 1.0 if abs(attention - 1) < 1e-4 else attention)


def _at(graph: Graph, position: Position, step: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Cosine and sine of every channel at one position."""
    read = {load.tensor: load for expr in (position.cos, position.sin) for load in loads(expr)}
    tensors = {}
    for name, load in read.items():
        given = graph.inputs.get(name)
        if given is not None and given.value is not None:
            tensors[name] = given.value.detach().cpu()
        elif load.element is Kind.INT:  # the positions of the tokens
            tensors[name] = torch.full((1,) * len(load.indices), step)
        else:
            return None
    sizes = {node.name: graph.size_hints.get(node.name, 1) for e in (position.cos, position.sin) for node in _sizes(e)}
    channels = torch.arange(position.channels)
    indices = {"b": torch.tensor(0), "h": torch.tensor(0), "i": torch.tensor(step), Index("d").name: channels}
    environment = Environment(indices, sizes, tensors)
    try:
        cos, sin = (evaluate(expr, environment) for expr in (position.cos, position.sin))
    except (RuntimeError, IndexError):  # a table that ends before the position, a grid of no width
        return None
    return cos.expand(position.channels), sin.expand(position.channels)


def _sizes(expr: Expr) -> list[Size]:
    return [node for node in symbols(expr) if isinstance(node, Size)]


_CLOSE = 2e-3
"""Relative difference of frequencies that are called equal: tables are often kept in 16 bits."""


def classify_frequencies(frequencies: torch.Tensor) -> Frequencies | None:
    """Base and scaling of the frequencies ``f_0 ≥ f_1 ≥ …`` of the channel pairs; None for fewer than two."""
    found = frequencies.double()
    count = found.numel()
    if count < 2 or not bool((found > 0).all()):
        return None
    ratio = float(found[1] / found[0])
    if not 0 < ratio < 1:
        return None
    base = ratio**-count
    whole = float((found[-1] / found[0]) ** (-count / (count - 1)))
    if math.isclose(base, whole, rel_tol=_CLOSE * count):
        base = whole  # over all channels the rounding of each matters least
    exact = base ** (-torch.arange(count, dtype=torch.float64) / count)
    scale = found / exact
    if bool(((scale / scale[0] - 1).abs() < _CLOSE).all()):
        factor = float(1 / scale[0])
        linear = abs(factor - 1) > _CLOSE
        return Frequencies(_rounded(base), "linear" if linear else "none", factor if linear else 1.0)
    low = float(scale[-1])
    kept, scaled = (scale - 1).abs() < _CLOSE, (scale / low - 1).abs() < _CLOSE
    falling = bool((scale[1:] <= scale[:-1] * (1 + _CLOSE)).all())
    if bool(kept[0]) and falling and low < 1:
        between = (~kept & ~scaled).nonzero().flatten()
        share = (scale[between] - low) / (1 - low)
        if between.numel() < 3:
            return Frequencies(_rounded(base), "each channel")
        for scaling, along in (("yarn", between.double()), ("llama3", exact[between])):
            if _straight(along, share):
                return Frequencies(_rounded(base), scaling, 1 / low)  # type: ignore[arg-type]
    return Frequencies(None, "each channel")


def _straight(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether points lie on a line."""
    slope = (y[-1] - y[0]) / (x[-1] - x[0])
    return bool(((y[0] + slope * (x - x[0]) - y).abs() < 5e-3).all())


def _rounded(base: float) -> float:
    """A base with four significant digits, which is what constants of 32 bits tell."""
    return round(base, 3 - math.floor(math.log10(base))) if base > 0 else base
