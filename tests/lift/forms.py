"""Hand-written forms of attention: what a row of the two tables is, and how it is captured and lifted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from attncompile.frontends.aten import aten_graph
from attncompile.frontends.capture import Captured, capture_export
from attncompile.lift import Program, lift_graph

BATCH, QUERIES, KEYS, PAST, HEADS, GROUPS, CHANNELS = 2, 7, 9, 5, 6, 2, 4
"""Sizes in the examples: all different, so that no two axes are taken for one another."""

WIDTH = HEADS * CHANNELS

BLOCKS = 3
"""Blocks of a sequence of ``blocks``."""


def _normal(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(shape)


def _truth(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.rand(shape) < 0.7


def _numbers(high: int, *shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randint(0, high, shape)


INPUTS: Mapping[str, Callable[[], torch.Tensor]] = {
    "x": _normal(BATCH, QUERIES, WIDTH),
    "memory": _normal(BATCH, KEYS, WIDTH),
    "q": _normal(BATCH, QUERIES, WIDTH),
    "k": _normal(BATCH, QUERIES, WIDTH),
    "v": _normal(BATCH, QUERIES, WIDTH),
    "k_few": _normal(BATCH, QUERIES, GROUPS * CHANNELS),
    "v_few": _normal(BATCH, QUERIES, GROUPS * CHANNELS),
    "k_one": _normal(BATCH, QUERIES, CHANNELS),
    "v_one": _normal(BATCH, QUERIES, CHANNELS),
    "one": _normal(BATCH, 1, WIDTH),
    "k_past": _normal(BATCH, PAST, WIDTH),
    "v_past": _normal(BATCH, PAST, WIDTH),
    "blocks": _normal(BATCH, BLOCKS * CHANNELS, WIDTH),
    "k_static": _normal(BATCH, KEYS, WIDTH),
    "v_static": _normal(BATCH, KEYS, WIDTH),
    "keep": _truth(BATCH, QUERIES),
    "padding": _numbers(2, BATCH, QUERIES),
    "keep_memory": _truth(BATCH, KEYS),
    "documents": _numbers(3, BATCH, QUERIES),
    "visible": _truth(BATCH, QUERIES, QUERIES),
    "length": lambda: torch.tensor([3, 7]),
    "positions": lambda: torch.arange(QUERIES)[None].repeat(BATCH, 1),
    "tokens": _numbers(11, BATCH, QUERIES),
}
"""Example inputs by the name of the argument; batch and sequence axes become symbolic sizes."""


@dataclass(frozen=True)
class Form:
    """One way of writing attention (or something close to it).

    Attributes:
        name: the test id.
        function: of input tensors, by the names in :data:`INPUTS`, and of held ones.
        held: parameters and buffers of the model; a module is called by the function.
        expected: what the table says of the result; the two tables read different keys.
    """

    name: str
    function: Callable[..., Any]
    held: Mapping[str, Any] = field(default_factory=dict)
    expected: Mapping[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Fresh example inputs."""
        names = [name for name in inspect.signature(self.function).parameters if name not in self.held]
        return {name: INPUTS[name]() for name in names}

    def module(self) -> torch.nn.Module:
        """The function as a model in evaluation mode."""
        return _as_module(self.function, self.held).eval()

    def capture(self) -> Captured:
        """The model as torch.export sees it, with symbolic batch and lengths."""
        return capture_export(self.module(), (), self.inputs)

    def lift(self) -> Program:
        """The program of the captured model."""
        captured = self.capture()
        return lift_graph(aten_graph(captured), self.name, captured.notes)


def _as_module(function: Callable[..., Any], held: Mapping[str, Any]) -> torch.nn.Module:
    names = [name for name in inspect.signature(function).parameters if name not in held]

    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        return function(**given, **{name: getattr(self, name) for name in held})

    keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, keyword) for name in ("self", *names)]
    )
    module = type("Written", (torch.nn.Module,), {"forward": forward})()
    for name, value in held.items():
        if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
            module.register_buffer(name, value)
        else:
            setattr(module, name, value)
    return module


class Table:
    """Collects forms: ``@table.row(...)`` above a function makes it one."""

    def __init__(self) -> None:
        self.rows: list[Form] = []

    def row(
        self, held: Mapping[str, Any] | None = None, **expected: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Make the function a form of the table, named as the function is."""

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            self.rows.append(Form(function.__name__, function, held or {}, expected))
            return function

        return add


def heads(x: torch.Tensor, count: int = HEADS) -> torch.Tensor:
    """``[B, N, H·D]`` as ``[B, H, N, D]``."""
    return x.view(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def split_heads(x: torch.Tensor, count: int = HEADS) -> torch.Tensor:
    """``[B, N, H, D]``."""
    return x.view(x.shape[0], x.shape[1], count, CHANNELS)


def flat(x: torch.Tensor, count: int = HEADS) -> torch.Tensor:
    """``[B·H, N, D]``."""
    return heads(x, count).reshape(-1, x.shape[1], CHANNELS)


def repeated(x: torch.Tensor, times: int) -> torch.Tensor:
    """As transformers repeats key and value heads."""
    b, g, n, d = x.shape
    return x[:, :, None].expand(b, g, times, n, d).reshape(b, g * times, n, d)


def merged(x: torch.Tensor) -> torch.Tensor:
    """``[B, H, N, D]`` as ``[B, N, H·D]``."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def dot(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """``Q Kᵀ``."""
    return q @ k.transpose(-1, -2)


def attend(logits: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax over the last axis, times the values, heads merged."""
    return merged(torch.softmax(logits, dim=-1) @ v)
