"""Damaged ONNX files: each is read, or refused in one sentence, and none takes the process down."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import onnx
import pytest

import attncompile
from attncompile import CaptureError, InputError
from attncompile.frontends.onnx_file import read_onnx_file
from tests.frontends.damage import Change, damaged, dangling, few_bytes, other_version
from tests.frontends.damaged_sources import encoder


@pytest.fixture(scope="module")
def whole() -> onnx.ModelProto:
    return encoder()


def crashes(whole: onnx.ModelProto, folder: Path, seeds: range) -> dict[int, str]:
    """What went wrong in another way than by a sentence for a person, by seed."""
    found: dict[int, str] = {}
    for seed in seeds:
        file = folder / "model.onnx"
        file.write_bytes(damaged(whole, random.Random(seed)))
        try:
            attncompile.lift(file)
        except (InputError, CaptureError):
            pass
        except Exception as error:
            found[seed] = f"{type(error).__name__}: {error}"[:200]
    return found


def test_the_file_itself_is_read(whole: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(whole, tmp_path / "model.onnx")
    assert attncompile.lift(tmp_path / "model.onnx").count("lifted") == 2


def test_damage_is_refused_in_a_sentence(whole: onnx.ModelProto, tmp_path: Path) -> None:
    assert crashes(whole, tmp_path, range(150)) == {}


def other_output(model: onnx.ModelProto, draw: random.Random) -> None:
    model.graph.output[0].name = "missing"


def many_axes(model: onnx.ModelProto, draw: random.Random) -> None:
    """More than an array of NumPy can have; the elements stay as many as they are."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.HasField("raw_data"))
    tensor.dims.extend([1] * 70)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dangling, "not a valid ONNX model: .*nothing_there"),
        (other_version, "not a valid ONNX model|holds no graph"),
        (other_output, "not a valid ONNX model|cannot be read"),
        (few_bytes, r"holds 3 bytes, where its shape says \d+"),
        (many_axes, r"has 7\d axes, and no array here has more than 64"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_sentence_names_the_fault(whole: onnx.ModelProto, change: Change, said: str, tmp_path: Path) -> None:
    model = copy.deepcopy(whole)
    change(model, random.Random(0))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match=said):
        read_onnx_file(tmp_path / "model.onnx")


@pytest.mark.parametrize("size", [2**40, 2**62])
def test_a_small_file_does_not_ask_for_much_memory(whole: onnx.ModelProto, size: int, tmp_path: Path) -> None:
    model = copy.deepcopy(whole)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.dims)
    tensor.dims[0] = size
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match=f"tensor {tensor.name!r} holds"):
        read_onnx_file(tmp_path / "model.onnx")
