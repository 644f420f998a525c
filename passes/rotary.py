"""``fuse.rotary``: rotary maps of queries and keys, stated in the Spec.

The Spec then reads queries and keys before their maps, and the tables of cosines and sines. Kernels that round operands
rotate them on the way, in float32: rotated queries and keys are never written. Nothing else is gained by it. What the
model rounds between rotation and attention, the Spec does not.
"""

from __future__ import annotations

from attncompile.ir import Spec
from attncompile.ir.prologue import Prologue, leading_positions, with_positions
from attncompile.passes.frame import Options, Pass


class RotaryOptions(Options):
    """``fuse.rotary`` has no options."""


def why_not(spec: Spec, options: RotaryOptions, prologue: Prologue | None) -> str | None:
    """One attention, some of whose operands a rotary map makes that nobody else needs the result of."""
    if spec.attend() is None:
        return "it has not exactly one attention operation"
    if leading_positions(spec):
        return "rotary maps are stated in it already"
    if prologue is None:
        return (
            "what makes its queries and keys is not known here; torch.compile and conversions to PyTorch look at the "
            "graph around a site"
        )
    if not prologue.positions:
        return "; ".join(reason for _, reason in prologue.refused) or "no rotary map makes its queries or keys"
    return None


def apply(spec: Spec, options: RotaryOptions, prologue: Prologue) -> Spec:
    """The Spec that rotates what it reads: ``attend(P(q), P(k), v)`` of the tensors before the maps ``P``.

    Follows: Su et al. 2021 (arXiv:2104.09864).
    """
    return with_positions(spec, prologue)


ROTARY = Pass(
    name="fuse.rotary",
    summary="State the rotary maps of queries and keys, for kernels that rotate what they round; the same function.",
    contract="exact",
    phases=("prefill", "training"),
    options=RotaryOptions,
    why_not=why_not,
    apply=apply,
    law="the Spec behind the maps is the one before, and the graph with the maps is proven to compute the whole",
    pulls=True,
)
