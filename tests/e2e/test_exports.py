"""Exports that tests share are told apart by everything that they depend on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM

from attncompile.convert.export import export_onnx
from attncompile.convert.onnx import parts_of
from attncompile.frontends.checkpoint import OpenedModel, open_model
from tests.e2e.exports import UndescribedError, fingerprint, remembering
from tests.e2e.test_convert_cached import QUICK


def opened(
    folder: Path,
    change: Callable[[LlamaForCausalLM], object] = lambda model: None,
    kind: str = "llama",
    **how: bool,
) -> OpenedModel:
    """The same small model, but for a change, as the model with its cache that is exported."""
    torch.manual_seed(0)
    model = QUICK[kind]()
    change(model)
    model.save_pretrained(folder)
    whole = open_model(folder, attn_implementation="eager")  # as conversions open it
    (part,), _ = parts_of(whole, None, **{"shared": False, "last": False, **how})
    return part.opened


@pytest.mark.parametrize("kind", QUICK)
def test_another_folder_is_the_same_model(kind: str, tmp_path: Path) -> None:
    found = [fingerprint(opened(tmp_path / name, kind=kind)) for name in ("a", "b")]
    assert found[0] == found[1]


def test_how_tokens_are_chosen_is_no_part_of_a_call(tmp_path: Path) -> None:
    def endless(model: LlamaForCausalLM) -> None:
        model.generation_config.eos_token_id = None

    assert fingerprint(opened(tmp_path / "a")) == fingerprint(opened(tmp_path / "b", endless))


def test_a_model_that_reads_text_is_known_by_its_tokens(tmp_path: Path) -> None:
    def reader(vocabulary: dict[str, int]) -> OpenedModel:
        fast = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        transformers.PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="[UNK]").save_pretrained(tmp_path)
        return opened(tmp_path)

    words = [{"[UNK]": 3, "The": 5, "ship": 6}, {"[UNK]": 3, "The": 6, "ship": 5}]
    first, again, other = (fingerprint(reader(vocabulary)) for vocabulary in (*words[:1], *words))
    assert first == again and first != other


CHANGES: dict[str, Callable[[LlamaForCausalLM], object]] = {
    "a weight": lambda model: model.model.layers[1].mlp.up_proj.weight.data[0, 0].add_(1e-3),
    "a setting": lambda model: model.config.rope_parameters.update(rope_theta=5000.0),
    "a number": lambda model: setattr(model.config, "rms_norm_eps", 1e-4),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_is_another(change: str, tmp_path: Path) -> None:
    assert fingerprint(opened(tmp_path / "a")) != fingerprint(opened(tmp_path / "b", CHANGES[change]))


def test_another_form_is_another(tmp_path: Path) -> None:
    forms = [opened(tmp_path), opened(tmp_path, shared=True), opened(tmp_path, last=True), open_model(tmp_path)]
    eager = open_model(tmp_path, attn_implementation="eager")
    assert len({fingerprint(form) for form in (*forms, eager)}) == 5


def test_what_is_not_known_completely_is_exported_each_time(tmp_path: Path) -> None:
    class Own(torch.nn.Linear):
        """Another test may have one of this name."""

    own = OpenedModel("torch", "own", tmp_path, Own(2, 2), None, ((torch.ones(1, 2),), {}))
    with pytest.raises(UndescribedError):
        fingerprint(own)
    made = [remembering(export_onnx, tmp_path)(own) for _ in range(2)]
    assert len(made) == 2 and not list(tmp_path.iterdir())


def test_what_is_read_is_what_was_exported(tmp_path: Path) -> None:
    exported: list[ir.Model] = []
    (tmp_path / "exports").mkdir()

    def counted(given: OpenedModel) -> tuple[ir.Model, tuple[str, ...]]:
        model, notes = export_onnx(given)
        exported.append(model)
        return model, notes

    once = remembering(counted, tmp_path / "exports")
    (first, notes), (second, again) = (once(opened(tmp_path / name)) for name in ("a", "b"))
    (only,) = exported
    assert notes == again and ir.to_proto(first) == ir.to_proto(second)
    assert list(ir.to_proto(first).graph.node) == list(ir.to_proto(only).graph.node)
    assert weights(first) == weights(only)


def weights(model: ir.Model) -> dict[str, bytes]:
    found = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {name: tensor.numpy().tobytes() for name, tensor in found.items() if tensor is not None}
