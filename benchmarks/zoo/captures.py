"""Ways to get a graph of a model, lift it, and check what was lifted by running the model without it.

`CAPTURES` has one row per way. Each takes a built model and returns a `Finding`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import onnx
import onnx_ir
import onnxruntime
import torch
from torch.utils._pytree import tree_leaves

from attncompile.backend.rewrite import Decision, decide, rewrite
from attncompile.codegen import pytorch
from attncompile.convert.calibration import Call
from attncompile.convert.onnx_rewrite import rewrite_onnx
from attncompile.convert.runtime import run as run_onnx
from attncompile.convert.runtime import session
from attncompile.frontends.aten import aten_graph
from attncompile.frontends.capture import (
    Captured,
    capture_dynamo,
    capture_export,
    dynamic_axes_of,
    exported_program,
)
from attncompile.frontends.errors import CaptureError, InputError
from attncompile.frontends.onnx import onnx_graph
from attncompile.lift import Program, lift_graph
from benchmarks.zoo.processes import said

CLOSE = 1e-3
"""Largest difference of an output, relative to its largest element, that float32 may make through a whole model."""

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class FoundSite:
    """A site in a row of the benchmark: where it is, and the refusal if there is one."""

    name: str
    status: str
    norm: str = ""
    kind: str = ""
    reason: str = ""
    node: str = ""
    source: str = ""


@dataclass
class Finding:
    """What one capture of one model found.

    Attributes:
        sites: one entry per site and execution of its graph.
        graphs: number of graphs.
        notes: what the captures had to say.
        replaced: sites that ran as their lowered Spec in the end-to-end check; None where there is none.
        unchecked: why the end-to-end check itself failed, or empty.
        error: largest relative difference of an output with all lowered Specs in place.
        capture_s: seconds to get graphs. lift_s: seconds to view, lift and prove.
    """

    sites: list[FoundSite] = field(default_factory=list)
    graphs: int = 0
    notes: list[str] = field(default_factory=list)
    replaced: int | None = None
    unchecked: str = ""
    error: float | None = None
    capture_s: float = 0.0
    lift_s: float = 0.0


Capture = Callable[[torch.nn.Module, Sequence[Any], Arguments], Finding]


def _sites(program: Program) -> list[FoundSite]:
    found = []
    for site in program.sites:
        attend = site.spec.attend() if site.spec is not None else None
        refusal = site.refusal
        found.append(
            FoundSite(
                name=site.name,
                status=site.status,
                norm=attend.norm.kind if attend is not None else "",
                kind=refusal.kind if refusal else "",
                reason=refusal.reason if refusal else "",
                node=refusal.node if refusal else "",
                source=(refusal.source if refusal else "") or site.source,
            )
        )
    return found


def _decisions(program: Program, finding: Finding) -> tuple[Decision, ...]:
    """Lower every lifted site to a PyTorch operator; sites that no operator computes stay, with the reason."""
    decisions = decide(program, (), _lowering, even_reference=True)
    finding.replaced = (finding.replaced or 0) + sum(one.lowering is not None for one in decisions)
    return decisions


def _lowering(spec: Any) -> Any:
    return pytorch.lower(spec, "cpu")


def _seeded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function returns when random numbers start afresh: some models draw their masks."""
    torch.manual_seed(0)
    return function(*args, **kwargs)


def difference(expected: Any, actual: Any) -> float:
    """Largest difference between two results, leaf by leaf, relative to the largest finite element; NaN = NaN."""
    worst = 0.0
    pairs = zip(_tensors(expected), _tensors(actual), strict=True)
    for wanted, given in pairs:
        if wanted.shape != given.shape:
            return math.inf
        if not wanted.is_floating_point():
            continue  # what is counted or ranked may tip over on a rounding
        finite = wanted.isfinite()
        if not torch.equal(finite, given.isfinite()):
            return math.inf
        if finite.any():
            scale = max(float(wanted[finite].abs().max()), 1e-6)
            worst = max(worst, float((wanted[finite] - given[finite]).abs().max()) / scale)
    return worst


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    for leaf in tree_leaves(result):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif hasattr(leaf, "to_tuple"):
            yield from _tensors(leaf.to_tuple())


# --- torch.export -------------------------------------------------------------------------------------------------


def export(model: torch.nn.Module, args: Sequence[Any], kwargs: Arguments) -> Finding:
    """One graph from torch.export, with symbolic batch and sequence sizes where the model allows."""
    finding = Finding(graphs=1)
    start = time.perf_counter()
    captured = capture_export(model, args, kwargs)
    finding.capture_s = time.perf_counter() - start
    finding.notes += captured.notes
    start = time.perf_counter()
    program = lift_graph(aten_graph(captured), type(model).__name__, captured.notes)
    finding.lift_s = time.perf_counter() - start
    finding.sites = _sites(program)
    try:
        _check_export(captured, program, args, kwargs, finding)
    except Exception as error:  # what was found stays found
        finding.unchecked = said(error)
    return finding


def _check_export(
    captured: Captured, program: Program, args: Sequence[Any], kwargs: Arguments, finding: Finding
) -> None:
    """Run the graph with every lifted site replaced by its lowered Spec, and as it was."""
    rewritten = rewrite(captured.graph_module, program, _decisions(program, finding))
    with torch.no_grad():
        # copies: writes to buffers must not carry over from one run to the other
        expected = _seeded(captured.graph_module, *copy.deepcopy(captured.flat_inputs(args, kwargs)))
        actual = _seeded(rewritten, *copy.deepcopy(captured.flat_inputs(args, kwargs)))
    finding.error = difference(expected, actual)


# --- Dynamo -------------------------------------------------------------------------------------------------------


def dynamo(model: torch.nn.Module, args: Sequence[Any], kwargs: Arguments) -> Finding:
    """Every graph that Dynamo hands over between its breaks; a graph that runs twice counts twice."""
    finding = Finding()
    failed: list[Exception] = []
    torch._dynamo.reset()

    def back_end(graph_module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        finding.graphs += 1
        start = time.perf_counter()
        try:
            captured = capture_dynamo(graph_module, inputs)
            program = lift_graph(aten_graph(captured), "graph", captured.notes)
        except CaptureError as error:
            finding.notes.append(str(error))
            return graph_module.forward
        except Exception as error:  # a mistake of ours, which Dynamo would pass over
            failed.append(error)
            return graph_module.forward
        finding.lift_s += time.perf_counter() - start
        found = _sites(program)
        run = graph_module.forward
        if program.count("lifted"):
            try:
                run = rewrite(captured.graph_module, program, _decisions(program, finding)).forward
            except Exception as error:  # what was found stays found
                finding.unchecked = said(error)

        def counted(*flat: Any) -> Any:
            finding.sites += found
            return run(*flat)

        return counted

    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64, suppress_errors=True):
        expected = _seeded(model, *args, **copy.deepcopy(dict(kwargs)))
        start = time.perf_counter()
        actual = _seeded(torch.compile(model, backend=back_end), *args, **copy.deepcopy(dict(kwargs)))
        finding.capture_s = time.perf_counter() - start - finding.lift_s
        if failed:
            raise failed[0]
        finding.error = difference(expected, actual)
        if finding.error > CLOSE:
            torch._dynamo.reset()
            plain = _seeded(torch.compile(model, backend="eager"), *args, **copy.deepcopy(dict(kwargs)))
            if difference(plain, actual) <= CLOSE:
                what = f"Dynamo itself changes the outputs, by {finding.error:.3g}: its eager back end gives the same"
                finding.notes.append(what)
                finding.error = difference(plain, actual)
    return finding


# --- ONNX ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' progress and warnings."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(level)


def _lift_onnx(model: onnx_ir.Model, call: Call, finding: Finding) -> Finding:
    """Lift an exported model, and run it as it was and with every lifted site in the operators that we write for it."""
    stored = onnx_ir.to_proto(model).SerializeToString()
    try:
        expected = in_runtime(stored, call)
    except (InputError, RuntimeError) as error:
        raise ValueError(f"the exported model does not run: {error}") from error
    start = time.perf_counter()
    program = lift_graph(onnx_graph(model), "model")
    finding.lift_s = time.perf_counter() - start
    finding.sites = _sites(program)
    try:
        fresh = onnx_ir.from_proto(onnx.load_from_string(stored))
        rewritten = rewrite_onnx(fresh, "model", (), "cpu", "fused", False, ())
        finding.replaced = len(rewritten.choices)
        actual = in_runtime(onnx_ir.to_proto(rewritten.model).SerializeToString(), call)
        finding.error = difference(list(expected.values()), [actual[name] for name in expected])
    except Exception as error:  # what was found stays found
        finding.unchecked = said(error)
    return finding


def in_runtime(model: bytes, call: Call) -> dict[str, torch.Tensor]:
    """The outputs in ONNX Runtime on the CPU; random numbers start afresh."""
    onnxruntime.set_seed(0)
    return run_onnx(session(model, "cpu", threads=1), call)


def torch_onnx(model: torch.nn.Module, args: Sequence[Any], kwargs: Arguments) -> onnx_ir.Model:
    """The model as ``torch.onnx.export(dynamo=True)`` writes it."""
    program, _ = exported_program(model, args, kwargs)
    with torch.no_grad(), quiet():
        exported = torch.onnx.export(program, dynamo=True, verbose=False)
    if exported is None:
        raise ValueError("torch.onnx.export gave no program")
    return exported.model


def onnx_dynamo(model: torch.nn.Module, args: Sequence[Any], kwargs: Arguments) -> Finding:
    """The ONNX model from torch.export."""
    finding = Finding(graphs=1)
    start = time.perf_counter()
    exported = torch_onnx(model, args, kwargs)
    finding.capture_s = time.perf_counter() - start
    return _lift_onnx(exported, Call(tuple(args), kwargs, "example"), finding)


class _Positional(torch.nn.Module):
    """The model called with its tensors in order, giving a flat tuple: all that the TorchScript exporter knows."""

    def __init__(self, model: torch.nn.Module, kwargs: Arguments) -> None:
        super().__init__()
        self.model = model
        self.names = [name for name, value in kwargs.items() if isinstance(value, torch.Tensor)]
        self.rest = {name: value for name, value in kwargs.items() if name not in self.names}

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors of the result."""
        result = self.model(**dict(zip(self.names, tensors, strict=True)), **self.rest)
        return tuple(tensor for tensor in _tensors(result) if tensor.numel())


def torchscript_onnx(model: torch.nn.Module, args: Sequence[Any], kwargs: Arguments) -> onnx_ir.Model:
    """The model as the TorchScript exporter writes it, opset 17, with dynamic batch and sequence axes."""
    flat = _Positional(model, kwargs).eval()
    tensors = tuple(kwargs[name] for name in flat.names)
    axes = dict(zip(flat.names, dynamic_axes_of((), {name: kwargs[name] for name in flat.names}), strict=True))
    buffer = io.BytesIO()
    with torch.no_grad(), quiet():
        torch.onnx.export(
            flat, tensors, cast(Any, buffer), input_names=flat.names, dynamic_axes=axes, opset_version=17, dynamo=False
        )
    return onnx_ir.from_proto(onnx.load_from_string(buffer.getvalue()))


def onnx_torchscript(model: torch.nn.Module, args: Sequence[Any], kwargs: Arguments) -> Finding:
    """The ONNX model from the TorchScript exporter."""
    finding = Finding(graphs=1)
    start = time.perf_counter()
    exported = torchscript_onnx(model, args, kwargs)
    finding.capture_s = time.perf_counter() - start
    return _lift_onnx(exported, Call(tuple(args), kwargs, "example"), finding)


def warm_up(names: Iterable[str]) -> None:
    """Load what the captures load lazily, before processes are forked."""
    model, kwargs = torch.nn.Linear(2, 2).eval(), {"input": torch.ones(2, 2)}
    for name in {*names} & {*CAPTURES}:
        CAPTURES[name](model, (), kwargs)
    torch._dynamo.reset()


CAPTURES: Mapping[str, Capture] = {
    "export": export,
    "dynamo": dynamo,
    "onnx-dynamo": onnx_dynamo,
    "onnx-torchscript": onnx_torchscript,
}
"""Captures by the names that the command line takes."""
