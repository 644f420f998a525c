"""Shapes and dtypes that no row gives: declared by the model, or found by shape inference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from attncompile.frontends.graph import (
    Indices,
)
from attncompile.frontends.onnx_known import LONGEST, dtype_name
from attncompile.frontends.onnx_sizes import SizeNames
from attncompile.ir import Expr
from attncompile.ir.expr import Const


@dataclass
class Inference:
    """Shapes and dtypes as the model declares them, or as shape inference finds them."""

    model: ir.Model
    sizes: SizeNames
    _inferred: dict[str, onnx.TypeProto] | None = None

    def of(self, value: ir.Value) -> tuple[Indices | None, str | None]:
        """Shape and dtype of a value, each ``None`` where unknown."""
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            return (
                None,
                None,
            )  # sequences and optional values have a shape of their elements, not of themselves
        dtype = dtype_name(value.dtype) if value.dtype is not None else None
        if value.shape is not None and dtype is not None:
            return tuple(self._declared(d, value.name or "", n) for n, d in enumerate(value.shape)), dtype
        if self._inferred is None:
            self._inferred = infer_types(self.model)
        found = self._inferred.get(value.name or "")
        if found is None or not found.HasField("tensor_type"):
            return None, dtype
        dtype = dtype_name(ir.DataType(found.tensor_type.elem_type))
        if not found.tensor_type.HasField("shape"):
            return None, dtype
        dims = found.tensor_type.shape.dim
        return tuple(
            Const(dim.dim_value)
            if dim.HasField("dim_value")
            else self.sizes.expression(dim.dim_param)
            if dim.dim_param
            else self.sizes.symbol(f"{value.name}_dim_{n}")
            for n, dim in enumerate(dims)
        ), dtype

    def _declared(self, dim: int | ir.SymbolicDim, value: str, axis: int) -> Expr:
        if isinstance(dim, int):
            return Const(dim)
        return self.sizes.symbol(f"{value}_dim_{axis}") if dim.value is None else self.sizes.expression(str(dim.value))


def infer_types(model: ir.Model) -> dict[str, onnx.TypeProto]:
    """Types of the values by ONNX Runtime's symbolic shape inference, or by ONNX's where that fails.

    Large initialisers take part as inputs: only their types matter, and a model may be too large for one
        message.
    """
    light = model.clone()
    for name, value in list(light.graph.initializers.items()):
        if value.const_value is not None and value.const_value.size > LONGEST:
            del light.graph.initializers[name]
            value.const_value = None
            if value not in light.graph.inputs:
                light.graph.inputs.append(value)
    proto = ir.to_proto(light)
    try:
        inferred = _symbolically_inferred(proto)
    except Exception:  # it raises whatever its handlers of single operators raise
        try:
            inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        except (onnx.shape_inference.InferenceError, ValueError):  # the second for sizes beyond all memory
            return {}
    return dict(_named_types(inferred.graph))


def _symbolically_inferred(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The steps of ``SymbolicShapeInference.infer_shapes``, which saves the model in the current folder where it cannot
    infer every shape.

    Raises:
        ValueError: when some shape is not found.
    """
    from onnxruntime.tools import symbolic_shape_infer

    endless = symbolic_shape_infer.SymbolicShapeInference
    said, symbolic_shape_infer.logger.disabled = symbolic_shape_infer.logger.disabled, True  # its guesses are not news
    symbolic_shape_infer.SymbolicShapeInference = _ending(endless)  # by this name it makes those of bodies too
    try:
        inference = symbolic_shape_infer.SymbolicShapeInference(
            2**31 - 1, auto_merge=True, guess_output_rank=False, verbose=0
        )
        inference._preprocess(proto)
        complete = False
        while inference.run_:
            complete = inference._infer_impl()
        inference._update_output_from_vi()
    finally:
        symbolic_shape_infer.SymbolicShapeInference = endless
        symbolic_shape_infer.logger.disabled = said
    if not complete:
        raise ValueError("ONNX Runtime cannot infer every shape")
    inferred: onnx.ModelProto = inference.out_mp_
    return inferred


def _ending(inference: type) -> type:
    """The inference, ended with a ``ValueError`` where passes repeat themselves.

    All that a pass leaves for the next one is which sizes should be equal. What asks for a pass without adding to that,
    in a damaged file, would do so for ever.
    """

    class Ending(inference):
        repeated = 0

        def _infer_impl(self, *given: object) -> bool:
            known = dict(self.suggested_merge_)
            complete = bool(super()._infer_impl(*given))
            self.repeated = self.repeated + 1 if self.suggested_merge_ == known else 0
            if self.run_ and self.repeated > 1:
                raise ValueError("ONNX Runtime's shape inference comes to no end")
            return complete

    return Ending


def _named_types(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TypeProto]]:
    """The types written on a graph's values and on those of the bodies inside it."""
    for node in graph.node:
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _named_types(body)
    yield from ((info.name, info.type) for info in (*graph.input, *graph.value_info, *graph.output))
