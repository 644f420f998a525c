"""A whole Spec as ONNX nodes, with the chosen operator for its Attend or Scan."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import onnx_ir as ir

from attncompile.codegen.onnx.attend import Place
from attncompile.codegen.onnx.capabilities import Capability
from attncompile.codegen.onnx.expressions import Shared, Writer
from attncompile.codegen.onnx.layouts import Groups, Operand, arrange, flat_groups, single_groups
from attncompile.codegen.onnx.normalisation import OPSET
from attncompile.codegen.onnx.reading import fixed, unweighted
from attncompile.codegen.onnx.steps import STEPS
from attncompile.codegen.onnx.values import MICROSOFT, NUMPY_TYPES, Builder
from attncompile.ir.attend import Attend
from attncompile.ir.expr import Expr
from attncompile.ir.ops import Cache
from attncompile.ir.refusal import Refusal, RefusalError
from attncompile.ir.scan import Scan
from attncompile.ir.spec import Spec
from attncompile.ir.types import TensorType


def emit(
    spec: Spec,
    inputs: Mapping[str, Operand],
    outputs: Mapping[str, Groups],
    row: Capability,
    build: Builder,
    shared: Shared,
) -> dict[str, ir.Value]:
    """Write the Spec's nodes.

    Args:
        spec: what to compute.
        inputs: the graph's tensor for each input of the Spec, with its layout.
        outputs: the wanted layout of each output; ``[B, H, I, E]`` for those left out.
        row: the operator for the Attend or Scan (:func:`attncompile.codegen.onnx.choose.choose`).
        build: where the nodes are collected; the caller inserts them.
        shared: one dictionary for all sites of the model, in graph order.

    Returns:
        One value per output of the Spec, in the layout asked for.

    Raises:
        RefusalError: when the row cannot compute this Spec, or an operation has no ONNX form.
    """
    reason = row.beyond(spec)
    if reason is not None:
        raise RefusalError(Refusal("operator-cannot", reason))
    types = spec.types()
    place = Place(build, types, dict(inputs), shared)
    for operation in spec.operations:
        if isinstance(operation, Attend):
            plain, factor = unweighted(operation)
            made = row.build(plain, place)  # type: ignore[arg-type]
            if factor != 1.0:
                made[plain.out] = _times(build, made[plain.out], factor, types[plain.out].dtype)
        elif isinstance(operation, Scan):
            made = row.build(operation, place)  # type: ignore[arg-type]
        elif type(operation) in STEPS:
            made = STEPS[type(operation)](operation, place)
        else:
            raise RefusalError(Refusal("no-onnx-form", f"the operation {operation.keyword} has no ONNX form"))
        place.operands.update(made)
    return {name: _output(place, name, outputs.get(name)) for name in spec.outputs}


def _times(build: Builder, operand: Operand, factor: float, dtype: str) -> Operand:
    """A result multiplied by a constant."""
    value = build("Mul", operand.value, build.constant(factor, dtype))
    value.shape, value.dtype = operand.value.shape, operand.value.dtype
    return Operand(value, operand.groups)


def alone(spec: Spec, row: Capability, *, flat: bool = False, opset: int = OPSET) -> ir.Model:
    """A model of its own that computes the Spec: one input per input of the Spec, one output per output, in order.

    Args:
        spec: what to compute.
        row: the operator for the Attend or Scan.
        flat: whether operands and outputs with heads are ``[B, I, H·D]``, as projections make and take them, rather
            than ``[B, H, I, D]``; what is cached always has heads.
        opset: the standard's version that the model has.

    Raises:
        RefusalError: as :func:`emit`.
    """
    graph = ir.Graph([], [], nodes=[], opset_imports={"": opset, MICROSOFT: 1}, name="site")

    def groups(kind: TensorType, *, heads: bool) -> Groups:
        axes = tuple(axis.name for axis in kind.axes)
        return flat_groups(axes) if flat and heads and len(axes) == 4 else single_groups(axes)

    operands: dict[str, Operand] = {}
    apart = {value.name for value in spec.captured()} | {
        operation.past for operation in spec.operations if isinstance(operation, Cache)
    }
    for value in spec.inputs:
        layout = groups(value.type, heads=value.name not in apart)
        tensor = ir.TensorType(NUMPY_TYPES[value.type.dtype])
        known = ir.Value(name=value.name, type=tensor, shape=ir.Shape(_stated(value.type, layout)))
        graph.inputs.append(known)
        operands[value.name] = Operand(known, layout)
    build, types = Builder(graph, "site"), spec.types()
    wanted = {name: groups(types[name], heads=True) for name in spec.outputs}
    made = emit(spec, operands, wanted, row, build, {})
    graph.extend(build.nodes)
    for name, output in made.items():
        output.dtype = NUMPY_TYPES[types[name].dtype]
    graph.outputs.extend(made.values())
    return ir.Model(graph, ir_version=10)


def _stated(kind: TensorType, layout: Groups) -> list[int | str | None]:
    """The sizes of a tensor as the Spec has them: numbers, or names; unknown where a product has a name."""
    sizes = {axis.name: axis.size for axis in kind.axes}
    stated: list[int | str | None] = []
    for group in layout:
        numbers = [fixed(sizes[axis]) for axis in group]
        known = [number for number in numbers if number is not None]
        one = str(sizes[group[0]]) if len(group) == 1 else None
        stated.append(math.prod(known) if len(known) == len(numbers) else one)
    return stated


def _output(place: Place, name: str, wanted: Groups | None) -> ir.Value:
    kind = place.types[name]
    axes = tuple(axis.name for axis in kind.axes)
    writer = Writer(place.build, place.types, place.operands, axes, {}, kind.dtype, place.shared)

    def maker(size: Expr) -> Callable[[], ir.Value]:
        return lambda: writer.size(size)

    sizes: dict[str, int | Callable[[], ir.Value]] = {}
    for axis in kind.axes:
        number = fixed(axis.size)
        sizes[axis.name] = number if number is not None else maker(axis.size)
    return arrange(place.build, place.operands[name], wanted or single_groups(axes), sizes)


__all__ = ["alone", "emit"]
