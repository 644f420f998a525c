"""Packages of AOTInductor: they run without us, are what was checked, and say what they do not take."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import attncompile
from attncompile.convert import pt2, trusted
from attncompile.convert.comparison import ABSOLUTE
from attncompile.frontends.errors import InputError
from attncompile.ir import Quantize
from attncompile.plan.schema import load_plan
from attncompile.verify import load_certificate, require_as_good_as_eager
from tests.backend.test_backend import small_bert, small_llama, tokens
from tests.tampering import change

OWN = """
import torch
from torch import nn

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.qkv = nn.Linear(24, 72)

    def forward(self, x, mask, scale=1.0):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4)
        s = (q @ k.mT * scale / 6 ** 0.5).masked_fill(~mask[:, None, None, :], float("-inf"))
        return {"out": (s.softmax(-1) @ v).transpose(1, 2).flatten(2)}

def build():
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, 7:] = False
    return Own().eval(), (torch.randn(2, 11, 24),), {"mask": mask, "scale": 0.5}
"""

ALONE = """
import sys, torch

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("attncompile", "transformers"):
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
given = torch.load(sys.argv[2], weights_only=True)
package = torch._inductor.aoti_load_package(sys.argv[1])
torch.save(package(*given["args"], **given["kwargs"]), sys.argv[3])
assert "attncompile" not in sys.modules and "transformers" not in sys.modules
"""


def run_alone(package: Path, scratch: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a package returns in a process that has neither attncompile nor transformers."""
    given, made = scratch / "given.pt", scratch / "made.pt"
    torch.save({"args": args, "kwargs": kwargs}, given)
    command = [sys.executable, "-W", "ignore", "-c", ALONE, package, given, made]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.load(made, weights_only=True)


@pytest.fixture(scope="module")
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The user's cache, empty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNCOMPILE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("own") / "own.py"
    source.write_text(OWN)
    return source


@pytest.fixture(scope="module")
def packaged(own: Path, private_cache: None) -> Path:
    """A module of one's own, converted."""
    out = own.parent / "package"
    assert attncompile.convert(f"{own}:build", out, to="pt2").certificate.passed
    return out


def own_call(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, length - length // 3 :] = False
    return torch.randn(batch, length, 24, generator=generator), mask


def own_model() -> torch.nn.Module:
    space: dict[str, Any] = {}
    exec(OWN, space)
    model: torch.nn.Module = space["Own"]().eval()
    return model


def test_the_folder_is_complete_and_pinned(packaged: Path) -> None:
    names = {path.name for path in packaged.iterdir()}
    assert {"model.pt2", "package.json", "plan.json", "certificate.json", "report.html", "source.json"} <= names
    plan, certificate = load_plan(packaged / "plan.json"), load_certificate(packaged / "certificate.json")
    assert plan.target == "pt2" and [site.operator for site in plan.sites] == ["sdpa"]
    assert certificate.passed and set(certificate.files) == {"model.pt2", "package.json"}


def test_a_package_runs_where_attncompile_is_not_installed(packaged: Path, tmp_path: Path) -> None:
    x, mask = own_call(3, 17)
    made = run_alone(packaged / "model.pt2", tmp_path, (x,), {"mask": mask})
    model = own_model()
    with torch.no_grad():
        expected, exact = model(x, mask, 0.5)["out"], model.double()(x.double(), mask, 0.5)["out"]
    # not bit for bit what it gives here: a process adds up by as many threads as it has
    require_as_good_as_eager(made["out"], exact, expected, 24, "the package")


def test_a_package_is_called_as_the_model_is(packaged: Path) -> None:
    loaded, model = attncompile.load(packaged), own_model()
    for batch, length in ((1, 1), (1, 9), (4, 1), (5, 33)):
        x, mask = own_call(batch, length)
        with torch.no_grad():
            expected, exact = model(x, mask, 0.5)["out"], model.double()(x.double(), mask, 0.5)["out"]
            model.float()
            strided = x.mT.contiguous().mT
            ways = (loaded(x, mask=mask, scale=0.5), loaded(x=x, mask=mask), loaded(x, mask), loaded(strided, mask))
        for made in ways:
            require_as_good_as_eager(made["out"], exact, expected, max(24, length), "the package")


def test_a_package_is_verified_again(packaged: Path) -> None:
    assert attncompile.verify(packaged).passed


def calls() -> dict[str, tuple[tuple[Any, ...], dict[str, Any], str]]:
    """Calls that the package does not compute: arguments, keywords, and what is said."""
    x, mask = own_call(2, 8)
    return {
        "missing": ((x,), {}, "the argument mask is missing"),
        "unknown": ((x, mask), {"bias": x}, "packaged without the argument bias"),
        "twice": ((x,), {"x": x, "mask": mask}, "by position and by name"),
        "many": ((x, mask, 0.5, 1), {}, "by position, got 4"),
        "value": ((x, mask), {"scale": 0.25}, "scale is 0.25, but this model was packaged with 0.5"),
        "dtype": ((x.double(), mask), {}, "x is torch.float64, but"),
        "rank": ((x[0], mask), {}, "packaged for"),
        "channels": ((x[..., :12], mask), {}, "but the package takes"),
        "unequal": ((x, mask[:, :5]), {}, "length is 8 in another argument"),
        "empty": ((x[:, :0], mask[:, :0]), {}, "length is 0 in x"),
        "kind": ((x, "mask"), {}, "packaged with a tensor"),
        "device": ((x.to("meta"), mask), {}, "x is on meta, but the package runs on the cpu"),
        "gradient": ((x.clone().requires_grad_(), mask), {}, "wants a gradient"),
    }


@pytest.mark.parametrize("case", list(calls()))
def test_what_a_package_does_not_compute_is_said(packaged: Path, case: str) -> None:
    args, kwargs, said = calls()[case]
    with pytest.raises(ValueError, match=said) as raised:
        attncompile.load(packaged)(*args, **kwargs)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["model.pt2", "package.json"])
def test_damage_is_noticed_before_anything_runs(packaged: Path, tmp_path: Path, name: str) -> None:
    damaged = Path(shutil.copytree(packaged, tmp_path / "damaged"))
    content = bytearray((damaged / name).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / name).write_bytes(content)
    for use in (attncompile.load, attncompile.verify):
        with pytest.raises(InputError, match=f"{name} is not the file that"):
            use(damaged)
    (damaged / name).unlink()
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        attncompile.load(damaged)


def test_a_package_from_elsewhere_runs_only_with_permission(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNCOMPILE_CACHE", str(tmp_path / "another user"))
    for use in (attncompile.load, attncompile.verify):
        with pytest.raises(InputError, match="machine code that you did not make here"):
            use(packaged)
    x, mask = own_call(1, 4)
    with torch.no_grad():
        assert attncompile.load(packaged, allow_code=True)(x, mask)["out"].shape == (1, 4, 24)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("torch", "2.1.0", "made by PyTorch 2.1.0, and this is"),
        ("machine", "sparc64", "compiled for sparc64"),
        ("instructions", "AVX512 AMX_UNHEARD", None),
    ],
)
def test_a_package_that_cannot_run_here_is_refused(
    packaged: Path, tmp_path: Path, field: str, value: str, said: str | None
) -> None:
    moved = Path(shutil.copytree(packaged, tmp_path / "moved"))
    change(moved / "package.json", [field], value)
    digest = trusted.file_digest(moved / "package.json")
    change(moved / "certificate.json", ["files", "package.json"], digest)
    if said is None:  # what torch does not know is no reason to refuse
        attncompile.load(moved)
        return
    with pytest.raises(InputError, match=said):
        attncompile.load(moved)


def test_a_processor_that_lacks_instructions_is_told(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pt2, "lacking_instructions", lambda wanted: wanted.split()[0] if wanted else "AVX2")
    with pytest.raises(InputError, match="this is a processor without"):
        attncompile.load(packaged)


def test_a_package_is_for_one_device(packaged: Path) -> None:
    with pytest.raises(InputError, match="runs on the cpu, not on cuda"):
        attncompile.load(packaged, device="cuda")
    assert attncompile.load(packaged, device="cpu") is not None


def test_wrong_options_leave_nothing(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="packages are made for the CPU"):
        attncompile.convert(f"{own}:build", tmp_path / "out", to="pt2", provider="cuda")
    with pytest.raises(InputError, match="chooses among ONNX operators"):
        attncompile.convert(f"{own}:build", tmp_path / "out", to="pt2", prefer="fused")
    with pytest.raises(InputError, match="a model for PyTorch keeps its own cache"):
        attncompile.convert(f"{own}:build", tmp_path / "out", to="pt2", cache=True)
    monkeypatch.setattr(pt2, "cpp_compiler", lambda: None)
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler"):
        attncompile.convert(f"{own}:build", tmp_path / "out", to="pt2")
    assert list(tmp_path.iterdir()) == []


def test_no_compiler_is_found_where_there_is_none(tmp_path: Path) -> None:
    code = "from attncompile.frontends.torch_internals import cpp_compiler; print(cpp_compiler())"
    environment = {"PATH": str(tmp_path), "CXX": "no-such-compiler", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "None\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_checkpoint_becomes_a_package(kind: str, private_cache: None, tmp_path: Path) -> None:
    model = small_llama() if kind == "llama" else small_bert("sdpa")
    model.save_pretrained(tmp_path / "model")
    conversion = attncompile.convert(tmp_path / "model", tmp_path / "out", to="pt2")
    assert conversion.certificate.passed and len(conversion.report.sites) == 2
    names = json.loads((tmp_path / "out" / "package.json").read_text())["outputs"]
    loaded = attncompile.load(tmp_path / "out")
    for batch, length, padding in ((1, 1, "left"), (1, 40, "left"), (4, 23, "left"), (3, 12, "right")):
        call = tokens(batch, length, padding)
        if kind == "bert":
            call["token_type_ids"] = torch.zeros_like(call["input_ids"])
        kept = call["attention_mask"].bool()
        with torch.no_grad():
            expected, actual = model(**call), loaded(**call)
        assert isinstance(actual, transformers.utils.ModelOutput) and list(actual) == names
        torch.testing.assert_close(actual[0][kept], expected[0][kept], atol=ABSOLUTE[torch.float32], rtol=0)
        alone = run_alone(tmp_path / "out" / "model.pt2", tmp_path, (), call)
        assert torch.equal(alone[names[0]], actual[0])
    assert attncompile.verify(tmp_path / "out").passed


@pytest.mark.slow
def test_rounded_products_keep_their_sizes_free(tmp_path: Path) -> None:
    model = small_bert()
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    attncompile.convert(tmp_path / "model", out, to="pt2", passes="fuse,quantize.int8")
    assert load_plan(out / "plan.json").passes == "fuse,quantize.int8"
    assert set(json.loads((out / "package.json").read_text())["sizes"]) == {"batch", "length"}
    loaded = attncompile.load(out)
    for batch, length in ((1, 5), (3, 32), (2, 33)):
        given = tokens(batch, length)
        given["token_type_ids"] = torch.zeros_like(given["input_ids"])
        with torch.no_grad():
            apart = (loaded(**given)[0] - model(**given)[0]).abs().max()
        assert 0 < apart < 0.1
    assert attncompile.verify(out).passed


def test_sizes_that_a_pass_fixes_are_said_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fixed(self: Quantize, tensors: Any, sizes: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        read = tensors[self.tensor].to(dtype)
        return {self.out: read[:, :, : int(read.shape[2])]}

    monkeypatch.setattr(Quantize, "reference", fixed)
    monkeypatch.setattr(pt2, "compile_package", lambda *given: pytest.fail("it was compiled"))
    (tmp_path / "own.py").write_text(OWN)
    said = r"holds for one size of length alone \(axis 1 of x is fixed at 37: .*mask"
    with pytest.raises(InputError, match=said) as raised:
        attncompile.convert(f"{tmp_path / 'own.py'}:build", tmp_path / "out", to="pt2", passes="quantize.int8")
    assert "leave out the pass" in str(raised.value) and not (tmp_path / "out").exists()
