"""Values of the symbolic sizes that a proof runs on: small ones that keep what the example had in common."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from attncompile.frontends.graph import Graph
from attncompile.ir import Expr, Size, Spec
from attncompile.ir.evaluate import Environment, evaluate, index_grid
from attncompile.ir.expr import Const, Load, loads, walk
from attncompile.ir.types import concrete
from attncompile.lift.program import Binding, Region

INSTANCES = ((2, 5, 7, 11, 3, 13), (3, 6, 4, 9, 5, 8))
"""Values given to the symbolic sizes, one per distinct example size, in ascending order of the example sizes.
"""

GROWN = (4, 16, 64)
"""Factors of the small values where those do not run (a convolution leaves nothing of a short sequence), or where
some number of blocks would be 1 in every instance, which hides the order of blocks and rows.
"""

SEARCHED = range(2, 14)
"""Values tried for sizes that only data decide."""

LARGEST_MAP = 10**8
"""Elements of the attention map (all rows and heads) up to which a proof is computed."""


def instances(graph: Graph, spec: Spec, region: Region) -> Iterator[dict[str, int]]:
    """Values of the symbolic sizes to run on: small ones first, then such as may fit together where those do not.

    The sizes of the example surely do. Sizes that only data decide have no example; two at most are searched, because
    the graph asks that they multiply to some other size, for instance. A number that no shape shows, such as the width
    of a window, is what it was in the example.
    """
    for values in _shown_sizes(graph, spec, region):
        yield {**graph.size_hints, **values}


def _shown_sizes(graph: Graph, spec: Spec, region: Region) -> Iterator[dict[str, int]]:
    """Values of the sizes that shapes show."""
    exprs = _all_sizes(graph, spec, region)
    names = sorted({node.name for expr in exprs for node in walk(expr) if isinstance(node, Size)})
    small = [_size_values(graph, exprs, instance) for instance in (INSTANCES if names else INSTANCES[:1])]
    grown = (_size_values(graph, exprs, tuple(factor * size for size in INSTANCES[-1])) for factor in GROWN)
    if len(small) > 1 and _single_blocks(exprs, small[-1]):
        small[-1] = next((values for values in grown if not _single_blocks(exprs, values)), small[-1])
    yield from small
    for values in small:
        try:
            reached = _reaching(graph, spec, region, values)
        except (ValueError, RuntimeError):  # a size that no shape tells, or none at all
            continue
        if reached != values:
            yield reached
    hinted = {name: graph.size_hints[name] for name in names if name in graph.size_hints}
    searched = [name for name in names if name not in hinted]
    if hinted and not searched:
        yield {**small[0], **hinted}
        for factor in GROWN:
            yield _size_values(graph, exprs, tuple(factor * size for size in INSTANCES[0]))
    elif 0 < len(searched) <= 2:
        for found in itertools.product(SEARCHED, repeat=len(searched)):
            yield {**small[0], **dict(zip(searched, found, strict=True))}


def _all_sizes(graph: Graph, spec: Spec, region: Region) -> list[Expr]:
    """Every axis size in and around a region, and the graph's sizes that the Spec's expressions read."""
    exprs: list[Expr] = [s for b in (*region.inputs, *region.outputs) for s in graph.infos[b.value].shape]
    stated = [e for operation in spec.operations for e in operation.expressions()]
    stated += [size for value in spec.inputs for size in value.type.sizes]
    exprs += {node for e in stated for node in walk(e) if isinstance(node, Size) and node.name in graph.size_hints}
    inside = set(region.nodes)
    for value, info in graph.infos.items():
        if graph.owner.get(value) in inside:
            exprs += info.shape
    return exprs


def _size_values(graph: Graph, exprs: list[Expr], instance: tuple[int, ...]) -> dict[str, int]:
    """Small values for the symbolic sizes that keep the example's coincidences.

    Sizes with one example value get one value here; a size that in the example equals a compound size of the
    graph (the length of a mask and ``cache + 1``) follows that compound size.
    """
    symbols = {node.name for expr in exprs for node in walk(expr) if isinstance(node, Size)}
    values = _plain_values(graph, symbols, instance)
    hints = {name: hint for name in symbols if (hint := graph.size_hints.get(name)) is not None}
    compound = [
        e
        for e in dict.fromkeys(exprs)
        if not isinstance(e, Size | Const) and all(n.name in hints for n in walk(e) if isinstance(n, Size))
    ]
    for name, hint in hints.items():
        for expr in compound:
            inside = {n.name for n in walk(expr) if isinstance(n, Size)}
            if name not in inside and concrete(expr, hints) == hint:
                values[name] = concrete(expr, values)
    return values


def _plain_values(graph: Graph, symbols: set[str], instance: tuple[int, ...]) -> dict[str, int]:
    hints = {name: graph.size_hints.get(name) for name in symbols}
    distinct = sorted({hint for hint in hints.values() if hint is not None})
    values = {hint: instance[n % len(instance)] + 10 * (n // len(instance)) for n, hint in enumerate(distinct)}
    free = iter(range(len(distinct), len(distinct) + len(symbols)))
    return {
        name: values[hint] if hint is not None else instance[next(free) % len(instance)]
        for name, hint in sorted(hints.items())
    }


def bound_sizes(
    spec: Spec, feeds: Mapping[str, tuple[Binding, torch.Tensor]], graph: Graph, values: Mapping[str, int]
) -> dict[str, int]:
    """Values of the Spec's sizes, read off native shapes: an operand's axis has the native axes' size."""
    found: dict[str, int] = {}
    joined: list[tuple[list[Expr], int]] = []
    for value in spec.inputs:
        binding, tensor = feeds[value.name]
        if binding.layout is None:
            joined += [([axis.size], int(n)) for axis, n in zip(value.type.axes, tensor.shape, strict=False)]
        else:
            axes = [[value.type.size(name) for name in group] for group in binding.layout.groups]
            joined += zip(axes, binding.layout.extents(tensor.shape), strict=True)
    for group, extent in sorted(joined, key=lambda entry: len(entry[0])):
        open_sizes = [size for size in group if isinstance(size, Size) and size.name not in found]
        rest = [size for size in group if size not in open_sizes]
        if len(open_sizes) != 1 or any(n.name not in found for s in rest for n in walk(s) if isinstance(n, Size)):
            continue
        known = math.prod(concrete(size, found) for size in rest)
        if known and extent % known == 0:
            found[open_sizes[0].name] = extent // known
    return found


def _reaching(graph: Graph, spec: Spec, region: Region, values: Mapping[str, int]) -> dict[str, int]:
    """The values, with every captured tensor at least as long as the Spec reads it.

    Nothing in a graph relates the length of a mask of which every hundredth element is read to the number of keys.
    """
    attend = spec.attend()
    bindings = {binding.name: binding for binding in region.inputs}
    if attend is None or not {attend.query, attend.key} <= bindings.keys():
        return dict(values)
    shapes = {name: graph.infos[binding.value].shape for name, binding in bindings.items()}
    stored = {name: torch.empty([concrete(s, values) for s in shape], device="meta") for name, shape in shapes.items()}
    sizes = {**values, **bound_sizes(spec, {n: (b, stored[n]) for n, b in bindings.items()}, graph, values)}
    types = spec.types()
    extents = [*types[attend.query].sizes[:3], types[attend.key].sizes[2]]
    lengths = [concrete(size, sizes) for size in extents]
    if max(lengths) > LARGEST_MAP:
        return dict(values)
    grid = index_grid(dict(zip("bhij", lengths, strict=True)), "cpu")
    reached = dict(values)
    for load in (node for expr in attend.expressions() for node in walk(expr) if isinstance(node, Load)):
        for index, size in zip(load.indices, shapes.get(load.tensor, ()), strict=False):
            if isinstance(size, Size) and not loads(index):
                last = int(evaluate(index, Environment(grid, sizes)).max())
                reached[size.name] = max(reached.get(size.name, 0), last + 1)
    return reached


def _single_blocks(exprs: Sequence[Expr], values: Mapping[str, int]) -> bool:
    """Whether a compound size, such as a number of blocks, is at most 1."""
    compound = [expr for expr in dict.fromkeys(exprs) if not isinstance(expr, Size | Const)]
    known = [expr for expr in compound if all(n.name in values for n in walk(expr) if isinstance(n, Size))]
    return any(concrete(expr, values) <= 1 for expr in known)


__all__ = ["INSTANCES", "LARGEST_MAP", "bound_sizes", "instances"]
