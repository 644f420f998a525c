"""Calls of ONNX Runtime that hold their projections, as models of one call with inputs for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper

BATCH, LENGTH, PAST, HEADS, CHANNELS = 2, 5, 3, 3, 8
WIDTH = HEADS * CHANNELS
SIZES = {"B": BATCH, "S": LENGTH, "P": PAST, "T": PAST + LENGTH, "M": 2 * BATCH, "N": 3 * WIDTH}


@dataclass(frozen=True)
class Projected:
    """One call.

    Attributes:
        name: what is special about it. operator: its name.
        settings: its attributes, beside the number of heads.
        mask: axes of its mask. past: whether it reads past keys and returns present ones. bias: axes of what it adds.
        widths: channels of queries, keys and values. opset: of the model.
        codes: types of states and weights in ``QAttention``; columns: whether weights have a scale for each column.
        says: parts of the Spec.
    """

    name: str
    operator: str = "QAttention"
    settings: Mapping[str, object] = field(default_factory=dict)
    mask: tuple[object, ...] | None = None
    past: bool = False
    bias: tuple[object, ...] | None = None
    widths: tuple[int, int, int] = (WIDTH, WIDTH, WIDTH)
    opset: int = 17
    codes: tuple[str, str] = ("uint8", "int8")
    columns: bool = False
    says: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.operator} {self.name}"

    def constants(self) -> dict[str, np.ndarray]:
        """Weights and what belongs to them."""
        random, total = np.random.default_rng(1), sum(self.widths)
        made = {"b": random.standard_normal(total).astype(np.float32) / 5}
        weight = random.standard_normal((WIDTH, total)).astype(np.float32) / 4
        if self.operator == "Attention":
            return made | {"w": weight}
        kind, shift = np.dtype(self.codes[1]), 120 if self.codes[1] == "uint8" else 0
        step = np.abs(weight).max(0 if self.columns else None) / 110
        zeros = random.integers(-5, 5, total) if self.columns else np.array(3)
        made["w"] = (np.rint(weight / step) + zeros + shift).astype(kind)
        return made | {"ws": step.astype(np.float32), "wz": (zeros + shift).astype(kind)}

    def model(self) -> onnx.ModelProto:
        """The model: states ``x``, rounded before the call where it takes codes."""
        given = {"x": (1, ("B", "S", WIDTH))}
        past, mask, bias = ("past" if self.past else ""), ("m" if self.mask else ""), ("a" if self.bias else "")
        if self.past:
            given["past"] = (1, (2, "B", HEADS, "P", CHANNELS))
        if self.mask:
            given["m"] = (6, self.mask)
        if self.bias:
            given["a"] = (1, self.bias)
        nodes, constants = [], self.constants()
        if self.operator == "QAttention":
            constants |= {"xs": np.array(0.03, np.float32), "xz": np.array(130, self.codes[0])}
            nodes.append(helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["c"], "rounds"))
            reads = ["c", "w", "b", "xs", "ws", mask, "xz", "wz", past]
        else:
            reads = ["x", "w", "b", mask, past, bias]
        while not reads[-1]:
            reads.pop()
        makes = {"y": ["B", "S", self.widths[2]]} | ({"present": [None] * 5} if self.past else {})
        settings = {"num_heads": HEADS, **self.settings}
        nodes.append(helper.make_node(self.operator, reads, list(makes), "call", domain="com.microsoft", **settings))
        graph = helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info(n, kind, shape) for n, (kind, shape) in given.items()],
            [helper.make_tensor_value_info(name, 1, shape) for name, shape in makes.items()],
            [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
        )  # fmt: skip
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=8)

    def feeds(self) -> dict[str, np.ndarray]:
        """States and, where the call takes them, past keys and values, a mask, and what is added to scores."""
        random = np.random.default_rng(2)
        made: dict[str, np.ndarray] = {}
        for value in self.model().graph.input:
            dims = value.type.tensor_type.shape.dim
            shape = [SIZES[d.dim_param] if d.dim_param else d.dim_value for d in dims]
            made[value.name] = random.standard_normal(shape).astype(np.float32)
        if self.mask:
            made["m"] = self.seen(made["m"].shape, random)
        return made

    def seen(self, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
        """A mask: which keys are seen, or between which positions they lie, nowhere in the last row."""
        if len(shape) > 1:
            return (random.random(shape) < 0.6).astype(np.int32)
        total = LENGTH + PAST * self.past
        bounds = np.array([total - 1, 2, 1, 2], np.int32)  # ends, then starts
        return bounds[: shape[0]]


def _both(name: str, **fields: object) -> tuple[Projected, Projected]:
    return Projected(name, "Attention", **fields), Projected(name, **fields)  # type: ignore[arg-type]


LATER = {"unidirectional": 1}
# fmt: off
CALLS = (
    *_both("plain", says=("0.35355",)),
    *_both("plain of an old operator set", opset=11),
    *_both("plain of a new operator set", opset=24),
    *_both("scale", settings={"scale": 0.5}, says=("0.5·s",)),
    *_both("causal", settings=LATER, says=("j ≤ i",)),
    *_both("padding", mask=("B", "S"), says=("m[b, j] ≥ 1", "fill   0.35", "− 10000.0")),
    *_both("padding and a number", mask=("B", "S"), settings={"mask_filter_value": -30.0}, says=("30",)),
    *_both("padding of an old operator set", mask=("B", "S"), opset=11),
    *_both("padding by query", mask=("B", "S", "S"), says=("m[b, i, j] ≥ 1",)),
    *_both("lengths", mask=("B",), says=("j < m[b]",)),
    *_both("lengths of an old operator set", mask=("B",), opset=11),
    *_both("ends and starts", mask=("M",), says=("m[b]",)),
    *_both("a mask that says nothing", mask=("B", 1), says=("mask   true",)),
    *_both("causal and padding", mask=("B", "S"), settings=LATER, says=("j ≤ i", "m[b, j]")),
    *_both("causal and lengths", mask=("B",), settings=LATER, says=("j ≤ i", "m[b]")),
    *_both("past", past=True),
    *_both("past, causal", past=True, settings=LATER, says=("j ≤ i",)),
    *_both("past of an old operator set", past=True, settings=LATER, opset=11),
    *_both("past, causal and padding", past=True, settings=LATER, mask=("B", "T"), says=("j ≤ i", "m[b, j]")),
    *_both("past and padding by query", past=True, mask=("B", "S", "T"), says=("m[b, i, j] ≥ 1",)),
    *_both("past, lengths", past=True, mask=("B",), says=("m[b]",)),
    Projected("added", "Attention", bias=(1, HEADS, "S", "S"), says=("a[0, h, i, j]",)),
    Projected("added, causal and padding", "Attention", bias=("B", HEADS, "S", "S"), mask=("B", "S"), settings=LATER,
              says=("a[b, h, i, j]", "j ≤ i")),
    Projected("narrow values", "Attention", widths=(WIDTH, WIDTH, 12), settings={"qkv_hidden_sizes": [24, 24, 12]}),
    Projected("scales of columns", columns=True, mask=("B", "S")),
    Projected("whole numbers without a sign", codes=("uint8", "uint8"), columns=True),
)
# fmt: on
