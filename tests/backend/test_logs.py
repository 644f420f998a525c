"""What torch's own logs say of sites, and of why a graph is compiled again: each switch that the documents name."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

import attncompile
import attncompile.hf
from attncompile.frontends.torch_logs import why_again
from tests.apart import finished, run_apart
from tests.backend.test_backend import small_llama, tokens
from tests.backend.test_hygiene import inputs_of, model_of

LOGGED = """
import torch
import attncompile
from tests.backend.test_hygiene import inputs_of, model_of

model = model_of(1)
compiled = attncompile.compile(model, rest="eager", dynamic=False)
with torch.no_grad():
    for length in (11, 12):
        compiled(inputs_of(model, length))
"""

SITE, AGAIN = ": blockwise (", "compiled again: tensor 'x' size mismatch at index 1. expected 11, actual 12"


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()
    attncompile.hf.forget()


@pytest.mark.parametrize(
    ("switch", "more"),
    [
        pytest.param("attncompile.sites", [], marks=pytest.mark.slow),
        ("+attncompile.sites,recompiles", ["[2,2,11,12]  float32", "Recompiling function", "[2,2,12,12]  float32"]),
        ("attncompile,recompiles", ["Recompiling function"]),
    ],
)
def test_torch_logs_says_what_was_done_and_why_again(tmp_path: Path, switch: str, more: list[str]) -> None:
    """Each line once; the number of the compilation, which torch prefixes, joins its lines and ours."""
    run_apart(LOGGED, TORCH_LOGS=switch, TORCH_LOGS_OUT=str(tmp_path / "log"), TORCH_TRACE=str(tmp_path / "trace"))
    said = (tmp_path / "log").read_text(encoding="utf-8")
    places = [said.find(SITE), said.find(AGAIN), said.rfind(SITE)]
    assert -1 < places[0] < places[1] < places[2], said
    assert (said.count(SITE), said.count(AGAIN)) == (2, 1)
    assert all(text in said for text in more) and (" attend " in said) == switch.startswith("+")
    numbers = [re.search(r"\[(\d+/\d+)\]", line) for line in said.splitlines() if SITE in line or AGAIN in line]
    assert [number and number[1] for number in numbers] == ["0/0", "0/1", "0/1"]
    assert ("Recompiling" in said) == ("recompiles" in switch)
    (file,) = (tmp_path / "trace").glob("*.log")
    trace = file.read_text(encoding="utf-8")
    assert trace.count('"name": "attncompile_sites"') == 2 and trace.count(SITE) == 2 and trace.count(AGAIN) == 1


def test_the_log_of_sites_costs_an_import_of_torch_nothing() -> None:
    """TORCH_LOGS is read while torch is imported: of ours it may import the package alone, which is all but empty."""
    code = "import sys, torch; print([name for name in sys.modules if name.split('.')[0] == 'attncompile'])"
    assert run_apart(code, TORCH_LOGS="attncompile.sites").strip() == "['attncompile']"


def test_the_name_of_the_artifact_is_refused_by_torch_logs() -> None:
    """PyTorch reads the variable before anybody could tell it the name, as the documents say."""
    done: subprocess.CompletedProcess[str] = finished("import torch", TORCH_LOGS="attncompile_sites")
    assert done.returncode != 0 and "Invalid log settings: attncompile_sites" in done.stderr


SET = """
import logging, sys
import torch
sys.stderr = open(sys.argv[1], "w")
for names in ({"attncompile.sites": logging.INFO}, {"attncompile_sites": True}, {"attncompile": logging.INFO}, {}):
    print(names, file=sys.stderr)
    torch._dynamo.reset()
    torch._logging.set_logs(modules=names)
    exec(sys.argv[2].replace("(11, 12)", "(11,)"))
"""


def test_torchs_own_switch_takes_the_log_and_the_lines_of_sites(tmp_path: Path) -> None:
    """The log before we are imported too, the artifact behind that."""
    run_apart(SET, str(tmp_path / "log"), LOGGED)
    parts = re.split(r"^\{", (tmp_path / "log").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert [part.count(SITE) for part in parts] == [0, 1, 1, 1, 0]


def test_a_torch_whose_logs_are_others_lacks_our_names_and_nothing_else() -> None:
    without = "import sys; sys.modules['torch._logging._internal'] = None; "
    run_apart(f"{without}from attncompile.frontends import torch_logs as t; t.register(); t.site_logger().info('x')")


def test_why_again_is_printed_and_explained_too(capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of(1)
    compiled = attncompile.compile(model, rest="eager", dynamic=False, verbose=True)
    with torch.no_grad():
        for length in (11, 12):
            compiled(inputs_of(model, length))
    printed = capsys.readouterr().out
    assert printed.count("attncompile: softmax: blockwise") == 2 and printed.count(f"attncompile: {AGAIN}\n") == 1
    explanation = attncompile.explain(compiled)
    assert [f"compiled again: {made.again}" for made in explanation.compilations] == ["compiled again: ", AGAIN]
    assert str(explanation).count(f"\n  {AGAIN}\n") == 1
    assert why_again() == "", "no compilation is going on"


def test_the_log_has_the_sites_of_both_doors(caplog: pytest.LogCaptureFixture) -> None:
    """Layers of a loaded model by their class, once for each kind of call and layer."""
    with caplog.at_level("DEBUG", "attncompile.sites"), torch.no_grad():
        for model in (small_llama("attncompile"), torch.compile(small_llama("attncompile"), backend="eager")):
            for _ in range(2):
                model(**tokens(2, 11))
    lines = [record.getMessage() for record in caplog.records if ": LlamaAttention: blockwise (" in record.getMessage()]
    specs = [record for record in caplog.records if "LlamaAttention   attend  q[B,6,I,8]" in record.getMessage()]
    assert len(lines) == len(specs) == 2 + 1
