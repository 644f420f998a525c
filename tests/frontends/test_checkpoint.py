"""Opening what a user points at: three kinds of target, inputs to try them on, every way to be wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

from attncompile.frontends.checkpoint import open_model, save_checkpoint
from attncompile.frontends.errors import InputError


def bert() -> transformers.BertModel:
    config = transformers.BertConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=3,
        vocab_size=97,
        max_position_embeddings=64,
        architectures=["BertModel"],
    )
    return transformers.BertModel(config)


@pytest.fixture(scope="module")
def _saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a small checkpoint, made once."""
    folder = tmp_path_factory.mktemp("bert")
    save_checkpoint(bert(), folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def folder(_saved: dict[str, bytes], tmp_path: Path) -> Path:
    """A small checkpoint of one's own to damage."""
    target = tmp_path / "tiny-bert"
    target.mkdir()
    for name, content in _saved.items():
        (target / name).write_bytes(content)
    return target


def edit_config(folder: Path, **changes: Any) -> None:
    """Change entries of config.json; None removes one."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def pickle_weights(folder: Path, content: Any = None) -> None:
    """Replace the safetensors file by a pickle."""
    weights = bert().state_dict() if content is None else content
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


# --- folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_folder_opens(folder: Path, attention: Any) -> None:
    opened = open_model(folder, attn_implementation=attention)
    assert (opened.kind, opened.name, opened.notes) == ("torch", "tiny-bert", ())
    assert type(opened.model) is transformers.BertModel
    assert opened.model.config._attn_implementation == attention
    assert not opened.model.training
    assert opened.tokenizer is None
    assert next(opened.model.parameters()).dtype == torch.float32
    args, kwargs = opened.example(3, 11)
    assert args == ()
    assert list(kwargs) == ["input_ids", "attention_mask", "token_type_ids", "use_cache"]
    assert opened.model(**kwargs)[0].shape == (3, 11, 24)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_without_sdpa_opens(tmp_path: Path, attention: Any) -> None:
    config = transformers.BloomConfig(vocab_size=16, hidden_size=16, n_layer=1, n_head=2)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    opened = open_model(tmp_path, attn_implementation=attention)
    assert opened.model.config._attn_implementation == "eager"
    assert opened.model(**opened.example(1, 5)[1])[0].shape == (1, 5, 16)


def test_another_dtype(folder: Path) -> None:
    model = open_model(folder, dtype=torch.bfloat16).model
    assert next(model.parameters()).dtype == torch.bfloat16


def test_a_saved_checkpoint_is_the_model_again(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "notes.txt").write_text("not part of a tokenizer")
    opened = open_model(folder)
    copy = tmp_path / "copy"
    save_checkpoint(opened.model, copy, tokenizer_from=folder)
    names = {file.name for file in copy.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= names
    assert "notes.txt" not in names
    kwargs = opened.example()[1]
    assert torch.equal(open_model(copy).model(**kwargs)[0], opened.model(**kwargs)[0])


def test_a_plain_module_with_shared_weights_is_saved(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    save_checkpoint(model, tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_a_pickle_is_read_on_request_as_tensors_only(folder: Path) -> None:
    expected = open_model(folder).model.state_dict()
    pickle_weights(folder, expected)
    found = open_model(folder, allow_pickle=True).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_tensors_that_are_missing_are_told(folder: Path) -> None:
    weights = {name: value for name, value in bert().state_dict().items() if "pooler" not in name}
    pickle_weights(folder, weights)
    (note,) = open_model(folder, allow_pickle=True).notes
    assert note.startswith("2 tensors are not in the checkpoint and are random: pooler.dense.bias")


def damaged(damage: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def prepare(folder: Path) -> Path:
        damage(folder)
        return folder

    return prepare


class Payload:
    """A pickle that would run code if it were read as one."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("code-that-was-run",)


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


BAD_FOLDERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no such path": (lambda folder: folder / "missing", r"no such file or folder: .*missing; check the sp"),
    "no config": (damaged(lambda folder: (folder / "config.json").unlink()), "no config.json in this folder"),
    "a config that is no JSON": (damaged(lambda folder: cut(folder / "config.json", 20)), "not valid JSON"),
    "a config that is a list": (
        damaged(lambda folder: (folder / "config.json").write_text("[]")),
        "no model_type",
    ),
    "no model_type": (damaged(lambda folder: edit_config(folder, model_type=None)), "no model_type"),
    "unknown model_type": (
        damaged(lambda folder: edit_config(folder, model_type="nonesuch")),
        "unknown architecture: .* no model_type 'nonesuch': .*; update transformers",
    ),
    "code of its own": (
        damaged(lambda folder: edit_config(folder, model_type="nonesuch", auto_map={"AutoModel": "evil.py"})),
        "the code that the folder brings is not run",
    ),
    "unknown class": (
        damaged(lambda folder: edit_config(folder, architectures=["NoSuchModel"])),
        "unknown architecture: 'NoSuchModel' is no model class",
    ),
    "a class that is no model": (
        damaged(lambda folder: edit_config(folder, architectures=["pipeline"])),
        "'pipeline' is no model class",
    ),
    "no weights": (
        damaged(lambda folder: (folder / "model.safetensors").unlink()),
        "no weights in this folder",
    ),
    "weights only as pickle": (damaged(pickle_weights), r"pickle \(pytorch_model.bin\).*--allow-pickle"),
    "truncated weights": (
        damaged(lambda folder: cut(folder / "model.safetensors", 5000)),
        "not a whole safetensors file .*; download it again",
    ),
    "empty weights": (
        damaged(lambda folder: cut(folder / "model.safetensors", 0)),
        "not a whole safetensors file",
    ),
    "a damaged index": (
        damaged(lambda folder: (folder / "model.safetensors.index.json").write_text("{}")),
        "this index of shards is damaged",
    ),
    "a missing shard": (
        damaged(lambda folder: write_index(folder, "model-2.safetensors")),
        "the shard model-2.safetensors is missing",
    ),
    "a shard elsewhere": (
        damaged(lambda folder: write_index(folder, "../model.safetensors")),
        "names the shard '../model.safetensors', outside its folder",
    ),
    "weights of another size": (
        damaged(lambda folder: edit_config(folder, hidden_size=48)),
        "BertModel does not load: ",
    ),
    "a weights file alone": (
        lambda folder: folder / "model.safetensors",
        "not a model that can be opened: .*; give the folder",
    ),
}


def write_index(folder: Path, shard: str) -> None:
    index = {"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_that_is_wrong_is_refused_in_one_sentence(case: str, folder: Path) -> None:
    prepare, message = BAD_FOLDERS[case]
    with pytest.raises(InputError, match=message) as raised:
        open_model(prepare(folder))
    assert "\n" not in str(raised.value)


BAD_PICKLES = {
    "more than tensors": (Payload(), "damaged or holds more than tensors"),
    "no table": (torch.ones(3), "no table of tensors"),
    "of another model": ({"other": torch.ones(3)}, "hold none of the"),
}


@pytest.mark.parametrize("case", BAD_PICKLES)
def test_a_pickle_that_is_wrong_is_refused(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content, message = BAD_PICKLES[case]
    pickle_weights(folder, content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        open_model(folder, allow_pickle=True)
    assert not (tmp_path / "code-that-was-run").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_no_permission(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests may run as root, whom no mode of a file stops; so the refusal is simulated.
    forbidden = folder / name

    def deny(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    if name == "config.json":
        monkeypatch.setattr(Path, "read_text", deny)
    else:
        monkeypatch.setattr("safetensors.safe_open", deny)
    with pytest.raises(InputError, match=f"no permission to read: {forbidden}; change its permissions"):
        open_model(folder)


def test_an_unknown_option_value() -> None:
    with pytest.raises(InputError, match="unknown attention implementation 'flash'"):
        open_model("anything", attn_implementation="flash")  # type: ignore[arg-type]


# --- file.py:function ---------------------------------------------------------------------------------------

SCRIPT = """
import torch
from neighbour import SIZE

def build():
    model = torch.nn.TransformerEncoderLayer(SIZE, 2, batch_first=True)
    return model, (torch.randn(2, 5, SIZE),), {"is_causal": False}

def wrong():
    return 1, 2

def failing():
    raise KeyError("no such thing")

number = 3
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    # Named like a module of the standard library on purpose: it must not hide that one.
    file = tmp_path / "json.py"
    file.write_text(SCRIPT)
    (tmp_path / "neighbour.py").write_text("SIZE = 8\n")
    return file


def test_a_function_opens(script: Path) -> None:
    opened = open_model(f"{script}:build")
    assert (opened.kind, opened.name) == ("torch", "json:build")
    assert not opened.model.training
    (x,), kwargs = opened.example(3, 7)
    assert x.shape == (3, 7, 8)
    assert kwargs == {"is_causal": False}
    assert opened.given is not None
    assert torch.equal(x[:2, :5], opened.given[0][0])
    import json as standard

    assert hasattr(standard, "dumps")


BAD_FUNCTIONS: dict[str, tuple[Callable[[Path], str], str]] = {
    "no file": (lambda file: f"{file.parent / 'none.py'}:build", "no such file or folder"),
    "no function named": (str, r"not a model that can be opened: .*as in json.py:build"),
    "another function": (
        lambda file: f"{file}:bild",
        "no function 'bild' in this file: .*; it has: build, wrong, fail",
    ),
    "no function at all": (lambda file: f"{file}:number", "no function 'number'"),
    "the wrong thing": (
        lambda file: f"{file}:wrong",
        r"wrong\(\) returned a tuple of \(int, int\).*; return a tuple \(torch.nn.Module, tuple, dict\)",
    ),
    "an error": (lambda file: f"{file}:failing", r"failing\(\) raised KeyError: 'no such thing'"),
}


@pytest.mark.parametrize("case", BAD_FUNCTIONS)
def test_a_function_that_is_wrong_is_refused(case: str, script: Path) -> None:
    target, message = BAD_FUNCTIONS[case]
    with pytest.raises(InputError, match=message):
        open_model(target(script))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def broken(:", "importing it raised SyntaxError"),
        ("1 / 0", "importing it raised ZeroDivisionError: division by zero"),
        ("raise SystemExit(2)", "importing it raised SystemExit"),
    ],
)
def test_a_file_that_does_not_import_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        open_model(f"{file}:build")


# --- ONNX ---------------------------------------------------------------------------------------------------


def embedding_model(**external: str) -> onnx.ModelProto:
    """Rows of an int8 table, scaled; masked. With ``external`` the table says that it lies in a file."""
    table = onnx.numpy_helper.from_array(np.arange(40, dtype=np.int8).reshape(10, 4), "table")
    if external:
        table.ClearField("raw_data")
        table.data_location = onnx.TensorProto.EXTERNAL
        for key, value in external.items():
            table.external_data.add(key=key, value=value)
    helper = onnx.helper
    integer, number = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["table"], ["floats"], to=number),
            helper.make_node("Mul", ["floats", "scale"], ["scaled"]),
            helper.make_node("Gather", ["scaled", "input_ids"], ["rows"]),
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=number),
            helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
            helper.make_node("Mul", ["rows", "column"], ["masked"]),
            helper.make_node("Add", ["masked", "shift"], ["output"]),
        ],
        "embedding",
        [
            helper.make_tensor_value_info("input_ids", integer, ["batch", "sequence"]),
            helper.make_tensor_value_info("attention_mask", integer, ["batch", "sequence"]),
            helper.make_tensor_value_info("shift", number, ["batch", 1, 4]),
        ],
        [helper.make_tensor_value_info("output", number, ["batch", "sequence", 4])],
        [
            table,
            onnx.numpy_helper.from_array(np.full((10, 1), 0.5, np.float32), "scale"),
            onnx.numpy_helper.from_array(np.array([-1]), "last"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def write(path: Path, model: onnx.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def test_an_onnx_file_opens_and_runs_on_its_example(tmp_path: Path) -> None:
    opened = open_model(write(tmp_path / "model.onnx", embedding_model()))
    assert (opened.kind, opened.name) == ("onnx", "model")
    _, inputs = opened.example(3, 9)
    assert inputs["input_ids"].shape == (3, 9)
    assert 0 < inputs["input_ids"].max() < 10
    assert inputs["attention_mask"].tolist()[1:] == [[1] * 9, [1] * 7 + [0] * 2]
    assert inputs["shift"].shape == (3, 1, 4)
    session = onnxruntime.InferenceSession(opened.path)
    (output,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    assert output.shape == (3, 9, 4)


def test_external_data_beside_the_model_is_fine(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(40))
    model = embedding_model(location="weights.bin", offset="0", length="40")
    assert open_model(write(tmp_path / "model.onnx", model)).kind == "onnx"


BAD_DATA: dict[str, tuple[dict[str, str], str]] = {
    "missing": ({"location": "none.bin"}, "external data file 'none.bin' of tensor 'table' is missing"),
    "above": ({"location": "../weights.bin"}, "at '../weights.bin', outside the model's folder"),
    "absolute": ({"location": "/etc/passwd"}, "outside the model's folder"),
    "absolute elsewhere": ({"location": r"C:\weights.bin"}, "outside the model's folder"),
    "through a link": ({"location": "link/weights.bin"}, "outside the model's folder"),
    "without a place": ({"length": "4"}, "outside the model's folder"),
    "too short": ({"location": "short.bin", "length": "40"}, "ends before tensor 'table' does"),
    "no number": ({"location": "short.bin", "length": "all"}, "offset or length that is no number"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_external_data_that_is_wrong_is_refused(case: str, tmp_path: Path) -> None:
    external, message = BAD_DATA[case]
    inside = tmp_path / "model"
    inside.mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(40))
    (inside / "short.bin").write_bytes(bytes(39))
    (inside / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match=message):
        open_model(write(inside / "model.onnx", embedding_model(**external)))


@pytest.mark.parametrize("content", [b"", b"no model at all", embedding_model().SerializeToString()[:-40]])
def test_a_file_that_is_no_whole_onnx_model_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    with pytest.raises(InputError, match="not an ONNX model"):
        open_model(file)


@pytest.mark.parametrize("opset", [0, onnx.defs.onnx_opset_version() + 1, 300])
@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_an_operator_set_that_nobody_knows_is_refused(opset: int, domain: str, tmp_path: Path) -> None:
    """ONNX's own check reads it as the newest one that it knows."""
    model = embedding_model()
    model.opset_import[0].domain, model.opset_import[0].version = domain, opset
    with pytest.raises(InputError, match=f"it has opset {opset}, and known here are 1 to"):
        open_model(write(tmp_path / "model.onnx", model))


# --- example inputs -----------------------------------------------------------------------------------------


def test_examples_are_repeatable_and_rows_differ(folder: Path) -> None:
    opened = open_model(folder)
    first, second = opened.example(3, 16)[1], opened.example(3, 16)[1]
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert len({tuple(row) for row in first["input_ids"].tolist()}) == 3


@pytest.mark.parametrize(
    ("padding", "last"),
    [
        (None, [1, 1, 1, 1, 1, 1, 0, 0]),
        ("right", [1, 1, 1, 1, 1, 1, 0, 0]),
        ("left", [0, 0, 1, 1, 1, 1, 1, 1]),
        ("none", [1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_the_last_row_of_an_encoder_is_padded_on_the_right(
    folder: Path, padding: Any, last: list[int]
) -> None:
    kwargs = open_model(folder).example(2, 8, padding=padding)[1]
    assert kwargs["attention_mask"].tolist() == [[1] * 8, last]
    assert (kwargs["input_ids"][-1][~kwargs["attention_mask"][-1].bool()] == 0).all()


@pytest.mark.parametrize(
    ("batch", "length", "message"),
    [(0, 4, "must be at least 1"), (1, 65, r"length 65 is more than the 64 positions \(max_position_emb")],
)
def test_sizes_that_cannot_be(folder: Path, batch: int, length: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_model(folder).example(batch, length)


def test_inputs_that_cannot_be_derived_point_to_a_function(folder: Path) -> None:
    opened = open_model(folder)
    opened.model.main_input_name = "spectra"
    with pytest.raises(InputError, match=r"takes spectra, which is not known here: .*file\.py:function"):
        opened.example()


def test_real_decoders_and_audio_models(smollm2_folder: Path, whisper_folder: Path) -> None:
    decoder = open_model(smollm2_folder)
    kwargs = decoder.example(2, 12)[1]
    assert kwargs["attention_mask"][-1].tolist() == [0, 0, 0, *[1] * 9]
    assert decoder.tokenizer.decode(kwargs["input_ids"][0]).startswith("The ship had left")
    audio = open_model(whisper_folder)
    kwargs = audio.example(2, 12)[1]
    assert list(kwargs) == ["input_features", "decoder_input_ids", "use_cache"]
    assert kwargs["input_features"].shape == (2, 80, 3000)
    assert (kwargs["decoder_input_ids"][:, 0] == audio.config.decoder_start_token_id).all()
