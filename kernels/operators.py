"""Spec operators: how generated kernels reach PyTorch so that tracing, export, Inductor and autograd compose.

``attncompile::run(spec, inputs) -> outputs`` computes a Spec, given as its printed text. What computes it depends on
the device: a target registers an implementation for its device type with :func:`register`. Shapes and dtypes come from
the Spec's types. ``attncompile::infer`` is the same without a derivative, for calls whose gradients nobody records: it
takes the host less time.

``attncompile::block_lists(spec, inputs) -> lists`` is what several calls may share: which blocks of keys a mask of
tensors lets a kernel visit. A graph makes the lists once and hands them to every ``run`` or ``infer`` with the same
mask and sizes; a call without them makes its own.

``attncompile::run_backward(spec, wanted, gradients, inputs, outputs) -> gradients`` is its derivative. Where the device
type has kernels for it they are used: the forward pass then also gives the log-sum-exp of a softmax, which they need.
Otherwise the Spec's reference is computed again in PyTorch: correct, not fast, and with the whole attention map in
memory. Rounding (``quantize``) is passed straight through by that gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attncompile.ir import Attend, Quantize, Spec, parse_spec, print_spec
from attncompile.ir.expr import Apply, Const, Expr, Size, apply
from attncompile.ir.types import DTYPES, bind_sizes

Implementation = Callable[..., "torch.Tensor | tuple[torch.Tensor, ...]"]
"""Takes a Spec's inputs in order, returns its outputs."""

Backward = Callable[
    [tuple[str, ...], Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor]],
    "Sequence[torch.Tensor | None]",
]
"""Takes the names of the inputs whose gradients are wanted, the gradients of the outputs, the inputs and the outputs;
returns a gradient for each input, ``None`` where it is not wanted."""


@dataclass(frozen=True)
class Lists:
    """How a device makes what calls of a Spec with the same mask and sizes may share.

    Attributes:
        words: how many numbers of 4 bytes it takes, from the sizes by name; these may be symbols of a traced graph.
        fill: writes it into memory of that size; takes that, then a Spec's inputs in order.
    """

    words: Callable[[Mapping[str, Any]], Any]
    fill: Callable[..., None]


_implementations: dict[str, Callable[[str], Implementation]] = {}
_lists: dict[str, Callable[[str], Lists | None]] = {}
_backwards: dict[str, Callable[[str], Backward | str]] = {}

LOWEST = -1e30
"""Stands for −∞ in gradients: a masked weight is still 0, and a row of nothing else has no NaN in it."""


def register(
    device_type: str,
    implementation: Callable[[str], Implementation],
    backward: Callable[[str], Backward | str] | None = None,
    lists: Callable[[str], Lists | None] | None = None,
) -> None:
    """Say what computes Specs on a device type.

    Args:
        device_type: such as ``cuda``.
        implementation: from a Spec's text to a function of its inputs; called once for each text and device
            type.
        backward: from a Spec's text to what computes its gradients, or to the reason why nothing but the
            reference does; called as ``implementation`` is.
        lists: from a Spec's text to how its lists are made, or ``None`` for a Spec without any; the functions
            that ``implementation`` gives then take them as ``lists=``.
    """
    _implementations[device_type] = implementation
    _backwards.pop(device_type, None)
    if backward is not None:
        _backwards[device_type] = backward
    _lists.pop(device_type, None)
    if lists is not None:
        _lists[device_type] = lists
    _resolved.cache_clear()
    resolved_lists.cache_clear()
    _resolved_backward.cache_clear()


def use_reference(device_type: str) -> None:
    """Compute Specs on a device type by their reference: slow, with the whole attention map in memory."""
    register(device_type, _reference)


def _reference(text: str) -> Implementation:
    spec = parsed(text)

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = {value.name: tensor for value, tensor in zip(spec.inputs, tensors, strict=True)}
        return spec.interpret(named, _arithmetic(tensors))

    return run


def _is_real(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds real numbers; one-byte types are codes, which are read through scales."""
    return tensor.is_floating_point() and tensor.element_size() > 1


def _arithmetic(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """The dtype to compute in: at least float32, float64 where an input has it."""
    wide = any(tensor.dtype is torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


@functools.lru_cache(maxsize=1024)
def parsed(text: str) -> Spec:
    """The Spec of a text, remembered; line breaks may be written as :data:`LINE_BREAK`."""
    return parse_spec(text.replace(LINE_BREAK, "\n"))


@functools.lru_cache(maxsize=1024)
def _resolved(text: str, device_type: str) -> Implementation:
    implementation = _implementations.get(device_type)
    if implementation is None:
        raise RuntimeError(
            f"nothing computes Specs on {device_type}; registered are {sorted(_implementations) or 'none'}. "
            "Import attncompile.codegen.triton for GPUs, or call "
            f"attncompile.kernels.operators.use_reference({device_type!r})"
        )
    return implementation(text)


@functools.lru_cache(maxsize=1024)
def _resolved_backward(text: str, device_type: str) -> Backward | str:
    found = _backwards.get(device_type)
    return f"there are no backward kernels for {device_type}" if found is None else found(text)


@functools.lru_cache(maxsize=1024)
def resolved_lists(text: str, device_type: str) -> Lists | None:
    """How lists of a Spec's text are made on a device type, or ``None`` where there are none."""
    found = _lists.get(device_type)
    return None if found is None else found(text)


def why_recomputed(spec: Spec | str, device_type: str) -> str | None:
    """Why gradients of a Spec are computed by its reference on a device type, or ``None`` where there are kernels.

    Args:
        spec: a Spec or its text.
        device_type: such as ``cuda``.
    """
    text = spec if isinstance(spec, str) else print_spec(spec).replace("\n", LINE_BREAK)
    found = _resolved_backward(text, device_type)
    return found if isinstance(found, str) else None


def with_log_sum_exp(spec: Spec) -> Spec:
    """The Spec of one softmax attention with its log-sum-exp among the outputs; any other as it is."""
    attend = spec.attend()
    if attend is None or attend.norm.kind != "softmax" or len(spec.operations) > 1 or attend.lse in spec.outputs:
        return spec
    name = attend.lse or "lse"
    taken = {attend.out, *(value.name for value in spec.inputs)}
    while name in taken:
        name += "_row"
    changed = dataclasses.replace(attend, lse=name)
    return dataclasses.replace(spec, operations=(changed,), outputs=(*spec.outputs, name))


LINE_BREAK = "␤"
"""Stands for a line break in the operator's argument: compilers print that argument into one line of code."""


@dataclass(frozen=True)
class Bound:
    """A function of a Spec's inputs that computes it through the operator.

    Attributes:
        text: the operator's argument: the printed Spec in one line.
        training: the same with the log-sum-exp as one more output, for calls whose gradients are recorded; empty
            where that makes no difference.
        outputs: number of outputs.
        order: for each input of the text its position among the arguments.
        takes: what to say when called with another number of tensors.
    """

    text: str
    training: str
    outputs: int
    order: tuple[int, ...]
    takes: str

    def lists(self, *tensors: torch.Tensor) -> torch.Tensor:
        """What calls with the same mask and sizes may share, for ``lists=``; only where the device has such lists."""
        return torch.ops.attncompile.block_lists(self.text, self._ordered(tensors))

    def _ordered(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if len(tensors) != len(self.order):
            raise ValueError(f"{self.takes}, got {len(tensors)}")
        return [tensors[position] for position in self.order]

    def __call__(
        self, *tensors: torch.Tensor, lists: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        inputs = self._ordered(tensors)
        shared = () if lists is None else (lists,)
        recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if recorded and self.training and tensors[0].device.type in _backwards:
            outputs = torch.ops.attncompile.run(self.training, inputs, *shared)
        # nothing tells an exported program whether gradients are recorded where it runs
        elif recorded or torch.compiler.is_exporting():
            outputs = torch.ops.attncompile.run(self.text, inputs, *shared)
        else:
            outputs = torch.ops.attncompile.infer(self.text, inputs, *shared)
        return outputs[0] if self.outputs == 1 else tuple(outputs[: self.outputs])


def bind(spec: Spec) -> Bound:
    """A function of a Spec's inputs, in the order of ``spec.inputs``, that computes it through the operator.

    It returns the outputs in order, a single tensor when there is one. Tracing sees the operator alone.
    """
    text = print_spec(spec).replace("\n", LINE_BREAK)
    names = [value.name for value in spec.inputs]
    # reading back may reorder the inputs
    order = tuple(names.index(value.name) for value in parsed(text).inputs)
    training = print_spec(with_log_sum_exp(parsed(text))).replace("\n", LINE_BREAK)
    inputs = [value.name for value in parsed(text).inputs]
    if training == text or [value.name for value in parsed(training).inputs] != inputs:
        training = ""
    return Bound(
        text, training, len(spec.outputs), order, f"{spec.name} takes {len(names)} tensors ({', '.join(names)})"
    )


def run(spec: Spec, *tensors: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Compute a Spec once through the operator, see :func:`bind`.

    Raises:
        ValueError: for a wrong number of tensors, or tensors that do not fit the Spec.
        RuntimeError: when nothing computes Specs on the device.
    """
    return bind(spec)(*tensors)


_LIBRARY = torch.library.Library("attncompile", "FRAGMENT")
# not torch.library.custom_op: its wrappers take longer on the host than a short kernel on the GPU
for _name in ("run", "infer"):
    _LIBRARY.define(
        f"{_name}(str spec, Tensor[] inputs, Tensor? lists=None) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
    )
_LIBRARY.define("block_lists(str spec, Tensor[] inputs) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(
    "run_backward(str spec, bool[] wanted, Tensor[] gradients, Tensor[] inputs, Tensor[] outputs) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _run(spec: str, inputs: Sequence[torch.Tensor], lists: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The outputs of a Spec, see :func:`run`; ``lists`` from ``block_lists``."""
    device_type = inputs[0].device.type
    shared = {} if lists is None or device_type not in _lists else {"lists": lists}
    found = _resolved(spec, device_type)(*inputs, **shared)
    outputs = (found,) if isinstance(found, torch.Tensor) else found
    # every implementation gives the strides that tracing was told
    made = zip(outputs, _results(spec), strict=True)
    return [_laid_out(output, _strides(output.shape), result.dtype_among(inputs)) for output, result in made]


def _laid_out(output: torch.Tensor, strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if output.dtype == dtype and output.stride() == strides:
        return output
    return torch.empty_strided(output.shape, strides, dtype=dtype, device=output.device).copy_(output)


@dataclass(frozen=True)
class _Result:
    """An output of a Spec.

    Attributes:
        sizes: of its axes.
        dtype: that the Spec gives it.
        like: position of the input whose dtype it takes; ``None`` for an output that keeps the Spec's.
    """

    sizes: tuple[Expr, ...]
    dtype: torch.dtype
    like: int | None

    def dtype_among(self, inputs: Sequence[torch.Tensor]) -> torch.dtype:
        """Its dtype beside these inputs."""
        return self.dtype if self.like is None else inputs[self.like].dtype


@functools.lru_cache(maxsize=1024)
def _results(text: str) -> tuple[_Result, ...]:
    """The outputs of a Spec's text."""
    spec = parsed(text)
    types = spec.types()
    dtypes = [value.type.dtype for value in spec.inputs]
    real = next(name for name in dtypes if DTYPES[name].is_floating_point and DTYPES[name].itemsize > 1)
    made = []
    for name in spec.outputs:
        found = types[name]
        # a model that was cast to another dtype than its Spec names gives that dtype; lse stays float32
        like = dtypes.index(real) if len(found.sizes) == 4 and found.dtype == real else None
        made.append(_Result(tuple(found.sizes), DTYPES[found.dtype], like))
    return tuple(made)


@functools.lru_cache(maxsize=4096)
def _strides(shape: torch.Size) -> tuple[int, ...]:
    """``[b,h,i,e]`` is stored as ``[b,i,h,e]``, which is how a model goes on with it; others are contiguous."""
    order = (0, 2, 1, 3) if len(shape) == 4 else range(len(shape))
    strides, stride = [1] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = stride
        stride *= max(shape[axis], 1)
    return tuple(strides)


def extent(size: Expr, sizes: Mapping[str, Any]) -> Any:
    """A size by those of symbols, which may be symbols of a traced graph.

    Raises:
        ValueError: for an expression that no result has as a size.
    """
    match size:
        case Const(value):
            return int(value)
        case Size(name):
            return sizes[name]
        case Apply("add", arguments):
            return sum(extent(a, sizes) for a in arguments)
        case Apply("mul", arguments):
            return math.prod(extent(a, sizes) for a in arguments)
        case Apply("floordiv", (left, right)):
            return extent(left, sizes) // extent(right, sizes)
    raise ValueError(f"cannot compute the size {size} of a result")


def _sizes(spec: str, inputs: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The Spec's symbols, by the shapes of its inputs."""
    sizes: dict[str, Any] = {}
    for value, tensor in zip(parsed(spec).inputs, inputs, strict=True):
        for axis, size in zip(value.type.axes, tensor.shape, strict=True):
            if isinstance(axis.size, Size):
                sizes.setdefault(axis.size.name, size)
    return sizes


def _traced(
    spec: str, inputs: Sequence[torch.Tensor], lists: torch.Tensor | None = None
) -> list[torch.Tensor]:
    sizes = _sizes(spec, inputs)
    made = []
    for result in _results(spec):
        shape = [extent(size, sizes) for size in result.sizes]
        four = len(shape) == 4
        # sizes may be symbols, which decide no maximum: PyTorch finds the strides itself
        stored = [shape[0], shape[2], shape[1], shape[3]] if four else shape
        empty = torch.empty(stored, dtype=result.dtype_among(inputs), device=inputs[0].device)
        made.append(empty.transpose(1, 2) if four else empty)
    return made


for _name in ("run", "infer"):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attncompile::{_name}", _traced, lib=_LIBRARY)


def _room(spec: str, inputs: Sequence[torch.Tensor]) -> tuple[Lists, torch.Tensor]:
    """How lists are made, and memory for them."""
    device = inputs[0].device
    found = resolved_lists(spec, device.type)
    if found is None:
        raise RuntimeError(f"no lists of blocks are made for {parsed(spec).name} on {device.type}")
    return found, torch.empty(found.words(_sizes(spec, inputs)), dtype=torch.int32, device=device)


@torch.library.impl("attncompile::block_lists", "CompositeExplicitAutograd", lib=_LIBRARY)
def _block_lists(spec: str, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Lists of blocks for every call of the Spec with these captured tensors and sizes.

    Args:
        spec: the text.
        inputs: of the Spec; of query, key and value only the sizes matter.
    """
    found, memory = _room(spec, inputs)
    found.fill(memory, *inputs)
    return memory


@torch.library.register_fake("attncompile::block_lists", lib=_LIBRARY)
def _(spec: str, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return _room(spec, inputs)[1]


@torch.library.impl("attncompile::run_backward", "CompositeExplicitAutograd", lib=_LIBRARY)
def _run_backward(
    spec: str,
    wanted: Sequence[bool],
    gradients: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """Gradients of a Spec's inputs; an empty tensor where none is wanted.

    Args:
        spec: the text.
        wanted: for each input whether its gradient is wanted.
        gradients: of the outputs; a tensor of shape ``[0]`` for an output that nothing depends on.
        inputs: of the Spec.
        outputs: of the Spec, or none of them.
    """
    backward = _resolved_backward(spec, inputs[0].device.type)
    original = parsed(spec)
    attend = original.attend()
    for name, given in zip(original.outputs, gradients, strict=True):
        if attend is not None and name in attend.taps and not is_absent(given):
            raise RuntimeError(f"{name} of {original.name} has no gradient: detach it before it joins a loss")
    if isinstance(backward, str):
        _say_recomputed(spec, inputs[0].device.type)
        found: Sequence[torch.Tensor | None] = _recomputed(original, gradients, inputs)
    else:
        names = tuple(value.name for value, want in zip(original.inputs, wanted, strict=True) if want)
        found = backward(names, gradients, inputs, outputs)
    made = []
    for gradient, tensor, want in zip(found, inputs, wanted, strict=True):
        if not want:
            made.append(tensor.new_empty(0))
        elif gradient is None:
            made.append(torch.zeros_like(tensor))
        else:
            like = torch.empty_like(tensor, device="meta")
            made.append(_laid_out(gradient, like.stride(), like.dtype))
    return made


def is_absent(gradient: torch.Tensor) -> bool:
    """Whether it stands for the gradient of an output that nothing depends on."""
    return gradient.dim() == 1 and gradient.numel() == 0


@functools.lru_cache(maxsize=1024)
def _say_recomputed(text: str, device_type: str) -> None:
    if device_type in _backwards:
        warnings.warn(
            f"gradients of {parsed(text).name} are computed by its reference, with the whole attention map in "
            f"memory: {why_recomputed(text, device_type)}",
            stacklevel=2,
        )


def _recomputed(
    original: Spec, gradients: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Gradients of the real inputs through the reference."""
    smooth = _differentiable(original)
    dtype = _arithmetic(inputs)
    named = {value.name: tensor for value, tensor in zip(original.inputs, inputs, strict=True)}
    real = [name for name, tensor in named.items() if _is_real(tensor)]

    def forward(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return smooth.interpret({**named, **dict(zip(real, tensors, strict=True))}, dtype)

    # below the operator there is no autograd, but its functional form works there
    outputs, pull = torch.func.vjp(forward, *(named[name].to(dtype) for name in real))[:2]
    shown = _rows_with_keys(smooth, named, dtype)
    given = []
    for output, gradient in zip(outputs, gradients, strict=True):
        if is_absent(gradient):
            given.append(torch.zeros_like(output))
            continue
        gradient = gradient.to(output.dtype)
        if shown is not None:
            gradient = torch.where(shown.reshape(*shown.shape, *[1] * (gradient.dim() - 3)), gradient, 0.0)
        given.append(gradient)
    found = dict(zip(real, pull(tuple(given)), strict=True))
    return [found[name].to(tensor.dtype) if name in found else None for name, tensor in named.items()]


@torch.library.register_fake("attncompile::run_backward", lib=_LIBRARY)
def _(
    spec: str,
    wanted: Sequence[bool],
    gradients: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    return [torch.empty_like(t) if want else t.new_empty(0) for t, want in zip(inputs, wanted, strict=True)]


def _differentiable(spec: Spec) -> Spec:
    """The Spec with rounding left out and with a finite number for −∞."""
    passed = {op.out: op.tensor for op in spec.operations if isinstance(op, Quantize)}
    operations = []
    for operation in spec.operations:
        if isinstance(operation, Quantize):
            continue
        changes: dict[str, Any] = {
            f.name: passed[getattr(operation, f.name)]
            for f in dataclasses.fields(operation)
            if f.metadata.get("role") == "operand" and getattr(operation, f.name) in passed
        }
        if isinstance(operation, Attend):
            changes["score"] = apply("max", operation.score, LOWEST)
            changes["norm"] = dataclasses.replace(operation.norm, weights="")
            if operation.fill == Const(-math.inf):
                changes["fill"] = Const(LOWEST)
        operations.append(dataclasses.replace(operation, **changes))
    return dataclasses.replace(spec, operations=tuple(operations))


def _rows_with_keys(spec: Spec, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor | None:
    """Which rows ``[b,h,i]`` see any key; ``None`` where that is no question."""
    attend = spec.attend()
    if attend is None or attend.norm.kind != "softmax" or len(spec.operations) > 1:
        return None
    sizes = bind_sizes({v.name: v.type for v in spec.inputs}, tensors)
    return (attend.logits(tensors, sizes, dtype) > LOWEST).any(-1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    spec, tensors, _ = inputs
    ctx.spec = spec
    ctx.set_materialize_grads(False)
    ctx.count = len(tensors)
    kept = [] if why_recomputed(spec, tensors[0].device.type) else output
    ctx.save_for_backward(*tensors, *kept)


def _backward(ctx: Any, gradients: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
    inputs, outputs = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    given = [inputs[0].new_empty(0) if gradient is None else gradient for gradient in gradients]
    _, needed, *rest = ctx.needs_input_grad
    further: list[None] = [None] * len(rest)  # a gradient for each argument of the call: lists may be none of them
    wanted = [bool(need) and _is_real(t) for need, t in zip(needed, inputs, strict=True)]
    found = torch.ops.attncompile.run_backward(ctx.spec, wanted, given, list(inputs), list(outputs))
    return None, [gradient if want else None for gradient, want in zip(found, wanted, strict=True)], *further


torch.library.register_autograd("attncompile::run", _backward, setup_context=_setup_context, lib=_LIBRARY)
