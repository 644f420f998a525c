"""Products and other operators on quantised tensors, spelled out between pairs that round: the QDQ form of a model.

ONNX writes one computation in three ways. ``QLinearMatMul`` reads and gives codes with their scales; ``MatMulInteger``
gives whole numbers, which a cast and a product with both scales follow; the QDQ form has the operator in floats between
``DequantizeLinear`` and ``QuantizeLinear``. The first two are brought to the third, which says the same up to rounding
in floats: what an operator computes is then stated in one way, and each rounding is a pair of nodes.

Calls whose place nobody takes can be put back, see :mod:`attncompile.frontends.onnx_definitions`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from attncompile.frontends.onnx_bodies import nested_graphs, nested_values
from attncompile.frontends.onnx_codes import Codes, is_single, same_numbers, same_zeros
from attncompile.frontends.onnx_definitions import SpelledOut, keep_spelled_out

CONTRIB = "com.microsoft"
STANDARD = ("", "ai.onnx")
AXES_OPSET = 13
"""The opset from which on a scale may have an axis."""
NARROW_OPSET = 21
"""The opset from which on what is rounded may have other than 8 bits."""
PAIR = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True)
class Quantised:
    """An operator on quantised tensors.

    Attributes:
        operator: the same in floats.
        tensors: where its quantised inputs are, each followed by scale and zero point.
        result: where scale and zero point of its result are; ``None`` for a result in floats.
        plain: where its other inputs are, which come first.
        columns: whether scales of one axis belong to rows of the left and to columns of the right matrix.
    """

    operator: str
    tensors: tuple[int, ...]
    result: int
    plain: tuple[int, ...] = ()
    columns: bool = False


OPERATORS: Mapping[tuple[str, str], Quantised] = {
    ("", "QLinearMatMul"): Quantised("MatMul", (0, 3), 6, columns=True),
    (CONTRIB, "QLinearAdd"): Quantised("Add", (0, 3), 6),
    (CONTRIB, "QLinearMul"): Quantised("Mul", (0, 3), 6),
    (CONTRIB, "QLinearSigmoid"): Quantised("Sigmoid", (0,), 3),
    (CONTRIB, "QLinearSoftmax"): Quantised("Softmax", (0,), 3),
    (CONTRIB, "QLinearLeakyRelu"): Quantised("LeakyRelu", (0,), 3),
    (CONTRIB, "QLinearWhere"): Quantised("Where", (1, 4), 7, plain=(0,)),
}

# fmt: off
MOVEMENTS = frozenset({
    "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Expand", "Slice", "Gather", "Flatten", "Identity", "Tile", "Split",
})
# fmt: on
"""Operators that move the elements of their first input and compute nothing."""


def spell_out_quantised(model: ir.Model) -> None:
    """Bring a model to the QDQ form, in place; its nodes and values must have names of their own.

    What keeps its form: products with parameters in whole numbers (``MatMulInteger`` of a linear layer), scales that
    this operator set cannot write, and operators that no row of :data:`OPERATORS` states.
    """
    spelling = _Spelling(model)
    for graph in list(nested_graphs(model.graph)):
        for node in list(graph):
            spelling.visit(node)
    keep_spelled_out(model, spelling.calls)


@dataclass
class _Spelling:
    """The model while it is brought to the QDQ form.

    Attributes:
        codes: of the quantised tensors so far that depend on activations.
        numbers: what these stand for, where something reads it: all its readers share that.
        calls: what was spelled out.
    """

    model: ir.Model
    codes: dict[ir.Value, Codes] = field(default_factory=dict)
    numbers: dict[ir.Value, ir.Value] = field(default_factory=dict)
    calls: list[SpelledOut] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)

    @property
    def opset(self) -> int:
        """Of the standard's operators."""
        return self.model.opset_imports.get("") or self.model.opset_imports.get("ai.onnx", 0)

    def visit(self, node: ir.Node) -> None:
        """Spell out a node where that is possible, and note the codes of what it makes."""
        domain, operator = ("" if node.domain in STANDARD else node.domain), node.op_type
        if (domain, operator) in OPERATORS:
            self._call(node, OPERATORS[domain, operator])
        elif (domain, operator) == (CONTRIB, "QLinearConcat"):
            self._call(node, Quantised("Concat", tuple(range(2, len(node.inputs), 3)), 0))
        elif (domain, operator) == (CONTRIB, "MatMulIntegerToFloat"):
            self._to_float(node)
        elif (domain, operator) == (CONTRIB, "DynamicQuantizeMatMul"):
            self._rounds_left(node)
        elif (domain, operator) == (CONTRIB, "QGemm"):
            self._gemm(node)
        elif domain == CONTRIB and operator in PAIR:
            self._pair(node)
        elif domain:
            return
        elif operator == "QuantizeLinear" and is_single(node.inputs[1]):
            scale, zero = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
            assert scale is not None  # it is single
            self.codes[node.outputs[0]] = Codes(scale, zero)
        elif operator == "DynamicQuantizeLinear":
            self.codes[node.outputs[0]] = Codes(node.outputs[1], node.outputs[2])
        elif operator in MOVEMENTS and node.inputs and node.inputs[0] in self.codes:
            self._moved(node, self.codes[node.inputs[0]])
        elif operator == "Concat" and (codes := self._common(node.inputs)) is not None:
            self._moved(node, codes)
        elif operator == "MatMulInteger":
            self._integers(node)

    def _call(self, node: ir.Node, known: Quantised) -> None:
        """A call with scales among its inputs."""
        given = [*node.inputs, *[None] * 8]
        scale, zero = given[known.result : known.result + 2]
        attributes = self._axis(node) if known.operator == "Softmax" else dict(node.attributes)
        if scale is None or zero is None or attributes is None:
            return
        axes = (-2, -1) if known.columns else (None,) * len(known.tensors)
        read = [_Read(given[n], given[n + 1], given[n + 2], axis) for n, axis in zip(known.tensors, axes, strict=True)]
        if not is_single(scale) or not all(each.can_be(self.opset) for each in read):
            return
        place = _Place(self, node)
        operands = [*(given[other] for other in known.plain), *map(place.dequantised, read)]
        self._finish(place, [place(known.operator, operands, attributes)], Codes(scale, zero))

    def _axis(self, node: ir.Node) -> dict[str, ir.Attr] | None:
        """The axis of ``QLinearSoftmax``; ``None`` where it may run over several, as before opset 13."""
        axis, opset = node.attributes.get("axis"), node.attributes.get("opset")
        number = -1 if axis is None else int(axis.value)
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        last = number == -1 or (shape is not None and number == len(shape) - 1)
        versions = (0 if opset is None else int(opset.value), self.opset)
        return {"axis": ir.AttrInt64("axis", number)} if last or min(versions) >= 13 else None

    def _moved(self, node: ir.Node, codes: Codes) -> None:
        """Codes that are moved: their numbers are moved as well, and rounded again to the same codes."""
        place = _Place(self, node)
        inputs = [place.numbers(value) if value in self.codes else value for value in node.inputs]
        self._finish(place, place.several(node.op_type, inputs, node.attributes, len(node.outputs)), codes)

    def _common(self, tensors: Sequence[ir.Value | None]) -> Codes | None:
        """The codes that all tensors have; ``None`` where they have none or several."""
        found = [self.codes.get(tensor) if tensor is not None else None for tensor in tensors]
        codes, *others = found or [None]
        if codes is None:
            return None
        same = (each and same_numbers(each.scale, codes.scale) and same_zeros(each.zero, codes.zero) for each in others)
        return codes if all(same) else None

    def _to_float(self, node: ir.Node) -> None:
        """``MatMulIntegerToFloat``: both scales, both zero points and a bias."""
        given = [*node.inputs, None, None, None][:7]
        left, right, left_scale, right_scale, left_zero, right_zero, bias = given
        if not self._reads(left, left_scale, left_zero) or not self._reads(right, right_scale, right_zero):
            return
        place = _Place(self, node)
        product = self._product(place, left, right)
        place.end(product if bias is None else place("Add", [product, bias]))

    def _rounds_left(self, node: ir.Node) -> None:
        """``DynamicQuantizeMatMul``: it rounds the left matrix, takes codes of the right one, and adds a bias."""
        left, right, scale, zero, bias = [*node.inputs, None, None][:5]
        if left is None or not self._reads(right, scale, zero):
            return  # a linear layer
        place = _Place(self, node)
        rounded = place("DequantizeLinear", place.several("DynamicQuantizeLinear", [left], {}, 3))
        product = place("MatMul", [rounded, place.numbers(right)])
        place.end(product if bias is None else place("Add", [product, bias]))

    def _gemm(self, node: ir.Node) -> None:
        """``QGemm``: ``alpha · scales · (A' @ B' + C)`` of codes ``A``, ``B`` and whole numbers ``C``; or its codes."""
        given = [*node.inputs, None, None, None]
        added, scale, zero = given[6:9]
        swapped = node.attributes.get("transB")
        columns = 0 if swapped is not None and swapped.value else 1
        read = _Read(given[0], given[1], given[2], None), _Read(given[3], given[4], given[5], columns)
        if (scale is None) != (zero is None) or not all(each.can_be(self.opset) for each in read):
            return
        place = _Place(self, node)
        operands: list[ir.Value | None] = [place.dequantised(each) for each in read]
        if added is not None:
            whole = place("Cast", [added], {"to": ir.AttrInt64("to", ir.DataType.FLOAT)})
            operands.append(place("Mul", [whole, place("Mul", [given[1], given[4]])]))
        alpha = node.attributes.get("alpha")
        attributes = dict(node.attributes) | ({} if alpha is None else {"beta": ir.AttrFloat32("beta", alpha.value)})
        made = place("Gemm", operands, attributes)
        if scale is None:
            place.end(made)
        else:
            self._finish(place, [made], Codes(scale, zero))

    def _pair(self, node: ir.Node) -> None:
        """``QuantizeLinear`` and ``DequantizeLinear`` of ONNX Runtime's own set, which are those of the standard."""
        value, scale, zero = [*node.inputs, None][:3]
        old = zero is None or zero.dtype in (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32)
        lowest = AXES_OPSET if old else NARROW_OPSET
        if value is None or scale is None or self.opset < lowest:
            return
        place = _Place(self, node)
        made = place(node.op_type, [value, scale, zero], node.attributes)
        place.end(made)
        if node.op_type == "QuantizeLinear" and is_single(scale):
            self.codes[made] = Codes(scale, zero)

    def _integers(self, node: ir.Node) -> None:
        """``MatMulInteger``, where a product with the scales of both operands follows, in one or in two steps."""
        left, right, left_zero, right_zero = [*node.inputs, None, None][:4]
        if left not in self.codes or right not in self.codes:
            return  # a linear layer
        wanted = [self.codes[left].scale, self.codes[right].scale]
        scaled = _times(node, wanted)
        if scaled is None or not self._reads(left, wanted[0], left_zero):
            return
        if self._reads(right, wanted[1], right_zero):
            place = _Place(self, scaled)
            place.end(self._product(place, left, right))

    def _reads(self, tensor: ir.Value | None, scale: ir.Value | None, zero: ir.Value | None) -> bool:
        """Whether a tensor is read by the codes that it was rounded to."""
        codes = self.codes.get(tensor) if tensor is not None else None
        return codes is not None and same_numbers(codes.scale, scale) and same_zeros(codes.zero, zero)

    def _product(self, place: _Place, left: ir.Value | None, right: ir.Value | None) -> ir.Value:
        return place("MatMul", [place.numbers(left), place.numbers(right)])

    def _finish(self, place: _Place, made: Sequence[ir.Value], codes: Codes) -> None:
        """Round results to codes, in the place of the call's outputs."""
        rounded = [place("QuantizeLinear", [each, codes.scale, codes.zero]) for each in made]
        place.end(*rounded)
        self.codes.update(dict.fromkeys(rounded, codes))

    def fresh(self, name: str) -> str:
        """A name that nothing in the model has."""
        if not self.taken:
            self.taken.update(value.name or "" for value in nested_values(self.model.graph))
            self.taken.update(node.name or "" for graph in nested_graphs(self.model.graph) for node in graph)
        found, number = name, 1
        while found in self.taken:
            number += 1
            found = f"{name}_{number}"
        self.taken.add(found)
        return found


@dataclass(frozen=True)
class _Read:
    """A quantised operand as a call reads it; several scales belong to an axis."""

    tensor: ir.Value | None
    scale: ir.Value | None
    zero: ir.Value | None
    axis: int | None

    def can_be(self, opset: int) -> bool:
        """Whether ``DequantizeLinear`` of an operator set reads it: by one scale, or by one for each row or column."""
        if self.tensor is None or self.scale is None:
            return False
        rank = len(self.scale.shape) if self.scale.shape is not None else None
        return is_single(self.scale) or (self.axis is not None and rank == 1 and opset >= AXES_OPSET)


class _Place:
    """The nodes that are put in the place of one call."""

    def __init__(self, spelling: _Spelling, node: ir.Node) -> None:
        self.spelling, self.node = spelling, node
        self.nodes: list[ir.Node] = []
        self.shared: list[ir.Node] = []

    def __call__(
        self, operator: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, ir.Attr] | None = None
    ) -> ir.Value:
        """One more node; its output."""
        return self.several(operator, inputs, attributes or {}, 1)[0]

    def several(
        self, operator: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, ir.Attr], count: int
    ) -> Sequence[ir.Value]:
        """One more node with so many outputs; these."""
        self.nodes.append(self._made(f"{self.node.name}.{operator}", operator, inputs, attributes, count))
        return self.nodes[-1].outputs

    def _made(
        self,
        name: str,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, ir.Attr],
        count: int = 1,
    ) -> ir.Node:
        made = ir.Node(
            "", operator, list(inputs), attributes.values(), num_outputs=count, name=self.spelling.fresh(name)
        )
        made.metadata_props.update(self.node.metadata_props)
        for output in made.outputs:
            output.name = self.spelling.fresh(f"{made.name}.out")
        return made

    def dequantised(self, read: _Read) -> ir.Value:
        """The numbers that a tensor stands for."""
        codes = self.spelling.codes.get(read.tensor) if read.tensor is not None else None
        if codes is not None and same_numbers(codes.scale, read.scale) and same_zeros(codes.zero, read.zero):
            return self.numbers(read.tensor)
        along = {} if read.axis is None or is_single(read.scale) else {"axis": ir.AttrInt64("axis", read.axis)}
        return self("DequantizeLinear", [read.tensor, read.scale, read.zero], along)

    def numbers(self, tensor: ir.Value | None) -> ir.Value:
        """The numbers that a tensor of known codes stands for, read behind what makes it."""
        assert tensor is not None  # it has codes
        known, codes = self.spelling.numbers, self.spelling.codes[tensor]
        if tensor not in known:
            place = tensor.producer()
            assert place is not None and place.graph is not None  # codes are made
            inputs = [tensor, codes.scale, codes.zero]
            made = self._made(f"{tensor.name}.DequantizeLinear", "DequantizeLinear", inputs, {})
            place.graph.insert_after(place, made)
            known[tensor] = made.outputs[0]
        reads = known[tensor].producer()
        assert reads is not None
        self.shared.append(reads)
        return known[tensor]

    def end(self, *made: ir.Value) -> None:
        """Put the nodes in the place of the call, whose outputs these values become."""
        node, graph = self.node, self.node.graph
        assert graph is not None
        call = SpelledOut(
            node.domain, node.op_type, node.version, node.name, dict(node.attributes),
            tuple(self.nodes), tuple(self._read(value) for value in node.inputs), made,
        )  # fmt: skip
        graph.insert_before(node, self.nodes)
        names = [old.name for old in node.outputs]
        for old, new in zip(node.outputs, made, strict=True):
            new.type, new.shape = old.type, old.shape
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        for new, name in zip(made, names, strict=True):
            new.name = name
        self.spelling.calls.append(call)

    def _read(self, value: ir.Value | None) -> tuple[ir.Node, int] | ir.Value | None:
        """Where the nodes read a value that the call reads: what is put there later is what the call would read."""
        nodes = (*self.shared, *self.nodes)
        places = ((node, n) for node in nodes for n, read in enumerate(node.inputs) if read is value)
        return value if value is None else next(places, value)


def _times(product: ir.Node, scales: Sequence[ir.Value]) -> ir.Node | None:
    """The node that multiplies a product, cast before, with the last of some scales; ``None`` where none does."""
    node, missing = product, list(scales)
    while True:
        users = [use.node for use in node.outputs[0].uses()]
        if len(users) != 1 or users[0].domain not in STANDARD or users[0].op_type not in ("Cast", "Mul"):
            return None
        made, (node,) = node.outputs[0], users
        if node.op_type == "Cast":
            continue
        (other,) = [value for value in node.inputs if value is not made] or [None]
        for factor in _factors(other, missing):
            if factor not in missing:
                return None
            missing.remove(factor)
        if not missing:
            return node


def _factors(value: ir.Value | None, scales: Sequence[ir.Value]) -> Sequence[ir.Value | None]:
    """The two values that a product of scales is made of, or the value itself."""
    node = value.producer() if value is not None else None
    if value in scales or node is None or node.op_type != "Mul" or node.domain not in STANDARD:
        return [value]
    return node.inputs


__all__ = ["MOVEMENTS", "OPERATORS", "spell_out_quantised"]
