"""Registers and pointers as tensors, and the functions of ``triton.language`` that the small kernels of a module use.

Enough to run a launcher whole, beside :mod:`tests.codegen.hopper_on_cpu`: Triton's own interpreter replaces the
compiler in the whole process, and knows nothing of Gluon.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch


class Register(torch.Tensor):
    """A tensor in registers; ``source`` is asked before anything is done with it, where there is one."""

    source: Any = None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for each in args:
            if isinstance(each, Register) and each.source is not None:
                each.source.use()
        return super().__torch_function__(function, types, args, kwargs or {})

    def __floordiv__(self, other: Any) -> Any:
        """As Triton divides integers: towards zero."""
        return torch.div(self, other, rounding_mode="floor" if self.is_floating_point() else "trunc")

    def __mod__(self, other: Any) -> Any:
        """As Triton has it: with the sign of what is divided."""
        return torch.fmod(self, other)

    def to(self, dtype: Any, bitcast: bool = False) -> Any:  # type: ignore[override]
        """The numbers, or the bits, in another type."""
        if bitcast:
            return self.view(dtype)
        return torch.Tensor.to(self, dtype)

    @property
    def type(self) -> Any:  # type: ignore[override]
        """What its layout is asked of."""
        return SimpleNamespace(layout=None)


def register(tensor: Any) -> Any:
    """A tensor as one in registers."""
    return torch.as_tensor(tensor).as_subclass(Register)


class Whole(int):
    """A constant integer of a module."""

    value = property(int)


class Fraction(float):
    """A constant number of a module."""

    value = property(float)


def constant(value: Any) -> Any:
    """What ``constexpr`` makes of a value."""
    if isinstance(value, int):
        return Whole(value)
    return Fraction(value) if isinstance(value, float) else SimpleNamespace(value=value)


@dataclass(frozen=True)
class Pointer:
    """Where a tensor's elements lie: ``memory`` is all that its storage holds from the first of them on."""

    memory: torch.Tensor
    offset: Any = 0

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Pointer:
        """The address of a tensor's first element."""
        behind = tensor.untyped_storage().nbytes() // tensor.itemsize - tensor.storage_offset()
        return cls(torch.as_strided(tensor, (behind,), (1,)))

    @property
    def dtype(self) -> Any:
        """The type of what it points to."""
        return SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.offset + more)

    def __sub__(self, less: Any) -> Pointer:
        return Pointer(self.memory, self.offset - less)

    def _places(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Offsets, and which of them count; no other is looked at."""
        offsets = torch.as_tensor(self.offset).as_subclass(torch.Tensor).long()
        shown = torch.as_tensor(True if mask is None else mask).as_subclass(torch.Tensor)
        shape = torch.broadcast_shapes(offsets.shape, shown.shape)
        return offsets.expand(shape), shown.expand(shape)

    def load(self, mask: Any = None, other: Any = 0) -> Any:
        """The elements there, ``other`` where ``mask`` is false."""
        if mask is None:
            return register(self.memory[torch.as_tensor(self.offset).as_subclass(torch.Tensor).long()])
        offsets, shown = self._places(mask)
        found = torch.full(offsets.shape, other).to(self.memory.dtype)
        found[shown] = self.memory[offsets[shown]]
        return register(found)

    def add(self, value: int) -> Any:
        """Add to the element there; gives what it was."""
        before = register(self.load().clone())  # one element is a view
        self.store(before + value)
        return before

    def store(self, values: Any, mask: Any = None) -> None:
        """Write the elements for which ``mask`` is true."""
        offsets, shown = self._places(mask)
        given = torch.as_tensor(values).as_subclass(torch.Tensor).to(self.memory.dtype).expand(offsets.shape)
        self.memory[offsets[shown]] = given[shown]


@dataclass
class Program:
    """Which program of a grid runs, and how many there are."""

    number: int = 0
    count: int = 1


PROGRAM = Program()


def two(function: Callable[..., Any], plain: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    """A function of tensors or numbers."""

    def apply(a: Any, b: Any) -> Any:
        if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
            return function(torch.as_tensor(a), torch.as_tensor(b))
        return plain(a, b)

    return apply


def full(shape: Sequence[Any], *rest: Any) -> Any:
    """``zeros(shape, dtype)`` and ``full(shape, value, dtype)``; a layout may follow."""
    value, dtype = (rest[0], rest[1]) if not isinstance(rest[0], torch.dtype) else (0, rest[0])
    return register(torch.full([int(size) for size in shape], value, dtype=dtype))


def numbers() -> dict[str, Any]:
    """What Triton and Gluon have in common."""
    return {
        "constexpr": constant, "int32": torch.int32, "int64": torch.int64, "float32": torch.float32,
        "int8": torch.int8, "float16": torch.float16, "zeros": full, "full": full,
        "zeros_like": lambda x: register(torch.zeros_like(x)),
        "minimum": two(torch.minimum, min), "maximum": two(torch.maximum, max),
        "where": lambda condition, a, b: torch.where(torch.as_tensor(condition), a, b),
        "cdiv": lambda a, b: (a + b - 1) // b, "program_id": lambda _: PROGRAM.number,
        "num_programs": lambda _: PROGRAM.count, "atomic_add": lambda pointer, value, sem: pointer.add(value),
        "arange": lambda a, b, layout=None: register(torch.arange(a, int(b))),
        "exp2": lambda x: torch.exp2(x), "exp": torch.exp, "log2": torch.log2, "abs": torch.abs, "ceil": torch.ceil,
        "max": lambda x, axis: torch.amax(x, axis), "min": lambda x, axis: torch.amin(x, axis),
        "cumsum": lambda x, axis: torch.cumsum(x, axis), "sum": lambda x, axis: torch.sum(x, axis),
        "reshape": lambda x, shape: x.reshape([int(n) for n in shape]),
        "permute": lambda x, order: x.permute(order), "cast": lambda x, dtype: register(x).to(dtype),
        "load": lambda pointer, mask=None, other=0: pointer.load(mask, other),
        "store": lambda pointer, values, mask=None: pointer.store(values, mask),
        "static_range": range,
    }  # fmt: skip


def launched(kernel: Callable[..., None], grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """What a module's ``launch`` does: the programs of a grid, one after another."""
    given = [Pointer.of(each) if isinstance(each, torch.Tensor) else each for each in arguments]
    taken = inspect.signature(kernel).parameters
    own = {name: value for name, value in options.items() if name in taken}
    PROGRAM.count = math.prod(grid)
    for number in range(PROGRAM.count):
        PROGRAM.number = number
        kernel(*given, **own)
