"""What a lossy result does to the outputs of a model: counted over calls, told as a few numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from attncompile.convert.calibration import Call
from attncompile.frontends.cached import PRESENT
from attncompile.verify import EndToEnd, measured
from attncompile.verify.tolerance import largest

Outputs = Mapping[str, torch.Tensor]
CHANGE = "relative change of {}"
"""Metric that a budget is for."""


@dataclass
class Counted:
    """Sums over calls for one output.

    Attributes:
        apart, size: sums of squares of the difference and of the original.
        most: the largest difference of an element.
        cosines, vectors: sum of the cosines between vectors, and how many vectors.
        before, after, tokens: losses of next tokens and how many tokens, for logits over the input's tokens.
        agreed, positions: at how many positions both predict the same token, and how many there are.
    """

    apart: float = 0.0
    size: float = 0.0
    most: float = 0.0
    cosines: float = 0.0
    vectors: int = 0
    before: float = 0.0
    after: float = 0.0
    tokens: int = 0
    agreed: int = 0
    positions: int = 0

    def add(self, found: torch.Tensor, wanted: torch.Tensor) -> None:
        """Count one output of one call, padding left out; nothing is asked where the original is not finite."""
        found, wanted = found.double(), wanted.double()
        if not wanted.isfinite().all():
            found, wanted = (side.where(wanted.isfinite(), 0.0) for side in (found, wanted))
        self.apart += float((found - wanted).square().sum())
        self.size += float(wanted.square().sum())
        difference = (found - wanted).abs()
        self.most = max(self.most, largest(difference) if difference.isfinite().all() else math.inf)
        if wanted.dim():
            cosines = torch.nn.functional.cosine_similarity(wanted, found, dim=-1)
            self.cosines += float(cosines.sum())
            self.vectors += cosines.numel()

    def predict(self, found: torch.Tensor, wanted: torch.Tensor, ids: torch.Tensor) -> None:
        """Count what logits ``[1, length, vocabulary]`` say of the tokens ``[1, length]`` that follow."""
        losses = [
            torch.nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:], reduction="sum")
            for logits in (wanted, found)
        ]
        self.before, self.after = self.before + float(losses[0]), self.after + float(losses[1])
        self.tokens += ids.shape[1] - 1
        self.agreed += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        self.positions += wanted.shape[0] * wanted.shape[1]


    @property
    def change(self) -> float:
        """Norm of the difference over norm of the original; not finite where the result is not."""
        change = math.sqrt(self.apart / self.size) if self.size else self.apart
        return math.inf if math.isnan(change) else change


Form = tuple[Literal["prompts", "continuations", "steps"], bool]
"""How a call goes through a model, and whether it is padded: operators have kernels, and models branches, for each."""

PLAIN: Form = ("prompts", False)
"""Of calls that are one whole text, and of those of a model without a cache."""


def form_of(call: Call) -> Form:
    """Steps are of one token behind a cache, continuations of several."""
    masks = (call.kwargs.get(name) for name in ("attention_mask", "encoder_attention_mask"))
    padded = any(isinstance(mask, torch.Tensor) and mask.dim() == 2 and not mask.all() for mask in masks)
    ids = call.kwargs.get("input_ids")
    if not cached_positions(call) or not isinstance(ids, torch.Tensor):
        return "prompts", padded
    return ("steps" if ids.shape[1] == 1 else "continuations"), padded


def cached_positions(call: Call) -> int:
    """How many positions are cached before a call of a language model; 0 for other calls."""
    ids, past, mask = (call.kwargs.get(name) for name in ("input_ids", "past_key_values", "attention_mask"))
    if not isinstance(past, Sequence) or not past or not isinstance(past[0], Mapping):
        return 0
    if "decoder" in past[0]:
        return int(past[0]["decoder"]["key"].shape[2])
    if not isinstance(ids, torch.Tensor) or not isinstance(mask, torch.Tensor):
        return 0
    return mask.shape[1] - ids.shape[1]


def kept_and_new(call: Call, cached: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a call found in the cache and what it wrote there, without padding and without room behind both.

    Args:
        call: what was run; cached: ``[B, G, P + N, D]``, in a buffer ``[B, G, C, D]`` with ``C ≥ P + N``.
    """
    if cached.dim() != 4:  # no cache of attention, whatever its name says
        return cached[:0], cached
    past, mask = cached_positions(call), call.kwargs.get("attention_mask")
    inside = cached.transpose(1, 2)
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.shape[1] > inside.shape[1]:
        return inside[:, :past], inside[:, past:]
    seen, inside = mask.bool(), inside[:, : mask.shape[1]]
    return inside[:, :past][seen[:, :past]], inside[:, past:][seen[:, past:]]


@dataclass
class Group:
    """Calls of one form; each form is judged by itself, for a few steps would drown among prompts.

    Attributes:
        outputs: sums by output.
        cache: sums by tensor of the cache, of what the calls found there and of what they wrote.
        calls: what was run.
    """

    outputs: dict[str, Counted] = field(default_factory=dict)
    cache: dict[tuple[str, str], Counted] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)

    @property
    def inputs(self) -> str:
        """What was read, in words."""
        ids = [call.kwargs.get("input_ids") for call in self.calls]
        if self.calls and all(call.what.endswith("tokens of text") for call in self.calls):
            return f"{sum(one.shape[1] for one in ids if isinstance(one, torch.Tensor))} tokens of text"
        return "; ".join(dict.fromkeys(call.what for call in self.calls))

    def changes(self) -> dict[str, float]:
        """The relative change of each output, and of the tensor of the cache that changes most."""
        found = {name: one.change for name, one in self.outputs.items()}
        return found | ({CACHED: max(one.change for one in self.cache.values())} if self.cache else {})

    def spent(self) -> dict[str, float]:
        """The same in parts of what each may change where the budget is 1."""
        return {name: change / allowance(name) for name, change in self.changes().items()}


CACHED = "the cache"

STATES = 3.0
"""How many times the budget the tensor of the cache that changes most may change: it is a state of one layer, and
results average over many. With weights of 4 bits SmolLM2's worst tensor changes by 0.45 where its logits change by 0.2;
one that is written in the wrong place or scale changes by 1 and more."""


def allowance(output: str) -> float:
    """How many times the budget an output may change."""
    return STATES if output == CACHED else 1.0


@dataclass
class Quality:
    """Originals and results, call by call."""

    groups: dict[Form, Group] = field(default_factory=dict)

    def add(self, call: Call, before: Outputs, after: Outputs) -> None:
        """Count one call; outputs that the result does not have are left out."""
        form = form_of(call)
        group = self.groups.setdefault(form, Group())
        group.calls.append(call)
        for name, reference in before.items():
            if name not in after:
                continue
            if name.startswith(PRESENT):
                pairs = zip(kept_and_new(call, after[name]), kept_and_new(call, reference), strict=True)
                for part, pair in zip(("kept", "new"), pairs, strict=True):
                    group.cache.setdefault((name, part), Counted()).add(*pair)
                continue
            found = group.outputs.setdefault(name, Counted())
            found.add(call.judged(name, after[name]), call.judged(name, reference))
            ids = call.kwargs.get("input_ids")
            if form == PLAIN and name == "logits" and isinstance(ids, torch.Tensor) and _are_over(reference, ids):
                found.predict(after[name], reference, ids)

    @property
    def inputs(self) -> str:
        """What was read in the calls that changed most, in words."""
        worst = max(self.groups.values(), key=lambda group: max(group.spent().values(), default=0.0), default=Group())
        return worst.inputs

    def worst(self) -> float:
        """The largest relative change of an output in a form of calls, of the cache a third; not finite where a result
        is not.
        """
        return max((change for group in self.groups.values() for change in group.spent().values()), default=0.0)

    def entries(self, budget: float | None) -> Iterator[EndToEnd]:
        """For the certificate: changes are judged by the budget, all else is reported."""
        for group in self.groups.values():
            for name, change in group.changes().items():
                allowed = None if budget is None else budget * allowance(name)
                yield measured(CHANGE.format(name), None, change, group.inputs, allowed)
            for name, one in group.outputs.items():
                yield measured(f"largest change of {name}", None, one.most, group.inputs, None)
                if one.vectors:
                    cosine = one.cosines / one.vectors
                    yield measured(f"mean cosine similarity of {name}", None, cosine, group.inputs, None)
                if one.tokens:
                    before, after = (math.exp(min(700.0, loss / one.tokens)) for loss in (one.before, one.after))
                    yield measured("perplexity", before, after, group.inputs, None)
                    agreed = one.agreed / one.positions
                    yield measured("share of positions with the same next token", None, agreed, group.inputs, None)


def over_budget(entries: Sequence[EndToEnd]) -> str | None:
    """The first change beyond its budget, in words."""
    for entry in entries:
        if is_change(entry) and not entry.passed:
            return f"the {entry.metric} is {entry.after:.3g} on {entry.inputs}, over the budget of {entry.tolerance:g}"
    return None


def is_change(entry: EndToEnd) -> bool:
    """Whether an entry is one that a budget is for."""
    return entry.metric.startswith(CHANGE.format(""))


def _are_over(logits: torch.Tensor, ids: torch.Tensor) -> bool:
    """Whether logits are those of one row of tokens, each over a vocabulary."""
    return (
        logits.dim() == 3
        and len(ids) == len(logits) == 1
        and logits.shape[1] == ids.shape[1] > 1
        and logits.shape[2] > int(ids.max())
    )


__all__ = ["CHANGE", "Quality", "cached_positions", "form_of", "is_change", "kept_and_new", "over_budget"]
