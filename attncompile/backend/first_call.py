"""The first call of a compiled graph beside the graph as it was (``verify="full"``)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attncompile.backend.rewrite import draws
from attncompile.codegen.pytorch.autocast import autocast_dtype


def why_not_compared(module: torch.fx.GraphModule) -> str | None:
    """Why two runs of a graph need not agree, or ``None``."""
    random = next((node for node in module.graph.nodes if draws(node)), None)
    return f"{random.name} draws random numbers" if random is not None else None


class ComparedOnce:
    """A compiled graph whose first call is compared with the graph as it was; if they differ, that runs from then on.

    Both results carry rounding errors, and how far those reach is measured: the graph runs a third time, with every
    real input moved by up to a unit in its last place, which is all but as good an input as the one that was given. A
    result that is at most twice as far away is as good too. Where autocast is on, it rounds the operands of products:
    units are those of its dtype then, for inputs of two axes and more, and for results. The comparison is made once
    and costs two runs of the graph without gradients, and copies of what the graph was given.
    """

    def __init__(
        self, compiled: Callable[..., Any], original: torch.fx.GraphModule, tell: Callable[[str], None]
    ) -> None:
        self._compiled, self._original, self._tell = compiled, original, tell
        self._run: Callable[..., Any] | None = None
        self._first = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        """The results of the graph."""
        if self._run is not None:
            return self._run(*args)
        with self._first:
            return self._run(*args) if self._run is not None else self._compare(args)

    def _compare(self, args: Sequence[Any]) -> Any:
        expected, moved = (_plainly(self._original, args, moves) for moves in (False, True))
        kept = _copies(args, False)
        results = self._compiled(*args)
        found = _reals((results, args))
        reason = _difference(found, expected, moved)
        if reason is None:
            self._run = self._compiled
            return results
        self._run = self._original
        self._tell(f"the compiled graph runs as it was: {reason}. Please report this")
        # what the compiled graph wrote to its inputs is undone before the original writes its own
        with torch.no_grad():
            for given, before in zip(args, kept, strict=True):
                if isinstance(given, torch.Tensor) and not torch.equal(given, before):
                    given.copy_(before)
        return self._original(*args)


def _copies(args: Sequence[Any], moves: bool) -> list[Any]:
    return [_copy(value, moves) if isinstance(value, torch.Tensor) else value for value in args]


def _copy(tensor: torch.Tensor, moves: bool) -> torch.Tensor:
    """A copy without gradient, real elements moved by up to a unit in the last place if so asked."""
    copy = tensor.detach().clone()
    if moves and copy.is_floating_point():
        generator = torch.Generator(device=copy.device).manual_seed(0)
        shift = torch.rand(copy.shape, device=copy.device, generator=generator, dtype=_wide(copy)) * 2 - 1
        unit = _unit(copy) if copy.dim() > 1 else torch.finfo(copy.dtype).eps
        copy = (copy.to(_wide(copy)) * (1 + unit * shift)).to(copy.dtype)
    return copy


def _unit(tensor: torch.Tensor) -> float:
    """How far apart the numbers next to 1 are, of those that products compute with."""
    return torch.finfo(autocast_dtype(tensor) or tensor.dtype).eps


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype in (torch.float32, torch.float64) else torch.float32


def _plainly(module: torch.fx.GraphModule, args: Sequence[Any], moves: bool) -> list[torch.Tensor]:
    given = _copies(args, moves)
    with torch.no_grad():
        return _reals((module(*given), given))


def _reals(values: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(values)
    return [leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _difference(
    found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], moved: Sequence[torch.Tensor]
) -> str | None:
    """Where results differ by more than rounding, in a few words."""
    if len(found) != len(expected):
        return f"it gives {len(found)} tensors where there were {len(expected)}"
    for number, (one, wanted, near) in enumerate(zip(found, expected, moved, strict=True)):
        if one.shape != wanted.shape or one.dtype != wanted.dtype:
            return f"result {number} is {one.dtype} {tuple(one.shape)}, it was {wanted.dtype} {tuple(wanted.shape)}"
        finite = wanted.isfinite()
        if not torch.equal(one.isfinite(), finite):
            return f"result {number} is NaN or infinite elsewhere than it was"
        first, second, third = (tensor[finite & near.isfinite()].to(_wide(wanted)) for tensor in (one, wanted, near))
        distance, natural = float((first - second).norm()), float((third - second).norm())
        allowed = 2 * natural + _unit(wanted) * float(second.norm())
        if not distance <= allowed:
            return f"result {number} is off by {distance:.3g} (norm), where rounding explains {allowed:.3g}"
    return None


__all__ = ["ComparedOnce", "why_not_compared"]
