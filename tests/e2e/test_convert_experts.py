"""Mixtures of experts: their operators in ONNX, and a language model made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers.integrations.moe  # registers its operators
from transformers import GptOssConfig, GptOssForCausalLM

import attncompile
from attncompile.convert.experts import translations
from attncompile.convert.runtime import session
from attncompile.verify import require_as_good_as_eager
from tests.e2e.test_convert_cached import expected, greedy, prompts

assert transformers.integrations.moe


def exported(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], file: Path) -> onnxruntime.InferenceSession:
    table = dict(translations())
    torch.onnx.export(module, inputs, file, dynamo=True, verbose=False, custom_translation_table=table)
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


class Grouped(torch.nn.Module):
    def forward(self, rows: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        return torch.ops.transformers.grouped_mm_fallback(rows, weight, offs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("ends", [(3, 3, 7, 11), (0, 0, 0, 11), (11, 11, 11, 11), (2, 4, 5, 9), (0, 0, 0, 0)], ids=str)
def test_rows_are_multiplied_by_the_matrix_of_their_expert(ends: tuple[int, ...], tmp_path: Path) -> None:
    """Experts without rows, and rows that belong to none."""
    rows, weight, offs = torch.randn(11, 8), torch.randn(4, 8, 5), torch.tensor(ends, dtype=torch.int32)
    loaded = exported(Grouped().eval(), (rows, weight, offs), tmp_path / "grouped.onnx")
    names = [entry.name for entry in loaded.get_inputs()]
    (found,) = loaded.run(None, dict(zip(names, (rows.numpy(), weight.numpy(), offs.numpy()), strict=True)))
    eager, exact = Grouped()(rows, weight, offs), Grouped()(rows.double(), weight.double(), offs)
    require_as_good_as_eager(torch.from_numpy(found), exact, eager, 8, "the grouped product")


class Counted(torch.nn.Module):
    def __init__(self, bins: int, low: float, high: float) -> None:
        super().__init__()
        self.sizes = bins, low, high

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.histc(x, *self.sizes)


@pytest.mark.parametrize("sizes", [(4, 0.0, 3.0), (128, 0.0, 127.0), (5, -1.5, 2.0), (1, 0.0, 0.0)], ids=str)
def test_numbers_are_counted_by_bin(sizes: tuple[int, float, float], tmp_path: Path) -> None:
    """Whole numbers as transformers counts them, and others: at the edges, and outside of all bins."""
    module = Counted(*sizes).eval()
    x = torch.cat([torch.arange(-2.0, 130.0), torch.linspace(-2, 4, 57)])
    loaded = exported(module, (x,), tmp_path / "counted.onnx")
    (found,) = loaded.run(None, {loaded.get_inputs()[0].name: x.numpy()})
    np.testing.assert_array_equal(found, module(x).numpy())


def test_experts_behind_sinks_generate(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"], max_position_embeddings=64, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = GptOssForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "checkpoint")
    made = attncompile.convert(tmp_path / "checkpoint", tmp_path / "out", last_logits=True)
    assert made.certificate.passed and not any("float64" in note for note in made.report.notes)
    weights = {entry.name: entry for entry in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer}
    own = [list(entry.dims) for name, entry in weights.items() if ".mlp.experts.gate_up_proj." in name]
    assert own == [[32, 96]] * 8  # four experts a layer
    assert not any(len(entry.dims) == 3 for entry in weights.values()), "a stack of matrices is left"
    ids, mask = prompts(3, 17, 6)
    loaded = session(tmp_path / "out" / "model.onnx", "cpu")
    assert torch.equal(greedy(loaded, ids, mask, 8), expected(model, ids, mask, 8))
