"""The kernels of a model as a folder: readable modules, binaries compiled for GPUs that need not be there, an index."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path

from attncompile.codegen import gluon
from attncompile.codegen.triton import ahead
from attncompile.codegen.triton.ahead import TARGETS, Compiled, Target
from attncompile.codegen.triton.generate import GeneratedModule
from attncompile.codegen.triton.structure import why_not_spec
from attncompile.convert.artifact import NoSiteError, Progress
from attncompile.convert.kernel_index import (
    Binary,
    KernelFile,
    KernelFolder,
    Missing,
    SpecKernels,
    WithoutKernel,
    index_data,
)
from attncompile.convert.kernels import kernel_modules
from attncompile.frontends.errors import InputError
from attncompile.ir import Spec, print_spec
from attncompile.lift import Program, Site
from attncompile.lift.prologue import RotaryMaps
from attncompile.lift.render import alike
from attncompile.passes import PassCall, run_passes

INDEX = "kernels.json"
DTYPES = ("float16", "bfloat16", "float32")
"""Element types that kernels are compiled for."""


def chosen_targets(names: Sequence[str]) -> tuple[Target, ...]:
    """The GPUs with these names.

    Raises:
        ValueError: for an unknown one, or none at all.
    """
    known = {str(target): target for target in TARGETS}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        said = f"there is no target {unknown[0]!r}" if unknown else "no target is given"
        raise ValueError(f"{said}; choose from {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names))


def require_compiler() -> None:
    """Raises InputError where Triton cannot compile."""
    if importlib.util.find_spec("triton") is None:
        raise InputError("Triton is not installed, and it compiles the kernels", "this Python", "pip install triton")
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false"):
        raise InputError(
            "kernels are interpreted, so there is nothing to compile", "TRITON_INTERPRET", "unset this variable"
        )


def write_kernel_folder(
    program: Program,
    folder: Path,
    targets: tuple[Target, ...],
    dtypes: tuple[str, ...],
    passes: tuple[PassCall, ...],
    allow_untrained: bool,
    progress: Progress,
) -> KernelFolder:
    """Write the kernels of a program's sites, as the passes leave them, and ``kernels.json``.

    Args:
        program: a lifted model.
        folder: an empty one.
        targets: GPUs to compile for; modules in Gluon are compiled for compute capability 9.0 alone.
        dtypes: element types of query, key and value to compile for; empty for those of each Spec.
        passes, allow_untrained: as in a conversion.
        progress: told each stage as it begins.

    Raises:
        NoSiteError: when the model has no site.
        InputError: when none of its sites has a kernel; says why.
    """
    if not program.sites:
        raise NoSiteError(program.model)
    specs, without = _specs(program, passes, allow_untrained)
    if not specs:
        first = without[0]
        raise InputError(
            f"no site has a generated kernel; {first.shown}: {first.reason}",
            program.model,
            "attncompile inspect shows every site",
        )
    counted = _Counted(progress, sum(_steps(spec, targets, dtypes) for spec, _ in specs.values()))
    made = []
    for spec, groups in specs.values():
        files = [
            _written(name, module, folder, targets, dtypes or (_own_dtype(spec),), counted)
            for name, module in kernel_modules(spec).items()
        ]
        sites = [site for _, group in groups for site in group]
        made.append(
            SpecKernels(
                shown=tuple(name for name, _ in groups),
                sites=tuple(site.name for site in sites),
                observed=tuple(site.name for site in sites if site.status == "observed"),
                spec=print_spec(spec),
                fingerprint=spec.fingerprint(),
                files=tuple(files),
            )
        )
    found = KernelFolder(program.model, tuple(map(str, targets)), dtypes, tuple(made), tuple(without))
    index = index_data(found, importlib.metadata.version("triton"))
    (folder / INDEX).write_text(json.dumps(index, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return found


_Groups = list[tuple[str, tuple[Site, ...]]]


def _specs(
    program: Program, passes: tuple[PassCall, ...], allow_untrained: bool
) -> tuple[dict[str, tuple[Spec, _Groups]], list[WithoutKernel]]:
    """Each distinct Spec with its sites, by fingerprint; and the sites without a kernel."""
    specs: dict[str, tuple[Spec, _Groups]] = {}
    without: list[WithoutKernel] = []
    pulls = program.graph is not None and any(call.rewrite.pulls for call in passes)
    maps = RotaryMaps(program.graph) if pulls else None
    for name, sites in alike(program.sites):
        spec = sites[0].spec
        reason: str | None = f"refused: {sites[0].refusal}"
        if spec is not None:
            prologue = maps.of(sites[0]).prologue if maps is not None else None
            spec = run_passes(spec, passes, allow_untrained, prologue).spec
            reason = why_not_spec(spec)
        if spec is None or reason is not None:
            without.append(WithoutKernel(name, tuple(site.name for site in sites), reason or ""))
            continue
        specs.setdefault(spec.fingerprint(), (spec, []))[1].append((name, sites))
    return specs, without


def _own_dtype(spec: Spec) -> str:
    operation = spec.attend() or spec.scan()
    assert operation is not None  # why_not_spec has seen to it
    return spec.types()[operation.query].dtype


def _steps(spec: Spec, targets: tuple[Target, ...], dtypes: tuple[str, ...]) -> int:
    return len(kernel_modules(spec)) * len(targets) * max(1, len(dtypes))


class _Counted:
    """Tells the progress which of how many steps begins."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._begun = progress, total, 0

    def __call__(self, what: str) -> None:
        self._begun += 1
        self._progress(f"{self._begun} of {self._total}: {what}")


def _written(
    name: str,
    module: GeneratedModule | gluon.HopperModule,
    folder: Path,
    targets: tuple[Target, ...],
    dtypes: tuple[str, ...],
    begin: _Counted,
) -> KernelFile:
    """Write a module and what it compiles to."""
    (folder / f"{name}.py").write_text(module.source, encoding="utf-8")
    binaries: list[Binary] = []
    missing: list[Missing] = []
    for target in targets:
        for dtype in dtypes:
            begin(f"compiling {name} for {target} in {dtype}")
            reason = _why_not(module, target, dtype)
            failed = reason is None
            try:
                compiled = () if reason else _compile(module, target, dtype)
            except Exception as error:  # a compiler fails in ways of its own, and the other binaries are still good
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                reason = f"{type(error).__name__}: {lines[0] if lines else 'no more is known'}"
                compiled = ()
            large = next((kernel for kernel in compiled if kernel.shared > target.memory), None)
            if large is not None:
                needs = f"{large.kernel} needs {large.shared} bytes of shared memory"
                reason = f"{needs}, and a program on {target} has {target.memory}"
            if reason is not None:
                missing.append(Missing(str(target), dtype, reason, failed))
                continue
            binaries += _saved(compiled, name, target, dtype, folder)
    language = "gluon" if isinstance(module, gluon.HopperModule) else "triton"
    return KernelFile(f"{name}.py", language, tuple(binaries), tuple(missing))


def _why_not(module: GeneratedModule | gluon.HopperModule, target: Target, dtype: str) -> str | None:
    """What the module is not made for."""
    import triton

    if isinstance(module, gluon.HopperModule) and str(target) != "sm_90":
        return "it is written for compute capability 9.0 alone"
    taken = [known for known in DTYPES if all(known in kernel.constants for kernel in module.kernels)]
    if isinstance(module, gluon.HopperModule):
        taken = [known for known in DTYPES if known != "float32"]
    if dtype not in taken:
        return f"it takes {' and '.join(taken)}"
    return gluon.why_not_installed(triton.__version__) if isinstance(module, gluon.HopperModule) else None


def _compile(module: GeneratedModule | gluon.HopperModule, target: Target, dtype: str) -> tuple[Compiled, ...]:
    if isinstance(module, gluon.HopperModule):
        from attncompile.codegen.gluon.ahead import compile_ahead

        return compile_ahead(module, dtype)
    return ahead.compile_ahead(module, target, dtype)


def _saved(compiled: tuple[Compiled, ...], name: str, target: Target, dtype: str, folder: Path) -> list[Binary]:
    """Write binaries; a kernel that a module compiles twice, with other constants, is numbered."""
    made: list[Binary] = []
    for kernel in compiled:
        before = sum(each.kernel == kernel.kernel for each in made)
        part = f"{kernel.kernel}_{before + 1}" if before else kernel.kernel
        file = f"{name}.{part}.{target}.{dtype}.{target.binary}"
        content = kernel.texts[target.binary]
        (folder / file).write_bytes(content)
        made.append(
            Binary(
                file=file,
                kernel=kernel.kernel,
                symbol=kernel.symbol,
                target=str(target),
                dtype=dtype,
                bytes=len(content),
                threads=kernel.threads,
                shared=kernel.shared,
                registers=kernel.registers,
                spills=kernel.spills,
                arguments=dict(kernel.arguments),
                constants=dict(kernel.constants),
            )
        )
    return made


__all__ = ["chosen_targets", "require_compiler", "write_kernel_folder"]
