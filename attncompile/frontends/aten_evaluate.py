"""Running a part of an FX graph in float64, for the proofs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch

from attncompile.frontends.aten_builder import is_number
from attncompile.frontends.aten_sizes import size_expr, unified
from attncompile.frontends.graph import GraphInput
from attncompile.frontends.memory import Change, Versions, altered_arguments
from attncompile.frontends.view_writes import common_view, storage_of
from attncompile.ir import Expr
from attncompile.ir.types import concrete


@dataclass(frozen=True)
class AtenEvaluator:
    """Runs native nodes on the CPU in float64.

    Attributes:
        module: the graph.
        inputs: its inputs and constants.
        versions: of values whose memory is written to.
        made_of: per version that a write leaves, the values that its elements are those of: a write that reaches all of
            a value leaves nothing of what was there.
        equal: sizes that are the same.
        number: what becomes of the whole numbers that the nodes hold; ``None`` leaves them.
    """

    module: torch.fx.GraphModule
    inputs: Mapping[str, GraphInput]
    versions: Versions
    made_of: Mapping[str, tuple[str, ...]]
    equal: Mapping[Expr, Expr]
    number: Callable[[int], int] | None = None

    def __call__(
        self, wanted: Sequence[str], feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
    ) -> dict[str, torch.Tensor]:
        nodes = {node.name: node for node in self.module.graph.nodes}
        known: dict[str, Any] = dict(feeds)
        needed: set[str] = set()
        samples: dict[str, torch.fx.Node] = {}
        stack = list(wanted)
        while stack:
            name = stack.pop()
            if name in needed or name in known:
                continue
            if name in self.versions.changes:
                needed.add(name)
                change = self.versions.changes[name]
                stack += [change.before] if self._writes_nothing(change, nodes) else self.made_of[name]
                continue
            node = nodes[name.split("#")[0]]
            if is_number(node):
                known[name] = self._number(node.meta["val"], sizes)
                continue
            if node.op in ("placeholder", "get_attr"):
                given = self.inputs.get(name)
                if given is None or given.value is None:
                    raise ValueError(f"the region reads {given.name if given else name!r}, which the Spec does not")
                known[name] = self._shortened(_wide(given.value))
                continue
            needed.add(name)
            sample = _sample(node)
            for argument, read in self.versions.reads[node.name].items():
                if sample is not None and argument == sample.name:
                    samples[read] = sample
                else:
                    stack.append(read)
        for name, sample in samples.items():
            if name not in known and name not in needed:
                known[name] = self._like(sample, sizes)
        steps = [step for node in self.module.graph.nodes for step in self._steps(node) if step[0] in needed]
        last = {read: number for number, (_, _, reads) in enumerate(steps) for read in reads}
        with torch.no_grad():
            for number, (name, made_by, reads) in enumerate(steps):
                if isinstance(made_by, Change):
                    known[name] = self._changed(made_by, nodes, known, sizes)
                else:
                    known[name] = self._run(made_by, known)
                # an attention map can be most of the memory there is: nothing is kept longer than it is read
                for read in reads:
                    if last[read] == number and read not in wanted and read not in feeds:
                        known.pop(read, None)
        return {name: known[name] for name in wanted}

    def resized(self, number: Callable[[int], int]) -> AtenEvaluator:
        """The same nodes, with every whole number that they hold replaced; constants keep the first of their places."""
        return dataclasses.replace(self, number=number)

    def _steps(self, node: torch.fx.Node) -> Iterator[tuple[str, torch.fx.Node | Change, tuple[str, ...]]]:
        """What a node makes, in order: the name of each value, what makes it, and what that reads."""
        yield self.versions.made(node.name), node, tuple(self.versions.reads[node.name].values())
        for change in self.versions.by_writer.get(node.name, ()):
            yield change.after, change, self.made_of[change.after]

    def _run(self, node: torch.fx.Node, known: Mapping[str, Any]) -> Any:
        reads, written = self.versions.reads[node.name], altered_arguments(node)

        def given(argument: torch.fx.Node) -> Any:
            value = known[reads[argument.name]]
            return value.clone() if argument in written else value  # every version of a value stays as it was

        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), given)
        # not torch's own tree_map: a function in it that calls itself keeps tensors until garbage is collected
        args, kwargs = torch.fx.node.map_aggregate((args, kwargs), _widened_argument)
        args, kwargs = self._resized_arguments(node, args, kwargs)
        assert callable(node.target)
        return torch.fx.node.map_aggregate(self._sliced(node, node.target(*args, **kwargs)), _widened)

    def _sliced(self, node: torch.fx.Node, result: Any) -> Any:
        """What a slice gives at other sizes: where it begins at a number that stays, it ends sooner."""
        if self.number is None or getattr(node.target, "_opname", "") != "slice":
            return result
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, int) and self.number(size) < result.shape[axis]:
                result = result.narrow(axis, 0, self.number(size))
        return result

    def _resized_arguments(self, node: torch.fx.Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a node with their whole numbers replaced.

        The new shape of a view has to hold as many elements as there are. Where a number of channels is also a length,
        it would not: then numbers stay as they are, the last ones first, until it does.
        """
        number = self.number
        if number is None:
            return args, kwargs
        if getattr(node.target, "_opname", "") in VIEWS and len(args) == 2 and isinstance(args[1], list | tuple):
            given, sizes = args
            ways = itertools.product(*({number(size): None, size: None} for size in sizes))
            return (given, next((list(way) for way in ways if _holds(way, given.numel())), list(sizes))), kwargs

        def replaced(argument: Any) -> Any:
            return number(argument) if type(argument) is int else argument

        args, kwargs = torch.fx.node.map_aggregate((args, kwargs), replaced)
        return args, kwargs

    def _shortened(self, tensor: torch.Tensor) -> torch.Tensor:
        """A constant at other sizes: the first places of each axis."""
        for axis, size in enumerate(tensor.shape):
            wanted = size if self.number is None else self.number(size)
            tensor = tensor.narrow(axis, 0, wanted) if wanted < size else tensor
        return tensor

    def _writes_nothing(self, change: Change, nodes: Mapping[str, torch.fx.Node]) -> bool:
        """Whether what a write puts down has no elements, whatever the sizes: the channels of a part that is off."""
        written = nodes[self.versions.root(change.written)].meta["val"] if change.written else None
        return written is not None and any(size == 0 for size in written.shape if isinstance(size, int))

    def _changed(
        self, change: Change, nodes: Mapping[str, torch.fx.Node], known: Mapping[str, Any], sizes: Mapping[str, int]
    ) -> torch.Tensor:
        """The version of a value that a write leaves: both views are taken again, of the places in their memory.

        Raises:
            ValueError: when nothing says how the value and what was written share memory, or a write that reaches all
                of a value does not at these sizes.
        """
        if self._writes_nothing(change, nodes) or self.made_of[change.after] == (change.before,):
            return known[change.before]
        value, target = (nodes[self.versions.root(name)] for name in (change.after, change.writer))
        ways = common_view(value, target) if change.written else None
        if ways is None:
            raise ValueError(f"the region reads {value.name!r}, whose memory was changed in place")
        shape, strides = (
            [self._number(number, sizes) for number in numbers]
            for numbers in (ways[0][0].meta["val"].shape, ways[0][0].meta["val"].stride())
        )
        count = math.prod(shape)
        places = torch.empty_strided(shape, strides, dtype=torch.int64).copy_(torch.arange(count).view(shape))
        read, wrote = (self._view(way, places, sizes) for way in ways)
        written = known[change.written]
        origin = torch.full([count], -1).index_put((wrote.reshape(-1),), torch.arange(wrote.numel()))[read]
        if change.before not in self.made_of[change.after]:
            if bool((origin < 0).any()):
                raise ValueError(f"{change.writer} does not write all of {value.name!r} at these sizes")
            return written.reshape(-1)[origin]
        before = known[change.before]
        return torch.where(origin < 0, before, written.reshape(-1)[origin]) if written.numel() else before

    def _view(self, way: Sequence[torch.fx.Node], places: torch.Tensor, sizes: Mapping[str, int]) -> torch.Tensor:
        """A view of the places of a tensor, taken as the graph takes it.

        Raises:
            ValueError: when it is no view at these sizes.
        """
        for last, node in itertools.pairwise(way):
            if self._layout(last) == self._layout(node):
                continue  # a cast to its own dtype, say, is the same view
            call = node.args[0] if node.target is getitem else node
            assert isinstance(call, torch.fx.Node) and callable(call.target)
            storage, shown = storage_of(last), places

            def given(argument: torch.fx.Node, storage: int | None = storage, shown: torch.Tensor = shown) -> Any:
                value = argument.meta.get("val")
                if not isinstance(value, torch.Tensor):
                    return self._number(value, sizes)
                return shown if storage_of(argument) == storage else self._like(argument, sizes)

            args, kwargs = torch.fx.node.map_arg((call.args, dict(call.kwargs)), given)
            args, kwargs = self._resized_arguments(call, args, kwargs)
            made = call.target(*args, **kwargs)
            places = made if call is node else made[node.args[1]]
            if places.untyped_storage().data_ptr() != shown.untyped_storage().data_ptr():
                raise ValueError(f"{node.name} is no view at these sizes")
        return places

    def _layout(self, node: torch.fx.Node) -> tuple[Expr, ...]:
        """Where the elements of a node's value lie in its memory."""
        value = node.meta["val"]
        return tuple(unified(size_expr(n), self.equal) for n in (*value.shape, *value.stride(), value.storage_offset()))

    def _like(self, node: torch.fx.Node, sizes: Mapping[str, int]) -> torch.Tensor:
        """A tensor of zeros with the shape and the dtype of a node's value."""
        value = node.meta["val"]
        return _wide(torch.zeros([self._number(size, sizes) for size in value.shape], dtype=value.dtype))

    def _number(self, value: Any, sizes: Mapping[str, int]) -> Any:
        if isinstance(value, torch.SymInt):
            return concrete(unified(size_expr(value), self.equal), sizes)
        return value if self.number is None or type(value) is not int else self.number(value)


VIEWS = ("view", "reshape", "_unsafe_view")


def _holds(shape: Sequence[int], elements: int) -> bool:
    """Whether a shape, of which one size may be -1, has so many elements."""
    known = math.prod(size for size in shape if size != -1)
    return known == elements if -1 not in shape else bool(known) and elements % known == 0


SAMPLE_ARGUMENT = {
    "type_as": 1,
    "expand_as": 1,
    "view_as": 1,
    "reshape_as": 1,
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like"), 0),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), 0),
    **dict.fromkeys(("copy_", "fill_", "zero_"), 0),  # written over as a whole
}
"""Position of the argument of which an operation only reads the shape or the dtype."""


def _sample(node: torch.fx.Node) -> torch.fx.Node | None:
    """The argument that only lends its shape or dtype, unless it is also read as a value."""
    packet = getattr(node.target, "_opname", "")
    position = SAMPLE_ARGUMENT.get(packet)
    if position is None or position >= len(node.args):
        return None
    sample = node.args[position]
    others = [a for n, a in enumerate(node.args) if n != position]
    return sample if isinstance(sample, torch.fx.Node) and sample not in others else None


def _widened(value: Any) -> Any:
    """A tensor that was made in the default dtype, such as ``empty``, in float64."""
    wide = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype is not torch.float64
    return value.double() if wide else value


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().cpu()
    return plain.double() if plain.is_floating_point() else plain


def _widened_argument(argument: Any) -> Any:
    if isinstance(argument, torch.dtype) and argument.is_floating_point:
        return torch.float64
    return torch.device("cpu") if isinstance(argument, torch.device) else argument
