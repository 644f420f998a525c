"""``kernels/*.py`` of a conversion to PyTorch: generated Triton modules, to read, to vendor, and to be compared.

They are never imported from there. Kernels are code, and an artefact may come from somebody else; what runs is
generated from the plan's Specs, which are validated and never evaluated. A file that says something else than what is
generated would deceive its reader, so it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from attncompile import __version__
from attncompile.codegen.triton.generate import GeneratedModule
from attncompile.codegen.triton.lower import modules
from attncompile.codegen.triton.structure import why_not_spec
from attncompile.frontends.errors import InputError
from attncompile.ir import Spec, parse_spec
from attncompile.plan.schema import Plan
from attncompile.verify import load_certificate

KERNELS = "kernels"


def kernel_modules(spec: Spec) -> dict[str, GeneratedModule]:
    """File name (without ending) of each module that may run for a Spec: in Triton, and in Gluon for Hopper GPUs.

    Raises:
        ValueError: when there is none.
    """
    return {f"attend_{spec.fingerprint()}{suffix}": module for suffix, module in modules(spec).items()}


def kernel_sources(specs: Iterable[Spec]) -> dict[str, str]:
    """File name to text of each module that may run for one of these Specs."""
    distinct = {spec.fingerprint(): spec for spec in specs if why_not_spec(spec) is None}
    return {
        f"{name}.py": module.source for spec in distinct.values() for name, module in kernel_modules(spec).items()
    }


def write_kernels(specs: Iterable[Spec], folder: Path) -> None:
    """Write the kernels of these Specs to ``kernels/``."""
    (folder / KERNELS).mkdir()
    for name, text in kernel_sources(specs).items():
        (folder / KERNELS / name).write_text(text, encoding="utf-8")


def require_kernels(plan: Plan, folder: Path) -> None:
    """Compare the files of ``kernels/`` with what this version generates for the plan; a missing file is no fault.

    Raises:
        InputError: naming the first file that differs, and whether another version wrote it.
    """
    specs = (parse_spec(site.after) for site in plan.sites if site.operator != "original" and site.after)
    expected = kernel_sources(specs)
    for file in sorted((folder / KERNELS).glob("*.py")):
        if file.read_bytes() == expected.get(file.name, "").encode():
            continue
        writer = load_certificate(folder / "certificate.json").versions.get("attncompile", "an unknown version")
        reason = (
            f"it was written by attncompile {writer}, and {__version__} generates another text"
            if writer != __version__
            else "it is not what is generated for the plan, so it was changed, and it is not what would run"
        )
        raise InputError(reason, file, "convert the model again, or remove the file to run with what is generated now")
