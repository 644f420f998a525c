"""A step of the block around a site: one recognised operation, as facts and as a line of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """One operation around a site.

    Attributes:
        operand: ``q``, ``k``, ``v``, or ``out`` for what follows the site.
        kind: a key of :data:`STEPS`.
        node: the native value that it makes, or what a person calls it.
        facts: what was read off the graph, by kind.
        part: the channels it makes, where an operand is joined of several parts; empty for all.
    """

    operand: str
    kind: str
    node: str
    facts: Facts = field(default_factory=dict, hash=False)
    part: str = ""

    def __str__(self) -> str:
        return STEPS[self.kind](self.facts)


def _linear(facts: Facts) -> str:
    packed = f", packed: reads outputs {facts['reads']}" if facts.get("form") == "packed" else ""
    bias = f" + {facts['bias']}" if facts.get("bias") else ""
    return f"linear {facts['kernel']}{bias} [{facts['inputs']} → {facts['outputs']}]{packed}"


_NORMS = {"rms": "RMSNorm", "layer": "LayerNorm", "l2": "L2 norm"}


def _norm(facts: Facts) -> str:
    over = f" of each {facts['over']}" if facts.get("over") else ""
    epsilon = f", ε {facts['epsilon']:g}" if facts["epsilon"] else ""
    weights = f", {', '.join(facts['weights'])}" if facts["weights"] else ""
    return f"{_NORMS[facts['form']]} over the {facts['channels']} channels{over}{epsilon}{weights}"


def _rotary(facts: Facts) -> str:
    base = f", base {facts['base']:g}" if facts.get("base") else ""
    scaling = facts.get("scaling", "none")
    known = f", {scaling} scaling by {facts['factor']:.4g}" if scaling in ("linear", "yarn", "llama3") else ""
    each = ", scaled by a factor for each channel" if scaling == "each channel" else ""
    attention = facts.get("attention_factor", 1.0)
    size = f", attention factor {attention:.4g}" if attention != 1.0 else ""
    of = f" of {facts['of']}" if facts["of"] != facts["channels"] else ""
    return f"rotary, {facts['channels']}{of} channels, {facts['convention']}{base}{known}{each}{size}"


def _cache(facts: Facts) -> str:
    if facts["form"] == "concatenated":
        return f"cache: behind the positions of {facts['past']}"
    return f"cache: written into {facts['past']}"


def _gate(facts: Facts) -> str:
    bias = f" + {facts['bias']}" if facts.get("bias") else ""
    return f"gate: times {facts['function']}" + (f" of linear {facts['kernel']}{bias}" if "kernel" in facts else "")


STEPS: dict[str, Callable[[Facts], str]] = {
    "linear": _linear,
    "norm": _norm,
    "rotary": _rotary,
    "cache": _cache,
    "gate": _gate,
    "scale": lambda facts: f"{'divided by' if facts['operator'] == 'div' else 'times'} {facts['by']}",
    "bias": lambda facts: f"plus {facts['by']}",
}
"""Every kind of step and how it reads."""

_TITLES = {"q": "queries", "k": "keys", "v": "values", "out": "output"}


def drawn(steps: tuple[Step, ...]) -> list[str]:
    """Steps as lines, one an operation, in the order of data flow: from the model's state to the operands, through
    the attention, to the output.
    """
    lines: list[str] = []
    for operand, title in _TITLES.items():
        own = [step for step in steps if step.operand == operand]
        if operand == "out":
            lines.append("attend(q, k, v)")
        for number, step in enumerate(own):
            last = number == len(own) - 1
            branch = ("─" if last else "┬") if number == 0 else ("└" if last else "├")
            part = f"{step.part}: " if step.part else ""
            lines.append(f"{title if number == 0 else '':<8}{branch} {part}{step}")
    return lines


def as_data(steps: tuple[Step, ...]) -> list[dict[str, Any]]:
    """Steps as plain data, for JSON."""
    return [
        {"operand": step.operand, "kind": step.kind, "node": step.node}
        | ({"part": step.part} if step.part else {})
        | dict(step.facts)
        | {"text": str(step)}
        for step in steps
    ]
