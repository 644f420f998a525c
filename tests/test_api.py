"""The Python API: what the package offers by name, lifting, compiling, and conversions that open again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import attncompile
from attncompile.frontends.errors import InputError
from attncompile.verify import require_as_good_as_eager

ROOT = Path(__file__).resolve().parent.parent


def tiny_bert() -> torch.nn.Module:
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=128,
        attn_implementation="sdpa",
    )
    return transformers.BertModel(config).eval()


def tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, -2:] = 0
    return {"input_ids": torch.randint(3, 97, (batch, length)), "attention_mask": mask}


def require_same(actual: torch.Tensor, original: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """As near to the model in float64 as the model itself is in float32; changes the model's dtype."""
    with torch.no_grad():
        eager = original(**inputs).last_hidden_state
        reference = original.double()(**inputs).last_hidden_state
    require_as_good_as_eager(actual, reference, eager, inputs["input_ids"].shape[1], "the compiled model")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT as a Hugging Face folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    tiny_bert().save_pretrained(folder)
    return folder


# --- names --------------------------------------------------------------------------------------------------


def test_public_names_are_there_and_counted() -> None:
    assert sorted(attncompile.__all__) == [
        "CaptureError",
        "Conversion",
        "InputError",
        "Program",
        "Refusal",
        "RefusalError",
        "Site",
        "Spec",
        "__version__",
        "attention",
        "compile",
        "convert",
        "explain",
        "lift",
        "load",
        "parse_spec",
        "tuning",
        "verify",
    ]
    for name in attncompile.__all__:
        assert getattr(attncompile, name) is not None
    assert set(attncompile.__all__) <= set(dir(attncompile))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        attncompile.nothing  # noqa: B018


@pytest.mark.parametrize("first", ["pass", "import attncompile.lift.program"])
def test_a_name_is_callable_whatever_was_imported_first(first: str) -> None:
    """`attncompile.lift` is a package and a function, in any order of imports."""
    code = f"""
{first}
import attncompile
print([callable(getattr(attncompile, name)) for name in ("lift", "convert", "verify", "compile", "load")])
from attncompile.lift import Program
import attncompile.lift as room
print(room.Program is Program)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str([True] * 5), "True"]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, attncompile; print([m for m in ('torch', 'onnx', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- lift ---------------------------------------------------------------------------------------------------


def test_a_module_is_lifted_with_its_arguments() -> None:
    program = attncompile.lift(tiny_bert(), (), tokens(2, 11))
    assert [site.status for site in program.sites] == ["lifted", "lifted"]
    assert program.model == "BertModel"
    assert "encoder.layer.0–1.attention.self   attend  q,k,v[B,3,I,8]  float32" in str(program)
    assert str(program).endswith("BertModel: 2 attention sites, 2 lifted, 0 observed, 0 refused")


def test_a_path_prints_like_inspect(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from attncompile.cli import main

    program = attncompile.lift(checkpoint)
    assert main(["inspect", str(checkpoint)]) == 0
    assert capsys.readouterr().out == f"{program}\n"


def test_arguments_only_go_with_a_module(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="example arguments only go with a module"):
        attncompile.lift(checkpoint, (torch.zeros(1),))


# --- words and folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ({"to": "tensorrt"}, "to is 'tensorrt'; it may be onnx or torch"),
        ({"provider": "tpu"}, "has no provider 'tpu'"),
        ({"prefer": "best"}, "it may be fastest or fused or decomposed"),
        ({"attn_implementation": "flash"}, "it may be sdpa or eager"),
        ({"to": "torch", "passes": "fuse,sparsify.windo"}, "did you mean 'sparsify.window'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_an_unknown_word_names_the_valid_ones(
    checkpoint: Path, tmp_path: Path, word: dict[str, str], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        attncompile.convert(checkpoint, tmp_path / "out", **word)
    assert list(tmp_path.iterdir()) == []


def test_verify_and_load_want_a_conversion(tmp_path: Path) -> None:
    for open_folder in (attncompile.verify, attncompile.load):
        with pytest.raises(InputError, match=r"no plan\.json in it"):
            open_folder(tmp_path)


def test_compile_says_a_misspelt_option_at_once() -> None:
    with pytest.raises(ValueError, match="did you mean 'rest'"):
        attncompile.compile(tiny_bert(), rset="eager")
    with pytest.raises(ValueError, match="did you mean 'fullgraph'"):
        attncompile.compile(torch.nn.Identity(), fullgrph=True)


def test_compile_gives_the_same_outputs() -> None:
    torch.compiler.reset()
    model, inputs = tiny_bert(), tokens(2, 11)
    with torch.no_grad():
        actual = attncompile.compile(model, rest="eager")(**inputs).last_hidden_state
    require_same(actual, model, inputs)


# --- conversions --------------------------------------------------------------------------------------------


def test_a_torch_conversion_opens_again_and_is_verified(checkpoint: Path, tmp_path: Path) -> None:
    torch.compiler.reset()
    out = tmp_path / "out"
    made = attncompile.convert(checkpoint, out, to="torch")
    assert made.folder == out
    assert made.certificate.passed
    assert {"model.safetensors", "plan.json", "report.json", "report.html", "certificate.json"} <= {
        path.name for path in out.iterdir()
    }
    inputs = tokens(2, 11)
    original = transformers.AutoModel.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        actual = attncompile.load(out)(**inputs).last_hidden_state
    require_same(actual, original, inputs)
    assert attncompile.verify(out).passed


def test_a_plan_that_was_edited_is_noticed(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    attncompile.convert(checkpoint, out, to="torch")
    plan = json.loads((out / "plan.json").read_text())
    plan["provider"] = "cuda"
    (out / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(InputError, match="not the one that certificate"):
        attncompile.verify(out)
