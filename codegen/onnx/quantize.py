"""Dynamic INT8 of the projections through ONNX Runtime's quantiser; attention products stay in float."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnxruntime.quantization import QuantType, quantize_dynamic

from attncompile.codegen.onnx.values import constant


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


def quantize_projections(source: Path, target: Path, *, per_channel: bool = True) -> int:
    """Write a model whose projections multiply INT8 weights with dynamically quantised states.

    Weights are rounded symmetrically, with one scale per output channel (or per tensor); states as UINT8 with
    one scale and zero point per call. Lossy: compare before use.

    Args:
        source: the float model; weights may lie beside it.
        target: where the quantised model goes (with its data beside it when the source had some).

    Returns:
        The number of projections.

    Raises:
        ValueError: when the model has no projection, or their nodes have no names.
    """
    names = projections(ir.load(source))
    if not names:
        raise ValueError(f"{source} has no MatMul or Gemm with fixed weights; there is nothing to quantise")
    if "" in names:
        raise ValueError(
            f"{source} has projections without a node name, so they cannot be told to the quantiser"
        )
    external = source.with_name(source.name + ".data").exists()
    quantize_dynamic(
        source,
        target,
        nodes_to_quantize=names,
        per_channel=per_channel,
        weight_type=QuantType.QInt8,
        use_external_data_format=external,
        # a product with two computed operands has no weights to round
        extra_options={"MatMulConstBOnly": True},
    )
    return len(names)
