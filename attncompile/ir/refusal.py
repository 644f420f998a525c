"""A refusal: why something was not done, as a value that every report can show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Why a site was not lifted, a pass not applied, or a target not chosen.

    Attributes:
        kind: short machine-readable class, such as ``"uninterpreted-node"``.
        reason: what was asked and what was found, in one sentence.
        node: name of the graph node at fault, or empty.
        source: source line of that node, or empty.
        hint: what would help, or empty.
    """

    kind: str
    reason: str
    node: str = ""
    source: str = ""
    hint: str = ""

    def __str__(self) -> str:
        where = f" (at {self.node}{', ' + self.source if self.source else ''})" if self.node else ""
        return f"{self.reason}{where}" + (f"; {self.hint}" if self.hint else "")


class RefusalError(ValueError):
    """A refusal that ends the work in hand."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal
