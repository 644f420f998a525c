"""What a lossy result does to the outputs of a model: counted over calls, told as a few numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

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
        """Count one output of one call, padding left out."""
        found, wanted = found.double(), wanted.double()
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


@dataclass
class Quality:
    """Originals and results, call by call."""

    counted: dict[str, Counted] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)

    def add(self, call: Call, before: Outputs, after: Outputs) -> None:
        """Count one call; outputs that the result does not have, and the cache, are left out."""
        self.calls.append(call)
        for name, reference in before.items():
            if name not in after or name.startswith(PRESENT):
                continue
            found = self.counted.setdefault(name, Counted())
            found.add(call.judged(name, after[name]), call.judged(name, reference))
            ids = call.kwargs.get("input_ids")
            if name == "logits" and isinstance(ids, torch.Tensor) and _are_over(reference, ids):
                found.predict(after[name], reference, ids)

    @property
    def inputs(self) -> str:
        """What was read, in words."""
        ids = [call.kwargs.get("input_ids") for call in self.calls]
        if self.calls and all(call.what.endswith("tokens of text") for call in self.calls):
            return f"{sum(one.shape[1] for one in ids if isinstance(one, torch.Tensor))} tokens of text"
        return "; ".join(call.what for call in self.calls)

    def worst(self) -> float:
        """The largest relative change of an output; not finite where a result is not."""
        changes = [math.sqrt(one.apart / one.size) if one.size else one.apart for one in self.counted.values()]
        return max((math.inf if math.isnan(change) else change for change in changes), default=0.0)

    def entries(self, budget: float | None) -> Iterator[EndToEnd]:
        """For the certificate: changes are judged by the budget, all else is reported."""
        for name, one in self.counted.items():
            change = math.sqrt(one.apart / one.size) if one.size else one.apart
            yield measured(CHANGE.format(name), None, change, self.inputs, budget)
            yield measured(f"largest change of {name}", None, one.most, self.inputs, None)
            if one.vectors:
                cosine = one.cosines / one.vectors
                yield measured(f"mean cosine similarity of {name}", None, cosine, self.inputs, None)
            if one.tokens:
                before, after = (math.exp(min(700.0, loss / one.tokens)) for loss in (one.before, one.after))
                yield measured("perplexity", before, after, self.inputs, None)
                agreed = one.agreed / one.positions
                yield measured("share of positions with the same next token", None, agreed, self.inputs, None)


def over_budget(entries: Sequence[EndToEnd]) -> str | None:
    """The first change beyond its budget, in words."""
    start = CHANGE.format("")
    for entry in entries:
        if entry.metric.startswith(start) and not entry.passed:
            return f"the {entry.metric} is {entry.after:.3g} on {entry.inputs}, over the budget of {entry.tolerance:g}"
    return None


def _are_over(logits: torch.Tensor, ids: torch.Tensor) -> bool:
    """Whether logits are those of one row of tokens, each over a vocabulary."""
    return (
        logits.dim() == 3
        and len(ids) == len(logits) == 1
        and logits.shape[1] == ids.shape[1] > 1
        and logits.shape[2] > int(ids.max())
    )


__all__ = ["CHANGE", "Quality", "over_budget"]
