"""How many attentions of a model other tools find, counted the way they count themselves."""

from __future__ import annotations

import collections
import copy
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import onnx_ir
import torch

from benchmarks.zoo.captures import Arguments, quiet

Peer = Callable[[torch.nn.Module, Sequence[Any], Arguments], int]

ATTENTION_OPERATORS = frozenset(
    {
        "Attention", "DecoderMaskedMultiHeadAttention", "GroupQueryAttention", "LongformerAttention",
        "MultiHeadAttention", "PackedAttention", "PackedMultiHeadAttention", "SDPA", "SparseAttention",
    }
)  # fmt: skip


def inductor(model: torch.nn.Module, args: Sequence[Any], kwargs: Arguments) -> int:
    """Replacements that Inductor's ``fuse_attention`` makes in the graphs of one forward pass.

    Everything up to its pattern matcher runs; instead of generating C++, the matched graph itself runs.
    """
    import torch._inductor.config as settings
    from torch._dynamo.utils import counters
    from torch._inductor.compile_fx import compile_fx

    torch._dynamo.reset()
    counters.clear()
    counted = collections.Counter[str]()

    def run_graph(graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        new = counters["inductor"]["fuse_attention"] - counted["seen"]
        counted["seen"] += new

        def run(*flat: Any) -> Any:
            counted["executed"] += new
            flat = tuple(flat[0]) if len(flat) == 1 and isinstance(flat[0], list) else flat
            return graph(*flat)

        return run

    def back_end(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return cast(Any, compile_fx(graph, inputs, inner_compile=cast(Any, run_graph)))

    with (
        torch.no_grad(),
        settings.patch(fx_graph_cache=False, force_disable_caches=True),
        torch._dynamo.config.patch(suppress_errors=True, recompile_limit=64),
    ):
        torch.compile(model, backend=back_end, dynamic=False)(*args, **copy.deepcopy(dict(kwargs)))
    return counted["executed"]


def onnxscript(model: torch.nn.Module, args: Sequence[Any], kwargs: Arguments) -> int:
    """Attention operators that onnxscript's fusions for ONNX Runtime put into the exported model."""
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    with torch.no_grad(), quiet():
        # with the sizes of the example, which its patterns match best
        program = torch.export.export(model, tuple(args), dict(kwargs), strict=False)
        exported = torch.onnx.export(program, dynamo=True, verbose=False)
        if exported is None:
            raise ValueError("torch.onnx.export gave no program")
        before = _operators(exported.model)
        optimised, counts = optimize_for_ort(exported.model)
    return max(_operators(optimised) - before, int(counts.get("sdpa", 0)))


def _operators(model: onnx_ir.Model) -> int:
    return sum(node.op_type in ATTENTION_OPERATORS for node in model.graph)


PEERS: Mapping[str, Peer] = {"inductor": inductor, "onnxscript": onnxscript}
"""Other tools by name."""
