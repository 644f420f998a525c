"""Rotary position maps, recognised by what they compute: linear in three neighbours of one tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch

from attncompile.frontends.graph import Extents, Indices
from attncompile.ir import Expr, Index, Kind, Load, Position, Size, simplify
from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import Apply, Const, loads, rewrite, substitute, symbols, walk

_D = Index("d")
_Partner = tuple[int, torch.Tensor]

SOURCE = "x"
"""What the rotated tensor is called in an element given to :func:`rotary_map`."""


@functools.lru_cache(maxsize=128)  # the layers of a model rotate alike
def rotary_map(element: Expr, extents: Extents) -> tuple[Position, Indices] | None:
    """The position map that an element of its result states, whichever part of the channels it rotates.

    Args:
        element: over ``b h i d``, with loads of :data:`SOURCE`.
        extents: sizes of those indices.

    Returns:
        The map, and the indices of the source's element at the same place; ``None`` where it is no rotation.
    """
    sizes = dict(extents)
    channels = sizes["d"]
    assert isinstance(channels, Const)
    for count in _rotated_channels(element, int(channels.value)):
        part = simplify(element, {**sizes, "d": Const(count)})
        left = int(channels.value) - count
        rest = simplify(substitute(element, {_D: _D + count}), {**sizes, "d": Const(left)}) if left else None
        for convention, (ahead, behind) in _CONVENTIONS.items():
            found = _rotary(part, rest, count, convention, (ahead(count), behind(count)))
            if found is not None:
                return found
    return None


_CONVENTIONS: dict[str, tuple[Callable[[int], _Partner], Callable[[int], _Partner]]] = {
    "half": (
        lambda count: (count // 2, torch.arange(count) < count // 2),
        lambda count: (-count // 2, torch.arange(count) >= count // 2),
    ),
    "interleaved": (
        lambda count: (1, torch.arange(count) % 2 == 0),
        lambda count: (-1, torch.arange(count) % 2 == 1),
    ),
}
"""How far away the partner of a channel is, and for which channels, by the number of rotated channels."""


def _rotated_channels(element: Expr, channels: int) -> list[int]:
    """How many of the first channels could be rotated: those before a channel where the expression changes, or all."""
    edges = {
        int(c.value)
        for node in walk(element)
        if isinstance(node, Apply) and node.result is Kind.BOOL and _D in node.arguments
        for c in node.arguments
        if isinstance(c, Const)
    }
    return [*sorted(c for c in edges if 0 < c < channels and c % 2 == 0), channels]


def _distances(load: Load, base: Load, channels: int) -> torch.Tensor | None:
    """How far from the base the channel is that a load reads, for every channel; ``None`` if they differ
    otherwise.
    """
    indices = {name: torch.zeros((), dtype=torch.int64) for name in "bhi"} | {"d": torch.arange(channels)}
    if load.tensor != base.tensor:
        return None
    apart = [simplify(one - other) for one, other in zip(load.indices, base.indices, strict=True)]
    moved = [by for by in apart if by != Const(0)]
    if len(moved) > 1 or any(symbols(by) - {_D} for by in moved):
        return None
    return sum((evaluate(by, Environment(indices)) for by in moved), torch.zeros(channels, dtype=torch.int64))


def _rotary(
    element: Expr, rest: Expr | None, channels: int, convention: str, partners: tuple[_Partner, _Partner]
) -> tuple[Position, Indices] | None:
    """Read cos and sin off an element that is linear in three neighbours of one tensor; then check the whole
    claim.
    """
    rotated = [load for load in loads(element) if load.tensor == SOURCE]
    if len(rotated) != 3:
        return None
    for base in rotated:
        distances = {load: _distances(load, base, channels) for load in rotated if load != base}
        if any(found is None for found in distances.values()):
            return None
        ahead, behind = (
            next(
                (load for load, found in distances.items() if found is not None and bool((found[where] == by).all())),
                None,
            )
            for by, where in partners
        )
        if ahead is None or behind is None or ahead == behind:
            continue
        after = Load(
            base.tensor,
            tuple(simplify(substitute(i, {_D: _D + channels})) for i in base.indices),
            base.element,
        )
        if rest is not None and rest != after:
            continue  # the channels behind the rotated ones must pass through
        cos = _zero_free(simplify(substitute(element, {base: Const(1.0), ahead: Const(0.0), behind: Const(0.0)})))
        sin = _zero_free(simplify(substitute(element, {base: Const(0.0), ahead: Const(-1.0), behind: Const(1.0)})))
        if {n.name for e in (cos, sin) for n in symbols(e) if isinstance(n, Index)} - {"b", "i", "d"}:
            continue
        position = Position(SOURCE, cos, sin, channels, convention)
        steps = {
            base: torch.zeros(channels, dtype=torch.int64),
            **{k: v for k, v in distances.items() if v is not None},
        }
        if _confirmed(element, position, steps):
            return position, base.indices
    return None


def _zero_free(expr: Expr) -> Expr:
    """Drop products with a literal 0.0, which stand for the neighbours that were left out."""

    def visit(node: Expr) -> Expr | None:
        match node:
            case Const(value) if isinstance(value, float) and value == 0:
                return Const(0.0)  # the sign of zero is of no interest here, and keeps equal branches apart
            case Apply("mul", arguments) if Const(0.0) in arguments:
                return Const(0.0)
        return None

    while (shorter := simplify(rewrite(expr, visit))) != expr:
        expr = shorter
    return expr


def _confirmed(element: Expr, position: Position, distances: Mapping[Load, torch.Tensor]) -> bool:
    """Compare element and claim on random numbers for every channel."""
    generator = torch.Generator().manual_seed(0)
    channels = torch.arange(position.channels)
    x = torch.randn(position.channels, dtype=torch.float64, generator=generator)
    if position.convention == "half":
        first, second = x.chunk(2)
        partner = torch.cat([-second, first])
    else:
        partner = torch.stack([-x[1::2], x[0::2]], dim=-1).flatten()
    others = [load for load in loads(element) if load not in distances]
    tensors = {}
    for load in others:
        shape = [position.channels if _D in symbols(index) else 2 for index in load.indices]
        drawn = torch.randn(shape, dtype=torch.float64, generator=generator)
        tensors[load.tensor] = drawn if load.element is Kind.FLOAT else drawn.abs().round().long()
    environment = Environment(
        {"d": channels, **{n: torch.zeros((), dtype=torch.int64) for n in "bhi"}},
        {n.name: 2 for n in symbols(element) if isinstance(n, Size)},
        tensors,
    )
    # the element as a linear form of the neighbours: the coefficient of one is the form's value at 1 there
    # and 0 elsewhere
    total = torch.zeros(position.channels, dtype=torch.float64)
    try:
        for load, distance in distances.items():
            alone = substitute(element, {other: Const(1.0 if other == load else 0.0) for other in distances})
            source = (channels + distance).clamp(0, position.channels - 1)
            total = total + evaluate(alone, environment).expand(position.channels) * x[source]
        cos, sin = evaluate(position.cos, environment), evaluate(position.sin, environment)
    except RuntimeError:  # a size of 2 makes a divisor zero: nothing is confirmed at such sizes
        return False
    return bool(torch.allclose(total, x * cos + partner * sin, rtol=1e-9, atol=1e-9))
