"""Which elements of captured tensors an attention is differentiated by, and how each gradient is summed.

A load without ``j`` is summed over the keys where the query's gradient is computed, one without ``i`` over the queries
where the key's is: both leave one number for each query or key, which the launcher sums along whole axes where the
indices are axes (``slopes[h]``, ``sinks[h]``, ``bias[b, 0, 0, j]``), and otherwise at the places that the kernel notes
beside them. A load by query and key has a kernel of its own; where several positions load one element (a table of
relative positions) its tiles are added to the tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from attncompile.codegen.triton.expressions import Scope
from attncompile.codegen.triton.module import Binding, function_of, place_function
from attncompile.codegen.triton.structure import Dense
from attncompile.ir import simplify
from attncompile.ir.derivative import derivative, real_loads
from attncompile.ir.expr import Const, Expr, Index, Load, symbols
from attncompile.ir.types import TensorType
from attncompile.kernels.backward import CapturedGradient

SUFFIXES = ("_sums", "_sum", "_places", "_place", "_gradient", "_part", "_by", "_total")
"""What is appended to the stem of a captured gradient's identifiers."""


@dataclass(frozen=True)
class Element:
    """A load that is differentiated by.

    Attributes:
        load: reads the element.
        slope: derivative of the expression by it.
        axes: for each axis of the tensor the index symbol that runs along the whole of it, or ``None`` where the axis
            has one element; ``None`` altogether where the indices are anything else.
        gradient: what the kernels need.
    """

    load: Load
    slope: Expr
    axes: tuple[str | None, ...] | None
    gradient: CapturedGradient


def expressions_of(parts: Dense) -> Mapping[str, Expr]:
    """The expressions of an attention that load real elements, by what they are for."""
    found = {"score": parts.score, "edit": parts.edit, "sink": parts.sink}
    return {source: expr for source, expr in found.items() if expr is not None}


def whole_axes(load: Load, of: TensorType, extents: Mapping[str, Expr]) -> tuple[str | None, ...] | None:
    """See :attr:`Element.axes`."""
    found: list[str | None] = []
    for index, axis in zip(load.indices, of.axes, strict=True):
        size = simplify(axis.size)
        match index:
            case Index(name) if name in extents and name not in found and simplify(extents[name]) == size:
                found.append(name)
            case Const(0) if size == Const(1):
                found.append(None)
            case _:
                return None
    return tuple(found)


def elements(
    parts: Dense, wanted: Collection[str], types: Mapping[str, TensorType], binding: Binding, scope: Scope
) -> tuple[Element, ...]:
    """What an attention is differentiated by, besides query, key and value.

    Args:
        parts: the attention.
        wanted: names of the tensors whose gradients are wanted.
        types: of the tensors.
        binding: gives out identifiers.
        scope: names of the expressions' symbols in the kernels.

    Raises:
        ValueError: for an operator without a derivative, by name.
    """
    found: list[Element] = []
    for source, expr in expressions_of(parts).items():
        for load in real_loads(expr):
            if load.tensor in wanted:
                found.append(_element(source, derivative(expr, load), load, parts, types, binding, scope))
    return tuple(found)


def _element(
    source: str,
    slope: Expr,
    load: Load,
    parts: Dense,
    types: Mapping[str, TensorType],
    binding: Binding,
    scope: Scope,
) -> Element:
    pointer = binding.pointers[load.tensor]
    name = binding.names.stem(pointer, SUFFIXES)
    indices = {node.name for node in symbols(load) if isinstance(node, Index)}
    along = "pairs" if {"i", "j"} <= indices else "keys" if "j" in indices else "rows"
    axes = whole_axes(load, types[load.tensor], scope.extents)
    scale = parts.scale if source == "score" else 1.0
    by = None
    if isinstance(slope, Const):
        scale *= float(slope.value)
    else:
        by = function_of(binding.names.fresh(f"{source}_by_{name}"), slope, scope)
    place = None
    if axes is None or along == "pairs":
        place = place_function(binding.names.fresh(f"place_of_{name}"), load, scope, f"{name}_gradient")
    gradient = CapturedGradient(
        name,
        pointer,
        len(load.indices),
        source,
        along,
        by,
        scale,
        place,
        tuple(axis for axis in "bh" if axis not in indices) if along == "pairs" else (),
        along == "pairs" and axes is None,
    )
    return Element(load, slope, axes, gradient)


def summed_along(element: Element) -> str:
    """Source that sums ``{name}_sums`` ``[b, h, i]`` or ``[b, h, j]`` to the shape of the tensor."""
    assert element.axes is not None
    order = ("b", "h", "j" if element.gradient.along == "keys" else "i")
    kept = [axis for axis in element.axes if axis is not None]
    text = f"{element.gradient.name}_sums"
    others = [str(position) for position, axis in enumerate(order) if axis not in kept]
    if others:
        text += f".sum(({', '.join(others)}{',' if len(others) == 1 else ''}))"
    remaining = [axis for axis in order if axis in kept]
    if kept != remaining:
        text += f".permute({', '.join(str(remaining.index(axis)) for axis in kept)})"
    return text


__all__ = ["Element", "elements", "expressions_of", "summed_along", "whole_axes"]
