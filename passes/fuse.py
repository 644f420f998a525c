"""``fuse``: the same function, stated so that a fused operator can hold it.

Each law keeps the logits of every position, up to rounding:

- ``c·(a·s)`` becomes ``(c·a)·s``, and a linear score becomes ``slope·s + offset``;
- ``score + where(m, 0, x)`` becomes the mask ``m`` with the fill ``score + x``, where there was no mask yet,
or with
  the fill −∞ where ``x`` and the fill are −∞;
- a part of the mask that always holds, or that another part implies, goes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TypeVar

from attncompile.ir import Attend, Expr, Operation, Spec, TensorType, simplify
from attncompile.ir.affine import affine
from attncompile.ir.expr import SCORE, TRUE, Apply, Const, Index, conjunction, conjuncts, symbols
from attncompile.ir.operators import Kind
from attncompile.ir.rows import extents
from attncompile.passes.frame import Options, Pass

_NOTHING = Const(0.0)

Kept = TypeVar("Kept", bound=Operation)
Limit = tuple[str, Expr]


class FuseOptions(Options):
    """``fuse`` has no options."""


def why_not(spec: Spec, options: FuseOptions) -> str | None:
    """There has to be an attention operation or a scan."""
    if any(isinstance(operation, Attend) for operation in spec.operations) or spec.scan() is not None:
        return None
    return "there is no attention operation in it"


def apply(spec: Spec, options: FuseOptions) -> Spec:
    """The Spec in canonical form."""
    types = spec.types()
    return dataclasses.replace(
        spec, operations=tuple(_canonical(operation, types) for operation in spec.operations))


def _canonical(operation: Operation, types: Mapping[str, TensorType]) -> Operation:
    if isinstance(operation, Attend):
        return _fold_masks(_simplified(operation, extents(operation, types)), extents(operation, types))
    return _simplified(operation, {})


def _simplified(operation: Kept, sizes: Mapping[str, Expr]) -> Kept:
    return operation.with_expressions(lambda expr: simplify(expr, sizes))


def _fold_masks(attend: Attend, sizes: Mapping[str, Expr]) -> Attend:
    split = affine(attend.score)
    score, mask, fill = attend.score, attend.mask, attend.fill
    if split is not None and split.slope != _NOTHING:
        kept: list[Expr] = []
        for term in _terms(split.offset):
            found = _hiding(term)
            plain = mask == TRUE or (fill == Const(-math.inf) and found is not None and found[1] == fill)
            if found is None or not plain:
                kept.append(term)
                continue
            visible, hidden = found
            rest = _sum([simplify(split.slope * SCORE),
                         *[other for other in _terms(split.offset) if other is not term]])
            fill = hidden if hidden == Const(-math.inf) else simplify(_sum([rest, hidden]), sizes)
            mask = simplify(mask & visible, sizes)
        score = simplify(_sum([split.slope * SCORE, *kept]), sizes)
    return dataclasses.replace(attend, score=score, fill=fill if mask != TRUE else Const(-math.inf),
                               mask=without_implied(mask, sizes))


def _terms(offset: Expr) -> tuple[Expr, ...]:
    if offset == _NOTHING:
        return ()
    return offset.arguments if isinstance(offset, Apply) and offset.operator == "add" else (offset,)


def _sum(terms: list[Expr]) -> Expr:
    result: Expr = terms[0]
    for term in terms[1:]:
        result = result + term
    return result


def _hiding(term: Expr) -> tuple[Expr, Expr] | None:
    """``where(m, 0, x)`` as ``(m, x)`` with a constant ``x`` below 0, whichever way round it is written."""
    match term:
        case Apply("where", (condition, Const(0.0), Const(hidden))) if hidden < 0:
            return condition, Const(float(hidden))
        case Apply("where", (condition, Const(hidden), Const(0.0))) if hidden < 0:
            return simplify(~condition), Const(float(hidden))
    return None


def without_implied(mask: Expr, sizes: Mapping[str, Expr]) -> Expr:
    """The mask without the parts that other parts imply: ``j ≤ i and j < i + 5`` is ``j ≤ i``.

    Args:
        mask: any mask.
        sizes: extents of the indices, for the proof.
    """
    parts = list(conjuncts(simplify(mask, sizes)))
    for part in tuple(parts):
        others = [other for other in parts if other is not part]
        if _implied(part, others, sizes):
            parts = others
    return conjunction(parts)


def _implied(part: Expr, others: list[Expr], sizes: Mapping[str, Expr]) -> bool:
    """Whether a part holds wherever the others do: it is one of them, is looser than one, or offers one as a
    choice.
    """
    if part in others or any(_looser(_limit(part), _limit(other), sizes) for other in others):
        return True
    choices = part.arguments if isinstance(part, Apply) and part.operator == "or" else ()
    return any(all(_implied(piece, others, sizes) for piece in conjuncts(choice)) for choice in choices)


def _looser(limit: Limit | None, other: Limit | None, sizes: Mapping[str, Expr]) -> bool:
    """Whether a limit on ``j`` holds wherever the other limit does."""
    if limit is None or other is None or limit[0] != other[0]:
        return False
    comparison = limit[1] >= other[1] if limit[0] == "upper" else limit[1] <= other[1]
    return simplify(comparison, sizes) == TRUE


def _limit(part: Expr) -> Limit | None:
    """A comparison with ``j`` as ``("upper", e)`` for ``j ≤ e`` or ``("lower", e)`` for ``j ≥ e``."""
    match part:
        case Apply("le" | "lt" | "ge" | "gt" as operator, (Index("j"), limit)) if (
            limit.kind is Kind.INT and Index("j") not in symbols(limit)
        ):
            strict = {"lt": -1, "gt": 1}.get(operator, 0)
            return "upper" if operator in ("le", "lt") else "lower", simplify(limit + strict)
    return None


FUSE = Pass(
    name="fuse",
    summary="State scale, mask and bias in canonical form, for a fused operator; the same function.",
    contract="exact",
    phases=("prefill", "decode", "training"),
    options=FuseOptions,
    why_not=why_not,
    apply=apply,
)
