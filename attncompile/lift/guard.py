"""Guards: what a score term would be if the tensors it loads held only zeros and ones.

Many models hide padding with a term such as ``(mask − 1)·3.4e38``. As long as nothing is known of the tensor that
term is a score, and a Spec states it as one. Under the fact ``mask[b, j] ∈ {0, 1}`` it is 0 where the mask is 1
and swallows the score where it is 0: a mask. The fact depends on data, so nothing is rewritten by it; densities
and pictures use it and say so.
"""

from __future__ import annotations

from dataclasses import dataclass

from attncompile.ir import Attend, Expr, Kind, Load, Spec, print_expr, simplify
from attncompile.ir.attend import HIDING_NOTHING
from attncompile.ir.expr import SCORE, TRUE, Apply, Const, apply, conjunction, loads, substitute, symbols, where
from attncompile.lift.masks import split_mask

VALUES = (0, 1)
"""What a tensor that says visible or hidden holds."""

_MOST_LOADS = 3
"""Loads of one term that are told apart: each doubles the cases."""


@dataclass(frozen=True)
class Fact:
    """``load ∈ {values}``: what must be checked at run time before a guard may be relied on."""

    load: Load
    values: tuple[int, ...] = VALUES

    @property
    def expr(self) -> Expr:
        """The fact as a truth value."""
        return apply("or", *(apply("eq", self.load, Const(value)) for value in self.values))

    def __str__(self) -> str:
        return f"{print_expr(self.load)} ∈ {{{', '.join(str(value) for value in self.values)}}}"


@dataclass(frozen=True)
class Guard:
    """A mask that holds under facts about data.

    Under the facts the logit is exactly what it is without ``terms`` where ``mask`` holds, and that plus something
    at or below −10⁴ elsewhere.

    Attributes:
        facts: about integer tensors; none where the terms load truth values alone.
        mask: truth value over ``b h i j`` and loads.
        terms: the terms of the score that the mask stands for.
    """

    facts: tuple[Fact, ...]
    mask: Expr
    terms: tuple[Expr, ...]

    def __str__(self) -> str:
        facts = " and ".join(str(fact) for fact in self.facts)
        return f"{f'if {facts}: ' if facts else ''}mask {print_expr(self.mask)}"


def find_guard(spec: Spec) -> Guard | None:
    """The mask that terms of a Spec's score are, if the tensors they load hold zeros and ones; else None.

    The proof goes through all cases: in a term that does not read the score, every load of an integer is replaced by
    each allowed value. What is left must be a choice between 0 and numbers at or below −10⁴.
    """
    attend = spec.attend()
    if attend is None or attend.norm.kind in HIDING_NOTHING:
        return None
    facts: dict[Fact, None] = {}
    masks, terms = [], []
    for term in _terms(attend):
        read = [load for load in loads(term) if load.element is not Kind.FLOAT]
        if SCORE in symbols(term) or not read or len(read) > _MOST_LOADS or len(read) < len(loads(term)):
            continue
        rest, mask, _ = split_mask(simplify(_in_cases(term, read)))
        if rest in (Const(0.0), Const(-0.0)) and mask != TRUE:
            masks.append(mask)
            terms.append(term)
            facts |= {Fact(load): None for load in read if load.element is Kind.INT}
    return Guard(tuple(facts), simplify(conjunction(masks)), tuple(terms)) if masks else None


def _terms(attend: Attend) -> tuple[Expr, ...]:
    score = attend.score
    return score.arguments if isinstance(score, Apply) and score.operator == "add" else ()


def _in_cases(term: Expr, read: list[Load]) -> Expr:
    """The term as a choice between what it is for each value of its loads."""
    if not read:
        return simplify(term)
    load, *others = read
    one, zero = (Const(True), Const(False)) if load.element is Kind.BOOL else (Const(1), Const(0))
    shown = load if load.element is Kind.BOOL else apply("ne", load, zero)
    return where(
        shown, _in_cases(substitute(term, {load: one}), others), _in_cases(substitute(term, {load: zero}), others)
    )
