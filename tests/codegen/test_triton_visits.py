"""Key ranges of a query block, by brute force: nothing visible is passed over, nothing full is masked."""

from __future__ import annotations

import pytest
import torch

from attncompile.codegen.triton.visits import extreme, possible, visits
from attncompile.ir import Size, parse_expr, simplify
from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import Expr

MASKS = (
    "true",
    "j ≤ i",
    "j < i",
    "j ≤ i + J − I",
    "j > i − 5 and j ≤ i",
    "j ≥ i + 3",
    "j ≤ i − 7",
    "j ≤ i or j < 5",
    "j ≤ i and (j > i − 5 or j < 3)",
    "j ≤ i + 9 and (j > i + 6 or j < 20)",
    "j > 12 or j ≤ i",
    "i = j",
    "j ≤ i and (j > i − 4 or j ≤ i − 9)",
    "j < 3 or j > i or j = 7",
    "i // 4 = j // 4",
    "2·j ≤ i",
    "(i + j) % 3 = 0",
    "j ≤ min(i, 9) and j ≥ max(2, i − 6)",
    "j ≤ where(i < 6, 8, i)",
    "not (j > i) and j ≥ 4·(i // 4)",
    "j < 4·h + 3 and j > i − 5·(b + 1)",
)
SIZES = ((17, 17), (13, 29), (23, 9), (1, 20))


def value(expr: Expr, **indices: int) -> int:
    tensors = {name: torch.tensor(number) for name, number in indices.items()}
    return int(evaluate(expr, Environment(tensors, {"I": indices["size_i"], "J": indices["size_j"]})))


@pytest.mark.parametrize("text", MASKS)
@pytest.mark.parametrize("lengths", SIZES, ids=str)
def test_ranges_hold_what_is_visible(text: str, lengths: tuple[int, int]) -> None:
    queries, keys = lengths
    mask = simplify(parse_expr(text))
    found = visits(mask, Size("I"), Size("J"))
    grid = {"i": torch.arange(queries)[:, None], "j": torch.arange(keys)[None, :]}
    for b, h in ((0, 0), (1, 2)):
        environment = Environment(
            {**grid, "b": torch.tensor(b), "h": torch.tensor(h)}, {"I": queries, "J": keys}
        )
        visible = evaluate(mask, environment).expand(queries, keys)
        for first in range(0, queries, 4):
            last = min(first + 4, queries) - 1
            names = {"row_first": first, "row_last": last, "b": b, "h": h, "size_i": queries, "size_j": keys}
            start, stop = value(found.main.start, **names), value(found.main.stop, **names)
            assert start >= 0 and stop <= keys
            visited = set(range(start, stop))
            if found.first is not None:
                low, high = value(found.first.start, **names), value(found.first.stop, **names)
                assert low >= 0 and high <= keys
                visited |= set(range(low, min(high, start)))
            rows = visible[first : last + 1]
            needed = set(rows.any(0).nonzero().flatten().tolist())
            assert needed <= visited
            if found.full is not None:
                low, high = value(found.full.start, **names), value(found.full.stop, **names)
                full = set(range(low, high))
                assert full <= visited
                assert full <= set(rows.all(0).nonzero().flatten().tolist())
            for block in range(0, keys, 4):
                seen = value(found.test, key_first=block, key_last=block + 3, **names)
                assert seen or not needed & set(range(block, block + 4))


@pytest.mark.parametrize(
    "mask, skipped",
    (
        ("j ≤ i", "upper"),
        ("j > i − 8 and j ≤ i", "both"),
        ("j ≤ i and (j > i − 8 or j < 2)", "between"),
    ),
)
def test_far_keys_are_not_visited(mask: str, skipped: str) -> None:
    found = visits(simplify(parse_expr(mask)), Size("I"), Size("I"))
    names = {"row_first": 64, "row_last": 67, "b": 0, "h": 0, "size_i": 128, "size_j": 128}
    assert value(found.main.stop, **names) == 68
    if skipped != "upper":
        assert value(found.main.start, **names) == 57
    if skipped == "between":
        assert found.first is not None
        assert (value(found.first.start, **names), value(found.first.stop, **names)) == (0, 2)


@pytest.mark.parametrize("text", ("i·j", "a[i]", "i % j"))
def test_what_has_no_bound_says_so(text: str) -> None:
    from attncompile.ir import Index, Kind

    expr = parse_expr(text, {"a": Kind.INT})
    assert extreme(expr, True, {"i": (Index("lo"), Index("hi"))}) is None


def test_unknown_parts_of_a_mask_are_possible() -> None:
    from attncompile.ir import Index, Kind

    mask = parse_expr("m[b, j] and j ≤ i", {"m": Kind.BOOL})
    scalar = possible(
        mask, {"i": (Index("row_first"), Index("row_last")), "j": (Index("key_first"), Index("key_last"))}
    )
    assert str(simplify(scalar)) == str(simplify(parse_expr("key_first ≤ row_last")))
