"""Small checkpoints that several conversions start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.backend.test_backend import small_bert


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers."""
    folder = tmp_path_factory.mktemp("checkpoints") / "bert"
    small_bert().save_pretrained(folder)
    return folder
