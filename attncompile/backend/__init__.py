"""The torch.compile back end: ``torch.compile(model, backend="attncompile")``, found by its entry point.

Attention is rewritten; everything else goes to Inductor, or runs eagerly with ``options={"rest": "eager"}``. Whatever
cannot be done leaves the model's own computation in place, with one warning that says so.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from attncompile.backend.checkpointing import attends, checkpointed_bodies, with_bodies
from attncompile.backend.choose import SUPPORTED, choose_lowering
from attncompile.backend.options import Options, read_options
from attncompile.backend.rewrite import Decision, decide, rewrite
from attncompile.frontends.aten import aten_graph
from attncompile.frontends.capture import capture_dynamo
from attncompile.frontends.errors import CaptureError
from attncompile.frontends.torch_internals import ahead_of_time, inductor, mode_options
from attncompile.lift import Program, lift_graph
from attncompile.passes import parse_passes

log = logging.getLogger("attncompile")


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
        mode: a mode of Inductor, passed on to it.
        options: fields of :class:`attncompile.backend.options.Options`.

    Raises:
        ValueError: for an unknown option or an option's wrong value.
    """
    chosen = read_options(options)
    calls = parse_passes(chosen.passes)
    rewritten = _rewritten(graph_module, example_inputs, chosen, calls)
    return _compile_rest(rewritten, example_inputs, chosen, mode)


def _compile_rest(
    module: torch.fx.GraphModule, example_inputs: Sequence[Any], options: Options, mode: str | None
) -> Callable[..., Any]:
    if options.rest == "eager":
        return ahead_of_time(module, example_inputs) if checkpointed_bodies(module) else module.forward
    return inductor(module, example_inputs, mode_options(mode))


def _rewritten(
    module: torch.fx.GraphModule, example_inputs: Sequence[Any], options: Options, calls: Any
) -> torch.fx.GraphModule:
    """The graph with its attention rewritten, or the graph itself where that cannot be done."""
    device = _device(example_inputs)
    if device is not None and device not in SUPPORTED:
        _warn(f"device {device!r} is not supported ({', '.join(SUPPORTED)} are); the model runs as it was")
        return module
    bodies = checkpointed_bodies(module)
    if bodies:
        if attends(module):
            _warn("attention outside the checkpointed blocks runs as it was; that inside them is rewritten")
        made = {body.name: _rewritten(body.graph_module, body.inputs, options, calls) for body in bodies}
        return with_bodies(module, made)
    try:
        captured = capture_dynamo(module, example_inputs)
        program = lift_graph(aten_graph(captured), "the compiled graph", captured.notes, blocks=False)
        if not program.sites:
            log.info("attncompile: no attention in this graph of %d nodes", len(module.graph.nodes))
            return module
        kind = device or "cpu"
        decisions = decide(
            program, calls, lambda spec: choose_lowering(spec, kind), allow_untrained=options.allow_untrained
        )
        _report(program, decisions, options)
        if not any(decision.lowering for decision in decisions):
            return module
        return rewrite(captured.graph_module, program, decisions)
    except CaptureError as error:
        _warn(f"{error}")
        return module
    except Exception as error:  # a defect of ours must not take the user's model down
        log.debug("attncompile failed", exc_info=True)
        _warn(
            f"attention was not rewritten because of an internal error ({type(error).__name__}: {error}); the model "
            "runs as "
            "it was. Please report this"
        )
        return module


def _device(inputs: Sequence[Any]) -> str | None:
    kinds = {value.device.type for value in inputs if isinstance(value, torch.Tensor)}
    return "cuda" if "cuda" in kinds else next(iter(sorted(kinds)), None)


def _report(program: Program, decisions: Sequence[Decision], options: Options) -> None:
    kept = [d for d in decisions if d.lowering is None]
    if kept:
        names = ", ".join(d.site.name for d in kept[:3]) + (
            f" and {len(kept) - 3} more" if len(kept) > 3 else ""
        )
        _warn(
            f"{len(kept)} of {len(decisions)} attention sites keep their original computation: {names} "
            f"({kept[0].reason})"
        )
    for decision in decisions:
        if decision.passes and decision.passes.refused:
            name, reason = decision.passes.refused[0]
            _warn(f"pass {name} does not apply to {decision.site.name}: {reason}")
            break
    for decision in decisions:
        operator = decision.lowering.operator if decision.lowering else "original"
        line = f"{decision.site.name}: {operator} ({decision.reason})"
        log.info("attncompile: %s", line)
        if options.verbose:
            print(f"attncompile: {line}")


def _warn(message: str) -> None:
    warnings.warn(f"attncompile: {message}", FallbackWarning, stacklevel=2)


__all__ = [
    "Decision",
    "FallbackWarning",
    "Options",
    "attncompile",
    "choose_lowering",
    "decide",
    "read_options",
    "rewrite",
]
