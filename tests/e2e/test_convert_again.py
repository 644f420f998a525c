"""A converted language model converted again: both branches of its operators are given a window, or neither."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers

import attncompile
from attncompile.convert.calibration import text_calls
from attncompile.convert.runtime import run, session
from attncompile.frontends.checkpoint import open_model
from attncompile.frontends.onnx import onnx_file_graph
from attncompile.lift import lift_graph
from attncompile.plan.schema import load_plan
from attncompile.verify import derive_tolerance
from tests.e2e.test_convert_cached import GROUPED, tiny
from tests.onnx_files import assert_clean

SIZE, SINKS = 7, 2
PASSES = f"sparsify.window(size={SIZE}, sinks={SINKS})"
WORDS = int(GROUPED["vocab_size"])

CALLS = [(1, 0, 24, 0), (1, 30, 1, 0), (1, 30, 5, 0), (3, 30, 5, 0), (3, 0, 17, 6), (3, 20, 1, 4), (3, 20, 4, 9)]
"""Rows, tokens before and new ones, and how many of the first tokens of the last row are padding."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint; its conversion, ``once``; that again with a window, ``again``; and with it from the first on."""
    folder = tmp_path_factory.mktemp("again")
    tiny("llama", **GROUPED).save_pretrained(folder / "checkpoint")
    attncompile.convert(folder / "checkpoint", folder / "once", prefer="fused", cache=True)
    attncompile.convert(folder / "once" / "model.onnx", folder / "again", passes=PASSES)
    attncompile.convert(folder / "checkpoint", folder / "first", prefer="fused", cache=True, passes=PASSES)
    return folder


def test_both_branches_are_stated_alike(folders: Path) -> None:
    """The fused operator where it is exact, and plain operators, which take heads and queries together."""
    sites = lift_graph(onnx_file_graph(folders / "once" / "model.onnx")).sites
    assert len(sites) == 4
    for fused, plain in zip(sites[::2], sites[1::2], strict=True):
        assert (fused.status, plain.status) == ("lifted", "lifted"), str(plain.refusal)
        for said in ("q[B,6,I,8]  k,v[B,2,J,8]", "j ≤ i + J − I", "h // 3"):
            assert said in str(fused.spec) and said in str(plain.spec)
        assert "attention_mask[b, j] ≠ 0" in str(plain.spec)


def test_a_window_is_put_into_both_branches(folders: Path) -> None:
    """The same numbers as with the window from the first on, and as the definition."""
    sites = load_plan(folders / "again" / "plan.json").sites
    assert [site.operator != "original" for site in sites] == [True] * 4
    assert_clean(folders / "again")
    names = ("again", "first", "once")
    again, first, once = (session(folders / name / "model.onnx", "cpu", threads=1) for name in names)
    model = transformers.AutoModelForCausalLM.from_pretrained(folders / "checkpoint", attn_implementation="sdpa")
    for rows, before, new, padded in CALLS:
        tokens = torch.randint(3, WORDS, (rows, before + new), generator=torch.Generator().manual_seed(before + new))
        mask = torch.ones_like(tokens)
        mask[-1, :padded] = 0
        wanted, plain = (defined(model.to(dtype), tokens, mask)[:, before:] for dtype in (torch.float64, torch.float32))
        shown = mask[:, before:].bool()
        bound = derive_tolerance(wanted[shown], plain[shown], GROUPED["hidden_size"] ** 2 * 2).bound
        found = [torch.from_numpy(continued(loaded, tokens, mask, before)) for loaded in (again, first, once)]
        for result in found[:2]:
            assert float((result.double() - wanted)[shown].abs().max()) <= bound, (rows, before, new, padded)
        assert float((found[2].double() - wanted)[shown].abs().max()) > 100 * bound  # the window hides something


def defined(model: transformers.PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of all tokens at once, with every key outside the window hidden by the mask ``[rows, 1, I, J]``."""
    own, key = torch.arange(tokens.shape[1])[:, None], torch.arange(tokens.shape[1])
    seen = (key <= own) & ((key > own - SIZE) | (key < SINKS)) & mask[:, None, None].bool()
    hidden = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        found: torch.Tensor = model(tokens, attention_mask=hidden, position_ids=positions(mask), use_cache=False).logits
    return found


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def continued(
    loaded: onnxruntime.InferenceSession, tokens: torch.Tensor, mask: torch.Tensor, before: int
) -> np.ndarray:
    """Logits of the tokens from some position on, behind a cache of the ones before it where there are any."""
    names = [entry.name for entry in loaded.get_outputs()]
    feeds = {
        entry.name: np.zeros((len(tokens), entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in loaded.get_inputs()
        if entry.name.startswith("past_key_values.")
    }
    results: dict[str, np.ndarray] = {}
    for start, end in ((0, before), (before, tokens.shape[1])):
        if start == end:
            continue
        feeds["input_ids"], feeds["attention_mask"] = tokens[:, start:end].numpy(), mask[:, :end].numpy()
        feeds["position_ids"] = positions(mask)[:, start:end].numpy()
        results = dict(zip(names, loaded.run(None, feeds), strict=True))
        feeds |= {name.replace("present", "past_key_values"): one for name, one in results.items() if name != "logits"}
    return results["logits"]


def test_what_computes_the_same_is_left_alone(folders: Path, tmp_path: Path) -> None:
    """The If chooses between both forms already: nothing is gained by a choice in one of them."""
    attncompile.convert(folders / "once" / "model.onnx", tmp_path / "out", passes="fuse")
    sites = load_plan(tmp_path / "out" / "plan.json").sites
    assert [site.operator for site in sites] == ["original"] * 4
    assert all("the other branch of its If" in site.reason for site in sites[1::2])
    windowed = load_plan(folders / "again" / "plan.json").sites
    assert [site.operator for site in windowed[1::2]] == ["decomposition"] * 2  # no other If in this branch


def test_text_is_read_with_nothing_cached(folders: Path) -> None:
    """Positions and mask are as many as tokens, whatever an example of the file has."""
    opened = open_model(folders / "once" / "model.onnx")
    vars(opened)["tokenizer"] = lambda text, **settings: {"input_ids": list(range(3, WORDS))}
    (call,) = text_calls(opened, "text", 40, 1)
    assert call.kwargs["input_ids"].tolist() == [list(range(3, 43))]
    assert call.kwargs["position_ids"].tolist() == [list(range(40))]
    assert call.kwargs["attention_mask"].tolist() == [[1] * 40]
    assert {value.shape[2] for name, value in call.kwargs.items() if name.startswith("past")} == {0}
    found = run(session(folders / "once" / "model.onnx", "cpu", threads=1), call)
    assert found["logits"].shape == (1, 40, WORDS) and bool(found["logits"].isfinite().all())


def test_the_masks_of_the_branches_are_still_made_once(folders: Path) -> None:
    """What was read in the plain branches alone goes with them."""
    graph = ir.load(folders / "again" / "model.onnx").graph
    assert not any(node.op_type == "If" and len(node.outputs) == 1 for node in graph)
