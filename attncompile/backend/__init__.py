"""The torch.compile back end: ``torch.compile(model, backend="attncompile")``, found by its entry point.

Attention is rewritten; everything else goes to Inductor, or runs eagerly with ``options={"rest": "eager"}``. Whatever
cannot be done leaves the model's own computation in place, with one warning that says so.
``TORCH_LOGS=attncompile.sites`` prints a line for each site, and why a graph is compiled again.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from attncompile.backend.checkpointing import attends, checkpointed_bodies, checkpoints, with_bodies
from attncompile.backend.choose import SUPPORTED, choose_lowering
from attncompile.backend.compilation import Compilation, alive, held_by, note, note_none, note_unread
from attncompile.backend.explanation import Explanation
from attncompile.backend.first_call import ComparedOnce, why_not_compared
from attncompile.backend.options import Options, read_options
from attncompile.backend.planned import planned_sites
from attncompile.backend.rewrite import Decision, decide, rewrite
from attncompile.backend.verified import named, verified
from attncompile.codegen.triton.ready import get_ready
from attncompile.frontends.aten import aten_graph
from attncompile.frontends.capture import Captured, capture_dynamo, differentiates
from attncompile.frontends.errors import CaptureError
from attncompile.frontends.module_floats import trace_again_with_fixed_floats
from attncompile.frontends.torch_internals import (
    ahead_of_time,
    drop_cuda_graphs,
    inductor,
    keep_identity,
    mode_options,
    trace_artifact,
)
from attncompile.frontends.torch_logs import SITES, site_logger, why_again
from attncompile.lift import Program, lift_graph, passed_over
from attncompile.passes import PassCall, parse_passes

log = logging.getLogger("attncompile")
site_log = site_logger()


class FallbackWarning(UserWarning):
    """Some attention keeps its original computation; the message says which and why."""


def attncompile(
    graph_module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph.

    Args:
        graph_module: the graph; example_inputs: its inputs, as Dynamo passes them.
        mode: a mode of Inductor, passed on to it: the option of that name.
        options: fields of :class:`attncompile.backend.options.Options`.

    Raises:
        ValueError: for an unknown option or an option's wrong value.
    """
    read = read_options(options if mode is None else {**(options or {}), "mode": mode})
    return _compiled(graph_module, example_inputs, read)[0]


# Dynamo calls this where it forgets every graph; a function does not know with which options it was called
attncompile.reset = drop_cuda_graphs  # type: ignore[attr-defined]


class Backend:
    """The back end with its options, for one compiled model, which knows which graphs are its own.

    Attributes:
        options: of the back end.
        numbers: of the compilations that it has made.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.numbers: set[int] = set()

    def __call__(self, graph_module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one Dynamo graph."""
        compiled, compilations = _compiled(graph_module, example_inputs, self.options)
        self.numbers |= {compilation.number for compilation in compilations}
        return compiled

    def reset(self) -> None:
        """Give back what Inductor's CUDA graphs hold; Dynamo calls this where it forgets every graph."""
        if self.options.rest == "inductor":
            drop_cuda_graphs()

    def belongs_to(self, compiled: Callable[..., Any]) -> None:
        """Say whose graphs these are."""
        _BACKENDS[compiled] = self

    @staticmethod
    def of(compiled: Callable[..., Any]) -> Backend | None:
        """The back end of a compiled model or function, or ``None`` where it has none of its own."""
        try:
            return _BACKENDS.get(compiled)
        except TypeError:  # cannot be referred to weakly, or hashed
            return None


_BACKENDS: weakref.WeakKeyDictionary[Any, Backend] = weakref.WeakKeyDictionary()


def _compiled(
    module: torch.fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> tuple[Callable[..., Any], tuple[Compilation, ...]]:
    get_ready()
    if options.rest == "inductor" and _device(example_inputs) in SUPPORTED and _multiplies(module):
        trace_again_with_fixed_floats(module)
    rewriting = _Rewriting(options, parse_passes(options.passes), differentiates(example_inputs))
    rewritten = rewriting.of(module, example_inputs)
    if rewritten is not module:
        keep_identity(module, rewritten)
    compiled = _compile_rest(rewritten, example_inputs, options)
    if options.verify == "full" and rewritten is not module:
        reason = rewriting.why_not_compared()
        if reason is None:
            compiled = ComparedOnce(compiled, module, _warn)
        else:
            log.info("attncompile: the graph is not compared with the original: %s", reason)
    for compilation in rewriting.compilations:
        compiled = held_by(compiled, compilation)
    if options.explain is not None:
        _write_explanation(options.explain)
    return compiled, tuple(rewriting.compilations)


def _write_explanation(file: Path) -> None:
    try:
        file.write_text(f"{Explanation(alive())}\n", encoding="utf-8")
    except OSError as error:
        _warn(f"what was done is not in {str(file)!r}: {error}")


def _compile_rest(module: torch.fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    if options.rest == "eager":
        return ahead_of_time(module, example_inputs) if checkpoints(module) else module.forward
    settings = mode_options(options.mode) or {}
    if options.cudagraphs:
        settings = {**settings, "triton.cudagraphs": True}
    return inductor(module, example_inputs, settings or None)


class _Rewriting:
    """Rewrites one graph, with the bodies of its checkpointed blocks, and remembers what it did."""

    def __init__(self, options: Options, calls: tuple[PassCall, ...], training: bool) -> None:
        self.options, self.calls, self.training = options, calls, training
        self.compilations: list[Compilation] = []
        self.reasons: list[str] = []

    def why_not_compared(self) -> str | None:
        """Why the result need not agree with the graph as it was, or ``None``."""
        return self.reasons[0] if self.reasons else None

    def of(self, module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> torch.fx.GraphModule:
        """The graph with its attention rewritten, or the graph itself where that cannot be done."""
        device = _device(example_inputs)
        if device is not None and device not in SUPPORTED:
            reason = f"device {device!r} is not supported ({', '.join(SUPPORTED)} are); the model runs as it was"
            self._leave(reason, device)
            return module
        bodies = checkpointed_bodies(module)
        if bodies:
            made = {body.name: self.of(body.graph_module, body.inputs) for body in bodies}
            self.reasons.append("its blocks are checkpointed")
            module = with_bodies(module, made)
            if not attends(module):
                return module
        try:
            return self._of(module, example_inputs, device or "cpu")
        except CaptureError as error:
            if _multiplies(module):
                self._leave(f"{error}", device)
            else:  # what quantises a cache, say
                count = len(module.graph.nodes)
                log.info("attncompile: a graph of %d nodes was not looked at: %s", count, error)
                self.compilations.append(note_none(device or "cpu", count))
            return module
        except FallbackWarning:  # made an error by the user's filters
            raise
        except Exception as error:  # a defect of ours must not take the user's model down
            log.debug("attncompile failed", exc_info=True)
            self._leave(
                f"attention was not rewritten because of an internal error ({type(error).__name__}: {error}); the "
                "model runs as it was. Please report this",
                device,
            )
            return module

    def _leave(self, reason: str, device: str | None = None) -> None:
        """Say, now and in the explanation, why attention stays as it was."""
        _warn(reason)
        self.compilations.append(note_unread(device or "cpu", reason, 0.0))

    def _of(self, module: torch.fx.GraphModule, example_inputs: Sequence[Any], device: str) -> torch.fx.GraphModule:
        begun = time.perf_counter()
        captured = capture_dynamo(module, example_inputs)
        program = lift_graph(aten_graph(captured), "the compiled graph", captured.notes, blocks=False)
        if not program.sites:
            count, seen = len(module.graph.nodes), passed_over(program.graph)
            log.info("attncompile: no attention in this graph of %d nodes", count)
            for text in seen:
                site_log.info("attncompile: no attention: %s", text)
            seconds = time.perf_counter() - begun
            self.compilations.append(note_none(device, count, seen, _parameters(captured), seconds, why_again()))
            return module
        decisions, said = self._decisions(program, device)
        said = (*_complaints(decisions), *said)
        for text in said:
            _warn(text)
        rewritten = module
        if any(decision.lowering for decision in decisions):
            rewritten = rewrite(captured.graph_module, program, decisions)
        lossy = [d.site.name for d in decisions if d.lowering and d.passes and d.passes.lossy]
        random = why_not_compared(captured.graph_module)
        self.reasons += [f"a lossy pass changes {name}" for name in lossy[:1]] + ([random] if random else [])
        seconds, again = time.perf_counter() - begun, why_again()
        self._tell(decisions, again)  # before it is noted: where telling fails, the graph runs as it was
        self.compilations.append(note(program, decisions, device, said, _parameters(captured), seconds, again))
        return rewritten

    def _decisions(self, program: Program, device: str) -> tuple[tuple[Decision, ...], tuple[str, ...]]:
        options, said = self.options, []
        planned = {}
        if options.plan is not None:
            names = [site.name for site in program.sites]
            planned = planned_sites(options.plan, names)
            if not planned:
                known = ", ".join(entry.site for entry in options.plan.sites[:3])
                said.append(f"the plan names none of the sites {', '.join(names[:3])}, …; it names {known}, …")

        def decided(part: Program, calls: tuple[PassCall, ...], by_site: Mapping[str, Any]) -> tuple[Decision, ...]:
            return decide(
                part,
                calls,
                lambda spec: choose_lowering(spec, device),
                planned=by_site,
                allow_untrained=options.allow_untrained,
                training=self.training,
            )

        def exactly(decision: Decision) -> Decision:
            asked = planned.get(decision.site.name, self.calls)
            calls = tuple(call for call in asked if not isinstance(call, str) and call.rewrite.contract == "exact")
            # as it was lifted: a pass may have made it larger
            sites = tuple(site for site in program.sites if site.name == decision.site.name)
            return decided(dataclasses.replace(program, sites=sites), calls, {})[0]

        decisions, told = verified(
            decided(program, self.calls, planned),
            device,
            checks=options.verify != "off",
            budget=options.budget,
            exact=exactly,
        )
        return decisions, (*said, *told)

    def _tell(self, decisions: Sequence[Decision], again: str) -> None:
        """A line for each site to the log, which has Specs in detail, and to the terminal where that was asked for."""
        lines = [f"{d.site.name}: {d.lowering.operator if d.lowering else 'original'} ({d.reason})" for d in decisions]
        if again:
            lines.insert(0, f"compiled again: {again}")
        for line in lines:
            site_log.info("attncompile: %s", line)
            if self.options.verbose:
                print(f"attncompile: {line}")
        for spec in dict.fromkeys(str(d.spec) for d in decisions if d.spec is not None):
            site_log.debug("attncompile: %s", spec)
        trace_artifact(SITES, lines)


def _parameters(captured: Captured) -> dict[str, tuple[Any, ...]]:
    """Shapes of the module parameters among the inputs, by dotted name."""
    nodes = {node.name: node for node in captured.graph_module.graph.nodes if node.op == "placeholder"}
    values = {entry.name: nodes[entry.placeholder].meta.get("val") for entry in captured.inputs
              if entry.role == "parameter"}  # fmt: skip
    return {name: tuple(value.shape) for name, value in values.items() if isinstance(value, torch.Tensor)}


def _device(inputs: Sequence[Any]) -> str | None:
    kinds = {value.device.type for value in inputs if isinstance(value, torch.Tensor)}
    return "cuda" if "cuda" in kinds else next(iter(sorted(kinds)), None)


def _multiplies(module: torch.fx.GraphModule) -> bool:
    """Whether a graph has any operation that attention cannot do without, in this graph or in one that it calls."""
    parts = [part for part in module.modules() if isinstance(part, torch.fx.GraphModule)]
    calls = [str(node.target) for part in parts for node in part.graph.nodes if node.op.startswith("call_")]
    return any(name in call for call in calls for name in ("attention", "softmax", "mm", "matmul", "einsum", "dot"))


def _complaints(decisions: Sequence[Decision]) -> list[str]:
    """What the user is warned of: sites that stay as they were, and a pass that does not apply."""
    said = []
    kept = [d for d in decisions if d.lowering is None]
    if kept:
        said.append(
            f"{len(kept)} of {len(decisions)} attention sites keep their original computation: "
            f"{named([d.site.name for d in kept])} ({kept[0].reason})"
        )
    refused = [(d.site.name, *d.passes.refused[0]) for d in decisions if d.passes and d.passes.refused]
    if refused:
        site, name, reason = refused[0]
        said.append(f"pass {name} does not apply to {site}: {reason}")
    return said


def _warn(message: str) -> None:
    warnings.warn(f"attncompile: {message}", FallbackWarning, stacklevel=2)


__all__ = [
    "Backend",
    "Decision",
    "FallbackWarning",
    "Options",
    "attncompile",
    "choose_lowering",
    "decide",
    "read_options",
    "rewrite",
]
