"""The Graph view of an ONNX model: one row of :mod:`attncompile.frontends.onnx_rows` per native node."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from attncompile.frontends.graph import (
    Graph,
    GraphInput,
    Info,
    NativeNode,
    Node,
    Opaque,
    RefusedAttention,
    Role,
)
from attncompile.frontends.onnx_bodies import (
    bodies_of,
    carried,
    hidden_attention,
    nested_nodes,
    prepare,
    starts,
)
from attncompile.frontends.onnx_branches import inline_decided
from attncompile.frontends.onnx_builder import AttentionRefused, Builder, Unstated, fills
from attncompile.frontends.onnx_definitions import spell_out, spell_out_contrib
from attncompile.frontends.onnx_evaluate import OnnxEvaluator, constant_tensor, reads
from attncompile.frontends.onnx_file import load_onnx, reading
from attncompile.frontends.onnx_inference import Inference
from attncompile.frontends.onnx_known import (
    DTYPE_NAMES,
    LONGEST,
    Known,
    dtype_name,
    known_shape,
    known_tensor,
    known_value,
    scalar,
)
from attncompile.frontends.onnx_opaque import opaque_info
from attncompile.frontends.onnx_quantised import spell_out_quantised
from attncompile.frontends.onnx_roundings import PASSED_ON, with_roundings
from attncompile.frontends.onnx_rows import EVERY_OUTPUT, rows_of
from attncompile.frontends.onnx_settled import Settled, settled
from attncompile.frontends.onnx_sizes import SizeNames, product
from attncompile.frontends.onnx_unranked import refuse_unranked
from attncompile.frontends.source import innermost_model_frame
from attncompile.ir import Expr
from attncompile.ir.expr import Const


def onnx_graph(model: ir.Model) -> Graph:
    """The Graph view of an ONNX model.

    Values keep their names, and natives are the nodes by name. So that both can be named, the model is
    prepared in place, without changing what it computes: functions are inlined, nameless nodes and values get
    names, names become unique, an ``If`` whose condition is known gives way to the branch that is taken, operators
    on quantised tensors are brought to the QDQ form, and attention calls to their definitions.

    Nodes in the bodies of ``If``, ``Loop`` and ``Scan`` are part of the view, in front of the node that holds
    them, which reads what they capture and what they return. What a body is given round by round is an input.

    Raises:
        ValueError: when the model has no graph inputs' types to start from.
    """
    spell_out(model)
    prepare(model)
    spell_out_quantised(model)
    sizes = SizeNames()
    for value in model.graph.inputs:
        for dim in value.shape or ():
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None and str(dim.value).isidentifier():
                sizes.declare(str(dim.value))
    inference = Inference(model, sizes)
    growing: set[tuple[str, int]] = set()
    while True:
        # once two sizes are proven equal, or the state of a loop is found to change its size, everything
        # before that point is stated again
        before = sizes.merged, len(growing)
        view = _View(model, sizes, inference, growing, settled(model))
        view.build()
        if (sizes.merged, len(growing)) != before:
            continue
        if not spell_out_contrib(model, view.infos) and not inline_decided(model, view.known):
            return view.graph()
        inference = Inference(model, sizes)


def onnx_file_graph(path: Path) -> Graph:
    """The Graph view of an ``.onnx`` file that has been checked.

    Raises:
        InputError: for a model that passes ONNX's own check and cannot be read all the same.
    """
    with reading(path):
        return onnx_graph(load_onnx(path))


@dataclass
class _View:
    """The view while it is built, node by node."""

    model: ir.Model
    sizes: SizeNames
    inference: Inference
    growing: set[tuple[str, int]]
    settled: Settled
    infos: dict[str, Info] = field(default_factory=dict)
    known: dict[str, Known] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)
    nodes: list[Node] = field(default_factory=list)
    inputs: dict[str, GraphInput] = field(default_factory=dict)
    natives: dict[str, NativeNode] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)
    scopes: dict[str, str] = field(default_factory=dict)
    producer: dict[str, Node] = field(default_factory=dict)

    def build(self) -> None:
        graph = self.model.graph
        self._stored(graph)
        for value in graph.inputs:
            if value.name and value.name not in self.inputs:
                self.inputs[value.name] = GraphInput(value.name, "user")
                self._describe(value)
        for node in graph:
            self._add(node)

    def _stored(self, graph: ir.Graph) -> None:
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                whole = value.const_value.dtype.is_integer() or value.const_value.dtype == ir.DataType.BOOL
                self._constant(name, value.const_value, "constant" if whole else "parameter")

    def _body(self, node: ir.Node, body: ir.Graph, module: str) -> None:
        """Everything in a body, from what it is given in its first round."""
        self._stored(body)
        for value, first, axis in starts(node, body):
            if not value.name or value.name in self.inputs:
                continue
            self.inputs[value.name] = GraphInput(value.name, "user")
            info = self.infos.get(first.name or "") if first is not None and value.shape is None else None
            if info is None:
                self._describe(value)
                continue
            shape = [size for n, size in enumerate(info.shape) if axis is None or n != axis % len(info.shape)]
            for n in range(len(shape)):
                if (value.name, n) in self.growing:
                    shape[n] = self.sizes.symbol(f"{value.name}_dim_{n}")
            self.infos[value.name] = Info(tuple(shape), info.dtype)
        for inner in body:
            self._add(inner, module)
        for state, following in carried(node, body):
            before, after = self.infos.get(state.name or ""), self.infos.get(following.name or "")
            if state.shape is not None or before is None or state.name is None:
                continue
            for n, size in enumerate(before.shape):
                # the size of a state that a round changes is any number
                same = after is not None and len(after.shape) == len(before.shape) and after.shape[n] == size
                if not same:
                    self.growing.add((state.name, n))

    def _constant(self, name: str, tensor: ir.TensorProtocol, role: Role) -> None:
        self.constants.add(name)
        self.inputs[name] = GraphInput(name, role, torch_tensor(tensor))
        self.infos[name] = Info(tuple(Const(n) for n in tensor.shape.numpy()), dtype_name(tensor.dtype))
        known = known_tensor(tensor)
        if known is not None:
            self.known[name] = known

    def _describe(self, value: ir.Value) -> None:
        """Shape and dtype of a value that no row states; a value of unknown rank has none."""
        shape, dtype = self.inference.of(value)
        if shape is not None and value.name:
            self.infos[value.name] = Info(shape, dtype or "float32")

    def _add(self, node: ir.Node, around: str = "") -> None:
        """State a node; ``around`` is the module of the node whose body it is in."""
        names = reads(node)
        name = node.name or ""
        module, module_type = _stated_module(node)
        module = module or around or self._module_nearby(names)
        for _, body in bodies_of(node):
            self._body(node, body, module)
            returned = (value.name for value in body.outputs if value.name)
            names += [value for value in dict.fromkeys(returned) if value not in names]
        self.natives[name] = NativeNode(name, node.op_type, module, _source(node), module_type)
        outputs = [output for output in node.outputs if output.name]
        for output in outputs:
            self.owner[output.name or ""] = name
            self.scopes[output.name or ""] = module
        tensor = constant_tensor(node)
        if tensor is not None:
            self._constant(outputs[0].name or "", tensor, "constant")
            return
        if all(read in self.constants for read in names):
            self.constants.update(output.name or "" for output in outputs)
        for position, output in enumerate(node.outputs):
            if output.name:
                self._state(
                    Builder(
                        node,
                        output.name,
                        position,
                        self._opset(node),
                        self.infos,
                        self.known,
                        self.constants,
                        self.sizes,
                        self.producer,
                    ),
                    output,
                    tuple(names),
                )

    def _opset(self, node: ir.Node) -> int:
        versions = self.model.opset_imports
        return node.version or versions.get(node.domain) or versions.get("ai.onnx" if not node.domain else "") or 1

    def _known(self, b: Builder) -> Known | None:
        """The elements of an output, where they are known from constants and sizes."""
        standard = b.node.domain in ("", "ai.onnx")
        if not standard or b.position:
            return None
        operator, source = b.node.op_type, b.input(0)
        if operator in ("Shape", "Size"):
            if source is None or source not in self.infos:
                return None
            shape = self.infos[source].shape
            if operator == "Size":
                return scalar(product(shape))
            return known_shape(shape, b.attribute("start", 0), b.attribute("end"))
        given = [self.known.get(value.name or "") if value is not None else None for value in b.node.inputs]
        if operator == "CastLike":
            like = self.infos.get(b.input(1) or "")
            return given[0].cast(like.dtype) if given[0] is not None and like is not None else None
        attributes = {key: attribute.value for key, attribute in b.node.attributes.items()}
        found = known_value(operator, given, attributes)
        if found is None or not all(isinstance(item, Expr) for item in found.items):
            return None
        return found

    def _state(self, b: Builder, output: ir.Value, names: tuple[str, ...]) -> None:
        """State one output; the last node's output carries the native name."""
        given = self.settled.given.get(b.output)
        known = self._known(b) if given is None else self.known.get(given)
        if known is not None:
            self.known[b.output] = known
            self.constants.add(b.output)
            if known.rank < 2:
                self._finish(b, fills(b, known))
                return
        if given is not None and given in self.infos:
            self._finish(b, b.same(given))
            return
        hidden = hidden_attention(self.model, b.node) if self.model.functions and not b.position else None
        if hidden is not None:
            self._opaque(b, output, RefusedAttention(b.output, names, b.node.op_type, hidden))
            return
        row = rows_of(b.node.domain).get(b.node.op_type)
        if row is not None and (b.position == 0 or b.node.op_type in EVERY_OUTPUT):
            try:
                self._finish(b, row(b))
                return
            except AttentionRefused as refusal:
                self._opaque(b, output, RefusedAttention(b.output, names, b.node.op_type, str(refusal)))
                return
            except (Unstated, ValueError, IndexError, KeyError):
                pass  # what is not stated is opaque, malformed nodes included
        self._opaque(b, output, Opaque(b.output, names, b.node.op_type))

    def _finish(self, b: Builder, last: str) -> None:
        if not b.made or b.made[-1].output != last:
            last = b.same(last)
        self.infos[b.output] = self.infos.pop(last)
        b.made[-1] = dataclasses.replace(b.made[-1], output=b.output)
        self.nodes += b.made
        self.producer.update({part.output: part for part in b.made})
        self.owner.update({part.output: b.node.name or "" for part in b.made})

    def _opaque(self, b: Builder, output: ir.Value, node: Node) -> None:
        for made in b.made:
            self.infos.pop(made.output, None)
        self.nodes.append(node)
        try:
            self.infos[b.output] = Info(*opaque_info(b))
        except (Unstated, ValueError, IndexError):
            self._describe_result(b, output)

    def _describe_result(self, b: Builder, output: ir.Value) -> None:
        """Shape and dtype of an ``If``'s output are what its branches agree on, of others what is declared."""
        branches = [body.outputs[b.position].name for _, body in bodies_of(b.node)]
        infos = [self.infos.get(name or "") for name in branches]
        if b.node.op_type == "If" and infos and infos[0] is not None and len(set(infos)) == 1:
            self.infos[b.output] = infos[0]
        else:
            self._describe(output)

    def _module_nearby(self, names: Iterable[str]) -> str:
        """The innermost module that holds all parameters that a node reads, or those that its inputs belong to."""
        own = [name.rsplit(".", 1)[0] for name in names if name in self.inputs and _PARAMETER.fullmatch(name)]
        near = own or [self.scopes[name] for name in names if self.scopes.get(name) and name not in self.constants]
        return _common_path(near)

    def graph(self) -> Graph:
        """The finished view.

        A native node may have several values, so signatures and reads are listed per value; a value that is
        computed from sizes alone reads nothing.
        """
        signature: dict[str, str] = {}
        native_inputs: dict[str, tuple[str, ...]] = {}
        for name, given in self.inputs.items():
            if given.value is not None and given.value.numel() <= LONGEST:
                signature[name] = f"{self.infos[name].dtype} {given.value.tolist()}"
        for node in nested_nodes(self.model.graph):
            for position, output in enumerate(node.outputs):
                name = output.name or ""
                if name in self.inputs:
                    continue
                known, taken = self.known.get(name), self.settled.given.get(name)
                operation = f"{_signature(node)} {position}" if taken is None else PASSED_ON
                signature[name] = operation if known is None else str(known)
                read = tuple(reads(node)) if taken is None else (taken,)
                native_inputs[name] = read if known is None else ()
        outputs = tuple(value.name for value in self.model.graph.outputs if value.name)
        evaluator = OnnxEvaluator(self.model, self.inputs, dict(self.known), passed=self.settled.given)
        found = Graph(
            self.infos,
            refuse_unranked(self.nodes, self.infos, self.natives, self.owner),
            self.inputs,
            outputs,
            self.natives,
            self.owner,
            evaluator,
            self.sizes.hints(),
            signature,
            native_inputs,
            dict(self.sizes.display),
            overwritten=self.settled.inside,
            precision=evaluator.precision,
        )
        return with_roundings(found, evaluator)


def _stated_module(node: ir.Node) -> tuple[str, str]:
    """Path and class of the module a node belongs to, as metadata or the node's name say it.

    Metadata is the exporter's, or that of an earlier conversion by attncompile.
    """
    site = node.metadata_props.get("attncompile.site")
    if site:
        return site, ""
    scopes = _listed(node.metadata_props.get("pkg.torch.onnx.name_scopes"))
    if len(scopes) > 1:
        # the last entry is the operation itself
        classes = _listed(node.metadata_props.get("pkg.torch.onnx.class_hierarchy"))
        return scopes[-2], classes[-2].rsplit(".", 1)[-1] if len(classes) > 1 else ""
    for name in (node.name or "", *(output.name or "" for output in node.outputs)):
        if "/" in name.strip("/"):
            return ".".join(name.strip("/").split("/")[:-1]), ""
    return "", ""


_PARAMETER = re.compile(r"[\w.]+\.\w+")


def _common_path(paths: Iterable[str]) -> str:
    parts = [path.split(".") for path in dict.fromkeys(paths)]
    common: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def _listed(text: str | None) -> list[str]:
    """A list of strings as the exporter writes it into metadata."""
    try:
        found = ast.literal_eval(text or "[]")
    except (SyntaxError, ValueError):
        return []
    return [str(entry) for entry in found] if isinstance(found, list) else []


def _source(node: ir.Node) -> str:
    trace = node.metadata_props.get("pkg.torch.onnx.stack_trace")
    frame = innermost_model_frame(trace) if trace else None
    return str(frame) if frame is not None else f"node {node.name} ({node.op_type})"


def _signature(node: ir.Node) -> str:
    written = ", ".join(f"{key}={_attribute_text(attribute)}" for key, attribute in sorted(node.attributes.items()))
    given = "".join("·" if value is not None else "-" for value in node.inputs)
    return f"{node.domain or 'ai.onnx'}::{node.op_type}({given}) {written}".rstrip()


def _attribute_text(attribute: ir.Attr) -> str:
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        graphs = [attribute.value] if attribute.type is ir.AttributeType.GRAPH else attribute.value
        return " ".join(_signature(node) for graph in graphs for node in nested_nodes(graph))
    if attribute.type is not ir.AttributeType.TENSOR:
        return str(attribute.value)
    tensor = attribute.as_tensor()
    return f"{tensor.dtype}{list(tensor.shape)} {hashlib.sha256(tensor.tobytes()).hexdigest()[:16]}"


_TORCH_VIEWS: Mapping[ir.DataType, tuple[type[np.generic], torch.dtype]] = {
    ir.DataType.BFLOAT16: (np.int16, torch.bfloat16),
    ir.DataType.FLOAT8E4M3FN: (np.uint8, torch.float8_e4m3fn),
}


def torch_tensor(tensor: ir.TensorProtocol) -> torch.Tensor | None:
    """A constant as a torch tensor that shares its memory, or ``None`` for a type that torch or a Spec
    lacks."""
    if tensor.dtype not in DTYPE_NAMES:
        return None
    array = np.ascontiguousarray(tensor.numpy()).reshape(tensor.shape.numpy())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        if tensor.dtype in _TORCH_VIEWS:
            stored, dtype = _TORCH_VIEWS[tensor.dtype]
            return torch.from_numpy(array.view(stored)).view(dtype)
        return torch.from_numpy(array)
