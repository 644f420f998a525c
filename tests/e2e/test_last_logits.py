"""Logits of the last token alone: what generation reads, and all that a long prompt then costs less."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers

import attncompile
from attncompile.convert.runtime import session
from attncompile.convert.source import read_source
from attncompile.frontends.cached import with_cache
from attncompile.frontends.checkpoint import open_model
from attncompile.frontends.errors import InputError
from attncompile.verify import derive_tolerance, require_within
from tests.e2e.test_convert_cached import GROUPED, expected, greedy, prompts
from tests.e2e.test_shared_buffer import endless, in_place, wide
from tests.onnx_files import assert_clean
from tests.small_encoder_decoders import small

VOCABULARY = GROUPED["vocab_size"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in ``checkpoint``, converted in ``out``."""
    folder = tmp_path_factory.mktemp("last")
    endless(wide).save_pretrained(folder / "checkpoint")
    made = attncompile.convert(folder / "checkpoint", folder / "out", last_logits=True)
    assert made.certificate.passed
    return folder


def test_prompts_and_steps_give_one_row_of_logits(llama: Path) -> None:
    model, loaded = endless(wide), session(llama / "out" / "model.onnx", "cpu")
    assert_clean(llama / "out")
    (shape,) = (entry.shape for entry in loaded.get_outputs() if entry.name == "logits")
    assert shape == ["batch", 1, VOCABULARY]  # the size is told: generators look at it
    for batch, length, padded in ((1, 1, 0), (1, 24, 0), (3, 17, 6)):
        ids, mask = prompts(batch, length, padded)
        assert torch.equal(greedy(loaded, ids, mask, 8), expected(model, ids, mask, 8))


def test_the_last_token_is_found_wherever_the_padding_lies(llama: Path) -> None:
    """Generators pad at the right, too: the last position of such a row is padding."""
    model, loaded = endless(wide), session(llama / "out" / "model.onnx", "cpu")
    ids, mask = prompts(4, 11, 3)
    mask[0], mask[1, 6:], mask[2, [4, 10]] = 0, 0, 0
    mask[0, 5] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
    for entry in loaded.get_inputs():
        if entry.name.startswith("past_key_values."):
            feeds[entry.name] = np.zeros((4, entry.shape[1], 0, entry.shape[3]), dtype=np.float32)
    (found,) = loaded.run(["logits"], feeds)
    with torch.no_grad():
        call = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        eager, exact = model(**call).logits, model.double()(**call).logits
    rows, last = torch.arange(4), torch.tensor([5, 5, 9, 10])
    error = derive_tolerance(exact[rows, last], eager[rows, last], GROUPED["intermediate_size"])
    require_within(torch.from_numpy(found[:, 0]), exact[rows, last], error.bound, "the logits")


def test_nothing_is_multiplied_with_the_vocabulary_but_one_position(llama: Path) -> None:
    """The largest product of a long prompt is gone; its result is not cut."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(llama / "out" / "model.onnx")).graph
    (product,) = (node for node in graph.node if "logits" in node.output)
    assert product.op_type == "MatMul"
    (states,) = (value for value in graph.value_info if value.name == product.input[0])
    assert [size.dim_value for size in states.type.tensor_type.shape.dim][1:] == [1, GROUPED["hidden_size"]]


def test_it_is_verified_as_it_was_converted(llama: Path) -> None:
    assert read_source(llama / "out").last_logits
    assert attncompile.verify(llama / "out").passed


def test_in_one_buffer(tmp_path: Path) -> None:
    model = endless(wide)
    model.save_pretrained(tmp_path / "checkpoint")
    made = attncompile.convert(tmp_path / "checkpoint", tmp_path / "out", last_logits=True, shared_buffer=True)
    assert made.certificate.passed
    loaded = session(tmp_path / "out" / "model.onnx", "cpu")
    ids, mask = prompts(1, 13, 0)
    assert torch.equal(in_place(loaded, ids, 6), expected(model, ids, mask, 6))


@pytest.mark.slow
def test_a_precision_is_judged_on_it(llama: Path, tmp_path: Path) -> None:
    made = attncompile.convert(llama / "checkpoint", tmp_path / "out", last_logits=True, precision="int8-weights")
    assert made.certificate.passed


def test_what_has_no_last_token_is_refused(tmp_path: Path, llama: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="--no-cache and --last-logits contradict each other"):
        attncompile.convert(llama / "checkpoint", out, last_logits=True, cache=False)
    with pytest.raises(InputError, match="a model for PyTorch takes logits_to_keep"):
        attncompile.convert(llama / "checkpoint", out, to="torch", last_logits=True)
    with pytest.raises(InputError, match="the logits of an ONNX file are what they are"):
        attncompile.convert(llama / "out" / "model.onnx", out, last_logits=True)
    small("t5").save_pretrained(tmp_path / "t5")
    with pytest.raises(InputError, match="--last-logits is for decoders alone"):
        attncompile.convert(tmp_path / "t5", out, last_logits=True)
    mamba = transformers.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4)
    transformers.MambaForCausalLM(mamba).save_pretrained(tmp_path / "mamba")
    with pytest.raises(InputError, match=r"takes no past_key_values: mamba; leave --last-logits"):
        attncompile.convert(tmp_path / "mamba", out, last_logits=True)
    assert not out.exists()


def test_a_model_without_an_output_embedding_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_model(llama / "checkpoint")
    monkeypatch.setattr(type(opened.model), "get_output_embeddings", lambda _: None)
    with pytest.raises(InputError, match=r"names no output embedding: .*; leave --last-logits"):
        with_cache(opened, last=True)
    monkeypatch.setattr(type(opened.model), "get_output_embeddings", lambda _: torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="gives the logits of 9 positions where its output embedding is given one"):
        with_cache(opened, last=True)
