"""The Spec: a small graph of operations in single assignment.

It has a verifier, a printed form that reads back, and an interpreter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attncompile.ir.attend import Attend, Normalizer
from attncompile.ir.expr import Expr, Size, walk
from attncompile.ir.operation import Operation
from attncompile.ir.operators import Kind
from attncompile.ir.ops import OPERATIONS
from attncompile.ir.polynomial import polynomial
from attncompile.ir.scan import Scan
from attncompile.ir.text import parse_expr, parse_exprs, print_expr
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
        return dict(self._types)

    @functools.cached_property
    def _types(self) -> dict[str, TensorType]:
        """What :meth:`types` gives, found out once: whoever makes a kernel of a Spec asks forty times."""
        if not self.name or self.name != " ".join(self.name.split()):
            raise ValueError(f"{self.name!r} cannot name a Spec: it must be one line without double spaces")
        if not self.operations:
            raise ValueError(f"{self.name}: a Spec needs an operation")
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
        for name in known:
            if not _NAME.fullmatch(name) or name == "none":
                raise ValueError(
                    f"{self.name}: {name!r} cannot name a tensor: a name has letters, digits, _ and . and "
                    "starts with a letter or _, and none is no name"
                )
        for name in self.outputs:
            if name not in known:
                raise ValueError(
                    f"{self.name}: output {name!r} is never made; there are {', '.join(sorted(known))}"
                )
        return known

    def _marked(self, fault: int) -> str:
        lines = [
            f"{'▶' if number == fault else ' '} {operation.keyword} {', '.join(operation.operands())}"
            for number, operation in enumerate(self.operations)
        ]
        return "\n".join([self.name, *lines])

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
        fields = {name for operation in self.operations for _, name in _operands(operation)}
        return tuple(value for value in self.inputs if value.name not in fields)

    def undetermined_sizes(self) -> frozenset[str]:
        """The sizes it reads that no shape of an input tells: of an axis of ``S // 8`` there are eight ``S``."""
        sizes = [size for value in self.inputs for size in value.type.sizes]
        known: set[str] = set()
        while found := {name for size in sizes if (name := _determined(size, known)) is not None}:
            known |= found
        read = [*sizes, *(expr for operation in self.operations for expr in operation.expressions())]
        return frozenset({node.name for expr in read for node in walk(expr) if isinstance(node, Size)} - known)

    def interpret(
        self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float64
    ) -> tuple[torch.Tensor, ...]:
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


def _determined(size: Expr, known: set[str]) -> str | None:
    """The one unknown symbol of a size that is linear in it."""
    unknown = {node for node in walk(size) if isinstance(node, Size) and node.name not in known}
    if len(unknown) != 1:
        return None
    (symbol,) = unknown
    poly = polynomial(size)
    others = [mono for mono in poly if mono != (symbol,)]
    linear = (symbol,) in poly and not any(node == symbol for mono in others for atom in mono for node in walk(atom))
    return symbol.name if linear else None


def _operands(operation: Operation) -> list[tuple[dataclasses.Field[Any], str]]:
    """Operand fields with the names of their tensors; an optional one that is not given is left out."""
    fields = [f for f in dataclasses.fields(operation) if f.metadata.get("role") == "operand"]
    return [(f, getattr(operation, f.name)) for f in fields if getattr(operation, f.name)]


def _sizes_text(kind: TensorType, letters: str) -> str:
    """``[B,8,J,128]``; an axis whose letter is not the expected one says so: ``[b:B,8,J,128]``."""
    expected = _letters(letters, len(kind.axes))
    texts = [
        ("" if axis.name == letter else f"{axis.name}:") + print_expr(axis.size).replace(" ", "")
        for axis, letter in zip(kind.axes, expected, strict=True)
    ]
    return f"[{','.join(texts)}]"


def _letters(letters: str, rank: int) -> list[str]:
    return list(letters) if len(letters) == rank else [f"a{number}" for number in range(rank)]


def _operand_texts(operation: Operation, inputs: Mapping[str, TensorType], seen: set[str]) -> str:
    operands = _operands(operation)
    default = next((inputs[name].dtype for _, name in operands if name in inputs and name not in seen), "")
    groups: list[tuple[list[str], str]] = []
    fields = [f for f in dataclasses.fields(operation) if f.metadata.get("role") == "operand"]
    for place, (field, name) in enumerate(operands):
        text = ""
        if name in inputs and name not in seen:
            seen.add(name)
            kind = inputs[name]
            text = _sizes_text(kind, field.metadata["axes"]) + (
                f":{kind.dtype}" if kind.dtype != default else ""
            )
        if fields[place] is not field:  # one before it is left out
            groups.append(([f"{field.name}={name}"], text))
        elif groups and groups[-1][1] == text and text:
            groups[-1][0].append(name)
        else:
            groups.append(([name], text))
    head = "  ".join(",".join(group) + text for group, text in groups)
    return head + (f"  {default}" if default else "")


_ALWAYS_PRINTED = {Attend.keyword: ("score", "mask", "norm")}
"""Attributes that are printed even where they have their default, by operation."""


def _attribute_lines(operation: Operation, digits: int | None) -> list[tuple[str, str]]:
    lines = []
    for field in dataclasses.fields(operation):
        value = getattr(operation, field.name)
        if field.metadata.get("role") == "operand" or (
            value == field.default and field.name not in _ALWAYS_PRINTED.get(operation.keyword, ())
        ):
            continue
        if isinstance(value, Expr):
            text = print_expr(value, digits)
        elif isinstance(value, tuple):
            text = ", ".join(print_expr(each, digits) for each in value)
        else:
            text = str(value).lower() if isinstance(value, bool) else str(value) or "none"
        lines.append((field.name, text))
    return lines


def print_spec(spec: Spec, digits: int | None = None) -> str:
    """The Spec as text.

    With ``digits=None`` the text reads back through :func:`parse_spec`, up to the order of the inputs; a
    number of digits shortens real constants for people.
    """
    inputs = {value.name: value.type for value in spec.inputs}
    seen: set[str] = set()
    lines: list[str] = []
    single = len(spec.operations) == 1
    indent = "  " if single else "    "
    for operation in spec.operations:
        head = f"{operation.keyword}  {_operand_texts(operation, inputs, seen)}".rstrip()
        lines.append(f"{spec.name}   {head}" if single else f"  {head}")
        lines += [f"{indent}{key:<6} {text}" for key, text in _attribute_lines(operation, digits)]
    if not single:
        lines.insert(0, spec.name)
    for value in spec.captured():
        lines.append(f"  given  {value.name}{_sizes_text(value.type, '')}:{value.type.dtype}")
    if spec.outputs != ("out",):
        lines.append(f"  gives  {', '.join(spec.outputs)}".rstrip())
    return "\n".join(lines)


_NAME = re.compile(r"[A-Za-z_][\w.]*")
_TENSOR = re.compile(r"(?:(?P<field>\w+)=)?(?P<names>[\w.,]+)(?:\[(?P<sizes>[^\]]*)\])?(?::(?P<dtype>\w+))?")


def _read_type(sizes: str, dtype: str, letters: str) -> TensorType:
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}" if dtype else "the dtype is missing")
    # a letter stands before its size: the size alone is an expression
    parts = [part.partition(":") for part in _split_sizes(sizes)]
    expected = _letters(letters, len(parts))
    return TensorType(
        tuple(
            Axis(before if colon else letter, parse_expr(after if colon else before))
            for (before, colon, after), letter in zip(parts, expected, strict=True)
        ),
        dtype,
    )


def _split_sizes(text: str) -> list[str]:
    """Split at the commas outside parentheses."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign == "(") - (sign == ")")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return parts if text.strip() else []


@dataclass
class _Reader:
    """What has been read so far."""

    inputs: dict[str, Value] = dataclasses.field(default_factory=dict)
    captured: dict[str, Value] = dataclasses.field(default_factory=dict)
    outputs: tuple[str, ...] = ("out",)
    operations: list[tuple[type[Operation], dict[str, str], dict[str, tuple[str, str]]]] = dataclasses.field(
        default_factory=list
    )

    def read(self, line: str) -> None:
        keyword, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if keyword == "given":
            match = _TENSOR.fullmatch(argument.replace(" ", ""))
            if not match or match["sizes"] is None or match["field"]:
                raise ValueError("expected given NAME[SIZES]:DTYPE")
            name = match["names"]
            self.captured[name] = Value(name, _read_type(match["sizes"], match["dtype"] or "", ""))
        elif keyword == "gives":
            self.outputs = tuple(part.strip() for part in argument.split(",") if part.strip())
        elif keyword in OPERATIONS:
            kind = OPERATIONS[keyword]
            self.operations.append((kind, self.read_operands(kind, argument), {}))
        elif self.operations:
            kind, _, attributes = self.operations[-1]
            if keyword not in _attributes(kind):
                raise ValueError(
                    f"{kind.keyword} has no attribute {keyword!r}, but {', '.join(_attributes(kind))}"
                )
            attributes[keyword] = argument, line
        else:
            raise ValueError(f"unknown operation {keyword!r}, known are {', '.join(OPERATIONS)}")

    def read_operands(self, kind: type[Operation], text: str) -> dict[str, str]:
        tokens = text.split()
        default = tokens.pop() if tokens and tokens[-1] in DTYPES else ""
        fields = [f for f in dataclasses.fields(kind) if f.metadata.get("role") == "operand"]
        found: list[tuple[str, str | None, str]] = []
        apart: dict[str, tuple[str, str | None, str]] = {}
        for token in tokens:
            match = _TENSOR.fullmatch(token)
            if not match:
                raise ValueError(f"cannot read {token!r}")
            each = [(name, match["sizes"], match["dtype"] or default) for name in match["names"].split(",")]
            if match["field"]:
                apart[match["field"]] = each[0]
            else:
                found += each
        required = [f.name for f in fields if f.default is dataclasses.MISSING]
        named = dict(zip((f.name for f in fields), found, strict=False))
        missing = not len(required) <= len(found) <= len(fields)
        if missing or apart.keys() & named.keys() or not apart.keys() <= {f.name for f in fields}:
            raise ValueError(
                f"{kind.keyword} takes the operands {', '.join(f.name for f in fields)}, got "
                f"{', '.join([str(len(found)), *apart])}"
            )
        operands = [(f, (named | apart)[f.name]) for f in fields if f.name in named or f.name in apart]
        for field, (name, sizes, dtype) in operands:
            if sizes is not None:
                self.inputs[name] = Value(name, _read_type(sizes, dtype, field.metadata["axes"]))
        return {field.name: name for field, (name, _, _) in operands}


def _attributes(kind: type[Operation]) -> list[str]:
    return [f.name for f in dataclasses.fields(kind) if f.metadata.get("role") != "operand"]


def parse_spec(text: str) -> Spec:
    """Read a Spec back from its printed form.

    Raises:
        ValueError: naming the line that cannot be read, or the operation whose operands do not fit.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("an empty text is no Spec")
    name, _, rest = lines[0].partition("   ")
    if "  " in name.strip():
        raise ValueError(
            "the first line is a name and, behind three spaces or on the next line, the first operation; "
            f"got {lines[0]!r}"
        )
    reader = _Reader()
    for line in [rest, *lines[1:]] if rest.strip() else lines[1:]:
        with _naming(line):
            reader.read(line)
    values = (*reader.inputs.values(), *reader.captured.values())
    kinds = {value.name: element_kind(value.type.dtype) for value in values}
    operations = tuple(
        _build(kind, operands, attributes, kinds) for kind, operands, attributes in reader.operations
    )
    return Spec(name.strip(), values, operations, reader.outputs).verify()


@contextlib.contextmanager
def _naming(line: str) -> Iterator[None]:
    """Let errors name the line."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"cannot read the line {line.strip()!r}: {error}") from None


def _build(
    kind: type[Operation],
    operands: dict[str, str],
    attributes: dict[str, tuple[str, str]],
    kinds: Mapping[str, Kind],
) -> Operation:
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = dict(operands)
    for key, (text, line) in attributes.items():
        with _naming(line):
            values[key] = _READERS[hints[key]](text, kinds)
    return kind(**values)


def _read_truth(text: str, kinds: Mapping[str, Kind]) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"expected true or false, found {text!r}")
    return text == "true"


_READERS: dict[Any, Callable[[str, Mapping[str, Kind]], Any]] = {
    Expr: parse_expr,
    tuple[Expr, ...]: parse_exprs,
    Normalizer: lambda text, kinds: Normalizer.parse(text),
    bool: _read_truth,
    int: lambda text, kinds: int(text),
    float: lambda text, kinds: float(text),
    str: lambda text, kinds: "" if text == "none" else text,
}
"""How an attribute of each type is read."""
