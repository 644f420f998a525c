"""How far lossy passes move the output of each site, on its operands while the original reads real text."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import torch

from attncompile.backend.site_module import to_spec_axes
from attncompile.codegen.onnx.tidy import raise_opset, suited_opset
from attncompile.convert.calibration import Call
from attncompile.convert.runtime import feeds, results, save, session
from attncompile.frontends.capture import Captured
from attncompile.frontends.onnx import onnx_graph
from attncompile.ir import Spec
from attncompile.ir.expr import Expr
from attncompile.ir.some_rows import interpret_in_pieces
from attncompile.lift import Site


@dataclass(frozen=True)
class Change:
    """The output of a site after lossy passes against the one before.

    Attributes:
        largest: largest absolute difference; ``None`` where only the relative one is known.
        relative: ``‖after − before‖ / ‖before‖``.
        inputs: what it was measured on, in words.
    """

    largest: float | None
    relative: float
    inputs: str


@dataclass(frozen=True)
class Rewrite:
    """A site and the Spec that it computes after lossy passes.

    A site that the model rounds inside is compared with what the model gave, another with its own Spec.
    """

    site: Site
    after: Spec

    @property
    def operands(self) -> tuple[str, ...]:
        """Native values that the site reads."""
        return tuple(entry.value for entry in self.site.region.inputs) if self.site.region else ()

    @property
    def reads(self) -> tuple[str, ...]:
        """Native values that the change is told from."""
        rounded = self.site.roundings and self.site.region
        return (*self.operands, *(entry.value for entry in rounded.outputs)) if rounded else self.operands

    def change(self, natives: Mapping[str, torch.Tensor], inputs: str) -> Change:
        """Both Specs by their definitions in float32, on native values by name."""
        assert self.site.region is not None and self.site.spec is not None
        types, sizes = self.site.spec.types(), dict[Expr, int]()
        tensors = {
            entry.name: natives[entry.value]
            if entry.layout is None
            else to_spec_axes(natives[entry.value], entry.layout, types[entry.name], sizes)
            for entry in self.site.region.inputs
        }
        after = interpret_in_pieces(self.after, tensors, torch.float32)
        before: Sequence[torch.Tensor] = [
            to_spec_axes(natives[entry.value].float(), entry.layout, types[entry.name], sizes)
            for entry in (self.site.region.outputs if self.site.roundings else ())
            if entry.layout is not None
        ]
        before = before or interpret_in_pieces(self.site.spec, tensors, torch.float32)
        return difference(after, before, inputs)


def difference(after: Sequence[torch.Tensor], before: Sequence[torch.Tensor], inputs: str) -> Change:
    """The change between two results of one site, all outputs together."""
    found, wanted = (torch.cat([one.double().flatten() for one in many]) for many in (after, before))
    apart, size = found - wanted, float(wanted.norm())
    moved = float(apart.norm())
    largest = float(apart.abs().max()) if apart.numel() else 0.0
    return Change(largest, moved / size if size else (0.0 if moved == 0 else float("inf")), inputs)


def changes_in_torch(captured: Captured, call: Call, rewrites: Sequence[Rewrite]) -> dict[str, Change]:
    """The change of each site, by its name, while the captured graph runs on the call.

    A site is evaluated as soon as its operands are there, and they are let go with it.
    """
    found: dict[str, Change] = {}

    class Watching(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            result = super().run_node(node)
            seen[node.name] = result
            for rewrite in [one for one in waiting if all(name in seen for name in one.reads)]:
                found[rewrite.site.name] = rewrite.change(seen, call.what)
                waiting.remove(rewrite)
            wanted = {name for one in waiting for name in one.reads}
            for name in [name for name in seen if name not in wanted]:
                del seen[name]
            return result

    waiting, seen = list(rewrites), dict[str, Any]()
    with torch.no_grad():
        flat = captured.flat_inputs(call.args, call.kwargs)
        Watching(captured.graph_module).run(*flat, enable_io_processing=False)
    return found


def changes_in_onnx(model: onnx_ir.Model, call: Call, provider: str, rewrites: Sequence[Rewrite]) -> dict[str, Change]:
    """The change of each site, by its name, while the unrewritten model runs on the call.

    A site inside a body of ``If`` or ``Loop`` is left out.

    Args:
        model: the unrewritten model; raised to the opset at which it was lifted, in place.
        call: what it runs on; provider: where.
        rewrites: sites that were lifted from the same model.
    """
    name_values(model)
    natives = observed(model, call, provider, {name for one in rewrites for name in one.reads})
    return {
        one.site.name: one.change(natives, call.what)
        for one in rewrites
        if all(name in natives for name in one.reads)
    }


def name_values(model: onnx_ir.Model) -> None:
    """Bring a model to the opset and the names of values that its sites were lifted with, in place."""
    raise_opset(model, suited_opset(model))
    onnx_graph(model)


def observed(model: onnx_ir.Model, call: Call, provider: str, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Values of a model by name while it runs on a call; those inside a body cannot be read and are left out.

    They become outputs of the model, in place.
    """
    graph, wanted = model.graph, set(names)
    made = {value.name: value for node in graph for value in node.outputs if value.name in wanted}
    constants = {name: graph.initializers[name].const_value for name in wanted & set(graph.initializers)}
    known = {value.name for value in graph.outputs}
    graph.outputs.extend(value for name, value in sorted(made.items()) if name not in known)
    with tempfile.TemporaryDirectory(prefix="attncompile-") as folder:
        file = Path(folder) / "observed.onnx"
        save(model, file)
        loaded = session(file, provider)
        fed = feeds(loaded, call)
        found = results(loaded, fed, list(made)) if made else {}
    return {
        **found,
        **{name: torch.from_numpy(fed[name]) for name in wanted & set(fed)},
        **{name: torch.from_numpy(t.numpy().copy()) for name, t in constants.items() if t is not None},
    }


__all__ = ["Change", "Rewrite", "changes_in_onnx", "changes_in_torch", "difference", "name_values", "observed"]
