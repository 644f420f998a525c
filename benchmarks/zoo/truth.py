"""Count the attentions that one forward pass computes, from what it does to tensors. Nothing here knows of lifting.

An attention is a softmax over a tensor of three axes or more that

- comes, through pointwise operations and movements of data only, from a product of two activations, and
- goes the same way into a batched product.

So routers (a linear layer before the softmax), weights of convolutions and deformable attention (no product of
queries and keys) do not count. Calls of torch's own attention functions are counted apart, as `fused`. Attention
without a softmax (Reformer's exp minus logsumexp, linear attention, state-space layers) is not counted.

The forward runs under two modes of torch: one sees functions and counts fused calls, the other sees ATen operations
and carries labels along with the tensors, forward: "derived from product 7", "weights of softmax 3".
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class Attention:
    """One attention of the forward pass: the module it ran in, its kind, and the shape of its scores or queries."""

    module: str
    fused: bool
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Truth:
    """What one forward pass computes."""

    attentions: tuple[Attention, ...]

    @property
    def decomposed(self) -> int:
        """Attentions spelt out in products and softmax."""
        return sum(not one.fused for one in self.attentions)

    @property
    def fused(self) -> int:
        """Calls of torch's attention functions."""
        return sum(one.fused for one in self.attentions)


FUSED_FUNCTIONS = frozenset({"scaled_dot_product_attention", "flex_attention"})
FUSED_OPERATIONS = ("_native_multi_head_attention", "_transformer_encoder_layer_fwd", "_flash_attention_forward")
PRODUCTS = frozenset({"bmm", "baddbmm", "mm", "addmm", "matmul"})
BATCHED = frozenset({"bmm", "baddbmm"})
SOFTMAX = frozenset({"_softmax", "_safe_softmax"})
# Movements that are no views (views are known by their schema) and not tagged pointwise.
MOVEMENTS = frozenset(
    {
        "_reshape_alias", "_to_copy", "_unsafe_index", "_unsafe_view", "amax", "cat", "clone", "constant_pad_nd",
        "contiguous", "copy", "diagonal_copy", "flip", "gather", "im2col", "index", "index_add", "index_put",
        "index_select", "lift_fresh", "masked_fill", "masked_scatter", "nan_to_num", "narrow_copy", "repeat",
        "repeat_interleave", "roll", "scatter", "select_scatter", "slice_scatter", "stack", "take_along_dim", "tril",
        "triu", "unfold_copy", "where",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Label:
    """What is known of a tensor: the score products and the softmaxes it derives from, and whether only weights
    of the model are in it."""

    products: frozenset[int] = frozenset()
    softmaxes: frozenset[int] = frozenset()
    weight: bool = False


EMPTY = Label()


@dataclass
class Ledger:
    """Labels of tensors, and of storages that were written in place."""

    weights: frozenset[int]
    tensors: Any = field(default_factory=WeakIdKeyDictionary)
    storages: dict[int, Label] = field(default_factory=dict)
    alive: list[torch.UntypedStorage] = field(default_factory=list)

    def of(self, tensor: torch.Tensor) -> Label:
        """The label of a tensor, with what was written into its storage."""
        label = self.tensors.get(tensor, EMPTY)
        key = _storage(tensor)
        if key in self.weights:
            return Label(label.products, label.softmaxes, True)
        return _joined([label, self.storages[key]]) if key in self.storages else label

    def write(self, tensor: torch.Tensor, label: Label) -> None:
        """Something went into a tensor in place: every view of its storage may show it."""
        key = _storage(tensor)
        if key is None:
            return
        if key not in self.storages:
            self.alive.append(tensor.untyped_storage())
        self.storages[key] = _joined([self.storages.get(key, EMPTY), label])


def _storage(tensor: torch.Tensor) -> int | None:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else None


def _joined(labels: Sequence[Label]) -> Label:
    return Label(
        frozenset().union(*(one.products for one in labels)),
        frozenset().union(*(one.softmaxes for one in labels)),
        bool(labels) and all(one.weight for one in labels),
    )


@dataclass
class Recorder:
    """What both modes write to."""

    ledger: Ledger
    modules: list[str] = field(default_factory=list)
    inside_fused: int = 0
    products: int = 0
    softmaxes: list[Attention] = field(default_factory=list)
    attending: set[int] = field(default_factory=set)
    fused: list[tuple[int, Attention]] = field(default_factory=list)

    def module(self) -> str:
        """Path of the module that runs."""
        return self.modules[-1] if self.modules else ""

    def found_fused(self, tensors: Sequence[torch.Tensor]) -> None:
        """A call of an attention function."""
        shape = tuple(tensors[0].shape) if tensors else ()
        self.fused.append((len(self.softmaxes), Attention(self.module(), True, shape)))

    def truth(self) -> Truth:
        """The attentions in the order in which they ran."""
        ordered = [(number, 1, one) for number, one in enumerate(self.softmaxes) if number in self.attending]
        ordered += [(number, 0, one) for number, one in self.fused]
        return Truth(tuple(one for _, _, one in sorted(ordered, key=lambda entry: entry[:2])))


class FunctionMode(TorchFunctionMode):
    """Sees torch's functions: counts fused attention, whose insides are then not looked at."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in FUSED_FUNCTIONS or self.recorder.inside_fused:
            return func(*args, **kwargs)
        self.recorder.found_fused([leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)])
        self.recorder.inside_fused += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.recorder.inside_fused -= 1


class OperationMode(TorchDispatchMode):
    """Sees ATen operations: carries labels from inputs to outputs."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        recorder = self.recorder
        if recorder.inside_fused:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        labels = [recorder.ledger.of(tensor) for tensor in inputs]
        result = func(*args, **kwargs)
        if name in FUSED_OPERATIONS:
            recorder.found_fused(inputs)
        label = self._label(func, name.removesuffix("_") if name.endswith("_") else name, inputs, labels, result)
        for tensor in _written(func, args, kwargs):
            recorder.ledger.write(tensor, label)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                recorder.ledger.tensors[leaf] = label
        return result

    def _label(
        self, func: Any, name: str, inputs: Sequence[torch.Tensor], labels: Sequence[Label], result: Any
    ) -> Label:
        recorder = self.recorder
        if name in PRODUCTS:
            return self._product(name, labels)
        if name in SOFTMAX:
            products = _joined(labels).products
            recorder.softmaxes.append(Attention(recorder.module(), False, tuple(result.shape)))
            scored = products and result.dim() >= 3
            return Label(softmaxes=frozenset({len(recorder.softmaxes) - 1})) if scored else EMPTY
        if torch.Tag.pointwise in func.tags or name in MOVEMENTS or func.is_view or name == "copy":
            return _joined(labels)
        return EMPTY

    def _product(self, name: str, labels: Sequence[Label]) -> Label:
        """A product of two activations starts scores; one that reads weights of a softmax makes that an attention."""
        recorder, (left, right) = self.recorder, labels[-2:]
        activations = not right.weight and (name in BATCHED or not left.weight)
        if name in BATCHED or activations:
            recorder.attending |= left.softmaxes | right.softmaxes
        if not activations:
            return EMPTY
        recorder.products += 1
        added = _joined(labels[:-2])  # of baddbmm and addmm
        return Label(added.products | {recorder.products}, added.softmaxes)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    if not func._schema.is_mutable:
        return
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def count(model: torch.nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Truth:
    """The attentions that ``model(*args, **kwargs)`` computes, in evaluation mode and without gradients."""
    weights = frozenset(parameter.untyped_storage()._cdata for parameter in model.parameters())
    recorder = Recorder(Ledger(weights))
    names = {module: name for name, module in model.named_modules()}

    def enter(module: torch.nn.Module, inputs: Any) -> None:
        recorder.modules.append(names.get(module, type(module).__name__))

    def leave(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        recorder.modules.pop()

    hooks = (
        torch.nn.modules.module.register_module_forward_pre_hook(enter),
        torch.nn.modules.module.register_module_forward_hook(leave, always_call=True),
    )
    try:
        with torch.no_grad(), OperationMode(recorder), FunctionMode(recorder):
            model(*args, **copy.deepcopy(dict(kwargs or {})))
    finally:
        for hook in hooks:
            hook.remove()
    return recorder.truth()
