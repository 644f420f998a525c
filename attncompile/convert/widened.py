"""A model in float64 without a float64 copy of its weights: each is widened while the module that owns it runs.

A deep copy of the model takes its structure, and in the place of its large weights tensors that hold nothing: one NaN,
expanded to the shape. Before a module runs, its weights are made of the original's, and afterwards let go. Whoever
reads a weight at another time gets NaN, which is seen in the results; the whole model is then widened at once.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import Counter
from typing import Any

import torch

from attncompile.convert.calibration import Call, named_outputs
from attncompile.convert.memory import Reading

SMALLEST = 1 << 20
"""Bytes in float64 from which a weight is widened only while it is used."""

_READ_BELOW = (torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer)
"""Modules of torch that read the weights of the modules in them."""


class Widened:
    """A model that computes in float64.

    A Hugging Face model uses SDPA there: its rows without a visible key are no NaN.

    Attributes:
        held: bytes of large weights that are float64 at this moment; most: the most there ever were at once.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.held = self.most = 0
        self._model = model
        self._whole: torch.nn.Module | None = None
        self._reading = Reading()
        self._open: Counter[torch.nn.Parameter] = Counter()
        self._sources: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
        self._lean: torch.nn.Module | None = self._copied()

    def __call__(self, call: Call) -> dict[str, torch.Tensor]:
        """The float outputs of a call by name."""
        args, kwargs = torch.utils._pytree.tree_map(_wide, (call.args, dict(call.kwargs)))
        if self._lean is not None:
            with contextlib.suppress(RuntimeError, ValueError):  # what is wrong with the call shows once more below
                found = outputs_of(self._lean(*args, **kwargs))
                if not any(tensor.isnan().any() for tensor in found.values()):
                    return found
        if self._whole is None:
            self._whole = _prepared(copy.deepcopy(self._model))
        found = outputs_of(self._whole(*args, **kwargs))
        if any(tensor.isnan().any() for tensor in found.values()):
            self._whole = None  # the model itself gives NaN here: nothing is wrong with the lean copy
        else:
            self._lean = None
        return found

    @property
    def kept_whole(self) -> bool:
        """Whether the whole model is held in float64, because something reads weights that it does not own."""
        return self._lean is None

    def _copied(self) -> torch.nn.Module:
        memo: dict[int, Any] = {}
        for parameter in self._model.parameters():
            narrow = parameter.is_floating_point() and parameter.dtype is not torch.float64
            if narrow and 8 * parameter.numel() >= SMALLEST:
                empty = torch.nn.Parameter(_nothing(parameter), requires_grad=False)
                self._sources[empty] = parameter
                memo[id(parameter)] = empty
        made = _prepared(copy.deepcopy(self._model, memo))
        for module in made.modules():
            below = isinstance(module, _READ_BELOW)
            owned = [one for one in module.parameters(recurse=below) if one in self._sources]
            if owned:
                module.register_forward_pre_hook(lambda _, __, owned=owned: self._widen(owned))
                module.register_forward_hook(lambda _, __, ___, owned=owned: self._let_go(owned), always_call=True)
        return made

    def _widen(self, owned: list[torch.nn.Parameter]) -> None:
        for one in owned:
            if not self._open[one]:
                one.data = self._sources[one].detach().double()
                self.held += one.nbytes
                self._reading.read(self._sources[one])
            self._open[one] += 1
        self.most = max(self.most, self.held)

    def _let_go(self, owned: list[torch.nn.Parameter]) -> None:
        for one in owned:
            self._open[one] -= 1
            if not self._open[one]:
                self.held -= one.nbytes
                one.data = _nothing(one)


def _nothing(parameter: torch.nn.Parameter) -> torch.Tensor:
    """A float64 tensor of that shape without memory: one NaN."""
    return torch.full((), math.nan, dtype=torch.float64, device=parameter.device).expand(parameter.shape)


def _prepared(model: torch.nn.Module) -> torch.nn.Module:
    wide = model.double().eval()
    choose_attention = getattr(wide, "set_attn_implementation", None)
    if callable(choose_attention):
        with contextlib.suppress(ValueError):  # a model that has no SDPA; its rows of padding are then left unjudged
            choose_attention("sdpa")
    for module in wide.modules():
        choose_experts = getattr(module, "set_experts_implementation", None)
        if callable(choose_experts):
            with contextlib.suppress(ValueError, RuntimeError):  # a model whose experts are written one way
                choose_experts("eager")  # torch's grouped product has no kernel for float64
    return wide


def _wide(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf


def outputs_of(result: object) -> dict[str, torch.Tensor]:
    """A model's float outputs by name, detached, on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in named_outputs(result).items()}


__all__ = ["Widened", "outputs_of"]
