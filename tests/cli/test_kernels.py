"""``attncompile kernels``: modules, binaries, the index, and what is said of what there is not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from attncompile.codegen.triton.ahead import Compiled
from attncompile.convert import kernel_folder
from attncompile.convert.kernels import kernel_sources
from attncompile.ir import parse_spec
from tests.cli.conftest import Run

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCOMPILE_CACHE", f"{tmp_path}/cache")
    monkeypatch.setenv("TRITON_CACHE_DIR", f"{tmp_path}/compiled")


def made_up(kernel: str, target: str, shared: int) -> Compiled:
    texts = {"cubin": b"binary", "hsaco": b"binary"}
    return Compiled(kernel, target, shared, 128, 0, texts, kernel, 128, (("query", "*bf16"),), {"BLOCK_I": 64})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled: a kernel is a few bytes."""

    def compile(module: Any, target: Any, dtype: str) -> tuple[Compiled, ...]:
        return tuple(made_up(kernel.name, str(target), 1024) for kernel in module.kernels)

    monkeypatch.setattr(kernel_folder, "_compile", compile)
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def read(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / "kernels.json").read_text())
    return index


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"), reason="TRITON_INTERPRET replaces the compiler"
)
def test_binaries_are_those_of_the_target(run: Run, models: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = run("kernels", f"{models}causal", "-o", out, "--target", "gfx942", "--target", "sm_90", "--dtype", "float16")
    assert (ran.code, ran.err) == (0, "")
    (entry,) = read(out)["kernels"]  # both layers compute the same
    assert entry["sites"] == ["0", "1"]
    plain, hopper = (file for file in entry["files"] if not file["file"].endswith("_short.py"))
    assert {binary["target"]: (out / binary["file"]).read_bytes()[:4] for binary in plain["binaries"]} == {
        "gfx942": b"\x7fELF",
        "sm_90": b"\x7fELF",
    }
    (binary,) = hopper["binaries"]
    assert (hopper["language"], binary["target"], binary["dtype"]) == ("gluon", "sm_90", "float16")
    assert binary["shared"] > 0 and binary["arguments"]["query"].startswith("tensordesc<fp16")
    assert binary["symbol"].encode() in (out / binary["file"]).read_bytes()
    assert f"{binary['registers']}" in ran.out and "written to" in ran.out


@pytest.mark.usefixtures("quick")
def test_the_modules_are_those_of_a_conversion_and_every_file_is_in_the_index(
    run: Run, models: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = run("kernels", f"{models}window", "-o", out, "--target", "sm_80", "--dtype", "bfloat16")
    assert ran.code == 0
    entries = read(out)["kernels"]
    sources = kernel_sources(parse_spec(entry["spec"]) for entry in entries)
    files = [file for entry in entries for file in entry["files"]]
    assert {file["file"]: (out / file["file"]).read_text() for file in files} == sources
    binaries = [binary["file"] for file in files for binary in file["binaries"]]
    assert {path.name for path in out.iterdir()} == {*sources, *binaries, "kernels.json"}
    assert all(f"{site}\n" in ran.out for entry in entries for site in entry["sites"])
    assert "no binary of" in ran.out and "written for compute capability 9.0 alone" in ran.out


@pytest.mark.usefixtures("quick")
def test_the_dtype_is_the_models_unless_given(run: Run, models: str, tmp_path: Path) -> None:
    ran = run("kernels", f"{models}with_weights", "-o", tmp_path / "out")
    (entry,) = read(tmp_path / "out")["kernels"]
    assert [binary["dtype"] for binary in entry["files"][0]["binaries"]] == ["float32"]
    assert entry["observed"] == entry["sites"]
    assert "it takes float16 and bfloat16" in ran.out and "the model keeps its own computation" in ran.out


@pytest.mark.usefixtures("quick")
def test_what_does_not_compile_is_said_and_the_rest_is_written(
    run: Run, models: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile(module: Any, target: Any, dtype: str) -> tuple[Compiled, ...]:
        if dtype == "float16":
            raise RuntimeError("\nPassManager::run failed\nmore")
        return (made_up("attend_forward", str(target), 200_000 if str(target) == "sm_89" else 1024),)

    monkeypatch.setattr(kernel_folder, "_compile", compile)
    targets = ["--target", "sm_89", "--target", "sm_100"]
    types = ["--dtype", "float16", "--dtype", "bfloat16"]
    ran = run("kernels", f"{models}causal", "-o", tmp_path / "out", *targets, *types)
    assert ran.code == 1
    assert "for sm_89 float16, sm_100 float16: RuntimeError: PassManager::run failed\n" in ran.out
    assert "attend_forward needs 200000 bytes of shared memory, and a program on sm_89 has 101376" in ran.out
    (entry,) = read(tmp_path / "out")["kernels"]
    assert [binary["target"] for binary in entry["files"][0]["binaries"]] == ["sm_100"]


@pytest.mark.usefixtures("quick")
def test_kernels_compiled_twice_have_files_of_their_own(
    run: Run, models: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--passes", "fuse,quantize.int8", "--dtype", "float16"]
    assert run("kernels", f"{models}causal", "-o", tmp_path / "out", *options).code == 0
    (entry,) = read(tmp_path / "out")["kernels"]
    names = [binary["file"].split(".")[1] for binary in entry["files"][0]["binaries"]]
    assert names == ["quantize_blocks", "quantize_blocks_2", "attend_forward"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("model", "options", "code", "said"),
    [
        ("causal", ["--target", "sm_91"], 2, "no target 'sm_91'; choose from sm_80, sm_89, sm_90, sm_100, gfx942"),
        ("causal", ["--dtype", "float8"], 2, "no kernels in 'float8'; choose from float16, bfloat16, float32"),
        ("causal", ["--passes", "melt"], 2, "melt"),
        ("over_queries", [], 2, "no site has a generated kernel; softmax: refused: the normaliser runs over axis 2"),
        ("plain", [], 3, "NO ATTENTION SITE FOUND"),
        ("missing", [], 2, "missing"),
    ],
)
def test_mistakes_leave_nothing(
    run: Run, models: str, tmp_path: Path, model: str, options: list[str], code: int, said: str
) -> None:
    ran = run("kernels", f"{models}{model}", "-o", tmp_path / "out", *options)
    assert ran.code == code
    assert said in ran.error()
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quick")
def test_a_folder_is_only_replaced_when_asked(run: Run, models: str, tmp_path: Path) -> None:
    call = ["kernels", f"{models}causal", "-o", tmp_path / "out"]
    assert run(*call).code == 0
    assert "it exists already" in run(*call).error()
    assert run(*call, "--overwrite").code == 0
    (tmp_path / "file").write_text("text")
    assert "a part of this path is a file" in run(*call[:3], tmp_path / "file" / "out").error()


def test_without_a_compiler_nothing_is_begun(
    run: Run, models: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET; unset this variable" in run("kernels", f"{models}causal", "-o", tmp_path / "out").error()
    monkeypatch.setattr(kernel_folder.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in run("kernels", f"{models}causal", "-o", tmp_path / "out").error()
