"""ONNX operators that are products of tensors."""

from __future__ import annotations

from attncompile.frontends import movement
from attncompile.frontends.graph import (
    Indices,
    Linear,
)
from attncompile.frontends.onnx_builder import Builder, Row, Unstated
from attncompile.ir.expr import Const


def _labels(count: int, offset: int = 0) -> tuple[str, ...]:
    return tuple(f"batch{n + offset}" for n in range(count))


def matmul_labels(
    left: Indices, right: Indices, swap_left: bool = False, swap_right: bool = False
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Labels of NumPy's ``matmul``, whose batch axes broadcast right-aligned and whose vectors lack an
    axis."""
    batch = max(len(left), len(right), 2) - 2
    rows = ("row", "inner") if len(left) > 1 else ("inner",)
    columns = ("inner", "column") if len(right) > 1 else ("inner",)
    if not left or not right or (swap_left and len(left) < 2) or (swap_right and len(right) < 2):
        raise Unstated
    outer_left = _labels(max(len(left) - 2, 0), batch - max(len(left) - 2, 0))
    outer_right = _labels(max(len(right) - 2, 0), batch - max(len(right) - 2, 0))
    return (
        (*outer_left, *(reversed(rows) if swap_left else rows)),
        (*outer_right, *(reversed(columns) if swap_right else columns)),
        (*_labels(batch), *(["row"] if len(left) > 1 else []), *(["column"] if len(right) > 1 else [])),
    )


def _linear(b: Builder, source: str, weight: str, bias: str | None, transposed: bool) -> str:
    """A product with a constant matrix."""
    inputs, outputs = b.shape(weight) if transposed else reversed(b.shape(weight))
    b.sizes.prove_equal(b.shape(source)[-1], inputs)
    return b.emit(
        lambda name: Linear(name, source, weight, bias, transposed),
        (*b.shape(source)[:-1], outputs),
        b.dtype(source),
    )


def _matmul(b: Builder) -> str:
    left, right = b.tensors()
    if right in b.constants and left not in b.constants and len(b.shape(right)) == 2 and len(b.shape(left)) > 1:
        return _linear(b, left, right, None, True)
    return b.contract(left, right, matmul_labels(b.shape(left), b.shape(right)))


def _fused_matmul(b: Builder) -> str:
    """com.microsoft ``FusedMatMul``: ``alpha · A' @ B'`` with the last two axes of each swapped on demand."""
    left, right = b.tensor(0), b.tensor(1)
    if b.attribute("transBatchA", 0) or b.attribute("transBatchB", 0):
        raise Unstated
    labels = matmul_labels(
        b.shape(left), b.shape(right), bool(b.attribute("transA", 0)), bool(b.attribute("transB", 0))
    )
    alpha = float(b.attribute("alpha", 1.0))
    made = b.contract(left, right, labels)
    return made if alpha == 1.0 else b.pointwise("mul", Const(alpha), made)


def _gemm(b: Builder) -> str:
    left, right, added = b.tensor(0), b.tensor(1), b.input(2)
    swapped = bool(b.attribute("transA", 0)), bool(b.attribute("transB", 0))
    alpha, beta = float(b.attribute("alpha", 1.0)), float(b.attribute("beta", 1.0))
    plain = right in b.constants and left not in b.constants and not swapped[0] and alpha == 1.0
    if plain and (added is None or (beta == 1.0 and added in b.constants and len(b.shape(added)) == 1)):
        return _linear(b, left, right, added, not swapped[1])
    made = b.contract(left, right, matmul_labels(b.shape(left), b.shape(right), *swapped))
    if alpha != 1.0:
        made = b.pointwise("mul", Const(alpha), made)
    if added is None:
        return made
    return b.pointwise("add", made, b.tensor(2) if beta == 1.0 else b.pointwise("mul", Const(beta), b.tensor(2)))


def _einsum(b: Builder) -> str:
    equation = b.attribute("equation").replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    tensors = b.tensors()
    if len(tensors) != len(terms):
        raise Unstated
    plain = [_einsum_term(term, len(b.shape(tensor))) for term, tensor in zip(terms, tensors, strict=True)]
    batch = max((sum(label.startswith("batch") for label in labels) for labels in plain), default=0)
    if not arrow:
        single = sorted(c for c in set(inputs) - {",", "."} if inputs.count(c) == 1)
        result = (*_labels(batch), *single)
    else:
        result = _einsum_term(output, len(output.replace("...", "")) + batch)
    aligned = [
        tuple(
            f"batch{int(label[5:]) + batch - sum(n.startswith('batch') for n in labels)}"
            if label.startswith("batch")
            else label
            for label in labels
        )
        for labels in plain
    ]
    if any(len(set(labels)) != len(labels) for labels in (*aligned, result)):
        raise Unstated
    if len(tensors) == 1:
        if set(result) != set(aligned[0]):
            raise Unstated
        order = [aligned[0].index(label) for label in result]
        shape = tuple(b.shape(tensors[0])[axis] for axis in order)
        return b.move(tensors[0], movement.permute(order), "permute", shape)
    if len(tensors) != 2:
        raise Unstated
    return b.contract(tensors[0], tensors[1], (*aligned, result))


def _einsum_term(term: str, rank: int) -> tuple[str, ...]:
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after)
    if "." in before + after or hidden < 0 or (hidden and not dots):
        raise Unstated
    return (*before, *_labels(hidden), *after)


PRODUCTS: dict[str, Row] = {"MatMul": _matmul, "Gemm": _gemm, "Einsum": _einsum}
"""Their rows; :mod:`attncompile.frontends.onnx_rows` has all."""
CONTRIB_PRODUCTS: dict[str, Row] = {"FusedMatMul": _fused_matmul}
"""Those of com.microsoft."""
