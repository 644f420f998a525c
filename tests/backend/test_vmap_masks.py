"""An exported graph whose mask is made inside vmap, as in transformers, still runs when its attention is replaced."""

from __future__ import annotations

import torch

from attncompile.backend.choose import choose_lowering
from attncompile.backend.rewrite import decide, rewrite
from attncompile.frontends.aten import aten_graph
from attncompile.frontends.capture import capture_export
from attncompile.lift import lift_graph
from attncompile.verify import derive_tolerance, require_within


class Windowed(torch.nn.Module):
    """Sees the last three positions and itself; the positions are mapped over one by one."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        def sees(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
            return (column <= row) & (row - column < 4)

        over_keys = torch.vmap(sees, in_dims=(None, 0))
        shown = torch.vmap(over_keys, in_dims=(0, None))(torch.arange(query.shape[2]), torch.arange(key.shape[2]))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=shown)


def test_transforms_are_still_entered_and_left() -> None:
    model, operands = Windowed(), [torch.randn(2, 3, 11, 8) for _ in range(3)]
    captured = capture_export(model, tuple(operands))
    program = lift_graph(aten_graph(captured), "windowed")
    decisions = decide(program, (), lambda spec: choose_lowering(spec, "cpu"))
    assert [decision.lowering is not None for decision in decisions] == [True]
    rewritten = rewrite(captured.graph_module, program, decisions)
    with torch.no_grad():
        (found,) = rewritten(*captured.flat_inputs(operands, {}))
        exact = model(*(operand.double() for operand in operands))
        require_within(found, exact, derive_tolerance(exact, model(*operands), 11).bound, "the result")
