"""Facts about the rows of an attention map: extents of its indices, and rows that surely see a key."""

from __future__ import annotations

import math
from collections.abc import Mapping

from attncompile.ir.affine import affine
from attncompile.ir.attend import Attend
from attncompile.ir.expr import TRUE, Const, Expr, Index, substitute
from attncompile.ir.simplify import simplify
from attncompile.ir.types import TensorType

# A fill this low swallows any logit up to 10⁴ in float32 (10⁴ / 2⁻²⁴), so that a masked logit is the fill
# itself.
ABSORBING = -1e4 * 2.0**24


def extents(attend: Attend, types: Mapping[str, TensorType]) -> dict[str, Expr]:
    """Sizes of the axes ``b h i j`` of an attention map, by index name."""
    query, key = types[attend.query], types[attend.key]
    return {"b": query.sizes[0], "h": query.sizes[1], "i": query.sizes[2], "j": key.sizes[2]}


def never_empty(attend: Attend, types: Mapping[str, TensorType]) -> bool:
    """Whether every query is proven to see at least one key.

    The proof is a witness: key 0, the query's own position, or its position counted from the end of the keys,
    where the mask holds for all ``b h i``. ``False`` means unproven, not that a row is empty.
    """
    sizes = extents(attend, types)
    for witness in (Const(0), Index("i"), Index("i") + (sizes["j"] - sizes["i"])):
        inside = (witness >= 0) & (witness < sizes["j"])
        if simplify(inside & substitute(attend.mask, {Index("j"): witness}), sizes) == TRUE:
            return True
    return False


def absorbing(fill: Expr) -> bool:
    """Whether a fill is finite and so low that it swallows the score it may be added to (as −3.4e38 does)."""
    split = affine(fill)
    if split is None or not isinstance(split.offset, Const):
        return False
    return math.isfinite(split.offset.value) and split.offset.value <= ABSORBING
