"""Ways to damage an ONNX file: each changes a model a little, or its bytes, as a random number generator says."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx

Change = Callable[[onnx.ModelProto, random.Random], None]

SIZES = (0, -1, 1, 2, 7, 2**31 - 1, 2**31, 2**40, 2**62, -(2**63))
"""Numbers that sizes, axes and lengths are replaced by."""

NAMES = ("", "nothing_there", "a#b", "../x", "ä→", "x" * 300, "input_ids", "%s{}", "\n")


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def node_of(model: onnx.ModelProto, draw: random.Random) -> onnx.NodeProto:
    """Some node, of the graph, a body or a function."""
    holders = [*_graphs(model.graph), *model.functions]
    # most of the time the graph itself: bodies and functions are small
    holder = holders[0] if draw.random() < 0.6 else draw.choice(holders)
    return draw.choice(holder.node or model.graph.node)


def dangling(model: onnx.ModelProto, draw: random.Random) -> None:
    node = node_of(model, draw)
    if node.input:
        node.input[draw.randrange(len(node.input))] = "nothing_there"


def rewired(model: onnx.ModelProto, draw: random.Random) -> None:
    """Often a cycle."""
    node, other = node_of(model, draw), node_of(model, draw)
    if node.input and other.output:
        node.input[draw.randrange(len(node.input))] = other.output[0]


def removed(model: onnx.ModelProto, draw: random.Random) -> None:
    node = node_of(model, draw)
    if node in model.graph.node and len(model.graph.node) > 1:
        model.graph.node.remove(node)


def made_twice(model: onnx.ModelProto, draw: random.Random) -> None:
    node, other = node_of(model, draw), node_of(model, draw)
    if node.output and other.output:
        node.output[0] = other.output[0]


def repeated(model: onnx.ModelProto, draw: random.Random) -> None:
    model.graph.node.append(copy.deepcopy(node_of(model, draw)))


def other_version(model: onnx.ModelProto, draw: random.Random) -> None:
    model.ir_version = draw.choice([0, 1, 2, 3, 8, 14, 99, 2**40])


def other_operators(model: onnx.ModelProto, draw: random.Random) -> None:
    entry = draw.choice(model.opset_import) if model.opset_import else model.opset_import.add()
    if draw.random() < 0.7:
        entry.version = draw.choice([0, -3, 1, 5, 7, 11, 17, 21, 27, 99, 2**40])
    elif draw.random() < 0.5:
        entry.domain = draw.choice(["", "ai.onnx", "nowhere", "com.microsoft"])
    else:
        model.opset_import.add(domain=draw.choice(["", "ai.onnx", "nowhere"]), version=draw.choice([1, 13, 18]))


def other_type(model: onnx.ModelProto, draw: random.Random) -> None:
    kinds = (
        "Nothing", "Softmax", "MatMul", "Add", "Gather", "Loop", "If", "Scan", "Attention", "LinearAttention",
        "Reshape", "Expand", "Range", "ConstantOfShape", "Slice", "Transpose", "Where", "Concat", "Einsum",
        "MultiHeadAttention", "GroupQueryAttention", "DequantizeLinear", "MatMulInteger", "Split", "Shape", "Cast",
    )  # fmt: skip
    node_of(model, draw).op_type = draw.choice(kinds)


def other_domain(model: onnx.ModelProto, draw: random.Random) -> None:
    node_of(model, draw).domain = draw.choice(["nowhere", "com.microsoft", "ai.onnx.ml", "ai.onnx", "", "pkg.local"])


def other_name(model: onnx.ModelProto, draw: random.Random) -> None:
    """Of a node, an initialiser, an input, or a value wherever it is read and made."""
    name, node = draw.choice(NAMES), node_of(model, draw)
    which = draw.randrange(4)
    if which == 0:
        node.name = name
    elif which == 1 and model.graph.initializer:
        draw.choice(model.graph.initializer).name = name
    elif which == 2 and model.graph.input:
        draw.choice(model.graph.input).name = name
    elif node.output:
        old = node.output[0]
        for graph in _graphs(model.graph):
            for each in graph.node:
                for values in (each.input, each.output):
                    values[:] = [name if value == old else value for value in values]


def other_shape(model: onnx.ModelProto, draw: random.Random) -> None:
    """A bomb of initialisers, say: a few bytes that ask for 2^62 elements."""
    tensors = [tensor for tensor in model.graph.initializer if tensor.dims]
    if tensors:
        tensor = draw.choice(tensors)
        tensor.dims[draw.randrange(len(tensor.dims))] = draw.choice(SIZES)


def other_rank(model: onnx.ModelProto, draw: random.Random) -> None:
    if model.graph.initializer:
        tensor = draw.choice(model.graph.initializer)
        if tensor.dims and draw.random() < 0.5:
            tensor.dims.pop()
        else:
            tensor.dims.extend([draw.choice(SIZES)] * draw.choice([1, 1, 2, 70]))


def other_elements(model: onnx.ModelProto, draw: random.Random) -> None:
    if model.graph.initializer:
        draw.choice(model.graph.initializer).data_type = draw.choice([0, 1, 2, 6, 7, 8, 9, 10, 11, 16, 17, 22, 99, -1])


def few_bytes(model: onnx.ModelProto, draw: random.Random) -> None:
    if model.graph.initializer:
        draw.choice(model.graph.initializer).raw_data = draw.randbytes(draw.choice([0, 3, 8]))


def no_bytes(model: onnx.ModelProto, draw: random.Random) -> None:
    """A tensor of any shape that holds nothing at all, or its numbers in another field."""
    if model.graph.initializer:
        tensor = draw.choice(model.graph.initializer)
        tensor.ClearField("raw_data")
        if draw.random() < 0.5:
            tensor.float_data.extend([1.0] * draw.choice([1, 5]))


def sparse(model: onnx.ModelProto, draw: random.Random) -> None:
    if model.graph.initializer:
        tensor = draw.choice(model.graph.initializer)
        made = model.graph.sparse_initializer.add(dims=[draw.choice(SIZES), draw.choice(SIZES)])
        made.values.CopyFrom(tensor)
        made.indices.CopyFrom(tensor)


def other_number(model: onnx.ModelProto, draw: random.Random) -> None:
    """Elements of a small integer initialiser or constant: axes, shapes, ends of slices."""
    constants = [a.t for node in model.graph.node for a in node.attribute if a.HasField("t")]
    small = [t for t in (*model.graph.initializer, *constants) if t.data_type == 7 and 8 <= len(t.raw_data) <= 64]
    if small:
        tensor = draw.choice(small)
        place, number = 8 * draw.randrange(len(tensor.raw_data) // 8), draw.choice(SIZES)
        tensor.raw_data = (
            tensor.raw_data[:place] + number.to_bytes(8, "little", signed=True) + tensor.raw_data[place + 8 :]
        )


def without_attribute(model: onnx.ModelProto, draw: random.Random) -> None:
    node = node_of(model, draw)
    if node.attribute:
        node.attribute.pop(draw.randrange(len(node.attribute)))


def other_attribute(model: onnx.ModelProto, draw: random.Random) -> None:
    node = node_of(model, draw)
    if node.attribute:
        draw.choice(node.attribute).type = draw.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 13])


def other_value(model: onnx.ModelProto, draw: random.Random) -> None:
    """Of an attribute: a number, a list of them, a text."""
    nodes = [node for graph in _graphs(model.graph) for node in graph.node if node.attribute]
    if not nodes:
        return
    attribute = draw.choice(draw.choice(nodes).attribute)
    if attribute.type == onnx.AttributeProto.INT:
        attribute.i = draw.choice(SIZES)
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = draw.choice([0.0, -1.0, 1e38, float("nan"), float("inf")])
    elif attribute.type == onnx.AttributeProto.INTS:
        attribute.ints[:] = [draw.choice(SIZES) for _ in range(draw.choice([0, 1, len(attribute.ints), 70]))]
    elif attribute.type == onnx.AttributeProto.STRING:
        attribute.s = draw.choice([b"", b"\xff\xfe", b"delta", b"ab,bc->", b"x" * 300])


def more_inputs(model: onnx.ModelProto, draw: random.Random) -> None:
    node = node_of(model, draw)
    node.input.extend([draw.choice([*node.input, ""])] * draw.choice([1, 2, 9]))


def fewer_inputs(model: onnx.ModelProto, draw: random.Random) -> None:
    node = node_of(model, draw)
    if node.input and draw.random() < 0.5:
        node.input.pop()
    elif node.output:
        node.output.pop()


def other_input(model: onnx.ModelProto, draw: random.Random) -> None:
    """Type, rank or a size of an input or output."""
    value = draw.choice([*model.graph.input, *model.graph.output, *model.graph.value_info])
    which = draw.randrange(5)
    if which == 0:
        value.type.tensor_type.elem_type = draw.choice([0, 1, 6, 7, 8, 9, 10, 11, 99])
    elif which == 1:
        value.ClearField("type")
    elif which == 2:
        value.type.sequence_type.elem_type.tensor_type.elem_type = 1
    elif value.type.tensor_type.shape.dim:
        dims = value.type.tensor_type.shape.dim
        if which == 3:
            dims[draw.randrange(len(dims))].dim_value = draw.choice([0, -5, 1, 3, 2**31, 2**40])
        else:
            dims[draw.randrange(len(dims))].dim_param = draw.choice(["", "0", "batch", "a + b", "1/0", "x" * 300])


def other_output(model: onnx.ModelProto, draw: random.Random) -> None:
    if model.graph.output:
        draw.choice(model.graph.output).name = draw.choice(["missing", *(value.name for value in model.graph.input)])


def of_itself(model: onnx.ModelProto, draw: random.Random) -> None:
    """A function that calls itself, or a call with the name of another."""
    if model.functions:
        function = draw.choice(model.functions)
        function.node.add(op_type=function.name, domain=function.domain, input=function.input, output=["again"])
    else:
        function = model.functions.add(name="Again", domain="pkg.local")
        function.opset_import.add(domain="", version=draw.choice([1, 17, 99]))
        function.node.add(op_type="Again", domain="pkg.local")


def outside(model: onnx.ModelProto, draw: random.Random) -> None:
    """A tensor whose data lies somewhere else, too far in a file, or in no file."""
    if not model.graph.initializer:
        return
    tensor = draw.choice(model.graph.initializer)
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    places = ("../secret", "/etc/passwd", "C:\\secret", "link", "loop", "", ".", "missing", "weights", "a/../../secret",
              "\x00", "weights/..", "hard")  # fmt: skip
    entries = {"location": draw.choice(places)}
    if draw.random() < 0.7:
        entries["offset"] = draw.choice(["0", "-4", "1", "9999999999", "x", "1e3", ""])
    if draw.random() < 0.7:
        entries["length"] = draw.choice(["0", "4", "-8", "99999999999999", "x", "64"])
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


CHANGES: tuple[Change, ...] = (
    dangling, rewired, removed, made_twice, repeated, other_version, other_operators, other_type, other_domain,
    other_name, other_shape, other_rank, other_elements, few_bytes, no_bytes, sparse, other_number, without_attribute,
    other_attribute, other_value, more_inputs, fewer_inputs, other_input, other_output, of_itself, outside,
)  # fmt: skip


def damaged(whole: onnx.ModelProto, draw: random.Random) -> bytes:
    """The file with a few changes of its structure, a few other bytes, or cut short."""
    if draw.random() < 0.75:
        model = copy.deepcopy(whole)
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            draw.choice(CHANGES)(model, draw)
        return model.SerializeToString()
    data = bytearray(whole.SerializeToString())
    if draw.random() < 0.3:
        return bytes(data[: draw.randrange(len(data))])
    for _ in range(draw.choice([1, 2, 5, 20])):
        data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


def surroundings(folder: Path) -> Path:
    """A folder for a model with what :func:`outside` names: a secret beside it, links to it, and a file of weights."""
    inside = folder / "model"
    inside.mkdir(parents=True)
    (folder / "secret").write_bytes(bytes(4096))
    (inside / "weights").write_bytes(bytes(4096))
    (inside / "link").symlink_to(folder / "secret")
    (inside / "loop").symlink_to(inside / "loop")
    os.link(folder / "secret", inside / "hard")
    return inside


__all__ = ["CHANGES", "Change", "damaged", "dangling", "few_bytes", "other_version", "surroundings"]
