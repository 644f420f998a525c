"""Gradients of plain attention by cuDNN, from the result and log-sum-exp of any forward kernel.

On Hopper cuDNN keeps the gradient of the query in flight where generated kernels compute the products again, so it is
called for what it can express: one scale, everything visible or causal, one KV head for each head. Its sums of the
query's gradient have no fixed order, so generated kernels take over under ``torch.use_deterministic_algorithms``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from attncompile.codegen.triton.structure import dense
from attncompile.ir import Spec, simplify
from attncompile.ir.expr import SCORE, TRUE, Index

WIDEST = 128
"""Channels up to which cuDNN differentiates attention."""


@dataclass(frozen=True)
class PlainForm:
    """What cuDNN computes.

    Attributes:
        query, key, value: names of the operands.
        scale: factor of the scores.
        causal: whether a query sees the keys up to its own position, or all.
    """

    query: str
    key: str
    value: str
    scale: float
    causal: bool


def plain_form(spec: Spec) -> PlainForm | str:
    """The form of a Spec that has generated backward kernels, or why cuDNN cannot express its gradients."""
    parts = dense(spec)
    attend = parts.attend
    causal = simplify(Index("j") <= Index("i"))
    queries, keys = (simplify(of.sizes[2]) for of in (parts.query, parts.key))
    operands = (attend.query, attend.key, attend.value)
    objections = (
        (attend.norm.kind != "softmax", f"it normalises by softmax, not by {attend.norm.kind}"),
        (parts.score != SCORE, f"it scales the score, and does nothing else to it: {attend.score}"),
        (parts.edit is not None, f"it has no edits of the weights: {attend.weight}"),
        (parts.sink is not None, f"it has no sinks: {attend.sink}"),
        (parts.mask not in (TRUE, causal), f"it sees everything or what is before, not {attend.mask}"),
        (parts.mask == causal and queries != keys, "it is causal for as many keys as queries"),
        (simplify(attend.kv_head) != Index("h"), f"it is called with a KV head for each head, not {attend.kv_head}"),
        (bool(attend.lse) and attend.lse in spec.outputs, "it takes no gradient of the log-sum-exp"),
        (len({*operands}) < 3, "query, key and value are not three tensors"),
        (
            any(
                not 0 < int(str(of.sizes[3])) <= WIDEST or int(str(of.sizes[3])) % 8
                for of in (parts.query, parts.value)
            ),
            f"it takes multiples of 8 channels up to {WIDEST}",
        ),
    )
    for holds, reason in objections:
        if holds:
            return reason
    return PlainForm(*operands, parts.scale, parts.mask != TRUE)


def serves(form: PlainForm, tensors: Mapping[str, torch.Tensor], given: torch.Tensor) -> bool:
    """Whether cuDNN is there, takes tensors like these, and may choose its order of summation."""
    query, key, value = (tensors[name].detach() for name in (form.query, form.key, form.value))
    if not query.is_cuda or torch.version.hip is not None or torch.are_deterministic_algorithms_enabled():
        return False
    if query.dtype not in (torch.float16, torch.bfloat16) or 0 in (query.numel(), value.numel()):
        return False
    if any(tensor.stride(3) != 1 for tensor in (query, key, value, given)):
        return False
    if not torch.backends.cudnn.is_available() or torch.cuda.get_device_capability(query.device)[0] < 9:
        return False
    asked = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, form.causal, False)
    return torch.backends.cuda.can_use_cudnn_attention(asked)


def gradients(
    form: PlainForm,
    tensors: Mapping[str, torch.Tensor],
    given: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The gradients of query, key and value by name.

    Args:
        form: what is computed.
        tensors: the inputs by name.
        given: gradient of the result.
        out, lse: the result ``[b,h,i,e]`` and its log-sum-exp ``[b,h,i]`` in float32.
    """
    query, key, value = (tensors[name] for name in (form.query, form.key, form.value))
    unused = torch.zeros((), dtype=torch.int64, device=query.device)  # seed and offset of a dropout of 0
    found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        given,
        query,
        key,
        value,
        out,
        lse.contiguous()[..., None],
        unused,
        unused,
        None,
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        form.causal,
        scale=form.scale,
    )
    return dict(zip((form.query, form.key, form.value), found, strict=True))
