"""``sparsify.window``: which keys stay, stated by hand."""

from __future__ import annotations

import pytest
import torch

from attncompile.ir import Attend, parse_expr, simplify
from attncompile.ir.blocks import block_map
from attncompile.ir.evaluate import Environment, evaluate, index_grid
from attncompile.passes import parse_passes, run_passes
from attncompile.passes.sparsify import own_position
from tests.cases import BY_NAME


def masked(row: str, options: str) -> Attend:
    attend = run_passes(BY_NAME[row].spec, parse_passes(f"sparsify.window({options})")).spec.attend()
    assert attend is not None
    return attend


def drawn(attend: Attend, queries: int, keys: int, **sizes: int) -> list[str]:
    """The mask as a picture: one text per query."""
    environment = Environment(index_grid({"i": queries, "j": keys}), {"I": queries, "J": keys, **sizes})
    visible = evaluate(attend.mask, environment).expand(queries, keys)
    return ["".join("x" if cell else "." for cell in row) for row in visible.tolist()]


# row, options, sizes, picture
PICTURES = (
    ("causal", "size=2, sinks=0", (5, 5), {}, ["x....", "xx...", ".xx..", "..xx.", "...xx"]),
    ("causal", "size=2, sinks=1", (5, 5), {}, ["x....", "xx...", "xxx..", "x.xx.", "x..xx"]),
    ("causal", "size=1, sinks=0", (3, 3), {}, ["x..", ".x.", "..x"]),
    ("full", "size=2, sinks=0", (5, 5), {}, ["xx...", "xxx..", ".xxx.", "..xxx", "...xx"]),
    ("full", "size=2, sinks=1", (5, 5), {}, ["xx...", "xxx..", "xxxx.", "x.xxx", "x..xx"]),
    ("full", "size=2, sinks=0, symmetric=false", (4, 4), {}, ["xxxx", "xxxx", ".xxx", "..xx"]),
    ("causal-last-rows", "size=2, sinks=0", (2, 5), {}, ["..xx.", "...xx"]),
    ("causal-first-rows", "size=2, sinks=0", (3, 5), {}, ["x....", "xx...", ".xx.."]),
    ("cache", "size=2, sinks=1", (2, 5), {"P": 3}, ["x.xx.", "x..xx"]),
    ("window-symmetric", "size=2, sinks=0", (4, 4), {}, ["xx..", "xxx.", ".xxx", "..xx"]),
)


@pytest.mark.parametrize(("row", "options", "shape", "sizes", "picture"), PICTURES)
def test_pictures(
    row: str, options: str, shape: tuple[int, int], sizes: dict[str, int], picture: list[str]
) -> None:
    assert drawn(masked(row, options), *shape, **sizes) == picture


def test_positions_read_from_a_tensor() -> None:
    spec = BY_NAME["causal-last-rows"].spec
    attend = spec.attend()
    assert attend is not None
    loads = {"position": parse_expr("0").kind}
    moved = Attend("q", "k", "v", mask=parse_expr("j ≤ position[i]", loads))
    assert own_position(moved, spec.types()) == (parse_expr("position[i]", loads), True)
    assert own_position(attend, spec.types()) == (parse_expr("i + J − I"), True)
    for text in ("i + max(0, past[b] − I)", "i + past[b]", "i + max(0, J − I)"):
        counted = Attend("q", "k", "v", mask=parse_expr(f"j ≤ {text}", {"past": loads["position"]}))
        found = own_position(counted, spec.types())
        assert found == (simplify(parse_expr(text, {"past": loads["position"]})), True), text
    for text in ("i + past[i]", "i + past[j]", "2·i + past[b]", "i + 5"):
        unclear = Attend("q", "k", "v", mask=parse_expr(f"j ≤ {text}", {"past": loads["position"]}))
        assert own_position(unclear, spec.types()) is None, text
    other = Attend("q", "k", "v", mask=parse_expr("j ≤ 2·i"))
    assert own_position(other, spec.types()) is None


def test_a_query_that_loses_its_last_key_gives_zero() -> None:
    """A padded query saw real keys far behind it; NaN there would spread through the values of the next
    layer.
    """
    case = BY_NAME["empty-rows-nan"]
    result = run_passes(case.spec, parse_passes("sparsify.window(size=1, sinks=0)"))
    tensors = case.tensors(dtype=torch.float64)
    (out,) = result.spec.interpret(tensors)
    padded = tensors["attention_mask"] == 0
    assert padded.any()
    assert (out.transpose(1, 2)[padded] == 0).all()
    assert not out.isnan().any()


def test_the_window_leaves_out_blocks() -> None:
    attend = masked("causal", "size=256, sinks=4")
    assert block_map(attend.mask, 8192, 8192, block_query=128, block_key=128).visited < 0.07
