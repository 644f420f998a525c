"""Damaged ONNX files: each is read, or refused in one sentence, and none takes the process down."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

import attncompile
from attncompile import CaptureError, InputError
from attncompile.frontends.onnx_file import read_onnx_file
from tests.backend.test_backend import small_bert


class _Hidden(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = small_bert()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """An export of a small encoder."""
    file = tmp_path_factory.mktemp("exported") / "model.onnx"
    ids = torch.ones(2, 7, dtype=torch.int64)
    axes = {0: "batch", 1: "length"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(_Hidden().eval(), (ids, ids), file, dynamo=True, dynamic_shapes=(axes, axes),
                          external_data=False, verbose=False)  # fmt: skip
    return onnx.load(file)


Change = Callable[[onnx.ModelProto, random.Random], None]


def node_of(model: onnx.ModelProto, draw: random.Random) -> onnx.NodeProto:
    return draw.choice(model.graph.node)


def dangling(model: onnx.ModelProto, draw: random.Random) -> None:
    node = node_of(model, draw)
    if node.input:
        node.input[draw.randrange(len(node.input))] = "nothing_there"


def rewired(model: onnx.ModelProto, draw: random.Random) -> None:
    """Often a cycle."""
    node = node_of(model, draw)
    if node.input:
        node.input[draw.randrange(len(node.input))] = node_of(model, draw).output[0]


def removed(model: onnx.ModelProto, draw: random.Random) -> None:
    model.graph.node.remove(node_of(model, draw))


def made_twice(model: onnx.ModelProto, draw: random.Random) -> None:
    node_of(model, draw).output[0] = node_of(model, draw).output[0]


def other_version(model: onnx.ModelProto, draw: random.Random) -> None:
    model.ir_version = draw.choice([0, 1, 2, 99, 2**40])


def other_operators(model: onnx.ModelProto, draw: random.Random) -> None:
    model.opset_import[0].version = draw.choice([0, -3, 1, 5, 99])


def other_type(model: onnx.ModelProto, draw: random.Random) -> None:
    kinds = ["Nothing", "Softmax", "MatMul", "Add", "Gather", "Loop", "If", "Scan", "Attention"]
    node_of(model, draw).op_type = draw.choice(kinds)


def other_domain(model: onnx.ModelProto, draw: random.Random) -> None:
    node_of(model, draw).domain = draw.choice(["nowhere", "com.microsoft", "ai.onnx.ml"])


def other_shape(model: onnx.ModelProto, draw: random.Random) -> None:
    """A bomb of initialisers, say: a few bytes that ask for 2^62 elements."""
    tensor = draw.choice([tensor for tensor in model.graph.initializer if tensor.dims])
    tensor.dims[draw.randrange(len(tensor.dims))] = draw.choice([0, -1, 1, 7, 2**40, 2**62])


def other_elements(model: onnx.ModelProto, draw: random.Random) -> None:
    draw.choice(model.graph.initializer).data_type = draw.choice([0, 1, 7, 8, 9, 16, 99])


def few_bytes(model: onnx.ModelProto, draw: random.Random) -> None:
    draw.choice(model.graph.initializer).raw_data = draw.randbytes(3)


def without_attribute(model: onnx.ModelProto, draw: random.Random) -> None:
    node = node_of(model, draw)
    if node.attribute:
        node.attribute.pop(draw.randrange(len(node.attribute)))


def other_attribute(model: onnx.ModelProto, draw: random.Random) -> None:
    node = node_of(model, draw)
    if node.attribute:
        draw.choice(node.attribute).type = draw.choice([1, 2, 3, 4, 5, 6, 7, 8])


def other_input(model: onnx.ModelProto, draw: random.Random) -> None:
    shape = draw.choice(model.graph.input).type.tensor_type.shape
    shape.dim[0].dim_value = draw.choice([0, -5, 2**40])


def other_output(model: onnx.ModelProto, draw: random.Random) -> None:
    model.graph.output[0].name = "missing"


CHANGES: tuple[Change, ...] = (
    dangling, rewired, removed, made_twice, other_version, other_operators, other_type, other_domain, other_shape,
    other_elements, few_bytes, without_attribute, other_attribute, other_input, other_output,
)  # fmt: skip


def damaged(whole: onnx.ModelProto, seed: int) -> bytes:
    """The file with a few changes of its structure, a few other bytes, or cut short."""
    draw = random.Random(seed)
    if draw.random() < 0.6:
        model = copy.deepcopy(whole)
        for _ in range(draw.choice([1, 1, 2, 3])):
            draw.choice(CHANGES)(model, draw)
        return model.SerializeToString()
    data = bytearray(whole.SerializeToString())
    if draw.random() < 0.3:
        return bytes(data[: draw.randrange(len(data))])
    for _ in range(draw.choice([1, 2, 5, 20])):
        data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


def crashes(whole: onnx.ModelProto, folder: Path, seeds: range) -> dict[int, str]:
    """What went wrong in another way than by a sentence for a person, by seed."""
    found: dict[int, str] = {}
    for seed in seeds:
        file = folder / "model.onnx"
        file.write_bytes(damaged(whole, seed))
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


@pytest.mark.slow
def test_very_much_damage_is_refused_in_a_sentence(whole: onnx.ModelProto, tmp_path: Path) -> None:
    assert crashes(whole, tmp_path, range(1000, 11_000)) == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dangling, "not a valid ONNX model: .*nothing_there"),
        (other_version, "not a valid ONNX model|holds no graph"),
        (other_output, "not a valid ONNX model|cannot be read"),
        (few_bytes, r"holds 3 bytes, where its shape says \d+"),
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
