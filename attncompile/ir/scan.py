"""Linear attention as a recurrence: a state that decays and takes in a key and a value at each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from attncompile.ir.evaluate import Environment, evaluate, index_grid
from attncompile.ir.expr import TRUE, Const, Expr, Index, Score, Weight, walk
from attncompile.ir.operation import Operation, Tensors, Types, attention_types, operand, result, same_size
from attncompile.ir.operators import Kind
from attncompile.ir.types import TensorType, concrete


def feature_map(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """φ of a ``Scan`` by name: ``identity``, ``elu1`` or ``relu``.

    Raises:
        ValueError: for any other name.
    """
    if name not in _FEATURES:
        raise ValueError(f"unknown feature map {name!r}; choose one of {', '.join(_FEATURES)}")
    return _FEATURES[name](tensor)


_FEATURES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "elu1": lambda x: torch.nn.functional.elu(x) + 1,
    "relu": torch.relu,
}


_SCAN_FIELDS = (("mask", Kind.BOOL, "bj"), ("decay", Kind.FLOAT, "h"), ("kv_head", Kind.INT, "h"))
"""The expressions of a ``Scan``: field, kind, and the indices it may read."""


@dataclass(frozen=True)
class Scan(Operation):
    """Causal linear attention with a fixed decay per head, in recurrent form

    ``S_t = decay(h) · S_{t-1} + m_t φ(k_t) v_tᵀ``, ``out_t = scale · φ(q_t)ᵀ S_t``, which in parallel form is
    ``out_i = scale · Σ_{j ≤ i} decay(h)^(i-j) m_j (φ(q_i)·φ(k_j)) v_j``, with ``m`` 1 where the mask holds, else
    0 (padding: a hidden key adds nothing, and the state decays over it). With ``normalize`` the result is
    divided by ``max(|scale · Σ_j …|, 1)`` of the same sum without ``v``.

    Attributes:
        query: ``[b,h,i,d]``; key: ``[b,g,j,d]``; value: ``[b,g,j,e]``; queries and keys have one length.
        mask: which keys count, a truth value over ``b j`` and captured tensors; it acts behind φ, since
            φ(0) need not be 0.
        decay: real expression over ``h`` and captured tensors, in (0, 1] (a plain factor, not its log).
        scale: factor of the output.
        feature: φ, one of ``identity``, ``elu1`` (ELU + 1), ``relu``.
        kv_head: KV head that a query head reads.

    Follows: Katharopoulos et al. 2020 (arXiv:2006.16236); decay as in RetNet (arXiv:2307.08621).
    """

    keyword: ClassVar[str] = "scan"

    query: str = operand("bhid")
    key: str = operand("bgjd")
    value: str = operand("bgje")
    mask: Expr = TRUE
    decay: Expr = Const(1.0)
    scale: float = 1.0
    feature: str = "identity"
    normalize: bool = False
    kv_head: Expr = Index("h")
    out: str = result("out")

    def infer(self, types: Types) -> dict[str, TensorType]:
        query, key, value = attention_types(types, "scan", self.query, self.key, self.value)
        same_size("scan", (self.query, query.axes[2]), (self.key, key.axes[2]))
        for name, kind, readable in _SCAN_FIELDS:
            self.check_kind(name, kind)
            expr = getattr(self, name)
            for node in walk(expr):
                if isinstance(node, Index | Score | Weight) and str(node) not in readable:
                    raise ValueError(
                        f"scan: {expr} reads {str(node)!r}; only {', '.join(readable)} have a meaning in its {name}"
                    )
        self.check_captured(types, frozenset("bhj"))
        self.check_kv_heads(self.kv_head, query.axes[1].size, self.key, key.axes[1])
        feature_map(self.feature, torch.zeros(()))
        return {self.out: TensorType((*query.axes[:3], value.axes[3]), query.dtype)}

    def decays(self, tensors: Tensors, heads: int, sizes: Mapping[str, int], dtype: torch.dtype) -> torch.Tensor:
        """The decay factor of each head ``[h]``."""
        device = tensors[self.query].device
        grid = {"h": torch.arange(heads, device=device)}
        return evaluate(self.decay, Environment(grid, sizes, tensors, dtype=dtype, device=device)).expand(heads)

    def reference(self, tensors: Tensors, sizes: Mapping[str, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        query = feature_map(self.feature, tensors[self.query].to(dtype))
        heads = self.kv_heads(query, sizes)
        key = self.key_features(tensors, sizes, dtype)[:, heads]
        value = tensors[self.value].to(dtype)[:, heads]
        length = query.shape[2]
        position = torch.arange(length, device=query.device)
        distance = (position[:, None] - position[None, :]).to(dtype)
        decay = self.decays(tensors, query.shape[1], sizes, dtype)[:, None, None]
        weights = torch.einsum("bhid,bhjd->bhij", query, key) * self.scale
        weights = torch.where(distance >= 0, weights * decay ** distance.clamp(min=0), torch.zeros((), dtype=dtype))
        out = torch.einsum("bhij,bhje->bhie", weights, value)
        if self.normalize:
            out = out / weights.sum(-1, keepdim=True).abs().clamp(min=1)
        return {self.out: out}

    def key_features(self, tensors: Tensors, sizes: Mapping[str, int], dtype: torch.dtype) -> torch.Tensor:
        """``m · φ(k)`` ``[b,g,j,d]``: the features of the keys, zero where the mask hides a key."""
        key = tensors[self.key]
        features = feature_map(self.feature, key.to(dtype))
        if self.mask == TRUE:
            return features
        grid = index_grid({"b": key.shape[0], "g": 1, "j": key.shape[2], "d": 1}, key.device)
        visible = evaluate(self.mask, Environment(grid, sizes, tensors, dtype=dtype, device=key.device))
        return torch.where(visible, features, torch.zeros((), dtype=dtype, device=key.device))

    def kv_heads(self, query: torch.Tensor, sizes: Mapping[str, int]) -> torch.Tensor:
        """KV head of each head of the query: int64 ``[h]``."""
        grid = {"h": torch.arange(query.shape[1], device=query.device)}
        return evaluate(self.kv_head, Environment(grid, sizes, device=query.device)).expand(query.shape[1])

    def flops(self, types: Types, sizes: Mapping[str, int]) -> int:
        query, value = types[self.query], types[self.value]
        tokens = math.prod(concrete(s, sizes) for s in query.sizes[:3])
        return 4 * tokens * concrete(query.sizes[3], sizes) * concrete(value.sizes[3], sizes)
