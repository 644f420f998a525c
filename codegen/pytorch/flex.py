"""``Attend`` by FlexAttention: its ``score_mod`` and ``mask_mod`` printed from the expressions."""

from __future__ import annotations

import functools
import hashlib
import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from attncompile.codegen.pytorch.form import NEGLIGIBLE
from attncompile.codegen.pytorch.grid import Map
from attncompile.ir import NO_SINK, Attend, Expr, Kind, Refusal, TensorType, grouped, simplify
from attncompile.ir.affine import affine
from attncompile.ir.evaluate import evaluate, largest_first
from attncompile.ir.expr import SCORE, TRUE, WEIGHT, Apply, Const, Index, Load, Score, Size, symbols
from attncompile.ir.expr import loads as loads_of
from attncompile.ir.rows import absorbing, extents, never_empty

PYTHON: dict[str, str] = {
    "or": "({0} | {1})",
    "and": "({0} & {1})",
    "not": "(~{0})",
    "lt": "({0} < {1})",
    "le": "({0} <= {1})",
    "gt": "({0} > {1})",
    "ge": "({0} >= {1})",
    "eq": "({0} == {1})",
    "ne": "({0} != {1})",
    "add": "({0} + {1})",
    "mul": "({0} * {1})",
    "div": "({0} / {1})",
    "floordiv": "({0} // {1})",
    "mod": "({0} % {1})",
    "pow": "({0} ** {1})",
    "min": "torch.minimum({0}, {1})",
    "max": "torch.maximum({0}, {1})",
    "where": "torch.where({0}, {1}, {2})",
    "float": "({0} * 1.0)",
    "int": "({0}).to(torch.int64)",
    "abs": "torch.abs({0})",
    **{name: f"torch.{name}({{0}})" for name in (
        "exp", "exp2", "log", "log2", "tanh", "sigmoid", "erf", "sqrt", "rsqrt", "sin", "cos", "floor",
        "ceil", "round")},
}
"""How each operator is written on scalar tensors; ``min``, ``max`` and ``where`` take tensors only, see
:func:`_print`.
"""

_FUNCTIONS = frozenset(name for name, form in PYTHON.items() if form.startswith("torch.") and name != "where")


def _print(expr: Expr) -> str:
    """The expression in Python, over ``score b h q_idx kv_idx``, captured tensors and ``size_<name>``."""
    match expr:
        case Const(value):
            if isinstance(value, float) and not math.isfinite(value):
                return f"float({str(value)!r})"
            return repr(value)
        case Index(name):
            return {"i": "q_idx", "j": "kv_idx"}.get(name, name)
        case Size(name):
            return f"size_{_identifier(name)}"
        case Score():
            return "score"
        case Load(tensor, indices, element):
            name = _identifier(tensor)
            read = f"{name}[{', '.join(_position(index, name, axis) for axis, index in enumerate(indices))}]"
            return f"({read} != 0)" if element is Kind.BOOL else read
        case Apply(operator, arguments):
            arguments = largest_first(arguments) if operator == "add" else arguments
            texts = [_as_tensor(a) if operator in _FUNCTIONS else _print(a) for a in arguments]
            form = PYTHON[operator]
            if len(texts) > 2 and operator != "where":
                return functools.reduce(lambda left, right: form.format(left, right), texts)
            return form.format(*texts)
    raise ValueError(f"FlexAttention cannot read {expr}")


def _as_tensor(expr: Expr) -> str:
    """A function of torch wants a tensor where arithmetic also takes a number."""
    text = _print(expr)
    return f"torch.full_like(kv_idx, {text}, dtype={_DTYPES[expr.kind]})" if not _reads_tensor(expr) else text


_DTYPES = {Kind.BOOL: "torch.bool", Kind.INT: "torch.int64", Kind.FLOAT: "torch.float32"}


def _reads_tensor(expr: Expr) -> bool:
    return any(isinstance(node, Index | Load | Score) for node in (expr, *_below(expr)))


def _below(expr: Expr) -> list[Expr]:
    return [node for child in expr.children for node in (child, *_below(child))]


def _position(index: Expr, tensor: str, axis: int) -> str:
    if isinstance(index, Index) or index == Const(0):
        return _print(index)  # inside its axis by the Spec's types
    return f"torch.clamp({_as_tensor(index)}, 0, {tensor}.shape[{axis}] - 1)"


def _identifier(name: str) -> str:
    """A Python name for a tensor or size of the Spec."""
    cleaned = re.sub(r"\W", "_", name)
    return f"t_{cleaned}"


@dataclass(frozen=True)
class FlexForm:
    """What FlexAttention is called with.

    Attributes:
        score: the new score, over ``s b h i j``.
        mask: what becomes the block mask, ``true`` for none.
        edit: factor of the output over ``b h i``, or ``None``.
        sink: logit over ``b h i`` of a key without a value, or ``None``.
        empty: what a row without a key has to be set to: ``nan``, the ``mean`` over all keys, or nothing
            (flex gives 0).
        enable_gqa: key heads are shared as ``h // n``.
    """

    score: Expr
    mask: Expr
    edit: Expr | None
    sink: Expr | None
    empty: Literal["", "nan", "mean"]
    enable_gqa: bool


def flex_form(attend: Attend, kinds: Mapping[str, TensorType]) -> FlexForm | Refusal:
    """Recognise what FlexAttention can hold, or say what it cannot."""

    def refuse(what: str) -> Refusal:
        return Refusal("no-flex", f"FlexAttention has no place for {what}")

    if not attend.norm.plain_softmax:
        return refuse(f"the normaliser {attend.norm}")
    weight = affine(attend.weight, WEIGHT)
    if weight is None or weight.offset != Const(0.0) or Index("j") in symbols(weight.slope):
        return refuse(f"the edit {attend.weight} of each weight")
    if attend.taps:
        return refuse(f"what tells of the weights ({', '.join(attend.taps)})")
    if attend.lse and weight.slope != Const(1.0):
        return refuse("the log-sum-exp beside an edit of the weights")
    sizes = extents(attend, kinds)
    heads, total = simplify(kinds[attend.key].sizes[1]), simplify(sizes["h"])
    if not (isinstance(heads, Const) and isinstance(total, Const) and total.value % heads.value == 0
            and simplify(attend.kv_head, sizes) == simplify(grouped(total, heads), sizes)):
        return refuse(f"the key heads {attend.kv_head}")
    mask, fill = simplify(attend.mask, sizes), simplify(attend.fill)
    infinite = fill == Const(-math.inf)
    negligible = absorbing(fill) or (isinstance(fill, Const) and fill.value <= NEGLIGIBLE)
    proven = never_empty(attend, kinds)
    if attend.sink != NO_SINK and mask != TRUE and not infinite and not proven:
        return refuse(f"the sink {attend.sink} of a row without a key, whose fill is {fill}")
    if attend.lse and mask != TRUE and not infinite and not proven:
        return refuse(f"the log-sum-exp of a row without a key, whose fill is {fill}")
    hidden = mask == TRUE or infinite or negligible
    score = attend.score if hidden else Apply("where", (mask, attend.score, fill), Kind.FLOAT)
    return FlexForm(
        score=score,
        mask=mask if hidden else TRUE,
        edit=None if weight.slope == Const(1.0) else weight.slope,
        sink=None if attend.sink == NO_SINK else attend.sink,
        empty=_empty(attend, infinite) if hidden and not proven else "",
        enable_gqa=heads != total,
    )


def _empty(attend: Attend, infinite: bool) -> Literal["", "nan", "mean"]:
    if not infinite:
        return "mean"
    return "nan" if attend.norm.empty == "nan" else ""


def flex_source(form: FlexForm) -> str:
    """A Python function that makes ``score_mod`` and ``mask_mod`` from the captured tensors and sizes."""
    lines = ["def make(torch, tensors, sizes):"]
    expressions = (form.score, form.mask)
    for tensor in sorted({load.tensor for expr in expressions for load in loads_of(expr)}):
        lines.append(f"    {_identifier(tensor)} = tensors[{tensor!r}]")
    found = {symbol for expr in expressions for symbol in symbols(expr)}
    for size in sorted(symbol.name for symbol in found if isinstance(symbol, Size)):
        lines.append(f"    size_{_identifier(size)} = sizes[{size!r}]")
    names = ["None", "None"]
    if form.score != SCORE:
        names[0] = "score_mod"
        lines += ["", "    def score_mod(score, b, h, q_idx, kv_idx):"]
        lines += [f"        return {_print(form.score)}"]
    if form.mask != TRUE:
        names[1] = "mask_mod"
        lines += ["", "    def mask_mod(b, h, q_idx, kv_idx):", f"        return {_print(form.mask)}"]
    return "\n".join([*lines, "", f"    return {', '.join(names)}", ""])


@functools.cache
def _maker(source: str) -> Callable[..., Any]:
    namespace: dict[str, Any] = {}
    exec(compile(source, "<attncompile flex>", "exec"), namespace)
    return namespace["make"]


def _call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
    from torch.nn.attention.flex_attention import flex_attention  # slow to import, and rarely wanted

    return flex_attention(query, key, value, **options)


@functools.cache
def _compiled(source: str) -> Callable[..., Any]:
    """FlexAttention compiled for one source.

    Dynamo counts compilations by code object and gives up after a few, so every source gets one of its own.
    """
    code = _call.__code__.replace(co_name=f"flex_{hashlib.sha256(source.encode()).hexdigest()[:12]}")
    return torch.compile(types.FunctionType(code, globals()), dynamic=True)


def attend_flex(attend: Attend, form: FlexForm, where: Map, source: str) -> dict[str, torch.Tensor]:
    """The attention's results by FlexAttention, for plain tensors.

    It is compiled on CUDA, where its kernel is; on a CPU the call materialises the map.
    """
    from torch.nn.attention.flex_attention import create_block_mask  # as above

    query = where.tensors[attend.query]
    key, value = (where.tensors[name].to(query.dtype) for name in (attend.key, attend.value))
    score_mod, mask_mod = _maker(source)(torch, dict(where.tensors), dict(where.sizes))
    batch, heads, queries, keys = where.extents
    block_mask = None
    if mask_mod is not None:
        block_mask = create_block_mask(
            mask_mod,
            batch if _varies(form.mask, "b") else None,
            heads if _varies(form.mask, "h") else None,
            queries, keys, device=str(where.device),
        )
    call: Callable[..., Any] = _call
    if where.device.type == "cuda":
        call = _compiled(source)
    out, lse = call(query, key, value, score_mod=score_mod, block_mask=block_mask, scale=1.0,
                    enable_gqa=form.enable_gqa, return_lse=True)
    if form.sink is not None:
        # flex gives 0 for a row without a key, and −∞ for its log-sum-exp: the sink takes all the weight
        sink = evaluate(form.sink, where.environment(torch.float32)).to(lse.dtype).expand(*lse.shape, 1)[..., 0]
        total = torch.logaddexp(lse, sink)
        out, lse = (out * torch.exp(lse - total)[..., None]).to(out.dtype), total
    elif form.empty:
        nothing = (lse == -math.inf)[..., None]
        mean = value.mean(2, keepdim=True).repeat_interleave(query.shape[1] // value.shape[1], 1)
        out = out.masked_fill(nothing, math.nan) if form.empty == "nan" else torch.where(nothing, mean, out)
    if form.edit is not None:
        out = (out * evaluate(form.edit, where.environment(torch.float32))).to(out.dtype)
    return {attend.out: out, **({attend.lse: lse} if attend.lse else {})}


def _varies(mask: Expr, name: str) -> bool:
    return Index(name) in symbols(mask)
