"""Normalisation of queries and keys, recognised by numbers: whatever computes RMSNorm is RMSNorm.

Between a value and an earlier one that alone it depends on, the native nodes are run on random inputs. Where the
result is ``w·x/√(mean(x²) + ε) + b``, the same of ``x − mean(x)``, or ``w·x/‖x‖``, for fixed ``w`` and ``b``, that is
what they compute, in whichever way it is written; ``ε`` is read off small inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from attncompile.frontends.graph import Contract, FusedAttention, Graph, Linear, Opaque, Reduce, Softmax
from attncompile.ir import Size
from attncompile.ir.expr import ONE, walk
from attncompile.ir.types import DTYPES, concrete

Kind = Literal["rms", "layer", "l2"]


@dataclass(frozen=True)
class Norm:
    """A normalisation over one axis.

    Attributes:
        kind: RMSNorm, LayerNorm or division by the Euclidean norm.
        source: the value it normalises.
        channels: how many numbers are normalised together.
        epsilon: added to the mean square; 0 where none was seen.
        weights: names of its parameters, or empty.
    """

    kind: Kind
    source: str
    channels: int
    epsilon: float
    weights: tuple[str, ...] = ()


_FARTHEST = 24
"""Steps that a normalisation may be written in."""

_BARRIERS = (Linear, Contract, Softmax, FusedAttention)


def cuts(graph: Graph, value: str) -> Iterator[tuple[str, bool]]:
    """Earlier values of which one alone makes this value, nearest first.

    Yields each with whether anything that reduces or is opaque lies between. Ends at products.
    """
    frontier, reduces = {value}, False
    for _ in range(_FARTHEST):
        latest = max(frontier, key=lambda name: graph.position.get(name, -1))
        node = graph.producer.get(latest)
        if node is None or isinstance(node, _BARRIERS):
            return
        reduces = reduces or isinstance(node, Reduce | Opaque)
        frontier = (frontier - {latest}) | {name for name in node.inputs if name in graph.varying}
        if not frontier:
            return
        if len(frontier) == 1:
            (only,) = frontier
            yield only, reduces


def recognise_norm(graph: Graph, value: str, axis: int) -> Norm | None:
    """The normalisation over a native axis that makes a value, or None."""
    found: Norm | None = None
    if not graph.is_readable(value):
        return None
    for source, reduces in cuts(graph, value):
        known = graph.infos.get(source)  # nothing is known of a value without a rank
        if known is None or known.shape != graph.infos[value].shape or not graph.is_readable(source):
            continue
        if reduces:
            norm = _compared(graph, source, value, axis)
            if norm is None and found is not None:
                return found
            found = norm or found
    return found


def _compared(graph: Graph, source: str, value: str, axis: int) -> Norm | None:
    between = graph.ancestors([value], graph.descendants(source, value)) - {source}
    read = {name for made in between if made in graph.producer for name in graph.producer[made].inputs}
    behind = graph.ancestors(read - between - {source})  # a weight may be computed: one more, another dtype
    given = {name: graph.inputs[name] for name in sorted(behind) if name in graph.inputs}
    wide = [name for name in given if any(size != ONE for size in graph.infos[name].shape)]  # ε is a parameter in ONNX
    named = tuple(given[name].name for name in wide if given[name].role == "parameter" and _real(graph, name))
    exprs = [size for name in (source, *given) for size in graph.infos[name].shape]
    sizes = {node.name: 3 for expr in exprs for node in walk(expr) if isinstance(node, Size)}
    shape = [concrete(size, sizes) for size in graph.infos[source].shape]
    generator = torch.Generator().manual_seed(0)
    feeds = {
        name: torch.rand(
            [concrete(s, sizes) for s in graph.infos[name].shape], generator=generator, dtype=torch.float64
        )
        for name, entry in given.items()
        if entry.value is None and entry.role == "parameter"
    }

    def run(x: torch.Tensor) -> torch.Tensor:
        return graph.evaluate([value], {**feeds, source: x}, sizes)[value].double()

    def drawn(scale: float) -> torch.Tensor:
        return scale * (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3)

    try:
        inputs = [drawn(1e4) for _ in range(4)]
        outputs = [run(x) for x in inputs]
        small = drawn(1e-3)
        result = run(small)
    except (ValueError, RuntimeError, KeyError, TypeError, IndexError):
        return None
    for kind, (centred, spread) in _KINDS.items():
        fitted = _fitted([centred(x, axis) / spread(x, axis).sqrt() for x in inputs], outputs)
        if fitted is None:
            continue
        weight, bias = fitted
        square = (weight * centred(small, axis) / (result - bias)) ** 2 - spread(small, axis)
        epsilon = float(square[square.isfinite()].median()) if bool(square.isfinite().any()) else 0.0
        if epsilon < 1e-15:
            epsilon = 0.0
        plain = torch.full_like(weight, shape[axis] ** -0.5)
        euclidean = kind == "rms" and not named and torch.allclose(weight, plain)
        return Norm("l2" if euclidean else kind, source, shape[axis], float(f"{epsilon:.3g}"), named)
    return None


def _real(graph: Graph, name: str) -> bool:
    return DTYPES[graph.infos[name].dtype].is_floating_point


def _mean_square(x: torch.Tensor, axis: int) -> torch.Tensor:
    return (x * x).mean(axis, keepdim=True)


def _centred(x: torch.Tensor, axis: int) -> torch.Tensor:
    return x - x.mean(axis, keepdim=True)


_Part = Callable[[torch.Tensor, int], torch.Tensor]
_KINDS: dict[Kind, tuple[_Part, _Part]] = {
    "rms": (lambda x, axis: x, _mean_square),
    "layer": (_centred, lambda x, axis: _mean_square(_centred(x, axis), axis)),
}
"""What is divided, and by the root of what."""


def _fitted(inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Weight and bias that make every output of every input, element by element."""
    if any(made.shape != x.shape or not made.numel() for x, made in zip(inputs, outputs, strict=True)):
        return None  # small sizes may leave nothing of a sequence
    weight = (outputs[0] - outputs[1]) / (inputs[0] - inputs[1])
    bias = outputs[0] - weight * inputs[0]
    scale = max(float(made.abs().max()) for made in outputs)
    if not 0 < scale < float("inf"):
        return None
    agree = all(
        bool(((weight * x + bias - made).abs() <= 1e-5 * scale).all())
        for x, made in zip(inputs[2:], outputs[2:], strict=True)
    )
    return (weight, torch.where(bias.abs() <= 1e-9 * scale, 0.0, bias)) if agree else None
