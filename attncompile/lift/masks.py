"""Masks in logits: telling which positions are hidden from what the visible ones score."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from attncompile.ir import Expr, simplify
from attncompile.ir.expr import SCORE, TRUE, Apply, Const, apply, conjunction, loads, substitute, symbols, walk

HIDDEN = -1e4
"""A logit at or below this hides a position: ``exp`` of the distance to any ordinary logit is 0 in every
float type.
"""

ABSORBING = -1e30
"""Added to a score, a number at or below this swallows it in float32 and float64."""


def _hides(value: Expr) -> bool:
    return isinstance(value, Const) and not isinstance(value.value, bool) and value.value <= HIDDEN


@functools.lru_cache(maxsize=256)  # the layers of a model share their masks
def split_mask(logits: Expr, numbers: frozenset[str] = frozenset()) -> tuple[Expr, Expr, Expr]:
    """Write logits as ``where(mask, score, fill)``, exactly.

    Args:
        logits: over the score, positions and loads.
        numbers: tensors whose numbers may be as low as those that hide
            (:func:`attncompile.lift.loaded.loaded_numbers`): a constant does not swallow them.

    Returns:
        score, mask and fill; the fill is −∞ when nothing is masked. A hidden position keeps the value the
        model gives
        it: −∞, a large negative constant, or the score plus one.
    """
    logits = _hidden_last(logits)
    score, parts = _peeled(logits, _peel)
    if not parts:
        return logits, TRUE, Const(-math.inf)
    mask = simplify(conjunction(parts))
    return score, mask, _fill(logits, parts, numbers)


@functools.lru_cache(maxsize=256)
def split_zeros(logits: Expr) -> tuple[Expr, Expr, Expr]:
    """Write logits that are weights themselves as ``where(mask, score, 0)``, exactly.

    A condition hides a position where its other branch makes the whole expression zero.

    Returns:
        score, mask and fill; the fill is 0 where anything is masked.
    """
    score, parts = _peeled(logits, _peel_zero)
    if not parts:
        return logits, TRUE, Const(-math.inf)
    return score, simplify(conjunction(parts)), Const(0.0)


def _peeled(logits: Expr, peel: Callable[[Expr], tuple[Expr, Expr] | None]) -> tuple[Expr, list[Expr]]:
    """What is left of logits when no more conditions can be peeled off, and the conditions."""
    parts: list[Expr] = []
    while (found := peel(logits)) is not None:
        mask, logits = found
        parts.append(mask)
    return logits, parts


def _hidden_last(expr: Expr) -> Expr:
    """A choice one of whose cases is masked, as a mask of the choice: pieces of one row may be masked apart.

    ``where(c, where(m, x, −∞), y)`` is ``where(m or not c, where(c, x, y), −∞)``.
    """
    if _masked(expr) is not None:
        return expr
    match expr:
        case Apply("where", (condition, then, otherwise)):
            then, otherwise = _hidden_last(then), _hidden_last(otherwise)
            negated = simplify(apply("not", condition))
            if (masked := _masked(then)) is not None:
                mask, shown, hidden = masked
                rest = _hidden_last(apply("where", condition, shown, otherwise))
                return simplify(apply("where", apply("or", mask, negated), rest, hidden))
            if (masked := _masked(otherwise)) is not None:
                mask, shown, hidden = masked
                rest = apply("where", condition, then, shown)
                return simplify(apply("where", apply("or", mask, condition), rest, hidden))
    return expr


def _masked(expr: Expr) -> tuple[Expr, Expr, Expr] | None:
    """Mask, visible and hidden value of a choice that hides; ``None`` for any other expression."""
    match expr:
        case Apply("where", (condition, shown, hidden)) if _hides(hidden) and not _hides(shown):
            return condition, shown, hidden
        case Apply("where", (condition, hidden, shown)) if _hides(hidden) and not _hides(shown):
            return simplify(apply("not", condition)), shown, hidden
    return None


def _peel_zero(expr: Expr) -> tuple[Expr, Expr] | None:
    """One condition that makes logits zero, and the expression where it does not."""
    for node in walk(expr):
        match node:
            case Apply("where", (condition, then, otherwise)) if SCORE not in symbols(condition):
                for hidden, shown, visible in (
                    (otherwise, then, condition),
                    (then, otherwise, simplify(apply("not", condition))),
                ):
                    if isinstance(hidden, Const) and _is_zero(substitute(expr, {node: hidden})):
                        return visible, simplify(substitute(expr, {node: shown}))
    return None


def _is_zero(expr: Expr) -> bool:
    """Whether an expression is zero for any finite score: a factor is, or it is a constant."""
    match expr:
        case Apply("mul", arguments):
            return any(_is_zero(argument) for argument in arguments)
        case Apply("where", (_, then, otherwise)):
            return _is_zero(then) and _is_zero(otherwise)
    found = simplify(expr)
    return isinstance(found, Const) and found.value == 0


def _peel(expr: Expr) -> tuple[Expr, Expr] | None:
    """One condition that hides positions, and the expression where it holds."""
    masked = _masked(expr)
    if masked is not None:
        return masked[:2]
    match expr:
        case Apply("add", terms):
            for number, term in enumerate(terms):
                found = _peel(_hidden_last(term))
                # a term that hides without being the score: where(visible, 0 or a bias, hidden)
                if found is not None:
                    rest = [t for n, t in enumerate(terms) if n != number]
                    return found[0], simplify(apply("add", *rest, found[1]))
    return None


def swallows(logits: Expr, numbers: frozenset[str] = frozenset()) -> bool:
    """Whether a hidden logit is the score plus a finite number that swallows it, where :func:`split_mask` gives that
    number alone.

    The values are the same, their gradients are not: that of a sum passes to the score, though rounding has left
    nothing of it. It shows in rows all of whose positions are hidden; elsewhere a hidden position has the weight 0.
    """
    logits = _hidden_last(logits)
    _, parts = _peeled(logits, _peel)
    if not parts:
        return False
    fill = _fill(logits, parts, numbers)
    return isinstance(fill, Const) and math.isfinite(fill.value) and SCORE in symbols(_hidden_logits(logits, parts))


def _fill(logits: Expr, parts: list[Expr], numbers: frozenset[str]) -> Expr:
    """What the logits are where the mask does not hold, without a score that is swallowed."""
    hidden = _hidden_logits(logits, parts)
    absorbed = _absorbed(hidden, numbers)
    return hidden if len(parts) > 1 and symbols(absorbed) else absorbed


def _hidden_logits(logits: Expr, parts: list[Expr]) -> Expr:
    """What the logits are where the mask does not hold."""
    return logits if len(parts) > 1 else simplify(_where_false(logits, parts[0]))


def _where_false(logits: Expr, condition: Expr) -> Expr:
    """The logits where a condition does not hold; of several alternatives none does."""
    parts = condition.children if isinstance(condition, Apply) and condition.operator == "or" else ()
    false = {condition, *parts}
    true = {simplify(apply("not", part)) for part in false}

    def resolved(expr: Expr) -> Expr:
        match expr:
            case Apply("where", (found, then, otherwise)):
                if found in false:
                    return resolved(otherwise)
                if found in true:
                    return resolved(then)
        children = expr.children
        return expr.with_children(tuple(resolved(c) for c in children)) if children else expr

    return resolved(logits)


def _absorbed(expr: Expr, numbers: frozenset[str]) -> Expr:
    """``s + −3e38`` is ``−3e38``, and anything plus −∞ is −∞ (scores are finite).

    ``m + −3e38`` is not −3e38 where ``m`` may be as low: in a row all of whose visible keys a loaded mask hides, what
    is hidden once weighs as much as they do, and what is hidden twice nothing.
    """
    if isinstance(expr, Apply) and expr.operator == "add":
        for term in expr.arguments:
            if isinstance(term, Const) and term.value <= ABSORBING:
                kept = math.isfinite(term.value) and any(load.tensor in numbers for load in loads(expr))
                return expr if kept else term
    return expr


def scale_score(expr: Expr, factor: Expr) -> Expr:
    """Put a factor in front of every raw score."""
    return expr if factor == Const(1.0) else substitute(expr, {SCORE: apply("mul", factor, SCORE)})
