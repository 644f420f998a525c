"""Models of two towers, which read text and pictures at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import attncompile
from attncompile.convert.runtime import session
from attncompile.verify import require_as_good_as_eager
from tests.frontends.test_several_inputs import clip, siglip


@pytest.mark.parametrize("build", [clip, pytest.param(siglip, marks=pytest.mark.slow)])
def test_two_towers_convert_with_both_of_their_inputs(build: object, tmp_path: Path) -> None:
    assert callable(build)
    torch.manual_seed(0)
    model = build().eval()
    model.save_pretrained(tmp_path / "checkpoint")
    made = attncompile.convert(tmp_path / "checkpoint", tmp_path / "out", cache=False)
    assert made.certificate.passed and all(site.operator for site in made.report.sites)
    loaded = session(tmp_path / "out" / "model.onnx", "cpu")
    generator = torch.Generator().manual_seed(1)
    given = {
        "input_ids": torch.randint(3, 99, (2, 11), generator=generator),
        "attention_mask": torch.ones(2, 11, dtype=torch.int64),
        "pixel_values": torch.randn(2, 3, 12, 12, generator=generator),
    }
    given["attention_mask"][1, 7:] = 0
    names = [entry.name for entry in loaded.get_inputs()]
    assert {"input_ids", "pixel_values"} <= set(names) <= set(given)
    (found,) = loaded.run(["logits_per_image"], {name: given[name].numpy() for name in names})
    read = {name: given[name] for name in names}
    with torch.no_grad():
        eager = model.float()(**read).logits_per_image
        exact = model.double()(**{n: v.double() if v.is_floating_point() else v for n, v in read.items()})
    require_as_good_as_eager(torch.from_numpy(found), exact.logits_per_image, eager, 48, "the logits")
