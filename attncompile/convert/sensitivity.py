"""Which projections a precision hurts most: the rounding error of each one alone, and what it does to the outputs.

The error of a projection is that of the quantiser itself, run on a model of all projections side by side, each with
its own input: what is compared is what ONNX Runtime computes, and an error of one reaches no other. Each error is then
added to that projection's result in the float32 model, one at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx_ir
import torch

from attncompile.codegen.onnx.values import Builder
from attncompile.convert.calibration import Call
from attncompile.convert.change import observed
from attncompile.convert.precision import Precision, write_precise
from attncompile.convert.runtime import feeds, results, save, session
from attncompile.frontends.cached import PRESENT


def most_hurt(
    source: Path, names: Collection[str], precision: Precision, call: Call, provider: str, scratch: Path
) -> tuple[str, ...]:
    """The projections by how far their rounding moves an output, the farthest first.

    Args:
        source: the float32 model; names: its projections.
        precision: how they would be rounded.
        call: what the model reads; provider: where it runs.
        scratch: a folder for files.
    """
    errors = _errors(source, set(names), precision, call, provider, scratch)
    disturbed = scratch / "disturbed.onnx"
    model = onnx_ir.load(source)
    entries = _disturbed(model, set(errors))
    save(model, disturbed)
    del model
    loaded = session(disturbed, provider)
    quiet = {entry: np.zeros(1, dtype=np.float32) for entry in entries.values()}
    # the inputs of a call are matched by name, or by order, so what was added comes after them
    fed = {name: array for name, array in feeds(loaded, call).items() if name not in quiet}
    told = [entry.name for entry in loaded.get_outputs() if not entry.name.startswith(PRESENT)]
    exact = results(loaded, {**fed, **quiet}, told)
    moved = {}
    for name, entry in entries.items():
        found = results(loaded, {**fed, **quiet, entry: errors[name]}, told)
        moved[name] = max(_relative(found[output], exact[output]) for output in told if output in exact)
    return tuple(sorted(moved, key=lambda name: moved[name], reverse=True))


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    if not wanted.is_floating_point():
        return 0.0
    size = float(wanted.double().norm())
    return float((found.double() - wanted.double()).norm()) / size if size else 0.0


def _errors(
    source: Path, names: set[str], precision: Precision, call: Call, provider: str, scratch: Path
) -> dict[str, np.ndarray]:
    """What rounding adds to the result of each projection."""
    model = onnx_ir.load(source)
    states = {_name(node.inputs[0]) for node in model.graph if node.name in names}
    fed = {name: tensor.numpy() for name, tensor in observed(model, call, provider, states).items() if name in states}
    alone, outputs = _alone(onnx_ir.load(source), names, set(fed))
    plain, rounded = scratch / "alone.onnx", scratch / "alone-rounded.onnx"
    save(alone, plain)
    write_precise(plain, rounded, precision, list(outputs), [fed], provider, plain.name)
    exact, found = (results(session(file, provider), fed) for file in (plain, rounded))
    return {name: (found[output] - exact[output]).numpy() for name, output in outputs.items()}


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


def _disturbed(model: onnx_ir.Model, names: set[str]) -> Mapping[str, str]:
    """Add an input to the result of each projection, in place; the names of the inputs by those of the nodes."""
    entries = {}
    for node in [node for node in model.graph if node.name in names]:
        entry = onnx_ir.Value(name=f"rounding.{node.name}", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
        model.graph.inputs.append(entry)
        (result,) = node.outputs
        build = Builder(model.graph, f"{node.name}.disturbed")
        total = build("Add", result, entry)
        total.dtype, total.shape = result.dtype, result.shape
        result.replace_all_uses_with(total, replace_graph_outputs=True)
        build.nodes[-1].replace_input_with(0, result)
        if total.is_graph_output():
            result.name, total.name = f"{result.name}.before", result.name
        build.insert_after(node)
        entries[node.name or ""] = entry.name or ""
    return entries


__all__ = ["most_hurt"]
