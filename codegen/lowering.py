"""What every code generator returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Lowering:
    """A Spec made runnable on one target.

    Attributes:
        target: ``pytorch`` or ``triton``.
        operator: what does the work, such as ``sdpa``, ``flex``, ``blockwise`` or ``reference``.
        reason: why this operator, in one sentence.
        source: the generated code for people to read, or ``None`` where none was generated.
        run: the computation; takes the tensors in the order of the Spec's inputs and gives its output, or a tuple of
            them where the Spec has several.
    """

    target: str
    operator: str
    reason: str
    source: str | None
    run: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
