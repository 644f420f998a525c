"""The Triton target: generated kernels behind the operator ``attncompile::run``.

On a Hopper GPU a kernel in Gluon comes first (:mod:`attncompile.codegen.gluon`); plain Triton computes what that one
does not take: Specs outside its reach, float32, few queries, tensors that TMA cannot read where they lie. Dense and
causal maps that are faster in PyTorch's own operator are computed by that one. Gradients are chosen in the same way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch

from attncompile.codegen import pytorch
from attncompile.codegen.lowering import Lowering, SharedLists
from attncompile.codegen.triton.alternatives import alternatives, made_by
from attncompile.codegen.triton.backward import generate_backward, why_not_backward
from attncompile.codegen.triton.cache import load, load_module
from attncompile.codegen.triton.generate import GeneratedModule, generate
from attncompile.codegen.triton.plain_maps import plain_map
from attncompile.codegen.triton.ready import get_ready
from attncompile.codegen.triton.rounding import why_no_e4m3
from attncompile.codegen.triton.storage import reads_storage
from attncompile.codegen.triton.structure import gives_zeros, is_wide, why_not_spec
from attncompile.codegen.triton.tiles import LARGEST_HEAD
from attncompile.codegen.triton.tuned import Choice, bucket, read_choices
from attncompile.codegen.triton.tuning import Alternative, Session
from attncompile.codegen.triton.tuning import session as tuning_session
from attncompile.ir import Quantize, Spec, print_spec, simplify
from attncompile.ir.expr import loads
from attncompile.ir.prologue import input_behind
from attncompile.kernels import operators

if TYPE_CHECKING:
    from attncompile.codegen.gluon import HopperModule
    from attncompile.codegen.gluon.lists import ListRoom

FEWEST_QUERIES = 64
"""With fewer queries a tile of the Hopper kernel is half empty, and plain Triton has smaller ones."""

LENGTHS = (1024, 16384)
"""Numbers of queries that stand for few and for many."""


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "False")


def why_not(spec: Spec, device: torch.device | str) -> str | None:
    """Why the Spec cannot run as a Triton kernel on the device, or ``None``."""
    device = torch.device(device)
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu" and not _interpreted():
        return "Triton kernels need a GPU; on the CPU there is only Triton's interpreter (TRITON_INTERPRET=1)"
    if device.type not in ("cuda", "cpu"):
        return f"Triton kernels run on CUDA and ROCm devices, not on {device.type}"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"the kernels need compute capability 8.0 or higher, {device} has {major}.{minor}"
    if device.type == "cuda" and torch.version.hip is not None and is_wide(spec):
        return f"heads of more than {LARGEST_HEAD} channels take more shared memory than AMD GPUs have"
    if device.type == "cuda" and torch.cuda.is_available():
        capability = None if torch.version.hip else torch.cuda.get_device_capability(device)
        reason = why_no_e4m3(spec, capability)
        if reason:
            return reason
    return why_not_spec(spec)


@functools.lru_cache(maxsize=512)
def _generated(text: str) -> GeneratedModule:
    return generate(operators.parsed(text))


@functools.lru_cache(maxsize=512)
def _hopper(text: str, length: int) -> HopperModule | str:
    """The Gluon module of a Spec for about so many queries, or why there is none or it does not pay."""
    import triton

    # here, because that package is made from this one's parts
    from attncompile.codegen import gluon

    spec = operators.parsed(text)
    reason = gluon.why_not_installed(triton.__version__) or gluon.why_not_spec(spec) or gluon.slower(spec)
    return reason or gluon.generate_fastest(spec, queries=length)


def modules(spec: Spec) -> dict[str, GeneratedModule]:
    """Every module that may run for a Spec, by what a file's name adds for it: nothing for the one in plain Triton.

    Raises:
        ValueError: when :func:`attncompile.codegen.triton.structure.why_not_spec` has a reason.
    """
    from attncompile.codegen import gluon

    found = {"": generate(spec)}
    if gluon.why_not_spec(spec) is None and gluon.slower(spec) is None:
        for suffix, length in (("_hopper", LENGTHS[-1]), ("_hopper_short", LENGTHS[0])):
            module = gluon.generate_fastest(spec, queries=length)
            if all(module.source != other.source for other in found.values()):
                found[suffix] = module
    return found


@functools.cache
def on_hopper(device: torch.device) -> bool:
    """Whether the device is a GPU of compute capability 9.x."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def lower(spec: Spec, device: torch.device | str) -> Lowering:
    """The Spec as a generated kernel: in Gluon on a Hopper GPU where there is one, in plain Triton otherwise.

    ``run`` goes through the operator ``attncompile::run``, so it traces, exports and differentiates.

    Raises:
        ValueError: when :func:`why_not` has a reason.
    """
    reason = why_not(spec, device)
    if reason:
        raise ValueError(f"no Triton kernel for {spec.name} on {device}: {reason}")
    if torch.device(device).type == "cuda":
        get_ready()
    module = generate(spec)
    said = "one fused kernel; nothing of the attention map is stored"
    rounded = [operation for operation in spec.operations if isinstance(operation, Quantize)]
    if rounded:
        said = f"Q·K in {rounded[0].dtype} with a scale for each block, inside one fused kernel"
        if len(rounded) > 2:
            said += ", which multiplies weights and values in float8_e4m3"
    if module.kernels[0].name == "move_queries":
        said += "; tokens are moved so that a tile is a box of their grid"
    if reads_storage(spec):
        said = "the cache is read as it is stored, in parts that a second kernel joins"
    elif any(kernel.name == "attend_split" for kernel in module.kernels):
        said += "; few queries over many keys in parts that a second kernel joins"
    if spec.scan():
        said = "a scan over chunks; the state stays on chip"
    device = torch.device(device)
    run = load(module) if device.type == "cpu" else operators.bind(spec)
    if on_hopper(device):
        found = _hopper(operators.bind(spec).text, LENGTHS[-1])
        if isinstance(found, str):
            said += f"; in plain Triton, since {found}"
        else:
            module = found
            said += (
                "; in Gluon for compute capability 9.x, in plain Triton for float32, "
                f"for fewer than {FEWEST_QUERIES} queries, and for tensors whose rows TMA cannot copy"
            )
            if found.skeleton.boxes is not None or found.moving:
                said += "; there a tile is a box of the tokens' grid"
            if plain_map(spec) is not None:
                said += "; small maps, and those whose rows TMA cannot copy, in SDPA, which is faster there"
    if gives_zeros(spec):
        said += "; rows without any visible key give zeros, where the original gives their mean or NaN"
    unavailable = why_not_backward(spec)
    if unavailable:
        said += f"; gradients are computed by the reference, since {unavailable}"
    lists = shared_lists(spec) if on_hopper(device) else None
    return Lowering("triton", module.kernels[-1].name, said, module.source, run, lists)


def shared_lists(spec: Spec) -> SharedLists | None:
    """What calls on a Hopper GPU may share where tensors decide which keys a mask leaves to visit, or ``None``."""
    attend = spec.attend()
    reads = dict.fromkeys(load.tensor for load in loads(attend.mask)) if attend else {}
    if not reads:
        return None  # what depends on sizes alone is kept by the module
    bound = operators.bind(spec)
    if _list_room(bound.text) is None:
        return None
    return SharedLists(bound.text, tuple(reads), bound.lists)


def _list_room(text: str) -> ListRoom | None:
    """What the lists of a Spec's Hopper kernel take, or ``None`` where calls share none."""
    found = _hopper(text, LENGTHS[-1])
    room = None if isinstance(found, str) else found.list_room
    return room and room.for_any_length()


def _lists(text: str) -> operators.Lists | None:
    """How the lists of a Spec's Hopper kernel are made, or ``None`` where calls share none."""
    spec = operators.parsed(text)
    attend, room = spec.attend(), _list_room(text) if spec.attend() else None
    if attend is None or room is None:
        return None
    types = spec.types()
    sizes = (*types[attend.query].sizes[:3], types[attend.key].sizes[2])

    def words(known: Mapping[str, Any]) -> Any:
        return room.words(*(operators.extent(simplify(size), known) for size in sizes))

    return operators.Lists(words, _Chosen(text).fill_lists)


def _length(queries: int) -> int:
    """The one of :data:`LENGTHS` that stands for so many queries."""
    return next((each for each in LENGTHS if queries <= 2 * each), LENGTHS[-1])


def _implementation(text: str) -> operators.Implementation:
    return _Chosen(text).run


class _Chosen:
    """A Spec's kernels; the tensors decide which one runs."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._modules: dict[int, ModuleType | None] = {}
        self._taking_lists: set[ModuleType] = set()
        self._choices: dict[torch.device, dict[str, Choice]] = {}
        self._chosen: dict[tuple[torch.device, str], operators.Implementation] = {}
        spec = operators.parsed(text)
        attend = spec.attend()
        names = [value.name for value in spec.inputs]
        read = [input_behind(spec, name) for name in (attend.query, attend.key, attend.value)] if attend else []
        self._query = names.index(read[0]) if read and set(read) <= set(names) else None
        self._plain_map = plain_map(spec) if pytorch.why_not(spec, "cuda", "sdpa") is None else None

    @functools.cached_property
    def _sdpa(self) -> Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]:
        return pytorch.lower(operators.parsed(self._text), "cuda", "sdpa").run

    @functools.cached_property
    def _plain(self) -> Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]:
        return load(_generated(self._text))

    def _gluon(self, queries: int) -> ModuleType | None:
        length = _length(queries)
        if length not in self._modules:
            found = _hopper(self._text, length)
            module = None if isinstance(found, str) else load_module(found)
            self._modules[length] = module
            if module is not None and not isinstance(found, str) and found.list_room is not None:
                self._taking_lists.add(module)
        return self._modules[length]

    def fill_lists(self, memory: torch.Tensor, *tensors: torch.Tensor) -> None:
        """Write the lists of key blocks that :meth:`run` takes; nothing where the tables name another kernel."""
        if self._query is None or not self._takes_hopper(tensors):
            return
        module = self._gluon(tensors[self._query].shape[2])
        if module is not None and module in self._taking_lists:
            module.mask_lists(memory, *tensors)

    def run(
        self, *tensors: torch.Tensor, lists: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The outputs of the Spec; ``lists`` from :meth:`fill_lists` for the same mask and sizes.

        They are those of the kernel that the tables name: with lists that is the one that runs, and nothing is tuned.
        """
        device = tensors[0].device
        choices = self._choices.get(device)
        if choices is None:
            choices = self._choices[device] = read_choices(self._text, device)
        session = tuning_session()
        # lists were made for the kernel that the tables name
        if (session is not None or choices) and lists is None:
            where = bucket(self._text, tensors)
            if session is not None and session.wants(self._text, where, choices.get(where)):
                choices[where] = self._tune(session, where, tensors)
            tuned = self._tuned(device, where, tensors)
            if tuned is not None:
                try:
                    return tuned(*tensors)
                except Exception as error:
                    self._set_aside(device, where, error)
        return self._by_table(*tensors, lists=lists)

    def _tune(self, session: Session, where: str, tensors: Sequence[torch.Tensor]) -> Choice:
        # what the table has needs no tile here: for no alternative it is kept as it is
        default = Alternative(Choice("table"), lambda: self._by_table)
        hopper = None
        runs: Literal["triton", "gluon", "sdpa"] = "triton"
        queries = 0 if self._query is None else tensors[self._query].shape[2]
        if self._takes_hopper(tensors):
            found = _hopper(self._text, _length(queries))
            if not isinstance(found, str):
                runs, hopper = "gluon", found.skeleton.tile
        if self._plain_map is not None and on_hopper(tensors[0].device) and self._plain_map.faster_in_sdpa(tensors):
            runs = "sdpa"
        module = _generated(self._text)
        others = alternatives(self._text, module, tensors, _length(queries), runs=runs, hopper=hopper)
        # queries and keys of 8 bits are the same codes for all; only weights are rounded by what a block holds
        rounds = sum(isinstance(step, Quantize) for step in operators.parsed(self._text).operations) > 2
        return session.tune(self._text, where, tensors, default, others, rounds)

    def _tuned(
        self, device: torch.device, where: str, tensors: Sequence[torch.Tensor]
    ) -> operators.Implementation | None:
        """The function that was chosen for a bucket; ``None`` where that is what the tables say."""
        choice = self._choices[device].get(where)
        if choice is None or choice.target == "table":
            return None
        found = self._chosen.get((device, where))
        if found is None:
            queries = 0 if self._query is None else tensors[self._query].shape[2]
            try:
                found = made_by(self._text, choice, _length(queries), self._plain)
            except Exception as error:
                self._set_aside(device, where, error)
                return None
            self._chosen[device, where] = found
        return found

    def _set_aside(self, device: torch.device, where: str, error: Exception) -> None:
        """Go on as the tables say where a kept choice does not run: it may come from another machine's folder."""
        choice = self._choices[device].pop(where, Choice("table"))
        self._choices[device][where] = Choice("table")
        self._chosen.pop((device, where), None)
        said = (str(error).splitlines() or [type(error).__name__])[0]
        text = f"what tuning chose for {where} ({choice.describe()}) does not run, so the tables decide: {said}"
        warnings.warn(text, RuntimeWarning, stacklevel=3)

    def _takes_hopper(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these tensors are for the kernel in Gluon, where there is one."""
        if self._query is None or not on_hopper(tensors[0].device):
            return False
        query = tensors[self._query]
        return query.element_size() == 2 and query.shape[2] >= FEWEST_QUERIES

    def _by_table(
        self, *tensors: torch.Tensor, lists: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The outputs of the Spec, computed as the tables say."""
        if self._query is not None and on_hopper(tensors[0].device):
            if self._plain_map is not None and self._plain_map.faster_in_sdpa(tensors):
                return self._sdpa(*tensors)
            module = self._gluon(tensors[self._query].shape[2]) if self._takes_hopper(tensors) else None
            if module is not None:
                try:
                    shared = {} if lists is None or module not in self._taking_lists else {"lists": lists}
                    return module.attend(*tensors, **shared)
                except module.Refused:
                    if self._plain_map is not None:
                        return self._sdpa(*tensors)
        return self._plain(*tensors)


@functools.lru_cache(maxsize=512)
def _generated_backward(text: str, wanted: tuple[str, ...]) -> GeneratedModule:
    return generate_backward(operators.parsed(text), wanted)


@functools.lru_cache(maxsize=512)
def _hopper_backward(text: str, wanted: tuple[str, ...]) -> GeneratedModule | str:
    """The Gluon module with the gradients of a Spec, or why there is none."""
    import triton

    # here, because that package is made from this one's parts
    from attncompile.codegen import gluon

    spec = operators.parsed(text)
    reason = gluon.why_not_installed(triton.__version__) or gluon.why_not_backward(spec, wanted)
    return reason or gluon.generate_backward(spec, wanted)


class _Gradients:
    """A Spec's backward kernels; which gradients there are and are wanted decides what is generated."""

    def __init__(self, text: str) -> None:
        self._spec = operators.parsed(text)
        self._training = operators.with_log_sum_exp(self._spec)
        attend = self._training.attend()
        assert attend is not None  # why_not_backward has seen to it
        self._attend = attend
        alone = dataclasses.replace(self._training, outputs=(attend.out,))
        # with and without a gradient of the log-sum-exp
        self._texts = {True: print_spec(self._training), False: print_spec(alone)}

    @functools.cached_property
    def _forward(self) -> operators.Implementation:
        return _implementation(self._texts[True])

    def run(
        self,
        wanted: tuple[str, ...],
        gradients: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
    ) -> Sequence[torch.Tensor | None]:
        """A gradient for each input, see :data:`attncompile.kernels.operators.Backward`."""
        attend = self._attend
        pairs = zip(self._spec.outputs, gradients, strict=True)
        given = {name: gradient for name, gradient in pairs if not operators.is_absent(gradient)}
        made = dict(zip(self._spec.outputs, outputs, strict=False))
        softmax = attend.norm.kind == "softmax"
        if softmax and not {attend.out, attend.lse} <= set(made):
            again = self._forward(*inputs)
            again = (again,) if isinstance(again, torch.Tensor) else again
            made = dict(zip(self._training.outputs, again, strict=True))
        if attend.out not in given:
            given[attend.out] = torch.zeros_like(made[attend.out])
        by_lse = attend.lse in given
        before = [given[attend.out], *([given[attend.lse]] if by_lse else [])]
        before += [made[attend.out], made[attend.lse]] if softmax else []
        query = inputs[[value.name for value in self._spec.inputs].index(attend.query)]
        if on_hopper(query.device) and query.element_size() == 2 and query.shape[2] >= FEWEST_QUERIES:
            found = _hopper_backward(self._texts[by_lse], wanted)
            if not isinstance(found, str):
                module = load_module(found)
                with contextlib.suppress(module.Refused):
                    return module.attend_backward(*before, *inputs)
        module = load_module(_generated_backward(self._texts[by_lse], wanted))
        return module.attend_backward(*before, *inputs)


def backward_implementation(text: str) -> operators.Backward | str:
    """What computes the gradients of a Spec's text by generated kernels, or why nothing does."""
    return why_not_backward(operators.parsed(text)) or _Gradients(text).run


operators.register("cuda", _implementation, backward_implementation, _lists)
