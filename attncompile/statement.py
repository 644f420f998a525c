"""Attention from its statement: the door for those who write a variant down instead of finding it in a model."""

from __future__ import annotations

from typing import Any

import torch

from attncompile.backend.choose import SUPPORTED
from attncompile.backend.stated import computed, lowered
from attncompile.codegen.lowering import Lowering
from attncompile.codegen.pytorch.tracing import being_compiled
from attncompile.ir import Spec, parse_spec
from attncompile.ir.expr import Const, Size
from attncompile.ir.types import DTYPES, NAMES, bind_sizes
from attncompile.kernels import operators
from attncompile.passes import parse_passes, run_passes

Result = torch.Tensor | tuple[torch.Tensor, ...]


class Attention:
    """A callable that computes a Spec: by generated kernels on GPUs, by PyTorch's operators on CPUs.

    It differentiates, and can be compiled as a part of a model. Two with the same statement share everything.

    Attributes:
        stated: the Spec as it was given.
        spec: the Spec that runs, after passes.
    """

    def __init__(self, stated: Spec, spec: Spec) -> None:
        self.stated, self.spec = stated, spec
        self._text, self._stated_text = str(spec), str(stated)
        self._names = tuple(value.name for value in stated.inputs)
        self._fitting: set[Any] = set()

    def __call__(self, *tensors: torch.Tensor, **named: torch.Tensor) -> Result:
        """The outputs: one tensor, or a tuple where the Spec gives several.

        Args:
            tensors: inputs in the order of the Spec, operands as ``[b,h,i,d]`` with any strides.
            named: the rest of them by name.

        Raises:
            ValueError: for an input too many or too few, of another dtype, of a size that does not fit, or on a
                device that is not supported.
        """
        ordered = self._ordered(tensors, named)
        if being_compiled(*ordered):
            return _traced(self._stated_text, self._text, *ordered)
        self._require_fitting(ordered)
        return computed(self._text, *ordered)

    def reference(self, *tensors: torch.Tensor, dtype: torch.dtype = torch.float64, **named: torch.Tensor) -> Result:
        """What the statement means: its definition in plain PyTorch, the whole attention map in memory.

        Args:
            tensors, named: as in a call.
            dtype: of the arithmetic and the result.

        Raises:
            ValueError: as in a call.
        """
        ordered = self._ordered(tensors, named)
        self._require_fitting(ordered)
        made = self.stated.interpret(dict(zip(self._names, ordered, strict=True)), dtype)
        return made[0] if len(made) == 1 else made

    def lowering(self, device: str | torch.device) -> Lowering:
        """What computes it on a device: the operator, why, and the generated source where there is one.

        Raises:
            ValueError: for a device that is not supported.
        """
        return lowered(self._text, torch.device(device).type)[1]

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"attncompile.attention({self._text!r})"

    def _ordered(self, tensors: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        takes = f"{self.stated.name} takes {', '.join(self._names)}"
        if len(tensors) > len(self._names):
            raise ValueError(f"{takes}; {len(tensors)} tensors were given")
        rest = self._names[len(tensors) :]
        for name in named:
            if name not in rest:
                raise ValueError(f"{takes}; {name!r} is {'given twice' if name in self._names else 'none of them'}")
        missing = [name for name in rest if name not in named]
        if missing:
            raise ValueError(f"{takes}; {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
        return [*tensors, *(named[name] for name in rest)]

    def _require_fitting(self, tensors: list[torch.Tensor]) -> None:
        """Check dtypes, devices and sizes, once for each combination."""
        for name, tensor in zip(self._names, tensors, strict=True):
            if not isinstance(tensor, torch.Tensor):
                raise ValueError(f"{name} of {self.stated.name} is {type(tensor).__name__} {tensor!r}, not a tensor")
        key = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
        if key in self._fitting:
            return
        for value, tensor in zip(self.stated.inputs, tensors, strict=True):
            if tensor.dtype is not DTYPES[value.type.dtype]:
                raise ValueError(
                    f"{value.name} of {self.stated.name} is {NAMES.get(tensor.dtype, tensor.dtype)}, "
                    f"but is stated as {value.type.dtype}"
                )
            if tensor.device != tensors[0].device:
                raise ValueError(f"{value.name} is on {tensor.device}, {self._names[0]} on {tensors[0].device}")
        if tensors[0].device.type not in SUPPORTED:
            raise ValueError(
                f"device {tensors[0].device.type!r} is not supported; the supported ones are {', '.join(SUPPORTED)}"
            )
        types = {value.name: value.type for value in self.stated.inputs}
        bind_sizes(types, dict(zip(self._names, tensors, strict=True)))
        self._fitting.add(key)


@torch.compiler.allow_in_graph
def _traced(stated: str, text: str, *tensors: torch.Tensor) -> Result:
    """The outputs, with dtypes and sizes looked at while a graph is traced: sizes may be symbols, which stay so.

    Raises:
        ValueError: for an input of another dtype, or of a size that does not fit.
    """
    spec, found = operators.parsed(stated), dict[str, Any]()
    for value, tensor in zip(spec.inputs, tensors, strict=True):
        if tensor.dtype is not DTYPES[value.type.dtype]:
            raise ValueError(f"{value.name} of {spec.name} is {tensor.dtype}, but is stated as {value.type.dtype}")
        if tensor.dim() != len(value.type.axes):
            raise ValueError(f"{value.name} of {spec.name} has {tensor.dim()} axes, but is stated as {value.type}")
        for axis, extent in zip(value.type.axes, tensor.shape, strict=True):
            wanted: Any = extent  # of a compound size, which the operator looks at
            if isinstance(axis.size, Size):
                wanted = found.setdefault(axis.size.name, extent)
            elif isinstance(axis.size, Const):
                wanted = axis.size.value
            if extent != wanted:
                raise ValueError(f"axis {axis.name} of {value.name} of {spec.name} is {extent}, but should be {wanted}")
    return lowered(text, tensors[0].device.type)[1].run(*tensors)


def attention(spec: Spec | str, *, passes: str = "", allow_untrained: bool = False) -> Attention:
    """Attention from its statement.

    Args:
        spec: a Spec, or its text: ``docs/attention.md`` says how to write one.
        passes: passes to run on it, such as ``"sparsify.window(size=1024)"``; canonical form comes by itself.
        allow_untrained: also run passes whose result needs training.

    Raises:
        ValueError: for a text that is no Spec, an unknown pass, or one that does not apply, with the reason.
    """
    stated = (parse_spec(spec) if isinstance(spec, str) else spec).verify()
    result = run_passes(stated, parse_passes(passes) if passes else (), allow_untrained=allow_untrained)
    if result.refused:
        name, reason = result.refused[0]
        raise ValueError(f"pass {name} does not apply to {stated.name}: {reason}")
    return Attention(stated, result.spec)


__all__ = ["Attention", "attention"]
