"""The graphs of a model that Dynamo takes between its breaks: for models that torch.export cannot trace as a whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from attncompile.frontends.capture import Captured, capture_dynamo, evaluating
from attncompile.frontends.errors import CaptureError

RECOMPILATIONS = 64
"""How often a piece of code may be captured again for other sizes: each layer of a hierarchy may have its own."""


def capture_with_breaks(
    model: torch.nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> tuple[tuple[Captured, ...], tuple[str, ...]]:
    """Run a model once under Dynamo, in evaluation mode without gradients, and take every graph that it executes.

    A graph that runs several times is there several times, in the order of execution. A function that Dynamo cannot
    trace runs as it is, and those that it calls are traced by themselves. The model itself computes what it always
    does: nothing is rewritten.

    Returns:
        The graphs, and what to know of them: those of which no ATen graph could be made are notes.

    Raises:
        CaptureError: when the model fails under Dynamo.
    """
    executed: list[Captured] = []
    notes: list[str] = []
    failed: list[Exception] = []

    def back_end(graph_module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            captured = capture_dynamo(graph_module, inputs)
        except CaptureError as error:
            notes.append(str(error))
            return graph_module.forward
        except Exception as error:  # a mistake of ours, which Dynamo would pass over
            failed.append(error)
            return graph_module.forward

        def noted(*flat: Any) -> Any:
            executed.append(captured)
            return graph_module.forward(*flat)

        return noted

    torch._dynamo.reset()
    try:
        with (
            evaluating(model),
            torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS, suppress_errors=True),
        ):
            torch.compile(model, backend=back_end)(*args, **copy.deepcopy(dict(kwargs or {})))
    except Exception as error:
        raise CaptureError(
            "Dynamo",
            type(model).__name__,
            str(error).splitlines()[0] if str(error) else type(error).__name__,
            "run the model once as it is with these arguments, to see whether it fails by itself",
        ) from error
    finally:
        torch._dynamo.reset()
    if failed:
        raise failed[0]
    return tuple(executed), tuple(dict.fromkeys(notes))
