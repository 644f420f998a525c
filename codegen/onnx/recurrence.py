"""A Scan whose steps differ as plain ONNX operators: the standard's ``Scan``, one round for each step."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from attncompile.codegen.onnx.attend import Made, Place, arranged, result
from attncompile.codegen.onnx.layouts import single_groups
from attncompile.codegen.onnx.scan import feature, key_features, kv_order, names, scan_writer
from attncompile.codegen.onnx.values import NUMPY_TYPES, Builder
from attncompile.ir.expr import Const
from attncompile.ir.scan import Scan
from attncompile.ir.simplify import simplify

STEPS = 2
"""The axis of the steps in ``[b,h,t,…]``."""


def recurrent_scan(scan: Scan, place: Place) -> Made:
    """The recurrence itself, one state ``[b,h,d,e]`` for each query head, in float32 for narrower operands."""
    writer, build = scan_writer(scan, place), place.build
    order = kv_order(scan, place)

    def of_heads(value: ir.Value) -> ir.Value:
        wide = _cast(build, value, "float32")
        return wide if order is None else build("Gather", wide, build.constant(order), axis=1)

    query, key, value = (arranged(writer, place, name, single_groups) for name in (scan.query, scan.key, scan.value))
    query = _cast(build, feature(writer, scan.feature, query), "float32")
    key, value = of_heads(key_features(writer, scan, key, flat=False)), of_heads(value)
    held = {name: of_heads(arranged(writer, place, name, single_groups)) for name in (scan.gate, scan.rate) if name}
    gate = build("Unsqueeze", build("Exp", held[scan.gate]), build.constant([-1])) if scan.gate else None
    rate = build("Unsqueeze", held[scan.rate], build.constant([-1, -2])) if scan.rate else None
    fixed = None if simplify(scan.decay) == Const(1.0) else _cast(build, writer.write(scan.decay), "float32")
    past = of_heads(arranged(writer, place, scan.past, single_groups)) if scan.past else _zeros(build, query, value)
    queries = build("Mul", query, build.constant(scan.scale, "float32"))
    steps = [value for value in (queries, key, value, gate, rate) if value is not None]
    body = _step(build, len(steps), gate is not None, rate is not None, fixed)
    last, out = build(
        "Scan",
        past,
        *steps,
        outputs=2,
        body=body,
        num_scan_inputs=len(steps),
        scan_input_axes=[STEPS] * len(steps),
        scan_output_axes=[STEPS],
    )
    out = _cast(build, out, place.types[scan.out].dtype, "float32")
    made = result(place, scan.out, out, single_groups(names(place, scan.out)), scan.query)
    if scan.state:
        if order is not None:  # the first query head of each KV head has its state
            last = build("Gather", last, build.constant([order.index(group) for group in sorted(set(order))]), axis=1)
        last = _cast(build, last, place.types[scan.state].dtype, "float32")
        made |= result(place, scan.state, last, single_groups(names(place, scan.state)), scan.key)
    return made


def _cast(build: Builder, value: ir.Value, dtype: str, before: str = "") -> ir.Value:
    """The value in a dtype; nothing is built where it is known to have it."""
    wanted = NUMPY_TYPES[dtype]
    known = NUMPY_TYPES[before] if before else value.dtype
    return value if known == wanted else build("Cast", value, to=int(wanted))


def _zeros(build: Builder, query: ir.Value, value: ir.Value) -> ir.Value:
    """A state ``[b,h,d,e]`` of zeros."""
    ends = build("Shape", query, start=3, end=4), build("Shape", value, start=3, end=4)
    shape = build("Concat", build("Shape", query, start=0, end=2), *ends, axis=0)
    return build("Expand", build.constant(0.0, "float32"), shape)


def _step(build: Builder, steps: int, gated: bool, delta: bool, fixed: ir.Value | None) -> ir.Graph:
    """One round: the state and what one step reads, to the next state and the output ``[b,h,e]``.

    Args:
        build: of the graph around it, which holds the constants.
        steps: how many values a step reads: query ``[b,h,d]``, key, value, then gate ``[b,h,d,1]`` and rate
            ``[b,h,1,1]``, of which ``gated`` and ``delta`` say whether they are there.
        fixed: a decay ``[1,h,1,1]`` that is the same at each step.
    """
    names = [build.fresh("step") for _ in range(steps + 1)]
    given = [ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)) for name in names]
    body = ir.Graph(given, [], nodes=[], name=build.fresh("step"))
    inner = Builder(body, names[0])
    state, query, key, value = given[:4]
    rest: Sequence[ir.Value] = given[4:]
    if fixed is not None:
        state = inner("Mul", state, fixed)
    if gated:
        state = inner("Mul", state, rest[0])
    row, last = inner("Unsqueeze", value, build.constant([-2])), build.constant([-1])
    if delta:
        held = inner("MatMul", inner("Unsqueeze", key, build.constant([-2])), state)
        row = inner("Mul", rest[-1], inner("Sub", row, held))
    state = inner("Add", state, inner("Mul", inner("Unsqueeze", key, last), row))
    out = inner("MatMul", inner("Unsqueeze", query, build.constant([-2])), state)
    out = inner("Squeeze", out, build.constant([-2]))
    body.extend(inner.nodes)
    for output in (state, out):
        output.dtype = ir.DataType.FLOAT
        body.outputs.append(output)
    return body
