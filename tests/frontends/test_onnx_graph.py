"""The Graph view of ONNX models: every row against ONNX's reference, and attention found in real exports."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from onnx.reference import ReferenceEvaluator

from attncompile.frontends.graph import (
    Contract,
    FusedAttention,
    Graph,
    Linear,
    Node,
    Opaque,
    Pointwise,
    Reduce,
    RefusedAttention,
    Softmax,
)
from attncompile.frontends.onnx import onnx_graph
from attncompile.frontends.onnx_evaluate import OnnxEvaluator
from attncompile.frontends.onnx_rows import ROWS as STATED
from attncompile.frontends.onnx_sizes import SizeNames
from attncompile.ir import Index, Load, Size
from attncompile.ir.evaluate import Environment, evaluate, index_grid
from attncompile.ir.types import concrete
from attncompile.lift import lift_graph
from attncompile.lift.interpret import Interpreter
from attncompile.lift.prove import canonical
from attncompile.lift.sites import find_sites

OPAQUE = (Opaque, FusedAttention)

# Both sides are float64; sums are at most a few dozen terms of order one.
ROUNDING = 64 * float(np.finfo(np.float64).eps)


def parsed(text: str, opset: int = 21) -> ir.Model:
    """A model from a graph in ONNX's text form."""
    return ir.from_proto(
        onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]> {text}')
    )


class SingleNode(Graph):
    """A view of one node, all of whose inputs may be read, also those inside a native node."""

    def is_readable(self, value: str) -> bool:
        return True


def computed(
    graph: Graph, node: Node, values: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
) -> torch.Tensor:
    """One node of the view, from the values it reads, by what the node says."""
    shape = [concrete(size, sizes) for size in graph.infos[node.output].shape]
    if isinstance(node, Contract):
        letters = {
            label: chr(ord("a") + n)
            for n, label in enumerate({**dict.fromkeys(node.left_labels), **dict.fromkeys(node.right_labels)})
        }
        terms = [
            "".join(letters[label] for label in labels)
            for labels in (node.left_labels, node.right_labels, node.output_labels)
        ]
        return torch.einsum(f"{terms[0]},{terms[1]}->{terms[2]}", values[node.left], values[node.right])
    if isinstance(node, Linear):
        weight = values[node.weight] if node.transposed else values[node.weight].T
        made = values[node.source] @ weight
        return made if node.bias is None else made + values[node.bias]
    if isinstance(node, Reduce):
        reduced = {"sum": torch.sum, "max": torch.amax}[node.operator]
        return reduced(values[node.source], dim=node.axes, keepdim=node.keeps_axes)
    if isinstance(node, Softmax):
        return torch.softmax(values[node.source], dim=node.axis)
    axes = [f"x{n}" for n in range(len(shape))]
    extents = {axis: graph.infos[node.output].shape[n] for n, axis in enumerate(axes)}
    fields = {field.name: getattr(graph, field.name) for field in dataclasses.fields(graph)}
    alone = SingleNode(**{**fields, "nodes": (node,), "inputs": {}})
    element = Interpreter(alone, extents=extents).at(node.output, tuple(Index(axis) for axis in axes))
    assert element != Load(node.output, tuple(Index(axis) for axis in axes), element.kind)
    grid = index_grid(dict(zip(axes, shape, strict=True)))
    return evaluate(element, Environment(grid, sizes, values)).expand(shape)


def run_view(
    graph: Graph,
    given: Mapping[str, torch.Tensor],
    sizes: Mapping[str, int],
    reference: Callable[[str], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Every value of the view; what is opaque is asked of the reference."""
    values = dict(given)
    for node in graph.nodes:
        if isinstance(node, OPAQUE):
            if node.output in graph.infos:
                values[node.output] = reference(node.output)
        else:
            values[node.output] = computed(graph, node, values, sizes)
    return values


def compare(model: ir.Model, feeds: Mapping[str, np.ndarray], opaque: tuple[str, ...] = ()) -> Graph:
    """Compare every value of a model's view with ONNX's reference in float64, and require what is stated."""
    graph = onnx_graph(model)
    assert {node.what for node in graph.nodes if isinstance(node, Opaque)} <= set(opaque)
    given = {
        name: torch.from_numpy(value.astype(np.float64) if value.dtype.kind == "f" else value)
        for name, value in feeds.items()
    }
    sizes: dict[str, int] = {}
    for name, value in given.items():
        for size, extent in zip(graph.infos[name].shape, value.shape, strict=True):
            if isinstance(size, Size):
                sizes[size.name] = extent
    constants = {
        name: entry.value.double() if entry.value.is_floating_point() else entry.value
        for name, entry in graph.inputs.items()
        if entry.value is not None
    }
    natives = [name for name in graph.owner if graph.is_native(name) and name not in graph.inputs]
    expected = graph.evaluate(natives, given, sizes)
    found = run_view(graph, {**constants, **given}, sizes, expected.__getitem__)
    for name in natives:
        if name not in graph.infos:
            continue
        assert tuple(found[name].shape) == tuple(expected[name].shape), f"shape of {name}"
        torch.testing.assert_close(
            found[name].double(),
            expected[name].double(),
            rtol=ROUNDING,
            atol=ROUNDING,
            equal_nan=True,
            msg=lambda text, n=name: f"{n}: {text}",
        )
    return graph


@dataclass(frozen=True)
class Row:
    """A model of one or a few nodes.

    Attributes:
        name: what is tested. body: its nodes. inputs: declarations. constants: initialisers. opset: operator
            set.
        symbols: sizes of its symbolic axes. low, high: range of integer inputs.
    """

    name: str
    body: str
    inputs: str = "float[N,3,4] x"
    constants: str = ""
    opset: int = 21
    symbols: Mapping[str, int] = field(default_factory=lambda: {"N": 5, "M": 7, "K": 6})
    low: int = -3
    high: int = 4

    def model(self) -> ir.Model:
        return parsed(f"g ({self.inputs}) => (y) <{self.constants}> {{ {self.body} }}", self.opset)

    def feeds(self) -> dict[str, np.ndarray]:
        random = np.random.default_rng(0)
        made: dict[str, np.ndarray] = {}
        for value in self.model().graph.inputs:
            shape = [d if isinstance(d, int) else self.symbols[str(d.value)] for d in value.shape or ()]
            kind = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
            if kind == np.bool_:
                made[value.name or ""] = random.random(shape) < 0.5
            elif kind.kind == "f":
                made[value.name or ""] = random.standard_normal(shape).astype(kind)
            else:
                made[value.name or ""] = random.integers(self.low, self.high, shape).astype(kind)
        return made


TWO = "float[N,3,4] x, float[3,1] z"
INTEGERS = "int64[N,3] x, int64[3] z"
TRUTHS = "bool[N,3] x, bool[3] z"

# fmt: off
ROWS = (
    *(Row(name, f"y = {name}(x, z)", TWO) for name in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Sum",
        "Mean", "Equal",
                                                      "Less", "LessOrEqual", "Greater", "GreaterOrEqual")),
    *(Row(f"{name} of integers", f"y = {name}(x, z)", INTEGERS) for name in ("Add", "Sub", "Mul", "Equal",
        "Less", "Max")),
    *(Row(f"{name} of integers", f"y = {name}(x, z)", "int64[N,3] x", "int64[3] z = {2, -3, 5}", low=-9,
        high=9)
      for name in ("Div", "Mod")),
    *(Row(name, f"y = {name}(x, z)", TRUTHS) for name in ("And", "Or", "Xor", "Equal")),
    Row("Not", "y = Not(x)", "bool[N,3] x"),
    *(Row(name, f"y = {name}(x)") for name in ("Neg", "Exp", "Tanh", "Sigmoid", "Erf", "Abs", "Floor", "Ceil",
        "Round",
                                              "Sin", "Cos", "Reciprocal", "Relu", "Identity", "Dropout",
                                              "IsNaN", "IsInf")),
    *(Row(name, f"a = Abs(x)  y = {name}(a)") for name in ("Sqrt", "Log")),
    Row("IsNaN of NaN", "a = Sqrt(x)  n = IsNaN(a)  y = Where(n, z, a)", "float[N,3,4] x, float[3,1] z"),
    Row("IsInf of infinity", "a = Div(x, z)  y = IsInf<detect_negative=0>(a)", "float[N,3] x",
        "float z = {0.0}"),
    Row("Pow", "a = Abs(x)  y = Pow(a, z)", "float[N,3,4] x", "float z = {1.5}"),
    Row("Clip", "y = Clip(x, low, high)", constants="float low = {-0.5}, float high = {0.25}"),
    Row("Clip with attributes", "y = Clip<min=-0.5, max=0.25>(x)", opset=6),
    Row("Clip above only", "y = Clip(x, , high)", constants="float high = {0.25}"),
    Row("Where", "y = Where(c, x, z)", "bool[4] c, float[N,3,4] x, float[3,1] z"),
    Row("Where broadcasts the shape of all", "y = Where(c, z, x)", "bool[N,1,1] c, float[1,3,4] x, float z"),
    Row("Cast to integers", "y = Cast<to=7>(x)"), Row("Cast to truth", "y = Cast<to=9>(x)", "int64[N,3] x"),
    Row("Cast of truth", "y = Cast<to=1>(x)", "bool[N,3] x"),
    Row("CastLike", "y = CastLike(x, z)", "int64[N,3] x, float[1] z"),
    Row("Transpose", "y = Transpose<perm=[2,0,1]>(x)"), Row("Transpose reversed", "y = Transpose(x)"),
    Row("Reshape", "y = Reshape(x, s)", constants="int64[3] s = {0, 4, 3}"),
    Row("Reshape with -1", "y = Reshape(x, s)", constants="int64[2] s = {-1, 4}"),
    Row("Reshape into heads", "y = Reshape(x, s)", "float[N,M,12] x", "int64[4] s = {0, -1, 3, 4}"),
    Row("Reshape by computed shape", """a = Shape(x)  i = Constant<value_int=0>()  n = Gather(a, i)
        o = Constant<value_ints=[0]>()  u = Unsqueeze(n, o)  t = Constant<value_ints=[-1]>()
        s = Concat<axis=0>(u, t)  y = Reshape(x, s)"""),
    Row("Reshape by computed product", """a = Shape(x)  m = ReduceProd<keepdims=1>(a)  y = Reshape(x, m)"""),
    Row("Flatten", "y = Flatten<axis=2>(x)"), Row("Flatten from the end", "y = Flatten<axis=-1>(x)"),
    Row("Squeeze", "y = Squeeze(x, a)", "float[N,1,4,1] x", "int64[2] a = {1, -1}"),
    Row("Squeeze with attribute", "y = Squeeze<axes=[1]>(x)", "float[N,1,4] x", opset=11),
    Row("Squeeze everything", "y = Squeeze(x)", "float[2,1,4,1] x"),
    Row("Unsqueeze", "y = Unsqueeze(x, a)", constants="int64[2] a = {0, -1}"),
    Row("Unsqueeze with attribute", "y = Unsqueeze<axes=[0,3]>(x)", "float[N,4] x", opset=11),
    Row("Expand", "y = Expand(x, s)", "float[3,1] x", "int64[3] s = {2, 1, 4}"),
    Row("Expand to a shape", "s = Shape(z)  y = Expand(x, s)", "float[N,1] x, float[2,N,M] z"),
    Row("Tile", "y = Tile(x, r)", "float[N,1,4] x", "int64[3] r = {2, 3, 1}"),
    Row("Slice", "y = Slice(x, s, e, a, t)", "float[N,7,4] x",
        "int64[2] s = {1, -3}, int64[2] e = {9223372036854775807, -1}, "
        "int64[2] a = {1, 2}, int64[2] t = {2, 1}"),
    Row("Slice of a symbolic axis from its end", "y = Slice(x, s, e, a)", "float[N,7] x",
        "int64[1] s = {-1}, int64[1] e = {2147483647}, int64[1] a = {0}"),
    Row("Slice beyond a symbolic axis", "y = Slice(x, s, e, a)", "float[N,7] x",
        "int64[1] s = {-9}, int64[1] e = {40}, int64[1] a = {0}"),
    Row("Slice backwards", "y = Slice(x, s, e, a, t)", "float[N,7] x",
        "int64[1] s = {-1}, int64[1] e = {-9223372036854775807}, int64[1] a = {0}, int64[1] t = {-1}"),
    Row("Slice with attributes", "y = Slice<starts=[1], ends=[3], axes=[1]>(x)", opset=9),
    Row("Slice to another length", """d = Shape<start=1, end=2>(z)  o = Constant<value_ints=[0]>()
        a = Constant<value_ints=[1]>()  y = Slice(x, o, d, a)""", "float[1,9] x, float[N,M] z"),
    Row("Split", "a, y, b = Split<axis=1>(x, s)", "float[N,7] x", "int64[3] s = {2, 4, 1}"),
    Row("Split evenly", "a, y = Split<axis=2, num_outputs=2>(x)"),
    Row("Split with attribute", "a, y = Split<axis=1, split=[1,2]>(x)", opset=11),
    Row("Concat", "y = Concat<axis=1>(x, z, x)", "float[N,3] x, float[N,M] z"),
    Row("Concat of equal names", "y = Concat<axis=1>(x, z)", "float[N,3] x, float[K,2] z", symbols={"N": 5,
        "K": 5}),
    Row("Pad", "y = Pad(x, p, v)", "float[N,3,4] x", "int64[6] p = {0, 2, 1, 0, 1, 2}, float v = {0.5}"),
    Row("Pad of one axis", "y = Pad(x, p, , a)", "float[N,3,4] x", "int64[2] p = {1, 0}, int64[1] a = {-1}"),
    Row("Pad with attributes", "y = Pad<pads=[0,0,1,0,1,0], value=1.5>(x)", opset=10),
    Row("Pad by the edge of nothing", 'y = Pad<mode="edge">(x, p)', "float[N,3] x",
        "int64[4] p = {0, 0, 0, 0}"),
    Row("Gather", "y = Gather<axis=1>(x, i)", "float[N,6,4] x, int64[M,2] i"),
    Row("Gather one", "y = Gather<axis=1>(x, i)", constants="int64 i = {-1}"),
    Row("Gather every other", "y = Gather<axis=2>(x, i)", constants="int64[2] i = {1, 3}"),
    Row("Gather a list", "y = Gather<axis=2>(x, i)", constants="int64[3] i = {3, -4, 1}"),
    Row("GatherElements", "y = GatherElements<axis=1>(x, i)", "float[5,6,4] x, int64[5,2,4] i"),
    Row("GatherND", "y = GatherND(x, i)", "float[5,6,4] x, int64[N,2] i"),
    Row("GatherND in batches", "y = GatherND<batch_dims=1>(x, i)", "float[N,6,4] x, int64[N,3,1] i"),
    Row("Range", "n = Size(x)  o = Constant<value_int=1>()  t = Constant<value_int=2>()  y = Range(o, n, t)"),
    Row("Range backwards",
        "n = Size(x)  o = Constant<value_int=0>()  t = Constant<value_int=-3>()  y = Range(n, o, t)"),
    Row("ConstantOfShape", "s = Shape(x)  y = ConstantOfShape<value = float[1] {2.5}>(s)"),
    Row("Shape and arithmetic", """s = Shape(x)  i = Constant<value_int=0>()  n = Gather(s, i)
        t = Constant<value_int=2>()  h = Div(n, t)  m = Mul(h, n)  c = Cast<to=1>(m)  y = Sqrt(c)"""),
    Row("Where on sizes", """s = Shape(x)  m = Constant<value_ints=[-1, -1, -1]>()  e = Equal(s, m)
        o = Constant<value_ints=[1, 1, 1]>()  t = Where(e, o, s)  y = Expand(z, t)""", TWO),
    *(Row(f"Trilu upper={upper} k={k}", f"y = Trilu<upper={upper}>(x, k)", "float[N,4,6] x",
        f"int64 k = {{{k}}}")
      for upper in (0, 1) for k in (-1, 0, 2)),
    Row("Trilu of truth", "y = Trilu<upper=0>(x)", "bool[N,N] x"),
    Row("MatMul", "y = MatMul(x, z)", "float[N,1,5,4] x, float[3,4,M] z"),
    Row("MatMul with a vector", "y = MatMul(x, z)", "float[N,5,4] x, float[4] z"),
    Row("MatMul of a vector", "y = MatMul(x, z)", "float[4] x, float[N,4,5] z"),
    Row("MatMul with a matrix", "y = MatMul(x, w)", "float[N,2] x",
        "float[2,3] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}"),
    Row("MatMul and bias", "m = MatMul(x, w)  y = Add(b, m)", "float[N,2] x",
        "float[2,3] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}, float[3] b = {0.5, 1.5, 2.5}"),
    Row("Gemm", "y = Gemm<alpha=0.5, beta=2.0, transA=1, transB=1>(x, z, c)",
        "float[4,N] x, float[M,4] z, float[M] c"),
    Row("Gemm with a matrix", "y = Gemm<transB=1>(x, w, b)", "float[N,2] x",
        "float[3,2] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}, float[3] b = {0.5, 1.5, 2.5}"),
    Row("Einsum", 'y = Einsum<equation="bhid,bhjd->bhij">(x, z)', "float[N,2,5,4] x, float[N,2,M,4] z"),
    Row("Einsum with dots", 'y = Einsum<equation="...id, ...dj -> ...ij">(x, z)',
        "float[N,2,5,4] x, float[2,4,M] z"),
    Row("Einsum of one", 'y = Einsum<equation="bij->jbi">(x)'),
    Row("Einsum without arrow", 'y = Einsum<equation="ij,jk">(x, z)', "float[N,4] x, float[4,M] z"),
    Row("Softmax", "y = Softmax<axis=1>(x)"), Row("Softmax on the last axis", "y = Softmax(x)"),
    Row("LogSoftmax", "y = LogSoftmax<axis=1>(x)"),
    Row("ReduceSum", "y = ReduceSum(x, a)", constants="int64[2] a = {-1, 0}"),
    Row("ReduceSum without the axes", "y = ReduceSum<keepdims=0>(x, a)", constants="int64[1] a = {1}"),
    Row("ReduceSum of everything", "y = ReduceSum(x)"),
    Row("ReduceSum of nothing", "y = ReduceSum<noop_with_empty_axes=1>(x)"),
    Row("ReduceSum of a product", "p = Mul(x, z)  y = ReduceSum(p, a)", TWO, "int64[1] a = {1}"),
    Row("ReduceSum of a product, axis dropped", "p = Mul(x, z)  y = ReduceSum<keepdims=0>(p, a)",
        "float[N,3,1,4] x, float[3,M,4] z", "int64[1] a = {-1}"),
    Row("ReduceMax", "y = ReduceMax<axes=[1], keepdims=0>(x)", opset=13),
    Row("Softmax of old", "y = Softmax<axis=1>(x)", opset=11),
)
# fmt: on


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row_says_what_the_reference_computes(row: Row) -> None:
    compare(row.model(), row.feeds())


def test_rows_agree_with_the_reference_in_the_models_own_dtype() -> None:
    """The evaluator itself: widened to float64, it computes what the reference does in float32, but for
    rounding."""
    row = Row(
        "several", "a = Cast<to=10>(x)  b = Cast<to=1>(a)  c = Constant<value_float=0.1>()  y = Mul(b, c)"
    )
    feeds = row.feeds()
    plain = ReferenceEvaluator(ir.to_proto(row.model())).run(None, feeds)[0]
    wide = onnx_graph(row.model()).evaluate(["y"], {"x": torch.from_numpy(feeds["x"])}, {})["y"]
    assert wide.dtype is torch.float64
    half = float(np.finfo(np.float16).eps)
    np.testing.assert_allclose(plain, wide.numpy(), rtol=2 * half, atol=half)


def test_old_softmax_is_what_onnx_runtime_computes() -> None:
    """ONNX's own reference has no softmax before opset 13, so the evaluator's is held against the runtime."""
    row = Row("old", "y = Softmax<axis=1>(x)", opset=11)
    proto = ir.to_proto(row.model())
    proto.graph.output[0].type.CopyFrom(proto.graph.input[0].type)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (native,) = session.run(None, row.feeds())
    wide = onnx_graph(row.model()).evaluate(["y"], {"x": torch.from_numpy(row.feeds()["x"])}, {})["y"]
    torch.testing.assert_close(wide.float(), torch.from_numpy(native))


def test_a_region_that_cannot_run_is_a_value_error() -> None:
    graph = onnx_graph(parsed("g (float[N] x, float[M] z) => (y) { y = Add(x, z) }"))
    with pytest.raises(ValueError, match="cannot compute y"):
        graph.evaluate(["y"], {"x": torch.zeros(3), "z": torch.zeros(2)}, {})


def test_fused_matmul_of_onnx_runtime() -> None:
    row = Row(
        "fused",
        "y = com.microsoft.FusedMatMul<transA=1, transB=1, alpha=0.25>(x, z)",
        "float[N,4,5] x, float[N,M,4] z",
    )
    graph = onnx_graph(row.model())
    feeds = {name: torch.from_numpy(value) for name, value in row.feeds().items()}
    single = graph.evaluate(["y"], feeds, {"N": 5, "M": 7})["y"]
    found = run_view(graph, {n: t.double() for n, t in feeds.items()}, {"N": 5, "M": 7}, lambda name: single)[
        "y"
    ]
    torch.testing.assert_close(found.float(), single.float())


# --- shapes, names, evaluation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("batch", 2),
        ("2*batch + 1", 5),
        ("batch*seq", 14),
        ("floor(seq/2)", 3),
        ("Max(1, seq - 9)", 1),
        ("seq//2", 3),
        ("ceiling(seq/2)", 4),
        ("Mod(seq, 4)", 3),
        ("-batch + seq", 5),
        ("seq**2", 49),
    ],
)
def test_dimension_names_are_arithmetic(text: str, value: int) -> None:
    names = SizeNames()
    assert concrete(names.expression(text), {"Batch": 2, "Seq": 7}) == value


def test_other_dimension_names_are_symbols() -> None:
    names = SizeNames()
    assert names.expression("onnx::Shape_dim 0") == Size("Onnx__Shape_dim_0")
    assert names.expression("past_len + seq", declared_only=True) == names.symbol("past_len + seq")
    assert names.symbol("batch") == Size("Batch")
    assert names.symbol("Batch") == Size("Batch_")
    assert names.symbol("0") == Size("Size_0")
    assert names.display["Batch_"] == "Batch"


def test_names_proven_equal_become_one() -> None:
    graph = onnx_graph(parsed("g (float[B,M,K] x, float[C,L,N] z) => (y) { y = MatMul(x, z) }"))
    assert graph.infos["z"].shape[1] == graph.infos["x"].shape[2] == Size("K")
    # batch axes may be broadcast: two names, but one size in a proof
    assert graph.infos["z"].shape[0] == Size("C")
    assert graph.size_hints["B"] == graph.size_hints["C"] != graph.size_hints["M"]


def test_hint_of_an_axis_that_meets_a_constant() -> None:
    graph = onnx_graph(parsed("g (float[B,N] x, float[1,128] z) => (y) { y = Add(x, z) }"))
    assert graph.size_hints["N"] == 128


def test_nameless_nodes_are_named_and_names_are_unique() -> None:
    model = parsed("g (float[N] x) => (y) { a = Exp(x)  y = Exp(a) }")
    for node in model.graph:
        node.name = "" if node.outputs[0].name == "a" else "same"
    next(iter(model.graph)).outputs[0].name = "a#1"
    graph = onnx_graph(model)
    assert len(graph.natives) == 2 and all(graph.natives)
    assert all("#" not in name for name in graph.owner if graph.is_native(name))


def test_module_and_source_from_whatever_the_exporter_left() -> None:
    model = parsed("""g (float[N,2] x) => (y) <float[2,2] w = {1.0, 0.0, 0.0, 1.0}> {
        a = MatMul(x, w)  b = Exp(a)  y = Exp(b) }""")
    model.graph.initializers["w"].name = "encoder.layer.0.query.weight"
    nodes = list(model.graph)
    nodes[2].metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'decoder', 'decoder.self', 'exp']"
    nodes[2].metadata_props["pkg.torch.onnx.class_hierarchy"] = (
        "['M', 'm.Decoder', 'm.SelfAttention', 'aten.exp']"
    )
    nodes[2].metadata_props["pkg.torch.onnx.stack_trace"] = (
        'File "/home/me/model.py", line 7, in forward\n    return x.exp()'
    )
    nodes[1].name = "/encoder/layer.1/attention/Exp"
    graph = onnx_graph(model)
    product, plain, told = (graph.describe(name) for name in ("a", "b", "y"))
    assert product.module == "encoder.layer.0.query"
    assert (
        plain.module == "encoder.layer.1.attention"
        and plain.source == "node /encoder/layer.1/attention/Exp (Exp)"
    )
    assert (told.module, told.module_type, told.source) == (
        "decoder.self",
        "SelfAttention",
        "model.py:7  return x.exp()",
    )


def test_evaluation_names_the_input_that_is_missing() -> None:
    graph = onnx_graph(parsed("g (float[N] x, float[N] z) => (y) { a = Exp(x)  y = Add(a, z) }"))
    fed = {"a": torch.zeros(3)}
    with pytest.raises(ValueError, match="the region reads z, which the Spec does not"):
        graph.evaluate(["y"], fed, {"N": 3})
    assert graph.evaluate(["y"], {**fed, "z": torch.ones(3)}, {"N": 3})["y"].tolist() == [1.0, 1.0, 1.0]


def test_sizes_stand_in_for_inputs_that_are_only_asked_for_their_shape() -> None:
    graph = onnx_graph(
        parsed("""g (int64[N,M] ids, float[A] x) => (y) {
        s = Shape(ids)  y = ConstantOfShape<value = float[1] {1.0}>(s) }""")
    )
    assert graph.evaluate(["y"], {}, {"N": 2, "M": 3})["y"].shape == (2, 3)


def test_functions_are_inlined() -> None:
    model = ir.from_proto(
        onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[N] x) => (y) { y = local.twice(x) }
        <domain: "local", opset_import: ["" : 21]> twice (a) => (b) { b = Add(a, a) }""")
    )
    assert [type(node) for node in onnx_graph(model).nodes] == [Pointwise]


def test_subgraphs_are_opaque_but_read_what_they_take() -> None:
    graph = onnx_graph(
        parsed("""g (bool c, float[N] x) => (y) {
        a = Exp(x)
        y = If(c) <then_branch = t () => (float[N] p) { p = Neg(a) }, else_branch = e () => (float[N] q) { q =
        Exp(x) }> }""")
    )
    assert {"a", "c", "x"} <= set(graph.producer["y"].inputs)


def test_unknown_operators_get_their_shape_from_inference() -> None:
    graph = onnx_graph(parsed("g (float[N,3,8] x, float[5,3,2] w) => (y) { a = Conv(x, w)  y = Exp(a) }"))
    assert isinstance(graph.producer["a"], Opaque)
    assert concrete(graph.infos["y"].shape[2], {"N": 2}) == 7
    assert graph.infos["y"].shape[0] == Size("N")


def test_incomplete_inference_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's own function saves the model where it is run when it cannot infer every shape."""
    monkeypatch.chdir(tmp_path)
    text = """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
        g (float[N,8] x) => (y) { a = own.Twist(x)  b = Conv(x, x)  y = Abs(a) }"""
    onnx_graph(ir.from_onnx_text(text))
    assert not list(tmp_path.iterdir())


# --- attention ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A fused call: its node, its inputs, and parts of the Spec's text that must be there;
    the range of its integer inputs."""

    name: str
    body: str
    inputs: str
    says: tuple[str, ...]
    opset: int = 24
    low: int = 0
    high: int = 2


Q4, KV4 = "float[B,6,I,8] q", "float[B,6,J,8] k, float[B,6,J,4] v"
NEW = KV4.replace("J", "I")
# fmt: off
CALLS = (
    Call("plain", "y = Attention(q, k, v)", f"{Q4}, {KV4}", ("0.35355339059327373·s", "empty rows zero")),
    Call("causal", "y = Attention<is_causal=1, scale=0.5>(q, k, v)", f"{Q4}, {KV4}", ("j ≤ i", "0.5·s")),
    Call("float mask", "y = Attention(q, k, v, m)", f"{Q4}, {KV4}, float[B,1,I,J] m", ("m[b, 0, i, j]",)),
    Call("bool mask", "y = Attention<softcap=3.0>(q, k, v, m)", f"{Q4}, {KV4}, bool[I,J] m",
        ("mask   m[i, j]", "tanh")),
    Call("short mask", "y = Attention(q, k, v, m)", f"{Q4}, {KV4}, bool[I,S] m", ("j < S and m[i, j]",)),
    Call("valid keys", "y = Attention<is_causal=1>(q, k, v, , , , n)", f"{Q4}, {KV4}, int64[B] n",
         ("j ≤ i + n[b] − I",), low=3, high=8),
    Call("grouped", "y = Attention(q, k, v)", f"{Q4}, float[B,2,J,8] k, float[B,2,J,4] v", ("k[B,2,J,8]",
        "h // 3")),
    Call("flat", "y = Attention<q_num_heads=6, kv_num_heads=2>(q, k, v)",
         "float[B,I,48] q, float[B,J,16] k, float[B,J,8] v", ("q[B,6,I,8]", "h // 3")),
    Call("window", "y = Attention<left_window_size=2, is_causal=1>(q, k, v)", f"{Q4}, {KV4}", ("j ≤ i",
        "j > i − 3"), 25),
    Call("multi-head", "y = com.microsoft.MultiHeadAttention<num_heads=6>(q, k, v)",
         "float[B,I,48] q, float[B,J,48] k, float[B,J,24] v", ("0.35355339059327373·s",)),
    Call("multi-head, padding", "y = com.microsoft.MultiHeadAttention<num_heads=6>(q, k, v, , p)",
         "float[B,I,48] q, float[B,J,48] k, float[B,J,24] v, int32[B,J] p", ("p[b, j] ≠ 0", "− 10000.0")),
    Call("multi-head, bias", "y = com.microsoft.MultiHeadAttention<num_heads=6, scale=0.25>(q, k, v, , , a)",
         "float[B,I,48] q, float[B,J,48] k, float[B,J,24] v, float[1,6,I,J] a", ("a[0, h, i, j]", "0.25·s")),
    Call("multi-head, causal", "y = com.microsoft.MultiHeadAttention<num_heads=6, unidirectional=1>(q, k, v)",
         "float[B,I,48] q, float[B,I,48] k, float[B,I,24] v", ("j ≤ i",)),
)
# fmt: on


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_fused_call_is_lifted(call: Call) -> None:
    row = Row(
        call.name,
        call.body,
        call.inputs,
        opset=call.opset,
        symbols={"B": 2, "I": 5, "J": 7, "S": 4},
        low=call.low,
        high=call.high,
    )
    graph = onnx_graph(row.model())
    (site,) = find_sites(graph)
    assert site.spec is not None and site.region is not None, site.refusal
    for part in call.says:
        assert part in str(site.spec), str(site.spec)
    feeds = {name: torch.from_numpy(value) for name, value in row.feeds().items()}
    assert isinstance(graph.evaluate, OnnxEvaluator)
    precision = graph.evaluate.precision(["y"], list(feeds))
    assert precision is (torch.float32 if "com.microsoft" in call.body else torch.float64)
    types, sizes = site.spec.types(), dict(row.symbols)
    tensors = {
        b.name: canonical(feeds[b.value], b.layout, types[b.name], sizes) if b.layout else feeds[b.value]
        for b in site.region.inputs
    }
    (stated,) = site.spec.interpret(tensors)
    (output,) = site.region.outputs
    assert output.layout is not None
    native = canonical(graph.evaluate(["y"], feeds, sizes)["y"], output.layout, types["out"], sizes)
    torch.testing.assert_close(native.to(precision), stated.to(precision))


@pytest.mark.parametrize(
    ("body", "inputs", "reason"),
    [
        (
            "y = com.microsoft.MultiHeadAttention<num_heads=6>(q, k, v, b)",
            "float[B,I,48] q, float[B,J,48] k, float[B,J,48] v, float[144] b",
            "bias of the projections",
        ),
        ("y = com.microsoft.MultiHeadAttention<num_heads=6>(q)", "float[B,I,6,3,8] q", "packed"),
        (
            "y = com.microsoft.Attention<num_heads=6>(q, w, b)",
            "float[B,I,48] q, float[48,144] w, float[144] b",
            "projections",
        ),
        (
            "y = com.microsoft.GroupQueryAttention<num_heads=6, kv_num_heads=2>(q, k, v, , , l, t)",
            "float[B,I,48] q, float[B,I,16] k, float[B,I,16] v, int32[B] l, int32 t",
            "seqlens_k",
        ),
    ],
    ids=["bias", "packed", "projections", "grouped"],
)
def test_fused_call_that_cannot_be_stated_is_refused(body: str, inputs: str, reason: str) -> None:
    graph = onnx_graph(parsed(f"g ({inputs}) => (y) {{ {body} }}", 24))
    assert any(isinstance(node, RefusedAttention) for node in graph.nodes)
    (site,) = lift_graph(graph).sites
    assert site.status == "refused" and site.refusal is not None
    assert reason in site.refusal.reason and site.refusal.hint


@pytest.mark.parametrize(
    ("body", "inputs", "status", "keys"),
    [
        (
            "y, pk, pv = Attention<is_causal=1>(q, k, v, , past_k, past_v)",
            f"{Q4}, {NEW}, float[B,6,P,8] past_k, float[B,6,P,4] past_v",
            "lifted",
            "j ≤ i + J − ",
        ),
        ("y, , , w = Attention<is_causal=1>(q, k, v)  z = Exp(w)", f"{Q4}, {KV4}", "observed", "j ≤ i"),
    ],
    ids=["cache", "scores"],
)
def test_call_that_is_more_than_one_product_is_spelled_out(
    body: str, inputs: str, status: str, keys: str
) -> None:
    returned = "y, z" if "z = " in body else "y"
    (site,) = lift_graph(onnx_graph(parsed(f"g ({inputs}) => ({returned}) {{ {body} }}", 24))).sites
    assert site.status == status, str(site.refusal)
    assert keys in str(site.spec)


def test_nan_replaced_by_zero_is_a_property_of_empty_rows() -> None:
    text = """g (float[B,2,I,4] q, float[B,2,4,J] k, float[B,2,J,4] v, bool[B,1,1,J] m) => (y)
        <float zero = {{0.0}}, float hidden = {{-inf}}> {{
        s = MatMul(q, k)  f = Where(m, zero, hidden)  l = Add(s, f)  w = Softmax(l)
        n = IsNaN(w)  c = Where(n, {0}, {1})  y = MatMul(c, v) }}"""
    hidden = -math.inf
    for then, otherwise, empty in (("zero", "w", "zero"), ("w", "zero", "nan")):
        proto = parsed(text.format(then, otherwise).replace("-inf", "-1.0"))
        proto.graph.initializers["hidden"].const_value = ir.tensor(np.array(hidden, np.float32))
        (site,) = lift_graph(onnx_graph(proto)).sites
        assert site.spec is not None, site.refusal
        assert f"empty rows {empty}" in str(site.spec) or empty == "nan"
        attend = site.spec.attend()
        assert attend is not None and attend.norm.empty == empty


def test_integer_products_around_attention_leave_it_visible() -> None:
    """Dynamically quantised projections: opaque, but the float products of attention between them are
    lifted."""
    weights = ", ".join(["1"] * 64)
    text = f"""g (float[B,I,8] x) => (y)
        <uint8[8,8] wq = {{{weights}}}, uint8 z = {{128}}, float half = {{0.5}},
         int64[4] heads = {{0, 0, 2, 4}}> {{
        xq, xs, xz = DynamicQuantizeLinear(x)  p = MatMulInteger(xq, wq, xz, z)  f = Cast<to=1>(p)
        q0 = Mul(f, xs)  q1 = Reshape(q0, heads)
        q = Transpose<perm=[0,2,1,3]>(q1)  k = Transpose<perm=[0,2,3,1]>(q1)
        s = MatMul(q, k)  l = Mul(s, half)  a = Softmax(l)  y = MatMul(a, q) }}"""
    graph = onnx_graph(parsed(text))
    assert {node.what for node in graph.nodes if isinstance(node, Opaque)} == {
        "DynamicQuantizeLinear",
        "MatMulInteger",
    }
    (site,) = lift_graph(graph).sites
    assert site.status == "lifted" and "0.5·s" in str(site.spec)


SITES = {"minilm-int8": 6, "paraphrase-minilm-l3": 3}
MASK = {
    "minilm-int8": "mask   attention_mask[b, j] ≠ 0",
    "paraphrase-minilm-l3": "3.4028234663852886e+38·(attention_mask[b, j] − 1)",
}


@pytest.mark.parametrize("name", SITES)
def test_third_party_files_are_lifted(name: str, onnx_files: dict[str, Path]) -> None:
    sites = lift_graph(onnx_graph(ir.load(onnx_files[name]))).sites
    assert [site.status for site in sites] == ["lifted"] * SITES[name]
    scale = 1 / math.sqrt(32)
    for number, site in enumerate(sites):
        assert site.name.endswith(f"encoder.layer.{number}.attention.self")
        assert MASK[name] in str(site.spec)
        attend = site.spec.attend() if site.spec else None
        assert attend is not None
        slope = evaluate(
            attend.score,
            Environment(
                {a: torch.zeros(1, dtype=torch.int64) for a in "bhij"},
                {},
                {"attention_mask": torch.ones(1, 1)},
                torch.ones(1),
            ),
        )
        assert float(slope) == pytest.approx(scale, rel=float(np.finfo(np.float32).eps))
        assert [type(operation).__name__ for operation in site.block] == ["Project"] * 3


def test_every_value_of_a_third_party_file(onnx_files: dict[str, Path]) -> None:
    model = ir.load(onnx_files["paraphrase-minilm-l3"])
    feeds = {v.name or "": np.random.default_rng(0).integers(0, 2, (2, 5)) for v in model.graph.inputs}
    compare(model, feeds, ("LayerNormalization",))


def tiny_bert(attention: str) -> torch.nn.Module:
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=64,
        attn_implementation=attention,
    )

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = transformers.BertModel(config).eval()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return self.bert(input_ids=input_ids, attention_mask=attention_mask)[0]

    return Encoder().eval()


@pytest.mark.parametrize(
    "dynamo", [pytest.param(True, id="dynamo", marks=pytest.mark.slow), pytest.param(False, id="torchscript")]
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_torch_exports_are_lifted(attention: str, dynamo: bool, tmp_path: Path) -> None:
    model, file = tiny_bert(attention), tmp_path / "model.onnx"
    inputs = (torch.randint(0, 97, (2, 7)), torch.ones(2, 7, dtype=torch.int64))
    names = ["input_ids", "attention_mask"]
    if dynamo:
        axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=64)}
        program = torch.onnx.export(
            model, inputs, dynamo=True, dynamic_shapes=dict.fromkeys(names, axes), verbose=False
        )
        assert program is not None
        program.save(file)
    else:
        torch.onnx.export(
            model,
            inputs,
            file,
            dynamo=False,
            input_names=names,
            opset_version=17,
            dynamic_axes={name: {0: "batch", 1: "sequence"} for name in names},
        )
    loaded = ir.load(file)
    feeds = {
        "input_ids": np.random.default_rng(0).integers(0, 97, (2, 5)),
        "attention_mask": np.array([[1] * 5, [1, 1, 0, 0, 0]]),
    }
    graph = compare(loaded, feeds, ("LayerNormalization", "Gelu"))
    sites = lift_graph(graph).sites
    assert [site.status for site in sites] == ["lifted", "lifted"], [str(site.refusal) for site in sites]
    assert [site.name for site in sites] == [f"bert.encoder.layer.{n}.attention.self" for n in range(2)]
    for site in sites:
        assert "mask   attention_mask[b, j] ≠ 0" in str(site.spec)


# --- ONNX's own conformance cases ---------------------------------------------------------------------------


def conformance_cases() -> list[Any]:
    from onnx.backend.test.case.node import (
        collect_testcases,
    )  # makes the inputs of all cases, some 20 seconds

    return collect_testcases(None)  # type: ignore[no-untyped-call]


def plain(arrays: Any) -> bool:
    """Whether all are tensors of types that NumPy has."""
    return all(isinstance(array, np.ndarray) and array.dtype.kind in "fiub" for array in arrays)


@pytest.mark.slow
def test_conformance_cases_of_onnx() -> None:
    """Every case made of stated operators gives the published result, and no attention is lifted wrongly."""
    compared, statuses = 0, []
    for case in conformance_cases():
        operators = {node.op_type for node in case.model.graph.node}
        if not operators <= {*STATED, "Constant", "Shape", "Size"} or not plain(case.data_sets[0][0]):
            continue
        model = ir.from_proto(case.model)
        graph = onnx_graph(model)
        if "attention" in case.name:
            for site in lift_graph(graph).sites:
                # some cases cannot be proven: random lengths of a cache leave no row with a visible key
                honest = ("unstated-attention", "escaping-value", "unproven")
                assert site.refusal is None or site.refusal.kind in honest, site.refusal
                statuses.append(site.status)
            continue
        if any(isinstance(node, OPAQUE) for node in graph.nodes):
            continue
        given = {
            name: torch.from_numpy(array.astype(np.float64) if array.dtype.kind == "f" else array)
            for name, array in zip(
                (v.name or "" for v in model.graph.inputs), case.data_sets[0][0], strict=True
            )
        }
        constants = {
            name: entry.value.double() if entry.value.is_floating_point() else entry.value
            for name, entry in graph.inputs.items()
            if entry.value is not None
        }
        found = run_view(graph, {**constants, **given}, {}, {}.__getitem__)
        for output, expected in zip(model.graph.outputs, case.data_sets[0][1], strict=True):
            actual = found[output.name or ""].numpy()
            assert actual.shape == expected.shape, case.name
            rounding = float(np.finfo(expected.dtype).eps) if expected.dtype.kind == "f" else 0.0
            # the published results are rounded at every step of sums of a few dozen terms
            np.testing.assert_allclose(
                actual.astype(np.float64),
                np.asarray(expected, np.float64),
                rtol=32 * rounding,
                atol=32 * rounding,
                err_msg=case.name,
            )
        compared += 1
    assert compared > 300
    assert statuses.count("lifted") > 100
