"""Every foreseeable mistake: one sentence, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers

from attncompile import cli
from tests.cli.conftest import Run

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mistake:
    """What the user gave, and what the sentence must say. `make` writes to a folder and returns arguments."""

    name: str
    make: Callable[[Path], list[object]]
    says: str


def empty_folder(folder: Path) -> list[object]:
    (folder / "model").mkdir()
    return ["inspect", folder / "model"]


def folder_of_onnx_files(folder: Path) -> list[object]:
    for name in ("second", "first"):
        (folder / f"{name}.onnx").write_bytes(b"")
    return ["inspect", folder]


def converted_folder(folder: Path) -> list[object]:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    (folder / "model.onnx").write_bytes(b"")
    return ["inspect", folder]


def broken_config(folder: Path) -> list[object]:
    (folder / "config.json").write_text("{")
    return ["inspect", folder]


def unknown_architecture(folder: Path) -> list[object]:
    (folder / "config.json").write_text(json.dumps({"model_type": "hyperattention9000"}))
    return ["inspect", folder]


def only_pickle(folder: Path) -> list[object]:
    config = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 8, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 10}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
    return ["inspect", folder]


def not_onnx(folder: Path) -> list[object]:
    (folder / "model.onnx").write_bytes(b"this is no protobuf")
    return ["inspect", folder / "model.onnx"]


def truncated_onnx(folder: Path) -> list[object]:
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [made])
    text = onnx.ModelProto.SerializeToString(helper.make_model(graph))
    (folder / "model.onnx").write_bytes(text[: len(text) - 9])
    return ["inspect", folder / "model.onnx"]


def model_file(function: str) -> Callable[[Path], list[object]]:
    def make(folder: Path) -> list[object]:
        from tests.cli.conftest import MODELS

        (folder / "models.py").write_text(MODELS)
        return ["inspect", f"{folder / 'models.py'}:{function}"]

    return make


def few_positions(folder: Path) -> list[object]:
    """The command for a model of 60 positions, with one more asked for."""
    sizes = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=16, max_position_embeddings=60)
    transformers.BertModel(config).save_pretrained(folder / "model")
    return ["inspect", folder / "model", "--seq", "61"]


MISTAKES = (
    Mistake("no such path", lambda folder: ["inspect", folder / "nowhere"], "no such file or folder"),
    Mistake("folder without config", empty_folder, "no config.json in this folder"),
    Mistake("folder of ONNX files", folder_of_onnx_files, "or give a file in this one, such as first.onnx"),
    Mistake("broken config", broken_config, "not valid JSON"),
    Mistake("unknown architecture", unknown_architecture, "unknown architecture"),
    Mistake("only pickle", only_pickle, "--allow-pickle"),
    Mistake("not ONNX", not_onnx, "not an ONNX model"),
    Mistake("truncated ONNX", truncated_onnx, "not an ONNX model, or a truncated one"),
    Mistake("no such function", model_file("nothing"), "no function 'nothing'"),
    Mistake("no model", model_file("not_a_model"), "return a tuple (torch.nn.Module, tuple, dict)"),
    Mistake("memory", model_file("out_of_memory"), "out of memory"),
    Mistake("GPU memory", model_file("huge"), "CUDA out of memory"),
    Mistake("empty model", lambda folder: ["inspect", ""], "an empty path: ''; name a file or a folder"),
    Mistake("empty folder to write", lambda folder: ["convert", folder, "-o", ""], "'--out': an empty path"),
    Mistake("empty folder to verify", lambda folder: ["verify", ""], "'DIR': an empty path"),
    Mistake("empty model to time", lambda folder: ["bench", folder, ""], "'MODEL…': an empty path"),
    Mistake("empty text", lambda folder: ["convert", folder, "-o", folder, "--text", ""], "'--text': an empty path"),
    Mistake("JSON into an empty path", lambda folder: [*model_file("causal")(folder), "--json", ""], "an empty path"),
    Mistake("converted folder", converted_folder, "or give a file in this one, such as model.onnx"),
    Mistake("unknown word", lambda folder: ["inspect", folder, "--attn", "flash"], "'sdpa', 'eager'"),
    Mistake("not a number", lambda folder: ["inspect", folder, "--seq", "many"], "--seq"),
    Mistake("too small", lambda folder: ["inspect", folder, "--seq", "0"], "greater than or equal to 1"),
    Mistake("more positions than there are", few_positions, "the 60 positions (max_position_embeddings) of the model"),
    Mistake("unknown option", lambda folder: ["inspect", folder, "--sequence", "3"], "--sequence"),
    Mistake("unknown command", lambda folder: ["inspekt", folder], "Did you mean 'inspect'?"),
    Mistake("no model given", lambda folder: ["inspect"], "Missing argument 'MODEL'"),
    Mistake(
        "JSON into nowhere",
        lambda folder: [*model_file("causal")(folder), "--json", folder / "no" / "sites.json"],
        "cannot be written",
    ),
)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_one_sentence(run: Run, tmp_path: Path, mistake: Mistake) -> None:
    arguments = mistake.make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    ran = run(*arguments)
    assert ran.code == 2
    assert mistake.says in ran.error()
    left = [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts]
    assert left == before


def test_a_permitted_pickle_is_read(run: Run, tmp_path: Path) -> None:
    """The same checkpoint gets further with the option: now its tensors are looked at."""
    ran = run(*only_pickle(tmp_path), "--allow-pickle")
    assert ran.code == 2
    assert "hold none of the" in ran.error()


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_an_unreadable_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    (tmp_path / "model.onnx").chmod(0)
    ran = run("inspect", tmp_path / "model.onnx")
    assert ran.code == 2
    assert "no permission to read" in ran.error()


def test_debug_shows_the_traceback(run: Run, tmp_path: Path) -> None:
    ran = run("inspect", tmp_path / "nowhere", "--debug")
    assert ran.code == 2
    assert "Traceback" in ran.err
    assert ran.err.splitlines()[-1].startswith("error: no such file or folder")


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (MemoryError(), 2, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "out of memory"),
        (PermissionError(13, "Permission denied", "/somewhere"), 2, "Permission denied: /somewhere"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("division by zero"), 70, "defect of attncompile"),
        (ValueError("raised far below"), 70, "defect of attncompile"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_whatever_is_raised_is_one_sentence(
    run: Run, models: str, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, says: str
) -> None:
    monkeypatch.setattr("attncompile.api.lift_opened", raising(error))
    ran = run("inspect", models + "causal")
    assert ran.code == code
    assert says in ran.error()


def test_a_sentence_of_ours_may_have_details_below_it(run: Run) -> None:
    """The first line is for the user; the rest is for --debug."""
    try:
        exec(compile("raise ValueError('first\\nsecond')", f"{Path(cli.__file__).parent}/ir/x.py", "exec"))
    except ValueError as error:
        assert cli.explain(error) == (2, "first")


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m attncompile --help | true"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize("target", ["onnx", "torch"])
def test_nothing_to_convert_is_said_loudly_and_leaves_nothing(
    run: Run, models: str, tmp_path: Path, target: str
) -> None:
    ran = run("convert", models + "plain", "-o", tmp_path / "out", "--target", target)
    assert ran.code == 3
    assert "NO ATTENTION SITE FOUND" in ran.error()
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".py"] == []


def test_out_exists_before_anything_is_done(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    ran = run("convert", tmp_path / "nowhere", "-o", tmp_path / "out")
    assert ran.code == 2
    assert "it exists already" in ran.error()


def test_verify_of_something_else(run: Run, tmp_path: Path) -> None:
    ran = run("verify", tmp_path)
    assert ran.code == 2
    assert "no plan.json in it" in ran.error()
