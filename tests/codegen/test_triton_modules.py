"""Generated modules as text and as files: deterministic, self-contained, safely named, privately kept."""

from __future__ import annotations

import ast
import dataclasses
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from attncompile.codegen.triton import generate
from attncompile.codegen.triton.cache import cache_folder, load, write
from attncompile.codegen.triton.names import Names
from attncompile.codegen.triton.structure import gives_zeros, weight_factor, why_not_spec
from attncompile.ir import Kind, parse_expr, parse_spec
from attncompile.ir.operators import OPERATORS
from attncompile.kernels.source import WIDTH
from tests.cases import BY_NAME, Case
from tests.kernels.cases import ALL_BY_NAME, ALL_CASES
from tests.kernels.decode_cases import DECODE_CASES

LOWERED = tuple(case for case in (*ALL_CASES, *DECODE_CASES) if why_not_spec(case.spec) is None)
HEAD = "attend  q,k,v[B,4,I,16]  float32\n  score  0.25·s\n"
SOFTMAX = "norm   softmax (float32)"


@pytest.mark.parametrize("case", LOWERED, ids=lambda case: case.name)
def test_module_text(case: Case) -> None:
    spec = case.spec
    module = generate(spec)
    assert module == generate(dataclasses.replace(spec, name="another.place"))
    assert module.name.isidentifier()
    tree = ast.parse(module.source)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported <= {"torch", "triton", "triton.language", "math", "concurrent.futures"}
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))
    documentation = ast.get_docstring(tree) or ""
    for line in str(dataclasses.replace(spec, name="attention")).splitlines():
        assert line.strip() in documentation
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert len(defined) == len(set(defined)) and defined[-1] == "attend"
    code = module.source.partition('"""\n\nimport')[2].splitlines()
    assert max(map(len, code)) <= WIDTH


def test_no_name_of_a_model_reaches_the_code_unchecked() -> None:
    names = Names()
    assert names.fresh("model.layers.0") == "model_layers_0"
    assert names.fresh("model.layers.0") == "model_layers_0_2"
    assert names.fresh("lambda") == "t_lambda"
    assert names.fresh("0x") == "t_0x"
    assert names.fresh("tl") == "tl_2"
    assert names.fresh('ключ"); import os').isidentifier()
    assert names.fresh("") == "tensor"


def test_quotes_in_a_spec_stay_text() -> None:
    spec = BY_NAME["padding"].spec
    attend = spec.operations[0]
    assert dataclasses.is_dataclass(attend)
    evil = '"""; raise SystemExit # \\'
    source = generate(dataclasses.replace(spec, name=evil)).source
    ast.parse(source)
    assert "SystemExit" not in source


@pytest.mark.parametrize("row", OPERATORS.values(), ids=lambda row: row.name)
def test_every_operator_has_a_form(row: object) -> None:
    assert row.triton  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "weight, factor",
    (
        ("w", "1.0"),
        ("2.0·w", "2.0"),
        ("w·head_mask[h]", "head_mask[h]"),
        ("where(h < 2, w, 0.0)", "where(h < 2, 1.0, 0.0)"),
        ("w + 0.5·w·head_mask[h]", None),
        ("w·w", None),
        ("where(w > 0.1, w, 0.0)", None),
        ("w + 1.0", None),
        ("w / 4.0", "0.25"),
    ),
)
def test_weight_edits_that_are_factors(weight: str, factor: str | None) -> None:
    tensors = {"head_mask": Kind.FLOAT}
    found = weight_factor(parse_expr(weight, tensors))
    if weight.startswith("w + 0.5"):
        assert found is not None  # a sum of two factors
    else:
        assert (None if found is None else str(found)) == factor


REFUSED = (
    ("rotary", "position, position, attend"),
    ("cache", "cache, cache, attend"),
    ("weight-edit", "not linear in w"),
)


@pytest.mark.parametrize("name, said", REFUSED)
def test_shared_rows_without_a_kernel(name: str, said: str) -> None:
    spec = BY_NAME[name].spec
    reason = why_not_spec(spec)
    assert reason is not None and said in reason
    with pytest.raises(ValueError, match="no Triton kernel"):
        generate(spec)


@pytest.mark.parametrize(
    "text, said",
    (
        (
            "attend  q,k,v[B,4,I,512]  float32\n  score  s\n  mask   true\n  norm   softmax (float32)",
            "1 to 256",
        ),
        (
            "attend  q,k,v[B,4,I,D]  float32\n  score  s\n  mask   true\n  norm   softmax (float32)",
            "constant number",
        ),
        (
            "attend  q,k,v[B,4,I,16]  float64\n  score  s\n  mask   true\n  norm   softmax (float64)",
            "float64",
        ),
        (
            "attend  q,k,v[B,4,I,16]  float32\n  score  s^(2.5)\n  mask   true\n  norm   softmax (float32)",
            "positive",
        ),
        (
            "attend  q,k,v[B,4,I,16]  float32\n  score  s\n  mask   j < X\n  norm   softmax (float32)",
            "size X",
        ),
    ),
)
def test_refusals_name_the_cause(text: str, said: str) -> None:
    reason = why_not_spec(parse_spec(f"x   {text}"))
    assert reason is not None and said in reason


CALLED = """x   attend  q[B,6,I,72]  k,v[B,2,J,72]  float16
  score  0.1·s + bias[h, j]
  mask   kept[b, j] ≠ 0
  kv_head h // 3
  norm   softmax (float32)
  given  bias[6,J]:float32
  given  kept[B,J]:int64"""


@pytest.mark.parametrize(
    "changed, said",
    (
        ({"q": None}, "q should be a tensor, but is of type NoneType"),
        ({"v": [1.0]}, "v should be a tensor, but is of type list"),
        ({"q": torch.zeros(6, 5, 72).half()}, r"q should have 4 axes, but has shape \(6, 5, 72\)"),
        ({"q": torch.zeros(2, 4, 5, 72).half()}, r"q should be of shape \(2, 6, 5, 72\), but is \(2, 4, 5, 72\)"),
        ({"k": torch.zeros(2, 2, 9, 64).half()}, r"k should be of shape \(2, 2, 9, 72\)"),
        ({"k": torch.zeros(2, 2, 9, 72)}, "k should be torch.float16 on cpu, but is torch.float32 on cpu"),
        ({name: torch.zeros(2, h, n, 72).double() for name, h, n in (("q", 6, 5), ("k", 2, 9), ("v", 2, 9))}, "takes"),
        ({"bias": torch.zeros(6, 9).int()}, "bias should be torch.float16 or .* but is torch.int32 on cpu"),
        ({"kept": torch.ones(2, 9)}, "kept should be torch.int8 or .* but is torch.float32 on cpu"),
        ({"v": torch.zeros(2, 2, 9, 72, device="meta").half()}, "v should be torch.float16 on cpu, but .* on meta"),
        ({}, "runs on a CUDA or ROCm device, but the tensors are on cpu"),
    ),
)
def test_what_a_module_cannot_take_is_named_before_a_launch(changed: dict[str, Any], said: str) -> None:
    sizes = {"q": (2, 6, 5, 72), "k": (2, 2, 9, 72), "v": (2, 2, 9, 72)}
    given: dict[str, Any] = {name: torch.zeros(size).half() for name, size in sizes.items()}
    given |= {"bias": torch.zeros(6, 9), "kept": torch.ones(2, 9, dtype=torch.int64), **changed}
    with pytest.raises(ValueError, match=said):
        load(generate(parse_spec(CALLED)))(**given)


@pytest.mark.parametrize(
    "name, zeros",
    (
        ("empty-rows-nan", True),
        ("empty-rows-lowest", True),
        ("causal-padding", False),
        ("causal", False),
        ("window", False),
        ("dilated", True),
        ("full", False),
        ("sigmoid", False),
        ("fill-counts", False),
    ),
)
def test_where_empty_rows_differ_is_known(name: str, zeros: bool) -> None:
    assert gives_zeros(ALL_BY_NAME[name].spec) == zeros


def test_files_are_private_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCOMPILE_CACHE", str(tmp_path / "cache"))
    folder = cache_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    module = generate(BY_NAME["causal"].spec)
    path = write(module, folder)
    assert path.read_text(encoding="utf-8") == module.source
    path.write_text("raise SystemExit", encoding="utf-8")
    assert write(module, folder) == path and path.read_text(encoding="utf-8") == module.source
    assert [p.name for p in folder.iterdir()] == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="folder modes are a POSIX matter")
def test_a_folder_that_others_may_write_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCOMPILE_CACHE", str(tmp_path))
    (tmp_path / "triton").mkdir()
    os.chmod(tmp_path / "triton", 0o777)
    assert stat.S_IMODE(cache_folder().stat().st_mode) & 0o022 == 0
