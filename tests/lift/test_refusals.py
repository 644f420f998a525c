"""Why not: every refusal has a check, an edit and a place in the documents."""

from __future__ import annotations

import re
from pathlib import Path

import attncompile
from attncompile.ir import Refusal
from attncompile.lift.refusals import CHECKS, complete, failed_check
from attncompile.lift.render import render_site
from tests.lift.near_misses import NEAR_MISSES

ROOT = Path(attncompile.__path__[0]).parent
KIND = r"""(?:[Rr]efus(?:al|e)\(\s*(?:graph,\s*)?)"([a-z-]+)\""""


def kinds(*folders: str) -> set[str]:
    """The kinds of refusal that the code of some folders raises."""
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    return set(re.findall(KIND, "".join(file.read_text() for file in files)))


def test_every_kind_of_lifting_has_a_check_and_an_edit() -> None:
    assert kinds("attncompile/lift") == set(CHECKS)
    for check in CHECKS.values():
        assert check.asks and check.edit


def test_the_documents_list_every_kind() -> None:
    text = (ROOT / "docs" / "lifting.md").read_text()
    for kind in kinds("attncompile", "codegen", "passes", "kernels"):
        assert f"| `{kind}` |" in text, kind
    for kind, check in CHECKS.items():
        assert check.asks in text, kind


def test_a_refusal_keeps_its_own_hint() -> None:
    own = Refusal("wrong-axis", "because", hint="do this")
    assert complete(own) is own
    assert complete(Refusal("wrong-axis", "because")).hint == CHECKS["wrong-axis"].edit
    assert complete(Refusal("operator", "because")).hint == failed_check(Refusal("operator", "because")) == ""


def test_a_near_miss_says_what_was_found_what_failed_and_what_helps() -> None:
    form = next(form for form in NEAR_MISSES.rows if form.expected.get("kind") == "wrong-axis")
    (site,) = form.lift().sites
    assert site.nearest.startswith("softmax over axis ")
    lines = render_site(site).splitlines()
    assert [line[:9] for line in lines[1:]] == ["  found  ", "  why    ", "  check  ", "  hint   ", "  source "]
