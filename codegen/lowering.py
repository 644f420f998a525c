"""What every target gives back for a Spec: something to run, and what to say about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Run = Callable[..., "torch.Tensor | tuple[torch.Tensor, ...]"]


@dataclass(frozen=True)
class SharedLists:
    """What calls of equal Specs with the same mask and sizes may share: blocks of keys that tensors leave to visit.

    Attributes:
        key: equal for calls that may share, if sizes and the tensors that are read are equal too.
        reads: names of the inputs on whose elements it depends.
        make: takes the Spec's inputs in order; gives what ``run`` takes as ``lists=``.
    """

    key: str
    reads: tuple[str, ...]
    make: Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Lowering:
    """A Spec on a target.

    Every target module has ``lower(spec, device) -> Lowering`` and ``why_not(spec, device) -> str | None``;
    the second says in one sentence why the first would refuse, or ``None``.

    Attributes:
        target: name of the target, such as ``triton``.
        operator: what runs, for reports: the name of a kernel, of an ATen or of an ONNX operator.
        reason: why this operator, and where its results differ from the Spec beyond rounding.
        source: generated source text, when there is any.
        run: takes the Spec's inputs in the order of ``spec.inputs`` (operands as ``[b,h,i,d]``, of any
            strides) and returns its outputs in order, a single tensor when there is one.
        lists: what several calls may share, where there is such a thing.
    """

    target: str
    operator: str
    reason: str
    source: str | None
    run: Run
    lists: SharedLists | None = None
