"""Calls of the standard that the installed ONNX Runtime does not know yet, in terms of those that it does.

ONNX defines its newer operators by functions of older ones. With these in the place of the calls, a model needs no
newer operator set, and its number is brought down to one that the runtime reads: a node whose operator has not changed
in between computes what it did.
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


def is_unknown(call: ir.Node | SpelledOut, opsets: Mapping[str, int]) -> bool:
    """Whether a call of the standard, under these operator sets, is unknown to the runtime: its operator, or one of the
    attributes that it has.
    """
    domain, operator = call.domain, call.op_type if isinstance(call, ir.Node) else call.operator
    if domain not in (*STANDARD, PREVIEW):
        return False
    opset = opsets.get(domain) or opsets.get("ai.onnx" if not domain else "") or 1
    domain = "" if domain in STANDARD else domain
    try:
        since = onnx.defs.get_schema(operator, opset, domain).since_version
    except onnx.defs.SchemaError:
        return False  # the standard does not know it either
    if not domain and since > newest_opset():
        return True  # of an operator set that is not run yet, whatever is known of it
    known = {version: names for version, names in _known().get((domain, operator), {}).items() if version <= opset}
    return not known or not call.attributes.keys() <= known[max(known)]


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


def _newer_format(model: ir.Model) -> bool:
    """Whether a file's format is one that the installed onnx knows, and the installed ONNX Runtime not yet."""
    return 0 < newest_ir_version() < model.ir_version <= onnx.IR_VERSION


__all__ = ["is_too_new", "is_unknown", "spell_out_unknown", "unknown_calls"]
