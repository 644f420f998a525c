"""pytest's log handlers and torch's trace: a handler on it makes torch write down all that it does."""

from __future__ import annotations

import torch
from torch._logging._internal import trace_log, trace_structured


def test_torch_writes_down_no_trace_for_pytest() -> None:
    """Stacks of each step and graphs as text took a fifth of the time of an export."""
    torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))  # torch's own handler leaves with the first record
    written: list[str] = []
    trace_structured("artifact", lambda: {"name": "graph"}, payload_fn=lambda: written.append("graph"))
    assert not trace_log.handlers and not written
