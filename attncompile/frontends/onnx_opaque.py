"""Shape and dtype of ONNX outputs that no row states."""

from __future__ import annotations

from collections.abc import Callable

from attncompile.frontends.graph import Indices
from attncompile.frontends.onnx_builder import AttentionRefused, Builder, Unstated
from attncompile.frontends.onnx_products import matmul_labels
from attncompile.frontends.onnx_recurrence import state_info
from attncompile.frontends.onnx_reduction import reduced_shape
from attncompile.ir.expr import Const

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


def _product(right: int, dtype: str | int, swaps: bool = False) -> Callable[[Builder], tuple[Indices, str]]:
    """A product of the first input with another one, of a type or of that of an input."""

    def rule(b: Builder) -> tuple[Indices, str]:
        sizes = b.shape(b.tensor(0)), b.shape(b.tensor(right))
        swapped = (bool(b.attribute("transA", 0)), bool(b.attribute("transB", 0))) if swaps else (False, False)
        labels = matmul_labels(*sizes, *swapped)
        known = {**dict(zip(labels[1], sizes[1], strict=True)), **dict(zip(labels[0], sizes[0], strict=True))}
        return tuple(known[label] for label in labels[2]), dtype if isinstance(dtype, str) else b.dtype(b.tensor(dtype))

    return rule


def _quantised_gemm(b: Builder) -> tuple[Indices, str]:
    return _product(3, 8 if b.input(8) is not None else 1, swaps=True)(b)


def _blocks(b: Builder) -> tuple[Indices, str]:
    return (*b.shape(b.tensor())[:-1], Const(int(b.attribute("N")))), b.dtype(b.tensor())


def _state(b: Builder) -> tuple[Indices, str]:
    if b.position != 1:
        raise Unstated
    try:
        return state_info(b)
    except AttentionRefused:
        raise Unstated from None


def _embedded(b: Builder) -> tuple[Indices, str]:
    """Embeddings, the number of seen keys of each row, and embeddings before they are normalised."""
    table = b.tensor(2)
    scale = b.tensor(8) if b.node.op_type.startswith("Q") else table  # the tables may be codes
    rows = b.shape(b.tensor())
    return (rows[:1], "int32") if b.position == 1 else ((*rows, b.shape(table)[1]), b.dtype(scale))


def _reduction(b: Builder) -> tuple[Indices, str]:
    return reduced_shape(b), b.dtype(b.tensor())


# fmt: off
OPAQUE_SHAPES: dict[str, Callable[[Builder], tuple[Indices, str]]] = {
    "QuantizeLinear": _quantized, "DequantizeLinear": _dequantized,
    "DynamicQuantizeLinear": _dynamically_quantized,
    "MatMulInteger": _product(1, "int32"), "LinearAttention": _state,
    "DynamicQuantizeMatMul": _product(1, 0), "MatMulIntegerToFloat": _product(1, 2), "MatMulNBits": _blocks,
    "QLinearMatMul": _product(3, 7), "QGemm": _quantised_gemm,
    "EmbedLayerNormalization": _embedded, "QEmbedLayerNormalization": _embedded,
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
