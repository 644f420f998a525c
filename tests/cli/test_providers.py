"""``bench``, and ``--provider`` of every command: what is told, and what is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from attncompile.convert.providers import kernels_of, named_provider, session_providers, short_provider
from attncompile.convert.runtime import session
from attncompile.frontends.errors import InputError
from tests.cli.conftest import Run

ABSENT = next(name for name in onnxruntime.get_all_providers() if name not in onnxruntime.get_available_providers())


def write_model(file: Path, name: str = "input_ids", rows: int = 40) -> Path:
    """A table looked up at ids ``[batch, length]``, with learned positions for ``rows`` tokens."""
    numbers = np.random.default_rng(0)
    tables = [
        numpy_helper.from_array(numbers.standard_normal((rows, 8)).astype(np.float32), title)
        for title in ("table", "positions")
    ]
    nodes = [
        helper.make_node("Gather", ["table", name], ["states"]),
        helper.make_node("Shape", [name], ["size"], start=1, end=2),
        helper.make_node("Slice", ["positions", "zero", "size"], ["placed"]),
        helper.make_node("Add", ["states", "placed"], ["out"]),
    ]
    zero = numpy_helper.from_array(np.array([0]), "zero")
    ids = helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", "length", 8])
    graph = helper.make_graph(nodes, "g", [ids], [out], [*tables, zero])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), file)
    return file


def write_cached(file: Path) -> Path:
    """Keys of a cache with new ones behind them."""
    past = helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, ["batch", 2, "past", 4])
    new = helper.make_tensor_value_info("keys", TensorProto.FLOAT, ["batch", 2, "length", 4])
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "past + length"])
    whole = helper.make_tensor_value_info("present.0.key", TensorProto.FLOAT, ["batch", 2, "past + length", 4])
    nodes = [
        helper.make_node("Concat", [past.name, new.name], ["keys of all"], axis=2),
        helper.make_node("Cast", ["attention_mask"], ["seen"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["seen", "axes"], ["column"]),
        helper.make_node("Mul", ["keys of all", "column"], [whole.name]),
    ]
    axes = numpy_helper.from_array(np.array([1, 3]), "axes")
    graph = helper.make_graph(nodes, "g", [past, new, mask], [whole], [axes])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), file)
    return file


def test_models_are_timed_beside_each_other(run: Run, tmp_path: Path) -> None:
    one, other = write_model(tmp_path / "one.onnx"), write_model(tmp_path / "other.onnx", rows=64)
    shapes = ["--shape", "2x3", "--shape", "1x16", "--seconds", "0.1", "--threads", "1"]
    ran = run("bench", one, other, *shapes, "--json", tmp_path / "times.json")
    assert ran.code == 0
    head, *rows, _, last = ran.out.splitlines()
    assert head.split() == ["size", "2x3", "1x16"]
    assert [row.split()[0] for row in rows] == [str(one), str(other)]
    assert "x)" not in rows[0] and rows[1].count("x)") == 2
    assert "interleaved runs on CPUExecutionProvider" in last
    stored = json.loads((tmp_path / "times.json").read_text())
    assert stored["schema"] == 1 and stored["threads"] == 1
    assert [(call["batch"], call["tokens"]) for call in stored["calls"]] == [(2, 3), (1, 16)]
    assert set(stored["calls"][0]["milliseconds"]) == {str(one), str(other)}


def test_a_model_with_a_cache_is_timed_behind_it(run: Run, tmp_path: Path) -> None:
    ran = run("bench", write_cached(tmp_path / "m.onnx"), "--past", "5", "--shape", "2x1", "--seconds", "0.1")
    assert ran.code == 0 and "behind 5 cached positions" in ran.out


BENCH = {
    "no model": ([], "Missing argument"),
    "nowhere": (["nowhere.onnx"], "no such file or folder"),
    "text": (["a.txt"], "not an ONNX model"),
    "folder": (["."], "this folder is no conversion"),
    "twice": (["one.onnx", "one.onnx"], "a model is given twice"),
    "shape": (["one.onnx", "--shape", "16"], "--shape '16' is not BATCHxTOKENS"),
    "empty shape": (["one.onnx", "--shape", "0x4"], "is not BATCHxTOKENS"),
    "too long": (["one.onnx", "--shape", "1x41"], "it does not run at 1x41"),
    "other inputs": (["one.onnx", "tokens.onnx", "--shape", "1x4"], "it takes 'tokens', which one.onnx does not"),
    "provider": (["one.onnx", "--provider", "gpu"], "ONNX Runtime has no provider 'gpu'"),
    "absent": (["one.onnx", "--provider", ABSENT], f"{ABSENT} is not in the installed ONNX Runtime"),
    "threads": (["one.onnx", "--threads", "0"], "--threads"),
}


@pytest.mark.parametrize("case", BENCH)
def test_a_mistake_is_one_sentence(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(Path("one.onnx"))
    write_model(Path("tokens.onnx"), "tokens")
    Path("a.txt").write_text("text")
    arguments, says = BENCH[case]
    ran = run("bench", *arguments)
    assert ran.code == 2
    assert says in ran.error()


@pytest.mark.parametrize("command", ["inspect", "convert", "verify", "bench"])
def test_every_command_names_the_providers_that_there_are(run: Run, tmp_path: Path, command: str) -> None:
    model = write_model(tmp_path / "one.onnx")
    plan = {"schema": 1, "model": "m", "target": "onnx", "provider": "cpu", "sites": []}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    out = ["-o", tmp_path / "out"] if command == "convert" else []
    said = run(command, tmp_path if command == "verify" else model, *out, "--provider", ABSENT).error()
    if command == "verify":  # what is damaged is said first
        assert "certificate.json" in said
        return
    assert f"{ABSENT} is not in the installed ONNX Runtime" in said
    assert all(name in said for name in onnxruntime.get_available_providers())
    assert not (tmp_path / "out").exists()


def test_inspect_tells_the_operator_that_a_site_would_become(run: Run, models: str, tmp_path: Path) -> None:
    ran = run("inspect", models + "causal", "--provider", "CPUExecutionProvider", "--json", tmp_path / "sites.json")
    assert ran.code == 0
    assert "\non CPUExecutionProvider\n  2 sites would become " in ran.out
    sites = json.loads((tmp_path / "sites.json").read_text())["sites"]
    assert all(site["operator"] and site["operator_reason"] for site in sites)
    assert "operator" not in json.loads(run("inspect", models + "causal", "--json", "-").out)["sites"][0]


def test_a_refused_site_would_stay(run: Run, models: str) -> None:
    ran = run("inspect", models + "over_queries", "--provider", "cpu")
    assert "  1 site would stay: " in ran.out


def test_a_lone_file_has_no_certificate(run: Run, tmp_path: Path) -> None:
    assert "no plan.json in it" in run("verify", write_model(tmp_path / "model.onnx")).error()


def test_providers_have_short_names() -> None:
    assert named_provider("cpu") == named_provider("cpuexecutionprovider") == "CPUExecutionProvider"
    assert short_provider("CUDAExecutionProvider") == "cuda" and short_provider("cpu") == "cpu"
    assert session_providers("CPUExecutionProvider") == ("CPUExecutionProvider",)
    assert kernels_of("TensorrtExecutionProvider") == "cuda" and kernels_of("XnnpackExecutionProvider") == "cpu"
    with pytest.raises(InputError, match="no provider 'tpu'"):
        named_provider("tpu")


def test_a_provider_that_does_not_load_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime with CUDA but without its libraries goes on with the CPU, and says so in its log alone."""
    whole = onnxruntime.InferenceSession

    def without_libraries(*given: Any, providers: list[str], provider_options: list[Any], **more: Any) -> Any:
        assert providers[0] == "CUDAExecutionProvider" and provider_options[0] == {"use_tf32": "0"}
        return whole(*given, providers=["CPUExecutionProvider"], **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", without_libraries)
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.raises(InputError, match="CUDAExecutionProvider cannot be used here"):
        session(write_model(tmp_path / "model.onnx"), "cuda")
