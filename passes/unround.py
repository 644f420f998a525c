"""``unround``: attention in the model's own floats, where a quantised file rounds inside it.

What such a file rounds to a narrow type between its operands and its result is known with the site, not stated in its
Spec: the Spec says what the file computes without that. This pass is the permission to compute just that.
"""

from __future__ import annotations

from attncompile.ir import Spec
from attncompile.passes.frame import Options, Pass


class UnroundOptions(Options):
    """``unround`` has no options."""


def why_not(spec: Spec, options: UnroundOptions, rounded: str) -> str | None:
    """A model that rounds inside the attention; ``rounded`` says what, in words."""
    return None if rounded else "the model rounds nothing inside this attention"


def apply(spec: Spec, options: UnroundOptions, rounded: str) -> Spec:
    """The Spec as it is: ``norm(score(q·k))·v`` of queries, keys and values as they are before they are rounded."""
    return spec


UNROUND = Pass(
    name="unround",
    summary="Compute in floats what a quantised file rounds inside its attention (ONNX only).",
    contract="calibrated",
    phases=("prefill", "decode"),
    options=UnroundOptions,
    why_not=why_not,
    apply=apply,
    unrounds=True,
)
