"""Linear attention as a recurrence: a state that decays and takes in a key and a value at each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from attncompile.ir.evaluate import Environment, evaluate, index_grid
from attncompile.ir.expr import TRUE, Const, Expr, Index, Score, Weight, walk
from attncompile.ir.operation import (
    Operation,
    Tensors,
    Types,
    attention_types,
    find,
    operand,
    optional_operand,
    result,
    same_size,
)
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
    """Causal linear attention: a state that decays and takes in one key and value at each step

    ``R_t = decay(h) · exp(gate_t) ⊙ S_{t-1}``, ``S_t = R_t + m_t φ(k_t) u_tᵀ``, ``out_t = scale · φ(q_t)ᵀ S_t``, with
    ``u_t = v_t``; where there is a rate, the delta rule is in force, ``u_t = rate_t (v_t − R_tᵀ φ(k_t))``. ``m`` is 1
    where the mask holds, else 0 (padding: a hidden key adds nothing, and the state decays over it). The state is
    ``past`` before the first step, or zero.

    Without gate, rate, past and state (``fixed``) the parallel form is
    ``out_i = scale · Σ_{j ≤ i} decay(h)^(i-j) m_j (φ(q_i)·φ(k_j)) v_j``. Of that one alone there is ``normalize``:
    the result is divided by ``max(|scale · Σ_j …|, 1)`` of the same sum without ``v``.

    Attributes:
        query: ``[b,h,i,d]``; key: ``[b,g,j,d]``; value: ``[b,g,j,e]``; queries and keys have one length.
        mask: which keys count, a truth value over ``b j`` and captured tensors; it acts behind φ, since
            φ(0) need not be 0.
        decay: real expression over ``h`` and captured tensors, in (0, 1] (a plain factor, not its log).
        scale: factor of the output.
        feature: φ, one of ``identity``, ``elu1`` (ELU + 1), ``relu``.
        kv_head: KV head that a query head reads.
        gate: ``[b,g,j,d]``, the logarithm of what the state decays by at a step, at most 0; of one channel
            (``[b,g,j,1]``) where all key channels decay alike.
        rate: ``[b,g,j]``, from 0 to 1: how much of the difference to what the state holds is written.
        past: ``[b,g,d,e]``, the state before the first step.
        state: ``[b,g,d,e]``, the state after the last one, in the dtype of ``past``, or of the queries without one.

    Follows: Katharopoulos et al. 2020 (arXiv:2006.16236); decay as in RetNet (arXiv:2307.08621), gates as in GLA
    (arXiv:2312.06635), the delta rule as in arXiv:2406.06484 and arXiv:2412.06464; ``LinearAttention`` of ONNX 27.
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
    gate: str = optional_operand("bgjd")
    rate: str = optional_operand("bgj")
    past: str = optional_operand("bgde")
    state: str = result("")

    @property
    def fixed(self) -> bool:
        """Whether the decay is the same at each step and nothing else is kept: only then there is a parallel form."""
        return not (self.gate or self.rate or self.past or self.state)

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
        self._check_step(types, key, value)
        made = {self.out: TensorType((*query.axes[:3], value.axes[3]), query.dtype)}
        if self.state:
            axes = (*key.axes[:2], key.axes[3], value.axes[3])
            made[self.state] = TensorType(axes, types[self.past].dtype if self.past else query.dtype)
        return made

    def _check_step(self, types: Types, key: TensorType, value: TensorType) -> None:
        """Check what only a step that is not fixed has.

        Raises:
            ValueError: naming both tensors, axes and sizes, or what does not go together.
        """
        if self.normalize and not self.fixed:
            raise ValueError("scan: normalize goes with a fixed decay alone; leave out gate, rate, past and state")
        if self.state and Index("h") in walk(self.decay) and self.kv_head != Index("h"):
            raise ValueError(
                f"scan: the decay {self.decay} differs by query head, but the state is one for each KV head "
                f"({self.kv_head}); leave the state out, or give each query head a KV head of its own"
            )
        fits = {
            self.gate: (key.axes[0], key.axes[1], key.axes[2], key.axes[3]),
            self.rate: (key.axes[0], key.axes[1], key.axes[2]),
            self.past: (key.axes[0], key.axes[1], key.axes[3], value.axes[3]),
        }
        for name, axes in fits.items():
            if not name:
                continue
            found = find(types, name, "scan", len(axes))
            for number, (axis, wanted) in enumerate(zip(found.axes, axes, strict=True)):
                if not (name == self.gate and number == 3 and axis.size == Const(1)):
                    same_size("scan", (name, axis), (self.value if wanted is value.axes[3] else self.key, wanted))

    def decays(self, tensors: Tensors, heads: int, sizes: Mapping[str, int], dtype: torch.dtype) -> torch.Tensor:
        """The decay factor of each head ``[h]``."""
        device = tensors[self.query].device
        grid = {"h": torch.arange(heads, device=device)}
        return evaluate(self.decay, Environment(grid, sizes, tensors, dtype=dtype, device=device)).expand(heads)

    def reference(self, tensors: Tensors, sizes: Mapping[str, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        if not self.fixed:
            return self._recurrence(tensors, sizes, dtype)
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

    def _recurrence(self, tensors: Tensors, sizes: Mapping[str, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Step by step, one state ``[b,h,d,e]`` for each query head."""
        query = feature_map(self.feature, tensors[self.query].to(dtype))
        heads = self.kv_heads(query, sizes)

        def of_heads(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(dtype)[:, heads]

        key, value = of_heads(self.key_features(tensors, sizes, dtype)), of_heads(tensors[self.value])
        decay = self.decays(tensors, query.shape[1], sizes, dtype)[:, None, None]
        state = query.new_zeros(*key.shape[:2], key.shape[3], value.shape[3])
        state = of_heads(tensors[self.past]) if self.past else state
        gate = of_heads(tensors[self.gate]).exp() if self.gate else None
        rate = of_heads(tensors[self.rate]) if self.rate else None
        made = []
        for step in range(query.shape[2]):
            state = state * decay if gate is None else state * (decay * gate[:, :, step, :, None])
            written, row = key[:, :, step], value[:, :, step]
            if rate is not None:
                held = torch.einsum("bhde,bhd->bhe", state, written)
                row = rate[:, :, step, None] * (row - held)
            state = state + written[..., None] * row[..., None, :]
            made.append(self.scale * torch.einsum("bhd,bhde->bhe", query[:, :, step], state))
        found = {self.out: torch.stack(made, 2) if made else value[:, :, :0]}
        if self.state:
            # KV heads share their state; the first query head of each has it
            groups = torch.arange(tensors[self.key].shape[1], device=heads.device)
            found[self.state] = state[:, (heads[None, :] == groups[:, None]).int().argmax(1)]
        return found

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
