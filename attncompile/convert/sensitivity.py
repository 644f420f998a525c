"""Which projections a precision hurts most: each one alone, on the states that the float32 model gives it.

One model holds all projections side by side, each with its own input and output. The quantiser itself is run on that
model, so what is compared is what ONNX Runtime computes, and an error of one projection reaches no other.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx_ir
import torch

from attncompile.convert.calibration import Call
from attncompile.convert.change import observed
from attncompile.convert.precision import Precision, write_precise
from attncompile.convert.runtime import results, save, session


def most_hurt(
    source: Path, names: Collection[str], precision: Precision, call: Call, provider: str, scratch: Path
) -> tuple[str, ...]:
    """The projections by their relative error ``‖rounded − float32‖ / ‖float32‖``, the largest first.

    Args:
        source: the float32 model; names: its projections.
        precision: how they would be rounded.
        call: what the model reads; provider: where it runs.
        scratch: a folder for files.
    """
    wanted = set(names)
    model = onnx_ir.load(source)
    states = {_name(node.inputs[0]): node for node in model.graph if node.name in wanted}
    fed = {name: tensor.numpy() for name, tensor in observed(model, call, provider, states).items() if name in states}
    alone, outputs = _alone(onnx_ir.load(source), wanted, set(fed))
    plain, rounded = scratch / "alone.onnx", scratch / "alone-rounded.onnx"
    save(alone, plain)
    write_precise(plain, rounded, precision, list(outputs), [fed], provider)
    exact, found = (results(session(file, provider), fed) for file in (plain, rounded))
    errors = {name: _relative(found[output], exact[output]) for name, output in outputs.items()}
    return tuple(sorted(errors, key=lambda name: errors[name], reverse=True))


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    size = float(wanted.double().norm())
    return float((found.double() - wanted.double()).norm()) / size if size else 0.0


def _name(value: onnx_ir.Value | None) -> str:
    return (value.name or "") if value is not None else ""


def _alone(model: onnx_ir.Model, names: set[str], states: set[str]) -> tuple[onnx_ir.Model, dict[str, str]]:
    """A model of nothing but the projections, whose inputs are their states, and its output for each of them."""
    nodes = [node for node in model.graph if node.name in names and _name(node.inputs[0]) in states]
    inputs: dict[str, onnx_ir.Value] = {}
    weights: dict[str, onnx_ir.Value] = {}
    made, outputs = [], {}
    for node in nodes:
        state, weight = (_copied(value, known) for value, known in zip(node.inputs, (inputs, weights), strict=True))
        copy = onnx_ir.node("MatMul", [state, weight], name=node.name)
        copy.outputs[0].name = f"{node.name}.alone"
        copy.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        made.append(copy)
        outputs[node.name or ""] = copy.outputs[0].name
    graph = onnx_ir.Graph(
        list(inputs.values()),
        [node.outputs[0] for node in made],
        nodes=made,
        initializers=list(weights.values()),
        name="projections",
        opset_imports=dict(model.opset_imports),
    )
    return onnx_ir.Model(graph, ir_version=model.ir_version), outputs


def _copied(value: onnx_ir.Value | None, known: dict[str, onnx_ir.Value]) -> onnx_ir.Value:
    """A value of the same name for another graph, with the same numbers; of a state the rank is all that is told."""
    assert value is not None
    stored = value.const_value
    sizes = [None] * len(value.shape) if value.shape is not None else None
    known_sizes = stored.numpy().shape if stored is not None else sizes
    return known.setdefault(
        _name(value),
        onnx_ir.Value(
            name=value.name,
            type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT),
            shape=None if known_sizes is None else onnx_ir.Shape(known_sizes),
            const_value=stored,
        ),
    )


__all__ = ["most_hurt"]
