"""The layout: four folders at the root, one package, rooms that import only what the contracts allow."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "attncompile"
LINKED = ("codegen", "kernels", "passes")
NAMES_THAT_SAY_NOTHING = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}

in_a_checkout = pytest.mark.skipif(
    (ROOT / "PKG-INFO").exists(), reason="an unpacked sdist holds real folders in place of the links"
)


def run_python(code: str) -> str:
    """What a fresh interpreter, started in the root of the repository, prints for `code`."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def contracts() -> list[dict[str, list[str]]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


def rooms() -> list[str]:
    """The names of the packages in `attncompile`, whether they are folders or links."""
    return sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__")


@in_a_checkout
@pytest.mark.parametrize("name", LINKED)
def test_the_folder_at_the_root_is_reached_through_a_relative_link(name: str) -> None:
    link = PACKAGE / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert link.resolve() == ROOT / name


@in_a_checkout
def test_links_are_committed_as_links() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--stage", *(f"attncompile/{name}" for name in LINKED)]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["120000"] * len(LINKED)


@pytest.mark.parametrize("room", rooms())
def test_every_room_is_a_package(room: str) -> None:
    """Import-linter and builders overlook a folder without `__init__.py`."""
    assert (PACKAGE / room / "__init__.py").is_file()


def test_every_room_has_a_contract() -> None:
    assert [f"attncompile.{room}" for room in rooms()] == sorted(
        room for contract in contracts() for room in contract["source_modules"]
    )


def test_every_room_and_every_door_is_named_in_the_contracts() -> None:
    """A module that no contract names could be imported from anywhere."""
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" and path.stem != "__init__"}
    named = {module for contract in contracts() for module in contract["forbidden_modules"]}
    assert {f"attncompile.{module}" for module in modules} - named == set()


def test_names_say_something() -> None:
    modules = {path.stem for path in PACKAGE.rglob("*.py")} | {path.stem for path in PACKAGE.rglob("*/")}
    assert modules & NAMES_THAT_SAY_NOTHING == set()


def test_each_file_is_one_module_of_one_package() -> None:
    """Import everything: no file may be loaded under two names, as `passes.x` and `attncompile.passes.x`."""
    code = """
import importlib, os, pkgutil, sys
import attncompile
for found in pkgutil.walk_packages(attncompile.__path__, "attncompile."):
    importlib.import_module(found.name)
names = {}
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None) or ""
    if os.path.isabs(file):
        names.setdefault(os.path.realpath(file), set()).add(name)
# from the root transformers, looking for a package of that name, loads this one file again: see the test below
sought = {"attncompile.kernels", "kernels"}
ours = [found for found in names.values() if any(name.split(".")[0] == "attncompile" for name in found)]
ours = [found for found in ours if found != sought]
print([sorted(found) for found in ours if len(found) > 1])
"""
    assert run_python(code).splitlines()[-1] == "[]"


def test_looking_for_somebody_elses_package_does_not_load_ours() -> None:
    """From the root, `import kernels` finds our folder, and transformers does try it: it must be harmless.

    That is why the `__init__` of this folder imports nothing of ours: it would run under a second name.
    """
    code = "import sys, kernels; print([m for m in sys.modules if m.startswith(('attncompile', 'kernels.'))])"
    assert run_python(code).strip() == "[]"
