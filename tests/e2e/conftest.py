"""Small checkpoints that several conversions start from, and their exports, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.backend.test_backend import small_bert


@pytest.fixture(scope="package", autouse=True)
def _exported_once(exports: Path) -> None:
    """Conversions of these tests read what others have exported."""


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers."""
    folder = tmp_path_factory.mktemp("checkpoints") / "bert"
    small_bert().save_pretrained(folder)
    return folder
