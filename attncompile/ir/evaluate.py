"""Evaluation of expressions in PyTorch, by broadcasting: the definition of what an expression means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from attncompile.ir.expr import Apply, Const, Expr, Index, Load, Score, Size, Total, Weight
from attncompile.ir.operators import OPERATORS, Kind


@dataclass(frozen=True)
class Environment:
    """What the symbols of an expression stand for.

    Attributes:
        indices: index name to an integer tensor; all of them broadcast against each other and against
            ``score``.
        sizes: size name to its value.
        tensors: captured tensors by name; a load's element kind decides how the values are read.
        score, weight, total: the raw scores, the normalised weights, the sum over the keys.
        dtype: float dtype of the arithmetic.
        device: where the evaluation happens.
        given: values of whole subexpressions that the caller already has, such as a load that is a plain
            view.
    """

    indices: Mapping[str, torch.Tensor] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    score: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    total: torch.Tensor | None = None
    dtype: torch.dtype = torch.float64
    device: torch.device | str = "cpu"
    given: Mapping[Expr, torch.Tensor] = field(default_factory=dict)


def evaluate(expr: Expr, environment: Environment) -> torch.Tensor:
    """The value of an expression, broadcast over the index tensors it reads.

    Raises:
        ValueError: for a symbol or tensor that the environment does not have.
    """
    return _Evaluation(environment, dict(environment.given)).of(expr)


@dataclass(frozen=True)
class _Evaluation:
    """Values of expressions; no function that calls itself, whose cell would keep them until garbage is collected."""

    environment: Environment
    known: dict[Expr, torch.Tensor]

    def of(self, node: Expr) -> torch.Tensor:
        """The value of an expression, computed once."""
        if node not in self.known:
            self.known[node] = _value(node, self.environment, self.of)
        return self.known[node]


def largest_first(terms: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """The terms of a sum in the order in which rounding costs least: large constants first.

    ``s + 1e6·m − 1e6`` is ``s`` where ``m`` is 1; from left to right in float32 it would have lost all but a few bits
    of ``s`` on the way.
    """
    return tuple(sorted(terms, key=_magnitude, reverse=True))


def _magnitude(term: Expr) -> float:
    """The largest constant that a term is, or multiplies something with."""
    match term:
        case Const(value):
            return abs(float(value))
        case Apply("mul" | "add", arguments):
            return max(_magnitude(argument) for argument in arguments)
        case Apply("float" | "int", (argument,)):
            return _magnitude(argument)
        case Apply("where", (_, then, otherwise)):
            return max(_magnitude(then), _magnitude(otherwise))
    return 1.0


def _value(node: Expr, environment: Environment, of: Callable[[Expr], torch.Tensor]) -> torch.Tensor:
    match node:
        case Const(value):
            return torch.tensor(value, dtype=_dtype(node.kind, environment), device=environment.device)
        case Index(name):
            if name not in environment.indices:
                raise ValueError(f"no values for index {name!r}; there are {sorted(environment.indices)}")
            return environment.indices[name]
        case Size(name):
            if name not in environment.sizes:
                raise ValueError(f"no value for size {name!r}; there are {sorted(environment.sizes)}")
            return torch.tensor(environment.sizes[name], dtype=torch.int64, device=environment.device)
        case Score():
            return _given(environment.score, "score").to(environment.dtype)
        case Weight():
            return _given(environment.weight, "weight").to(environment.dtype)
        case Total():
            return _given(environment.total, "total").to(environment.dtype)
        case Load(name, indices, element):
            if name not in environment.tensors:
                raise ValueError(f"no tensor {name!r}; there are {sorted(environment.tensors)}")
            tensor = environment.tensors[name]
            if tensor.dim() != len(indices):
                raise ValueError(
                    f"{node} has {len(indices)} indices, but the tensor has shape {tuple(tensor.shape)}"
                )
            positions = tuple(
                of(index).to(torch.int64).clamp(0, max(extent - 1, 0))
                for index, extent in zip(indices, tensor.shape, strict=True)
            )
            read = tensor[positions] if positions else tensor
            return read.to(_dtype(element, environment))
        case Apply(operator, arguments, result):
            if operator == "add":
                arguments = largest_first(arguments)
            values = [of(argument) for argument in arguments]
            if operator in ("float", "int"):
                return values[0].to(_dtype(result, environment))  # to an integer: toward zero
            if result is Kind.FLOAT or any(argument.kind is Kind.FLOAT for argument in arguments):
                values = [
                    value if argument.kind is Kind.BOOL else value.to(environment.dtype)
                    for value, argument in zip(values, arguments, strict=True)
                ]
            return OPERATORS[operator].torch(*values)  # type: ignore[no-any-return]
    raise ValueError(f"cannot evaluate {node!r}")


def _dtype(kind: Kind, environment: Environment) -> torch.dtype:
    return {Kind.BOOL: torch.bool, Kind.INT: torch.int64, Kind.FLOAT: environment.dtype}[kind]


def _given(tensor: torch.Tensor | None, what: str) -> torch.Tensor:
    if tensor is None:
        raise ValueError(f"the expression reads the {what}, but none was given")
    return tensor


def index_grid(extents: Mapping[str, int], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """One integer tensor per axis, shaped so that they broadcast to the full grid in the order given."""
    rank = len(extents)
    return {
        name: torch.arange(extent, device=device).reshape(
            [-1 if axis == position else 1 for axis in range(rank)]
        )
        for position, (name, extent) in enumerate(extents.items())
    }
