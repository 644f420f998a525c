"""Encoders that read raw sound, as any number of samples."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

import attncompile
from attncompile.convert.runtime import session
from attncompile.verify import require_as_good_as_eager
from tests.small_encoder_decoders import CONVOLUTIONS, HALF, VOCABULARY


def test_a_recogniser_takes_recordings_of_any_length(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Wav2Vec2Config(**HALF, **CONVOLUTIONS, vocab_size=VOCABULARY, num_feat_extract_layers=3)
    model = Wav2Vec2ForCTC(config).eval()
    model.save_pretrained(tmp_path / "checkpoint")
    made = attncompile.convert(tmp_path / "checkpoint", tmp_path / "out", cache=False)
    assert made.certificate.passed and not any("not compared" in note for note in made.report.notes)
    loaded = session(tmp_path / "out" / "model.onnx", "cpu")
    assert [entry.shape for entry in loaded.get_inputs()] == [["batch", "samples"]]
    for batch, samples in ((1, 400), (3, 1234)):
        sound = torch.randn(batch, samples, generator=torch.Generator().manual_seed(samples))
        (found,) = loaded.run(["logits"], {"input_values": sound.numpy()})
        with torch.no_grad():
            eager, exact = model.float()(sound).logits, model.double()(sound.double()).logits
        require_as_good_as_eager(torch.from_numpy(found), exact, eager, samples, "the logits")
