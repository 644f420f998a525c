"""Rounded language models whose prompts are right and whose steps are not: refused, and noticed by a verification."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

import attncompile
from attncompile.convert import rounding
from attncompile.convert.calibration import Call, running_text
from attncompile.convert.comparison import LOST, Inputs, Runs, compare_on
from attncompile.convert.quality import STATES, Quality, over_budget
from attncompile.frontends.errors import InputError
from tests.e2e.test_convert_cached import QUICK
from tests.small_encoder_decoders import small

PRECISIONS = ("fp16", "int8", "int4(block=16)")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama that reads text, a token for each of the words that are frequent in it."""
    folder = tmp_path_factory.mktemp("checkpoints") / "reader"
    QUICK["llama"]().save_pretrained(folder)
    words = [word for word, _ in collections.Counter(running_text().split()).most_common(90)]
    vocabulary = {"[UNK]": 3} | {word: number for number, word in enumerate(words, 4)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return folder


def damage(file: Path, factor: float) -> None:
    """Multiply the cached values that the first layer reads; calls on an empty cache stay as they are."""
    model, name = onnx.load(file), "past_key_values.0.value"
    for node in model.graph.node:
        node.input[:] = [f"{name}.scaled" if given == name else given for given in node.input]
        for attribute in node.attribute:  # forms of an If read it too
            for inner in attribute.g.node:
                inner.input[:] = [f"{name}.scaled" if given == name else given for given in inner.input]
    kind = next(value for value in model.graph.input if value.name == name).type.tensor_type.elem_type
    number = np.array(factor, dtype=helper.tensor_dtype_to_np_dtype(kind))
    model.graph.initializer.append(numpy_helper.from_array(number, "factor"))
    model.graph.node.insert(0, helper.make_node("Mul", [name, "factor"], [f"{name}.scaled"]))
    onnx.save(model, file)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_form_is_judged_on_text_and_damage_to_steps_is_noticed(
    reader: Path, tmp_path: Path, precision: str
) -> None:
    made = attncompile.convert(reader, tmp_path / "out", precision=precision, cache=True)
    judged = [one for one in made.certificate.end_to_end if one.metric.startswith("relative change")]
    read = {one.inputs for one in judged if one.metric == "relative change of logits"}
    assert len(read) == 6 and all("of text" in inputs for inputs in read)  # of three forms, with padding and without
    assert read == {one.inputs for one in judged if one.metric == "relative change of the cache"}
    finite = [one for one in made.certificate.end_to_end if one.metric == LOST.format("logits")]
    assert len(finite) >= 6 and all(one.tolerance == 0 for one in finite)
    assert attncompile.verify(tmp_path / "out").passed
    damage(tmp_path / "out" / "model.onnx", 3.0)
    found = attncompile.verify(tmp_path / "out")
    wrong = {one.inputs for one in found.end_to_end if one.metric == "relative change of logits" and not one.passed}
    assert not found.passed and wrong and all("behind" in inputs for inputs in wrong)


@pytest.mark.parametrize("factor", [3.0, float("nan")])
def test_a_rounded_model_whose_steps_are_wrong_is_not_written(
    reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    write = rounding.write_precise

    def wrongly(source: Path, target: Path, *rest: object) -> int:
        count = write(source, target, *rest)  # type: ignore[arg-type]
        damage(target, factor)
        return count

    monkeypatch.setattr(rounding, "write_precise", wrongly)
    with pytest.raises(InputError, match=r"over the budget of 0\.01"):
        attncompile.convert(reader, tmp_path / "out", precision="fp16", cache=True)
    assert not (tmp_path / "out").exists()


def test_encoder_and_decoder_in_steps_are_judged_by_the_budget(tmp_path: Path) -> None:
    small("t5").save_pretrained(tmp_path / "t5")
    made = attncompile.convert(tmp_path / "t5", tmp_path / "out", precision="fp16")
    judged = [one for one in made.certificate.end_to_end if one.metric == "relative change of logits"]
    in_steps = [one for one in judged if "5 steps" in one.inputs]
    assert {one.tolerance for one in judged} == {0.01}
    assert in_steps and len(judged) > len(in_steps)


def step(past: int, batch: int = 1) -> Call:
    """A call of one token."""
    layer = {side: torch.zeros(batch, 1, past, 2) for side in ("key", "value")}
    mask, ids = torch.ones(batch, past + 1, dtype=torch.int64), torch.zeros(batch, 1, dtype=torch.int64)
    return Call((), {"input_ids": ids, "attention_mask": mask, "past_key_values": [layer]}, f"a step behind {past}")


def test_without_a_budget_a_lossy_result_must_still_be_finite() -> None:
    def broken(call: Call) -> dict[str, torch.Tensor]:
        return {"logits": torch.full((1, 1, 4), torch.nan if call.what.endswith("5") else 2.0)}

    def original(call: Call) -> dict[str, torch.Tensor]:
        return {"logits": torch.ones(1, 1, 4)}

    found = compare_on(Inputs((step(3), step(5)), (step(3),)), Runs(original, broken, original))
    assert [(one.metric, one.inputs) for one in found.entries if not one.passed] == [
        (LOST.format("logits"), "a step behind 5")
    ]
    assert found.problem() is not None


def test_what_a_step_writes_is_not_lost_among_what_it_found() -> None:
    call, before = step(63), torch.ones(1, 1, 64, 2)
    after = before.clone()
    after[:, :, -1] = 0.0
    quality = Quality()
    quality.add(call, {"present.0.key": before}, {"present.0.key": after})
    assert quality.worst() == 1 / STATES
    assert "the relative change of the cache is 1 on a step behind 63" in str(over_budget(tuple(quality.entries(0.1))))


def test_a_few_wrong_steps_are_not_lost_among_prompts() -> None:
    quality, prompt = Quality(), Call((), {"input_ids": torch.zeros(1, 999, dtype=torch.int64)}, "999 tokens of text")
    quality.add(prompt, {"logits": torch.ones(1, 999, 4)}, {"logits": torch.ones(1, 999, 4)})
    quality.add(step(5), {"logits": torch.ones(1, 1, 4)}, {"logits": 2 * torch.ones(1, 1, 4)})
    assert quality.worst() == 1.0 and quality.inputs == "a step behind 5"
