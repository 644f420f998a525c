"""From a Spec to a callable: which PyTorch operator computes it exactly, and why that one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attncompile.codegen.lowering import Lowering
from attncompile.codegen.pytorch.flex import FlexForm, attend_flex, flex_form, flex_source
from attncompile.codegen.pytorch.form import AdditiveForm, additive_form
from attncompile.codegen.pytorch.grid import Map, View, as_view, read_sizes
from attncompile.codegen.pytorch.scan import scan_chunkwise
from attncompile.codegen.pytorch.sdpa import (
    WORTH_SKIPPING,
    additive_mask,
    at_sizes,
    attend_blockwise,
    attend_whole,
    blockwise_pays,
    computed_bias,
    skips_blocks,
    visited_share,
)
from attncompile.codegen.pytorch.tracing import being_traced
from attncompile.ir import Attend, Operation, Refusal, RefusalError, Scan, Spec
from attncompile.ir.expr import TRUE, Const, Size, loads, substitute, walk
from attncompile.ir.rows import extents
from attncompile.ir.types import TensorType
from attncompile.kernels import operators

OPERATORS = ("sdpa", "blockwise", "flex", "scan", "reference")
"""What :func:`lower` can be asked for."""

Types = Mapping[str, TensorType]
Tensors = dict[str, torch.Tensor]
Sizes = dict[str, Any]
Step = Callable[[Tensors, Sizes, torch.Tensor | None], Tensors]

_STEPWISE = "the steps of the scan differ (a gate, a rate or a state), so they are computed one after the other"

# Length at which a mask is asked whether it leaves out enough: long enough that the answer does not change
# beyond.
LONG = 32768


@dataclass(frozen=True)
class MaskKey:
    """What an additive mask depends on: sites with equal keys, fed with the same tensors, may share one.

    Attributes:
        text: the printed mask, bias, fill and sizes.
        captured: names of the captured tensors it reads.
    """

    text: str
    captured: tuple[str, ...]


def why_not(spec: Spec, device: str = "cpu", operator: str | None = None) -> str | None:
    """Why an operator does not compute this Spec, in one sentence, or ``None`` where it does.

    Args:
        spec: the Spec.
        device: device type, such as ``cpu`` or ``cuda``.
        operator: one of :data:`OPERATORS`; any of them when ``None``, which always works: there is the
            reference.

    Raises:
        ValueError: for an unknown operator.
    """
    if operator is not None and operator not in OPERATORS:
        raise ValueError(f"unknown operator {operator!r}; choose one of {', '.join(OPERATORS)}")
    types = spec.types()
    if operator in (None, "reference"):
        return None
    if operator == "scan":
        scan = spec.scan()
        return "there is no scan in it" if scan is None else None if scan.fixed else _STEPWISE
    attend = spec.attend()
    if attend is None:
        return "it has not exactly one attention operation"
    if operator == "flex":
        flexible = flex_form(attend, types)
        return str(flexible) if isinstance(flexible, Refusal) else None
    form = additive_form(attend, types)
    if isinstance(form, Refusal):
        return str(form)
    if operator == "blockwise" and form.mask == TRUE:
        return "nothing is masked, so no block can be left out"
    if operator == "blockwise" and not skips_blocks(form):
        return f"a row without a visible key reads all keys with the fill {attend.fill}"
    return None


def lower(spec: Spec, device: str = "cpu", operator: str | None = None) -> Lowering:
    """A Spec as a PyTorch callable with the same meaning.

    ``run`` takes the tensors in the order of ``spec.inputs``, is differentiable and traces with symbolic
    sizes. ``blockwise`` leaves out the tiles its mask hides. While a graph is being traced it is one operator
    of the graph, ``attncompile::run``, that does so when it runs, if the mask hides most of a long map and no
    gradient is asked for; otherwise it is one masked call. ``flex`` then gives way to SDPA or the reference.
    With ``sdpa`` and ``blockwise``, ``run`` also takes ``mask=``, a tensor from :func:`visible_mask`, and uses
    it where it would otherwise build one.

    Args:
        spec: the Spec.
        device: device type it will run on.
        operator: one of :data:`OPERATORS`; the fastest that is exact when ``None``.

    Raises:
        RefusalError: when the operator asked for does not compute the Spec.
    """
    plain = _lowered(spec, device, operator)
    if plain.operator == "blockwise" and device == "cpu" and _worth_carrying(spec):
        return dataclasses.replace(plain, run=functools.partial(_run_carried, operators.bind(spec), plain.run))
    return plain


def lower_to_aten(spec: Spec, device: str = "cpu") -> Lowering:
    """A Spec as operators that every PyTorch has: for a graph that is to run where this package is not installed.

    Tiles that a mask hides are computed: what skips them is an operator of ours. ``flex`` gives way to SDPA or the
    reference.

    Args:
        spec: the Spec.
        device: device type it will run on.
    """
    chosen, reason = _choose(spec, device)
    if chosen in ("blockwise", "flex"):
        why = "a package holds PyTorch's own operators alone"
        problem = why_not(spec, device, "sdpa")
        chosen, reason = ("sdpa", f"one masked call: {why}") if problem is None else ("reference", f"{why}; {problem}")
    return dataclasses.replace(_lowered(spec, device, chosen), reason=reason)


def _lowered(spec: Spec, device: str, operator: str | None) -> Lowering:
    """The lowering that computes a Spec by itself, never through ``attncompile::run``."""
    if operator is not None:
        problem = why_not(spec, device, operator)
        if problem is not None:
            raise RefusalError(Refusal("operator", f"{operator} cannot compute {spec.name}: {problem}"))
        chosen, reason = operator, "it was asked for"
    else:
        chosen, reason = _choose(spec, device)
    types = spec.types()
    steps: list[Step] = []
    source: str | None = None
    for operation in spec.operations:
        if isinstance(operation, Scan) and chosen != "reference":
            steps.append(functools.partial(_scan, operation))
        elif isinstance(operation, Attend) and chosen == "flex":
            flexible = _expect(flex_form(operation, types))
            source = flex_source(flexible)
            views, whole = _views(operation, types), additive_form(operation, types)
            traced: Step = functools.partial(_reference, operation)
            if isinstance(whole, AdditiveForm):
                traced = functools.partial(_sdpa, operation, whole, views, False)
            steps.append(functools.partial(_flex, operation, flexible, views, source, traced))
        elif isinstance(operation, Attend) and chosen in ("sdpa", "blockwise"):
            form, views = _expect(additive_form(operation, types)), _views(operation, types)
            steps.append(functools.partial(_sdpa, operation, form, views, chosen == "blockwise"))
        else:
            steps.append(functools.partial(_reference, operation))
    run: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]] = functools.partial(
        _run, spec, tuple(steps), chosen in ("sdpa", "blockwise")
    )
    return Lowering("pytorch", chosen, reason, source, run)


def _choose(spec: Spec, device: str) -> tuple[str, str]:
    """The operator and the reason for it."""
    scan = spec.scan()
    if scan is not None and spec.attend() is None:
        if not scan.fixed:
            return "reference", _STEPWISE
        return "scan", "a scan in chunks does linear work in the length"
    problem = why_not(spec, device, "sdpa") or _slow_mask(spec, device)
    attend = spec.attend()
    if problem is None and attend is not None:
        form = _expect(additive_form(attend, spec.types()))
        heads = _how_heads(form, device)
        if _leaves_out(form):
            return "blockwise", (f"SDPA on blocks of queries and the keys they may see ({form.mask}), in one "
                                 f"masked call where inputs are short or a graph is traced{heads}")
        how = "nothing is masked" if form.mask == TRUE else (
            f"the mask {form.mask} is SDPA's own where queries and keys are equally many" if form.causal else
            f"the mask {form.mask} is added to the scores")
        return "sdpa", f"the score is linear in s; {how}{heads}"
    if device.startswith("cuda") and why_not(spec, device, "flex") is None:
        return "flex", f"{problem}; FlexAttention takes it"
    return "reference", problem or "PyTorch has no operator for it"


def _slow_mask(spec: Spec, device: str) -> str | None:
    """Why FlexAttention is better than SDPA where both are exact."""
    attend = spec.attend()
    form = additive_form(attend, spec.types()) if attend is not None else None
    if isinstance(form, AdditiveForm) and computed_bias(form) and device != "cpu" and why_not(
            spec, device, "flex") is None:
        return "a bias computed from positions needs float32, for which SDPA would leave 16-bit arithmetic"
    return None


def _how_heads(form: AdditiveForm, device: str) -> str:
    if form.shared_heads != "grouped":
        return ""
    if device == "cpu":
        return "; key heads are shared, not repeated"
    return "; key heads are shared where no mask has to be built, else repeated"


def _leaves_out(form: AdditiveForm) -> bool:
    """Whether a long map leaves out enough tiles, and SDPA would not leave them out itself."""
    if form.mask == TRUE or form.causal or not skips_blocks(form):
        return False
    values: dict[Any, Any] = {size: Const(LONG) for size in (form.query_length, form.key_length)
                              if isinstance(size, Size)}
    return visited_share(substitute(form.mask_if_same_length, values), LONG, LONG) <= 1 - WORTH_SKIPPING


def _expect(found: Any) -> Any:
    """The form itself.

    Raises:
        RefusalError: when it is a refusal.
    """
    if isinstance(found, Refusal):
        raise RefusalError(found)
    return found


def _run(spec: Spec, steps: tuple[Step, ...], takes_mask: bool, *tensors: torch.Tensor,
         mask: torch.Tensor | None = None) -> torch.Tensor | tuple[torch.Tensor, ...]:
    if len(tensors) != len(spec.inputs):
        names = ", ".join(value.name for value in spec.inputs)
        raise ValueError(f"{spec.name} takes {len(spec.inputs)} tensors ({names}), got {len(tensors)}")
    if mask is not None and not takes_mask:
        raise ValueError(f"{spec.name} is not computed by SDPA, so no mask can be handed in")
    known = {value.name: tensor for value, tensor in zip(spec.inputs, tensors, strict=True)}
    sizes = read_sizes(spec, known)
    for step in steps:
        known.update(step(known, sizes, mask))
    outputs = tuple(known[name] for name in spec.outputs)
    return outputs[0] if len(outputs) == 1 else outputs


LONG = 8192
"""Queries and keys of the map by which a graph with unknown lengths is judged."""

MOST = 0.75
"""Share of such a map that must be hidden for an operator that a compiler cannot look into; causality hides half."""


def _worth_carrying(spec: Spec) -> bool:
    """Whether a traced graph is better off with one operator that skips blocks than with a masked call."""
    attend = spec.attend()
    if attend is None or len(spec.operations) != 1:
        return False
    form = _expect(additive_form(attend, spec.types()))
    sizes = {node.name: LONG for node in walk(form.mask) if isinstance(node, Size)}
    return visited_share(at_sizes(form.mask, tuple(sizes.items())), LONG, LONG) <= 1 - MOST


def _run_carried(carried: operators.Bound, plain: Callable[..., Any], *tensors: torch.Tensor,
                 mask: torch.Tensor | None = None) -> Any:
    """The operator while a graph is traced without gradients, else the plain call."""
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if being_traced(tensors[0]) and not differentiated and len(tensors) == len(carried.order):
        return carried(*tensors)
    return plain(*tensors, mask=mask)


def _implementation(text: str) -> operators.Implementation:
    """What computes a Spec on the CPU behind ``attncompile::run``: its lowering, called with plain tensors."""
    return _lowered(operators.parsed(text), "cpu", None).run


operators.register("cpu", _implementation)


def _dtype(operation: Operation, tensors: Tensors) -> torch.dtype:
    """The float dtype of an operation's first operand, which its results get."""
    return next(tensors[name].dtype for name in operation.operands())


def _reference(operation: Operation, tensors: Tensors, sizes: Sizes, mask: torch.Tensor | None) -> Tensors:
    dtype = _dtype(operation, tensors)
    made = operation.reference(tensors, sizes, torch.promote_types(dtype, torch.float32))
    wide = (operation.lse, *operation.taps) if isinstance(operation, Attend) else ()
    return {name: tensor if name in wide else tensor.to(dtype) for name, tensor in made.items()}


def _scan(operation: Scan, tensors: Tensors, sizes: Sizes, mask: torch.Tensor | None) -> Tensors:
    dtype = _dtype(operation, tensors)
    wide = torch.promote_types(dtype, torch.float32)
    return {operation.out: scan_chunkwise(operation, tensors, sizes, wide).to(dtype)}


def _map(operation: Attend, views: tuple[View, ...], tensors: Tensors, sizes: Sizes) -> Map:
    query, key = tensors[operation.query], tensors[operation.key]
    lengths = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return Map(tensors, sizes, lengths, views, query.device)


def _views(operation: Attend, types: Types) -> tuple[View, ...]:
    sizes = extents(operation, types)
    found = (as_view(load, types[load.tensor], sizes) for load in operation.captured())
    return tuple(view for view in found if view is not None)


def _sdpa(operation: Attend, form: AdditiveForm, views: tuple[View, ...], blockwise: bool, tensors: Tensors,
          sizes: Sizes, mask: torch.Tensor | None) -> Tensors:
    where = _map(operation, views, tensors, sizes)
    if blockwise and not being_traced(tensors[operation.query]) and blockwise_pays(form, where):
        return {operation.out: attend_blockwise(operation, form, where)}
    return {operation.out: attend_whole(operation, form, where, mask)}


def _flex(operation: Attend, form: FlexForm, views: tuple[View, ...], source: str, traced: Step,
          tensors: Tensors, sizes: Sizes, mask: torch.Tensor | None) -> Tensors:
    if being_traced(tensors[operation.query]):
        return traced(tensors, sizes, mask)
    return attend_flex(operation, form, _map(operation, views, tensors, sizes), source)


def mask_inputs(spec: Spec) -> MaskKey | None:
    """What the additive mask of a site depends on, or ``None`` where SDPA needs none or does not compute the
    site.
    """
    attend = spec.attend()
    if attend is None:
        return None
    types = spec.types()
    form = additive_form(attend, types)
    if isinstance(form, Refusal) or (form.mask == TRUE and form.bias is None):
        return None
    parts = (form.mask, form.bias or TRUE, form.masked, form.query_length, form.key_length)
    captured = {load.tensor for part in parts for load in loads(part)}
    return MaskKey("; ".join(str(part) for part in parts), tuple(sorted(captured)))


def visible_mask(spec: Spec, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The additive mask that SDPA gets for these tensors, to be built once and handed to sites of one
    :func:`mask_inputs` key as ``run(..., mask=...)``.

    Args:
        spec: a Spec that ``sdpa`` or ``blockwise`` computes, whose attention reads Spec inputs or tensors of
            their shape.
        tensors: its inputs by name.

    Returns:
        A float tensor that broadcasts to ``[b,h,i,j]``, with size 1 for axes that it does not depend on;
        ``None`` where SDPA needs none at these lengths (nothing masked, or its own causal mask).

    Raises:
        RefusalError: when SDPA does not compute the Spec.
    """
    types = spec.types()
    attend = spec.attend()
    if attend is None:
        raise RefusalError(Refusal("operator", f"{spec.name} has not exactly one attention operation"))
    form = _expect(additive_form(attend, types))
    where = attention_map(spec, attend, tensors)
    _, _, queries, keys = where.extents
    if form.causal_at(queries, keys):
        return None
    return additive_mask(form, form.mask_at(queries, keys), where, where.tensors[attend.query].dtype)


def attention_map(spec: Spec, attend: Attend, tensors: Mapping[str, torch.Tensor]) -> Map:
    """Where a Spec's attention evaluates its expressions, for these inputs by name; what precedes it is computed."""
    known, sizes = dict(tensors), read_sizes(spec, tensors)
    for operation in spec.operations[: spec.operations.index(attend)]:
        known.update(_reference(operation, known, sizes, None))
    return _map(attend, _views(attend, spec.types()), known, sizes)
