"""Forty model types of every kind: what lifting finds is what an independent counter counts, and it is the same."""

from __future__ import annotations

import pytest

from attncompile.frontends.errors import CaptureError
from benchmarks.coverage import read_table
from benchmarks.zoo.build import build
from benchmarks.zoo.captures import CLOSE, Finding, export
from benchmarks.zoo.truth import Truth, count

TABLE = read_table()
SAMPLE = (
    "bert", "gpt2", "llama", "t5", "phi3", "qwen3", "olmo2", "cohere2", "afmoe", "qwen2_moe", "roformer", "bloom",
    "modernbert-decoder", "marian", "vaultgemma", "falcon", "gpt_bigcode", "esm", "vit", "dinov2", "beit",
    "mobilevit", "idefics3_vision", "imagegpt", "vit_mae", "segformer", "whisper", "wav2vec2",
    "audio-spectrogram-transformer", "unispeech-sat", "pe_audio_encoder", "clip", "llava_onevision", "siglip2",
    "flava", "qwen2_5_vl", "florence2", "fuyu", "voxtral", "visual_bert",
)  # fmt: skip


def found(model_type: str) -> tuple[Truth, Finding]:
    """The true attentions of a type and what lifting finds through torch.export."""
    model, args, kwargs = build(model_type, "eager")
    return count(model, args, kwargs), export(model, args, kwargs)


@pytest.mark.parametrize("model_type", SAMPLE)
def test_every_attention_is_found(model_type: str) -> None:
    truth, finding = found(model_type)
    assert len(truth.attentions) == TABLE[model_type]["eager"]
    statuses = [site.status for site in finding.sites]
    assert statuses.count("lifted") + statuses.count("observed") == len(truth.attentions), finding.sites
    assert finding.error is not None and finding.error <= CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(TABLE))
def test_no_type_is_silently_wrong_or_silently_missed(model_type: str) -> None:
    """Every site that is not found is refused, and what is found computes the same."""
    try:
        truth, finding = found(model_type)
    except CaptureError:
        return  # said aloud
    assert len(finding.sites) >= len(truth.attentions), [one.module for one in truth.attentions]
    assert finding.error is not None and finding.error <= CLOSE
