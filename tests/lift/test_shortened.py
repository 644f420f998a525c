"""Proofs of graphs that fix long lengths, at short ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from attncompile.frontends.aten import aten_graph
from attncompile.frontends.capture import capture_export
from attncompile.frontends.onnx import onnx_graph
from attncompile.lift import Site, lift_graph
from attncompile.lift.shortened import Shortening

LENGTH, HEADS, CHANNELS = 4096, 8, 4


class Function(nn.Module):
    """Attention under a mask or a bias, or in another shape."""

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.logits = logits
        self.register_buffer("triangle", torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())
        self.register_buffer("table", torch.randn(HEADS, 2 * LENGTH - 1))
        self.register_buffer("positions", torch.randn(HEADS, 5000))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = query * CHANNELS**-0.5
        return torch.softmax(self.logits(self, query @ key.transpose(-1, -2)), dim=-1) @ value


def causal(self: Function, scores: Tensor) -> Tensor:
    rows, columns = torch.arange(scores.shape[-2])[:, None], torch.arange(scores.shape[-1])
    return scores.masked_fill(columns > rows, float("-inf"))


def stored(self: Function, scores: Tensor) -> Tensor:
    return scores.masked_fill(~self.triangle[: scores.shape[-2], : scores.shape[-1]], float("-inf"))


def window(self: Function, scores: Tensor) -> Tensor:
    apart = torch.arange(scores.shape[-2])[:, None] - torch.arange(scores.shape[-1])
    return scores.masked_fill((apart < 0) | (apart >= LENGTH // 4), torch.finfo(scores.dtype).min)


def slopes(self: Function, scores: Tensor) -> Tensor:
    distance = torch.arange(scores.shape[-1]) - torch.arange(scores.shape[-2])[:, None]
    return causal(self, scores + distance * 2.0 ** -torch.arange(1, HEADS + 1)[:, None, None])


def relative(self: Function, scores: Tensor) -> Tensor:
    apart = torch.arange(scores.shape[-2])[:, None] - torch.arange(scores.shape[-1]) + LENGTH - 1
    return scores + self.table[:, apart]


def tail(self: Function, scores: Tensor) -> Tensor:
    """The last places of a longer table, as in MPT: what begins at 4095 ends sooner."""
    return scores + self.table[:, None, scores.shape[-1] - 1 :]


def stretch(self: Function, scores: Tensor) -> Tensor:
    """Some places of a table whose length has nothing to do with that of the sequence."""
    return scores + self.positions[:, None, 300 : scores.shape[-1] + 300]


def site_of(module: nn.Module, *inputs: Tensor) -> Site:
    (site,) = lift_graph(aten_graph(capture_export(module, inputs))).sites
    return site


def operands(queries: int = LENGTH, keys: int = LENGTH, heads: int = HEADS) -> list[Tensor]:
    return [torch.zeros(1, heads, length, CHANNELS) for length in (queries, keys, keys)]


LOGITS = (causal, stored, window, slopes, relative, tail, stretch)


@pytest.mark.parametrize("logits", LOGITS, ids=lambda each: each.__name__)
def test_a_map_too_large_to_compare_is_proven_short(logits: Callable[[Tensor], Tensor]) -> None:
    site = site_of(Function(logits), *operands())
    assert site.status == "lifted", site.refusal
    assert site.proof is not None and site.proof.cases == ("4096 as 13", "4096 as 24")


@pytest.mark.parametrize("queries", [4089, 1, 1024])
def test_queries_and_keys_of_different_lengths(queries: int) -> None:
    """A few keys of a cache more than queries, one query, a fourth."""
    heads = 8 if queries > 1 else 1024
    site = site_of(Function(lambda self, scores: scores), *operands(queries, heads=heads))
    assert site.status == "lifted", site.refusal
    assert site.proof is not None and all("4096 as" in case for case in site.proof.cases)


def test_a_length_that_is_the_number_of_channels_too() -> None:
    """2048 tokens of 2048 channels, 8 heads: one of the two numbers becomes short."""

    class Projected(nn.Module):
        def forward(self, hidden: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (x.view(1, 2048, 8, 256).transpose(1, 2) for x in (hidden, key, value))
            weights = torch.softmax(query @ key.transpose(-1, -2) / 16, dim=-1)
            return (weights @ value).transpose(1, 2).reshape(1, 2048, 2048)

    site = site_of(Projected(), *(torch.zeros(1, 2048, 2048) for _ in range(3)))
    assert site.status == "lifted", site.refusal
    assert site.proof is not None and site.proof.cases == ("2048 as 13", "2048 as 24")


def test_what_cannot_be_shortened_is_run_as_it_is() -> None:
    """Blocks of 512: no short length is made of them."""

    class Blocked(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query = query.view(1, 2, 8, 512, CHANNELS).flatten(2, 3)
            return torch.softmax(query @ key.transpose(-1, -2), dim=-1) @ value

    site = site_of(Blocked(), *operands(heads=2))
    assert site.status == "lifted", site.refusal
    assert site.proof is not None and site.proof.cases == ("fixed sizes",)


def test_numbers_made_of_lengths() -> None:
    shorter = Shortening({1000: 10, 4096: 24})
    expected = {64: 64, 700: 700, 999: 9, 1000: 10, 1003: 13, 2000: 20, 4095: 23, 4097: 25, 8191: 47, 8192: 48}
    assert {number: shorter(number) for number in expected} == expected
    assert shorter(4096 * 64) == 24 * 64
    assert shorter(4096 * 1000) == 240 and shorter(2**63 - 1) == 2**63 - 1


def onnx_site(nodes: list[onnx.NodeProto], stored: dict[str, np.ndarray], heads: int, length: int) -> Site:
    """The site of a file that fixes its lengths, as other exporters write them: shapes are constants."""
    shape = [1, heads, length, CHANNELS]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("query", "key", "value")]
    graph = helper.make_graph(
        [
            helper.make_node("Transpose", ["key"], ["turned"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", ["query", "turned"], ["raw"]),
            helper.make_node("Mul", ["raw", "scale"], ["scores"]),
            *nodes,
            helper.make_node("Softmax", ["logits"], ["weights"], axis=-1),
            helper.make_node("MatMul", ["weights", "value"], ["out"]),
        ],
        "fixed",
        values,
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array, name) for name, array in {"scale": np.float32(0.5), **stored}.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (site,) = lift_graph(onnx_graph(ir.from_proto(model))).sites
    return site


def number(value: object, dtype: type = np.int64) -> np.ndarray:
    return np.asarray(value, dtype=dtype)


RANGES = [
    helper.make_node("Range", ["zero", "length", "one"], ["positions"]),
    helper.make_node("Unsqueeze", ["positions", "last"], ["rows"]),
    helper.make_node("LessOrEqual", ["positions", "rows"], ["visible"]),
    helper.make_node("Where", ["visible", "scores", "low"], ["logits"]),
]
SMALL = {"zero": number(0), "one": number(1), "last": number([1]), "low": number(-np.inf, np.float32)}
FILES: dict[str, tuple[list[onnx.NodeProto], Callable[[int], dict[str, np.ndarray]]]] = {
    "no mask": ([helper.make_node("Identity", ["scores"], ["logits"])], lambda length: {}),
    "positions": (RANGES, lambda length: {**SMALL, "length": number(length)}),
    "stored mask": (
        [helper.make_node("Add", ["scores", "mask"], ["logits"])],
        lambda length: {"mask": np.triu(np.full((1, 1, length, length), -1e9, np.float32), 1)},
    ),
    "part of a table": (
        [
            helper.make_node("Slice", ["table", "starts", "ends", "axes"], ["part"]),
            helper.make_node("Where", ["part", "scores", "low"], ["logits"]),
        ],
        lambda length: {
            "table": np.tril(np.ones((1, 1, length + 1000, length + 1000), dtype=bool)),
            "starts": number([0, 0]), "ends": number([length, length]), "axes": number([2, 3]), "low": SMALL["low"],
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_one_long_length_is_proven_short(name: str) -> None:
    nodes, stored = FILES[name]
    site = onnx_site(nodes, stored(2048), 32, 2048)  # 1.3e8 elements
    assert site.status == "lifted", site.refusal
    assert site.proof is not None and site.proof.cases == ("2048 as 13", "2048 as 24")


def test_a_file_whose_lengths_are_no_lengths_is_refused_as_before() -> None:
    """Rows of a table that are chosen by stored positions: a shorter one has other positions."""
    nodes = [
        helper.make_node("Gather", ["table", "chosen"], ["rows"], axis=1),
        helper.make_node("Unsqueeze", ["rows", "axes"], ["bias"]),
        helper.make_node("Add", ["scores", "bias"], ["logits"]),
    ]
    chosen = (4094 - np.arange(2048)).astype(np.int64)
    table = np.random.default_rng(0).standard_normal((32, 4095)).astype(np.float32)
    site = onnx_site(nodes, {"table": table, "chosen": chosen, "axes": np.array([1])}, 32, 2048)
    assert site.status == "refused" and "too many to compare" in str(site.refusal)


def test_a_bias_looked_up_for_each_pair_is_loaded_and_compared_at_shorter_lengths() -> None:
    """As the places are not computed in the Spec, what they hold does not matter."""
    nodes = [
        helper.make_node("Gather", ["table", "chosen"], ["bias"], axis=1),
        helper.make_node("Add", ["scores", "bias"], ["logits"]),
    ]
    chosen = (np.arange(2048)[:, None] - np.arange(2048) + 2047).astype(np.int64)
    table = np.random.default_rng(0).standard_normal((32, 4095)).astype(np.float32)
    site = onnx_site(nodes, {"table": table, "chosen": chosen}, 32, 2048)
    assert site.status == "lifted" and site.spec is not None
    assert "bias[h, i, j]" in str(site.spec) and [v.name for v in site.spec.captured()] == ["bias"]
