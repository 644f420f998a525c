"""Calls of the standard that the installed ONNX Runtime does not know yet, in terms of those that it does.

ONNX defines its newer operators by functions of older ones. With these in the place of the calls, a model needs no
newer operator set, and its number is brought down to one that the runtime reads: a node whose operator has not changed
in between computes what it did, and so does one whose operator only takes more types now and is given none of these.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import onnx
import onnx_ir as ir
import onnxruntime.capi.onnxruntime_pybind11_state as runtime

from attncompile.codegen.onnx.tried import newest_ir_version, newest_opset
from attncompile.frontends.onnx_bodies import nested_nodes
from attncompile.frontends.onnx_definitions import PREVIEW, SpelledOut, spell_out

STANDARD = ("", "ai.onnx")


@functools.cache
def _known() -> Mapping[tuple[str, str], Mapping[int, frozenset[str]]]:
    """Names of the attributes of each operator that the installed ONNX Runtime has a definition of: by domain and name,
    then by version.
    """
    found: dict[tuple[str, str], dict[int, frozenset[str]]] = {}
    for schema in runtime.get_all_operator_schema():
        found.setdefault((schema.domain, schema.name), {})[schema.since_version] = frozenset(schema.attributes)
    return found


def why_unknown(call: ir.Node | SpelledOut, opsets: Mapping[str, int]) -> str | None:
    """Why the runtime does not know a call of the standard under these operator sets, in words; ``None`` where it does.

    Types count as far as the model says them.
    """
    domain, operator = call.domain, call.op_type if isinstance(call, ir.Node) else call.operator
    if domain not in (*STANDARD, PREVIEW):
        return None
    opset = opsets.get(domain) or opsets.get("ai.onnx" if not domain else "") or 1
    domain = "" if domain in STANDARD else domain
    try:
        schema = onnx.defs.get_schema(operator, opset, domain)
    except onnx.defs.SchemaError:
        return None  # the standard does not know it either
    if not domain and schema.since_version > newest_opset():
        changed = _why_changed(call, schema)
        if changed is not None:
            return changed
    known = {version: names for version, names in _known().get((domain, operator), {}).items() if version <= opset}
    if not known:
        return f"{operator} is not known to it"
    more = sorted(call.attributes.keys() - known[max(known)])
    return f"{operator} has the attribute {more[0]}" if more else None


def _why_changed(call: ir.Node | SpelledOut, schema: onnx.defs.OpSchema) -> str | None:
    """Why a call of an operator set that the runtime does not read is no call of one that it does."""
    since = f"opset {schema.since_version}"
    try:
        older = onnx.defs.get_schema(schema.name, newest_opset(), "")
    except onnx.defs.SchemaError:
        return f"{schema.name} is new in {since}"
    if _without_types(schema) != _without_types(older):
        return f"{schema.name} was defined anew in {since}"
    if isinstance(call, SpelledOut):
        return None
    allowed = {one.type_param_str: frozenset(one.allowed_type_strs) for one in older.type_constraints}
    for formals, values in ((older.inputs, call.inputs), (older.outputs, call.outputs)):
        for number, value in enumerate(values):
            formal = formals[min(number, len(formals) - 1)].type_str  # the last one may stand for any number
            kind = _onnx_type(value.type) if value is not None and value.type is not None else ""
            if kind and kind not in allowed.get(formal, frozenset({formal})):
                return f"{schema.name} takes {kind} since {since} alone"
    return None


def _without_types(schema: onnx.defs.OpSchema) -> object:
    """All that a schema says but for the types that it takes."""
    formals = [
        [(one.name, one.type_str, one.option, one.is_homogeneous, one.min_arity) for one in several]
        for several in (schema.inputs, schema.outputs)
    ]
    attributes = {
        name: (one.type, one.required, one.default_value.SerializeToString())
        for name, one in schema.attributes.items()
    }
    return schema.doc, formals, attributes


def _onnx_type(kind: ir.TypeProtocol) -> str:
    """A type as the standard writes it, such as ``seq(tensor(float))``."""
    if isinstance(kind, ir.SequenceType):
        return f"seq({_onnx_type(kind.elem_type)})"
    if isinstance(kind, ir.OptionalType):
        return f"optional({_onnx_type(kind.elem_type)})"
    return f"tensor({ir.DataType(kind.dtype).name.lower()})"


def is_unknown(call: ir.Node | SpelledOut, opsets: Mapping[str, int]) -> bool:
    """Whether a call of the standard, under these operator sets, is unknown to the runtime: its operator, an attribute
    that it has, or a type that it is given.
    """
    return why_unknown(call, opsets) is not None


def unknown_calls(holder: ir.Graph | ir.Function, opsets: Mapping[str, int]) -> frozenset[ir.Node]:
    """The calls in a graph and its bodies that :func:`is_unknown` is true of."""
    return frozenset(node for node in nested_nodes(holder) if is_unknown(node, opsets))


def is_too_new(model: ir.Model) -> bool:
    """Whether the installed ONNX Runtime does not take a model: for its file format, its operator set, or its calls."""
    opsets = model.opset_imports
    newest = max(opsets.get(domain, 0) for domain in STANDARD)
    return _newer_format(model) or newest > newest_opset() or bool(unknown_calls(model.graph, opsets))


def spell_out_unknown(model: ir.Model) -> bool:
    """Bring a model to what the installed ONNX Runtime knows, in place and exactly; whether it is there.

    A model of which some call has no definition, or needs one for types that are not known, stays as new as it is.
    """
    unknown, newest = unknown_calls(model.graph, model.opset_imports), newest_opset()
    if unknown:
        spell_out(model, lambda node: node in unknown)
    holders: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    if any(unknown_calls(holder, holder.opset_imports) for holder in holders):
        return False
    for opsets in (holder.opset_imports for holder in holders):
        for domain in STANDARD:
            if opsets.get(domain, 0) > newest:
                opsets[domain] = newest
    if _newer_format(model):  # what that adds are types and fields which the runtime would refuse by name
        model.ir_version = newest_ir_version()
    return True


def why_too_new(model: ir.Model) -> str:
    """What keeps a model that :func:`spell_out_unknown` has tried from being brought down, in words."""
    holders: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    found = [
        f"{why} (node {node.name!r})" if node.name else why
        for holder in holders
        for node in nested_nodes(holder)
        if (why := why_unknown(node, holder.opset_imports)) is not None
    ]
    return "; ".join([*found[:3], *([f"and {len(found) - 3} more"] if len(found) > 3 else [])])


def _newer_format(model: ir.Model) -> bool:
    """Whether a file's format is one that the installed onnx knows, and the installed ONNX Runtime not yet."""
    return 0 < newest_ir_version() < model.ir_version <= onnx.IR_VERSION


__all__ = ["is_too_new", "is_unknown", "spell_out_unknown", "unknown_calls", "why_too_new", "why_unknown"]
