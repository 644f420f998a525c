"""Small checkpoints that several conversions start from, and their exports, made once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from attncompile.convert import onnx as conversion
from tests.backend.test_backend import small_bert
from tests.e2e.exports import remembering


@pytest.fixture(scope="package", autouse=True)
def exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What PyTorch's exporter gave for models of these tests, in a folder that all workers share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exports"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "export_onnx", remembering(conversion.export_onnx, folder))
        yield folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers."""
    folder = tmp_path_factory.mktemp("checkpoints") / "bert"
    small_bert().save_pretrained(folder)
    return folder
