"""What became of the attention of a model whose calls come through transformers' interface."""

from __future__ import annotations

import dataclasses
import logging
import threading
import warnings
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from attncompile.backend import FallbackWarning
from attncompile.backend.compilation import ExplainedSite
from attncompile.backend.explanation import site_lines
from attncompile.backend.stated import forget_traced_sizes, fused, lowered, sizes_of, traced_sizes
from attncompile.codegen.lowering import Lowering
from attncompile.frontends.torch_logs import site_logger
from attncompile.ir import parse_spec
from attncompile.ir.spec import Spec


@dataclass(frozen=True)
class Seen:
    """One kind of call of a layer.

    Attributes:
        site: class of the layer.
        text: the Spec, empty where the model's own computation stays.
        device: device type it ran on.
        reason: why the original stays, or why a map is read; empty where there is nothing to say.
    """

    site: str
    text: str
    device: str
    reason: str


Sizes = Mapping[str, int] | None
"""Of a Spec's symbols in a call; ``None`` where they are not known."""

site_log = site_logger()
_lock = threading.Lock()
_by_module: MutableMapping[torch.nn.Module, dict[Seen, Sizes]] = WeakKeyDictionary()
_by_class: dict[str, dict[Seen, None]] = {}


def note(module: torch.nn.Module, seen: Seen, *tensors: torch.Tensor) -> None:
    """Remember what became of a call of a layer, and with which sizes it came first.

    Args:
        module: the layer.
        seen: the kind of call.
        tensors: inputs of its Spec, none where the original stays.
    """
    known = _by_module.get(module)
    if known is None or seen not in known:
        sizes = sizes_of(seen.text, *tensors) if seen.text else None
        with _lock:
            _by_module.setdefault(module, {}).setdefault(seen, sizes)
        _tell(seen)


def note_class(seen: Seen) -> None:
    """Remember what became of a call in a compiled graph, where one call may stand for several layers."""
    if seen not in _by_class.get(seen.site, {}):
        with _lock:
            _by_class.setdefault(seen.site, {})[seen] = None
        _tell(seen)


def _tell(seen: Seen) -> None:
    """A line to the log of sites, and the Spec in detail."""
    if not site_log.isEnabledFor(logging.INFO):
        return
    operator, reason = "original", seen.reason
    if seen.text:
        lowering = lowered(seen.text, seen.device)[1]
        operator, reason = lowering.operator, _why(lowering, seen)
    site_log.info("attncompile: %s: %s (%s)", seen.site, operator, reason)
    if seen.text:
        site_log.debug("attncompile: %s", seen.text)


def _why(lowering: Lowering, seen: Seen) -> str:
    return "; ".join(part for part in (lowering.reason, seen.reason) if part)


def forget() -> None:
    """Forget all calls seen so far, of every model."""
    with _lock:
        _by_module.clear()
        _by_class.clear()
        forget_traced_sizes()


@torch.compiler.assume_constant_result
def say_kept(site: str, reason: str, traced: bool) -> bool:
    """Say that attention is left to the model; while a graph is traced, remember it too."""
    warnings.warn(f"attncompile: {site} keeps its original computation ({reason})", FallbackWarning, stacklevel=4)
    if traced:
        note_class(Seen(site, "", "", reason))
    return True


@dataclass(frozen=True)
class SiteReport(ExplainedSite):
    """What one layer computes, in the form of ``attncompile.explain``; ``cost()`` is at the sizes of its first call.

    Attributes:
        compiled: whether the call is part of a compiled graph, which tells layers of one class not apart.
    """

    compiled: bool

    @property
    def spec(self) -> Spec | None:
        """The Spec that was stated, ``None`` where the original stays."""
        return parse_spec(self.before) if self.before else None

    @property
    def runs(self) -> str:
        """What computes it now, and where."""
        return f"{self.operator}, in a compiled graph" if self.compiled else self.operator

    def __str__(self) -> str:
        return "\n".join(site_lines([self]))


@dataclass(frozen=True)
class Explanation:
    """What became of each layer's attention.

    Attributes:
        model: name of the model's class.
        sites: one for each layer and kind of call, in the order of the modules.
        notes: what the reader should know beside them.
    """

    model: str
    sites: tuple[SiteReport, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        stated = sum(site.spec is not None for site in self.sites)
        head = f"{self.model}: {stated} of {len(self.sites)} kinds of attention calls stated"
        return "\n".join([head, *(f"  {line}" for line in site_lines(self.sites)), *self.notes])


def explain(model: torch.nn.Module) -> Explanation:
    """What became of the attention of a model that was loaded with ``attn_implementation="attncompile"``.

    Call the model first: a layer is stated when it is called. Layers in compiled graphs are known by their class. A
    module that ``torch.compile`` gave stands for the model inside.
    """
    model = getattr(model, "_orig_mod", model)
    sites: list[SiteReport] = []
    for name, module in model.named_modules():
        path = name or type(module).__name__
        own = dict(_by_module.get(module, {}))
        compiled = tuple(_by_class.get(type(module).__name__, {}))
        sites += [_report(path, seen, sizes, False) for seen, sizes in own.items()]
        sites += [
            _report(path, seen, traced_sizes(seen.text, seen.device), True) for seen in compiled if seen not in own
        ]
    return Explanation(type(model).__name__, tuple(sites), _notes(model, bool(sites)))


def _report(name: str, seen: Seen, sizes: Sizes, compiled: bool) -> SiteReport:
    if not seen.text:
        return SiteReport(name, "refused", "", "", (), (), "original", seen.reason, "", None, compiled)
    spec, lowering = lowered(seen.text, seen.device)
    passes = fused(seen.text)
    before, after = (str(dataclasses.replace(one, name=name)) for one in (parse_spec(seen.text), spec))
    return SiteReport(
        name,
        "stated",
        before,
        after,
        passes.applied,
        passes.refused,
        lowering.operator,
        _why(lowering, seen),
        "",
        sizes,
        compiled,
    )


def _notes(model: torch.nn.Module, called: bool) -> tuple[str, ...]:
    notes = [] if called else [_why_none(model)]
    for name, part in model.named_modules():
        asked = _asked(part)
        settable = getattr(part, "_can_set_attn_implementation", None)
        if asked == "attncompile" and settable is not None and not settable():
            notes.append(
                f"{name or type(part).__name__} does not call attention through transformers' interface: it runs as it "
                "is written. torch.compile(model, backend=\"attncompile\") finds attention in any code."
            )
    return tuple(notes)


def _asked(part: torch.nn.Module) -> str | None:
    """The attention that a module's configuration asks for."""
    return getattr(getattr(part, "config", None), "_attn_implementation", None)


def _why_none(model: torch.nn.Module) -> str:
    """Why no attention has come through the interface."""
    asked = sorted({found for part in model.modules() if (found := _asked(part)) is not None})
    if "attncompile" in asked or not asked:
        return "No attention has come through the interface yet; call the model first."
    return (
        f"No attention comes through the interface: the model runs with {', '.join(map(repr, asked))}. Load it with "
        'attn_implementation="attncompile"; where transformers refuses that, '
        'torch.compile(model, backend="attncompile") finds attention in any code.'
    )
