"""Native evaluation of part of an ONNX graph, for the proof that a region and its Spec agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator

from attncompile.frontends.graph import GraphInput
from attncompile.frontends.onnx_bodies import bodies_of, nested_graphs, nested_nodes
from attncompile.frontends.onnx_known import LONGEST, Known
from attncompile.frontends.onnx_operators import better_operators
from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.types import DTYPES, concrete

_NARROW = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_STANDARD = ("", "ai.onnx", "ai.onnx.ml")


def reads(node: ir.Node) -> list[str]:
    """Names of the values a node reads, those that its subgraphs take from outside included."""
    found = [value.name for value in node.inputs if value is not None and value.name]
    for _, graph in bodies_of(node):
        found += _taken_from_outside(graph)
    return list(dict.fromkeys(found))


def _taken_from_outside(graph: ir.Graph) -> Iterator[str]:
    own = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    for node in graph:
        yield from (name for name in reads(node) if name not in own)
        own |= {output.name for output in node.outputs}
    yield from (value.name for value in graph.outputs if value.name and value.name not in own)


def constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor of a ``Constant`` node, in whichever attribute it is written."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    for name, dtype in (
        ("value", None),
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        attribute = node.attributes.get(name)
        if attribute is not None:
            return attribute.value if dtype is None else ir.tensor(np.asarray(attribute.value, dtype))
    return None


@dataclass(frozen=True)
class OnnxEvaluator:
    """Runs native nodes.

    Nodes of the standard operator set run in float64 through ONNX's reference implementation: constants and
    the targets of casts are widened. As soon as another operator set takes part, which has no reference, ONNX
    Runtime runs the part with its optimisations off and in the model's own dtypes; :meth:`precision` says
    which of the two it is.

    Attributes:
        model: the model. inputs: its inputs, parameters and constants. known: elements of values computed
            from sizes.
        number: what every whole number that the nodes hold is replaced by; ``None`` leaves them.
        passed: by the name of a value, the one that it is taken to be.
    """

    model: ir.Model
    inputs: Mapping[str, GraphInput]
    known: Mapping[str, Known]
    number: Callable[[int], int] | None = None
    passed: Mapping[str, str] = field(default_factory=dict)
    _producers: dict[str, ir.Node] = field(default_factory=dict, compare=False, repr=False)

    def __call__(
        self, wanted: Sequence[str], feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
    ) -> dict[str, torch.Tensor]:
        """The wanted native values, floats as float64.

        Args:
            wanted: value names.
            feeds: tensors for values; nothing behind them is computed.
            sizes: values of the symbolic sizes.

        Raises:
            ValueError: when a graph input is needed that is not fed.
        """
        part = self._part(wanted, feeds, sizes)
        native = any(node.domain not in _STANDARD for node in part.nodes)
        found = part.run_native(self.model, feeds) if native else part.run_reference(self.model, feeds)
        return {name: torch.from_numpy(np.array(value)) for name, value in found.items()}

    def resized(self, number: Callable[[int], int]) -> OnnxEvaluator:
        """The same nodes with every whole number replaced: in attributes, in what computes shapes and in lists as short
        as one; of a longer constant as much is left, from its beginning, as its axes become.
        """
        return replace(self, number=number)

    def precision(self, wanted: Sequence[str], feeds: Sequence[str]) -> torch.dtype:
        """The dtype in which the wanted values would be computed: float64, or the lowest that the model
        itself uses."""
        nodes, _ = self._needed(wanted, feeds)
        if all(node.domain in _STANDARD for node in nodes):
            return torch.float64
        # of outputs of other operator sets the type is often not known
        values = (value for node in nodes for value in (*node.inputs, *node.outputs))
        used = {value.dtype for value in values if value is not None and value.dtype is not None}
        return torch.float16 if used & {ir.DataType.FLOAT16, ir.DataType.BFLOAT16} else torch.float32

    def _needed(self, wanted: Sequence[str], stop: Sequence[str]) -> tuple[list[ir.Node], list[str]]:
        """The nodes between some values and the stops, in graph order, and the other values that they start
        from."""
        if not self._producers:
            self._producers.update({o.name: n for n in self._nodes() for o in n.outputs if o.name})
        needed: set[str] = set()
        leaves: list[str] = []
        fed = frozenset(stop)
        seen = set(stop)
        stack = [name for name in wanted if name not in seen]
        while stack:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            node = self._producers.get(name)
            known = name in self.known and not self._follows(name, fed)
            if name in self.inputs or known or node is None:
                leaves.append(name)
                continue
            needed.add(node.name or "")
            stack += reads(node)
        return [node for node in self._nodes() if node.name in needed], leaves

    def _follows(self, name: str, fed: frozenset[str]) -> bool:
        """Whether a value that is known is made of the elements of one that is fed, a weight for instance, which are
        then others than the model's.
        """
        node = self._producers.get(name)
        if node is None or node.op_type in ("Shape", "Size"):
            return False
        return any(read in fed or (read in self.known and self._follows(read, fed)) for read in reads(node))

    def _nodes(self) -> Iterator[ir.Node]:
        """All nodes, with an ``Identity`` in the place of one for each result that is taken to be another value."""
        for node in nested_nodes(self.model.graph):
            passed = [(output, source) for output in node.outputs if (source := self.passed.get(output.name or ""))]
            yield from (_identity(node, output, source) for output, source in passed)
            if not passed:
                yield node

    def _part(self, wanted: Sequence[str], feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> _Part:
        nodes, leaves = self._needed(wanted, list(feeds))
        constants: dict[str, np.ndarray] = {}
        for name in leaves:
            if name in self.inputs:
                given = self.inputs[name]
                if given.role == "user":
                    raise ValueError(f"the region reads {given.name}, which the Spec does not")
                constants[name] = self._stored(name)
            elif name in self.known:
                constants[name] = _computed(self.known[name], sizes)
            else:
                raise ValueError(f"the graph has no value {name!r}")
        if self.number is not None:
            constants = {name: _resized(array, self.number) for name, array in constants.items()}
        return _Part(nodes, constants, tuple(wanted), self.number)

    def _stored(self, name: str) -> np.ndarray:
        node = self._producers.get(name)
        if node is not None:
            tensor = constant_tensor(node)
        else:
            holder = next(g for g in nested_graphs(self.model.graph) if name in g.initializers)
            tensor = holder.initializers[name].const_value
        if tensor is None:
            raise ValueError(f"the constant {name!r} has no data")
        return tensor.numpy()


def _identity(node: ir.Node, output: ir.Value, source: str) -> ir.Node:
    """A node beside the graph that gives a value as one result of another node."""
    made = ir.Value(name=output.name, type=output.type)
    return ir.Node("", "Identity", [ir.Value(name=source)], outputs=[made], name=node.name)


def _computed(known: Known, sizes: Mapping[str, int]) -> np.ndarray:
    dtype = DTYPES[known.dtype]
    if not dtype.is_floating_point and dtype is not torch.bool:
        items: list[float] = [concrete(item, sizes) for item in known.items]
    else:
        items = [evaluate(item, Environment(sizes=sizes)).item() for item in known.items]
    tensor = torch.tensor(items, dtype=torch.float64 if dtype.is_floating_point else dtype)
    return tensor.reshape(known.dims).numpy()


def _resized(array: np.ndarray, number: Callable[[int], int]) -> np.ndarray:
    """A constant with its numbers replaced where it may be a shape, and cut where an axis becomes shorter."""
    if array.size <= LONGEST and array.dtype.kind in "iu":
        return np.array([number(int(item)) for item in array.reshape(-1)], array.dtype).reshape(array.shape)
    return array[tuple(slice(number(size)) for size in array.shape)]


LARGE, PIECE = 2**20, 4
"""Elements of an input from which a part is computed in pieces, and the nodes of a piece."""


@dataclass(frozen=True)
class _Part:
    """Some nodes of a model with the constants they start from."""

    nodes: list[ir.Node]
    constants: Mapping[str, np.ndarray]
    wanted: tuple[str, ...]
    number: Callable[[int], int] | None = None

    def _protos(self) -> list[onnx.NodeProto]:
        nodes = [ir.to_proto(node) for node in self.nodes]
        if self.number is not None:
            for node in nodes:
                _renumber(node, self.number)
        return nodes

    def run_reference(self, model: ir.Model, feeds: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """In float64."""
        nodes = self._protos()
        for node in nodes:
            _widen(node)
        given = {name: _wide(value) for name, value in self.constants.items()}
        given.update({name: _wide(_array(value)) for name, value in feeds.items()})
        outputs = [name for name in self.wanted if name not in given]
        if not outputs:
            return {name: given[name] for name in self.wanted}
        # the evaluator keeps all it computes: large values are computed in pieces, and let go when nothing reads them
        large = max((value.size for value in given.values()), default=0) > LARGE
        size = PIECE if large else len(nodes)
        known = dict(given)
        try:
            for start in range(0, len(nodes), size):
                piece, later = nodes[start : start + size], nodes[start + size :]
                needed = {*self.wanted, *(name for node in later for name in _read(node))}
                known = _run_piece(model, piece, known, needed)
        except Exception as error:  # operators raise whatever NumPy does; the caller only needs to know that it failed
            raise ValueError(f"ONNX's reference cannot compute {', '.join(outputs)}: {error}") from error
        return {name: _wide(np.asarray(known[name])) for name in self.wanted}

    def run_native(self, model: ir.Model, feeds: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """In the model's own dtypes, by ONNX Runtime."""
        import onnxruntime

        declared = {value.name: value.dtype for node in self.nodes for value in node.inputs if value is not None}
        given = {}
        for name, value in {**self.constants, **{n: _array(t) for n, t in feeds.items()}}.items():
            dtype = declared.get(name)
            narrowed = value.dtype.kind == "f"
            given[name] = value.astype(dtype.numpy() if dtype is not None else np.float32) if narrowed else value
        used = {name for node in self.nodes for name in (v.name for v in node.inputs if v is not None)}
        given = {name: value for name, value in given.items() if name in used}
        proto = _model(model, self._protos(), given, list(self.wanted))
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        try:
            model_bytes, providers = proto.SerializeToString(), ["CPUExecutionProvider"]
            results = onnxruntime.InferenceSession(model_bytes, options, providers=providers).run(self.wanted, given)
        except Exception as error:  # its errors have no base of their own
            first = str(error).partition("\n")[0]
            raise ValueError(f"ONNX Runtime cannot compute {', '.join(self.wanted)}: {first}") from error
        return {name: _wide(np.asarray(value)) for name, value in zip(self.wanted, results, strict=True)}


def _run_piece(
    model: ir.Model, nodes: list[onnx.NodeProto], known: dict[str, np.ndarray], needed: set[str]
) -> dict[str, np.ndarray]:
    """The needed values among those that are known and those that the nodes compute."""
    outputs = [name for node in nodes for name in node.output if name and name in needed]
    evaluator = ReferenceEvaluator(
        _model(model, nodes, known, outputs), new_ops=better_operators(model.opset_imports.get("", 1))
    )
    with np.errstate(all="ignore"):  # 0 · ∞ in masked positions is the model's business
        made = dict(zip(outputs, evaluator.run(None, known), strict=True))
    return {name: value for name, value in (known | made).items() if name in needed}


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node and the bodies in it read."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            for inner in graph.node:
                yield from _read(inner)
            yield from (value.name for value in graph.output)


def _model(
    model: ir.Model, nodes: list[onnx.NodeProto], given: Mapping[str, np.ndarray], outputs: list[str]
) -> onnx.ModelProto:
    inputs = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in given.items()
    ]
    graph = onnx.helper.make_graph(nodes, "part", inputs, [onnx.ValueInfoProto(name=name) for name in outputs])
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=min(model.ir_version, onnx.IR_VERSION))


def _widen(node: onnx.NodeProto) -> None:
    """Make a node compute in float64: its constants, and the types it casts to or creates."""
    for attribute in node.attribute:
        if attribute.HasField("t") and attribute.t.data_type in _NARROW:
            attribute.t.CopyFrom(onnx.numpy_helper.from_array(_wide(onnx.numpy_helper.to_array(attribute.t))))
        elif attribute.name in ("to", "dtype", "softmax_precision") and attribute.i in _NARROW:
            attribute.i = onnx.TensorProto.DOUBLE
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            for tensor in graph.initializer:
                if tensor.data_type in _NARROW:
                    name = tensor.name
                    tensor.CopyFrom(onnx.numpy_helper.from_array(_wide(onnx.numpy_helper.to_array(tensor)), name))
            for inner in graph.node:
                _widen(inner)


def _renumber(node: onnx.NodeProto, number: Callable[[int], int]) -> None:
    """Replace the whole numbers among a node's attributes, of old operators mostly: ends of slices, shapes."""
    for attribute in node.attribute:
        if attribute.HasField("i"):
            attribute.i = number(attribute.i)
        attribute.ints[:] = [number(item) for item in attribute.ints]
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            for inner in graph.node:
                _renumber(inner, number)


def _wide(array: np.ndarray) -> np.ndarray:
    floating = array.dtype.kind == "f" or array.dtype.name.startswith(("bfloat", "float"))
    return array.astype(np.float64) if floating else array


def _array(tensor: torch.Tensor) -> np.ndarray:
    plain = tensor.detach().cpu()
    return (plain.float() if plain.dtype in (torch.bfloat16, torch.float8_e4m3fn) else plain).numpy()
