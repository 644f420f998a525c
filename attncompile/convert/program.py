"""A model's graph with its attention rewritten, and that graph as a module which can be exported again."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from attncompile.backend.rewrite import Decision, decide, rewrite
from attncompile.codegen.lowering import Lowering
from attncompile.convert.calibration import text_call
from attncompile.convert.change import Change, changes_in_torch
from attncompile.convert.comparison import Run, Runs
from attncompile.convert.evidence import Outcome
from attncompile.convert.frame import Options, lossy_rewrites, require_sites
from attncompile.convert.widened import Widened, outputs_of
from attncompile.frontends.aten import aten_graph
from attncompile.frontends.capture import Captured, capture_export
from attncompile.frontends.checkpoint import OpenedModel
from attncompile.frontends.errors import InputError
from attncompile.frontends.torch_internals import unflatten
from attncompile.ir import Spec
from attncompile.lift import Program, lift_graph
from attncompile.passes import PassCall
from attncompile.plan.schema import Plan


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A model's graph, what was lifted from it, what was decided, and the graph after that."""

    captured: Captured
    program: Program
    decisions: tuple[Decision, ...]
    result: Captured

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """What became of each site."""
        return tuple(
            Outcome(d.site, d.passes, d.lowering.operator if d.lowering else "original", d.reason)
            for d in self.decisions
        )


def rewritten(
    opened: OpenedModel,
    name: str,
    requested: tuple[PassCall, ...],
    allow_untrained: bool,
    target: str | Path,
    choose: Callable[[Spec], Lowering],
) -> Rewritten:
    """Capture a model, find its attention, decide and rewrite.

    Args:
        opened: the model; name: what to call it.
        requested, allow_untrained: passes for every site.
        target: what the user gave, for errors.
        choose: the lowering of a Spec.

    Raises:
        CaptureError: when the model cannot be exported.
        NoSiteError: when it has no attention.
    """
    args, kwargs = opened.example()
    captured = capture_export(opened.model, args, kwargs)
    program = lift_graph(aten_graph(captured), name, (*opened.notes, *captured.notes))
    require_sites(program, target)
    decisions = decide(program, requested, choose, allow_untrained=allow_untrained)
    module = rewrite(captured.graph_module, program, decisions)
    return Rewritten(captured, program, decisions, dataclasses.replace(captured, graph_module=module))


def runs_of(opened: OpenedModel, captured: Captured, converted: Run) -> Runs:
    """The forms of a model that a conversion to PyTorch compares.

    Args:
        opened: the original; captured: its graph.
        converted: the result.
    """
    return Runs(
        original=lambda call: outputs_of(opened.model(*call.args, **call.kwargs)),
        converted=converted,
        unrewritten=graph_run(captured),
        exact=Widened(opened.model),
    )


def graph_run(captured: Captured) -> Run:
    """A captured graph, run node by node."""
    return lambda call: outputs_of(captured.run(call.args, call.kwargs))


def module_run(module: torch.nn.Module) -> Run:
    """A module that is called as the model is."""
    return lambda call: outputs_of(module(*call.args, **call.kwargs))


def text_changes(
    opened: OpenedModel, captured: Captured, outcomes: Sequence[Outcome]
) -> tuple[dict[str, Change], list[str]]:
    """How far lossy passes moved each site on running text, and what there is to say about it."""
    rewrites = lossy_rewrites(outcomes)
    text = text_call(opened) if rewrites else None
    if text is not None:
        return changes_in_torch(captured, text, rewrites), []
    said = "the model takes no text, so the change of each site is measured on random inputs only"
    return {}, [said] if rewrites else []


def operators_of(outcomes: Sequence[Outcome]) -> str:
    """What computes the sites, in words."""
    return " and ".join(sorted({outcome.operator for outcome in outcomes}))


def require_plan(plan: Plan, decisions: Sequence[Decision], folder: Path) -> None:
    """Raises InputError when the checkpoint's attention is not what the plan was made for."""
    found = {d.site.name: d.site.spec.fingerprint() if d.site.spec else "" for d in decisions}
    planned = {site.site: site.fingerprint for site in plan.sites}
    if found != planned:
        names = sorted(set(found) ^ set(planned)) or [n for n in planned if planned[n] != found[n]]
        raise InputError(
            f"the plan does not fit the checkpoint beside it: the site {names[0]} differs",
            folder,
            "convert the model again",
        )


class CapturedModule(torch.nn.Module):
    """A captured graph as a module: what it was given as values are its buffers. Called as the model is.

    Its ``forward`` names what it takes: with ``*args`` and ``**kwargs`` alone, torch.export fixes all sizes.
    """

    def __init__(self, captured: Captured, positional: Sequence[str]) -> None:
        super().__init__()
        self.graph_module, self.captured = captured.graph_module, captured
        self.names: list[str | None] = []
        for number, entry in enumerate(captured.inputs):
            held = entry.role != "user" and isinstance(entry.value, torch.Tensor)
            self.names.append(f"value_{number}" if held else None)
            if held:
                self.register_buffer(f"value_{number}", entry.value.detach())
        self.forward = with_parameters(self.called, positional, captured.keywords)

    def called(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        results = self.results(self.captured.flat_inputs(args, kwargs))
        return unflatten(results, self.captured.output_structure)

    def results(self, flat: Sequence[Any]) -> tuple[Any, ...]:
        """The leaves of what the model returns, for the graph's flat inputs."""
        values = [getattr(self, name) if name else value for name, value in zip(self.names, flat, strict=True)]
        made: tuple[Any, ...] = tuple(self.graph_module(*values))
        return made


def parameter_names(model: torch.nn.Module, count: int) -> list[str]:
    """Names of the first arguments that a model takes by position; ``arg_3`` where it names none."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    return [named[number] if number < len(named) else f"arg_{number}" for number in range(count)]


def with_parameters(function: Callable[..., Any], positional: Sequence[str], keywords: Sequence[str]) -> Any:
    """A function with named parameters, for whoever looks at its signature."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    kinds = inspect.Parameter
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *(kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in positional),
            *(kinds(name, kinds.KEYWORD_ONLY) for name in keywords),
        ]
    )
    return forward


def require_no_onnx_options(target: str | Path, options: Options) -> None:
    """Refuse the options that only a conversion to ONNX has.

    Raises:
        InputError: when an operator is preferred, a version of ONNX Runtime named, or a cache, a precision or a text
            asked for.
    """
    for name, given in (("precision", options.precision), ("text", options.text)):
        if given is not None:
            what = f"{name}={str(given)!r} is for ONNX models"
            raise InputError(what, str(target), "use --target onnx, or leave it out")
    if options.prefer != "fastest":
        raise InputError(
            f"prefer={options.prefer!r} chooses among ONNX operators",
            str(target),
            "use --target onnx, or leave it out",
        )
    if options.onnxruntime is not None:
        raise InputError(
            f"onnxruntime={options.onnxruntime!r} is a version to choose ONNX operators for",
            str(target),
            "use --target onnx, or leave it out",
        )
    if options.shared_buffer:
        raise InputError(
            "shared_buffer=True is for the cache of an ONNX model",
            str(target),
            "use --target onnx, or leave it out: a model for PyTorch keeps its own cache",
        )
    if options.last_logits:
        raise InputError(
            "last_logits=True makes one token's logits the output of an ONNX model",
            str(target),
            "use --target onnx, or leave it out: a model for PyTorch takes logits_to_keep in each call",
        )
    if options.cache:
        raise InputError(
            "cache=True makes a cache the inputs and outputs of an ONNX model",
            str(target),
            "use --target onnx, or leave it out: a model for PyTorch keeps its own cache",
        )
