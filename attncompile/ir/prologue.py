"""Rotary maps of a Spec's operands: stated in the Spec, or left to whoever makes its inputs.

The law: with ``P`` a position map, ``attend(P(q), …)`` of the tensor before the map is ``attend(q', …)`` of the
rotated tensor ``q' = P(q)``. Both Specs compute the same; they differ in what they read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from attncompile.ir.operation import Operation
from attncompile.ir.ops import Position, Quantize
from attncompile.ir.regroup import Regroup
from attncompile.ir.spec import Spec
from attncompile.ir.types import Value, bind_sizes


@dataclass(frozen=True)
class Prologue:
    """The rotary maps that make inputs of a Spec, as far as they could be stated in it.

    Attributes:
        positions: each reads an input of the Spec, which then is the tensor before the map; what its result is called
            does not matter.
        inputs: types of those tensors, and of the captured ones that cos and sin load and the Spec does not have yet.
        refused: of other inputs, why nothing was pulled in: the input's name and the reason.
    """

    positions: tuple[Position, ...] = ()
    inputs: tuple[Value, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()


def with_positions(spec: Spec, prologue: Prologue) -> Spec:
    """The Spec whose inputs are the tensors before their rotary maps, which it states itself.

    Raises:
        ValueError: when a map reads no input of the Spec, or the result does not verify.
    """
    given = {value.name for value in spec.inputs}
    taken = {*spec.types(), *(value.name for value in prologue.inputs)}
    rotated: dict[str, str] = {}
    steps: list[Operation] = []
    for position in prologue.positions:
        if position.tensor not in given:
            raise ValueError(f"{spec.name} has no input {position.tensor!r} that a rotary map could make")
        name = f"{position.tensor}_rotated"
        while name in taken:
            name += "_"
        taken.add(name)
        rotated[position.tensor] = name
        steps.append(dataclasses.replace(position, out=name))
    before = {value.name: value for value in prologue.inputs}
    inputs = [before.pop(value.name, value) for value in spec.inputs]
    operations = (*steps, *(reading(operation, rotated) for operation in spec.operations))
    return dataclasses.replace(spec, inputs=(*inputs, *before.values()), operations=operations).verify()


def leading_positions(spec: Spec) -> tuple[Position, ...]:
    """The rotary maps of a Spec's inputs, in order."""
    given = {value.name for value in spec.inputs}
    return tuple(step for step in spec.operations if isinstance(step, Position) and step.tensor in given)


def without_positions(spec: Spec) -> Spec:
    """The Spec that reads the results of its leading rotary maps, under the names that they have in it."""
    steps = leading_positions(spec)
    operations = tuple(operation for operation in spec.operations if operation not in steps)
    read = {name for operation in operations for name in (*operation.operands(), *_captured(operation))}
    types = spec.types()
    made = {step.tensor: step.out for step in steps}
    inputs: list[Value] = []
    for value in spec.inputs:
        if value.name in read or value.name in spec.outputs:
            inputs.append(value)
        if value.name in made:
            inputs.append(Value(made[value.name], types[made[value.name]]))
    # what nothing reads at all stays: only what the maps alone have read goes
    loaded = {name for step in steps for name in _captured(step)} | set(made)
    idle = [value for value in spec.inputs if value.name not in read | loaded and value not in inputs]
    return dataclasses.replace(spec, inputs=(*inputs, *idle), operations=operations)


def rotated_tensors(
    spec: Spec, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Inputs of :func:`without_positions` from those of the Spec, by the definition of its maps.

    Args:
        spec: with leading rotary maps.
        tensors: its inputs by name.
        dtype: of the arithmetic and the results; with ``None`` at least float32 for the arithmetic, and the results
            as each tensor is.
    """
    sizes = bind_sizes({value.name: value.type for value in spec.inputs}, tensors)
    known = dict(tensors)
    for step in leading_positions(spec):
        own = tensors[step.tensor].dtype
        made = step.reference(tensors, sizes, dtype or torch.promote_types(own, torch.float32))[step.out]
        known[step.out] = made.to(dtype or own)
    return {value.name: known[value.name] for value in without_positions(spec).inputs}


def reading(operation: Operation, names: Mapping[str, str]) -> Operation:
    """The operation with operands of other names.

    Args:
        operation: any.
        names: operand's name to the one that it reads instead.
    """
    changes = {
        field.name: names[getattr(operation, field.name)]
        for field in dataclasses.fields(operation)
        if field.metadata.get("role") == "operand" and getattr(operation, field.name) in names
    }
    return dataclasses.replace(operation, **changes) if changes else operation


def input_behind(spec: Spec, name: str) -> str:
    """The tensor that a tensor is made of token by token: before rounding, moving and rotary maps."""
    made = {step.out: step.tensor for step in spec.operations if isinstance(step, Quantize | Regroup | Position)}
    while name in made:
        name = made[name]
    return name


def _captured(operation: Operation) -> tuple[str, ...]:
    return tuple(load.tensor for load in operation.captured())


__all__ = [
    "Prologue",
    "input_behind",
    "leading_positions",
    "reading",
    "rotated_tensors",
    "with_positions",
    "without_positions",
]
