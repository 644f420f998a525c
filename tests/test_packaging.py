"""What is shipped: `attncompile` alone, the same from a checkout and an sdist, with working entry points."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import attncompile

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def build(out: Path, *options: str) -> None:
    """Run the build front end in this environment, so that nothing is fetched."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *options, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def content(wheel: Path) -> dict[str, int]:
    """The files of a wheel with their checksums."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.CRC for entry in archive.infolist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`wheel` built from the checkout, `sdist`, and `wheel of sdist`."""
    direct, through_sdist = tmp_path_factory.mktemp("direct"), tmp_path_factory.mktemp("sdist")
    build(direct, "--wheel")
    build(through_sdist)  # builds the sdist, then the wheel from it
    return {
        "wheel": next(direct.glob("*.whl")),
        "sdist": next(through_sdist.glob("*.tar.gz")),
        "wheel of sdist": next(through_sdist.glob("*.whl")),
    }


def test_checkout_and_sdist_give_the_same_wheel(built: dict[str, Path]) -> None:
    assert content(built["wheel"]) == content(built["wheel of sdist"])


def test_the_wheel_holds_attncompile_alone(built: dict[str, Path]) -> None:
    tops = {name.split("/")[0] for name in content(built["wheel"])}
    assert tops == {"attncompile", f"attncompile-{PROJECT['version']}.dist-info"}


def test_the_wheel_holds_every_module_and_the_type_marker(built: dict[str, Path]) -> None:
    shipped = {name for name in content(built["wheel"]) if name.startswith("attncompile/")}
    modules = {path for folder in ("", "passes", "codegen", "kernels") for path in modules_of(folder)}
    assert modules | {"attncompile/py.typed"} <= shipped


def modules_of(linked: str) -> set[str]:
    """The modules under a folder, by the path that they have in the wheel."""
    folder = ROOT / "attncompile" / linked
    return {path.relative_to(ROOT).as_posix() for path in folder.rglob("*.py")}


def test_the_sdist_holds_files_not_links(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        assert [member.name for member in archive if not (member.isfile() or member.isdir())] == []


def test_the_licence_is_shipped(built: dict[str, Path]) -> None:
    assert any(name.endswith("licenses/LICENSE") for name in content(built["wheel"]))


def test_an_unpacked_wheel_is_one_package(built: dict[str, Path], tmp_path: Path) -> None:
    """Away from the checkout, every room is imported from the wheel's own folder."""
    with zipfile.ZipFile(built["wheel"]) as archive:
        archive.extractall(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import attncompile, attncompile.codegen, attncompile.kernels, attncompile.passes
rooms = (attncompile, attncompile.codegen, attncompile.kernels, attncompile.passes)
print([room.__file__ for room in rooms if not room.__file__.startswith({str(tmp_path)!r})])
"""
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_version_is_said_once() -> None:
    assert attncompile.__version__ == PROJECT["version"]


def entry_points() -> dict[str, str]:
    """Every entry point that the project declares, as group/name → target."""
    declared = {"scripts": PROJECT["scripts"], **PROJECT["entry-points"]}
    return {f"{group}/{name}": target for group, rows in declared.items() for name, target in rows.items()}


@pytest.mark.parametrize("target", entry_points().values(), ids=entry_points())
def test_entry_points_lead_somewhere(target: str) -> None:
    module, _, attribute = target.partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))


def test_the_installed_package_is_this_one() -> None:
    """Where the package is installed (CI does), the installed entry points are those of pyproject.toml."""
    try:
        installed = metadata.distribution("attncompile")
    except metadata.PackageNotFoundError:
        pytest.skip("a checkout that is not installed")
    groups = {"console_scripts": "scripts"}
    found = {f"{groups.get(e.group, e.group)}/{e.name}": e.value for e in installed.entry_points}
    assert found == entry_points()
