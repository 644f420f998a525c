"""How many copies of a model's weights a conversion to ONNX holds, and what keeps it from holding more."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import transformers
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import attncompile
from attncompile.convert import timing
from attncompile.convert.calibration import Call
from attncompile.convert.export import export_onnx
from attncompile.convert.recorded import recorded
from attncompile.convert.widened import Widened, outputs_of
from attncompile.frontends.checkpoint import open_model
from attncompile.verify import compare
from attncompile.verify.tolerance import PIECE, largest

COPIES = 1.25
"""Bytes by which the peak may grow for each byte of weights, the checkpoint's own mapped pages among them: one session
of ONNX Runtime with its packed weights, while nobody needs the checkpoint, and room for noise."""


def decoder(hidden: int, inner: int) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


CONVERT = """
import resource, sys, attncompile
attncompile.convert(sys.argv[1], sys.argv[2], to="onnx", cache=True)
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(folder: Path, model: transformers.PreTrainedModel) -> float:
    """The largest resident memory of a conversion in a process of its own, in bytes."""
    model.save_pretrained(folder / "checkpoint")
    command = [sys.executable, "-c", CONVERT, str(folder / "checkpoint"), str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return 1024.0 * int(done.stdout.split("peak")[1])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has other units elsewhere")
def test_a_conversion_holds_few_copies_of_the_weights(tmp_path: Path) -> None:
    """Two models of the same graph, a thin and a wide one: what differs between their peaks is copies of weights."""
    thin, wide = decoder(64, 128), decoder(1536, 8192)
    grown = sum(parameter.nbytes for parameter in wide.parameters()) - sum(p.nbytes for p in thin.parameters())
    assert grown > 2.5e8
    (tmp_path / "thin").mkdir()
    (tmp_path / "wide").mkdir()
    more = peak(tmp_path / "wide", wide) - peak(tmp_path / "thin", thin)
    assert more / grown <= COPIES


def test_one_session_with_the_weights_is_open_at_a_time(
    bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each packs the weights for its kernels: two would be two copies."""
    begin, alive, most = onnxruntime.InferenceSession.__init__, weakref.WeakSet[Any](), []

    def counted(self: onnxruntime.InferenceSession, given: str | bytes, *args: Any, **options: Any) -> None:
        begin(self, given, *args, **options)
        if isinstance(given, str):  # a file, and no site alone
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(onnxruntime.InferenceSession, "__init__", counted)
    made = attncompile.convert(bert_folder, tmp_path / "out", to="onnx")
    assert "latency" in str(made)  # both forms were loaded for that
    assert len(most) >= 6 and max(most) == 1


def test_what_is_timed_is_in_memory_in_its_turn_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns are taken back and forth, until the ratio of the medians is what it was."""
    alive, turns = set[str](), list[str]()

    class Loaded:
        def __init__(self, name: str) -> None:
            assert not alive
            alive.add(name)
            turns.append(name)
            self.name = name

        def __call__(self) -> None:
            assert alive == {self.name}

        def __del__(self) -> None:
            alive.discard(self.name)

    seconds = {"before": 3.0, "after": 1.5}

    def told(run: Loaded) -> float:
        run()
        return seconds[run.name]

    monkeypatch.setattr(timing, "_seconds_of", told)
    found = timing.medians_in_turns([partial(Loaded, name) for name in seconds])
    assert found == ([3.0, 1.5], 2 * timing.ROUNDS, True)
    assert turns == ["before", "after", "after", "before"]
    assert not alive


def nodes_alive() -> int:
    """Nodes of graphs, and environments of their sizes, with all that is known there."""
    gc.collect()
    return sum(isinstance(one, torch.fx.Node | ShapeEnv) for one in gc.get_objects())


def test_nothing_of_the_exported_graph_is_kept(tmp_path: Path) -> None:
    decoder(64, 128).save_pretrained(tmp_path)
    opened = open_model(tmp_path, attn_implementation="eager")
    before = nodes_alive()
    model, _ = export_onnx(opened)
    assert len(model.graph) > 50
    del model
    assert nodes_alive() <= before


class Tied(torch.nn.Module):
    """Weights that two modules share, and one that a module reads of another."""

    def __init__(self, *, foreign: bool) -> None:
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(1024, 256), torch.nn.Linear(256, 1024, bias=False)
        self.head.weight = self.embedding.weight
        self.inner, self.foreign = torch.nn.Linear(256, 1024), foreign

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states = self.embedding(ids)
        found = self.head(states) + self.inner(states)
        return found @ self.inner.weight if self.foreign else found


def call(model: torch.nn.Module) -> Call:
    return Call((torch.arange(40).reshape(2, 20),), {}, "tokens") if isinstance(model, Tied) else Call(
        (), {"input_ids": torch.arange(40).reshape(2, 20)}, "tokens"
    )  # fmt: skip


@pytest.mark.parametrize(
    "model",
    [Tied(foreign=False), Tied(foreign=True), decoder(256, 1024)],
    ids=["shared weights", "weights read from outside", "llama"],
)
def test_a_model_widened_bit_by_bit_computes_what_the_whole_does(model: torch.nn.Module) -> None:
    one, whole = call(model), copy.deepcopy(model).double().eval()
    with torch.no_grad():
        expected = outputs_of(whole(*one.args, **one.kwargs))
        widened = Widened(model.eval())
        for _ in range(2):  # the second time as the first
            found = widened(one)
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(parameter.dtype is torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("foreign", [False, True])
def test_one_module_at_a_time_is_wide(foreign: bool) -> None:
    model = Tied(foreign=foreign).eval()
    widened = Widened(model)
    with torch.no_grad():
        widened(call(model))
    assert widened.held == 0
    assert widened.most == 2 * model.embedding.weight.nbytes
    assert widened.kept_whole is foreign


def test_a_model_that_gives_nan_by_itself_stays_lean() -> None:
    class Divides(Tied):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) / 0.0 * 0.0

    model = Divides(foreign=False).eval()
    widened = Widened(model)
    with torch.no_grad():
        assert widened(call(model))["output"].isnan().all()
    assert not widened.kept_whole


def test_results_are_kept_in_files_to_the_bit(tmp_path: Path) -> None:
    results: dict[str, Any] = {
        "float32": torch.randn(3, 5).t(),
        "bfloat16": torch.randn(4, 2).bfloat16(),
        "float64": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(2, 0, 3),
    }

    def run(one: Call) -> dict[str, torch.Tensor]:
        if one.what == "bad":
            raise RuntimeError("not this one")
        return results

    again = recorded(run, [Call((), {}, "good"), Call((), {}, "bad")], tmp_path / "kept")
    found = again(Call((), {}, "good"))
    assert list(found) == list(results)
    assert all(torch.equal(found[name], results[name]) and found[name].dtype == results[name].dtype for name in results)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not this one"):
            again(Call((), {}, "bad"))


def test_what_is_compared_in_pieces_is_compared_as_a_whole() -> None:
    reference = torch.randn(PIECE // 512 + 3, 1024, dtype=torch.float64)
    candidate = (reference + 1e-3 * torch.randn_like(reference)).float()
    candidate[-1, -1], candidate[0, 0] = float("nan"), float("inf")
    found = compare(candidate, reference, argmax=True)
    both = candidate.isfinite()
    apart = (candidate.double() - reference)[both].abs().max()
    assert found.max_abs == float(apart) and found.misplaced == 2
    assert largest(reference) == float(reference.abs().max())
    left, right = candidate.double()[both], reference[both]
    assert found.cosine == pytest.approx(float(left @ right / left.norm() / right.norm()), rel=1e-12)
