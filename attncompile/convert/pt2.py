"""A model as one package of AOTInductor: compiled ahead of time, run by PyTorch without Python of the model or of ours.

The graph is exported with its attention rewritten into PyTorch's own operators: an operator of ours is Python, which no
package can hold. On a CPU that is SDPA, a chunked scan or the reference. There are no packages for GPUs yet: there a
generated kernel is worth more than SDPA, and what is missing is its launch as a `torch.library.triton_op`, which
AOTInductor compiles into the package.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from attncompile.backend.verified import certificates
from attncompile.codegen.lowering import Lowering
from attncompile.codegen.pytorch import lower_to_aten
from attncompile.convert.artifact import Conversion
from attncompile.convert.comparison import DoesNotRunError, compare_runs
from attncompile.convert.evidence import make_certificate
from attncompile.convert.frame import Made, Options, conversion, plan_is_lossy
from attncompile.convert.package import FixedInput, PackagedModel, PackageRecord, TensorInput
from attncompile.convert.program import (
    CapturedModule,
    Rewritten,
    module_run,
    operators_of,
    parameter_names,
    require_no_onnx_options,
    require_plan,
    rewritten,
    runs_of,
    text_changes,
    with_parameters,
)
from attncompile.convert.source import reopen
from attncompile.convert.trusted import file_digest, is_made_here, remember
from attncompile.frontends.capture import Captured, dynamic_axes_of, exported_program
from attncompile.frontends.checkpoint import OpenedModel
from attncompile.frontends.errors import InputError
from attncompile.frontends.torch_internals import (
    compile_package,
    cpp_compiler,
    flatten,
    lacking_instructions,
    open_package,
    size_text,
    structure_text,
    symbol_ranges,
    unflatten,
    varies,
)
from attncompile.ir import Spec
from attncompile.passes import PassCall, parse_passes
from attncompile.plan.schema import Plan
from attncompile.verify import Certificate, load_certificate
from attncompile.verify.certificate import read_record, write_record

PACKAGE, RECORD = "model.pt2", "package.json"


def convert_pt2(target: str | Path, out: Path, options: Options) -> Conversion:
    """Write a folder with ``model.pt2`` for ``torch._inductor.aoti_load_package``, and how to call it.

    Raises:
        InputError: when the target is no PyTorch model, cannot be exported, or has no site; when there is no C++
            compiler; for another provider than the CPU; or when ``out`` cannot be written.
        ValueError: for passes that cannot be read.
    """
    require_no_onnx_options(target, options)
    if options.provider != "cpu":
        raise InputError(
            f"packages are made for the CPU, and the provider is {options.provider!r}",
            str(target),
            "leave --provider out, or use --target torch",
        )
    if cpp_compiler() is None:
        raise InputError(
            "AOTInductor needs a C++ compiler, and none was found",
            str(target),
            "install g++ or set CXX to the one you have",
        )

    def make(opened: OpenedModel, requested: tuple[PassCall, ...], folder: Path) -> Made:
        if opened.kind != "torch":
            raise InputError("an ONNX file has no PyTorch form here", opened.path, "use --target onnx")
        return _made(target, opened, requested, folder, options)

    made = conversion(target, out, options, "pt2", "sdpa", make)
    remember(made.certificate.files[PACKAGE])
    return made


def _on_cpu(spec: Spec) -> Lowering:
    return lower_to_aten(spec, "cpu")


def _made(
    target: str | Path, opened: OpenedModel, requested: tuple[PassCall, ...], folder: Path, options: Options
) -> Made:
    options.progress("finding attention")
    made = rewritten(opened, opened.name, requested, options.allow_untrained, target, _on_cpu)
    options.progress("checking every site")
    sites = certificates(made.decisions)
    options.progress("exporting")
    program, record, notes = _exported(opened, made)
    lost = sorted(set(made.captured.size_names.values()) - record.sizes.keys())
    if lost:
        raise InputError(
            f"what replaced its attention holds for one size of {' and '.join(lost)} alone ({'; '.join(notes)})",
            str(target),
            "nothing was written; leave out the pass that needs it, or use --target torch",
        )
    options.progress("compiling")
    try:
        compile_package(program, folder / PACKAGE)
    except Exception as error:  # Inductor's own, the compiler's, the linker's
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"AOTInductor cannot compile it ({said})", str(target), "use --target torch") from error
    package, metadata = open_package(folder / PACKAGE)
    record = record.model_copy(update={"instructions": metadata.get("AOTI_CPU_ISA", "")})
    write_record(record, folder / RECORD)
    options.progress("comparing with the original")
    outcomes = made.outcomes
    runs = runs_of(opened, made.captured, module_run(PackagedModel(record, package)))
    try:
        compared = compare_runs(
            opened, runs, lossy=any(outcome.lossy for outcome in outcomes), budget=options.budget
        )
    except DoesNotRunError as error:
        raise InputError(
            f"the package does not run: {error}", opened.name, "nothing was written; please report this model"
        ) from error
    changes, told = text_changes(opened, made.captured, outcomes)
    needs = f"{record.machine} with {record.instructions}" if record.instructions else record.machine
    runs_on = f"{PACKAGE} runs {operators_of(outcomes)} on {needs} and PyTorch {_release(record.torch)}"
    files = {name: file_digest(folder / name) for name in (PACKAGE, RECORD)}
    notes = (*notes, runs_on, *told)
    return Made(made.program, outcomes, tuple(sites), compared, changes, notes=notes, files=files)


# --- from the rewritten graph to what is compiled -----------------------------------------------------------


class _Named(torch.nn.Module):
    """The rewritten graph as a package calls it: tensors in by name; out as the model gives them, or by name.

    By name where the model's own result is of a type that not every Python has, such as one of transformers.
    """

    def __init__(self, captured: Captured, leaves: list[Any], by_position: int) -> None:
        super().__init__()
        self.inner = CapturedModule(captured, ())
        self.captured, self.leaves = captured, leaves
        users = [entry.name for entry in captured.inputs if entry.role == "user"]
        self.tensors = {name: n for n, (name, leaf) in enumerate(zip(users, leaves, strict=True)) if _is_tensor(leaf)}
        self.ordered = [name for name, number in self.tensors.items() if number < by_position]
        self.named = [name for name, number in self.tensors.items() if number >= by_position]
        self.outputs, self.fixed = _results(captured)
        whole = unflatten(range(len(self.outputs) + len(self.fixed)), captured.output_structure)
        self.as_given = not self.fixed and _is_plain(whole)
        self.forward = with_parameters(self._run, self.ordered, self.named)

    def _run(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        given = dict(zip(self.ordered, args, strict=True)) | kwargs
        leaves = list(self.leaves)
        for name, number in self.tensors.items():
            leaves[number] = given[name]
        users = iter(leaves)
        flat = [next(users) if entry.role == "user" else entry.value for entry in self.captured.inputs]
        results = self.inner.results(flat)
        if self.as_given:
            return unflatten(results, self.captured.output_structure)
        tensors = (result for number, result in enumerate(results) if number not in self.fixed)
        return dict(zip(self.outputs, tensors, strict=True))


def _results(captured: Captured) -> tuple[tuple[str, ...], dict[int, Any]]:
    """Names of the tensors that a graph returns, and what else it returns, by position."""
    (given,) = next(node for node in captured.graph_module.graph.nodes if node.op == "output").args
    leaves = [leaf.meta.get("val") if isinstance(leaf, torch.fx.Node) else leaf for leaf in given]
    fixed = {number: leaf for number, leaf in enumerate(leaves) if not _is_tensor(leaf)}
    names = [name for number, name in enumerate(captured.outputs) if number not in fixed]
    return tuple(names), fixed


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor)


def _is_plain(tree: Any) -> bool:
    """Whether a result, with numbers for its leaves, is made of tuples, lists and dictionaries alone."""
    if type(tree) in (tuple, list):
        return all(_is_plain(part) for part in tree)
    return all(_is_plain(part) for part in tree.values()) if type(tree) is dict else type(tree) is int


def _exported(
    opened: OpenedModel, made: Rewritten
) -> tuple[torch.export.ExportedProgram, PackageRecord, tuple[str, ...]]:
    """The program to compile, the record of how it is called, and what the reader should know.

    Raises:
        InputError: for arguments or results that no package can hold.
    """
    args, kwargs = opened.example()
    leaves = flatten((args, kwargs))[0]
    by_position = len(flatten(args)[0])
    module = _Named(made.result, leaves, by_position).eval()
    held = [leaf.contiguous() if _is_tensor(leaf) else leaf for leaf in leaves]
    given = {name: held[number] for name, number in module.tensors.items()}
    ordered, named = tuple(given[name] for name in module.ordered), {name: given[name] for name in module.named}
    program, notes = exported_program(module, ordered, named)
    odd = next((value for value in (*module.fixed.values(), *_fixed(module)) if not _is_number_or_text(value)), None)
    if odd is not None:
        raise InputError(
            f"among its arguments and results is {odd!r}, which a package cannot hold",
            opened.name,
            "use --target torch, or wrap the model in one that takes and returns tensors",
        )
    inputs, sizes = _tensor_inputs(program, module, ordered, named)
    try:
        structure = structure_text(flatten((args, kwargs))[1])
        result = "" if module.as_given else structure_text(made.captured.output_structure)
    except (NotImplementedError, ValueError) as error:
        said = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"an argument or its result is of a type that cannot be written down ({said})",
            opened.name,
            "use --target torch, or wrap the model in one that takes and returns tensors",
        ) from error
    users = [entry.name for entry in made.result.inputs if entry.role == "user"]
    record = PackageRecord(
        schema=1,
        torch=torch.__version__,
        device="cpu",
        machine=platform.machine(),
        instructions="",
        parameters=_by_position(opened.model, len(args), kwargs),
        positional=len(args),
        keywords=tuple(kwargs),
        structure=structure,
        leaves=tuple(
            inputs[name] if name in inputs else FixedInput(name=name, value=leaf)
            for name, leaf in zip(users, leaves, strict=True)
        ),
        sizes=sizes,
        outputs=module.outputs,
        result=result,
        fixed=module.fixed,
    )
    return program, record, notes


def _by_position(model: torch.nn.Module, count: int, kwargs: dict[str, Any]) -> tuple[str, ...]:
    """Names that may be given by position: those that were, and the keywords that follow them in the signature."""
    names = parameter_names(model, count + len(kwargs))
    ahead = next((n for n in range(count, len(names)) if names[n] not in kwargs), len(names))
    return tuple(names[:ahead])


def _fixed(module: _Named) -> list[Any]:
    return [leaf for leaf in module.leaves if not _is_tensor(leaf)]


def _is_number_or_text(value: object) -> bool:
    return value is None or type(value) in (bool, int, float, str)


def _tensor_inputs(
    program: torch.export.ExportedProgram,
    module: _Named,
    ordered: tuple[torch.Tensor, ...],
    named: dict[str, torch.Tensor],
) -> tuple[dict[str, TensorInput], dict[str, tuple[int, int | None]]]:
    """What each tensor that the package takes has to look like, by name, and the ranges of the sizes that vary."""
    users = program.graph_signature.user_inputs
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    names = (*module.ordered, *module.named)
    wanted = dict(zip(names, dynamic_axes_of(ordered, named), strict=True))
    called: dict[str, str] = {}
    inputs: dict[str, TensorInput] = {}
    for name, user in zip(names, users, strict=True):
        value = nodes[str(user)].meta["val"]
        shape: list[int | str] = []
        for axis, size in enumerate(value.shape):
            if not varies(size):
                shape.append(int(size))
                continue
            symbol = size_text(size)
            free = wanted[name].get(axis, symbol)
            shape.append(called.setdefault(symbol, f"{free}_{symbol}" if free in called.values() else free))
        inputs[name] = TensorInput(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=tuple(shape))
    ranges = symbol_ranges(program)
    return inputs, {name: ranges.get(symbol, (1, None)) for symbol, name in called.items()}


# --- from the folder to what runs ---------------------------------------------------------------------------


def load_pt2(folder: Path, *, device: str | None = None, allow_code: bool = False) -> PackagedModel:
    """Open what :func:`convert_pt2` wrote.

    Args:
        folder: the folder.
        device: must be the CPU if given.
        allow_code: run a package that this user did not make on this machine.

    Raises:
        InputError: when a file is not the one that was checked, the package comes from elsewhere and is not allowed, or
            cannot run here.
    """
    files = load_certificate(folder / "certificate.json").files
    for name in (PACKAGE, RECORD):
        if files.get(name) != file_digest(folder / name):
            raise InputError(
                f"{name} is not the file that certificate.json was made for", folder, "convert the model again"
            )
    if not (allow_code or is_made_here(files[PACKAGE])):
        raise InputError(
            f"{PACKAGE} is machine code that you did not make here, and opening it runs it",
            folder,
            "pass --allow-code (in Python allow_code=True) if you trust whoever made it, or convert the model again",
        )
    record = read_record(PackageRecord, folder / RECORD, "record of the package")
    _require_fit(record, folder, device)
    try:
        package, _ = open_package(folder / PACKAGE)
        return PackagedModel(record, package)
    except (RuntimeError, ValueError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"the package cannot be opened ({said})", folder, "convert the model again") from error


def _require_fit(record: PackageRecord, folder: Path, device: str | None) -> None:
    """Raises InputError when a package cannot run here."""
    if device is not None and torch.device(device).type != record.device:
        raise InputError(
            f"the package runs on the {record.device}, not on {device}", folder, "leave the device out"
        )
    if _release(record.torch) != _release(torch.__version__):
        raise InputError(
            f"the package was made by PyTorch {record.torch}, and this is {torch.__version__}",
            folder,
            f"install PyTorch {_release(record.torch)}, or convert the model again",
        )
    lacking = lacking_instructions(record.instructions)
    if record.machine != platform.machine() or lacking is not None:
        here = f"a processor without {lacking}" if record.machine == platform.machine() else platform.machine()
        raise InputError(
            f"the package was compiled for {record.machine} with {record.instructions}, and this is {here}",
            folder,
            "convert the model on a machine like the one it is to run on",
        )


def _release(version: str) -> str:
    """The first two numbers of a version: packages are good for one release of PyTorch."""
    return ".".join(version.split(".")[:2])


def verify_pt2(
    folder: Path, plan: Plan, shift: int, *, allow_pickle: bool = False, allow_code: bool = False
) -> Certificate:
    """The certificate of a package, computed again on other inputs than the conversion saw.

    Raises:
        InputError: as :func:`load_pt2` does, or when the original is no longer there or has changed.
    """
    package = load_pt2(folder, allow_code=allow_code)
    opened = reopen(folder, allow_pickle=allow_pickle)
    made = rewritten(opened, plan.model, parse_passes(plan.passes), plan.allow_untrained, folder, _on_cpu)
    require_plan(plan, made.decisions, folder)
    runs = runs_of(opened, made.captured, module_run(package))
    try:
        compared = compare_runs(opened, runs, lossy=plan_is_lossy(plan), shift=shift, budget=plan.budget)
    except DoesNotRunError as error:
        raise InputError(f"the package does not run: {error}", folder, "convert the model again") from error
    files = load_certificate(folder / "certificate.json").files
    return make_certificate(plan, certificates(made.decisions), compared.entries, files)
