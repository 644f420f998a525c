"""Rotary maps and projections taken into ``GroupQueryAttention``, as far as it computes the same with them.

The operator turns queries and keys itself where it is given the tables of all positions: a new token's is the number of
keys before it. That is so in a graph whose tables are made of a ``Range`` of the new positions and nothing else, row by
row; its rows are computed once for all positions that the model has, and become weights. The ``Range`` must begin with
the number of cached keys: whether it does is a question to the sizes of the graph as it was lifted, and where they do
not prove it, the maps stay in front of the operator.

Query, key and value are then products of one tensor with three weights, and may be one product: the operator takes the
three side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from attncompile.codegen.onnx.in_place import IN_PLACE, Counted
from attncompile.codegen.onnx.tried import versions, why_not
from attncompile.codegen.onnx.values import (
    MICROSOFT,
    Builder,
    constant,
    dimensions,
    known_axis,
    number,
    producer,
    read_once,
)

QUERY, KEY, VALUE, COSINES, SINES = 0, 1, 2, 7, 8
"""Inputs of the operator."""

SAMPLES = ((0, 5), (3, 1), (11, 4))
"""First position and number of positions for which rows of a table are computed again by themselves."""

CHANNELS = 16
"""The operator turns heads whose channels are a multiple of it (ONNX Runtime 1.22 to 1.32 refuse others)."""

LARGEST_TABLE = 2**28
"""Elements of a table beyond which it is not stored."""


@dataclass(frozen=True)
class Packed:
    """What was taken into the operator: rotary maps, and projections that became one."""

    rotary: int
    projections: int


Begins = Callable[[ir.Value, ir.Value, ir.Value], bool]
"""Whether it is proven that a first position is the number of keys less that of the new ones ``[B, G, I, D]``."""


def pack(
    model: ir.Model,
    provider: str = "cpu",
    version: str | None = None,
    longest: int | None = None,
    dtype: str = "float32",
    begins: Begins | None = None,
) -> Packed:
    """Rewrite the ``GroupQueryAttention`` nodes that this package wrote for buffers, in place.

    Args:
        model: the model; provider: where it will run; version: of ONNX Runtime, the installed one if none.
        longest: positions that the model has at most; rotary maps stay where it does not say.
        dtype: that the operator will run in.
        begins: what is known of first positions; rotary maps stay where nothing is.
    """
    right = partial(_right, provider=provider, version=version, dtype=dtype)
    nodes = [node for node in model.graph if IN_PLACE in node.meta and None not in node.inputs[:5]]
    tables: dict[ir.Value, _Table | None] = {}
    turned = []
    if begins is not None and longest:
        turned = [node for node in nodes if _take_rotary(model, node, tables, right, longest, begins)]
    merged = [node for node in nodes if _merge(model, node, right, rotary=node in turned)]
    return Packed(2 * len(turned), 3 * len(merged))


Right = Callable[[Sequence[str]], bool]
"""Whether the operator was found right with some features."""


def _right(features: Sequence[str], *, provider: str, version: str | None, dtype: str) -> bool:
    """Whether the operator was found right with these; on a provider that was not tried it is taken at its word."""
    if not versions(provider):
        return True
    return not why_not(MICROSOFT, "GroupQueryAttention", features, dtype, version=version, provider=provider)


# Rotary maps


@dataclass(frozen=True)
class _Rotary:
    """A map of flat operands, with the tables of its positions."""

    before: ir.Value
    cosines: ir.Value
    sines: ir.Value


def _rotary_of(value: ir.Value | None, heads: int) -> _Rotary | None:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "RotaryEmbedding" or value is None or not read_once(value):
        return None
    if node.attributes.get_int("num_heads", 0) != heads or node.attributes.get_float("scale", 1.0) != 1.0:
        return None
    if any(node.attributes.get_int(name, 0) != 0 for name in ("interleaved", "rotary_embedding_dim")):
        return None
    if node.domain == MICROSOFT:
        first = constant(node.inputs[1])
        inputs = (node.inputs[0], *node.inputs[2:4]) if first is not None and not first.any() else ()
    else:
        inputs = tuple(node.inputs[:3]) if len(node.inputs) == 3 else ()
    if len(inputs) != 3 or any(one is None for one in inputs):
        return None
    x, cosines, sines = inputs
    return _Rotary(x, cosines, sines) if x is not None and cosines is not None and sines is not None else None


def _take_rotary(
    model: ir.Model,
    node: ir.Node,
    tables: dict[ir.Value, _Table | None],
    right: Right,
    longest: int,
    begins: Begins,
) -> bool:
    """Let the operator turn queries and keys, where both are turned by stored tables; whether it does."""
    counted = node.meta[IN_PLACE]
    if not isinstance(counted, Counted) or not right(("rotary", "rotary behind a cache")):
        return False
    counts = [node.attributes.get_int(name, 0) for name in ("num_heads", "kv_num_heads")]
    found = [_rotary_of(node.inputs[place], count) for place, count in zip((QUERY, KEY), counts, strict=True)]
    query, key = found
    if query is None or key is None or (query.cosines, query.sines) != (key.cosines, key.sines):
        return False
    for table in (query.cosines, query.sines):
        if table not in tables:
            tables[table] = _stored(model, table, longest)
    cosines, sines = (tables[table] for table in (query.cosines, query.sines))
    if cosines is None or sines is None:
        return False
    if not all(begins(table.first, counted.keys, counted.new) for table in (cosines, sines)):
        return False
    node.resize_inputs(max(len(node.inputs), SINES + 1))
    maps = [node.inputs[place].producer() for place in (QUERY, KEY)]  # type: ignore[union-attr]
    for place, value in ((QUERY, query.before), (KEY, key.before), (COSINES, cosines.rows), (SINES, sines.rows)):
        node.replace_input_with(place, value)
    node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
    model.graph.remove([one for one in maps if one is not None], safe=True)
    return True


@dataclass(frozen=True)
class _Table:
    """Cosines or sines of all positions as a weight, and the position that a call's first row is of."""

    rows: ir.Value
    first: ir.Value


def _stored(model: ir.Model, table: ir.Value, longest: int) -> _Table | None:
    """A table ``[S, D/2]`` of the new positions as a weight ``[longest, D/2]`` of all positions; ``None`` where it is
    made of something else.
    """
    nodes = _makers(table)
    ranges = [node for node in nodes or () if node.op_type == "Range" and node.domain == ""]
    if nodes is None or len(ranges) != 1 or number(ranges[0].inputs[2]) != 1.0:
        return None
    start = ranges[0].inputs[0]
    rows = _rows(model, table, ranges[0].outputs[0], nodes)
    first_row = rows(np.zeros(1, dtype=np.int64)) if rows is not None else None
    if start is None or rows is None or first_row is None or longest * first_row.size > LARGEST_TABLE:
        return None
    if 2 * first_row.size % CHANNELS:
        return None
    whole = rows(np.arange(longest, dtype=np.int64))
    if whole is None or len(whole) != longest:
        return None
    for first, count in SAMPLES:  # each row is a function of its own position
        part = rows(np.arange(first, first + count, dtype=np.int64)) if first + count <= longest else None
        if part is not None and not np.array_equal(part, whole[first : first + count]):
            return None
    name = Builder(model.graph, table.name or "table").fresh("all_positions")
    made = ir.Value(
        name=name,
        shape=ir.Shape(whole.shape),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(whole, name=name),
    )
    model.graph.register_initializer(made)
    return _Table(made, start)


def _makers(value: ir.Value) -> list[ir.Node] | None:
    """The nodes that make a value of constants and a ``Range``, in order; ``None`` where an input takes part."""
    found: set[ir.Node] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        node = one.producer()
        if node is None:
            if one.const_value is None or one.is_graph_input():
                return None
            continue
        if node in found:
            continue
        found.add(node)
        if node.domain or any(attribute.type is ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            return None
        if node.op_type != "Range":
            waiting += [given for given in node.inputs if given is not None]
    made = value.producer()
    return [node for node in (made.graph if made is not None else None) or () if node in found]


Rows = Callable[[np.ndarray], "np.ndarray | None"]
"""Rows of a table for positions, int64 ``[S]``; ``None`` where they cannot be computed."""


def _rows(model: ir.Model, table: ir.Value, positions: ir.Value, nodes: Sequence[ir.Node]) -> Rows | None:
    """Computes rows of a table for positions, in ONNX Runtime; ``None`` where it does not run."""
    import onnx
    import onnxruntime

    behind = [node for node in nodes if node.op_type != "Range"]
    read = {value.name: value for node in behind for value in node.inputs if value is not None}
    stored = [
        onnx.numpy_helper.from_array(np.asarray(value.const_value.numpy()), name)
        for name, value in read.items()
        if value.const_value is not None
    ]
    graph = onnx.helper.make_graph(
        [ir.to_proto(node) for node in behind],
        "table",
        [onnx.helper.make_tensor_value_info(str(positions.name), onnx.TensorProto.INT64, [None])],
        [onnx.helper.make_tensor_value_info(str(table.name), onnx.TensorProto.FLOAT, None)],
        stored,
    )
    imports = [onnx.helper.make_opsetid(domain, number) for domain, number in model.opset_imports.items()]
    proto = onnx.helper.make_model(graph, opset_imports=imports, ir_version=model.ir_version)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # ONNX Runtime's own errors share no other base
        return None

    def rows(numbers: np.ndarray) -> np.ndarray | None:
        try:
            (found,) = session.run(None, {str(positions.name): numbers})
        except Exception:
            return None
        return np.asarray(found).reshape(-1, found.shape[-1])

    return rows


# Projections


@dataclass(frozen=True)
class _Projection:
    """``x @ weight + bias``; no bias: ``None``."""

    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None


def _projection(value: ir.Value | None) -> _Projection | None:
    """The product with a stored matrix that makes a value which nobody else reads."""
    if value is None or not read_once(value):
        return None
    bias: ir.Value | None = None
    total = producer(value, "Add")
    if total is not None:
        sides = [(total.inputs[0], total.inputs[1]), (total.inputs[1], total.inputs[0])]
        pair = next(((a, b) for a, b in sides if producer(a, "MatMul") and _rank(b) == 1), None)
        if pair is None or pair[0] is None or not read_once(pair[0]):
            return None
        value, bias = pair
    node = producer(value, "MatMul")
    if node is None or node.inputs[0] is None or node.inputs[1] is None or _rank(node.inputs[1]) != 2:
        return None
    return _Projection(node.inputs[0], node.inputs[1], bias)


def _rank(value: ir.Value | None) -> int | None:
    """How many axes a stored float32 tensor has."""
    known = value.const_value if value is not None and not value.is_graph_input() else None
    return len(known.shape) if known is not None and known.dtype is ir.DataType.FLOAT else None


def _merge(model: ir.Model, node: ir.Node, right: Right, *, rotary: bool) -> bool:
    """Give the operator query, key and value side by side, made by one product; whether it is done."""
    features = ["packed query, key and value behind a cache", *(["rotary, packed"] if rotary else [])]
    if not right(features):
        return False
    found = [_projection(node.inputs[place]) for place in (QUERY, KEY, VALUE)]
    parts = [part for part in found if part is not None]
    if len(parts) < 3 or len({part.x for part in parts}) > 1 or len({part.bias is None for part in parts}) > 1:
        return False
    build = Builder(model.graph, f"{node.name}.packed")
    packed = build("MatMul", parts[0].x, _side_by_side(model, build, [part.weight for part in parts]))
    biases = [part.bias for part in parts if part.bias is not None]
    if biases:
        packed = build("Add", packed, _side_by_side(model, build, biases))
    sizes, width = dimensions(parts[0].x), sum(known_axis(part.weight, 1) or 0 for part in parts)
    packed.dtype, packed.shape = ir.DataType.FLOAT, ir.Shape([*sizes[:-1], width]) if sizes else None
    for made in build.nodes:
        made.metadata_props.update(node.metadata_props)
    build.insert_before(node)
    node.replace_input_with(QUERY, packed)
    node.replace_input_with(KEY, None)
    node.replace_input_with(VALUE, None)
    return True


def _side_by_side(model: ir.Model, build: Builder, values: Sequence[ir.Value]) -> ir.Value:
    """Stored tensors one behind the other along their last axis, put together when they are written."""
    tensors = [value.const_value for value in values if value.const_value is not None]
    sizes = [tensor.shape.numpy() for tensor in tensors]
    shape = ir.Shape([*sizes[0][:-1], sum(size[-1] for size in sizes)])
    name = build.fresh("weight")

    def whole() -> ir.TensorProtocol:
        return ir.tensor(np.concatenate([tensor.numpy() for tensor in tensors], axis=-1), name=name)

    made = ir.Value(
        name=name,
        shape=shape,
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.LazyTensor(whole, dtype=ir.DataType.FLOAT, shape=shape, name=name),
    )
    model.graph.register_initializer(made)
    return made


__all__ = ["Begins", "Packed", "pack"]
