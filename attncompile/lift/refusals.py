"""Why not: for every kind of refusal the check that failed and what would pass it, and what was found instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from attncompile.frontends.graph import Contract, FusedAttention, Graph, RefusedAttention
from attncompile.ir import Refusal
from attncompile.lift.anchors import Anchor, normalisers, products_after, scores_behind


@dataclass(frozen=True)
class Check:
    """What lifting asks of a site.

    Attributes:
        asks: the condition, as a sentence that is false of the refused site.
        edit: a change to the model after which it would hold.
    """

    asks: str
    edit: str


CHECKS: dict[str, Check] = {
    "unstated-attention": Check(
        "the meaning of a native attention call is known for its options",
        "spell the attention out (product, softmax, product), or call it without this option",
    ),
    "uninterpreted-node": Check(
        "between scores, weights and values there are only pointwise operations and movements of data",
        "move the operation before the product that makes the scores or behind the product with the values, "
        "or write it pointwise",
    ),
    "overwritten": Check(
        "every value on the way keeps what was written to it first",
        "write the change as a new tensor: x = x.masked_fill(…) in place of x.masked_fill_(…)",
    ),
    "rounded": Check(
        "an integer that positions or masks depend on is computed exactly",
        "compute integers by integer arithmetic: // in place of a division that is rounded",
    ),
    "unknown-normaliser": Check(
        "the scores are normalised over the keys in a known way",
        "normalise with softmax (written in any way), sigmoid or relu, or divide by the sum of the row",
    ),
    "no-value-product": Check(
        "the weights are multiplied with values and summed over the keys",
        "nothing needs to be done where this is a classifier; attention ends in weights @ values",
    ),
    "not-a-product": Check(
        "queries meet keys, and weights meet values, in a product that sums over one axis",
        "flatten the channels into one axis, and multiply only one side by the weights",
    ),
    "mixed-scores": Check(
        "the scores of a head come from its own queries and keys",
        "nothing can be done without changing the model: talking heads are not lifted",
    ),
    "several-elements": Check(
        "each weight comes from one score",
        "shift or convolve queries and keys before their product, not the scores after it",
    ),
    "weight-reads-score": Check(
        "what changes the weights after the normaliser does not read the scores",
        "change the scores before the normaliser",
    ),
    "contradiction": Check(
        "shapes and types that a graph declares are those that its operations make",
        "export the model again; report it if it runs",
    ),
    "recursive-score": Check(
        "queries and keys do not depend on their own scores",
        "split the step that feeds scores back into the operands",
    ),
    "no-key-axis": Check(
        "exactly one operand of the scores runs over the keys",
        "take queries and keys from tensors with a sequence axis each",
    ),
    "several-value-axes": Check(
        "the output has one axis that only the values run over, its channels",
        "flatten the channels of the values into one axis before the product",
    ),
    "wrong-axis": Check(
        "the normaliser runs over the keys, the axis that the product with the values sums over",
        "normalise over the keys: softmax(dim=-1) of scores [batch, heads, queries, keys]",
    ),
    "partial-normaliser": Check(
        "the normaliser runs over the keys that the values are summed over, and at most 16 positions without a score "
        "or a value",
        "take no slice of the weights: mask the positions in the scores instead",
    ),
    "operand-layout": Check(
        "some tensor of the graph holds exactly the queries, the keys, or the values",
        "slice, flip or gather the operand before the projection, or keep the result in a tensor of its own",
    ),
    "output-layout": Check(
        "the axes of the output are batch, heads, queries and channels, or products of them",
        "merge the heads with a transpose and a reshape after the product",
    ),
    "inner-output": Check(
        "the product with the values is a value of the graph",
        "export the operation that contains it in its parts",
    ),
    "ill-typed": Check(
        "score, mask and weights are of the kinds that a Spec takes",
        "report this model: what was read off it is no valid Spec",
    ),
    "escaping-value": Check(
        "no inner value of the attention is read elsewhere",
        "do not return attention weights (output_attentions=False), or read them from another call",
    ),
    "rounded-values": Check(
        "nothing between queries, keys and values and the result is rounded to a narrow type and read back",
        'compute it without rounding: convert with --passes "unround, fuse", and a --budget for the change',
    ),
    "unproven": Check(
        "region and Spec can be run on random inputs and compared",
        "capture the model with a dynamic or shorter length; otherwise report it",
    ),
    "disproved": Check(
        "region and Spec agree on random inputs",
        "report this model: the lifted expression is wrong for it",
    ),
}
"""The checks of lifting by the kind of the refusal that a failure gives."""


def complete(refusal: Refusal) -> Refusal:
    """The refusal with a suggested edit, its own or that of its kind."""
    known = CHECKS.get(refusal.kind)
    return refusal if refusal.hint or known is None else replace(refusal, hint=known.edit)


def failed_check(refusal: Refusal) -> str:
    """The kind of a refusal and what it asks; empty for a kind of another room."""
    known = CHECKS.get(refusal.kind)
    return f"{refusal.kind}: {known.asks}" if known else ""


def nearest(graph: Graph, anchor: str, anchors: Sequence[Anchor]) -> str:
    """The nearest thing to attention that was recognised, and how far from there the site reaches.

    Args:
        graph: the graph.
        anchor: name of the native node where the site was found.
        anchors: the normalisers of the graph.
    """
    for found in anchors:
        if graph.describe(found.output).name == anchor:
            return _around(graph, found)
    for node in graph.nodes:
        if graph.describe(node.output).name == anchor:
            what = graph.describe(node.output).what
            if isinstance(node, FusedAttention | RefusedAttention):
                return f"the attention call {what}"
            if isinstance(node, Contract):
                return f"the product {anchor} of two activations"
            return what
    return ""


def passed_over(graph: Graph) -> tuple[str, ...]:
    """Every softmax of a graph, with what makes and reads it: where there is no site, why it is none."""
    found = (anchor for anchor in normalisers(graph) if anchor.kind == "softmax")
    places = ((_around(graph, anchor), graph.describe(anchor.output).source) for anchor in found)
    return tuple(f"{text} (at {source})" if source else text for text, source in places)


def _around(graph: Graph, anchor: Anchor) -> str:
    """A normaliser with the products before and behind it."""
    axis = "" if anchor.axis is None else f" over axis {anchor.axis} of {len(graph.infos[anchor.output].shape)}"
    scores = [product.contract.output for product in scores_behind(graph, anchor.source)]
    values = [product.output for product in products_after(graph, anchor.output)]
    before = f"of the product {graph.describe(scores[0]).name}" if scores else "with no product before it"
    behind = f"read by the product {graph.describe(values[0]).name}" if values else "with no product behind it"
    return f"{anchor.kind}{axis} ({graph.describe(anchor.output).name}) {before}, {behind}"
