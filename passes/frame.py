"""What a pass is, and what running passes gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from attncompile.ir import Expr, Spec
from attncompile.ir.prologue import Prologue, leading_positions, reading, without_positions
from attncompile.ir.sample import example_sizes, random_tensors
from attncompile.ir.some_rows import of_rows, rows_that_fit, some_rows

Contract = Literal["exact", "bounded", "calibrated"]
Phase = Literal["prefill", "decode", "training"]


COMPARED = 10**8
"""Elements of an attention map up to which a Spec is evaluated."""


class Options(BaseModel):
    """Base of a pass' options. Every field has a description; a value of another type or out of range is
    refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


@dataclass(frozen=True)
class Pass:
    """A rewrite of one Spec.

    Attributes:
        name: how it is called, such as ``sparsify.window``.
        summary: what it does, in one sentence.
        contract: ``exact`` (the same function up to rounding), ``bounded`` (a proven bound on the error) or
            ``calibrated`` (the error is measured).
        phases: where the result may be used.
        options: its options, a subclass of :class:`Options`.
        why_not: why it does not apply to a Spec, in one sentence, or ``None`` where it does.
        apply: the rewritten Spec, with the same inputs and outputs; called only where ``why_not`` gives
            ``None``.
        untrained: for a pass whose result has to be trained: what it does to a model that was not. It then
            runs only when that is asked for.
        law: for an ``exact`` pass that proves each application by itself: what it looks at. Of a map with more
            than :data:`COMPARED` elements at fixed sizes others are compared on some rows, and refused where a Spec
            has no such form.
        unrounds: whether it is about what the model rounds inside the attention: ``why_not`` and ``apply`` are then
            given that too, in words.
    """

    name: str
    summary: str
    contract: Contract
    phases: tuple[Phase, ...]
    options: type[Options]
    why_not: Callable[..., str | None]
    apply: Callable[..., Spec]
    untrained: str = ""
    law: str = ""
    pulls: bool = False
    unrounds: bool = False


@dataclass(frozen=True)
class PassCall:
    """A pass with its options; prints as :func:`attncompile.passes.parse_passes` reads it."""

    rewrite: Pass
    options: Options

    def __str__(self) -> str:
        given = self.options.model_dump(exclude_defaults=True)
        arguments = ", ".join(f"{name}={_text(value)}" for name, value in given.items())
        return f"{self.rewrite.name}({arguments})" if arguments else self.rewrite.name


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


@dataclass(frozen=True)
class Stamp:
    """That a pass was applied.

    Attributes:
        call: the pass with its options, as text.
        contract: what the pass promises.
        before, after: fingerprints of the Spec.
        pulled: whether the Spec reads other inputs since.
    """

    call: str
    contract: Contract
    before: str
    after: str
    pulled: bool = False


@dataclass(frozen=True)
class PassResult:
    """What running passes over one Spec gave.

    Attributes:
        spec: the Spec after all passes that apply.
        stamps: the passes that were applied, in order.
        refused: the others, each with its reason.
    """

    spec: Spec
    stamps: tuple[Stamp, ...]
    refused: tuple[tuple[str, str], ...]

    @property
    def applied(self) -> tuple[str, ...]:
        """The calls that were applied, as text."""
        return tuple(stamp.call for stamp in self.stamps)

    @property
    def pulled(self) -> bool:
        """Whether some pass stated in the Spec what made its inputs: it reads others since."""
        return any(stamp.pulled for stamp in self.stamps)

    @property
    def lossy(self) -> bool:
        """Whether some pass may have changed the function."""
        return any(stamp.contract != "exact" for stamp in self.stamps)


def run_passes(
    spec: Spec,
    calls: tuple[PassCall, ...],
    allow_untrained: bool = False,
    prologue: Prologue | None = None,
    *,
    training: bool = False,
    rounded: str = "",
) -> PassResult:
    """Apply passes in order, each only where it can be.

    After each one the Spec is verified, its inputs and outputs are compared with those before, and an
    ``exact`` pass is evaluated in float64 against the Spec before, or looked at by its own law. Of a pass that pulls
    what makes inputs into the Spec, the rest has to be the Spec before.

    Args:
        spec: the Spec to rewrite.
        calls: from :func:`attncompile.passes.parse_passes`.
        allow_untrained: also run passes whose result needs training.
        prologue: what makes the inputs, for passes that pull it into the Spec.
        training: whether gradients may be asked of the result: only passes that serve training run then.
        rounded: what the model rounds inside the attention and the Spec does not, in words; empty for nothing.

    Raises:
        ValueError: when a pass breaks its own contract; the message is for the pass' author.
    """
    stamps: list[Stamp] = []
    refused: list[tuple[str, str]] = []
    for call in calls:
        pulled, unrounded = (prologue,) if call.rewrite.pulls else (), (rounded,) if call.rewrite.unrounds else ()
        given = (spec, call.options, *pulled, *unrounded)
        reason = call.rewrite.why_not(*given)
        if reason is None and call.rewrite.untrained and not allow_untrained:
            reason = f"{call.rewrite.untrained}; it runs only when untrained results are allowed"
        if reason is None and training and "training" not in call.rewrite.phases:
            served = " and ".join(call.rewrite.phases)
            reason = f"it serves {served}, and gradients may be asked of this graph; call it under torch.no_grad()"
        after = call.rewrite.apply(*given) if reason is None else spec
        if reason is None and call.rewrite.contract == "exact" and not call.rewrite.law:
            reason = _why_not_compared(spec, after)
        if reason is not None:
            refused.append((str(call), reason))
            continue
        check_contract(call, spec, after)
        stamp = Stamp(str(call), call.rewrite.contract, spec.fingerprint(), after.fingerprint(), call.rewrite.pulls)
        stamps.append(stamp)
        spec = after
    return PassResult(spec, tuple(stamps), tuple(refused))


def check_contract(call: PassCall, before: Spec, after: Spec) -> None:
    """Check what a pass made of a Spec.

    Raises:
        ValueError: when the result does not verify, has other inputs or outputs, or an ``exact`` pass
            computes something else (compared in float64 at small sizes, or on some rows of a map whose fixed
            sizes are large, with torch's own tolerance for that dtype).
    """

    def broken(what: str) -> ValueError:
        return ValueError(f"pass developer: {call} {what}\nbefore:\n{before}\nafter:\n{after}")

    try:
        types = after.types()
    except ValueError as error:
        raise broken(f"made a Spec that does not verify: {error}") from None
    inside = _without_pulled(after) if call.rewrite.pulls else after
    if _named_sizes(inside) != _named_sizes(before) or after.outputs != before.outputs:
        raise broken("changed the inputs or outputs of the Spec")
    if call.rewrite.pulls:
        if inside.operations != before.operations:
            raise broken("changed more of the Spec than what makes its inputs")
    elif after.inputs != before.inputs:
        raise broken("changed the order of the Spec's inputs")
    known = before.types()
    for name in before.outputs:
        # what was cast between a rotary map and an operand is read before the cast
        retyped = types[name].dtype != known[name].dtype and not call.rewrite.pulls
        if types[name].sizes != known[name].sizes or retyped:
            raise broken(f"changed the output {name} from {known[name]} to {types[name]}")
    if call.rewrite.contract == "exact" and not call.rewrite.pulls and after.operations != before.operations:
        compared = _compared(before, after)
        if compared is None:
            return  # the pass has a law of its own, or would not have been applied
        specs, tensors = compared
        expected, found = (spec.interpret(tensors) for spec in specs)
        for name, old, new in zip(before.outputs, expected, found, strict=True):
            try:
                torch.testing.assert_close(new, old, equal_nan=True)
            except AssertionError as error:
                raise broken(f"is declared exact, but the output {name} differs: {error}") from None


def _named_sizes(spec: Spec) -> dict[str, tuple[Expr, ...]]:
    return {value.name: value.type.sizes for value in spec.inputs}


def _without_pulled(spec: Spec) -> Spec:
    """The Spec without its leading rotary maps, under the names that its inputs had before."""
    named = {step.out: step.tensor for step in leading_positions(spec)}
    inside = without_positions(spec)
    inputs = tuple(dataclasses.replace(value, name=named.get(value.name, value.name)) for value in inside.inputs)
    operations = tuple(reading(operation, named) for operation in inside.operations)
    return dataclasses.replace(inside, inputs=inputs, operations=operations)


def _why_not_compared(before: Spec, after: Spec) -> str | None:
    """Why two Specs cannot be evaluated to compare them, not even some of their rows, or ``None``."""
    if before.operations == after.operations or _compared(before, after) is not None:
        return None
    return (
        f"its attention map has more than {COMPARED:.0e} elements at its fixed sizes, too many to compare the result "
        "with the Spec before"
    )


def _compared(before: Spec, after: Spec) -> tuple[tuple[Spec, Spec], dict[str, torch.Tensor]] | None:
    """The Specs to evaluate, or the same for some queries, and random inputs; ``None`` where neither can be."""
    sizes = example_sizes(before)
    count = rows_that_fit(before, sizes, COMPARED)
    again = some_rows(after, count) if count else after
    if count == 0 or again is None:
        return None
    tensors = random_tensors(before, sizes, seed=0, dtype=torch.float64)
    if count is None:
        return (before, after), tensors
    fewer, tensors, _ = of_rows(before, tensors, count)
    return (fewer, again), tensors


def described(rewrite: Pass) -> tuple[tuple[str, str, str], ...]:
    """The options of a pass for people: name, default and description."""
    return tuple(
        (name, "required" if field.is_required() else _text(field.default), field.description or "")
        for name, field in rewrite.options.model_fields.items()
    )


def with_operation(spec: Spec, old: Any, *new: Any) -> Spec:
    """The Spec with one operation replaced by others."""
    place = spec.operations.index(old)
    operations = (*spec.operations[:place], *new, *spec.operations[place + 1:])
    return dataclasses.replace(spec, operations=operations)
