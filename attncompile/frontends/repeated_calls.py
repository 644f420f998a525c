"""Tracing the calls of a graph that it repeats: what one call becomes is recorded once, and replayed.

A model of many layers calls the same functions again and again with tensors that differ in nothing but their elements.
What such a call becomes in ATen depends on the function, on its arguments, where of a tensor only its description
counts, and on the modes that PyTorch is in: all of that is the key under which the operations that the first call made
are kept. A call with the same key runs these operations on its own tensors, with nothing looking on, and adds them to
the graph; shapes, strides, shared memory and gradients therefore come from running them, for each call anew. What
tracing costs beyond that, which is more than half, is paid once for each different call.

Whatever is not known to depend on its arguments alone is traced as it was.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from attncompile.frontends.torch_internals import (
    Recorder,
    function_transforms,
    is_plain_fake,
    is_symbolic,
    symbol_key,
)

Key = tuple[Any, ...]
"""Describes a call: equal for two that become the same operations."""

_VALUES = (bool, int, str, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout, torch.memory_format)
"""Types of arguments of which equal ones of one type cannot be told apart."""

_CHANGE_A_MODE_OF_THE_KEY = frozenset(
    {torch._C._set_grad_enabled, torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast}
)
_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
"""Of operations whose results have sizes or values that did not exist before."""


class _NotDescribed(Exception):
    """An argument may hold more than can be seen of it."""


@dataclass(frozen=True)
class _Given:
    """The tensor argument of that number, each counted once."""

    number: int


@dataclass(frozen=True)
class _Made:
    """The result of the operation of that number."""

    number: int


@dataclass(frozen=True)
class _Operation:
    """An operation that a call became.

    Attributes:
        target, args, kwargs: of the node, with tensors as :class:`_Given` and :class:`_Made`; a size that is a symbol
            is the node of the graph that gives it, since equal calls have equal sizes.
        name: what its node was called.
        meta: what tracing noted of it besides what it took over from the call.
    """

    target: Any
    args: Any
    kwargs: Any
    name: str
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class _Expansion:
    """What a call became: operations in order, and its result made of theirs."""

    operations: tuple[_Operation, ...]
    result: Any


class RepeatedCalls(torch.fx.Interpreter):
    """Runs a graph under a tracer, see the module.

    Attributes:
        replayed: how many calls were not traced themselves.
    """

    def __init__(self, graph_module: torch.fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.replayed = 0
        self._known: dict[Key, _Expansion | None] = {}
        self._recorder = None if function_transforms(graph_module) else Recorder.running()
        self._paused = ExitStack()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph, as :class:`torch.fx.Interpreter` does."""
        with self._paused:
            return super().run(*args, **kwargs)

    def run_node(self, n: torch.fx.Node) -> Any:
        """The value of a node, recorded by the tracer."""
        call = self._call(n)
        if call is None:
            return self._traced(n)
        key, tensors = call
        if key not in self._known:
            return self._record(n, key, tensors)
        expansion, nodes = self._known[key], self._nodes_of(tensors)
        return self._traced(n) if expansion is None or nodes is None else self._replay(n, expansion, tensors, nodes)

    def _traced(self, n: torch.fx.Node) -> Any:
        """The value of a node that is traced itself."""
        self._paused.close()
        return super().run_node(n)

    def _call(self, n: torch.fx.Node) -> tuple[Key, list[torch.Tensor]] | None:
        """What describes a call, and its tensors; ``None`` where another one like it may become something else."""
        tensors: list[torch.Tensor] = []
        if self._recorder is None or n.op not in ("call_function", "call_method"):
            return None
        try:
            if not _is_of_torch(n):
                raise _NotDescribed
            arguments = self.fetch_args_kwargs_from_env(n)
            with torch._C.DisableTorchFunction():
                key: Key | None = (n.op, n.target, _modes(), _described(arguments, tensors))
        except _NotDescribed:
            key = None
        if key is not None and tensors:
            return key, tensors
        if n.target not in _CHANGE_A_MODE_OF_THE_KEY and not _gives_values(n):
            self._known.clear()  # it is made for its effect alone, which may be one on what others do
        return None

    def _nodes_of(self, tensors: Sequence[torch.Tensor]) -> list[torch.fx.Node] | None:
        """A node for each tensor; ``None`` where one has none of its own, or holds what the tracer knows."""
        assert self._recorder is not None
        nodes = [self._recorder.node_of(tensor) for tensor in tensors]
        known = [node for node in nodes if node is not None]
        return known if len(set(known)) == len(nodes) else None

    def _record(self, n: torch.fx.Node, key: Key, tensors: Sequence[torch.Tensor]) -> Any:
        assert self._recorder is not None
        before = self._nodes_of(tensors)
        last = self._recorder.last_node()
        result = self._traced(n)
        nodes = self._recorder.nodes_after(last)
        again = self._call(n)
        # a tensor may be changed by what is no operation, as requires_grad_() is none
        same = again is not None and again[0] == key
        self._known[key] = self._expansion(nodes, before, tensors, result) if same else None
        return result

    def _expansion(
        self,
        nodes: Sequence[torch.fx.Node],
        before: Sequence[torch.fx.Node] | None,
        tensors: Sequence[torch.Tensor],
        result: Any,
    ) -> _Expansion | None:
        """What a call became, or ``None`` where another one with its key may become something else."""
        if before is None:
            return None
        places: dict[torch.fx.Node, Any] = {node: _Given(n) for n, node in enumerate(before)}
        operations: list[_Operation] = []

        def placed(node: torch.fx.Node) -> Any:
            if node in places:
                return places[node]
            if not is_symbolic(node.meta.get("val")):
                raise _NotDescribed
            return node

        try:
            for node in nodes:
                if is_symbolic(node.meta.get("val")):
                    continue  # a size, which is the same for the next call
                if not _is_replayable(node):
                    return None
                args, kwargs = torch.fx.node.map_aggregate(
                    (node.args, dict(node.kwargs)), lambda a: placed(a) if isinstance(a, torch.fx.Node) else a
                )
                meta = {key: value for key, value in node.meta.items() if key not in _NOT_KEPT}
                operations.append(_Operation(node.target, args, kwargs, node.name, meta))
                places[node] = _Made(len(operations) - 1)
            return _Expansion(tuple(operations), _mapped(result, lambda leaf: self._place(leaf, tensors, places)))
        except _NotDescribed:
            return None

    def _place(self, leaf: Any, tensors: Sequence[torch.Tensor], places: Mapping[torch.fx.Node, Any]) -> Any:
        """Where a part of a call's result comes from."""
        assert self._recorder is not None
        if leaf is None:
            return None
        node = self._recorder.node_of(leaf) if isinstance(leaf, torch.Tensor) else None
        place = places.get(node) if node is not None else None
        if isinstance(place, _Given) and tensors[place.number] is not leaf:
            raise _NotDescribed
        if place is None:
            raise _NotDescribed
        return place

    def _replay(
        self,
        n: torch.fx.Node,
        expansion: _Expansion,
        tensors: Sequence[torch.Tensor],
        nodes: Sequence[torch.fx.Node],
    ) -> Any:
        """The value of a call, by the operations of an earlier one."""
        assert self._recorder is not None
        self.replayed += 1
        self._recorder.pause(self._paused)
        made: list[Any] = []
        added: list[torch.fx.Node] = []

        def value(part: Any) -> Any:
            if isinstance(part, _Given):
                return tensors[part.number]
            if isinstance(part, _Made):
                return made[part.number]
            return part.meta["val"] if isinstance(part, torch.fx.Node) else part

        def node(part: Any) -> Any:
            if isinstance(part, _Given):
                return nodes[part.number]
            return added[part.number] if isinstance(part, _Made) else part

        for operation in expansion.operations:
            args, kwargs = _mapped((operation.args, operation.kwargs), value)
            made.append(operation.target(*args, **kwargs))
            args, kwargs = _mapped((operation.args, operation.kwargs), node)
            meta = {key: n.meta.get(key, kept) for key, kept in operation.meta.items()}
            added.append(self._recorder.add(operation.target, args, kwargs, operation.name, meta, made[-1]))
        return _mapped(expansion.result, value)


_NOT_KEPT = frozenset({"val", "tensor_meta", "seq_nr", "from_node"})
"""What is noted of a node by itself, and read by nothing that the graph goes to but its value, which is noted anew."""

_OF_ITS_OWN = frozenset({"eager_input_vals", "unbacked_bindings"})
"""What is noted of a node that says more of it than its operation and its arguments do."""


def _is_replayable(node: torch.fx.Node) -> bool:
    """Whether a node of the trace is an operation that gives tensors, with sizes that follow from its arguments'."""
    if node.op != "call_function" or not _OF_ITS_OWN.isdisjoint(node.meta):
        return False
    if node.target is operator.getitem:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and not any(tag in node.target.tags for tag in _TAGS)


def _is_of_torch(n: torch.fx.Node) -> bool:
    """Whether a call is of PyTorch's own, which keeps nothing between two calls, and takes no graphs."""
    if n.op == "call_method" or isinstance(n.target, torch._ops.OpOverload):
        return True
    if isinstance(n.target, torch._ops.HigherOrderOperator):
        return False
    home = getattr(n.target, "__module__", None) or getattr(getattr(n.target, "__self__", None), "__module__", "")
    return str(home).partition(".")[0] in ("torch", "_operator")


def _gives_values(n: torch.fx.Node) -> bool:
    """Whether Dynamo saw a call give something that the graph can compute with."""
    leaves = torch.utils._pytree.tree_leaves(n.meta.get("example_value"))
    return any(isinstance(leaf, torch.Tensor) or is_symbolic(leaf) for leaf in leaves)


def _modes() -> Key:
    """The modes of PyTorch that decide about how a function runs."""
    cast = tuple(torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), cast


def _described(value: Any, tensors: list[torch.Tensor]) -> Any:
    """An argument without the elements of its tensors, which are added to ``tensors``, each once.

    Raises:
        _NotDescribed: for what is no tensor, number, symbol or plain value, nor made of them.
    """
    if isinstance(value, torch.Tensor):
        for number, seen in enumerate(tensors):
            if seen is value:
                return ("seen", number)
        described = _tensor_key(value)
        memory = value.untyped_storage()._cdata
        sharing = tuple(seen.untyped_storage()._cdata == memory for seen in tensors)
        tensors.append(value)
        return described, sharing
    if is_symbolic(value):
        return (type(value), symbol_key(value))
    if isinstance(value, float):
        return (float, value.hex())  # 0.0 is equal to -0.0, and nan to nothing
    if isinstance(value, slice):
        return (slice, *(_described(part, tensors) for part in (value.start, value.stop, value.step)))
    if isinstance(value, tuple | list):
        return (type(value), *(_described(part, tensors) for part in value))
    if isinstance(value, dict):
        return (dict, *((key, _described(part, tensors)) for key, part in value.items()))
    if type(value) in _VALUES:
        return (type(value), value)
    raise _NotDescribed


def _tensor_key(tensor: torch.Tensor) -> Key:
    if not is_plain_fake(tensor):
        raise _NotDescribed
    numbers = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    return (
        type(tensor),
        tensor.dtype,
        tensor.device,
        tensor.dim(),
        tuple(symbol_key(number) if is_symbolic(number) else number for number in numbers),
        tensor.requires_grad,
        tensor.is_leaf,
        tensor.is_inference(),
        tensor.is_conj(),
        tensor.is_neg(),
        tensor._is_view(),
    )


def _mapped(value: Any, function: Any) -> Any:
    """A nested value with a function applied to its leaves."""
    if isinstance(value, tuple | list):
        parts = [_mapped(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {key: _mapped(part, function) for key, part in value.items()}
    if isinstance(value, slice):
        return slice(*(_mapped(part, function) for part in (value.start, value.stop, value.step)))
    return function(value)


__all__ = ["RepeatedCalls"]
