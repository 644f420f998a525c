"""A float32 model in float16 or bfloat16, node by node, with what needs more digits left in float32.

What stays in float32:

- values that come from integers and no weight matrix (positions, angles of rotary maps, masks): position 4097 is no
  number of float16;
- reductions, powers, exponentials and softmax (:data:`WIDE`), and the scores in front of a softmax up to their product;
- operators whose specification has no form for the narrow type, and the bodies of loops;
- inputs and outputs, logits among them unless it is said otherwise, but not the cache, which is kept narrow.

A cast stands wherever a value crosses. Normalisations as one operator compute in float32 inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime.capi.onnxruntime_pybind11_state as runtime
from onnx_ir.passes import common as passes

from attncompile.codegen.onnx.values import Builder, constant

Narrow = Literal["float16", "bfloat16"]

TYPES: Mapping[Narrow, ir.DataType] = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
FLOAT = ir.DataType.FLOAT

_REDUCTIONS = ("Sum", "Mean", "SumSquare", "L1", "L2", "LogSum", "LogSumExp", "Prod")
_FUNCTIONS = ("CumSum", "Pow", "Sqrt", "Reciprocal", "Exp", "Log", "Softplus", "Sin", "Cos")
LOOPS = ("Loop", "Scan", "SequenceMap")
SCORES = ("Softmax", "LogSoftmax")
WIDE = frozenset({*SCORES, *_FUNCTIONS, *LOOPS, *(f"Reduce{name}" for name in _REDUCTIONS)})
"""Standard operators that stay in float32: long sums, and functions that leave the range of float16."""

POINTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Where", "Max", "Min", "Clip", "Tanh", "Neg"})
"""What may stand between a product and the softmax of its scores."""

SIZES = ("Shape", "Size")
"""Operators that read no number of their operand: a cast in front of them would copy a whole cache for its sizes."""

CACHE = ("past_key_values.", "present.")
"""How inputs and outputs begin that keep the narrow type."""


def narrowed(model: ir.Model, narrow: Narrow, *, keep: tuple[str, ...] = ()) -> int:
    """Rewrite the model in place; how many of its nodes compute in the narrow type.

    Args:
        model: in float32.
        narrow: the type.
        keep: names of outputs that stay narrow too, beside the cache.
    """
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _state_types(model.graph, model)
    work = _Work(model, TYPES[narrow], _narrow_nodes(model, narrow))
    for value in model.graph.inputs:
        if value.dtype is FLOAT and (value.name or "").startswith(CACHE):
            value.dtype = work.kind
    stays = {v: (v.name or "").startswith(CACHE) or v.name in keep for v in model.graph.outputs}
    work.graph(model.graph, outputs=stays)
    passes.RemoveUnusedNodesPass()(model)
    return len(work.chosen)


@dataclass
class _Work:
    """One conversion under way: nodes before the present one have their final types.

    Attributes:
        model, kind: what is rewritten, to which type.
        chosen: nodes that compute in it.
        stored: narrow copies of weights by name.
    """

    model: ir.Model
    kind: ir.DataType
    chosen: set[ir.Node]
    stored: dict[str, ir.Value] = field(default_factory=dict)

    def graph(self, graph: ir.Graph, outputs: Mapping[ir.Value, bool]) -> None:
        """Rewrite a graph and the bodies in it; ``outputs`` says of each whether it is to be narrow."""
        cast: dict[tuple[str | None, ir.DataType], ir.Value] = {}
        for node in list(graph):
            target = self.kind if node in self.chosen else FLOAT
            for attribute in node.attributes.values():
                bodies = [attribute.value] if attribute.type is ir.AttributeType.GRAPH else []
                for body in bodies:
                    self.graph(body, {value: node in self.chosen for value in body.outputs})
            for place, value in enumerate(node.inputs):
                if node.op_type in SIZES and node.domain == "":
                    continue
                if value is not None and value.dtype in (FLOAT, self.kind) and value.dtype is not target:
                    node.replace_input_with(place, self._in(value, target, node, cast))
            if node in self.chosen:
                for output in node.outputs:
                    if output.dtype is FLOAT and output.name:
                        output.dtype = self.kind
                if node.domain == "" and node.op_type == "Attention":
                    node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", int(FLOAT))
        for place, value in enumerate(graph.outputs):
            target = self.kind if outputs[value] else FLOAT
            if value.dtype in (FLOAT, self.kind) and value.dtype is not target:
                graph.outputs[place] = self._out(graph, value, target)

    def _in(
        self, value: ir.Value, target: ir.DataType, node: ir.Node, cast: dict[tuple[str | None, ir.DataType], ir.Value]
    ) -> ir.Value:
        """The value in another type, for a node to read: a weight is stored anew, anything else is cast."""
        known = constant(value) if target is self.kind else None
        if known is not None:
            return self._weight(value, known)
        key = (value.name, target)
        if key not in cast:
            build = Builder(self.model.graph, value.name or "value")
            source = _bounded(build, value, self.kind) if target is self.kind else value
            cast[key] = build("Cast", source, to=int(target))
            cast[key].dtype, cast[key].shape = target, value.shape
            made = build.nodes
            assert node.graph is not None
            node.graph.insert_before(node, made)
        return cast[key]

    def _out(self, graph: ir.Graph, value: ir.Value, target: ir.DataType) -> ir.Value:
        """The value in the type that an output has; the name of an output of the model goes with it."""
        build = Builder(self.model.graph, value.name or "value")
        made: ir.Value = build("Cast", value, to=int(target))
        made.dtype, made.shape = target, value.shape
        graph.extend(build.nodes)
        if graph is self.model.graph:
            value.name, made.name = f"{value.name}.narrow", value.name
        return made

    def _weight(self, value: ir.Value, known: np.ndarray) -> ir.Value:
        name = f"{value.name}.{self.kind.name.lower()}"
        if name not in self.stored:
            limit = float(_largest(self.kind))
            finite = np.where(np.isfinite(known), np.clip(known, -limit, limit), known)
            array = finite.astype(self.kind.numpy())
            made = ir.Value(
                name=name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(self.kind),
                const_value=ir.Tensor(array, dtype=self.kind, name=name),
            )
            self.model.graph.register_initializer(made)
            self.stored[name] = made
        return self.stored[name]


def _largest(kind: ir.DataType) -> float:
    return 65504.0 if kind is ir.DataType.FLOAT16 else 3.3895314e38


def _bounded(build: Builder, value: ir.Value, kind: ir.DataType) -> ir.Value:
    """A value whose finite numbers stay finite in float16, where a mask adds the lowest number of float32."""
    if kind is not ir.DataType.FLOAT16 or not _adds_huge(value):
        return value
    limit = _largest(kind)
    bounded = build("Clip", value, build.constant(-limit, "float32"), build.constant(limit, "float32"))
    bounded.dtype, bounded.shape = FLOAT, value.shape
    return bounded


def _adds_huge(value: ir.Value, depth: int = 8) -> bool:
    """Whether a value is made of a finite constant beyond float16, a few pointwise nodes away."""
    known = constant(value)
    if known is not None:
        return known.dtype == np.float32 and bool((np.isfinite(known) & (np.abs(known) > 65504.0)).any())
    node = value.producer()
    if node is None or depth == 0 or node.op_type in ("MatMul", "Gemm"):
        return False
    return any(_adds_huge(given, depth - 1) for given in node.inputs if given is not None and given.dtype is FLOAT)


def _narrow_nodes(model: ir.Model, narrow: Narrow) -> set[ir.Node]:
    """The nodes that are to compute in the narrow type."""
    reached = _from_weights(model)
    wide = {
        node
        for node in model.graph.all_nodes()
        if (node.domain == "" and node.op_type in WIDE)
        or not any(output in reached for output in node.outputs)
        or not _has_form(node, narrow, model)
    }
    wide |= {
        inner
        for node in model.graph.all_nodes()
        if node.op_type in LOOPS and node.domain == ""
        for inner in _inside(node)
    }
    for node in [node for node in wide if node.op_type in SCORES and node.domain == ""]:
        _widen_scores(node.inputs[0], wide, reached)
    return set(model.graph.all_nodes()) - wide


def _state_types(graph: ir.Graph, model: ir.Model) -> None:
    """Give every value its element type, by the specifications of the operators."""
    for node in graph:
        bodies = [value.value for value in node.attributes.values() if value.type is ir.AttributeType.GRAPH]
        for body in bodies:
            _state_types(body, model)
        for place, output in enumerate(node.outputs):
            if output.dtype is not None:
                continue
            if bodies and node.op_type == "If":
                inner = bodies[0].outputs[place].dtype
                if inner is not None:
                    output.dtype = inner
            elif node.op_type == "Cast" and node.domain == "":
                output.dtype = ir.DataType(node.attributes.get_int("to", int(FLOAT)))
            else:
                found = _result_type(node, place, model)
                if found is not None:
                    output.dtype = found


def _result_type(node: ir.Node, place: int, model: ir.Model) -> ir.DataType | None:
    """The element type of a result: the only one that it may have, or that of an operand of the same kind."""
    known = _signature(node.domain, node.op_type, model.opset_imports.get(node.domain, 1))
    if known is None or not known.results:
        return None
    kind = known.results[min(place, len(known.results) - 1)]
    if len(kind.types) == 1:
        return _TYPES.get(next(iter(kind.types)))
    for number, value in enumerate(node.inputs):
        same = known.operands[min(number, len(known.operands) - 1)].name == kind.name if known.operands else False
        if value is not None and same and value.dtype is not None:
            return value.dtype
    return None


_WORDS = {ir.DataType.FLOAT: "float", ir.DataType.DOUBLE: "double"}
_TYPES = {f"tensor({_WORDS.get(kind, kind.name.lower())})": kind for kind in ir.DataType}


def _inside(node: ir.Node) -> Iterator[ir.Node]:
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            yield from attribute.value.all_nodes()


def _widen_scores(value: ir.Value | None, wide: set[ir.Node], reached: set[ir.Value]) -> None:
    """Let the pointwise nodes between a product and a softmax be wide."""
    node = value.producer() if value is not None else None
    if node is None or node in wide or node.domain != "" or node.op_type not in POINTWISE or value not in reached:
        return
    wide.add(node)
    for given in node.inputs:
        _widen_scores(given, wide, reached)


def _from_weights(model: ir.Model) -> set[ir.Value]:
    """Float values that depend on a weight matrix or on a float input: activations, not positions and masks."""
    found: set[ir.Value] = {value for value in model.graph.inputs if value.dtype is FLOAT}
    found |= {value for value in model.graph.initializers.values() if _is_matrix(value)}

    def visit(graph: ir.Graph) -> None:
        for node in graph:
            inner = False
            for attribute in node.attributes.values():
                if attribute.type is ir.AttributeType.GRAPH:
                    visit(attribute.value)
                    inner |= any(value in found for value in attribute.value.outputs)
            if inner or any(value in found for value in node.inputs if value is not None):
                found.update(output for output in node.outputs if output.dtype is FLOAT or output.dtype is None)

    visit(model.graph)
    return found


def _is_matrix(value: ir.Value) -> bool:
    """A stored float tensor with more than one axis longer than 1: no list of frequencies or slopes."""
    sizes = value.const_value.numpy().shape if value.const_value is not None else ()
    return value.dtype is FLOAT and sum(size > 1 for size in sizes) > 1


def _has_form(node: ir.Node, narrow: Narrow, model: ir.Model) -> bool:
    """Whether the specification of an operator lets its float32 operands and results be of the narrow type."""
    if node.op_type == "Cast" and node.domain == "":
        return False  # its result is what the attribute says
    known = _signature(node.domain, node.op_type, model.opset_imports.get(node.domain, 1))
    if known is None:
        return False
    wanted = f"tensor({narrow})"

    def fits(values: Sequence[ir.Value | None], kinds: tuple[_Kind, ...]) -> bool:
        return all(
            bool(kinds) and wanted in kinds[min(place, len(kinds) - 1)].types
            for place, value in enumerate(values)
            if value is not None and value.dtype is FLOAT
        )

    # what nobody reads has no name, and the type that the specification gives it, whatever the others have
    named = [output if output.name else None for output in node.outputs]
    return fits(node.inputs, known.operands) and fits(named, known.results)


@dataclass(frozen=True)
class _Kind:
    """Types that an operand or a result may have; those of one name have the same one."""

    name: str
    types: frozenset[str]


@dataclass(frozen=True)
class _Signature:
    operands: tuple[_Kind, ...]
    results: tuple[_Kind, ...]


@cache
def _signature(domain: str, operator: str, version: int) -> _Signature | None:
    """What an operator takes and gives, by its specification; ``None`` for an operator that nobody knows."""
    if domain in ("", "ai.onnx"):
        try:
            schema = onnx.defs.get_schema(operator, version, "")
        except onnx.defs.SchemaError:
            return None
        operands, results = (
            tuple(_Kind(entry.type_str, frozenset(entry.types)) for entry in entries)
            for entries in (schema.inputs, schema.outputs)
        )
        return _Signature(operands, results)
    known = [one for one in _runtime_schemas() if one.domain == domain and one.name == operator]
    if not known:
        return None
    newest = max(known, key=lambda one: one.since_version)
    types = {one.type_param_str: frozenset(one.allowed_type_strs) for one in newest.type_constraints}
    operands, results = (
        tuple(_Kind(entry.typeStr, types.get(entry.typeStr, frozenset({entry.typeStr}))) for entry in entries)
        for entries in (newest.inputs, newest.outputs)
    )
    return _Signature(operands, results)


@cache
def _runtime_schemas() -> tuple[Any, ...]:
    return tuple(runtime.get_all_operator_schema())


__all__ = ["CACHE", "Narrow", "narrowed"]
