"""Running a generated Gluon module without a GPU: what its warps tell one another, and what they compute.

Each partition is an actor of a :class:`tests.codegen.hopper_schedule.Schedule`, each copy and each product another: a
copy spoils its tile when it begins and fills it when the schedule lets it end; a product reads its operands until the
wait for it. Every access of shared memory is held against those that it conflicts with, and every arrival at a
barrier is counted. Warps of a partition go together, layouts mean nothing here, and nor does what a compiler makes of
the module.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from attncompile.codegen.triton.generate import GeneratedModule
from attncompile.ir import Quantize
from tests.codegen.hopper_schedule import Actor, Choose, Fault, Named, Phased, Place, Schedule, by_rank, join
from tests.codegen.triton_on_cpu import launched, numbers, register

LAZY = by_rank(("partition 3", "partition 2", "partition 1", "partition 0", "copies", "products"))
"""Copies and products end when nothing else can go on."""


@dataclass
class _Running:
    """The thread block that runs, and what picks the order of the next ones."""

    current: Schedule
    choose: Choose = LAZY


BLOCK = _Running(Schedule(LAZY))


@dataclass
class Shared:
    """Tiles in shared memory, or barriers there: views of one tensor, whose first axis counts the places."""

    tensor: torch.Tensor
    places: list[Place] = field(default_factory=list)
    barriers: list[Phased] = field(default_factory=list)

    @property
    def dtype(self) -> Any:
        """The type of its elements."""
        return self.tensor.dtype

    def index(self, number: Any) -> Any:
        """One of the tiles."""
        at = int(number)
        assert 0 <= at < len(self.barriers or self.places), f"there is no tile {at}"
        return self.barriers[at] if self.barriers else Shared(self.tensor[at], [self.places[at]])

    def reshape(self, shape: Sequence[Any]) -> Shared:
        """The same memory."""
        return Shared(self.tensor.view([int(size) for size in shape]), self.places)

    def permute(self, order: Sequence[int]) -> Shared:
        """The same memory."""
        return Shared(self.tensor.permute(order), self.places)

    def slice(self, start: Any, length: Any, axis: int = 0) -> Shared:
        """Part of it; who reads or writes a part counts as a reader or writer of the tile."""
        return Shared(self.tensor.narrow(axis, int(start), int(length)), self.places)

    def store(self, value: torch.Tensor) -> None:
        """Write registers."""
        own = BLOCK.current.partition
        for place in self.places:
            place.write(own.clock, own.name, own.clock[own.name], plain=True)
            own.unfenced.append(place)
        self.tensor.copy_(value)

    def load(self, layout: Any) -> Any:
        """Registers: what lies there now."""
        own = BLOCK.current.partition
        for place in self.places:
            place.read(own.clock, own.name, own.clock[own.name], fenced=False)
        return register(self.tensor.clone())


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


@dataclass(eq=False)
class Products:
    """A matrix product that has been begun; the sums that it is added to may be one that is not over either."""

    first: Any
    second: Any
    sums: Any
    added: bool
    number: int
    done: Any = None
    used: bool = False
    fault: str = ""

    def spoil(self, said: str) -> None:
        """It may read what it should not: nobody may use it."""
        self.fault = self.fault or said
        if self.used:
            raise Fault(said)

    def use(self) -> None:
        """Somebody uses it."""
        self.used = True
        if self.fault:
            raise Fault(self.fault)

    def end(self) -> None:
        """Compute it from what lies in memory now."""
        first = self.first.tensor if isinstance(self.first, Shared) else self.first
        product = first.float() @ self.second.tensor.float()
        before = self.sums.done if isinstance(self.sums, Products) else self.sums
        self.done = register(product + before if self.added else product.to(before.dtype))
        self.done.source = self
        self.first = self.second = self.sums = None


class _SharedLayout:
    """How tiles lie in shared memory, which means nothing here."""

    def __init__(self, **_: Any) -> None:
        pass

    @staticmethod
    def get_default_for(*_: Any) -> None:
        """None."""


_COUNT = itertools.count()


def _language() -> SimpleNamespace:
    """``gl`` of one thread block."""

    def split(tensor: Any) -> tuple[Any, Any]:
        return tensor[..., 0], tensor[..., 1]

    return SimpleNamespace(
        **numbers(), float8e4nv=torch.float8_e4m3fn,
        NVMMADistributedLayout=lambda *_, **__: None, DotOperandLayout=lambda *_: None,
        SliceLayout=lambda *_: None, BlockedLayout=lambda *_: None,
        NVMMASharedLayout=_SharedLayout, split=split,
        multiple_of=lambda a, _: a, expand_dims=lambda x, axis: x.unsqueeze(axis),
        convert_layout=lambda x, _, assert_trivial=False: x,
        warp_specialize=_specialize, allocate_shared_memory=_allocate,
    )  # fmt: skip


def _allocate(dtype: Any, shape: Sequence[Any], layout: Any) -> Shared | Phased:
    sizes, name = [int(size) for size in shape], f"memory {next(_COUNT)}"
    if layout == "barriers":
        barriers = [Phased(f"barrier {place} of {name}") for place in range(sizes[0])]
        BLOCK.current.phased += barriers
        # one alone has no axis in front that counts
        return Shared(torch.empty(0), barriers=barriers) if len(sizes) > 1 else barriers[0]
    return Shared(_poison(sizes, dtype), [Place(f"tile {place} of {name} {sizes}") for place in range(sizes[0])])


def _poison(sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(tuple(sizes), 77 if dtype == torch.int8 else math.nan).to(dtype)


def _specialize(
    partitions: Sequence[tuple[Callable[..., None], Sequence[Any]]], warps: Sequence[int], _: Sequence[int]
) -> None:
    """The first partition has the four warps that the kernel began with."""

    def bound(function: Callable[..., None], arguments: Sequence[Any]) -> Callable[[], None]:
        return lambda: function(*arguments)

    threads = [128, *(32 * count for count in warps)]
    BLOCK.current.run([(bound(*each), size) for each, size in zip(partitions, threads, strict=True)])
    BLOCK.current = Schedule(BLOCK.choose)


def _signal(barrier: Any, threads: Any) -> tuple[Named, int]:
    block = BLOCK.current
    block.pause()
    found = block.named.setdefault(int(barrier), Named(f"named barrier {int(barrier)}", int(threads)))
    return found, found.arrive(block.partition, int(threads))


def _meet(barrier: Any, threads: Any) -> None:
    found, awaited = _signal(barrier, threads)
    BLOCK.current.pause(found.name, lambda: len(found.clocks) >= awaited)
    join(BLOCK.current.partition.clock, found.clocks[awaited - 1])


def _functions() -> dict[str, Any]:
    """What inline PTX does, as functions that take the place of a module's own."""

    def packed(p: Any) -> Any:
        named = p.reshape(p.shape[0], -1, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(p.shape)
        return named.to(torch.float8_e4m3fn)

    def add_to(sums: Any, block: Any, values: torch.Tensor, group: int) -> None:
        # accumulators of wgmma m64nNk16, PTX ISA: a warp has 16 rows, a thread two of them and pairs of columns
        threads = values.reshape(4, 2, 8, -1, 4, 2).permute(3, 0, 2, 4, 1, 5).reshape(-1)
        first = (int(block) * 2 + group) * values.numel()
        sums.memory[sums.offset + first : sums.offset + first + values.numel()] += threads

    return {
        "signal": _signal, "meet": _meet, "packed": packed, "four_weights": lambda words: words,
        "tanh": torch.tanh, "highest_of": lambda s: torch.amax(s, 1), "reciprocal": lambda x: 1.0 / x,
        "paired": lambda p, element: p.to(element), "two_weights": lambda words, element: words,
        "kept": lambda weights: None, "settled": lambda total: total,
        "rescaled": lambda accumulator, factor: accumulator * factor.unsqueeze(1), "add_to": add_to,
    }  # fmt: skip


def _barriers() -> SimpleNamespace:
    """``mbarrier``: arrivals of one thread and of bytes, in phases of alternating parity."""

    def init(barrier: Phased, count: int) -> None:
        barrier.count = count

    def wait(barrier: Phased, phase: Any, pred: Any = True) -> None:
        if bool(pred):
            parity = int(phase)
            BLOCK.current.pause(barrier.name, lambda: barrier.passes(parity))
            if barrier.clocks:
                join(BLOCK.current.partition.clock, barrier.clocks[-1])

    def expect(barrier: Phased, size: int) -> None:
        barrier.arrive(BLOCK.current.partition.released(), 1, int(size))

    def arrive(barrier: Phased, count: int, pred: Any = True) -> None:
        BLOCK.current.pause()
        if bool(pred):
            barrier.arrive(BLOCK.current.partition.released(), count)

    return SimpleNamespace(MBarrierLayout=lambda: "barriers", init=init, wait=wait, expect=expect, arrive=arrive)


def _copy_in(source: Descriptor, at: Sequence[Any], ready: Phased, tile: Shared) -> None:
    block, (there, here) = BLOCK.current, source.parts(at)
    block.pause()
    own, (place,) = block.partition, tile.places
    place.write(own.clock, ready.name, ready.phase, plain=False)
    known = own.released()
    tile.tensor.copy_(_poison(tile.tensor.shape, tile.dtype))

    def end() -> None:
        tile.tensor.zero_()
        tile.tensor[here] = source.base[there]
        ready.arrive(known, announced=-source.block_type.nbytes)

    block.begin(Actor(f"a copy to {place.name}", "copies", happen=end))


def _copy_out(target: Descriptor, at: Sequence[Any], tile: Shared) -> None:
    block, (there, here) = BLOCK.current, target.parts(at)
    own, (place,) = block.partition, tile.places
    number = own.stores.begin()
    place.read(own.clock, f"a copy by {own.name}", number, fenced=True)

    def end() -> None:
        target.base[there] = tile.tensor[here]
        own.stores.end(number)

    block.begin(Actor(f"a copy from {place.name}", "copies", happen=end))


def _stores_over(count: int) -> None:
    own = BLOCK.current.partition
    BLOCK.current.pause("its copies", lambda: len(own.stores.pending) <= count)
    own.stores.waited = max(own.stores.waited, own.stores.begun - count)
    join(own.clock, {f"a copy by {own.name}": own.stores.waited})


def _product(a: Any, b: Shared, sums: Any, use_acc: Any = True, is_async: bool = False) -> Products:
    assert is_async, "no kernel waits where a product begins"
    own = BLOCK.current.partition
    number = own.products.begin()
    begun = Products(a, b, sums, bool(use_acc), number)
    for taken in (a, sums) if use_acc else (a,):
        source = taken if isinstance(taken, Products) else getattr(taken, "source", None)
        if source is not None:
            source.use()
    for operand in (a, b):
        for place in operand.places if isinstance(operand, Shared) else ():
            place.read(own.clock, f"a product of {own.name}", number, True, begun.spoil)

    def end() -> None:
        begun.end()
        own.products.end(number)

    # those of a partition end in the order in which they began
    BLOCK.current.begin(Actor("a product", "products", lambda: own.products.pending[0] == number, end))
    return begun


def _products_over(count: int, deps: Sequence[Any]) -> Any:
    own = BLOCK.current.partition
    BLOCK.current.pause("its products", lambda: len(own.products.pending) <= count)
    over = own.products.waited = max(own.products.waited, own.products.begun - count)
    join(own.clock, {f"a product of {own.name}": over})
    known = [each.done if isinstance(each, Products) and each.number <= over else each for each in deps]
    return known[0] if len(known) == 1 else tuple(known)


def _fence() -> None:
    if BLOCK.current.outside:
        return  # before there are partitions
    own = BLOCK.current.partition
    for place in own.unfenced:
        if place.writer is not None and place.writer[0] == own.name:
            place.fenced = (own.name, own.clock[own.name])
    own.unfenced.clear()


def _modules() -> dict[str, Any]:
    """By the name under which they are imported."""
    tma = SimpleNamespace(async_load=_copy_in, async_store=_copy_out, store_wait=_stores_over)
    hopper = SimpleNamespace(
        fence_async_shared=_fence, mbarrier=_barriers(), tma=tma, warpgroup_mma=_product,
        warpgroup_mma_wait=_products_over,
    )  # fmt: skip

    def jit(*functions: Any, **_: Any) -> Any:
        return functions[0] if functions else lambda function: function

    gluon = SimpleNamespace(jit=jit, constexpr_function=lambda function: function)
    triton = SimpleNamespace(
        jit=jit, cdiv=lambda a, b: -(-a // b), next_power_of_2=lambda n: 1 << (n - 1).bit_length()
    )
    root = "triton.experimental.gluon"
    return {
        "triton": triton, "triton.language": SimpleNamespace(**numbers()),
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


def _quantize(
    tensor: torch.Tensor, dtype: torch.dtype, block: int, smooth: bool, later: object = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As a module's own: codes ``[B,H,I,D]`` and their scales."""
    name = "int8" if dtype == torch.int8 else "float8_e4m3"
    codes, scale = Quantize("x", name, block, smooth).parts(tensor.double())
    return codes.float().to(dtype), scale.float()


def _quantize_values(
    tensor: torch.Tensor, block: int, shuffled: bool, later: object = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As a module's own: codes ``[B,G,E,J]`` with the keys of each 16 in the order of an accumulator."""
    codes, scale = _quantize(tensor, torch.float8_e4m3fn, block, False)
    turned = torch.nn.functional.pad(codes.float().mT, (0, -codes.shape[2] % 16))
    if shuffled:
        turned = turned.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4)
    return turned.contiguous().to(torch.float8_e4m3fn), scale


def run_on_cpu(
    module: GeneratedModule,
    inputs: Sequence[torch.Tensor],
    processors: int = 2,
    choose: Choose = LAZY,
    function: str = "attend",
    **options: Any,
) -> Any:
    """What a launcher of a module gives.

    Args:
        module: without boxes.
        inputs: as its launcher takes them.
        processors: of the GPU: so few that each computes several tiles.
        choose: in which order what could happen at the same time does.
        function: the launcher.
        options: further arguments of the launcher.

    Raises:
        Fault: where warps misunderstand one another.
    """
    space: dict[str, Any] = {"__name__": module.name}
    with _imports(_modules()):
        exec(compile(module.source, module.name, "exec"), space)

    BLOCK.choose, BLOCK.current = choose, Schedule(choose)
    replaced = {**_functions(), "launch": launched, "quantize": _quantize, "quantize_values": _quantize_values}
    space.update({name: function for name, function in replaced.items() if name in space})
    properties = SimpleNamespace(multi_processor_count=processors)
    with (
        mock.patch.object(torch.cuda, "get_device_properties", lambda _: properties),
        mock.patch.object(torch.cuda, "device_of", lambda _: nullcontext()),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        mock.patch.object(torch.cuda, "current_stream", lambda _: mock.Mock()),
    ):
        return space[function](*inputs, **options)
