"""Projections with narrow weights, through ONNX Runtime's own quantisers; products of attention stay in float.

A projection is a ``MatMul`` whose second operand is a fixed weight. Three forms are made of it:

- :func:`dynamic_int8`: INT8 weights, states rounded to UINT8 with one scale and zero point per call;
- :func:`static_rounding`: the same with ranges that were calibrated, as ``QuantizeLinear``/``DequantizeLinear`` pairs,
  in INT8 or in float8 e4m3;
- :func:`block_weights`: ``MatMulNBits``, weights of 4 or 8 bits with one scale per block, states stay what they are.

All are lossy: compare before use.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from attncompile.codegen.onnx.values import Builder, constant, producer, redirect

Feed = Mapping[str, np.ndarray]
"""Inputs of a model by name."""

Quantiser = Callable[[Path, Path, Collection[str], Iterable[Feed]], None]
"""Writes a model with some projections narrow: source, target, names of the projections, calibration inputs."""

Calibration = Literal["minmax", "entropy", "percentile"]

_METHODS: Mapping[Calibration, CalibrationMethod] = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}

INT8_STATES = 4
"""``accuracy_level`` of ``MatMulNBits``: states are rounded to INT8 in blocks while it multiplies."""


def projections(model: ir.Model) -> list[str]:
    """Names of the ``MatMul`` and ``Gemm`` nodes whose second operand is a fixed weight.

    Products of attention (query with key, weights with value) have none and are left out.
    """
    return [
        node.name or ""
        for node in model.graph
        if node.domain == ""
        and node.op_type in ("MatMul", "Gemm")
        and len(node.inputs) > 1
        and constant(node.inputs[1]) is not None
    ]


def plain_projections(model: ir.Model) -> tuple[str, ...]:
    """Write every projection as a named ``MatMul`` with a stored weight, in place, for quantisers know no other form.

    ``x @ transpose(weight)`` (an embedding that is the last projection too) gets the transposed weight;
    ``Gemm(x, weight, bias)`` becomes a product and a sum. Names of outputs stay.

    Returns:
        The names of the projections, in the order of the graph.
    """
    for node in list(model.graph):
        if node.domain == "" and node.op_type == "MatMul":
            _store_transposed(model, node)
        elif node.domain == "" and node.op_type == "Gemm" and constant(node.inputs[1]) is not None:
            _split_gemm(model, node)
    found = []
    for number, node in enumerate(model.graph):
        if node.domain == "" and node.op_type == "MatMul" and _is_matrix(constant(node.inputs[1])):
            node.name = node.name or f"projection.{number}"
            found.append(node.name)
    return tuple(found)


def _is_matrix(weight: np.ndarray | None) -> bool:
    return weight is not None and weight.ndim == 2 and weight.dtype == np.float32


def _store_transposed(model: ir.Model, node: ir.Node) -> None:
    turn = producer(node.inputs[1], "Transpose")
    weight = constant(turn.inputs[0]) if turn is not None else None
    if turn is None or weight is None or weight.ndim != 2:
        return
    build = Builder(model.graph, node.name or "projection")
    node.replace_input_with(1, build.constant(np.ascontiguousarray(weight.T), str(weight.dtype)))


def _split_gemm(model: ir.Model, node: ir.Node) -> None:
    weight, scales = constant(node.inputs[1]), [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    if weight is None or scales != [1.0, 1.0] or node.attributes.get_int("transA", False):
        return
    if node.attributes.get_int("transB", False):
        weight = np.ascontiguousarray(weight.T)
    build = Builder(model.graph, node.name or "projection")
    made = build("MatMul", node.inputs[0], build.constant(weight, str(weight.dtype)))
    build.nodes[-1].name = node.name
    build.nodes[-1].metadata_props.update(node.metadata_props)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        made = build("Add", made, node.inputs[2])
    build.insert_before(node)
    redirect(node.outputs[0], made)
    model.graph.remove(node, safe=True)


def dynamic_int8(source: Path, target: Path, names: Collection[str], *, per_channel: bool = True) -> None:
    """Multiply INT8 weights with states that each call rounds to UINT8 by its own range.

    Args:
        source: the float model; target: where the result goes, its weights beside it when those of the source are.
        names: of the projections; per_channel: one scale for each output channel, or one for a weight.
    """
    quantize_dynamic(
        source,
        target,
        nodes_to_quantize=list(names),
        per_channel=per_channel,
        weight_type=QuantType.QInt8,
        use_external_data_format=_beside(source),
        # a product with two computed operands has no weights to round
        extra_options={"MatMulConstBOnly": True},
    )
    _finish(source, target)


def static_rounding(
    source: Path,
    target: Path,
    names: Collection[str],
    calibration: Iterable[Feed],
    *,
    kind: Literal["int8", "float8_e4m3"],
    method: Calibration = "minmax",
    per_channel: bool = True,
) -> None:
    """Round weights and states of projections with ranges that were calibrated; results of products stay in float.

    Args:
        source, target, names: as in :func:`dynamic_int8`.
        calibration: inputs on which ranges are taken.
        kind: what is rounded to; weights of ``float8_e4m3`` have one scale each.
        method: how a range is made of what was seen; float8 takes its own from the distribution.
        per_channel: for INT8, one scale for each output channel of a weight.
    """
    narrow = kind == "float8_e4m3"
    quantize_static(
        source,
        target,
        _Reader(calibration),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        nodes_to_quantize=list(names),
        per_channel=per_channel and not narrow,
        activation_type=QuantType.QFLOAT8E4M3FN if narrow else QuantType.QUInt8,
        weight_type=QuantType.QFLOAT8E4M3FN if narrow else QuantType.QInt8,
        calibrate_method=CalibrationMethod.Distribution if narrow else _METHODS[method],
        use_external_data_format=_beside(source),
        # rounding a result again would only lose: what reads it is in float
        extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
    )
    _finish(source, target)


def block_weights(
    source: Path, target: Path, names: Collection[str], *, bits: Literal[4, 8], block: int, symmetric: bool
) -> None:
    """Store weights in 4 or 8 bits with a scale for each block of input channels of an output channel.

    Args:
        source, target, names: as in :func:`dynamic_int8`.
        bits: of a weight; block: weights that share a scale; symmetric: without a zero point.
    """
    quantiser_of = _block_quantiser()
    whole = onnx.load(source)
    left = [node.name for node in whole.graph.node if node.op_type == "MatMul" and node.name not in set(names)]
    quantiser = quantiser_of(
        whole,
        bits=bits,
        block_size=block,
        is_symmetric=symmetric,
        accuracy_level=INT8_STATES,
        nodes_to_exclude=left,
        op_types_to_quantize=("MatMul",),
    )
    quantiser.process()
    quantiser.model.save_model_to_file(str(target), _beside(source))
    _finish(source, target)


def _block_quantiser() -> Any:
    """ONNX Runtime's quantiser of weights in blocks, whose module sets up everybody's logging when it is imported."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    return MatMulNBitsQuantizer


class _Reader(CalibrationDataReader):
    """Inputs one after the other, as the quantiser asks for them."""

    def __init__(self, feeds: Iterable[Feed]) -> None:
        self._feeds: Iterator[Feed] = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def _beside(source: Path) -> bool:
    """Whether the weights of a model lie in a file beside it."""
    return source.with_name(source.name + ".data").exists()


def _finish(source: Path, target: Path) -> None:
    """Mend what quantisers leave: weights of several nodes are there once, nodes keep their metadata and are in order.

    Their own order knows nothing of what the body of an ``If`` reads from outside.
    """
    before, after = onnx.load(source, load_external_data=False), onnx.load(target, load_external_data=False)
    once = {tensor.name: tensor for tensor in after.graph.initializer}
    if len(once) < len(after.graph.initializer):
        kept = list(once.values())
        del after.graph.initializer[:]
        after.graph.initializer.extend(kept)
    marks = {node.name: node.metadata_props for node in before.graph.node if node.name and node.metadata_props}
    del before
    for node in after.graph.node:
        if node.name in marks and not node.metadata_props:
            node.metadata_props.extend(marks[node.name])
    model = ir.from_proto(after)
    passes.TopologicalSortPass()(model)
    target.write_bytes(ir.to_proto(model).SerializeToString())


__all__ = [
    "Calibration",
    "Feed",
    "Quantiser",
    "block_weights",
    "dynamic_int8",
    "plain_projections",
    "projections",
    "static_rounding",
]
