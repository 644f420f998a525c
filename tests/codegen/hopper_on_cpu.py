"""Running a generated Gluon module without a GPU: what its warps tell one another, and what they compute.

Each partition is a thread, barriers are barriers. What runs on its own does so at the worst moment: a copy spoils its
tile at once and fills it late, and a product reads its operands when somebody waits for it. Layouts mean nothing here,
and nor does what a compiler makes of the module.
"""

from __future__ import annotations

import itertools
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from attncompile.codegen.gluon.generate import HopperModule
from attncompile.ir import Quantize

PATIENCE = 20.0
"""Seconds after which a wait is taken for a deadlock."""
LATENCY = 0.0005
"""Seconds from when a copy spoils a tile until its data are there."""


class Register(torch.Tensor):
    """A tensor in registers."""

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
    """What ``gl.constexpr`` makes of a value."""
    if isinstance(value, int):
        return Whole(value)
    return Fraction(value) if isinstance(value, float) else SimpleNamespace(value=value)


@dataclass(eq=False)
class Barrier:
    """A barrier of so many arrivals; ``completed`` counts its phases."""

    expected: int
    pending: int = 0
    completed: int = 0


@dataclass
class Block:
    """A thread block: everything that its threads share.

    Attributes:
        changed: guards and announces every change of a barrier.
        named: the named barriers.
        failures: what went wrong in a thread.
    """

    changed: threading.Condition = field(default_factory=threading.Condition)
    named: dict[int, Barrier] = field(default_factory=dict)
    failures: list[BaseException] = field(default_factory=list)

    def arrive(self, barrier: Barrier, threads: int) -> int:
        """Count arrivals; returns how many phases must be completed for this one to be over."""
        with self.changed:
            awaited = barrier.completed + 1
            barrier.pending += threads
            assert barrier.pending <= barrier.expected, "too many arrivals in one phase"
            if barrier.pending == barrier.expected:
                barrier.pending = 0
                barrier.completed += 1
                self.changed.notify_all()
            return awaited

    def wait(self, over: Callable[[], bool], what: str) -> None:
        """Wait until something is over."""
        with self.changed:
            done = self.changed.wait_for(lambda: over() or bool(self.failures), PATIENCE)
        assert not self.failures, "another thread failed"
        assert done, f"nobody came: {what}"


@dataclass
class Shared:
    """Tiles in shared memory: views of one tensor."""

    tensor: torch.Tensor
    barriers: list[Barrier] | None = None

    @property
    def dtype(self) -> Any:
        """The type of its elements."""
        return self.tensor.dtype

    def index(self, place: Any) -> Any:
        """One of the tiles."""
        return self.barriers[int(place)] if self.barriers else Shared(self.tensor[int(place)])

    def reshape(self, shape: Sequence[Any]) -> Shared:
        """The same memory."""
        return Shared(self.tensor.view([int(size) for size in shape]))

    def permute(self, order: Sequence[int]) -> Shared:
        """The same memory."""
        return Shared(self.tensor.permute(order))

    def store(self, value: torch.Tensor) -> None:
        """Write registers."""
        self.tensor.copy_(value)

    def load(self, layout: Any) -> Shared:
        """Queries in registers: what lies there now."""
        return Shared(self.tensor.clone())


@dataclass
class Descriptor:
    """A tensor that is copied tile by tile."""

    base: torch.Tensor
    shape: list[int]
    strides: list[int]
    block: list[int]
    layout: Any

    @property
    def dtype(self) -> Any:
        """The type of its elements."""
        return self.base.dtype

    @property
    def block_type(self) -> Any:
        """How many bytes a tile has."""
        return SimpleNamespace(nbytes=math.prod(self.block) * self.base.itemsize)

    def parts(self, at: Sequence[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where the tile lies in the tensor, and how much of the tile that is."""
        starts = [int(place) for place in at]
        ends = [min(start + size, whole) for start, size, whole in zip(starts, self.block, self.shape, strict=True)]
        there = tuple(slice(start, max(start, end)) for start, end in zip(starts, ends, strict=True))
        return there, tuple(slice(0, part.stop - part.start) for part in there)


@dataclass
class Products:
    """A matrix product that nobody has waited for yet; ``number`` tells which was begun later."""

    first: Any
    second: Shared
    sums: Any
    added: bool
    number: int = field(default_factory=itertools.count().__next__)

    def result(self) -> torch.Tensor:
        """The product of what lies in memory now."""
        first = self.first.tensor if isinstance(self.first, Shared) else self.first
        product = first.float() @ self.second.tensor.float()
        return register(product + self.sums if self.added else product.to(self.sums.dtype))


@dataclass(frozen=True)
class Pointer:
    """Where a tensor's elements lie."""

    tensor: torch.Tensor
    offset: Any = 0

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + more)

    def load(self) -> torch.Tensor:
        """The elements there."""
        return register(self.tensor.reshape(-1)[torch.as_tensor(self.offset).as_subclass(torch.Tensor).long()])


@dataclass
class _Running:
    """The thread block that runs, and its number."""

    current: Block
    program: int = 0


BLOCK = _Running(Block())


def _language() -> SimpleNamespace:
    """``gl`` of one thread block."""

    def two(function: Callable[..., Any], plain: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        def apply(a: Any, b: Any) -> Any:
            if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
                return function(torch.as_tensor(a), torch.as_tensor(b))
            return plain(a, b)

        return apply

    def where(condition: Any, a: Any, b: Any) -> Any:
        return torch.where(torch.as_tensor(condition), a, b)

    def split(tensor: Any) -> tuple[Any, Any]:
        return tensor[..., 0], tensor[..., 1]

    return SimpleNamespace(
        constexpr=constant, int32=torch.int32, int64=torch.int64, float32=torch.float32, int8=torch.int8,
        float8e4nv=torch.float8_e4m3fn, float16=torch.float16,
        NVMMADistributedLayout=lambda *_, **__: None, DotOperandLayout=lambda *_: None,
        SliceLayout=lambda *_: None, BlockedLayout=lambda *_: None,
        NVMMASharedLayout=SimpleNamespace(get_default_for=lambda *_: None),
        minimum=two(torch.minimum, min), maximum=two(torch.maximum, max), where=where, split=split,
        cdiv=lambda a, b: (a + b - 1) // b, multiple_of=lambda a, _: a, program_id=lambda _: BLOCK.program,
        arange=lambda a, b, layout=None: register(torch.arange(a, int(b))),
        expand_dims=lambda x, axis: x.unsqueeze(axis), zeros=_full, full=_full,
        exp2=lambda x: torch.exp2(x), ceil=torch.ceil, log2=torch.log2, exp=torch.exp, abs=torch.abs,
        max=lambda x, axis: torch.amax(x, axis), sum=lambda x, axis: torch.sum(x, axis),
        reshape=lambda x, shape: x.reshape([int(n) for n in shape]), permute=lambda x, order: x.permute(order),
        convert_layout=lambda x, _, assert_trivial=False: x, load=lambda pointer: pointer.load(),
        static_range=range, warp_specialize=_specialize, allocate_shared_memory=_allocate,
    )  # fmt: skip


def _full(shape: Sequence[Any], *rest: Any) -> Any:
    value, dtype = (rest[0], rest[1]) if not isinstance(rest[0], torch.dtype) else (0, rest[0])
    return register(torch.full([int(size) for size in shape], value, dtype=dtype))


def _allocate(dtype: Any, shape: Sequence[Any], layout: Any) -> Shared:
    sizes = [int(size) for size in shape]
    if layout == "barriers":
        return Shared(torch.empty(0), [Barrier(1) for _ in range(sizes[0])])
    return Shared(_poison(sizes, dtype))


def _poison(sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(tuple(sizes), 77 if dtype == torch.int8 else math.nan).to(dtype)


def _specialize(partitions: Sequence[tuple[Callable[..., None], Sequence[Any]]], *_: Any) -> None:
    block = BLOCK.current

    def guarded(function: Callable[..., None], arguments: Sequence[Any]) -> None:
        try:
            function(*arguments)
        except BaseException as error:
            with block.changed:
                block.failures.append(error)
                block.changed.notify_all()

    threads = [threading.Thread(target=guarded, args=each, daemon=True) for each in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if block.failures:
        raise block.failures[0]


def _functions() -> dict[str, Any]:
    """What inline PTX does, as functions that take the place of a module's own."""

    def signal(barrier: Any, threads: Any) -> None:
        found = BLOCK.current.named.setdefault(int(barrier), Barrier(int(threads)))
        BLOCK.current.arrive(found, 128)

    def meet(barrier: Any, threads: Any) -> None:
        found = BLOCK.current.named.setdefault(int(barrier), Barrier(int(threads)))
        caller = sys._getframe(1).f_code.co_name
        # one warp copies, four compute
        awaited = BLOCK.current.arrive(found, 32 if caller == "fill" else 128)
        BLOCK.current.wait(lambda: found.completed >= awaited, f"named barrier {barrier} in {caller}")

    def packed(p: Any) -> Any:
        named = p.reshape(p.shape[0], -1, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(p.shape)
        return named.to(torch.float8_e4m3fn)

    return {
        "signal": signal, "meet": meet, "packed": packed, "four_weights": lambda words: words,
        "paired": lambda p, element: p.to(element), "two_weights": lambda words, element: words,
        "kept": lambda weights: None, "settled": lambda total: total,
        "rescaled": lambda accumulator, factor: accumulator * factor.unsqueeze(1),
    }  # fmt: skip


def _barriers() -> SimpleNamespace:
    """``mbarrier``: arrivals of one thread and of bytes, in phases of alternating parity."""

    def wait(barrier: Barrier, phase: Any, pred: Any = True) -> None:
        if bool(pred):
            parity = int(phase)
            BLOCK.current.wait(lambda: barrier.completed % 2 != parity, "a tile")

    def expect(barrier: Barrier, size: int) -> None:
        pass  # the copy that follows arrives

    return SimpleNamespace(
        MBarrierLayout=lambda: "barriers", init=lambda barrier, count: None, wait=wait, expect=expect,
        arrive=lambda barrier, count: BLOCK.current.arrive(barrier, count),
    )  # fmt: skip


def _modules() -> dict[str, Any]:
    """By the name under which they are imported."""

    def copy_in(source: Descriptor, at: Sequence[Any], ready: Barrier, tile: Shared) -> None:
        there, here = source.parts(at)
        tile.tensor.copy_(_poison(tile.tensor.shape, tile.dtype))
        time.sleep(LATENCY)
        tile.tensor.zero_()
        tile.tensor[here] = source.base[there]
        BLOCK.current.arrive(ready, 1)

    def copy_out(target: Descriptor, at: Sequence[Any], tile: Shared) -> None:
        there, here = target.parts(at)
        target.base[there] = tile.tensor[here]

    def product(a: Any, b: Shared, sums: Any, use_acc: bool = True, is_async: bool = False) -> Products:
        return Products(a, b, sums, use_acc)

    def product_wait(count: int, deps: Sequence[Any]) -> Any:
        begun = sorted(each.number for each in deps if isinstance(each, Products))
        pending = begun[len(begun) - count :]
        found = [
            each.result() if isinstance(each, Products) and each.number not in pending else each for each in deps
        ]
        return found[0] if len(found) == 1 else tuple(found)

    tma = SimpleNamespace(async_load=copy_in, async_store=copy_out, store_wait=lambda _: None)
    hopper = SimpleNamespace(
        fence_async_shared=lambda: None, mbarrier=_barriers(), tma=tma, warpgroup_mma=product,
        warpgroup_mma_wait=product_wait,
    )  # fmt: skip

    def jit(*functions: Any, **_: Any) -> Any:
        return functions[0] if functions else lambda function: function

    gluon = SimpleNamespace(jit=jit, constexpr_function=lambda function: function)
    triton = SimpleNamespace(jit=jit, cdiv=lambda a, b: -(-a // b))
    root = "triton.experimental.gluon"
    return {
        "triton": triton, "triton.language": SimpleNamespace(constexpr=None, float32=None, int8=None),
        "triton.experimental": SimpleNamespace(gluon=gluon), root: gluon, f"{root}.language": _language(),
        f"{root}.language.nvidia.hopper": hopper,
        f"{root}.nvidia.hopper": SimpleNamespace(TensorDescriptor=Descriptor),
    }  # fmt: skip


@contextmanager
def _imports(found: dict[str, Any]) -> Any:
    modules = {}
    for name, namespace in found.items():
        module = ModuleType(name)
        vars(module).update(vars(namespace))
        modules[name] = module
    modules["triton"].language = modules["triton.language"]  # type: ignore[attr-defined]
    modules["triton.experimental.gluon"].language = modules[  # type: ignore[attr-defined]
        "triton.experimental.gluon.language"
    ]
    with mock.patch.dict(sys.modules, modules):
        yield


def _quantize(tensor: torch.Tensor, dtype: torch.dtype, block: int, smooth: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As a module's own: codes ``[B,H,I,D]`` and their scales."""
    name = "int8" if dtype == torch.int8 else "float8_e4m3"
    codes, scale = Quantize("x", name, block, smooth).parts(tensor.double())
    return codes.float().to(dtype), scale.float()


def _quantize_values(tensor: torch.Tensor, block: int, shuffled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As a module's own: codes ``[B,G,E,J]`` with the keys of each 16 in the order of an accumulator."""
    codes, scale = _quantize(tensor, torch.float8_e4m3fn, block, False)
    turned = torch.nn.functional.pad(codes.float().mT, (0, -codes.shape[2] % 16))
    if shuffled:
        turned = turned.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4)
    return turned.contiguous().to(torch.float8_e4m3fn), scale


def run_on_cpu(module: HopperModule, inputs: Sequence[torch.Tensor], processors: int = 2) -> Any:
    """What the launcher of a module gives.

    Args:
        module: without lists of key blocks and without boxes.
        inputs: as its launcher takes them.
        processors: of the GPU: so few that each computes several tiles.
    """
    space: dict[str, Any] = {"__name__": module.name}
    with _imports(_modules()):
        exec(compile(module.source, module.name, "exec"), space)

    def launch(kernel: Callable[..., None], grid: tuple[int, ...], *arguments: Any, **_: Any) -> None:
        given = [Pointer(each.reshape(-1)) if isinstance(each, torch.Tensor) else each for each in arguments]
        for program in range(grid[0]):
            BLOCK.current, BLOCK.program = Block(), program
            kernel(*given)

    replaced = {**_functions(), "launch": launch, "quantize": _quantize, "quantize_values": _quantize_values}
    space.update({name: function for name, function in replaced.items() if name in space})
    properties = SimpleNamespace(multi_processor_count=processors)
    with (
        mock.patch.object(torch.cuda, "get_device_properties", lambda _: properties),
        mock.patch.object(torch.cuda, "device_of", lambda _: nullcontext()),
    ):
        return space["attend"](*inputs)
