"""Running a part of an FX graph in float64, for the proofs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attncompile.frontends.aten_builder import is_number
from attncompile.frontends.aten_sizes import size_expr, unified
from attncompile.frontends.graph import GraphInput
from attncompile.frontends.memory import BETWEEN, EARLY, Versions, altered_arguments
from attncompile.ir import Expr
from attncompile.ir.types import concrete


@dataclass(frozen=True)
class AtenEvaluator:
    """Runs native nodes on the CPU in float64."""

    module: torch.fx.GraphModule
    inputs: Mapping[str, GraphInput]
    versions: Versions
    equal: Mapping[Expr, Expr]

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
            if name.endswith(BETWEEN) or name in self.versions.changed:
                raise ValueError(f"the region reads {name.removesuffix(BETWEEN)!r}, whose memory was changed in place")
            node = nodes[name.removesuffix(EARLY)]
            if is_number(node):
                known[name] = self._number(node.meta["val"], sizes)
                continue
            if node.op in ("placeholder", "get_attr"):
                given = self.inputs.get(node.name)
                if given is None or given.value is None:
                    raise ValueError(f"the region reads {given.name if given else name!r}, which the Spec does not")
                known[name] = _wide(given.value)
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
        with torch.no_grad():
            for node in self.module.graph.nodes:
                for name in (node.name, node.name + EARLY):
                    if name in needed:
                        known[name] = self._run(node, known)
        return {name: known[name] for name in wanted}

    def _run(self, node: torch.fx.Node, known: Mapping[str, Any]) -> Any:
        reads, written = self.versions.reads[node.name], altered_arguments(node)

        def given(argument: torch.fx.Node) -> Any:
            value = known[reads[argument.name]]
            return value.clone() if argument in written else value  # every version of a value stays as it was

        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), given)
        args, kwargs = torch.utils._pytree.tree_map(_widened_argument, (args, kwargs))
        assert callable(node.target)
        return torch.utils._pytree.tree_map(_widened, node.target(*args, **kwargs))

    def _like(self, node: torch.fx.Node, sizes: Mapping[str, int]) -> torch.Tensor:
        """A tensor of zeros with the shape and the dtype of a node's value."""
        value = node.meta["val"]
        return _wide(torch.zeros([self._number(size, sizes) for size in value.shape], dtype=value.dtype))

    def _number(self, value: Any, sizes: Mapping[str, int]) -> Any:
        return concrete(unified(size_expr(value), self.equal), sizes) if isinstance(value, torch.SymInt) else value


SAMPLE_ARGUMENT = {
    "type_as": 1,
    "expand_as": 1,
    "view_as": 1,
    "reshape_as": 1,
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like"), 0),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), 0),
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
