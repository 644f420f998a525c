"""Each row of the ATen table says of every element where it comes from; torch itself is the judge."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from attncompile.frontends.aten import aten_graph
from attncompile.frontends.aten_rows import ROWS
from attncompile.frontends.capture import capture_export
from attncompile.frontends.graph import Contract, Graph, Linear, Opaque, Reduce, Softmax
from attncompile.ir import Index
from attncompile.ir.evaluate import Environment, evaluate, index_grid
from attncompile.ir.types import concrete
from attncompile.lift.interpret import Interpreter

A, B, C = 2, 5, 4
"""Sizes in the example; the first two are symbolic."""


def real(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(shape)


def whole(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randint(-7, 8, shape)


def truth(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.rand(shape) < 0.5


INPUTS = {
    "x": real(A, B, C),
    "y": real(A, B, C),
    "narrow": real(A, B, 1),
    "row": real(C),
    "n": whole(A, B),
    "m": whole(A, B),
    "p": truth(A, B),
    "r": truth(A, B),
    "place": lambda: torch.randint(0, 3, (A, B)),
    "backward": lambda: torch.randint(-3, 3, (A, B)),
}


@dataclass(frozen=True)
class Row:
    """One use of an operation.

    Attributes:
        operation: key of the table.
        function: of the inputs by name.
    """

    operation: str
    function: Callable[..., torch.Tensor]


def at(operation: str) -> Any:
    """The operation itself, for those that Python spells in another way."""
    return getattr(torch.ops.aten, operation)


def written(x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """The tensor with a number in some of its columns."""
    made = x.clone()
    made[..., where] = 0.25
    return made


FORMULAS: tuple[Row, ...] = (
    Row("square", lambda x: x.square()),
    Row("square", lambda n: n.square()),
    Row("positive", lambda x: at("positive")(x)),
    Row("sign", lambda x: x.sign()),
    Row("sign", lambda n: n.sign()),
    Row("sgn", lambda x: x.sgn()),
    Row("trunc", lambda x: (3 * x).trunc()),
    Row("fix", lambda x: at("fix")(3 * x)),
    Row("frac", lambda x: (3 * x).frac()),
    Row("log1p", lambda x: x.abs().log1p()),
    Row("log1p", lambda place: place.log1p()),
    Row("expm1", lambda x: x.expm1()),
    Row("log10", lambda x: x.abs().log10()),
    Row("erfc", lambda x: x.erfc()),
    Row("tan", lambda x: x.tan()),
    Row("sinh", lambda x: x.sinh()),
    Row("cosh", lambda x: x.cosh()),
    *(
        Row(name, lambda x, name=name: at(name)(x / (x > 0.5)))
        for name in ("isnan", "isinf", "isposinf", "isneginf", "isfinite")
    ),
    Row("isnan", lambda x: (x.clamp(min=0) / x.clamp(min=0)).isnan()),
    Row("nan_to_num", lambda x: torch.nan_to_num(x.log())),
    Row("nan_to_num", lambda x: torch.nan_to_num(x / (x > 0.5), 3.0, 1.0, -1.0)),
    Row("fmod", lambda n: n.fmod(3)),
    Row("fmod", lambda n: n.fmod(-3)),
    Row("fmod", lambda n, m: n.fmod(m.abs() + 1)),
    Row("addcmul", lambda x, y, row: torch.addcmul(x, y, row, value=0.5)),
    Row("addcdiv", lambda x, y, row: torch.addcdiv(x, y, row, value=-2)),
    Row("lerp", lambda x, y: torch.lerp(x, y, 0.3)),
    Row("lerp", lambda x, y, row: torch.lerp(x, y, row)),
    Row("logaddexp", lambda x, y: torch.logaddexp(x, 900 * y)),
    Row("logaddexp", lambda x: torch.logaddexp(x.abs().log() - torch.inf, x.abs().log() - torch.inf)),
    Row("logaddexp2", lambda x, y: torch.logaddexp2(x, y)),
    Row("threshold", lambda x: torch.nn.functional.threshold(x, 0.1, 20.0)),
    Row("softplus", lambda x: torch.nn.functional.softplus(30 * x)),
    Row("softplus", lambda x: torch.nn.functional.softplus(x, beta=2.0, threshold=1.0)),
    Row("log_sigmoid", lambda x: torch.nn.functional.logsigmoid(50 * x)),
    Row("leaky_relu", lambda x: torch.nn.functional.leaky_relu(x, 0.1)),
    Row("elu", lambda x: torch.nn.functional.elu(x, 1.5)),
    Row("hardtanh", lambda x: torch.nn.functional.hardtanh(x, -0.5, 0.25)),
    Row("silu", lambda x: torch.nn.functional.silu(x)),
    Row("gelu", lambda x: torch.nn.functional.gelu(x)),
    Row("gelu", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    Row("one_hot", lambda place: torch.nn.functional.one_hot(place, 3)),
)

USES: tuple[Row, ...] = (
    Row("mul", lambda x, narrow: x * narrow),
    Row("mul", lambda n: n * -3),
    Row("mul", lambda x, p: x * p[..., None]),
    Row("multiply", lambda x, row: at("multiply")(x, row)),
    Row("exp", lambda x: x.exp()),
    Row("exp2", lambda x: x.exp2()),
    Row("log", lambda x: x.abs().log()),
    Row("log2", lambda x: x.abs().log2()),
    Row("tanh", lambda x: x.tanh()),
    Row("sigmoid", lambda x: x.sigmoid()),
    Row("sqrt", lambda x: x.abs().sqrt()),
    Row("rsqrt", lambda x: x.abs().rsqrt()),
    Row("abs", lambda n: n.abs()),
    Row("pow", lambda x: x**3),
    Row("pow", lambda x: x.abs() ** 0.5),
    Row("sin", lambda x: x.sin()),
    Row("cos", lambda x: x.cos()),
    Row("erf", lambda x: x.erf()),
    Row("floor", lambda x: x.floor()),
    Row("ceil", lambda x: x.ceil()),
    Row("round", lambda x: (3 * x).round()),
    Row("relu", lambda x: x.relu()),
    Row("minimum", lambda x, y: torch.minimum(x, y)),
    Row("maximum", lambda n, m: torch.maximum(n, m)),
    Row("where", lambda p, n: torch.where(p, n, -1)),
    Row("where", lambda p, x, y: torch.where(p[..., None], x, y)),
    *(
        Row(name, lambda n, m, name=name: at(name)(n, m))
        for name in (
            "lt",
            "le",
            "gt",
            "ge",
            "eq",
            "ne",
            "less",
            "less_equal",
            "greater",
            "greater_equal",
            "not_equal",
        )
    ),
    Row("lt", lambda x: x < 0.5),
    Row("eq", lambda n: n == 2.0),
    Row("gt", lambda n, x: n[..., None] > x),
    Row("add", lambda x, y: torch.add(x, y, alpha=2)),
    Row("add", lambda n: n + 2),
    Row("add", lambda n, x: n[..., None] + x),
    Row("add", lambda p, n: p + n),
    Row("sub", lambda n, m: torch.sub(n, m, alpha=3)),
    Row("sub", lambda x: x - 1),
    Row("subtract", lambda x, y: at("subtract")(x, y)),
    Row("rsub", lambda x: 1 - x),
    Row("rsub", lambda n, m: at("rsub")(n, m, alpha=2)),
    Row("div", lambda x, y: x / y),
    Row("div", lambda n: n / 2),
    Row("div", lambda n, m: n / (m.abs() + 1)),
    Row("div", lambda n: torch.div(n, 3, rounding_mode="floor")),
    Row("divide", lambda x: at("divide")(x, 4.0)),
    Row("true_divide", lambda n: at("true_divide")(n, 4)),
    Row("reciprocal", lambda x: x.reciprocal()),
    Row("neg", lambda x: -x),
    Row("neg", lambda n: -n),
    Row("floor_divide", lambda n: n // 3),
    Row("floor_divide", lambda n: n // -3),
    Row("remainder", lambda n: n % 3),
    Row("remainder", lambda n: n % -3),
    Row("bitwise_and", lambda p, r: at("bitwise_and")(p, r)),
    Row("__and__", lambda p, r: p & r),
    Row("bitwise_or", lambda p, r: at("bitwise_or")(p, r)),
    Row("__or__", lambda p, r: p | r),
    Row("bitwise_xor", lambda p, r: at("bitwise_xor")(p, r)),
    Row("__xor__", lambda p, r: p ^ r),
    Row("bitwise_not", lambda p: ~p),
    Row("logical_and", lambda n, m: torch.logical_and(n, m)),
    Row("logical_or", lambda p, n: torch.logical_or(p, n)),
    Row("logical_xor", lambda n, m: torch.logical_xor(n, m)),
    Row("logical_not", lambda n: torch.logical_not(n)),
    Row("masked_fill", lambda x, p: x.masked_fill(p[..., None], -torch.inf)),
    Row("masked_fill", lambda n, p: n.masked_fill(p, 9)),
    Row("clamp", lambda x: x.clamp(-0.5, 0.5)),
    Row("clamp", lambda n: n.clamp(max=2)),
    Row("clamp", lambda x: x.clamp(min=0)),
    Row("clamp_min", lambda x: at("clamp_min")(x, 0.1)),
    Row("to", lambda n: n.to(torch.float32)),
    Row("to", lambda x: (2 * x).to(torch.int64)),
    Row("to", lambda n: n.to(torch.bool)),
    Row("to", lambda x: x.to(torch.bool)),
    Row("to", lambda p: p.to(torch.int32)),
    Row("to", lambda x: x.double()),
    Row("_to_copy", lambda p: at("_to_copy")(p, dtype=torch.float32)),
    Row("type_as", lambda n, x: n.type_as(x)),
    Row("alias", lambda x: at("alias")(x)),
    Row("contiguous", lambda x: x.transpose(0, 2).contiguous()),
    Row("clone", lambda x: x.clone()),
    Row("detach", lambda x: x.detach()),
    Row("dropout", lambda x: torch.nn.functional.dropout(x, 0.5, False)),
    Row("zeros", lambda x: torch.zeros(x.shape[0], 3)),
    Row("ones", lambda x: torch.ones(x.shape[1], dtype=torch.bool)),
    Row("full", lambda x: torch.full((x.shape[1], 2), -torch.inf)),
    Row("new_zeros", lambda n: n.new_zeros(n.shape)),
    Row("new_ones", lambda x: x.new_ones(x.shape)),
    Row("new_full", lambda x: x.new_full((x.shape[0],), 2.5)),
    Row("zeros_like", lambda x: torch.zeros_like(x)),
    Row("ones_like", lambda n: torch.ones_like(n)),
    Row("full_like", lambda n: torch.full_like(n, 3)),
    Row("full_like", lambda n: torch.full_like(n, 3, dtype=torch.float32)),
    Row("scalar_tensor", lambda x: at("scalar_tensor")(2.0) + x),
    Row("arange", lambda x: torch.arange(x.shape[1])),
    Row("arange", lambda x: torch.arange(2, x.shape[1])),
    Row("arange", lambda x: torch.arange(1, 9, 3)),
    Row("arange", lambda x: torch.arange(9, 1, -2)),
    Row("arange", lambda x: torch.arange(x.shape[1], dtype=torch.float32)),
    Row("arange", lambda x: torch.arange(end=4)),
    Row("tril", lambda x: x.tril()),
    Row("tril", lambda n: n.tril(diagonal=1)),
    Row("tril", lambda p: p.tril(-1)),
    Row("triu", lambda x: x.triu(1)),
    Row("triu", lambda n: n.triu(-2)),
    Row("view", lambda x: x.view(x.shape[0], -1)),
    Row("view", lambda x: x.view(-1, 2, 2)),
    Row("view", lambda n: n.view(-1, 1)),
    Row("reshape", lambda x: x.transpose(0, 1).reshape(x.shape[1], -1)),
    Row("_unsafe_view", lambda x: at("_unsafe_view")(x, (-1, 4))),
    Row("flatten", lambda x: x.flatten(1)),
    Row("flatten", lambda x: x.flatten()),
    Row("unflatten", lambda x: x.unflatten(-1, (2, 2))),
    Row("view_as", lambda x, y: x.flatten(0, 1).view_as(y)),
    Row("expand", lambda narrow: narrow.expand(-1, -1, 3)),
    Row("expand", lambda row, x: row.expand(x.shape[0], x.shape[1], -1)),
    Row("expand_as", lambda narrow, x: narrow.expand_as(x)),
    Row("broadcast_to", lambda narrow, x: narrow.broadcast_to(x.shape)),
    Row("transpose", lambda x: x.transpose(-1, 0)),
    Row("t", lambda n: n.t()),
    Row("swapaxes", lambda x: x.swapaxes(0, 1)),
    Row("swapdims", lambda x: x.swapdims(-1, -2)),
    Row("numpy_T", lambda n: at("numpy_T")(n)),
    Row("mT", lambda x: at("mT")(x)),
    Row("permute", lambda x: x.permute(2, 0, 1)),
    Row("permute", lambda x: x.permute(-1, 0, -2)),
    Row("movedim", lambda x: x.movedim(0, -1)),
    Row("movedim", lambda x: torch.movedim(x, (0, 2), (1, 0))),
    Row("unsqueeze", lambda x: x.unsqueeze(-1)),
    Row("unsqueeze", lambda x: x[:, None]),
    Row("squeeze", lambda narrow: narrow.squeeze(-1)),
    Row("squeeze", lambda narrow: narrow.unsqueeze(0).squeeze()),
    Row("squeeze", lambda narrow: narrow.squeeze((1, 2))),
    Row("slice", lambda x: x[:, 1:]),
    Row("slice", lambda x: x[..., ::2]),
    Row("slice", lambda x: x[:, :-1]),
    Row("slice", lambda x: x[:, -2:]),
    Row("slice", lambda x: x[..., 1:3]),
    Row("slice", lambda x: x[..., -3:-1]),
    Row("slice", lambda x: x[..., 2:100]),
    Row("slice", lambda x, n: x[:, : n.shape[1]]),
    Row("slice", lambda x: x[..., -100:2]),
    Row("slice", lambda x: x[:, -3:-1]),
    Row("slice", lambda x: x[:, 1:-1]),
    Row("slice", lambda x: x[:, -4::2]),
    Row("slice", lambda x: x[1:, None, :, -1:]),
    Row("narrow", lambda x: x.narrow(2, 1, 2)),
    Row("diff", lambda x: x.diff()),
    Row("diff", lambda n: n.diff(dim=0, append=n[:1])),
    Row("diff", lambda n: n.diff(prepend=n[:, :1] - 1)),
    Row("diff", lambda x, y: x.diff(n=2, dim=1, prepend=y)),
    Row("diff", lambda p: p.diff(prepend=p[:, :1])),
    Row("cumsum", lambda n: torch.ones_like(n).cumsum(1)),
    Row("cumsum", lambda n: torch.full_like(n, 3, dtype=torch.bool).cumsum(-2)),
    Row("cumsum", lambda x: (torch.arange(x.shape[1]).diff(prepend=torch.full((1,), -1)) - 1).cumsum(0)),
    Row("narrow", lambda x: x.narrow(-1, -3, 2)),
    Row("select", lambda x: x[..., 1]),
    Row("select", lambda x: x[:, -1]),
    Row("select", lambda x: x.select(-1, -2)),
    Row("flip", lambda x: x.flip(1)),
    Row("flip", lambda x: x.flip(0, -1)),
    Row("repeat", lambda x: x.repeat(2, 1, 3)),
    Row("repeat", lambda x: x.repeat(2, 1, 1, 1)),
    Row("repeat_interleave", lambda x: x.repeat_interleave(3, dim=1)),
    Row("repeat_interleave", lambda x: x.repeat_interleave(2, -1)),
    Row("cat", lambda x, y: torch.cat([x, y], 1)),
    Row("cat", lambda x, narrow: torch.cat([x, narrow, x], -1)),
    Row("concat", lambda x, y: at("concat")([x, y])),
    Row("stack", lambda x, y: torch.stack([x, y], -1)),
    Row("stack", lambda x, y: torch.stack([x, y])),
    Row("getitem", lambda x: x.chunk(2, -1)[1]),
    Row("getitem", lambda x: x.split([1, 3], -1)[1]),
    Row("getitem", lambda x: x.split(3, 2)[1]),
    Row("getitem", lambda x: x.unbind(-1)[2]),
    Row("getitem", lambda x: torch.tensor_split(x, 2, -1)[1]),
    Row("index_put", lambda x, p: x.clone().index_put((p,), torch.full((), -0.5))),
    Row("index_put", lambda x, row: written(x, row > 0)),
    Row("index", lambda row, place: row[place]),
    Row("index", lambda row, backward: row[backward]),
    Row("index", lambda x, place: x[:, :, place]),
    Row("index", lambda x, place: x[:, place[0], 1:]),
    Row("index", lambda x, place, backward: x[:, place, backward]),
    Row("index", lambda x, place: x[0, :, place]),
    Row("index", lambda x, place: x[place % 2, :, place]),
    Row("index", lambda x, place: x[torch.arange(x.shape[0])[:, None], place]),
    Row("embedding", lambda x, place: torch.nn.functional.embedding(place, x[0])),
    Row("index_select", lambda x, place: x.index_select(1, place[0])),
    Row("gather", lambda x, place: x.gather(1, place[..., None].expand(-1, -1, 4))),
    *FORMULAS,
    Row("clip", lambda x: x.clip(-0.5, 0.5)),
    Row("clamp_max", lambda x: at("clamp_max")(x, 0.1)),
    Row("clamp_max", lambda x, y: at("clamp_max")(x, y)),
    Row("absolute", lambda x: at("absolute")(x)),
    Row("negative", lambda n: at("negative")(n)),
    Row("special_expit", lambda x: at("special_expit")(x)),
    Row("max", lambda x, y: torch.max(x, y)),
    Row("max", lambda x: torch.max(x, torch.full((), -0.5))),
    Row("min", lambda n, m: torch.min(n, m)),
    Row("arange", lambda x: torch.arange(0, x.shape[1], 1.0)),
    Row("arange", lambda x: torch.arange(0.5, 3.0, 0.25)),
    Row("linspace", lambda x: torch.linspace(-1, 2, 7)),
    Row("linspace", lambda x: torch.linspace(3, 4, 1)),
    Row("eye", lambda x: torch.eye(x.shape[1])),
    Row("eye", lambda x: torch.eye(3, x.shape[1], dtype=torch.bool)),
    Row("moveaxis", lambda x: at("moveaxis")(x, 0, -1)),
    Row("adjoint", lambda x: at("adjoint")(x)),
    Row("ravel", lambda n: at("ravel")(n)),
    Row("reshape_as", lambda x, y: x.flatten(0, 1).reshape_as(y)),
    Row("diagonal", lambda x: x[:, 0, :, None].expand(-1, -1, 4).diagonal(0, 1, 2)),
    Row("diagonal", lambda x: x.diagonal(1, 0, 2)),
    Row("diagonal", lambda x: x.diagonal(-1, -1, 0)),
    Row("unfold", lambda x: x.unfold(2, 2, 1)),
    Row("unfold", lambda x: x.unfold(-1, 3, 1).unfold(-2, 1, 1)),
    Row("as_strided", lambda x: x.clone().as_strided((x.shape[0], x.shape[1], 3, 2), (*x.stride()[:2], 1, 1))),
    Row("as_strided", lambda x: x.abs().as_strided((C, x.shape[1]), (1, C), C)),
    Row("as_strided", lambda x: x.new_zeros(x.shape[0], 1, x.shape[1]).as_strided((x.shape[1],), (1,))),
    Row("tile", lambda x: x.tile(2, 3)),
    Row("pad", lambda x: torch.nn.functional.pad(x, (1, 2))),
    Row("pad", lambda x: torch.nn.functional.pad(x, (0, 0, 1, 0), value=-torch.inf)),
    Row("pad", lambda x: torch.nn.functional.pad(x, (-1, 1, 0, 2))),
    Row("pad", lambda p: torch.nn.functional.pad(p, (1, 1), value=True)),
    Row("constant_pad_nd", lambda n: at("constant_pad_nd")(n, (2, 0), 3)),
    Row("narrow_copy", lambda x: at("narrow_copy")(x, 2, 1, 2)),
    Row("narrow", lambda x: at("narrow")(x, dim=2, start=1, length=2)),
    Row("concatenate", lambda x, y: at("concatenate")([x, y], 1)),
    Row("getitem", lambda row, n: torch.meshgrid(row, 2 * row[:3], indexing="ij")[1]),
    Row("getitem", lambda row, n: torch.meshgrid(row, 2 * row[:3], indexing="xy")[0]),
    Row("take_along_dim", lambda x: x[:, 0].take_along_dim(3 - torch.arange(3)[None], 1)),
    Row("outer", lambda row, n: torch.outer(row, n[0])),
    Row("copy", lambda x, narrow: x.clone().copy_(narrow)),
    Row("fill", lambda n: n.clone().fill_(3)),
    Row("zero", lambda x: x.clone().zero_()),
    Row("add", lambda x, y: x.clone().add_(y)),
    Row("mul", lambda x: x.clone().mul_(2)),
    Row("masked_fill", lambda x, p: torch.zeros_like(x).masked_fill_(p[..., None], 1.0)),
)

NO_SINGLE_ELEMENT = {
    "matmul",
    "bmm",
    "mm",
    "baddbmm",
    "einsum",
    "linear",
    "addmm",
    "softmax",
    "_softmax",
    "log_softmax",
    "_log_softmax",
    "logsumexp",
    "mv",
    "inner",
    "tensordot",
    "sum",
    "amax",
    "scaled_dot_product_attention",
}
"""Operations whose elements are made of many; the tables of attention show them."""

CREATED_BY_TORCH_ALONE = {"lift_fresh", "lift_fresh_copy", "detach_"}
"""Operations that tracing inserts around constants."""


def as_module(function: Callable[..., torch.Tensor]) -> torch.nn.Module:
    names = [n for n, p in inspect.signature(function).parameters.items() if p.default is inspect.Parameter.empty]

    def forward(self: torch.nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        return function(**{**dict(zip(names, args, strict=False)), **kwargs})

    keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, keyword) for name in ("self", *names)]
    )
    return type("Written", (torch.nn.Module,), {"forward": forward})()


def elements(graph: Graph, value: str, feeds: dict[str, torch.Tensor], sizes: dict[str, int]) -> torch.Tensor:
    """A value of a graph, computed element by element from what interpretation says of it."""
    shape = graph.infos[value].shape
    names = [f"y{n}" for n in range(len(shape))]
    position = tuple(Index(name) for name in names)
    stated = Interpreter(graph, extents=dict(zip(names, shape, strict=True))).at(value, position)
    extents = {name: concrete(size, sizes) for name, size in zip(names, shape, strict=True)}
    found = evaluate(stated, Environment(index_grid(extents), sizes, feeds, dtype=torch.float64))
    return found.expand([extents[name] for name in names])


@pytest.mark.parametrize("row", USES, ids=lambda row: row.operation)
def test_row(row: Row) -> None:
    module = as_module(row.function)
    names = [n for n, p in inspect.signature(row.function).parameters.items() if p.default is inspect.Parameter.empty]
    captured = capture_export(module, (), {name: INPUTS[name]() for name in names})
    graph = aten_graph(captured)
    assert not [node for node in graph.nodes if isinstance(node, Opaque)], "a row of the table does not state this use"
    used = {native.what for native in graph.natives.values()}
    assert used & {row.operation, f"{row.operation}_"}, f"torch wrote {used} instead"
    (output,) = graph.outputs
    # two lengths, one of them 1: nothing of the example's sizes may have got in
    for length in (B, 7):
        fresh = {name: resized(INPUTS[name](), length) for name in names}
        with torch.no_grad():
            expected = module(**{name: t.double() if t.is_floating_point() else t for name, t in fresh.items()})
        sizes = {
            str(size): extent
            for name in names
            for size, extent in zip(graph.infos[name].shape, fresh[name].shape, strict=True)
        }
        found = elements(graph, output, fresh, sizes)
        assert tuple(found.shape) == tuple(expected.shape)
        if expected.is_floating_point():
            torch.testing.assert_close(found.double(), expected.double(), equal_nan=True)
        else:
            assert torch.equal(found.to(expected.dtype), expected)


def resized(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """The example with another length on its second axis."""
    if tensor.dim() < 2:
        return tensor
    places = torch.arange(length) % tensor.shape[1]
    return tensor[:, places]


def test_every_row_of_the_table_is_used() -> None:
    assert set(ROWS) - {row.operation for row in USES} == NO_SINGLE_ELEMENT | CREATED_BY_TORCH_ALONE


MANY: tuple[tuple[str, Callable[..., torch.Tensor], type], ...] = (
    ("matmul", lambda x, y: x @ y.transpose(1, 2), Contract),
    ("bmm", lambda x, y: torch.bmm(x, y.transpose(1, 2)), Contract),
    ("mm", lambda row, n: torch.mm(n.float(), n.float().t()), Contract),
    ("einsum", lambda x, y: torch.einsum("abc,adc->bad", x, y), Contract),
    ("einsum", lambda x, y: torch.einsum("abc,adc", x, y), Contract),
    ("einsum", lambda x, y: torch.einsum("...ac,...dc->...ad", x, y), Contract),
    ("einsum", lambda x, n: torch.einsum("...c,...->...c", x, n.float()), Contract),
    ("mv", lambda row, x: torch.mv(x[0], row), Contract),
    ("inner", lambda x, y: torch.inner(x, y), Contract),
    ("tensordot", lambda x, y: torch.tensordot(x, y, ([2, 0], [2, 0])), Contract),
    ("max", lambda x: x.max(), Reduce),
    ("sum", lambda x, y: (x[:, :, None] * y[:, None]).sum(-1), Contract),
    ("sum", lambda x: x.sum(-1, keepdim=True), Reduce),
    ("amax", lambda x: x.amax((0, -1)), Reduce),
    ("softmax", lambda x: x.softmax(1), Softmax),
    ("linear", lambda x, y: torch.nn.functional.linear(x, y[0]), Linear),
)


@pytest.mark.parametrize(("name", "function", "kind"), MANY, ids=lambda value: value if isinstance(value, str) else "")
def test_operations_over_many_elements_become_one_node(
    name: str, function: Callable[..., torch.Tensor], kind: type
) -> None:
    inputs = {n: INPUTS[n]() for n in inspect.signature(function).parameters}
    graph = aten_graph(capture_export(as_module(function), (), inputs))
    assert [node for node in graph.nodes if isinstance(node, kind)]
    assert not [node for node in graph.nodes if isinstance(node, Opaque)]


def test_what_is_not_stated_stays_opaque_and_keeps_its_inputs() -> None:
    """Values made through tuples depend on what made the tuple."""
    graph = aten_graph(capture_export(as_module(lambda x: torch.topk(x, 2).values + 1), (), {"x": INPUTS["x"]()}))
    found = [node for node in graph.nodes if isinstance(node, Opaque)]
    assert found and all(node.inputs == ("x",) and node.output in graph.descendants("x") for node in found)
