"""Which sites make a whole model fail, found by rewriting fewer of them; those go back to what they were.

Sites are tried in the order of the model. Where the first ``n`` are rewritten nothing may be wrong, and where the first
``m > n`` are something is; halving the distance finds the site that makes the difference. What is left without it is
tried again, until nothing is wrong. This needs no measure of how far a single site is off, so it finds what only shows
at the end of the model, whatever it is: other numbers, NaN, or a file that a runtime does not load.

Every result that is given has been tried. What is not found in the allowed number of attempts goes back with all that
was not cleared.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

ATTEMPTS = 24
"""Forms of a model that are tried at most: enough for three sites among thirty, or for all sites of two kinds."""

Fails = Callable[[frozenset[str]], str | None]
"""What is wrong where just these sites are rewritten, in words; ``None`` where nothing is."""


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        sites: what has to go back, with the reason; ``None`` where it fails without any site rewritten, too.
        attempts: how many forms were tried.
    """

    sites: Mapping[str, str] | None
    attempts: int


def failing_sites(
    kinds: Mapping[str, Hashable], said: str, fails: Fails, attempts: int = ATTEMPTS, made: int = 0
) -> Found:
    """The sites without which nothing is wrong any more.

    A second site of a kind takes the others of its kind along that were not cleared: where an operator is wrong in one
    place of a model, it is mostly wrong in all, and each would take as many attempts.

    Args:
        kinds: the rewritten sites, in the order of the model, each with what it is of; sites that are rewritten alike
            are of one kind.
        said: what is wrong where all of them are rewritten.
        fails: tries a form of the model.
        attempts: forms to try at most, those of earlier searches among them; made: how many these tried.
    """
    tries = _Tries(fails, attempts, made)
    if tries.left and tries(()) is not None:
        return Found(None, tries.made)
    rest, back, cleared = list(kinds), dict[str, str](), 0
    while True:
        low, high = cleared, len(rest)  # the first `low` are right, the first `high` are not
        while high - low > 1 and tries.left:
            middle = (low + high) // 2
            wrong = tries(rest[:middle])
            low, high, said = (middle, high, said) if wrong is None else (low, middle, wrong)
        if high - low > 1:
            others = "one other site" if high - low == 2 else f"one of {high - low - 1} other sites"
            unclear = f"{said} (for this site or {others}: {tries.spent} did not tell which)"
            behind = f"{said} (for a site before it, without which it was not tried: {tries.spent} did not find that)"
            found = dict.fromkeys(rest[low:high], unclear) | dict.fromkeys(rest[high:], behind)
            return Found(back | found, tries.made)
        culprit = rest[low]
        known = [site for site in back if kinds[site] == kinds[culprit]]
        back[culprit] = said
        if known:
            alike = [site for site in rest[low + 1 :] if kinds[site] == kinds[culprit]]
            back |= dict.fromkeys(alike, f"it is written as {known[0]} and {culprit} are, which fail: {said}")
        rest, cleared = [site for site in rest if site not in back], low
        if cleared == len(rest):
            return Found(back, tries.made)
        if not tries.left:
            unclear = f"{said} (for {culprit}, without which this site was not tried: {tries.spent} came before)"
            return Found(back | dict.fromkeys(rest[cleared:], unclear), tries.made)
        wrong = tries(rest)
        if wrong is None:
            return Found(back, tries.made)
        said = wrong


class _Tries:
    """Counts attempts, ``earlier`` of which were made before."""

    def __init__(self, fails: Fails, most: int, earlier: int) -> None:
        self._fails, self._most, self._earlier, self.made = fails, most, earlier, 0

    @property
    def left(self) -> int:
        return max(0, self._most - self._earlier - self.made)

    @property
    def spent(self) -> str:
        """All attempts so far, in words."""
        count = self._earlier + self.made
        return "no attempt" if not count else "1 attempt" if count == 1 else f"{count} attempts"

    def __call__(self, sites: list[str] | tuple[()]) -> str | None:
        self.made += 1
        return self._fails(frozenset(sites))


__all__ = ["ATTEMPTS", "Fails", "Found", "failing_sites"]
