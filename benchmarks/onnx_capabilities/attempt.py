"""One thing to try on ONNX Runtime: a model of one operator, what goes in, and what must come out.

What must come out is computed by plain PyTorch in float64 from the very numbers that go in. How far off a result may be
is derived (:mod:`attncompile.verify.tolerance`): as far as the same formula is in the dtype that is tried, and one more
reordered sum. An attempt also says what the operator would give *without* the feature; the two must lie far apart, or
an operator that ignores an attribute could not be told from one that follows it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from attncompile.verify.tolerance import derive_tolerance

MICROSOFT = "com.microsoft"
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
"""Dtypes that are tried, by the names that the table has."""

IR_VERSION = 10
"""Of the models: the newest that the oldest ONNX Runtime of the table reads."""

TELLING = 3.0
"""How many times the tolerance the results with and without a feature must lie apart, at least: a result within one
tolerance of the one is then beyond one of the other."""

LENGTHS = (9, 150)
"""Every attempt is made at two lengths: kernels cut long rows into blocks, or have another kernel for them."""

_ONNX = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float64: TensorProto.DOUBLE,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}

Results = Sequence[torch.Tensor | None]
"""What an operator gives, in its order; ``None`` for what is not looked at."""


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Attributes:
        inputs: in the operator's order; ``None`` for one that is left out.
        attributes: of the node.
        reference: the results, computed in the dtype it is given.
        length: terms of the longest sum.
        constants: numbers of the inputs that are initialisers of the model.
        shared: number of an output to that of the input whose buffer it is written to.
        judged: number of an output to the rows of it that are looked at; a reference gives these alone.
        rounding: absolute error that the operator's definition allows beyond the dtype's own, as where it may round
            what it multiplies to integers.
    """

    inputs: Sequence[torch.Tensor | None]
    attributes: Mapping[str, Any]
    reference: Callable[[torch.dtype], Results]
    length: int
    constants: frozenset[int] = frozenset()
    shared: Mapping[int, int] = field(default_factory=dict)
    judged: Mapping[int, slice] = field(default_factory=dict)
    rounding: float = 0.0


DTYPES = ("float32", "float16", "bfloat16")
"""What is tried unless an attempt says otherwise."""

Make = Callable[[torch.dtype, int], Case]
"""A case for a dtype and a length."""


@dataclass(frozen=True)
class Attempt:
    """One row of the table, for several dtypes.

    Attributes:
        domain: ``""`` for the standard, ``com.microsoft`` for ONNX Runtime's own.
        operator: its name.
        feature: what of it is tried, in a few words.
        make: the case with the feature; without: the same numbers without it, where there is such a call.
        opset: the model's standard opset, which is the operator's version for standard ones.
        dtypes: that are tried.
        whole: a complete model in the place of one node, where that is what is tried.
    """

    domain: str
    operator: str
    feature: str
    make: Make
    without: Make | None = None
    opset: int = 18
    dtypes: Sequence[str] = DTYPES
    whole: Callable[[Case], onnx.ModelProto] | None = None

    def cases(self, dtype: str) -> list[Prepared]:
        """The calls of this attempt with their expected results.

        Raises:
            RuntimeError: when the results with and without the feature are too close to be told apart.
        """
        return [self._prepared(FLOATS[dtype], length) for length in LENGTHS]

    def _prepared(self, dtype: torch.dtype, length: int) -> Prepared:
        case = self.make(dtype, length)
        right, plain = case.reference(torch.float64), case.reference(dtype)
        expected = [_expected(*pair, case) for pair in zip(right, plain, strict=True)]
        other: Results = [None] * len(right)
        if self.without is not None:
            other = self.without(dtype, length).reference(torch.float64)
            told = [
                None if one is None or two is None or one.right.shape != two.shape else
                float((one.right - two).nan_to_num(0.0, 1e9, -1e9).abs().max()) > TELLING * one.bound
                for one, two in zip(expected, other, strict=False)
            ]
            if True not in told and any(part is not None for part in told):
                raise RuntimeError(f"{self.operator}, {self.feature}, {dtype}: it would not show if it were ignored")
        model = (self.whole or self._model)(case)
        others = [
            two if one is not None and two is not None and one.right.shape == two.shape else None
            for one, two in zip(expected, [*other, *[None] * len(expected)], strict=False)
        ]
        return Prepared(model.SerializeToString(), _fed(case), expected, others, case.shared, case.judged)

    def _model(self, case: Case) -> onnx.ModelProto:
        return one_node(self.domain, self.operator, self.opset, case)


def attempted(
    call: Callable[..., Case],
    domain: str,
    operator: str,
    feature: str,
    base: Mapping[str, Any] | None = None,
    *,
    opset: int = 18,
    dtypes: Sequence[str] = DTYPES,
    **options: Any,
) -> Attempt:
    """A call with some options, told apart from the one that has the options of ``base`` alone, where that is given."""
    without = partial(call, **base) if base is not None else None
    make = partial(call, **{**(base or {}), **options})
    return Attempt(domain, operator, feature, make, without, opset=opset, dtypes=dtypes)


@dataclass(frozen=True)
class Expected:
    """One result in float64 and the largest absolute error that is rounding."""

    right: torch.Tensor
    bound: float


@dataclass(frozen=True)
class Prepared:
    """A call as ONNX Runtime takes it, and what must come of it.

    Attributes:
        model: its bytes; fed: arrays by the names of its inputs.
        expected: by number of the output; others: what would come without the feature, where it has that shape.
        shared: number of an output to that of the input whose buffer it is written to.
        judged: number of an output to the rows of it that are looked at.
    """

    model: bytes
    fed: Mapping[str, np.ndarray]
    expected: Sequence[Expected | None]
    others: Sequence[torch.Tensor | None]
    shared: Mapping[int, int]
    judged: Mapping[int, slice]


def _expected(right: torch.Tensor | None, plain: torch.Tensor | None, case: Case) -> Expected | None:
    if right is None or plain is None:
        return None
    if not right.is_floating_point() or not plain.is_floating_point():
        return Expected(right.double(), 0.0)
    dtype = plain.dtype if plain.dtype != torch.float64 else torch.float64
    eager = plain if dtype != torch.float64 else right.float()
    found = derive_tolerance(right, eager.reshape(right.shape), case.length, dtype)
    return Expected(right, found.bound + case.rounding)


def draw(name: str, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers that depend on the name and the shape alone, rounded to a dtype."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}{shape}".encode()))
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


def _name(place: int) -> str:
    return f"input_{place}"


def _fed(case: Case) -> dict[str, np.ndarray]:
    """Numpy has no bfloat16: those inputs go in as float32 and are rounded by the model, without a loss."""
    return {
        _name(place): (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for place, tensor in enumerate(case.inputs)
        if tensor is not None and place not in case.constants
    }


def one_node(domain: str, operator: str, opset: int, case: Case) -> onnx.ModelProto:
    """A model of one node, with casts around what is bfloat16."""
    nodes, inputs, outputs, constants, names = [], [], [], [], []
    for place, tensor in enumerate(case.inputs):
        if tensor is None:
            names.append("")
            continue
        name = _name(place)
        narrow = tensor.dtype == torch.bfloat16
        stored = tensor.float() if narrow else tensor
        kind = _ONNX[stored.dtype]
        if place in case.constants:
            constants.append(helper.make_tensor(name, kind, tuple(stored.shape), stored.numpy().tobytes(), raw=True))
        else:
            inputs.append(helper.make_tensor_value_info(name, kind, [None] * stored.dim()))
        if narrow:
            nodes.append(helper.make_node("Cast", [name], [f"{name}_narrow"], to=TensorProto.BFLOAT16))
        names.append(f"{name}_narrow" if narrow else name)
    made = case.reference(torch.float64)
    plain = case.reference(_working(case))
    results = []
    for place, (wanted, tensor) in enumerate(zip(made, plain, strict=True)):
        if wanted is None or tensor is None:
            results.append("")
            continue
        name = f"output_{place}"
        narrow = tensor.dtype == torch.bfloat16
        results.append(f"{name}_narrow" if narrow else name)
        kind = TensorProto.FLOAT if narrow else _ONNX[tensor.dtype]
        outputs.append((name, narrow, helper.make_tensor_value_info(name, kind, None)))
    while names and not names[-1]:
        names.pop()
    node = helper.make_node(operator, names, results, domain=domain, name="tried", **case.attributes)
    nodes.append(node)
    for name, narrow, _ in outputs:
        if narrow:
            nodes.append(helper.make_node("Cast", [f"{name}_narrow"], [name], to=TensorProto.FLOAT))
    graph = helper.make_graph(nodes, "tried", inputs, [info for *_, info in outputs], constants)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def _working(case: Case) -> torch.dtype:
    """The float dtype of a case: that of its first float input."""
    return next(t.dtype for t in case.inputs if t is not None and t.is_floating_point())
