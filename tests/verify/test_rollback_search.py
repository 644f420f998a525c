"""Which sites have to go back, among sites of which some fail in known ways."""

from __future__ import annotations

import math
from collections.abc import Collection

import pytest

from attncompile.convert.rollback import ATTEMPTS, Fails, Found, failing_sites

SITES = [f"layers.{number}" for number in range(30)]
APART = {site: number for number, site in enumerate(SITES)}
"""Every site of a kind of its own."""


class Model:
    """Counts how often it is tried, and keeps what was right."""

    def __init__(self, *bad: Collection[str]) -> None:
        self.bad, self.right, self.tried = bad, set[frozenset[str]](), 0

    def __call__(self, sites: frozenset[str]) -> str | None:
        """Wrong where all sites of one of the groups are rewritten."""
        self.tried += 1
        wrong = next((group for group in self.bad if sites >= set(group)), None)
        if wrong is None:
            self.right.add(sites)
        return None if wrong is None else f"{' and '.join(wrong)} differ"


def found(model: Fails, kinds: dict[str, int], attempts: int = ATTEMPTS) -> Found:
    return failing_sites(kinds, "it differs", model, attempts)


@pytest.mark.parametrize("place", range(30))
def test_one_site_is_found_by_halving(place: int) -> None:
    model = Model([SITES[place]])
    made = found(model, APART)
    assert made.sites is not None and list(made.sites) == [SITES[place]]
    assert made.attempts == model.tried <= 2 + math.ceil(math.log2(30))
    assert SITES[place] in next(iter(made.sites.values())) or place == 29  # the last is told apart without a try


@pytest.mark.parametrize("places", [(0, 1), (4, 22), (3, 15, 29)])
def test_several_sites_are_found_and_the_rest_was_tried(places: tuple[int, ...]) -> None:
    model = Model(*([SITES[place]] for place in places))
    made = found(model, APART)
    assert made.sites is not None and set(made.sites) == {SITES[place] for place in places}
    assert frozenset(SITES) - set(made.sites) in model.right


def test_two_sites_that_fail_together_alone_lose_one_of_them() -> None:
    made = found(Model([SITES[5], SITES[20]]), APART)
    assert made.sites is not None and list(made.sites) == [SITES[20]]


def test_the_second_of_a_kind_takes_its_kind_along() -> None:
    kinds = {site: place % 3 for place, site in enumerate(SITES)}
    model = Model(*([site] for site in SITES if kinds[site] == 1))
    made = found(model, kinds)
    assert made.sites is not None and set(made.sites) == {site for site in SITES if kinds[site] == 1}
    assert made.attempts < 2 * (1 + math.ceil(math.log2(30))) + 2
    assert "written as layers.1 and layers.4 are" in made.sites["layers.28"]


def test_all_of_one_kind() -> None:
    made = found(Model(*([site] for site in SITES)), dict.fromkeys(SITES, 0))
    assert made.sites is not None and set(made.sites) == set(SITES)


def test_what_fails_without_any_site_is_not_theirs() -> None:
    model = Model(())
    assert found(model, APART) == Found(None, 1)


@pytest.mark.parametrize("attempts", range(12))
@pytest.mark.parametrize("places", [(3,), (3, 15, 29)])
def test_when_attempts_are_spent_what_is_left_was_tried(attempts: int, places: tuple[int, ...]) -> None:
    model = Model(*([SITES[place]] for place in places))
    made = found(model, APART, attempts)
    assert model.tried == made.attempts <= attempts and made.sites is not None
    assert {SITES[place] for place in places} <= set(made.sites)
    left = frozenset(SITES) - set(made.sites)
    assert left in model.right or (not attempts and not left)


def test_the_words_of_a_site_that_was_not_told_apart() -> None:
    """Of four the second fails: with every number of attempts a site says just what was and was not tried."""
    sites = {site: number for number, site in enumerate("abcd")}

    def words(attempts: int, earlier: int = 0) -> dict[str, str]:
        made = failing_sites(sites, "it differs", Model("b"), attempts, earlier)
        assert made.sites is not None
        return {site: said.removeprefix("it differs ").removeprefix("b differ ") for site, said in made.sites.items()}

    one_of_four = "(for this site or one of 3 other sites: {} did not tell which)"
    assert words(0) == dict.fromkeys("abcd", one_of_four.format("no attempt"))
    assert words(1) == dict.fromkeys("abcd", one_of_four.format("1 attempt"))
    behind = "(for a site before it, without which it was not tried: {} did not find that)"
    one_of_two = "(for this site or one other site: {} did not tell which)"
    assert words(2) == dict.fromkeys("ab", one_of_two.format("2 attempts")) | dict.fromkeys(
        "cd", behind.format("2 attempts")
    )
    later = "(for b, without which this site was not tried: 3 attempts came before)"
    assert words(3) == {"b": "b differ", "c": later, "d": later}
    assert words(4) == {"b": "b differ"}
    # the limit holds for all searches of a conversion, and so does what is said of it
    assert words(24, 24) == dict.fromkeys("abcd", one_of_four.format("24 attempts"))
    assert words(24, 22) == dict.fromkeys("ab", one_of_two.format("24 attempts")) | dict.fromkeys(
        "cd", behind.format("24 attempts")
    )
