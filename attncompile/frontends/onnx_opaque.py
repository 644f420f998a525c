"""Shape and dtype of ONNX outputs that no row states."""

from __future__ import annotations

from collections.abc import Callable

from attncompile.frontends.graph import Indices
from attncompile.frontends.onnx_builder import AttentionRefused, Builder, Unstated
from attncompile.frontends.onnx_products import matmul_labels
from attncompile.frontends.onnx_recurrence import state_info
from attncompile.frontends.onnx_reduction import reduced_shape

# fmt: off
SAME_SHAPE = frozenset({
    "LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization", "RMSNormalization", "GroupNormalization",
    "InstanceNormalization", "BatchNormalization", "LpNormalization", "MeanVarianceNormalization",
    "Gelu", "FastGelu", "BiasGelu", "QuickGelu", "Softplus", "Softsign", "Elu", "Selu", "Celu",
    "LeakyRelu", "PRelu", "HardSigmoid", "HardSwish", "Mish", "Swish", "ThresholdedRelu", "LogSoftmax",
    "Hardmax", "CumSum", "Sign", "Tan", "Sinh", "Cosh", "Asin", "Acos", "Atan", "ScatterND",
    "ScatterElements", "RotaryEmbedding", "Shrink", "BiasSoftmax",
})
# fmt: on
"""Operators whose first output has shape and dtype of the first input."""


def _quantized(b: Builder) -> tuple[Indices, str]:
    return b.shape(b.tensor()), b.dtype(b.tensor(2)) if b.input(2) is not None else "uint8"


def _dequantized(b: Builder) -> tuple[Indices, str]:
    return b.shape(b.tensor()), b.dtype(b.tensor(1))


def _dynamically_quantized(b: Builder) -> tuple[Indices, str]:
    return ((b.shape(b.tensor()), "uint8"), ((), "float32"), ((), "uint8"))[b.position]


def _integer_product(b: Builder) -> tuple[Indices, str]:
    left, right = b.shape(b.tensor(0)), b.shape(b.tensor(1))
    labels = matmul_labels(left, right)
    sizes = {**dict(zip(labels[1], right, strict=True)), **dict(zip(labels[0], left, strict=True))}
    return tuple(sizes[label] for label in labels[2]), "int32"


def _state(b: Builder) -> tuple[Indices, str]:
    if b.position != 1:
        raise Unstated
    try:
        return state_info(b)
    except AttentionRefused:
        raise Unstated from None


def _reduction(b: Builder) -> tuple[Indices, str]:
    return reduced_shape(b), b.dtype(b.tensor())


# fmt: off
OPAQUE_SHAPES: dict[str, Callable[[Builder], tuple[Indices, str]]] = {
    "QuantizeLinear": _quantized, "DequantizeLinear": _dequantized,
    "DynamicQuantizeLinear": _dynamically_quantized,
    "MatMulInteger": _integer_product, "LinearAttention": _state,
    **{f"Reduce{name}": _reduction for name in (
        "Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")},
}
# fmt: on
"""Shape and dtype of outputs that have no statement."""


def opaque_info(b: Builder) -> tuple[Indices, str]:
    """Shape and dtype of an output that stays opaque.

    Raises:
        Unstated: when no rule gives it.
    """
    if b.node.op_type in SAME_SHAPE and b.position == 0:
        return b.shape(b.tensor()), b.dtype(b.tensor())
    rule = OPAQUE_SHAPES.get(b.node.op_type)
    if rule is None:
        raise Unstated
    return rule(b)
