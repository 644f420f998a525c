"""Proofs are made while garbage collection is put aside: nothing of theirs may wait for it."""

from __future__ import annotations

import gc

import torch

from attncompile.frontends.aten import aten_graph
from attncompile.frontends.capture import capture_export
from attncompile.lift import lift_graph


class Causal(torch.nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        scores = (query @ key.transpose(-1, -2)).masked_fill(~(causal & shown[:, None, None].bool()), -1e30)
        return torch.softmax(scores, dim=-1) @ value


def test_no_tensor_of_a_proof_waits_for_the_garbage_collector() -> None:
    operands = [torch.randn(2, 4, 9, 8) for _ in range(3)]
    graph = aten_graph(capture_export(Causal(), (*operands, torch.ones(2, 9, dtype=torch.int64))))
    lift_graph(graph)  # what is remembered of the first time is no garbage
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        program = lift_graph(graph)
        gc.collect()
        # what other tests have left in this process may become garbage meanwhile; a proof is in float64, by heads
        left = [
            tuple(each.shape)
            for each in gc.garbage
            if isinstance(each, torch.Tensor) and each.dtype is torch.float64 and each.dim() == 4
        ]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert [site.status for site in program.sites] == ["lifted"]
    assert left == []
