"""Attention: scores, a mask, a normaliser, and the sum of the values that they weigh."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from attncompile.ir import e4m3
from attncompile.ir.evaluate import Environment, evaluate, index_grid
from attncompile.ir.expr import SCORE, TOTAL, TRUE, WEIGHT, Const, Expr, Index, Load, Score, Total, Weight, walk
from attncompile.ir.operation import Operation, Tensors, Types, attention_types, operand, result
from attncompile.ir.operators import Kind
from attncompile.ir.simplify import simplify
from attncompile.ir.types import DTYPES, TensorType, concrete, element_kind

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
        peak, entropy, mass: taps, names of further results of a softmax; empty where they are not computed. What they
            say of the weights ``w`` over the keys, before any edit, is told without the map: ``peak[b,h,i] = max_j
            logit_j``, ``entropy[b,h,i] = −Σ_j w_j · ln w_j`` in nats, ``mass[b,h,j] = Σ_i w_ij``. A query without any
            visible key has peak −∞ and entropy 0, and adds nothing to the mass of keys. Taps have no gradient.

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
    peak: str = result("")
    entropy: str = result("")
    mass: str = result("")

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the results that tell of the weights."""
        return tuple(name for name in (self.peak, self.entropy, self.mass) if name)

    def map_elements(self, types: Types, sizes: Mapping[str, int]) -> int:
        """Number of scores: every query of every head with every key.

        Raises:
            ValueError: when a symbolic size has no value in ``sizes``.
        """
        rows = math.prod(concrete(size, sizes) for size in types[self.query].sizes[:3])
        return rows * concrete(types[self.key].sizes[2], sizes)

    def infer(self, types: Types) -> dict[str, TensorType]:
        query, key, value = attention_types(types, "attend", self.query, self.key, self.value)
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
        if self.taps and not self.norm.plain_softmax:
            raise ValueError(
                f"attend: only a softmax whose weights are not rounded has taps ({', '.join(self.taps)}), the "
                f"normaliser is {self.norm}"
            )
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
        made |= {name: TensorType(query.axes[:3], "float32") for name in (self.peak, self.entropy) if name}
        if self.mass:
            made[self.mass] = TensorType((*query.axes[:2], key.axes[2]), "float32")
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

    def reference(self, tensors: Tensors, sizes: Mapping[str, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        logits = self.logits(tensors, sizes, dtype)
        made: dict[str, torch.Tensor] = {}
        if self.norm.kind == "softmax":
            keys = logits.shape[-1]
            if self.sink != NO_SINK:
                logits = torch.cat([logits, self.sinks(tensors, sizes, dtype).expand(*logits.shape[:3], 1)], dim=-1)
            if self.lse:
                made[self.lse] = torch.logsumexp(logits, dim=-1)
            if self.norm.empty == "zero":
                # the logits are replaced too: the gradient through a softmax of NaN would be NaN
                empty = (logits == -math.inf).all(dim=-1, keepdim=True)
                weights = torch.softmax(logits.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
            else:
                weights = torch.softmax(logits, dim=-1)
            weights = weights[..., :keys]
            made |= self._tapped(logits[..., :keys], weights)
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

    def _tapped(self, logits: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """The taps, from the logits and the weights of the keys; only those that have a name are computed."""
        made: dict[str, torch.Tensor] = {}
        if self.peak:
            made[self.peak] = torch.nn.functional.pad(logits.detach(), (0, 1), value=-math.inf).amax(dim=-1)
        if self.entropy or self.mass:
            empty = (logits == -math.inf).all(dim=-1, keepdim=True)
            weights = weights.detach().masked_fill(empty, 0.0)
        if self.entropy:
            made[self.entropy] = torch.special.entr(weights).sum(dim=-1)
        if self.mass:
            made[self.mass] = weights.sum(dim=-2)
        return made

    def flops(self, types: Types, sizes: Mapping[str, int]) -> int:
        query, value = types[self.query], types[self.value]
        pairs = math.prod(concrete(s, sizes) for s in query.sizes[:3]) * concrete(value.sizes[2], sizes)
        return 2 * pairs * (concrete(query.sizes[3], sizes) + concrete(value.sizes[3], sizes))


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
