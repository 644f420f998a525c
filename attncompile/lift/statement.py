"""The statement of a site: everything over the symbols ``b h i j d e``, before tensors are chosen and named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attncompile.frontends.graph import Indices
from attncompile.ir import Expr, Normalizer
from attncompile.ir.attend import NO_SINK
from attncompile.ir.expr import TOTAL
from attncompile.lift.axes import BATCH, CHANNEL, HEAD, KEY, QUERY, VALUE_CHANNEL
from attncompile.lift.normaliser import refuse
from attncompile.lift.operands import Operand


@dataclass(frozen=True)
class Statement:
    """A site before its tensors are named: everything over the symbols ``b h i j d e``.

    Attributes:
        logits: over ``s`` (the product of the nearest operands) and loads; weight: over ``w``.
        query, key, value: candidate operands, nearest first.
        extents: sizes of the symbols.
        output: the value that is replaced, and its element's indices.
        anchor: the value that names the site.
        inner: values strictly between the operands and the output.
        sink: logit of what the normaliser counts beside the keys, −∞ where there is nothing.
        divisor: what ``sum`` and ``l1`` divide by, over the total.
        score: the product that makes the scores, and the indices of its element; empty for a native call.
        product: the product with the values; empty for a native call.
        lse: the value that holds the log-sum-exp, where it is a second result, and its element's indices.
    """

    logits: Expr
    weight: Expr
    query: tuple[Operand, ...]
    key: tuple[Operand, ...]
    value: tuple[Operand, ...]
    extents: Mapping[str, Expr]
    output: str
    output_indices: Indices
    normalizer: Normalizer
    anchor: str
    inner: frozenset[str]
    sink: Expr = NO_SINK
    divisor: Expr = TOTAL
    score: str = ""
    score_indices: Indices = ()
    product: str = ""
    lse: str = ""
    lse_indices: Indices = ()


class NoSite(Exception):
    """What looked like attention is none."""


__all__ = ["BATCH", "CHANNEL", "HEAD", "KEY", "QUERY", "VALUE_CHANNEL", "NoSite", "Statement", "refuse"]
