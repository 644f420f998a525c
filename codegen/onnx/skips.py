"""A residual sum and the RMSNormalization behind it as one operator, ``SkipSimplifiedLayerNormalization``.

``t = x + y; RMSNormalization(t) * weight`` is how each block of a pre-norm decoder ends; ``t`` goes on as the next
sum's ``x``, and is the operator's fourth result. On a GPU, where a step of generation takes as long as its kernels take
to be launched, that is a launch fewer for each. ONNX Runtime's own optimiser joins ``SimplifiedLayerNormalization`` in
this way, not the standard operator.
"""

from __future__ import annotations

import onnx_ir as ir

from attncompile.codegen.onnx.tried import why_not
from attncompile.codegen.onnx.values import MICROSOFT, Builder, dimensions, producer, redirect

OPERATOR = "SkipSimplifiedLayerNormalization"
FEATURES = ("sum of two", "the sum as a result")
"""What is used of it, as the table of tries calls it."""


def fuse_skips(model: ir.Model, provider: str, version: str | None = None, dtype: str = "float32") -> int:
    """Rewrite the model's sums in front of a normalisation in place; how many.

    Args:
        model: opset 23; shapes are known where it matters.
        provider: where it will run; version: of ONNX Runtime, the installed one where it is left out.
        dtype: what its states are rounded to afterwards.
    """
    opset = model.opset_imports.get("", 0)
    for element in dict.fromkeys(("float32", dtype)):
        if why_not(MICROSOFT, OPERATOR, FEATURES, element, version=version, provider=provider, opset=opset):
            return 0
    done = 0
    for node in list(model.graph):
        if node.domain or node.op_type != "RMSNormalization" or node.attributes.get_int("axis", -1) != -1:
            continue
        total, weight = node.inputs
        place = producer(total, "Add")
        if place is None or total is None or total.is_graph_output() or total.dtype is not ir.DataType.FLOAT:
            continue
        summands = [value for value in place.inputs if value is not None]
        sizes = [dimensions(value) for value in (*summands, total)]
        # the operator takes [B, S, C]; a size that nobody knows could be 1 and be broadcast
        if sizes[0] is None or len(sizes[0]) != 3 or None in sizes[0] or any(other != sizes[0] for other in sizes):
            continue
        if weight is None or not _takes(weight, sizes[0][-1]):
            continue
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        build = Builder(model.graph, f"{node.name}.skip")
        normal, _, _, whole = build(OPERATOR, *summands, weight, domain=MICROSOFT, outputs=4, epsilon=epsilon)
        for unread in (1, 2):
            normal.producer().outputs[unread].name = ""
        build.insert_before(place)  # others may read the sum before the normalisation does
        redirect(node.outputs[0], normal)
        redirect(total, whole)
        done += 1
    return done


def _takes(weight: ir.Value, channels: int | str | None) -> bool:
    """Whether the operator takes a weight: ``[C]`` in float32, where ``RMSNormalization`` broadcasts any and has a type
    of its own for it; and one that is there before the sum, not computed from it.
    """
    given = weight.is_initializer() or weight.is_graph_input()
    return given and weight.dtype is ir.DataType.FLOAT and dimensions(weight) == (channels,)
