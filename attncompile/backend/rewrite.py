"""Replace lifted sites in an ATen graph by modules that compute them with a chosen lowering."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Literal

import torch

from attncompile.backend.site_module import SharedModule, SiteModule
from attncompile.codegen.lowering import Lowering
from attncompile.codegen.pytorch import MaskKey, adds_fill, mask_inputs, may_be_empty, passing_gradients, why_not_passed
from attncompile.frontends.aten_attention import is_attention
from attncompile.frontends.aten_builder import Unstated, arguments_of
from attncompile.frontends.memory import Memory, written_arguments
from attncompile.frontends.torch_internals import bounds_transform
from attncompile.ir import Spec
from attncompile.ir.prologue import input_behind
from attncompile.lift import Program, Site
from attncompile.lift.prologue import RotaryMaps
from attncompile.passes import PassCall, PassResult, run_passes


@dataclass(frozen=True)
class Decision:
    """What was done at one site.

    Attributes:
        site: the site as lifted.
        passes: the outcome of the passes, ``None`` for a site that was not lifted.
        lowering: what computes it now, ``None`` when the original computation stays.
        reason: why the original stays, or why this lowering was chosen.
    """

    site: Site
    passes: PassResult | None
    lowering: Lowering | None
    reason: str

    @property
    def spec(self) -> Spec | None:
        """The Spec that runs."""
        return self.passes.spec if self.passes else self.site.spec


def decide(
    program: Program,
    calls: tuple[PassCall, ...],
    choose: Callable[[Spec], Lowering],
    *,
    planned: Mapping[str, tuple[PassCall, ...] | str] | None = None,
    allow_untrained: bool = False,
    even_reference: bool = False,
    training: bool = False,
) -> tuple[Decision, ...]:
    """Run the passes on every site and choose its lowering; equal Specs share both.

    A site whose rotary maps a pass has pulled into its Spec is decided as the larger site that computes them too.

    Sites that ``planned`` names get the passes that it gives, or stay as they are for the reason that it gives. Where
    only the reference computes a Spec, the original stays, unless a pass has changed what is computed, or the
    caller wants even those sites replaced. In ``training``, where gradients may be recorded, a site that adds its mask
    passes on what such a sum passes on (``swallows`` and ``numbers`` of :class:`attncompile.lift.Site`), or stays as it
    is, and passes that do not serve training are left out.
    """
    known: dict[tuple[str, ...], tuple[PassResult, Lowering]] = {}
    made: list[Decision] = []
    maps = RotaryMaps(program.graph) if program.graph is not None else None
    for site in program.sites:
        if site.status != "lifted" or site.spec is None:
            made.append(Decision(site, None, None, str(site.refusal) if site.refusal else site.status))
            continue
        early = _entangled(program, site) or _needed_too_early(program, site)
        if early:
            made.append(Decision(site, None, None, early))
            continue
        asked = (planned or {}).get(site.name, calls)
        if isinstance(asked, str):
            made.append(Decision(site, None, None, asked))
            continue
        rotated = maps.of(site) if maps is not None and any(call.rewrite.pulls for call in asked) else None
        prologue = rotated.prologue if rotated is not None else None
        key = (site.spec.fingerprint(), str(prologue), *map(str, asked))
        if key not in known:
            result = run_passes(site.spec, asked, allow_untrained, prologue, training=training)
            known[key] = (result, choose(result.spec))
        result, lowering = known[key]
        reason = lowering.reason
        if rotated is not None and result.pulled:
            site = rotated.site
            reason = "; ".join([reason, *(f"{said}, and stays outside" for _, said in rotated.prologue.refused)])
        if lowering.operator == "reference" and not (result.lossy or even_reference):
            # the plain definition would do the same work again, and in 16 bits more of it
            left = f"no operator is known to be faster here than the graph itself: {lowering.reason}"
            made.append(Decision(site, None, None, left))
            continue
        if training:
            differentiated = _differentiated(site, result, lowering)
            if isinstance(differentiated, str):
                made.append(Decision(site, None, None, differentiated))
                continue
            reason, lowering = reason.replace(lowering.reason, differentiated.reason), differentiated
        made.append(Decision(site, result, lowering, reason))
    return tuple(made)


def _differentiated(site: Site, result: PassResult, lowering: Lowering) -> Lowering | str:
    """The lowering with the gradients of a site that adds its mask, or why the site stays as it is."""
    spec = site.spec
    if spec is None or not (site.numbers or ((site.swallows or adds_fill(spec)) and may_be_empty(spec))):
        return lowering
    attend = result.spec.attend()
    if result.lossy and (attend is None or not attend.norm.plain_softmax):
        return lowering  # another function was asked for, with gradients of its own
    problem = why_not_passed(spec, site.numbers)
    if problem is None and result.spec.inputs == spec.inputs:
        return passing_gradients(spec, lowering)
    why = problem or "a pass reads other tensors"
    return (
        "its mask is added, so queries that see no key pass gradients on to scores that rounding has swallowed, which "
        f"is not computed here: {why}; without gradients it is rewritten, and with them where the model is loaded with "
        'attn_implementation="attncompile", or padded at the right and called without attention_mask'
    )


def _entangled(program: Program, site: Site) -> str:
    """Why the results of a site can not be tensors with memory of their own; empty where they can."""
    outputs = site.region.outputs if site.region is not None else ()
    reasons = ((entry.value, program.graph.entangled.get(entry.value)) for entry in outputs)
    return next((f"its result {value} is no tensor of its own: {reason}" for value, reason in reasons if reason), "")


def _needed_too_early(program: Program, site: Site) -> str:
    """Why one call can not make all results of a site where they are needed; empty where it can.

    The call takes the place of the first result, so all inputs must be there by then.
    """
    if site.region is None or len(site.region.outputs) == 1:
        return ""
    place = program.graph.position
    first = min(site.region.outputs, key=lambda binding: place[binding.value])
    later = [entry for entry in site.region.inputs if place.get(entry.value, -1) >= place[first.value]]
    return f"its result {first.value} is made before its input {later[0].value}" if later else ""


def rewrite(module: torch.fx.GraphModule, program: Program, decisions: tuple[Decision, ...]) -> torch.fx.GraphModule:
    """A copy of the graph in which every decided site is one module call; what it replaces is gone.

    Args:
        module: the graph that the program was lifted from.
        program: the lifted program.
        decisions: one per site of the program.
    """
    graph = torch.fx.Graph()
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    output = graph.graph_copy(module.graph, copies)
    graph.output(output)
    result = torch.fx.GraphModule(module, graph)
    result.meta.update(copy.copy(module.meta))
    by_name = {node.name: copies[node] for node in module.graph.nodes if node in copies}
    masks: dict[int, MaskKey | None] = {}
    keys = [_shared_key(program, module.graph, decision, masks) for decision in decisions]
    made_once: dict[object, torch.fx.Node] = {}
    for number, decision in enumerate(decisions):
        region = decision.site.region
        if decision.lowering is None or region is None or decision.spec is None:
            continue
        targets = [by_name[binding.value] for binding in region.outputs]
        key = keys[number]
        shares = key.what if key is not None and keys.count(key) > 1 else ""
        infos = [program.graph.infos[binding.value] for binding in region.outputs]
        given = [program.graph.infos[binding.value] for binding in region.inputs]
        rounded = _rounded_beside(module.graph, decision)
        site = SiteModule(decision.spec, region, decision.lowering, given, infos, shares, rounded=rounded)
        arguments = [by_name[entry.value] for entry in region.inputs]
        first = min(region.outputs, key=lambda entry: program.graph.position[entry.value])
        with graph.inserting_before(by_name[first.value]):
            if shares:
                if key not in made_once:
                    name = f"{shares}_{len(made_once)}"
                    result.add_submodule(name, SharedModule(site))
                    made_once[key] = graph.call_module(name, tuple(arguments))
                arguments.append(made_once[key])
            result.add_submodule(f"attend_{number}", site)
            call = graph.call_module(f"attend_{number}", tuple(arguments))
            results = [call]
            if len(targets) > 1:
                results = [graph.call_function(getitem, (call, number)) for number in range(len(targets))]
        for target, made in zip(targets, results, strict=True):
            made.meta = dict(target.meta)
            target.replace_all_uses_with(made)
    _drop_dead(graph)
    graph.lint()
    result.recompile()
    return result


@dataclass(frozen=True)
class _SharedKey:
    """What sites must have in common to share something.

    Attributes:
        what: an additive ``mask``, or ``lists`` of the blocks of keys that a mask leaves to visit.
        definition: of the mask, or of all that decides about the lists.
        captured: nodes of the graph whose elements it is made from, in order.
        sizes: of queries and keys, for lists in the graph's own symbols.
        rounded: what autocast rounds of what it is made from, see :class:`SiteModule`.
    """

    what: Literal["mask", "lists"]
    definition: str
    captured: tuple[str, ...]
    sizes: tuple[str, ...]
    rounded: frozenset[str] = frozenset()


def _shared_key(
    program: Program, graph: torch.fx.Graph, decision: Decision, masks: dict[int, MaskKey | None]
) -> _SharedKey | None:
    """What a site may share with others that have the same; ``None`` where it makes everything itself.

    ``masks`` is what is known of the masks of Specs, by identity: equal sites have one Spec that runs, see
    :func:`decide`.
    """
    region, lowering, spec = decision.site.region, decision.lowering, decision.spec
    if lowering is None or spec is None or region is None:
        return None
    natives = {entry.name: entry.value for entry in region.inputs}
    types = spec.types()
    attend = spec.attend()
    if lowering.lists is not None and attend is not None:
        operands = (input_behind(spec, name) for name in (attend.query, attend.key))
        sizes = tuple(str(program.graph.infos[natives[name]].shape) for name in operands)
        return _SharedKey("lists", lowering.lists.key, tuple(natives[name] for name in lowering.lists.reads), sizes)
    if lowering.operator not in ("sdpa", "blockwise"):
        return None
    if id(spec) not in masks:
        masks[id(spec)] = mask_inputs(spec)
    key = masks[id(spec)]
    if key is None:
        return None
    sizes = tuple(str(types[name]) for name in ("q", "k"))
    captured = tuple(natives[name] for name in key.captured)
    return _SharedKey("mask", key.text, captured, sizes, _rounded_beside(graph, decision))


def _rounded_beside(graph: torch.fx.Graph, decision: Decision) -> frozenset[str]:
    """What autocast rounds at a site beside the operands of products: all that a call of torch's own is given."""
    region, anchor = decision.site.region, decision.site.anchor
    call = next((node for node in graph.nodes if node.name == anchor and is_attention(str(node.target))), None)
    if region is None or call is None:
        return frozenset()
    given = {argument.name for argument in call.all_input_nodes}
    return frozenset(binding.name for binding in region.inputs if binding.value in given)


def _drop_dead(graph: torch.fx.Graph) -> None:
    """Remove what nothing reads any more; placeholders stay, since they are the calling convention."""
    while True:
        for node in reversed(list(graph.nodes)):
            removable = node.op in ("call_function", "call_module", "get_attr") and not node.is_impure()
            if not node.users and removable and not bounds_transform(node):
                graph.erase_node(node)
        unseen = _unseen_memory(graph)
        for node in reversed(unseen):
            graph.erase_node(node)
        if not unseen:
            return


def _unseen_memory(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """The operations on tensors that are written to in place, but that nothing reads afterwards: old scores, say."""
    if not any(written_arguments(node) for node in graph.nodes):
        return []
    memory = Memory()
    sharing: dict[object, list[torch.fx.Node]] = {}
    calls = [node for node in graph.nodes if node.op != "call_module"]  # whose results are new, whatever tracing saw
    for node in calls:
        memory.place(node)
    for node in calls:
        sharing.setdefault(memory.place_of(node), []).append(node)
    unseen: set[torch.fx.Node] = set()
    for nodes in sharing.values():
        own = all(node.op == "call_function" and not draws(node) for node in nodes)
        if own and any(written_arguments(node) for node in nodes):
            inside = set(nodes)
            unseen |= inside if all(inside.issuperset(node.users) for node in nodes) else set()
    return [node for node in graph.nodes if node in unseen]


def draws(node: torch.fx.Node) -> bool:
    """Whether an operation draws random numbers: those that are drawn later depend on it."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    try:
        given = arguments_of(node)
    except Unstated:
        return True
    return given.get("dropout_p", 1.0) != 0.0 and given.get("train", True) is not False


__all__ = ["Decision", "decide", "draws", "rewrite"]
