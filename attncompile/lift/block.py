"""The block around a site: rotary position maps and projections, recognised by what they compute."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from attncompile.frontends.graph import Cast, Graph, Linear, Move, Pointwise
from attncompile.ir import Expr, Index, Load, Operation, Position, Project, RefusalError, Spec, simplify
from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import Apply, Const, loads, rewrite, substitute, symbols
from attncompile.lift.interpret import Interpreter
from attncompile.lift.program import Binding, Layout, Site

_D = Index("d")


def attach_block(graph: Graph, site: Site) -> tuple[Operation, ...]:
    """What surrounds a site's operands: position maps of query and key, and the projections behind them."""
    if site.region is None or site.spec is None:
        return ()
    found: list[Operation] = []
    for binding in site.region.inputs[:3]:
        value, name = binding.value, binding.name
        position = _position(graph, site.spec, binding)
        if position is not None:
            operation, value = position
            found.append(operation)
        heads = simplify(site.spec.types()[name].sizes[1])
        project = _project(graph, value, name, int(heads.value) if isinstance(heads, Const) else 1)
        if project is not None:
            found.append(project)
    return tuple(found)


def _element(layout: Layout, sizes: Mapping[str, Expr], shape: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """Native indices of the Spec element at its axis symbols."""
    indices: list[Expr] = []
    for group in layout.groups:
        index: Expr = Const(0)
        for axis in group:
            index = index * sizes[axis] + Index({"g": "h", "j": "i", "e": "d"}.get(axis, axis))
        indices.append(simplify(index))
    return tuple(indices)


def _position(graph: Graph, spec: Spec, binding: Binding) -> tuple[Position, str] | None:
    """A rotary map that makes this operand, and the value it rotates."""
    node = graph.producer.get(binding.value)
    if not isinstance(node, Pointwise) or binding.layout is None or binding.name == "v":
        return None
    kind = spec.types()[binding.name]
    sizes = {axis.name: axis.size for axis in kind.axes}
    channels = simplify(sizes["d"])
    if not isinstance(channels, Const):
        return None
    info = graph.infos[binding.value]
    extents = {"d": channels, **{{"g": "h", "j": "i"}.get(a, a): s for a, s in sizes.items() if a != "d"}}
    native = {k: graph.infos[binding.value].shape[n] for n, g in enumerate(binding.layout.groups) for k in g if len(g) == 1}
    extents.update({{"g": "h", "j": "i"}.get(k, k): v for k, v in native.items()})
    try:
        element = Interpreter(graph, extents=extents).at(
            binding.value, _element(binding.layout, {**sizes, **native}, info.shape))
    except RefusalError:
        return None
    rotated = [load for load in loads(element) if {Index("h"), Index("i"), _D} <= symbols(load)]
    tensors = {load.tensor for load in rotated}
    if len(tensors) != 1:
        return None
    for convention, offset in (("half", int(channels.value) // 2), ("interleaved", 1)):
        found = _rotary(element, rotated, offset, convention, int(channels.value), binding.name)
        if found is not None:
            return found, tensors.pop()
    return None


def _shifted(load: Load, by: int) -> Load:
    return Load(load.tensor, tuple(simplify(substitute(i, {_D: _D + by})) for i in load.indices), load.element)


def _rotary(element: Expr, rotated: list[Load], offset: int, convention: str, channels: int, name: str) -> Position | None:
    """Read cos and sin off an element that is linear in three neighbours of one tensor; then check the whole claim."""
    for base in rotated:
        ahead, behind = _shifted(base, offset), _shifted(base, -offset)
        if set(rotated) - {base, ahead, behind} or len(rotated) < 3:
            continue
        values = {base: Const(1.0), ahead: Const(0.0), behind: Const(0.0)}
        cos = simplify(substitute(element, dict(values)))
        sin = simplify(substitute(element, {base: Const(0.0), ahead: Const(-1.0), behind: Const(1.0)}))
        cos, sin = _zero_free(cos), _zero_free(sin)
        if {n.name for e in (cos, sin) for n in symbols(e) if isinstance(n, Index)} - {"b", "i", "d"}:
            continue
        position = Position(name, cos, sin, channels, convention, f"{name}_rotated")
        if _confirmed(element, position, (base, ahead, behind)):
            return position
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


def _confirmed(element: Expr, position: Position, neighbours: tuple[Load, Load, Load]) -> bool:
    """Compare element and claim on random numbers for every channel."""
    generator = torch.Generator().manual_seed(0)
    channels = torch.arange(position.channels)
    others = {load.tensor for load in loads(element)} - {neighbours[0].tensor}
    x = torch.randn(position.channels, dtype=torch.float64, generator=generator)
    if position.convention == "half":
        first, second = x.chunk(2)
        partner = torch.cat([-second, first])
    else:
        partner = torch.stack([-x[1::2], x[0::2]], dim=-1).flatten()
    marks = {load: Index(f"neighbour{n}") for n, load in enumerate(neighbours)}
    shapes = {load.tensor: len(load.indices) for load in loads(element)}
    tensors = {name: torch.randn([position.channels + 1] * min(shapes[name], 1) + [2] * (shapes[name] - 1),
                                 dtype=torch.float64, generator=generator) for name in others}
    for load in loads(element):
        if load.tensor in others and load.element.value != "float":
            tensors[load.tensor] = tensors[load.tensor].abs().round().long()
    environment = Environment({"d": channels, **{n: torch.zeros((), dtype=torch.int64) for n in "bhi"}},
                              {n.name: 2 for n in symbols(element) if not isinstance(n, Index)}, tensors)
    # the neighbours' values stand for themselves: evaluate the element as a linear form
    offset = position.channels // 2 if position.convention == "half" else 1
    total = torch.zeros(position.channels, dtype=torch.float64)
    for load, shift in zip(neighbours, (0, offset, -offset), strict=True):
        alone = substitute(element, {other: Const(1.0 if other == load else 0.0) for other in marks})
        source = (channels + shift).clamp(0, position.channels - 1)
        total = total + evaluate(alone, environment).expand(position.channels) * x[source]
    cos, sin = evaluate(position.cos, environment), evaluate(position.sin, environment)
    return bool(torch.allclose(total, x * cos + partner * sin, rtol=1e-9, atol=1e-9))


def _project(graph: Graph, value: str, name: str, heads: int) -> Project | None:
    """The linear map that makes a value, looking through movements and casts."""
    node = graph.producer.get(value)
    while isinstance(node, Move | Cast):
        node = graph.producer.get(node.source)
    if not isinstance(node, Linear):
        return None

    def shown(native: str) -> str:
        given = graph.inputs.get(native)
        return given.name if given else native

    return Project(shown(node.source), shown(node.weight), shown(node.bias) if node.bias else "", heads, name)


def rotary_base(graph: Graph, position: Position) -> float | None:
    """The base of the rotary frequencies ``base^(−2n/R)``, when they are a constant of the graph."""
    for load in loads(position.cos):
        given = graph.inputs.get(load.tensor)
        if given is not None and given.value is not None and given.value.dim() == 1 and given.value.numel() > 1:
            frequencies = given.value.double()
            ratio = float(frequencies[1] / frequencies[0])
            if 0 < ratio < 1:
                base = ratio ** (-given.value.numel())
                expected = base ** (-torch.arange(given.value.numel()) / given.value.numel())
                if torch.allclose(expected.double(), frequencies, rtol=1e-3):
                    return round(base, -int(math.log10(base)) + 3) if base >= 10 else base
    return None
