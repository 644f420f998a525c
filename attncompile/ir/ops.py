"""The operations of a Spec.

Each is a frozen dataclass whose fields are marked as operands (names of tensors), results or attributes; from
these marks come its printed form, its parser and the verifier. ``reference`` is the definition: plain
PyTorch, differentiable, in whatever float dtype it is given.
"""

from __future__ import annotations

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from attncompile.ir import e4m3
from attncompile.ir.evaluate import Environment, evaluate, index_grid
from attncompile.ir.expr import (
    SCORE,
    TOTAL,
    TRUE,
    WEIGHT,
    Const,
    Expr,
    Index,
    Load,
    Score,
    Size,
    Total,
    Weight,
    loads,
    substitute,
    walk,
)
from attncompile.ir.operators import Kind
from attncompile.ir.simplify import simplify
from attncompile.ir.types import DTYPES, Axis, TensorType, concrete, element_kind

Types = Mapping[str, TensorType]
Tensors = Mapping[str, torch.Tensor]


def operand(axes: str) -> Any:
    """A field that names a tensor with these axes."""
    return dataclasses.field(metadata={"role": "operand", "axes": axes})


def optional_operand(axes: str) -> Any:
    """A field that names a tensor with these axes, or is empty."""
    return dataclasses.field(default="", metadata={"role": "operand", "axes": axes})


def result(default: str) -> Any:
    """A field that names a result; an empty name means it is not computed."""
    return dataclasses.field(default=default, metadata={"role": "result"})


@dataclass(frozen=True)
class Operation(ABC):
    """One step of a Spec."""

    keyword: ClassVar[str]

    def operands(self) -> tuple[str, ...]:
        """Names of the tensors it reads, captured ones last."""
        named = [
            getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata.get("role") == "operand"
        ]
        return tuple(dict.fromkeys([n for n in named if n] + [load.tensor for load in self.captured()]))

    def results(self) -> tuple[str, ...]:
        """Names of the tensors it makes."""
        named = [
            getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata.get("role") == "result"
        ]
        return tuple(name for name in named if name)

    def expressions(self) -> tuple[Expr, ...]:
        """The index expressions among its attributes."""
        values = [getattr(self, f.name) for f in dataclasses.fields(self)]
        return tuple(value for value in values if isinstance(value, Expr))

    def captured(self) -> tuple[Load, ...]:
        """Loads of tensors in its expressions."""
        return tuple(dict.fromkeys(load for expr in self.expressions() for load in loads(expr)))

    @abstractmethod
    def infer(self, types: Types) -> dict[str, TensorType]:
        """Types of the results.

        Raises:
            ValueError: when the operands do not fit; names the tensor, the axis and both sizes.
        """

    @abstractmethod
    def reference(
        self, tensors: Tensors, sizes: Mapping[str, int], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """The results, computed plainly in ``dtype``."""

    def flops(self, types: Types, sizes: Mapping[str, int]) -> int:
        """Floating-point operations (a multiply-add counts 2); 0 where the work is negligible."""
        return 0

    def check_captured(self, types: Types, symbols: frozenset[str]) -> None:
        """Check the expressions: every load fits its tensor, and only the given symbols occur.

        Raises:
            ValueError: naming the load or symbol at fault.
        """
        for expr in self.expressions():
            for node in walk(expr):
                match node:
                    case Load(tensor, indices, element):
                        if tensor not in types:
                            raise ValueError(
                                f"{self.keyword}: {expr} loads {tensor!r}, which is not a tensor of the "
                                f"Spec ({', '.join(sorted(types))})"
                            )
                        if (
                            len(types[tensor].axes) != len(indices)
                            or element_kind(types[tensor].dtype) is not element
                        ):
                            raise ValueError(
                                f"{self.keyword}: {node} ({element}) does not fit {tensor}{types[tensor]}"
                            )
                        for index in indices:
                            if index.kind is not Kind.INT:
                                raise ValueError(
                                    f"{self.keyword}: index {index} of {node} is {index.kind}, should be int"
                                )
                    case Index() | Score() | Weight() | Total() if str(node) not in symbols:
                        raise ValueError(
                            f"{self.keyword}: {expr} reads {str(node)!r}; only "
                            f"{', '.join(sorted(symbols))} have a meaning here"
                        )

    def check_kind(self, name: str, kind: Kind) -> None:
        """Check that the expression of a field has a kind.

        Raises:
            ValueError: naming the field, the expression and both kinds.
        """
        expr = getattr(self, name)
        if expr.kind is not kind:
            raise ValueError(f"{self.keyword}: {name} {expr} is {expr.kind}, should be {kind}")

    def check_kv_heads(self, kv_head: Expr, heads: Expr, key: str, groups: Axis) -> None:
        """Check that every query head reads a KV head that exists, where the numbers are constant.

        Raises:
            ValueError: naming the expression, the head it reaches and the number of KV heads.
        """
        symbolic = any(isinstance(node, Size) for node in walk(kv_head))
        if symbolic or not isinstance(heads, Const) or not isinstance(groups.size, Const):
            return
        # one number at a time: a tensor would have no values under a fake tensor mode
        found = [
            concrete(substitute(kv_head, {Index("h"): Const(head)}), {}) for head in range(int(heads.value))
        ]
        least, last = min(found), max(found)
        if least < 0 or last >= groups.size.value:
            raise ValueError(
                f"{self.keyword}: kv_head {kv_head} of {heads} query heads reaches from {least} to {last}, "
                f"but axis {groups.name} of {key} is {groups.size}"
            )


def same_size(what: str, left: tuple[str, Axis], right: tuple[str, Axis]) -> None:
    """Require two axes to be of one size.

    Raises:
        ValueError: naming both tensors, axes and sizes.
    """
    (left_name, left_axis), (right_name, right_axis) = left, right
    if simplify(left_axis.size) != simplify(right_axis.size):
        raise ValueError(
            f"{what}: axis {left_axis.name} of {left_name} is {left_axis.size}, "
            f"but axis {right_axis.name} of {right_name} is {right_axis.size}"
        )


def find(types: Types, name: str, what: str, rank: int) -> TensorType:
    """The type of a tensor, checked for its rank.

    Raises:
        ValueError: when the tensor is missing or has another rank.
    """
    if name not in types:
        raise ValueError(f"{what} reads {name!r}, which nothing defines; there are {sorted(types)}")
    if len(types[name].axes) != rank:
        raise ValueError(f"{what}: {name} should have {rank} axes, but is {name}{types[name]}")
    return types[name]


NORMALIZERS = ("softmax", "sigmoid", "relu", "none", "sum", "l1")
DIVIDING = ("sum", "l1")
"""Normalisers that divide by a sum over the keys, which a ``divisor`` may edit."""

HIDING_NOTHING = ("none", "sum", "l1")
"""Normalisers for which −∞ hides no position: their weights are multiples of the logits."""


@dataclass(frozen=True)
class Normalizer:
    """How scores become weights.

    Attributes:
        kind: ``softmax`` over the keys; pointwise ``sigmoid``, ``relu`` or ``none`` (the logit is the weight);
            ``sum`` or ``l1``: the logit divided by the sum over the keys of the logits or of their absolute values.
        dtype: float dtype in which the original computes it.
        empty: what a softmax row without any visible key gives when the masked logit is −∞: ``nan`` or
            ``zero``.
        weights: dtype in which the weights of a softmax meet the values, ``float8_e4m3``; empty when that is the
            dtype of the values. See :func:`attncompile.ir.e4m3.weight_rounding`.
    """

    kind: Literal["softmax", "sigmoid", "relu", "none", "sum", "l1"] = "softmax"
    dtype: str = "float32"
    empty: Literal["nan", "zero"] = "nan"
    weights: Literal["", "float8_e4m3"] = ""

    def __post_init__(self) -> None:
        floats = tuple(dtype for dtype in DTYPES if element_kind(dtype) is Kind.FLOAT)
        for name, allowed in (
            ("kind", NORMALIZERS),
            ("dtype", floats),
            ("empty", ("nan", "zero")),
            ("weights", ("", "float8_e4m3")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r} of a normaliser; choose one of {', '.join(allowed)}"
                )
        if self.weights and self.kind != "softmax":
            raise ValueError(f"only the weights of a softmax are rounded, the normaliser is {self.kind}")

    @property
    def plain_softmax(self) -> bool:
        """Whether it is a softmax whose weights are not rounded: what most operators compute."""
        return self.kind == "softmax" and not self.weights

    def __str__(self) -> str:
        weights = f", weights {self.weights}" if self.weights else ""
        return f"{self.kind} ({self.dtype}){weights}" + (", empty rows zero" if self.empty == "zero" else "")

    @classmethod
    def parse(cls, text: str) -> Normalizer:
        """Read the printed form.

        Raises:
            ValueError: for text that is no normaliser.
        """
        match = re.fullmatch(r"(\w+) \((\w+)\)(?:, weights (\w+))?(, empty rows zero)?", text.strip())
        if match is None:
            raise ValueError(
                f"cannot read the normaliser {text!r}; it looks like 'softmax (float32)', perhaps with "
                "', weights float8_e4m3' or ', empty rows zero' behind it"
            )
        return cls(match[1], match[2], "zero" if match[4] else "nan", match[3] or "")  # type: ignore[arg-type]


_POINTWISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "none": lambda logits: logits,
    "sum": lambda logits: logits,
    "l1": lambda logits: logits,
}
"""What a normaliser does to each logit, before any division."""

NO_SINK = Const(-math.inf)
"""The sink of a softmax over the keys alone."""

_ATTEND_FIELDS = (
    ("score", Kind.FLOAT, ("b", "h", "i", "j", "s", "a tensor")),
    ("mask", Kind.BOOL, ("b", "h", "i", "j", "a tensor")),
    ("fill", Kind.FLOAT, ("b", "h", "i", "j", "s", "a tensor")),
    ("weight", Kind.FLOAT, ("b", "h", "i", "j", "w", "a tensor")),
    ("sink", Kind.FLOAT, ("b", "h", "i", "a tensor")),
    ("divisor", Kind.FLOAT, ("b", "h", "i", "t", "a tensor")),
    ("kv_head", Kind.INT, ("h",)),
)
"""The expressions of an ``Attend``: field, kind, and what it may read."""


@dataclass(frozen=True)
class Attend(Operation):
    """``out[b,h,i,e] = Σ_j weight(norm_j(logit[b,h,i,j])) · v[b,g,j,e]`` with ``g = kv_head(h)``.

    The raw score is ``s = Σ_d q[b,h,i,d] · k[b,g,j,d]``; the logit is ``score(s, b, h, i, j)`` where the mask
    holds, else ``fill``. A softmax with a ``sink`` counts one key more, whose logit is the sink and whose value is
    zero: ``weight_j = exp(logit_j) / (Σ_j exp(logit_j) + exp(sink))``. ``lse`` is the log of that denominator (natural
    log, softmax only). The normalisers ``sum`` and ``l1`` divide the logits by ``divisor(t)``, where ``t`` is
    ``Σ_j logit_j`` or ``Σ_j |logit_j|``.

    Attributes:
        query: ``[b,h,i,d]``; key: ``[b,g,j,d]``; value: ``[b,g,j,e]``.
        score: real expression over ``s b h i j`` and captured tensors; holds the scale.
        mask: truth value over ``b h i j`` and captured tensors; true is visible.
        fill: logit of a masked position, −∞ unless the model uses a finite number; may read the score.
        weight: edit of the normalised weight, an expression over ``w b h i j`` (``w`` when there is none).
        sink: logit of the key without a value, over ``b h i`` and captured tensors; −∞ when there is none.
        divisor: what ``sum`` and ``l1`` divide by, over ``t b h i`` and captured tensors; ``t`` itself when the sum
            is not edited.
        kv_head: KV head that a query head reads, an integer expression over ``h``.
        norm: the normaliser.
        out, lse: result names; an empty ``lse`` is not computed.

    Follows: Vaswani et al. 2017 (arXiv:1706.03762), grouped heads as in arXiv:2305.13245, sinks as in gpt-oss
    (arXiv:2508.10925); a sink of 0 is softmax1 (Miller 2023).
    """

    keyword: ClassVar[str] = "attend"

    query: str = operand("bhid")
    key: str = operand("bgjd")
    value: str = operand("bgje")
    score: Expr = SCORE
    mask: Expr = TRUE
    fill: Expr = Const(-math.inf)
    weight: Expr = WEIGHT
    sink: Expr = NO_SINK
    kv_head: Expr = Index("h")
    norm: Normalizer = Normalizer()
    divisor: Expr = TOTAL
    out: str = result("out")
    lse: str = result("")

    def infer(self, types: Types) -> dict[str, TensorType]:
        query = find(types, self.query, "attend", 4)
        key = find(types, self.key, "attend", 4)
        value = find(types, self.value, "attend", 4)
        same_size("attend", (self.query, query.axes[3]), (self.key, key.axes[3]))
        same_size("attend", (self.query, query.axes[0]), (self.key, key.axes[0]))
        for axis in range(3):
            same_size("attend", (self.key, key.axes[axis]), (self.value, value.axes[axis]))
        self.check_captured(types, frozenset("bhijswt"))
        for name, kind, readable in _ATTEND_FIELDS:
            self.check_kind(name, kind)
            expr = getattr(self, name)
            for node in walk(expr):
                what = "a tensor" if isinstance(node, Load) else str(node)
                if isinstance(node, Index | Score | Weight | Total | Load) and what not in readable:
                    raise ValueError(f"attend: {name} {expr} may not read {what}, only {', '.join(readable)}")
        self.check_kv_heads(self.kv_head, query.axes[1].size, self.key, key.axes[1])
        if self.lse and self.norm.kind != "softmax":
            raise ValueError(f"attend: only softmax has a log-sum-exp, the normaliser is {self.norm}")
        if self.sink != NO_SINK and self.norm.kind != "softmax":
            raise ValueError(f"attend: only softmax has a sink ({self.sink}), the normaliser is {self.norm}")
        if self.divisor != TOTAL and self.norm.kind not in DIVIDING:
            raise ValueError(
                f"attend: only {' and '.join(DIVIDING)} divide by a sum ({self.divisor}), the normaliser is {self.norm}"
            )
        if self.norm.kind in HIDING_NOTHING and self.mask != TRUE and self.fill == NO_SINK:
            raise ValueError(
                f"attend: a masked position of the normaliser {self.norm} needs a finite fill, such as 0.0; with −∞ "
                "the result would be infinite"
            )
        axes = (*query.axes[:3], value.axes[3])
        made = {self.out: TensorType(axes, query.dtype)}
        if self.lse:
            made[self.lse] = TensorType(query.axes[:3], "float32")
        return made

    def environment(
        self, tensors: Tensors, sizes: Mapping[str, int], dtype: torch.dtype, **symbols: Any
    ) -> Environment:
        """Index grids ``b h i j`` over the map of this call, with the captured tensors."""
        query, key = tensors[self.query], tensors[self.key]
        grid = index_grid(
            {"b": query.shape[0], "h": query.shape[1], "i": query.shape[2], "j": key.shape[2]}, query.device
        )
        return Environment(grid, sizes, tensors, dtype=dtype, device=query.device, **symbols)

    def logits(self, tensors: Tensors, sizes: Mapping[str, int], dtype: torch.dtype) -> torch.Tensor:
        """The normaliser's argument ``[b,h,i,j]``, masked positions filled."""
        query, key = tensors[self.query].to(dtype), tensors[self.key].to(dtype)
        heads = self.kv_heads(query.shape[1], query.device, sizes)
        raw = torch.einsum("bhid,bhjd->bhij", query, key[:, heads])
        environment = self.environment(tensors, sizes, dtype, score=raw)
        score = evaluate(self.score, environment).to(dtype).expand(raw.shape)
        if self.mask == TRUE:
            return score
        visible = evaluate(self.mask, environment)
        return torch.where(visible, score, evaluate(self.fill, environment).to(dtype))

    def sinks(self, tensors: Tensors, sizes: Mapping[str, int], dtype: torch.dtype) -> torch.Tensor:
        """The sink's logit, broadcastable to ``[b,h,i,1]``."""
        return evaluate(self.sink, self.environment(tensors, sizes, dtype)).to(dtype)

    def kv_heads(self, heads: int, device: torch.device | str, sizes: Mapping[str, int]) -> torch.Tensor:
        """KV head of each query head: int64 ``[h]``."""
        grid = {"h": torch.arange(heads, device=device)}
        return evaluate(self.kv_head, Environment(grid, sizes, device=device)).expand(heads)

    def reference(
        self, tensors: Tensors, sizes: Mapping[str, int], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        logits = self.logits(tensors, sizes, dtype)
        made: dict[str, torch.Tensor] = {}
        if self.norm.kind == "softmax":
            keys = logits.shape[-1]
            if self.sink != NO_SINK:
                logits = torch.cat(
                    [logits, self.sinks(tensors, sizes, dtype).expand(*logits.shape[:3], 1)], dim=-1
                )
            if self.lse:
                made[self.lse] = torch.logsumexp(logits, dim=-1)
            if self.norm.empty == "zero":
                # the logits are replaced too: the gradient through a softmax of NaN would be NaN
                empty = (logits == -math.inf).all(dim=-1, keepdim=True)
                weights = torch.softmax(logits.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
            else:
                weights = torch.softmax(logits, dim=-1)
            weights = weights[..., :keys]
            if self.norm.weights:
                weights = weights * e4m3.weight_rounding(logits[..., :keys])
        else:
            weights = _POINTWISE[self.norm.kind](logits)
        if self.norm.kind in DIVIDING:
            parts = weights.abs() if self.norm.kind == "l1" else weights
            total = parts.sum(dim=-1, keepdim=True)
            weights = weights / evaluate(self.divisor, self.environment(tensors, sizes, dtype, total=total))
        if self.weight != WEIGHT:
            weights = evaluate(self.weight, self.environment(tensors, sizes, dtype, weight=weights)).expand(
                weights.shape
            )
        value = tensors[self.value].to(dtype)[:, self.kv_heads(logits.shape[1], logits.device, sizes)]
        made[self.out] = torch.einsum("bhij,bhje->bhie", weights, value)
        return made

    def flops(self, types: Types, sizes: Mapping[str, int]) -> int:
        query, value = types[self.query], types[self.value]
        pairs = math.prod(concrete(s, sizes) for s in query.sizes[:3]) * concrete(value.sizes[2], sizes)
        return 2 * pairs * (concrete(query.sizes[3], sizes) + concrete(value.sizes[3], sizes))


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
        query = find(types, self.query, "scan", 4)
        key = find(types, self.key, "scan", 4)
        value = find(types, self.value, "scan", 4)
        same_size("scan", (self.query, query.axes[3]), (self.key, key.axes[3]))
        same_size("scan", (self.query, query.axes[0]), (self.key, key.axes[0]))
        same_size("scan", (self.query, query.axes[2]), (self.key, key.axes[2]))
        for axis in range(3):
            same_size("scan", (self.key, key.axes[axis]), (self.value, value.axes[axis]))
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

    def decays(
        self, tensors: Tensors, heads: int, sizes: Mapping[str, int], dtype: torch.dtype
    ) -> torch.Tensor:
        """The decay factor of each head ``[h]``."""
        device = tensors[self.query].device
        grid = {"h": torch.arange(heads, device=device)}
        return evaluate(self.decay, Environment(grid, sizes, tensors, dtype=dtype, device=device)).expand(
            heads
        )

    def reference(
        self, tensors: Tensors, sizes: Mapping[str, int], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        query = feature_map(self.feature, tensors[self.query].to(dtype))
        heads = self.kv_heads(query, sizes)
        key = self.key_features(tensors, sizes, dtype)[:, heads]
        value = tensors[self.value].to(dtype)[:, heads]
        length = query.shape[2]
        position = torch.arange(length, device=query.device)
        distance = (position[:, None] - position[None, :]).to(dtype)
        decay = self.decays(tensors, query.shape[1], sizes, dtype)[:, None, None]
        weights = torch.einsum("bhid,bhjd->bhij", query, key) * self.scale
        weights = torch.where(
            distance >= 0, weights * decay ** distance.clamp(min=0), torch.zeros((), dtype=dtype)
        )
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


@dataclass(frozen=True)
class Position(Operation):
    """Rotary position map of query or key, on the first ``channels`` of the ``d`` axis; the others pass
    through.

    ``out[d] = x[d]·cos(b,i,d) + partner(x, d)·sin(b,i,d)``, where the partner of channel ``d`` is, with
    ``R = channels``: for ``half`` ``−x[d + R/2]`` in the first half and ``x[d − R/2]`` in the second; for
    ``interleaved`` ``−x[d + 1]`` at even and ``x[d − 1]`` at odd channels.

    Attributes:
        tensor: ``[b,h,i,d]``.
        cos, sin: real expressions over ``b i d`` and captured tensors.
        channels: number of rotated channels ``R`` (even).
        convention: ``half`` (Llama, NeoX) or ``interleaved`` (GPT-J).

    Follows: Su et al. 2021 (arXiv:2104.09864).
    """

    keyword: ClassVar[str] = "position"

    tensor: str = operand("bhid")
    cos: Expr = Const(1.0)
    sin: Expr = Const(0.0)
    channels: int = 0
    convention: str = "half"
    out: str = result("out")

    def infer(self, types: Types) -> dict[str, TensorType]:
        found = find(types, self.tensor, "position", 4)
        size = simplify(found.axes[3].size)
        if self.channels % 2 or self.channels < 0 or (isinstance(size, Const) and self.channels > size.value):
            raise ValueError(f"position: channels must be even and at most {size}, got {self.channels}")
        if self.convention not in ("half", "interleaved"):
            raise ValueError(f"position: unknown convention {self.convention!r}; choose half or interleaved")
        self.check_kind("cos", Kind.FLOAT)
        self.check_kind("sin", Kind.FLOAT)
        self.check_captured(types, frozenset("bid"))
        return {self.out: found}

    def reference(
        self, tensors: Tensors, sizes: Mapping[str, int], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        x = tensors[self.tensor].to(dtype)
        rotated, rest = x[..., : self.channels], x[..., self.channels :]
        grid = index_grid({"b": x.shape[0], "h": 1, "i": x.shape[2], "d": self.channels}, x.device)
        environment = Environment(grid, sizes, tensors, dtype=dtype, device=x.device)
        cos, sin = evaluate(self.cos, environment), evaluate(self.sin, environment)
        if self.convention == "half":
            first, second = rotated.chunk(2, dim=-1)
            partner = torch.cat([-second, first], dim=-1)
        else:
            even, odd = rotated[..., 0::2], rotated[..., 1::2]
            partner = torch.stack([-odd, even], dim=-1).flatten(-2)
        return {self.out: torch.cat([rotated * cos + partner * sin, rest], dim=-1)}


@dataclass(frozen=True)
class Project(Operation):
    """Linear map of the model's state into heads.

    ``out[b,h,i,d] = Σ_c tensor[b,i,c] · kernel[h·D + d, c] + bias[h·D + d]``.

    Attributes:
        tensor: ``[b,i,c]``; kernel: ``[o,c]`` with ``o = heads · D``; bias: ``[o]`` or empty.
        heads: number of heads that the output axis is split into.
    """

    keyword: ClassVar[str] = "project"

    tensor: str = operand("bic")
    kernel: str = operand("oc")
    bias: str = optional_operand("o")
    heads: int = 1
    out: str = result("out")

    def infer(self, types: Types) -> dict[str, TensorType]:
        state, kernel = find(types, self.tensor, "project", 3), find(types, self.kernel, "project", 2)
        same_size("project", (self.tensor, state.axes[2]), (self.kernel, kernel.axes[1]))
        if self.bias:
            same_size(
                "project",
                (self.kernel, kernel.axes[0]),
                (self.bias, find(types, self.bias, "project", 1).axes[0]),
            )
        outputs = simplify(kernel.axes[0].size)
        if self.heads < 1:
            raise ValueError(f"project: heads must be at least 1, got {self.heads}")
        if isinstance(outputs, Const) and outputs.value % self.heads:
            raise ValueError(f"project: {outputs} outputs do not split into {self.heads} heads")
        channels = simplify(outputs // self.heads)
        return {
            self.out: TensorType(
                (state.axes[0], Axis("h", Const(self.heads)), state.axes[1], Axis("d", channels)), state.dtype
            )
        }

    def reference(
        self, tensors: Tensors, sizes: Mapping[str, int], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        made = tensors[self.tensor].to(dtype) @ tensors[self.kernel].to(dtype).T
        if self.bias:
            made = made + tensors[self.bias].to(dtype)
        return {self.out: made.reshape(*made.shape[:2], self.heads, -1).transpose(1, 2)}

    def flops(self, types: Types, sizes: Mapping[str, int]) -> int:
        return 2 * types[self.tensor].elements(sizes) * concrete(types[self.kernel].sizes[0], sizes)


@dataclass(frozen=True)
class Cache(Operation):
    """Keys or values of earlier steps, followed by the new ones along ``j``.

    Several groups of keys that one softmax runs over, such as blocks of a window and global tokens, are put together
    the same way, one after the other.

    Attributes:
        past: ``[b,g,p,d]``; new: ``[b,g,i,d]``.
    """

    keyword: ClassVar[str] = "cache"

    past: str = operand("bgpd")
    new: str = operand("bgid")
    out: str = result("out")

    def infer(self, types: Types) -> dict[str, TensorType]:
        past, new = find(types, self.past, "cache", 4), find(types, self.new, "cache", 4)
        for axis in (0, 1, 3):
            same_size("cache", (self.past, past.axes[axis]), (self.new, new.axes[axis]))
        length = simplify(past.axes[2].size + new.axes[2].size)
        return {self.out: TensorType((new.axes[0], new.axes[1], Axis("j", length), new.axes[3]), new.dtype)}

    def reference(
        self, tensors: Tensors, sizes: Mapping[str, int], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        return {self.out: torch.cat([tensors[self.past].to(dtype), tensors[self.new].to(dtype)], dim=2)}


ROUNDED_DTYPES = ("int8", "float8_e4m3")
"""What ``Quantize`` rounds to."""


@dataclass(frozen=True)
class Quantize(Operation):
    """Round a tensor to a narrow type with one scale per block of positions; the result is read dequantised.

    ``out = scale · round(x' / scale)`` over each block of ``block`` positions and all channels of one head, with
    ``x' = x − mean_j x`` when ``smooth``. For ``int8`` the scale is ``max|x'| / 127`` and numbers are whole; for
    ``float8_e4m3`` it is the least power of two that brings ``|x'|`` to at most 448, and numbers have four
    significant bits.

    Smoothing keys obeys a law: a logit ``a·(q·k_j) + c_j`` with ``a`` the same for all keys becomes less by
    ``a·(q·mean)``, which is the same for all keys too, and a softmax does not see it.

    Attributes:
        tensor: ``[b,h,i,d]``.
        dtype: ``int8`` or ``float8_e4m3``.
        block: positions per scale.
        smooth: subtract the mean over positions first.

    Follows: SageAttention (arXiv:2410.02367); e4m3 as in :mod:`attncompile.ir.e4m3`.
    """

    keyword: ClassVar[str] = "quantize"

    tensor: str = operand("bhid")
    dtype: str = "int8"
    block: int = 64
    smooth: bool = False
    out: str = result("out")

    def infer(self, types: Types) -> dict[str, TensorType]:
        found = find(types, self.tensor, "quantize", 4)
        if self.dtype not in ROUNDED_DTYPES:
            raise ValueError(f"quantize: unknown dtype {self.dtype!r}; choose one of {', '.join(ROUNDED_DTYPES)}")
        if self.block < 1:
            raise ValueError(f"quantize: block must be at least 1, got {self.block}")
        return {self.out: found}

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes ``[b,h,i,d]`` (in the dtype of ``x``) and scales ``[b,h,ceil(i/block)]``."""
        if self.smooth:
            x = x - x.mean(dim=2, keepdim=True)
        length = x.shape[2]
        padded = torch.nn.functional.pad(x, (0, 0, 0, -length % self.block))
        blocks = padded.reshape(*x.shape[:2], -1, self.block, x.shape[3])
        largest = blocks.abs().amax(dim=(3, 4))
        if self.dtype == "float8_e4m3":
            scale = e4m3.power_scale(largest)
            codes = e4m3.e4m3(blocks / scale[..., None, None])
        else:
            scale = largest / 127
            divisor = torch.where(scale > 0, scale, torch.ones_like(scale))[..., None, None]
            codes = (blocks / divisor).round().clamp(-127, 127)
        return codes.flatten(2, 3)[:, :, :length], scale

    def reference(
        self, tensors: Tensors, sizes: Mapping[str, int], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        whole, scale = self.parts(tensors[self.tensor].to(dtype))
        spread = scale.repeat_interleave(self.block, dim=2)[:, :, : whole.shape[2], None]
        return {self.out: whole * spread}


OPERATIONS: dict[str, type[Operation]] = {
    kind.keyword: kind for kind in (Attend, Scan, Position, Project, Cache, Quantize)
}


def grouped(heads: Expr | int, groups: Expr | int) -> Expr:
    """The usual KV head of a query head: ``h // (heads / groups)``; ``h`` itself when the numbers agree.

    Raises:
        ValueError: when constant numbers do not divide.
    """
    total = simplify(heads if isinstance(heads, Expr) else Const(heads))
    count = simplify(groups if isinstance(groups, Expr) else Const(groups))
    if total == count:
        return Index("h")
    if isinstance(total, Const) and isinstance(count, Const):
        if count.value < 1 or total.value % count.value:
            raise ValueError(f"{total} query heads do not share {count} KV heads evenly")
        return simplify(Index("h") // (total.value // count.value), {"h": total})
    return Index("h") // (total // count)
