"""One Scan as ONNX nodes: ``com.microsoft.LinearAttention``, and the parallel form in plain operators."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import torch

from attncompile.codegen.onnx.attend import Made, Place, arranged, result
from attncompile.codegen.onnx.expressions import Writer
from attncompile.codegen.onnx.layouts import Groups, flat_groups, single_groups
from attncompile.codegen.onnx.reading import fixed, update_rule
from attncompile.codegen.onnx.values import MICROSOFT, NUMPY_TYPES
from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import TRUE, Const, Index
from attncompile.ir.refusal import Refusal, RefusalError
from attncompile.ir.scan import Scan
from attncompile.ir.simplify import simplify


def scan_writer(scan: Scan, place: Place) -> Writer:
    query = place.types[scan.query]
    extents = {"b": query.sizes[0], "h": query.sizes[1], "i": query.sizes[2], "j": query.sizes[2]}
    return Writer(place.build, place.types, place.operands, ("b", "h", "i", "j"), extents, query.dtype, place.shared)


def feature(writer: Writer, name: str, value: ir.Value) -> ir.Value:
    """The feature map, pointwise."""
    build = writer.build
    if name == "identity":
        return value
    if name == "relu":
        return build("Relu", value)
    if name == "elu1":
        return build("Add", build("Elu", value), build.constant(1.0, writer.dtype))
    raise RefusalError(Refusal("no-onnx-form", f"the feature map {name!r} has no ONNX form"))


def key_features(writer: Writer, scan: Scan, key: ir.Value, *, flat: bool) -> ir.Value:
    """The features of keys ``[b,j,g·d]`` (``flat``) or ``[b,g,j,d]``, zero where the mask hides a key."""
    build, features = writer.build, feature(writer, scan.feature, key)
    mask = simplify(scan.mask)
    if mask == TRUE:
        return features
    visible = replace(writer, axes=("b", "h", "j", "d")).write(mask)
    if not writer.visible_axes(mask):
        visible = build("Reshape", visible, build.constant([1]))
    elif flat:
        visible = build("Squeeze", visible, build.constant([1]))
    return build("Where", visible, features, build.constant(0.0, writer.dtype))


def names(place: Place, name: str) -> tuple[str, ...]:
    return tuple(axis.name for axis in place.types[name].axes)


def linear_attention(scan: Scan, place: Place) -> Made:
    """The recurrent operator; the logarithm of the decay is its gate."""
    writer, build = scan_writer(scan, place), place.build
    query, key, value = (arranged(writer, place, name, flat_groups) for name in (scan.query, scan.key, scan.value))
    query = feature(writer, scan.feature, query)
    key = key_features(writer, scan, key, flat=True)
    heads = fixed(place.types[scan.key].sizes[1]) or 0
    past = arranged(writer, place, scan.past, single_groups) if scan.past else None
    rate = arranged(writer, place, scan.rate, _by_step) if scan.rate else None
    out, state = build(
        "LinearAttention",
        query,
        key,
        value,
        past,
        _gate(writer, scan, place, query, heads),
        rate,
        domain=MICROSOFT,
        outputs=2,
        q_num_heads=fixed(place.types[scan.query].sizes[1]),
        kv_num_heads=heads,
        scale=scan.scale,
        update_rule=update_rule(scan),
    )
    return {
        **result(place, scan.out, out, flat_groups(names(place, scan.out)), scan.query),
        **(result(place, scan.state, state, single_groups(names(place, scan.state)), scan.key) if scan.state else {}),
    }


def _by_step(axes: tuple[str, ...]) -> Groups:
    """``[b,t,g]`` of the axes of ``[b,g,t]``."""
    batch, head, position = axes
    return ((batch,), (position,), (head,))


def _gate(writer: Writer, scan: Scan, place: Place, query: ir.Value, heads: int) -> ir.Value | None:
    """The logarithm of the decay of each step, ``[b,t,g]`` or, by channel, ``[b,t,g·d]``; ``None`` without one."""
    build = writer.build
    gate = arranged(writer, place, scan.gate, flat_groups) if scan.gate else None
    if simplify(scan.decay) == Const(1.0):
        return gate
    # log decay [1, h, 1, 1], or one number, as [b, t, h]
    logs = build("Reshape", build("Log", writer.write(scan.decay)), build.constant([1, 1, -1]))
    if gate is None:
        row = build("Expand", logs, build.constant([1, 1, heads]))
        return build("Expand", row, build("Concat", build("Shape", query, start=0, end=2), build.constant([heads]),
                                          axis=0))  # fmt: skip
    channels = fixed(place.types[scan.gate].sizes[3]) or 1
    if channels > 1:
        row = build("Expand", logs, build.constant([1, 1, heads]))
        each = build("Expand", build("Unsqueeze", row, build.constant([-1])), build.constant([1, 1, heads, channels]))
        logs = build("Reshape", each, build.constant([1, 1, heads * channels]))
    return build("Add", gate, logs)


def parallel_scan(scan: Scan, place: Place) -> Made:
    """``(q k^T * scale * decay^(i-j) for j <= i) v``: quadratic, in plain operators."""
    writer, build = scan_writer(scan, place), place.build
    query, key, value = (arranged(writer, place, name, single_groups) for name in (scan.query, scan.key, scan.value))
    query = feature(writer, scan.feature, query)
    key = key_features(writer, scan, key, flat=False)
    order = kv_order(scan, place)
    if order is not None:
        key, value = (build("Gather", side, build.constant(order), axis=1) for side in (key, value))
    distance = Index("i") - Index("j")
    zero = build.constant(0.0, writer.dtype)
    # the power of a distance that is never negative: a small decay to a large negative power overflows
    steps = build("Max", build("Cast", writer.write(distance), to=int(NUMPY_TYPES[writer.dtype])), zero)
    decays = build("Pow", writer.write(scan.decay), steps)
    decays = build("Where", writer.write(Index("j") <= Index("i")), decays, zero)
    raw = build("MatMul", query, build("Transpose", key, perm=[0, 1, 3, 2]))
    weights = build("Mul", build("Mul", raw, build.constant(scan.scale, writer.dtype)), decays)
    out = build("MatMul", weights, value)
    if scan.normalize:
        total = build("Abs", build("ReduceSum", weights, build.constant([3]), keepdims=1))
        out = build("Div", out, build("Max", total, build.constant(1.0, writer.dtype)))
    return result(place, scan.out, out, single_groups(names(place, scan.out)), scan.query)


def kv_order(scan: Scan, place: Place) -> list[int] | None:
    """The KV head of each query head, or ``None`` where each has its own, or their numbers are not fixed."""
    heads, groups = (fixed(place.types[side].sizes[1]) for side in (scan.query, scan.key))
    if heads is None or groups is None or scan.kv_head == Index("h"):
        return None
    grid = {"h": torch.arange(heads)}
    return [int(number) for number in evaluate(scan.kv_head, Environment(grid)).expand(heads)]
