"""Mixtures of experts in ONNX: the operators of transformers' experts that torch's exporter does not know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir
import torch
from onnxscript import opset18

op: Any = opset18
_INT64, _END = 7, 2**62


def translations() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """ONNX functions by operator, as ``torch.onnx.export`` takes them; those of transformers where it has them."""
    grouped = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return {torch.ops.aten.histc.default: _histogram} | ({grouped.default: _grouped_product} if grouped else {})


def _histogram(x: Any, bins: int = 100, min: float = 0, max: float = 0) -> Any:
    """``aten.histc``: how many numbers fall into each of as many bins of one width; the last one holds its end too.

    Args:
        x: float numbers; those outside of the range are not counted.
        bins: how many there are; min, max: the range of all.

    Raises:
        ValueError: for a range that is to be found in the numbers.
    """
    if bins > 1 and not min < max:
        raise ValueError(f"the range of histc is {min} to {max}: one that is found in the numbers is not known in ONNX")
    numbers = op.Reshape(x, op.Constant(value_ints=[1, -1]))
    if bins == 1:
        return op.CastLike(op.Slice(op.Shape(numbers), [1], [2]), x)
    low, high = (op.CastLike(op.Constant(value_float=float(end)), x) for end in (min, max))
    steps = op.CastLike(op.Constant(value_float=bins / (max - min)), x)
    places = op.Min(op.Floor(op.Mul(op.Sub(numbers, low), steps)), op.CastLike(op.Constant(value_float=bins - 1.0), x))
    each = op.CastLike(op.Constant(value_floats=[float(place) for place in range(bins)]), x)
    found = op.Equal(places, op.Reshape(each, op.Constant(value_ints=[-1, 1])))
    inside = op.And(op.GreaterOrEqual(numbers, low), op.LessOrEqual(numbers, high))
    return op.ReduceSum(op.CastLike(op.And(found, inside), x), op.Constant(value_ints=[1]), keepdims=0)


def _grouped_product(rows: Any, weight: Any, offs: Any) -> Any:
    """``transformers.grouped_mm_fallback``: rows that are sorted by expert, each by the matrix of its own.

    Args:
        rows: ``[S, K]``.
        weight: ``[E, K, N]``.
        offs: ``[E]`` integers: where the rows of each expert end. Those behind the last are zeros in the result.
    """
    experts, _, width = weight.shape
    ends, axis, start = op.Cast(offs, to=_INT64), op.Constant(value_ints=[0]), op.Constant(value_ints=[0])
    parts = []
    for expert in range(experts):
        place = op.Constant(value_ints=[expert])
        end = op.Gather(ends, place)
        own = op.Gather(weight, op.Constant(value_int=expert))
        parts.append(op.MatMul(op.Slice(rows, start, end, axis), own))
        start = end
    left = op.Shape(op.Slice(rows, start, op.Constant(value_ints=[_END]), axis), end=1)
    nothing = op.CastLike(op.Constant(value_float=0.0), rows)
    return op.Concat(*parts, op.Expand(nothing, op.Concat(left, op.Constant(value_ints=[width]), axis=0)), axis=0)


def separate(model: onnx_ir.Model) -> int:
    """Make the matrix of each expert a weight of its own, in place; how many there are then.

    A product by a part of a larger tensor is none whose weights a runtime packs, or a precision rounds. A tensor that
    something else reads as a whole stays.
    """
    made = 0
    for weight in list(model.graph.initializers.values()):
        only = [use.node for use in weight.uses()]
        turned = len(only) == 1 and only[0].op_type == "Transpose" and _turns(only[0])
        whole = only[0].outputs[0] if turned else weight
        readers = [use.node for use in whole.uses()]
        if weight.const_value is None or not readers or not all(_is_expert(node, whole) for node in readers):
            continue
        for node in readers:
            number = int(onnx_ir.convenience.get_const_tensor(node.inputs[1]).numpy())  # type: ignore[union-attr,arg-type]
            _replace(model, node, weight, number, turned)
            made += 1
    if made:
        onnx_ir.passes.common.RemoveUnusedNodesPass()(model)
    return made


def _turns(node: onnx_ir.Node) -> bool:
    """Whether a transpose exchanges the axes of each matrix of a stack."""
    order = node.attributes.get("perm")
    return order is not None and list(order.as_ints()) == [0, 2, 1]


def _is_expert(node: onnx_ir.Node, whole: onnx_ir.Value) -> bool:
    """Whether a node takes one matrix out of a stack of them."""
    axis = node.attributes.get("axis")
    if node.op_type != "Gather" or node.inputs[1] is None or whole.shape is None or whole.shape.rank() != 3:
        return False
    index = onnx_ir.convenience.get_const_tensor(node.inputs[1])
    stacked = index is not None and index.shape.rank() == 0 and (axis is None or axis.as_int() == 0)
    return stacked and node.inputs[0] is whole and not whole.is_graph_output()


def _replace(model: onnx_ir.Model, node: onnx_ir.Node, weight: onnx_ir.Value, number: int, turned: bool) -> None:
    """Read a weight of its own where a node takes it out of the stack; it is copied when the model is written."""
    stack = weight.const_value
    assert stack is not None
    name, (_, *sizes) = f"{weight.name}.{number}", stack.shape.numpy()

    def own() -> onnx_ir.Tensor:
        part = stack.numpy()[number]
        return onnx_ir.Tensor(np.ascontiguousarray(part.T if turned else part), dtype=stack.dtype, name=name)

    shape = onnx_ir.Shape(sizes[::-1] if turned else sizes)
    value = onnx_ir.Value(name=name, shape=shape, type=onnx_ir.TensorType(stack.dtype))
    value.const_value = onnx_ir.LazyTensor(own, dtype=stack.dtype, shape=shape, name=name)
    model.graph.register_initializer(value)
    node.outputs[0].replace_all_uses_with(value)


__all__ = ["separate", "translations"]
