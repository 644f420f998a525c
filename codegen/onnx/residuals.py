"""Residual sums in front of a LayerNormalization, written so that ONNX Runtime's CPU keeps them apart.

``LayerNormalization(Add(Add(x W, bias), residual))`` is what a transformer's post-norm block exports to.
ONNX Runtime's own optimiser turns it into SkipLayerNormalization, whose CPU kernel takes about five times
as long as LayerNormalization (0.24 against 0.05 ms for 128 x 384 floats, 1.31). ``Sum(x W, bias,
residual)`` is the same sum, one pass over the data instead of two, and is not fused. Exact up to the order
of the additions.
"""

from __future__ import annotations

import onnx_ir as ir

from attncompile.codegen.onnx.values import Builder, dimensions, producer, read_once, redirect, split_terms


def sum_residuals(model: ir.Model) -> int:
    """Rewrite the residual sums of the model in place; how many there were."""
    graph = model.graph
    sums = [
        node.inputs[0]
        for node in graph
        if node.domain == "" and node.op_type == "LayerNormalization" and producer(node.inputs[0], "Add")
    ]
    done = 0
    for total in dict.fromkeys(sums):
        assert total is not None  # the list above holds outputs of Add nodes
        place = total.producer()
        assert place is not None
        if not read_once(total) or total.dtype is None or not total.dtype.is_floating_point():
            continue
        if dimensions(total) is None:
            continue
        build = Builder(graph, f"{place.name}.residual")
        whole = build("Sum", *split_terms(total))
        build.insert_before(place)
        redirect(total, whole)
        done += 1
    return done
