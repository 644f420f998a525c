"""`attncompile inspect`: what it prints, what it writes as JSON, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from attncompile.ir import parse_spec
from tests.cli.conftest import Run


def test_sites_that_are_alike_are_printed_once(run: Run, models: str) -> None:
    ran = run("inspect", models + "causal", "--seq", "100")
    assert ran.code == 0, ran.err
    assert ran.err == ""
    head, *lines = ran.out.splitlines()
    assert head.startswith("0–1   attend  q[B,4,I,8]  k,v[B,2,I,8]  float32")
    assert head.endswith("2 sites lifted")
    assert "  mask   j ≤ i" in lines
    assert "  heads  grouped-query: each of 2 KV heads serves 2 query heads" in lines
    assert any(line.endswith("density 50.5 % at 100") for line in lines)
    assert any(line.startswith("  source models.py:") for line in lines)
    assert lines[-1] == "models:causal: 2 attention sites, 2 lifted, 0 observed, 0 refused"


def test_all_prints_each_site(run: Run, models: str) -> None:
    ran = run("inspect", models + "causal", "--all")
    assert [line.split()[0] for line in ran.out.splitlines() if " attend " in line] == ["0", "1"]


def test_different_masks_stay_apart_and_are_drawn(run: Run, models: str) -> None:
    ran = run("inspect", models + "window", "--picture", "--seq", "64")
    assert ran.code == 0, ran.err
    assert "mask   j ≤ i and j > i − 4" in ran.out
    assert [line.split()[0] for line in ran.out.splitlines() if " attend " in line] == ["0", "1"]
    assert "█" in ran.out
    assert "░" in ran.out


def test_masks_are_written_as_pictures(run: Run, models: str, tmp_path: Path) -> None:
    ran = run("inspect", models + "window", "--picture-to", tmp_path / "mask.svg", "--seq", "64")
    assert ran.code == 0, ran.err
    assert ElementTree.parse(tmp_path / "mask.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "mask-2.svg").exists()  # the other site has no window
    assert f"{tmp_path / 'mask.svg'}: 0" in ran.err
    assert run("inspect", models + "window", "--picture-to", tmp_path / "mask.png").code == 0
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.glob(".*part")) == []
    refused = run("inspect", models + "window", "--picture-to", tmp_path / "mask.jpg")
    assert refused.code == 2
    assert "a picture is .svg or .png" in refused.error()


def test_values_make_a_density_exact(run: Run, minilm_folder: Path, tmp_path: Path) -> None:
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0]])
    np.savez(tmp_path / "values.npz", attention_mask=mask)
    ran = run("inspect", minilm_folder, "--values", tmp_path / "values.npz", "--picture")
    assert ran.code == 0, ran.err
    assert "density 50 % at 4" in ran.out
    assert "    ███" in ran.out.splitlines()  # the first row of the batch
    np.savez(tmp_path / "flat.npz", attention_mask=mask[0])
    refused = run("inspect", minilm_folder, "--values", tmp_path / "flat.npz")
    assert refused.code == 2
    assert "the tensor 'attention_mask' has shape (4,)" in refused.error()
    (tmp_path / "text.npz").write_text("no archive")
    assert "is no .npz of plain numbers" in run("inspect", minilm_folder, "--values", tmp_path / "text.npz").error()


def test_block_names_the_weights(run: Run, models: str) -> None:
    ran = run("inspect", models + "causal", "--block")
    assert "  block  queries ─ linear 0.query.weight" in ran.out
    assert "         attend(q, k, v)" in ran.out.splitlines()


def test_json_has_every_site_and_specs_that_parse_back(run: Run, models: str, tmp_path: Path) -> None:
    file = tmp_path / "sites.json"
    ran = run("inspect", models + "causal", "--json", file, "--seq", "4")
    assert ran.code == 0, ran.err
    data = json.loads(file.read_text())
    assert list(data) == ["schema", "model", "sites", "summary"]
    assert data["schema"] == 1
    assert data["model"] == "models:causal"
    assert data["summary"] == {"sites": 2, "lifted": 2, "observed": 0, "refused": 0}
    for site in data["sites"]:
        assert list(site)[:7] == ["name", "status", "spec", "reason", "hint", "source", "density"]
        assert list(site)[7:] == ["guard", "block", "rounds", "kind", "check", "node", "line", "nearest"]
        assert site["rounds"] == []
        assert {step["operand"] for step in site["block"]} >= {"q", "k", "v"}
        assert all(step["text"] for step in site["block"])
        assert site["status"] == "lifted"
        assert parse_spec(site["spec"]).attend() is not None
        assert site["density"] == 10 / 16
        assert site["reason"] is None
        assert site["hint"] is None
    assert list(tmp_path.glob(".*part")) == []


def test_json_to_standard_output_is_json_alone(run: Run, models: str) -> None:
    ran = run("inspect", models + "causal", "--json", "-")
    assert json.loads(ran.out)["summary"]["sites"] == 2


def test_a_refused_site_says_why(run: Run, models: str, tmp_path: Path) -> None:
    file = tmp_path / "sites.json"
    ran = run("inspect", models + "over_queries", "--json", file)
    assert ran.code == 0, ran.err
    (site,) = json.loads(file.read_text())["sites"]
    assert site["status"] == "refused"
    assert site["spec"] is None
    assert site["density"] is None
    assert "axis" in site["reason"]
    assert f"\n  why    {site['reason']}" in ran.out
    assert f"\n  check  {site['check']}" in ran.out
    assert f"\n  found  {site['nearest']}" in ran.out
    assert site["kind"] == "wrong-axis" and site["check"].startswith("wrong-axis: ")
    assert site["nearest"].startswith("softmax over axis ") and site["node"] and site["hint"]
    assert "1 refused" in ran.out.splitlines()[-1]


def test_an_observed_site_says_what_holds_it(run: Run, models: str) -> None:
    ran = run("inspect", models + "with_weights")
    assert ran.code == 0, ran.err
    assert " attend " in ran.out
    assert "\n  why    " in ran.out
    assert "1 observed" in ran.out.splitlines()[-1]


def test_no_site_is_said_loudly(run: Run, models: str) -> None:
    ran = run("inspect", models + "plain")
    assert ran.code == 3
    assert "NO ATTENTION SITE FOUND" in ran.error()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_minilm(run: Run, minilm_folder: Path, attention: str) -> None:
    ran = run("inspect", minilm_folder, "--attn", attention)
    assert ran.code == 0, ran.err
    assert "encoder.layer.0–5.attention.self   attend  q,k,v[B,12,I,32]  float32   6 sites lifted" in ran.out
    assert "  mask   attention_mask[b, j] ≠ 0" in ran.out
    assert "density ≤ 100 % at 512" in ran.out


def test_a_third_party_onnx_file(run: Run, onnx_files: dict[str, Path]) -> None:
    ran = run("inspect", onnx_files["minilm-int8"])
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[-1] == "minilm-int8: 6 attention sites, 6 lifted, 0 observed, 0 refused"


def test_a_padding_term_is_told_as_a_guarded_mask(run: Run, onnx_files: dict[str, Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "values.npz", attention_mask=np.array([[1, 1, 1, 0]]))
    ran = run("inspect", onnx_files["paraphrase-minilm-l3"], "--values", tmp_path / "values.npz", "--block")
    assert ran.code == 0, ran.err
    assert "  score  0.1768·s + 3.403e+38·(attention_mask[b, j] − 1)" in ran.out  # stated as it is written
    assert "  guard  if attention_mask[b, j] ∈ {0, 1}: mask attention_mask[b, j] ≠ 0" in ran.out
    assert "density 75 % at 4" in ran.out
    assert "  output  ─ linear " in ran.out


def test_version_and_help_do_not_load_torch() -> None:
    import subprocess
    import sys

    root = Path(__file__).parents[2]
    code = (
        "import sys; from attncompile.cli import main; main(['--version']); main(['--help']); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].startswith("attncompile ")
    assert done.stdout.splitlines()[-1] == "False"


def test_passes_are_listed_with_contract_and_options(run: Run) -> None:
    ran = run("passes")
    assert ran.code == 0, ran.err
    assert "fuse   exact" in ran.out
    assert "sparsify.window   calibrated" in ran.out
    assert "size = 1024   " in ran.out
