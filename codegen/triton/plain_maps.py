"""Dense and causal maps, which PyTorch's own attention computes too: which of the two is faster on a Hopper GPU.

`benchmarks/results/kernels_peers_h200.json` has both in one run, `benchmarks/results/host_time_h200.json` what a call
costs the host. Gradients are another matter: in every trial of `benchmarks/backward.py` cuDNN's were ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attncompile.ir import Spec, simplify
from attncompile.ir.affine import affine
from attncompile.ir.blocks import key_bounds
from attncompile.ir.expr import TRUE, Const, Index

WORTH = 5e10
"""With fewer floating-point operations the kernel (600 TFLOP/s) is done before the host has made the next call, which
takes the generated one 60 to 120 µs and SDPA 20 to 30."""

FEWEST = {(64, False): 1024, (64, True): 1024, (128, False): 1, (128, True): 1}
"""By channels and whether the map is causal: from how many queries on the generated kernel is ahead. Channels that are
not here were not measured."""


@dataclass(frozen=True)
class PlainMap:
    """A map that SDPA computes without a mask tensor.

    Attributes:
        query, key: positions of these operands among the Spec's inputs.
        channels: of query, key and value.
        causal: whether keys behind the query are hidden.
    """

    query: int
    key: int
    channels: int
    causal: bool

    def faster_in_sdpa(self, inputs: Sequence[torch.Tensor]) -> bool:
        """Whether PyTorch's operator is expected to be faster for these inputs of the Spec, or was not measured."""
        batch, heads, queries, channels = inputs[self.query].shape
        keys = inputs[self.key].shape[2]
        shown = 0.5 if self.causal else 1.0
        if queries < FEWEST[self.channels, self.causal] or inputs[self.query].element_size() != 2:
            return True
        return 4 * batch * heads * queries * keys * channels * shown < WORTH


def plain_map(spec: Spec) -> PlainMap | None:
    """The Spec as a dense or causal map with channels that were measured; ``None`` for every other."""
    attend = spec.attend()
    causal = _causal(spec)
    if attend is None or causal is None or spec.outputs != (attend.out,):
        return None
    types, names = spec.types(), [value.name for value in spec.inputs]
    sizes = {simplify(types[name].sizes[3]) for name in (attend.query, attend.key, attend.value)}
    if len(sizes) > 1 or not {attend.query, attend.key, attend.value} <= set(names):
        return None
    channels = sizes.pop()
    if not isinstance(channels, Const) or (int(channels.value), causal) not in FEWEST:
        return None
    return PlainMap(names.index(attend.query), names.index(attend.key), int(channels.value), causal)


def without_mask(spec: Spec) -> bool:
    """Whether SDPA computes the Spec without a mask tensor: the map is dense or causal, and nothing joins the scores.

    A bias that is computed from positions, such as ALiBi's, would be a tensor of the size of the map for each call.
    """
    return _causal(spec) is not None


def _causal(spec: Spec) -> bool | None:
    attend = spec.attend()
    if attend is None or len(spec.operations) != 1:
        return None
    score = affine(attend.score)
    if score is None or not isinstance(score.slope, Const) or score.offset != Const(0.0):
        return None
    if attend.mask == TRUE:
        return False
    bounds = key_bounds(attend.mask)
    types = spec.types()
    square = types[attend.query].sizes[2] == types[attend.key].sizes[2]
    only = not bounds.rest and not bounds.lower and bounds.upper == (simplify(Index("i") + 1),)
    return True if square and only else None
