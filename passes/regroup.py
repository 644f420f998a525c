"""``regroup.boxes``: tokens of a grid in an order in which a tile of an attention map is a box of the grid.

In raster order 128 tokens are a line, whose neighbourhoods have hardly a key in common; those of a box share most of
theirs. Query, key and value are moved, score and mask composed with the order, and the result is moved back: the same
function (the law is :func:`attncompile.ir.tiling.why_not_rearranged`). See Generalized Neighborhood Attention,
arXiv 2504.16922, for what it gains.
"""

from __future__ import annotations

from pydantic import Field

from attncompile.ir import Spec
from attncompile.ir.rearrange import regrouped, why_not_regrouped
from attncompile.passes.frame import Options, Pass


class BoxesOptions(Options):
    """How large the boxes are."""

    queries: int = Field(128, ge=16, le=1024, description="queries of a box")
    keys: int = Field(64, ge=16, le=1024, description="keys of a box")


def why_not(spec: Spec, options: BoxesOptions) -> str | None:
    """The mask has to be a neighbourhood on a grid of fixed size, and boxes have to leave much fewer tiles to visit."""
    reason = why_not_regrouped(spec)
    if reason is None and regrouped(spec, options.queries, options.keys) is None:
        return "boxes would not leave so much fewer tiles to visit that moving the tokens pays"
    return reason


def apply(spec: Spec, options: BoxesOptions) -> Spec:
    """The Spec with its tokens in boxes."""
    found = regrouped(spec, options.queries, options.keys)
    if found is None:
        raise ValueError(f"{spec.name} is no neighbourhood that boxes pay for; ask why_not first")
    return found


BOXES = Pass(
    name="regroup.boxes",
    summary="Order the tokens of a grid in boxes, so that a neighbourhood visits few tiles; the same function.",
    contract="exact",
    phases=("prefill", "training"),
    options=BoxesOptions,
    why_not=why_not,
    apply=apply,
    law="every token has one place and every place at most one token; score and mask are composed with that order",
)
