"""Passes as text: what is read, and what is said about what cannot be."""

from __future__ import annotations

import pytest

from attncompile.passes import Options, Pass, all_passes, described, make_call, parse_passes
from attncompile.passes.registry import register


@pytest.mark.parametrize(("text", "calls"), [
    ("", []),
    ("fuse", ["fuse"]),
    ("fuse()", ["fuse"]),
    ("fuse,sparsify.window(size=12,sinks=0)", ["fuse", "sparsify.window(size=12, sinks=0)"]),
    ("  fuse ,\n sparsify.window( size = 12 )", ["fuse", "sparsify.window(size=12)"]),
    ("sparsify.window(symmetric=false)", ["sparsify.window(symmetric=false)"]),
    ("sparsify.window(symmetric=none)", ["sparsify.window"]),
    ("linearize.decay(first=4,feature=elu1)", ["linearize.decay(first=4.0, feature=elu1)"]),
])
def test_read_and_printed(text: str, calls: list[str]) -> None:
    found = parse_passes(text)
    assert [str(call) for call in found] == calls
    assert parse_passes(", ".join(calls)) == found


@pytest.mark.parametrize(("text", "message"), [
    ("fus", r"unknown pass 'fus' \(did you mean 'fuse'\?\); the passes are fuse, fuse.rotary, sparsify.window"),
    ("sparsify.windows", r"unknown pass 'sparsify.windows' \(did you mean 'sparsify.window'\?\)"),
    ("zzz", r"unknown pass 'zzz'; the passes are"),
    ("sparsify.window(sise=3)", r"no option 'sise' \(did you mean 'size'\?\); its options are size, sinks"),
    ("fuse(x=1)", "fuse has no option 'x'; it has none"),
    ("sparsify.window(size=abc)", "sparsify.window: size must be an integer, got 'abc'"),
    ("sparsify.window(size=1.5)", "sparsify.window: size must be an integer, got 1.5"),
    ("sparsify.window(size=true)", "sparsify.window: size must be an integer, got True"),
    ("sparsify.window(size=0)", "sparsify.window: size must be at least 1, got 0"),
    ("sparsify.window(sinks=-1)", "sparsify.window: sinks must be at least 0, got -1"),
    ("quantize.int8(smooth=3)", "quantize.int8: smooth must be true or false, got 3"),
    ("linearize.decay(first=0)", r"linearize.decay: first must be more than 0.0, got 0"),
    ("linearize.decay(feature=foo)", "feature must be one of 'identity', 'elu1' or 'relu', got 'foo'"),
    ("sparsify.window(size=1,size=2)", "the option 'size' is given twice"),
    ("sparsify.window(size)", "cannot read the option 'size'; write it as name=value"),
    ("fuse,", "end with a comma"),
    ("fuse fuse", "from column 1 on"),
    ("fuse, 3", "from column 6 on"),
    ("sparsify.window(size=1", "from column 1 on"),
])
def test_what_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_passes(text)


class Needed(Options):
    word: str


def test_a_missing_option() -> None:
    fuse = all_passes()["fuse"]
    rewrite = Pass("needs", "Need.", "exact", (), Needed, fuse.why_not, fuse.apply)
    with pytest.raises(ValueError, match="needs needs the option 'word'"):
        make_call(rewrite, {})
    with pytest.raises(ValueError, match="option 'word' of needs has no description"):
        register({}, rewrite, "elsewhere")


def test_every_pass_is_documented() -> None:
    for rewrite in all_passes().values():
        assert rewrite.summary.endswith(".") and rewrite.apply.__doc__ and rewrite.why_not.__doc__
        assert all(description for _, _, description in described(rewrite))


def test_registering() -> None:
    fuse = all_passes()["fuse"]
    with pytest.raises(ValueError, match="there is already a pass 'fuse'"):
        register({"fuse": fuse}, fuse, "elsewhere")
    with pytest.raises(ValueError, match="elsewhere is str, not"):
        register({}, "fuse", "elsewhere")
