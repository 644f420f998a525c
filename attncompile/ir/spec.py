"""The Spec: a small graph of operations in single assignment, with a verifier, a printed form and an interpreter."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import types as python_types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attncompile.ir.expr import Const, Expr, Size
from attncompile.ir.ops import OPERATIONS, Attend, Normalizer, Operation, Scan
from attncompile.ir.text import parse_expr, print_expr
from attncompile.ir.types import DTYPES, Axis, TensorType, Value, bind_sizes, element_kind


@dataclass(frozen=True)
class Spec:
    """What one attention site computes.

    Attributes:
        name: where it stands in the model, such as ``model.layers.3.self_attn``.
        inputs: the tensors it reads, with their types.
        operations: in the order of execution; each result name is assigned once.
        outputs: names of the tensors it gives.
    """

    name: str
    inputs: tuple[Value, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...] = ("out",)

    def types(self) -> dict[str, TensorType]:
        """Types of all tensors, inputs and results, verified.

        Raises:
            ValueError: quoting the Spec, with the operation at fault marked.
        """
        known: dict[str, TensorType] = {}
        for value in self.inputs:
            if value.name in known:
                raise ValueError(f"{self.name}: two inputs are named {value.name!r}")
            known[value.name] = value.type
        for number, operation in enumerate(self.operations):
            try:
                made = operation.infer(known)
                again = [name for name in made if name in known]
                if again:
                    raise ValueError(f"{again[0]!r} is assigned twice")
            except ValueError as error:
                raise ValueError(f"{error}\n{self._marked(number)}") from None
            known.update(made)
        for name in self.outputs:
            if name not in known:
                raise ValueError(f"{self.name}: output {name!r} is never made; there are {sorted(known)}")
        return known

    def _marked(self, fault: int) -> str:
        lines = [f"{self.name}"]
        for number, operation in enumerate(self.operations):
            lines.append(("▶ " if number == fault else "  ") + f"{operation.keyword} {', '.join(operation.operands())}")
        return "\n".join(lines)

    def verify(self) -> Spec:
        """The Spec itself, once its types have been checked."""
        self.types()
        return self

    def attend(self) -> Attend | None:
        """The attention operation, when there is exactly one."""
        found = [op for op in self.operations if isinstance(op, Attend)]
        return found[0] if len(found) == 1 else None

    def scan(self) -> Scan | None:
        """The scan, when there is exactly one."""
        found = [op for op in self.operations if isinstance(op, Scan)]
        return found[0] if len(found) == 1 else None

    def captured(self) -> tuple[Value, ...]:
        """Inputs that are only loaded inside expressions (masks, biases), not operands."""
        fields = {
            getattr(op, f.name)
            for op in self.operations for f in dataclasses.fields(op) if f.metadata.get("role") == "operand"
        }
        return tuple(value for value in self.inputs if value.name not in fields)

    def interpret(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
        """Run the reference definitions.

        Args:
            tensors: one tensor per input, by name.
            dtype: float dtype of the arithmetic; float64 makes this the yardstick.

        Raises:
            ValueError: when a tensor is missing or does not fit its type.
        """
        sizes = bind_sizes({value.name: value.type for value in self.inputs}, tensors)
        known = {value.name: tensors[value.name] for value in self.inputs}
        for operation in self.operations:
            known.update(operation.reference(known, sizes, dtype))
        return tuple(known[name] for name in self.outputs)

    def flops(self, sizes: Mapping[str, int]) -> int:
        """Floating-point operations at given sizes, nothing skipped."""
        known = self.types()
        return sum(operation.flops(known, sizes) for operation in self.operations)

    def bytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes of inputs read once and outputs written once."""
        known = self.types()
        return sum(known[name].bytes(sizes) for name in (*(v.name for v in self.inputs), *self.outputs))

    def fingerprint(self) -> str:
        """Hash of everything but the name: equal for equal computations."""
        return hashlib.sha256(print_spec(dataclasses.replace(self, name="site")).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return print_spec(self)


def _operand_texts(operation: Operation, inputs: Mapping[str, TensorType], seen: set[str]) -> str:
    fields = [f for f in dataclasses.fields(operation) if f.metadata.get("role") == "operand"]
    names = [(f.name, getattr(operation, f.name)) for f in fields if getattr(operation, f.name)]
    first = next((inputs[name].dtype for _, name in names if name in inputs), "")
    groups: list[tuple[list[str], str]] = []
    for _, name in names:
        text = ""
        if name in inputs and name not in seen:
            seen.add(name)
            kind = inputs[name]
            text = f"[{','.join(print_expr(size).replace(' ', '') for size in kind.sizes)}]"
            text += f":{kind.dtype}" if kind.dtype != first else ""
        if groups and groups[-1][1] == text and text:
            groups[-1][0].append(name)
        else:
            groups.append(([name], text))
    head = "  ".join(",".join(group) + text for group, text in groups)
    return head + (f"  {first}" if first else "")


def _attribute_lines(operation: Operation, digits: int | None) -> list[tuple[str, str]]:
    lines = []
    for f in dataclasses.fields(operation):
        role, value = f.metadata.get("role"), getattr(operation, f.name)
        if role == "operand" or (role is None and value == f.default and f.name not in ("score", "mask", "norm")):
            continue
        if role == "result" and value == f.default:
            continue
        text = print_expr(value, digits) if isinstance(value, Expr) else (
            str(value).lower() if isinstance(value, bool) else str(value) or "none")
        lines.append((f.name, text))
    return lines


def print_spec(spec: Spec, digits: int | None = None) -> str:
    """The Spec as text.

    With ``digits=None`` the text reads back through :func:`parse_spec`; a number of digits shortens real constants for
    people.
    """
    inputs = {value.name: value.type for value in spec.inputs}
    seen: set[str] = set()
    captured = spec.captured()
    lines: list[str] = []
    single = len(spec.operations) == 1
    for operation in spec.operations:
        head = f"{operation.keyword}  {_operand_texts(operation, inputs, seen)}"
        lines.append(f"{spec.name}   {head}" if single else f"  {head}")
        indent = "  " if single else "    "
        lines += [f"{indent}{key:<6} {text}" for key, text in _attribute_lines(operation, digits)]
    if not single:
        lines.insert(0, spec.name)
    for value in captured:
        sizes = ",".join(print_expr(size).replace(" ", "") for size in value.type.sizes)
        lines.append(f"  given  {value.name}[{sizes}]:{value.type.dtype}")
    if spec.outputs != ("out",):
        lines.append(f"  gives  {', '.join(spec.outputs)}")
    return "\n".join(lines)


_HEAD = re.compile(r"^(?P<names>[\w.,]+)(?:\[(?P<sizes>[^\]]*)\])?(?::(?P<dtype>\w+))?$")


def _parse_sizes(text: str) -> tuple[Expr, ...]:
    return tuple(parse_expr(size) for size in text.split(",") if size.strip())


def _axes(letters: str, sizes: tuple[Expr, ...]) -> tuple[Axis, ...]:
    names = list(letters) if len(letters) == len(sizes) else [f"a{n}" for n in range(len(sizes))]
    return tuple(Axis(name, size) for name, size in zip(names, sizes, strict=True))


def parse_spec(text: str) -> Spec:
    """Read a Spec back from its printed form.

    Raises:
        ValueError: naming the line that cannot be read.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("an empty text is no Spec")
    name, _, rest = lines[0].partition("   ")
    body = ([f"  {rest.strip()}"] if rest.strip() else []) + lines[1:]
    inputs: dict[str, Value] = {}
    captured: dict[str, Value] = {}
    outputs: tuple[str, ...] = ("out",)
    pending: list[tuple[type[Operation], dict[str, str], dict[str, str]]] = []
    for line in body:
        keyword, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if keyword == "given":
            match = _HEAD.match(argument.replace(" ", ""))
            if not match or match["sizes"] is None or match["dtype"] not in DTYPES:
                raise ValueError(f"cannot read the line {line!r}: expected given NAME[SIZES]:DTYPE")
            sizes = _parse_sizes(match["sizes"])
            captured[match["names"]] = Value(match["names"], TensorType(_axes("", sizes), match["dtype"]))
        elif keyword == "gives":
            outputs = tuple(part.strip() for part in argument.split(","))
        elif keyword in OPERATIONS:
            kind = OPERATIONS[keyword]
            pending.append((kind, _read_operands(kind, argument, inputs, line), {}))
        elif pending:
            pending[-1][2][keyword] = argument
        else:
            raise ValueError(f"cannot read the line {line!r}: unknown operation {keyword!r}, known are {sorted(OPERATIONS)}")
    kinds = {value.name: element_kind(value.type.dtype) for value in (*inputs.values(), *captured.values())}
    operations = tuple(_build(kind, operands, attributes, kinds) for kind, operands, attributes in pending)
    return Spec(name.strip(), (*inputs.values(), *captured.values()), operations, outputs).verify()


def _read_operands(kind: type[Operation], text: str, inputs: dict[str, Value], line: str) -> dict[str, str]:
    tokens = text.split()
    default = tokens.pop() if tokens and tokens[-1] in DTYPES else ""
    fields = [f for f in dataclasses.fields(kind) if f.metadata.get("role") == "operand"]
    found: list[tuple[str, str | None, str]] = []
    for token in tokens:
        match = _HEAD.match(token)
        if not match:
            raise ValueError(f"cannot read {token!r} in the line {line!r}")
        found += [(name, match["sizes"], match["dtype"] or default) for name in match["names"].split(",")]
    if len(found) > len(fields):
        raise ValueError(f"{kind.keyword} takes {len(fields)} operands, the line {line!r} has {len(found)}")
    for field, (name, sizes, dtype) in zip(fields, found, strict=False):
        if sizes is not None:
            inputs[name] = Value(name, TensorType(_axes(field.metadata["axes"], _parse_sizes(sizes)), dtype))
    return {field.name: name for field, (name, _, _) in zip(fields, found, strict=False)}


def _build(kind: type[Operation], operands: dict[str, str], attributes: dict[str, str], kinds: Mapping[str, Any]) -> Operation:
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = dict(operands)
    for key, text in attributes.items():
        hint = hints.get(key)
        if hint is None or isinstance(hint, python_types.UnionType):
            raise ValueError(f"{kind.keyword} has no attribute {key!r}")
        if hint is Expr:
            values[key] = parse_expr(text, kinds)
        elif hint is Normalizer:
            values[key] = Normalizer.parse(text)
        elif hint is bool:
            values[key] = text == "true"
        elif text == "none":
            values[key] = ""
        else:
            values[key] = hint(text)
    return kind(**values)


__all__ = ["Const", "Size", "Spec", "parse_spec", "print_spec"]
