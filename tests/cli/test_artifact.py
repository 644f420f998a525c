"""The folder of a conversion: all of it or nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from attncompile.convert.artifact import new_folder
from attncompile.frontends.errors import InputError


def write(out: Path, text: str = "new", *, overwrite: bool = False) -> None:
    with new_folder(out, overwrite=overwrite) as folder:
        (folder / "plan.json").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_appears_whole_and_readable(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with new_folder(out) as folder:
        (folder / "plan.json").write_text("new")
        (folder / "plan.json").chmod(0o600)
        assert not out.exists()
        assert folder.parent == out.parent
    assert names(out) == ["plan.json"]
    assert names(out.parent) == ["b"]
    assert out.stat().st_mode & 0o777 == 0o755
    assert (out / "plan.json").stat().st_mode & 0o777 == 0o644


ENDS = (ValueError("x"), KeyboardInterrupt(), SystemExit(143), MemoryError())


@pytest.mark.parametrize("error", ENDS, ids=repr)
def test_nothing_is_left_of_a_failure(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), new_folder(tmp_path / "a" / "b") as folder:
        (folder / "plan.json").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(ValueError, match="x"), new_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "plan.json").write_text("half")
        raise ValueError("x")
    assert (tmp_path / "out" / "plan.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_an_existing_folder_is_kept_unless_asked(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(InputError, match="it exists already"):
        write(tmp_path / "out")
    write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "plan.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_only_a_conversion_is_ever_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="was not written by a conversion"):
        write(tmp_path / "out", overwrite=True)
    assert names(tmp_path / "out") == ["thesis.tex"]


def test_an_empty_folder_may_be_replaced_but_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", overwrite=True)
    (tmp_path / "file").write_text("text")
    with pytest.raises(InputError, match="only a folder"):
        write(tmp_path / "file", overwrite=True)
    with pytest.raises(InputError, match="a part of this path is a file"):
        write(tmp_path / "file" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_no_permission_is_said_before_any_work(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="no permission to write"), new_folder(tmp_path / "out"):
            pytest.fail("the work began")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EACCES, "no permission to write"),
        (errno.ENOSPC, "no space is left"),
        (errno.EROFS, "read-only"),
    ],
)
def test_what_the_disk_refuses_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(InputError, match=says):
        write(tmp_path / "out")
    assert names(tmp_path) == []


def test_a_full_disk_in_the_middle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no space is left"), new_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []
