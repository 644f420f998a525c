"""Every tensor that a captured graph makes on the way."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from attncompile.frontends.capture import Captured


def recorded(captured: Captured, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run a captured graph on inputs by name; its tensors as they are at the end of the run."""
    values: dict[str, torch.Tensor] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> object:
            result = super().run_node(node)
            if isinstance(result, torch.Tensor):
                values[node.name] = result
            return result

    with torch.no_grad():
        Recorder(captured.graph_module).run(*captured.flat_inputs((), dict(feeds)))
    return values
