"""Attention of an ONNX model replaced: lifted, passed through the passes, written in the operators that win."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir
import onnx_ir.passes.common as passes

from attncompile.codegen.onnx.capabilities import ATTEND_ROWS, Provider
from attncompile.codegen.onnx.choose import WORTH_BRANCHING, Choice, Prefer, choose, expected_speed
from attncompile.codegen.onnx.emit import emit
from attncompile.codegen.onnx.expressions import Scopes, Shared
from attncompile.codegen.onnx.layouts import Operand, joined, reshaped, single_groups
from attncompile.codegen.onnx.normalisation import OPSET
from attncompile.codegen.onnx.packing import Begins
from attncompile.codegen.onnx.tidy import Tidied, loses_types, raise_opset, suited_opset, tidy, without_kernel
from attncompile.codegen.onnx.tried import installed
from attncompile.codegen.onnx.values import Builder, redirect
from attncompile.convert.branches import left_behind, opposite, second_forms
from attncompile.convert.evidence import Outcome
from attncompile.convert.onnx_older import is_too_new, is_unknown, spell_out_unknown, unknown_calls
from attncompile.frontends.graph import Fill, Graph
from attncompile.frontends.onnx import onnx_graph
from attncompile.frontends.onnx_attention import CALLS, CONTRIB_CALLS
from attncompile.frontends.onnx_bodies import nested_values
from attncompile.frontends.onnx_contrib import CONTRIB
from attncompile.frontends.onnx_definitions import SpelledOut, put_back, spelled_out
from attncompile.frontends.onnx_file import load_onnx
from attncompile.frontends.onnx_group_query import GROUP_QUERY
from attncompile.frontends.onnx_projected import PROJECTED
from attncompile.ir import Refusal, RefusalError, Spec
from attncompile.ir.expr import ZERO, Const
from attncompile.ir.simplify import simplify
from attncompile.lift import Program, Region, Site, lift_graph
from attncompile.lift.rounded import described, without_roundings
from attncompile.passes import PassCall, PassResult, parse_passes, run_passes

COMPOUND_CALLS = frozenset((CONTRIB, operator) for operator in (*PROJECTED, GROUP_QUERY))
"""Calls that are left whole where they make what they compare: queries, keys or values."""

LAYOUT = ("Transpose", "Reshape")
"""What a definition does to operands that the call is given."""

FUSED = frozenset({*CALLS, *CONTRIB_CALLS, "FlexAttention"})
"""Operators that are attention as a whole."""

SECOND_FORM = "it is the form for the calls that the other branch of its If, an attention call, is not given"
"""Why plain operators stay."""

ROLLED_BACK = "attncompile.rolled_back"
"""Metadata of a model: why a site was rolled back, under this and the site's name."""


@dataclass(frozen=True)
class Rewritten:
    """A model after its sites were replaced.

    Attributes:
        model: the ONNX model; program: what was lifted from it.
        outcomes: one per site; choices: the operator rows of replaced sites by name.
        notes: what else was rewritten.
        changed: whether anything was.
    """

    model: onnx_ir.Model
    program: Program
    outcomes: tuple[Outcome, ...]
    choices: Mapping[str, Choice]
    notes: tuple[str, ...]
    changed: bool


def rewrite_onnx(
    model: onnx_ir.Model,
    name: str,
    requested: Sequence[PassCall],
    provider: Provider,
    prefer: Prefer,
    allow_untrained: bool,
    notes: tuple[str, ...],
    longest: int | None = None,
    version: str | None = None,
    *,
    one_buffer: bool = False,
    dtype: str | None = None,
    program: Program | None = None,
    rolled_back: Mapping[str, str] | None = None,
    guarded: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Rewritten:
    """Lift the model, replace every site in place, and tidy what is around them.

    Args:
        model: changed in place.
        name: of the model, for the program.
        requested: passes to run on every site.
        provider: where it will run; prefer: how operators are chosen.
        allow_untrained: allow passes that ruin a model that was not trained for them.
        notes: of the export, to keep with the program.
        longest: how many positions the model has at most, where it says so.
        version: of ONNX Runtime that will run it; the installed one where it is left out.
        one_buffer: whether past and present keys are.
        dtype: what a precision rounds the model's states to afterwards; an operator must exist in that one.
        program: what was lifted from the same model before; lifted now where it is left out.
        rolled_back: sites that stay as they were, with the reason; the model says so in its metadata.
        guarded: around what only the model's own oddities can make fail: its reading, and what comes behind the sites.
    """
    back = rolled_back or {}
    for entry in [entry for entry in model.metadata_props if entry.startswith(f"{ROLLED_BACK}.")]:
        del model.metadata_props[entry]  # of an earlier conversion
    opset_before = model.opset_imports.get("", 0)
    with guarded():
        kernelless, wanted = without_kernel(model, OPSET), suited_opset(model, version, provider)
        signed = loses_types(model)
        raised = raise_opset(model, wanted)
        graph = onnx_graph(model)  # names every value as the graph of an earlier program was named
        program = program or lift_graph(graph, name, notes)
    # ONNX Runtime has no score product in INT8; that pass is the quantiser's, on the projections
    calls_of_sites = tuple(call for call in requested if call.rewrite.name != "quantize.int8")
    values = {value.name: value for value in nested_values(model.graph)}
    scopes = Scopes(model.graph)
    calls, opsets = spelled_out(model), model.opset_imports
    called = {node: call for call in calls for node in call.nodes}
    spelled = {node for call in calls if is_unknown(call, opsets) for node in call.nodes}
    unknown = spelled | unknown_calls(model.graph, opsets)
    replaced: set[onnx_ir.Node] = set()
    outcomes: list[Outcome] = []
    choices: dict[str, Choice] = {}
    unrounds = any(call.rewrite.unrounds for call in requested)
    others = opposite(model.graph, program.sites)
    behind = left_behind(others)
    makers = {
        site.name: values[site.region.outputs[0].value].producer() for site in program.sites if site.region is not None
    }
    operators = {
        name: called[maker].operator if maker in called else maker.op_type for name, maker in makers.items() if maker
    }
    second = second_forms(others, operators, FUSED)
    for site in map(without_roundings, program.sites) if unrounds else program.sites:
        if site.status != "lifted" or site.spec is None or site.region is None:
            outcomes.append(Outcome(site, None, "original", str(site.refusal)))
            continue
        if len({values[output.value].producer() for output in site.region.outputs}) > 1:
            reason = "its log-sum-exp is a result too, and operators are put in the place of one node only"
            outcomes.append(Outcome(site, None, "original", reason))
            continue
        rounded = described(site.roundings)
        result = run_passes(site.spec, calls_of_sites, allow_untrained=allow_untrained, rounded=rounded)
        if result.lossy and site.name in behind:
            reason = f"{behind[site.name]} in the other branch of its If is not lifted, and both have to change alike"
            outcomes.append(Outcome(site, _untouched(site.spec, result), "original", reason))
            continue
        if site.name in back:
            outcomes.append(Outcome(site, _put_back(site.spec, result), "original", back[site.name], rolled_back=True))
            model.metadata_props[f"{ROLLED_BACK}.{site.name}"] = back[site.name]
            continue
        if site.name in second and not result.lossy:
            outcomes.append(Outcome(site, _untouched(site.spec, result), "original", SECOND_FORM))
            continue
        try:
            place = values[site.region.outputs[0].value].producer()
            assert place is not None
            opset, inside = model.opset_imports.get("", 0), scopes.is_body(place)
            choice = choose(
                result.spec,
                provider,
                "decomposed" if site.name in second else prefer,
                opset=opset,
                switch=not inside,
                longest=longest,
                version=version,
                shared=one_buffer,
                dtype=dtype,
            )
            if site.name in second:
                choice = replace(choice, reason=SECOND_FORM)
            call = called.get(place)
            native = (place.domain, place.op_type) if call is None else (call.domain, call.operator)
            compound = call is not None and _makes_operands(call, [values[entry.value] for entry in site.region.inputs])
            kept = result.lossy or place in unknown
            stays = None if kept else _why_left(native, compound, result.spec, choice, provider, prefer)
            if stays is not None:
                outcomes.append(Outcome(site, _untouched(site.spec, result), "original", stays))
                continue
            shared = scopes.at(place)
            before = set(shared)
            try:
                _replace(program.graph, model, values, site, result, choice, shared)
            except ValueError:
                for key in set(shared) - before:
                    del shared[key]  # what was built for this site is nowhere in the model
                raise
            replaced.add(place)
        except ValueError as error:
            reason = str(error.refusal) if isinstance(error, RefusalError) else f"it can not be written: {error}"
            outcomes.append(Outcome(site, _untouched(site.spec, result), "original", reason))
            continue
        outcomes.append(Outcome(site, result, choice.row.operator, choice.reason))
        choices[site.name] = choice
    for call in calls:
        if replaced.isdisjoint(call.nodes) and spelled.isdisjoint(call.nodes):
            put_back(call)
    with guarded():
        passes.RemoveUnusedNodesPass()(model)  # calls that were replaced need no newer operators
        newer = is_too_new(model) and spell_out_unknown(model)
        done = tidy(model, provider, version, longest, dtype, first_positions(program.graph))
    told = [f"around attention: {done}"]
    if not raised:
        told.append(
            f"the model stays at opset {model.opset_imports.get('', 0)}, because not all its nodes have a newer form"
        )
    elif kernelless and wanted < OPSET:
        told.append(
            f"the model is at opset {model.opset_imports.get('', 0)}, without the operators of {OPSET}: ONNX Runtime "
            f"{installed()} has no kernel for its {', '.join(kernelless)} there"
        )
    elif signed and wanted < OPSET:
        told.append(
            f"the model is at opset {model.opset_imports.get('', 0)}, without the operators of {OPSET}: it rounds to "
            f"INT8, and from opset 21 on ONNX Runtime {installed()} fails to optimise that (it loses the type of codes)"
        )
    elif wanted < OPSET and opset_before < OPSET:
        told.append(
            f"the model is at opset {model.opset_imports.get('', 0)}, without the operators of {OPSET}: ONNX Runtime "
            f"{version or installed()} runs no newer one"
        )
    if newer:
        told.append(
            f"the model is at opset {model.opset_imports.get('', 0)}: what ONNX Runtime {installed()} does not know "
            "yet of a newer standard is written by its definition"
        )
    changed = newer or bool(choices) or done != Tidied(0, 0, 0, 0)
    return Rewritten(model, program, tuple(outcomes), choices, tuple(told), changed)


def operators_of_file(file: Path, provider: Provider, prefer: Prefer) -> dict[str, tuple[str, str]]:
    """Operator and reason for each site of an ``.onnx`` file, by name; ``original`` where a site stays as it is."""
    made = rewrite_onnx(load_onnx(file), file.stem, parse_passes("fuse"), provider, prefer, False, ())
    return {outcome.site.name: (outcome.operator, outcome.reason) for outcome in made.outcomes}


def operators_of_program(program: Program, provider: Provider, prefer: Prefer) -> dict[str, tuple[str, str]]:
    """The same for a model that would be exported first: its Specs alone decide."""
    found = {}
    for site in program.sites:
        if site.status != "lifted" or site.spec is None:
            found[site.name] = ("original", str(site.refusal))
            continue
        try:
            choice = choose(run_passes(site.spec, parse_passes("fuse")).spec, provider, prefer)
        except RefusalError as error:
            found[site.name] = ("original", str(error.refusal))
            continue
        found[site.name] = (choice.row.operator, choice.reason)
    return found


def _makes_operands(call: SpelledOut, operands: Iterable[onnx_ir.Value]) -> bool:
    """Whether what is compared in a call is more than what the call is given, laid out."""
    own = {node for node in call.nodes if node.op_type not in LAYOUT}
    return (call.domain, call.operator) in COMPOUND_CALLS and any(value.producer() in own for value in operands)


def _why_left(
    native: tuple[str, str], compound: bool, spec: Spec, choice: Choice, provider: Provider, prefer: Prefer
) -> str | None:
    """Why a site stays as it is, or ``None`` where it is to be written anew.

    Args:
        native: domain and name of the operator that makes the site's output; of the call, where a definition stands
            for it.
        compound: whether that makes its own operands: projections, a cache, rotary maps.
        spec: of the site; choice: the operator for it.
        provider: where it will run; prefer: how operators are chosen.
    """
    domain, operator = ("" if native[0] == "ai.onnx" else native[0]), native[1]
    if (domain, operator) == (choice.row.domain, choice.row.operator):
        return f"it is {operator} already: {choice.reason}"
    if prefer == "fastest" and compound:
        if operator in PROJECTED:
            return f"it stays {operator}: {choice.row.operator} behind projections of their own is no faster"
        return f"it stays {operator}, with what it makes itself: nothing was measured behind nodes for that"
    if prefer != "fastest" or choice.row.operator != "decomposition":
        return None
    if operator not in FUSED:
        return f"already plain operators: {choice.reason}"
    measured = {row.operator for row in ATTEND_ROWS if row.domain == domain}
    speed = expected_speed(spec, operator, provider) if operator in measured else None
    if speed is None:
        return f"it stays {operator}, which was not measured against plain operators; {choice.reason}"
    if speed * WORTH_BRANCHING < 1.0:  # a call is not taken apart for a difference that measurements hardly show
        return None
    return f"it stays {operator}, which was measured {speed:.2f}x as fast as plain operators"


def first_positions(graph: Graph | None) -> Begins | None:
    """What the sizes of a lifted graph prove of the first positions of its calls."""
    if graph is None:
        return None
    numbers = {node.output: node.value for node in graph.nodes if isinstance(node, Fill)}

    def begins(first: onnx_ir.Value, keys: onnx_ir.Value, new: onnx_ir.Value) -> bool:
        start, count = (numbers.get(value.name or "") for value in (first, keys))
        info = graph.infos.get(new.name or "")
        if start is None or count is None or info is None or len(info.shape) != 4:
            return False
        return simplify(start + info.shape[2] - count) == ZERO

    return begins


def _untouched(spec: Spec, result: PassResult) -> PassResult:
    """What the passes said of a site that stays as it was: their refusals, and none applied."""
    return PassResult(spec, (), result.refused)


def _put_back(spec: Spec, result: PassResult) -> PassResult:
    """What the passes said of a site that was rolled back: with it went what they did."""
    undone = tuple((call, "the site was rolled back") for call in result.applied)
    return PassResult(spec, (), (*result.refused, *undone))


def _replace(
    graph: Graph | None,
    model: onnx_ir.Model,
    values: Mapping[str | None, onnx_ir.Value],
    site: Site,
    result: PassResult,
    choice: Choice,
    shared: Shared,
) -> None:
    """Put the operator's nodes in the place of a site. Raises RefusalError where it cannot express the Spec."""
    assert site.region is not None
    place = values[site.region.outputs[0].value].producer()
    assert place is not None
    build = Builder(model.graph, site.name)
    types = result.spec.types()
    operands = {
        entry.name: Operand(joined(build, values[entry.value], entry.layout.places()), entry.layout.groups)
        if entry.layout
        else Operand(values[entry.value], single_groups(axis.name for axis in types[entry.name].axes))
        for entry in site.region.inputs
    }
    outputs = {entry.name: entry.layout.groups for entry in site.region.outputs if entry.layout is not None}
    made = emit(result.spec, operands, outputs, choice.row, build, shared)
    for entry in site.region.outputs:
        assert entry.layout is not None  # a result always has one
        if entry.layout.runs:
            assert graph is not None  # what was lifted from one model has one graph
            sizes = _native_sizes(graph, values, site.region, entry.value, build)
            made[entry.name] = reshaped(build, made[entry.name], sizes)
    for node in build.nodes:
        node.metadata_props["attncompile.site"] = site.name
        node.metadata_props["attncompile.spec"] = str(result.spec)
    build.insert_before(place)
    for entry in site.region.outputs:
        redirect(values[entry.value], made[entry.name])


def _native_sizes(
    graph: Graph, values: Mapping[str | None, onnx_ir.Value], region: Region, output: str, build: Builder
) -> list[int | onnx_ir.Value]:
    """The shape of an output, read off the inputs of its region; one size may be left to ``Reshape``.

    Raises:
        RefusalError: when more than one size is no axis of an input.
    """
    found: list[int | onnx_ir.Value] = []
    for size in graph.infos[output].shape:
        places = (
            (values[entry.value], axis)
            for entry in region.inputs
            for axis, other in enumerate(graph.infos[entry.value].shape)
            if other == size
        )
        place = next(places, None)
        if isinstance(size, Const):
            found.append(int(size.value))
        elif place is not None:
            found.append(build("Shape", place[0], start=place[1], end=place[1] + 1))
        else:
            found.append(-1)
    if found.count(-1) > 1:
        reason = f"the shape of {output} does not follow from those of the operands"
        raise RefusalError(Refusal("output-shape", reason, output))
    return found
