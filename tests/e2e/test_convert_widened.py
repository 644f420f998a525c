"""Models with an island of bfloat16, which ONNX Runtime's CPU computes little of."""

from __future__ import annotations

from pathlib import Path

import onnx_ir
import torch
from transformers import FalconConfig, FalconForCausalLM

import attncompile
from attncompile.codegen.onnx.widen import without_kernels


def test_a_bias_that_a_model_rounds_to_bfloat16_converts(tmp_path: Path) -> None:
    """Falcon's ALiBi: slopes times positions, in bfloat16 whatever the model is in."""
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True,
        new_decoder_architecture=False, multi_query=False, parallel_attn=False, bias=True,
    )  # fmt: skip
    FalconForCausalLM(config).eval().save_pretrained(tmp_path / "checkpoint")
    made = attncompile.convert(tmp_path / "checkpoint", tmp_path / "out", cache=False)
    assert made.certificate.passed and all(site.operator for site in made.report.sites)
    model = onnx_ir.load(tmp_path / "out" / "model.onnx")
    assert not without_kernels(model, "bfloat16", ("CPUExecutionProvider",))
