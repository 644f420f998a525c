"""Triton's hash of itself is computed beside other work, once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from attncompile.codegen.triton import ready

cache = pytest.importorskip("triton.runtime.cache")


@pytest.fixture
def callers(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The threads that asked for Triton's key."""
    found: list[threading.Thread] = []
    monkeypatch.setattr(ready, "_threads", [])
    monkeypatch.setattr(cache, "triton_key", lambda: found.append(threading.current_thread()))
    return found


def test_the_key_is_found_once_and_in_another_thread(
    callers: list[threading.Thread], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ready, "DEVICES", (str(tmp_path / "missing"), str(tmp_path)))
    ready.get_ready()
    ready.get_ready()
    ready.wait_until_ready()
    assert len(callers) == 1 and callers[0] is not threading.main_thread()


def test_without_a_gpu_nothing_begins(
    callers: list[threading.Thread], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ready, "DEVICES", (str(tmp_path / "missing"),))
    ready.get_ready()
    ready.wait_until_ready()
    assert not callers


def test_what_fails_is_left_to_the_first_call(
    callers: list[threading.Thread], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail() -> None:
        raise OSError("no such file")

    monkeypatch.setattr(cache, "triton_key", fail)
    monkeypatch.setattr(ready, "DEVICES", (str(tmp_path),))
    ready.get_ready()
    ready.wait_until_ready()
