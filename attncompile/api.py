"""The Python API: `lift`, `compile`, `explain`, `convert`, `compile_kernels`, `verify`, `load`. Each does one thing in
one call.

Targets are given as a torch module with example arguments, or as what :func:`open_model` opens: a Hugging
Face folder, an ``.onnx`` file, or ``file.py:function``, a function that returns ``(model, args, kwargs)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from attncompile.convert.artifact import Conversion, Progress, new_folder, silent
from attncompile.frontends.aten import aten_graph
from attncompile.frontends.capture import capture_export
from attncompile.frontends.checkpoint import AttentionImplementation, OpenedModel, open_model
from attncompile.frontends.errors import CaptureError, InputError, given_path
from attncompile.frontends.graph_breaks import capture_with_breaks
from attncompile.frontends.onnx import onnx_file_graph
from attncompile.frontends.onnx_file import reading
from attncompile.frontends.positions import stated_length
from attncompile.lift import Program, join_programs, lift_graph
from attncompile.plan import Plan, load_plan
from attncompile.verify import Certificate, load_certificate

if TYPE_CHECKING:
    from attncompile.backend.explanation import Explanation
    from attncompile.convert.kernel_index import KernelFolder

Target = Literal["onnx", "torch", "pt2"]
Preference = Literal["fastest", "fused", "decomposed"]
Rest = Literal["eager", "inductor"]

CHOICES: Mapping[str, tuple[str, ...]] = {
    "to": ("onnx", "torch", "pt2"),
    "prefer": ("fastest", "fused", "decomposed"),
    "attn_implementation": ("sdpa", "eager"),
    "rest": ("eager", "inductor"),
}
"""What the options that are words may be."""


def lift(
    model: torch.nn.Module | str | Path,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    attn_implementation: AttentionImplementation = "sdpa",
    allow_pickle: bool = False,
    progress: Progress = silent,
) -> Program:
    """Find every attention site of a model and state what it computes.

    Args:
        model: a module, or what to open.
        args, kwargs: example arguments of a module. Their batch and sequence axes become symbolic.
        attn_implementation: which of its own implementations a Hugging Face folder is loaded with.
        allow_pickle: read weights that only exist as pickle (as plain tensors).
        progress: told each stage as it begins.

    Returns:
        A program, which prints like ``attncompile inspect``: its ``sites`` are lifted, observed or refused.

    Raises:
        InputError: when the target cannot be opened.
        CaptureError: when neither torch.export nor Dynamo can take a graph of it.
    """
    _check_choice("attn_implementation", attn_implementation)
    if isinstance(model, torch.nn.Module):
        return _lift_module(model, type(model).__name__, tuple(args), dict(kwargs or {}), (), progress)
    if args or kwargs:
        raise InputError("example arguments only go with a module", model, "leave them out")
    progress("opening")
    return lift_opened(
        open_model(model, attn_implementation=attn_implementation, allow_pickle=allow_pickle),
        progress=progress,
    )


def lift_opened(opened: OpenedModel, *, progress: Progress = silent) -> Program:
    """Lift a model that is open already."""
    if opened.kind == "onnx":
        progress("finding attention")
        with reading(opened.path):
            program = lift_graph(onnx_file_graph(opened.path), opened.name, opened.notes)
    else:
        args, kwargs = opened.example() if opened.given is None else opened.given
        program = _lift_module(opened.model, opened.name, args, kwargs, opened.notes, progress)
    return replace(program, length=stated_length(opened.config, None))


def _lift_module(
    model: torch.nn.Module,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    notes: tuple[str, ...],
    progress: Progress,
) -> Program:
    progress("capturing the graph")
    try:
        captured = capture_export(model, args, kwargs)
    except CaptureError as error:
        progress("capturing it piece by piece")
        return _lift_pieces(model, name, args, kwargs, notes, error)
    progress("finding attention")
    return lift_graph(aten_graph(captured), name, (*notes, *captured.notes))


def _lift_pieces(
    model: torch.nn.Module,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    notes: tuple[str, ...],
    refused: CaptureError,
) -> Program:
    """The sites of the graphs between Dynamo's breaks, of a model that torch.export does not take as a whole.

    Raises:
        CaptureError: that of torch.export, when Dynamo gets no graph either.
    """
    try:
        pieces, told = capture_with_breaks(model, args, kwargs)
    except CaptureError as error:
        raise refused from error
    if not pieces:
        raise refused
    programs = [lift_graph(aten_graph(piece), name, piece.notes) for piece in pieces]
    what = f"torch.export takes no graph of the whole ({refused.reason}): these are the {len(pieces)} pieces that run"
    return join_programs(name, programs, (*notes, what, *told))


def operators(
    model: torch.nn.Module | str | Path, program: Program, provider: str, *, prefer: Preference = "fastest"
) -> dict[str, tuple[str, str]]:
    """The ONNX operator that each site would become on a provider, and why; nothing is written.

    Args:
        model: what was lifted; program: what :func:`lift` gave for it.
        provider: as in :func:`convert`; prefer: likewise.

    Returns:
        Operator and reason by the name of the site; ``original`` for a site that would stay as it is.

    Raises:
        InputError: for a provider that is not known.
    """
    from attncompile.convert.onnx_rewrite import operators_of_file, operators_of_program
    from attncompile.convert.providers import kernels_of

    _check_choice("prefer", prefer)
    kernels = kernels_of(provider)
    if not isinstance(model, torch.nn.Module) and str(model).endswith(".onnx"):
        return operators_of_file(Path(model).expanduser(), kernels, prefer)
    return operators_of_program(program, kernels, prefer)


def compile(
    model: torch.nn.Module | Callable[..., Any],
    *,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    disable: bool = False,
    **options: Any,
) -> Callable[..., Any]:
    """``torch.compile`` with this back end: attention is rewritten, the rest goes to Inductor.

    Args:
        model: a module or function; the result is called like it.
        dynamic, fullgraph, disable: as in ``torch.compile``.
        options: of the back end (``rest="inductor"|"eager"``, ``passes=…``), see
            :class:`attncompile.backend.Options`.

    Raises:
        ValueError: for an unknown option or value.
    """
    from attncompile.backend import Backend, read_options
    from attncompile.backend.options import ARGUMENTS

    # now, so that a misspelt option is said here and not in the first call
    backend = Backend(read_options(options, beside=ARGUMENTS))
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=fullgraph, disable=disable)
    if compiled is not model:  # as it is where this is disabled
        backend.belongs_to(compiled)
    return compiled


def explain(compiled: Callable[..., Any] | None = None) -> Explanation:
    """What was done at each attention site of compiled models.

    Args:
        compiled: what :func:`attncompile.compile` gave: its own graphs are told. Or a module that
            ``torch.compile(…, backend="attncompile")`` gave: the graphs that read its parameters, which modules of
            equal shapes share. Without it, all graphs of this process that are still in use.

    Raises:
        ValueError: for something else, such as a function that ``torch.compile`` gave, which names no graph.
    """
    from attncompile.backend import Backend
    from attncompile.backend.compilation import alive
    from attncompile.backend.explanation import Explanation

    if compiled is None:
        return Explanation(alive())
    own = Backend.of(compiled)
    if own is not None:
        return Explanation(tuple(compilation for compilation in alive() if compilation.number in own.numbers))
    module = getattr(compiled, "_orig_mod", compiled)
    if not isinstance(module, torch.nn.Module):
        raise ValueError(
            f"{compiled!r} does not say which graphs are its own; compile it with attncompile.compile, or call "
            "explain() for all graphs"
        )
    return Explanation(tuple(compilation for compilation in alive() if compilation.serves(module)))


def convert(
    target: str | Path,
    out: str | Path,
    *,
    to: Target = "onnx",
    provider: str = "cpu",
    prefer: Preference = "fastest",
    onnxruntime: str | None = None,
    passes: str = "fuse",
    allow_untrained: bool = False,
    cache: bool | None = None,
    shared_buffer: bool = False,
    last_logits: bool = False,
    precision: str | None = None,
    budget: float | None = None,
    text: str | Path | None = None,
    attn_implementation: AttentionImplementation | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Conversion:
    """Rewrite the attention of a model, check the result against the original, and write both to a folder.

    Args:
        target: what to open.
        out: the folder to write: all of it, or nothing when something goes wrong.
        to: ``onnx`` for ONNX Runtime, ``torch`` for a folder that :func:`load` opens, ``pt2`` for a package that
            AOTInductor has compiled for this machine's kind of CPU; :func:`load` opens it too.
        provider: where it will run: ``cpu``, ``cuda``, or for ONNX Runtime the name of any execution provider that
            is installed, such as ``CPUExecutionProvider``.
        prefer: ``fastest`` takes a fused operator only where it wins on the provider; ``fused`` and
            ``decomposed`` take them always or never.
        onnxruntime: the version of ONNX Runtime that will run it, such as ``1.24``: only operators that were found
            right with it are used. None for the installed one.
        passes: what to do at each site, such as ``"fuse,sparsify.window(size=1024,sinks=4)"``.
        allow_untrained: allow passes that ruin a model that was not trained for them.
        cache: for ONNX Runtime, whether a language model becomes one for prompts and steps of generation, with its
            cache as inputs and outputs and the configuration of onnxruntime-genai beside it, and an encoder-decoder
            two, with both caches; None does so where it can, and False converts its forward pass.
        shared_buffer: for ONNX Runtime, whether past and present of a language model's cache are one buffer, which each
            call writes in place; for rows without padding.
        last_logits: for ONNX Runtime, whether a language model gives the logits of each row's last token alone,
            ``[batch, 1, vocabulary]``, which is all that generation reads.
        precision: for ONNX Runtime, element types of weights and states: ``fp32``, ``fp16``, ``bf16``, ``int8``,
            ``int8-static``, ``int8-weights``, ``int4`` or ``fp8``, with options as passes have them; None keeps the
            model's own.
        budget: the largest relative change of an output, ``‖after − before‖ / ‖before‖`` on running text, that lossy
            passes or a precision may bring; more is refused. None takes that of the precision, and judges nothing else.
        text: a file of running text to calibrate and judge with, instead of documentation of the standard library.
        attn_implementation: which of its own implementations a Hugging Face folder is loaded with; None lets
            the target choose.
        allow_pickle: read weights that only exist as pickle (as plain tensors).
        overwrite: replace an earlier conversion in ``out``.
        progress: told each stage as it begins.

    Raises:
        InputError: when the target cannot be opened or ``out`` not be written.
        ValueError: for an unknown word or pass, or a version of ONNX Runtime of which nothing is known.
    """
    _check_choice("to", to)
    provider = _checked_provider(provider, to)
    _check_choice("prefer", prefer)
    if budget is not None and not 0.0 <= budget < math.inf:
        raise ValueError(f"the budget is {budget}; it is a relative change, such as 0.1, and at least 0")
    if attn_implementation is not None:
        _check_choice("attn_implementation", attn_implementation)
    from attncompile.convert.frame import Options

    options = Options(
        provider=provider,
        prefer=prefer,
        onnxruntime=onnxruntime,
        passes=passes,
        allow_untrained=allow_untrained,
        cache=cache,
        shared_buffer=shared_buffer,
        last_logits=last_logits,
        precision=precision,
        budget=budget,
        text=given_path(text) if text is not None else None,
        attn_implementation=attn_implementation,
        allow_pickle=allow_pickle,
        overwrite=overwrite,
        progress=progress,
    )
    if to == "onnx":
        from attncompile.convert.onnx import convert_onnx

        return convert_onnx(target, given_path(out), options)
    if to == "pt2":
        from attncompile.convert.pt2 import convert_pt2

        return convert_pt2(target, given_path(out), options)
    from attncompile.convert.torch import convert_torch

    return convert_torch(target, given_path(out), options)


def _checked_provider(provider: str, to: str) -> str:
    """The provider as plans name it.

    Raises:
        InputError: for one that ONNX Runtime does not have.
        ValueError: for one that the target does not have.
    """
    if to == "onnx":
        from attncompile.convert.providers import session_providers, short_provider

        session_providers(provider)
        return short_provider(provider)
    if provider not in ("cpu", "cuda"):
        raise ValueError(f"provider is {provider!r}; for the target {to} it may be cpu or cuda")
    return provider


def compile_kernels(
    target: str | Path,
    out: str | Path,
    *,
    targets: Sequence[str] = ("sm_90",),
    dtypes: Sequence[str] = (),
    passes: str = "fuse",
    allow_untrained: bool = False,
    attn_implementation: AttentionImplementation = "sdpa",
    allow_pickle: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> KernelFolder:
    """Write the generated kernels of a model to a folder, and what they compile to; no GPU is needed.

    Args:
        target: what to open.
        out: the folder to write: all of it, or nothing when something goes wrong.
        targets: GPUs to compile for, such as ``sm_90`` or ``gfx942``.
        dtypes: element types to compile for; those of the model unless given.
        passes, allow_untrained: what to do at each site, as in :func:`convert`.
        attn_implementation: which of its own implementations a Hugging Face folder is loaded with.
        allow_pickle: read weights that only exist as pickle (as plain tensors).
        overwrite: replace an earlier folder of ours.
        progress: told each stage as it begins.

    Raises:
        InputError: when the target cannot be opened, has no site or none with a kernel, when ``out`` cannot be
            written, or Triton cannot compile.
        CaptureError: when no graph of the model can be taken.
        ValueError: for an unknown word or pass.
    """
    from attncompile.convert.kernel_folder import DTYPES, chosen_targets, require_compiler, write_kernel_folder
    from attncompile.passes import parse_passes

    _check_choice("attn_implementation", attn_implementation)
    chosen, calls = chosen_targets(targets), parse_passes(passes)
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"there are no kernels in {dtype!r}; choose from {', '.join(DTYPES)}")
    require_compiler()
    with new_folder(out, overwrite=overwrite) as folder:
        program = lift(
            target, attn_implementation=attn_implementation, allow_pickle=allow_pickle, progress=progress
        )
        wanted = tuple(dict.fromkeys(dtypes))
        return write_kernel_folder(program, folder, chosen, wanted, calls, allow_untrained, progress)


FRESH = 5
"""Added to the lengths of the inputs that a conversion was checked on, so that a verification sees others."""


def verify(
    folder: str | Path, *, provider: str | None = None, allow_pickle: bool = False, allow_code: bool = False
) -> Certificate:
    """Compute the certificate of a conversion again, on inputs that the conversion did not see.

    Args:
        folder: what :func:`convert` wrote, or the ``model.onnx`` in it.
        provider: of ONNX Runtime, to run it on; the one that it was converted for unless given.
        allow_pickle: read the original's weights where they only exist as pickle (as plain tensors).
        allow_code: run a package (``pt2``) that was not made by you on this machine.

    Raises:
        InputError: when the folder is no conversion, its plan does not belong to its certificate, or the original
            that it is compared with is no longer there or has changed.
        ValueError: when its plan or certificate is damaged.
    """
    folder, plan = _conversion(folder)
    stored = load_certificate(folder / "certificate.json")
    if stored.plan != plan.digest():
        raise InputError(
            "plan.json is not the one that certificate.json was made for", folder, "convert again"
        )
    if plan.target == "onnx":
        from attncompile.convert.onnx import verify_onnx

        chosen = None if provider is None else _checked_provider(provider, "onnx")
        return verify_onnx(folder, plan, FRESH, allow_pickle=allow_pickle, provider=chosen)
    if provider is not None:
        raise ValueError(f"--provider is for conversions to onnx, and this one is to {plan.target}; leave it out")
    if plan.target == "pt2":
        from attncompile.convert.pt2 import verify_pt2

        return verify_pt2(folder, plan, FRESH, allow_pickle=allow_pickle, allow_code=allow_code)
    from attncompile.convert.torch import verify_torch

    return verify_torch(folder, plan, FRESH, allow_pickle=allow_pickle)


def load(
    folder: str | Path, *, rest: Rest = "eager", device: str | None = None, allow_code: bool = False
) -> torch.nn.Module:
    """Open a conversion to ``torch`` or ``pt2`` as a module that runs.

    Args:
        folder: what :func:`convert` wrote.
        rest: what compiles everything but attention, ``eager`` or ``inductor``; a package is compiled already.
        device: where to put it; the CPU unless given.
        allow_code: run a package (``pt2``) that was not made by you on this machine.

    Raises:
        InputError: when the folder is no such conversion.
        ValueError: when its plan is damaged, or for an unknown word.
    """
    _check_choice("rest", rest)
    folder, plan = _conversion(folder)
    if plan.target == "onnx":
        raise InputError(
            "this conversion is for ONNX Runtime",
            folder,
            "open its .onnx files with onnxruntime.InferenceSession",
        )
    if plan.target == "pt2":
        from attncompile.convert.pt2 import load_pt2

        return load_pt2(folder, device=device, allow_code=allow_code)
    from attncompile.convert.torch import load_torch

    return load_torch(folder, plan, rest=rest, device=device)


def _conversion(folder: str | Path) -> tuple[Path, Plan]:
    folder = given_path(folder)
    if folder.name == "model.onnx" and folder.is_file():
        folder = folder.parent
    if not (folder / "plan.json").is_file():
        raise InputError("no plan.json in it", folder, "give a folder that attncompile convert wrote")
    return folder, load_plan(folder / "plan.json")


def _check_choice(name: str, value: str) -> None:
    if value not in CHOICES[name]:
        raise ValueError(f"{name} is {value!r}; it may be {' or '.join(CHOICES[name])}")
