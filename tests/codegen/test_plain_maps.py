"""Dense and causal maps: which are recognised, and what decides who computes them."""

from __future__ import annotations

import pytest
import torch

from attncompile.backend.choose import _chosen_by_size
from attncompile.codegen.triton.plain_maps import FEWEST, WORTH, plain_map, without_mask
from attncompile.ir import Spec, parse_spec


def spec(
    mask: str = "true", channels: int = 128, keys: str = "I", score: str = "0.125·s", more: str = "", features: int = 0
) -> Spec:
    return parse_spec(
        f"x   attend  q[B,8,I,{channels}]  k[B,8,{keys},{channels}]  v[B,8,{keys},{features or channels}]  bfloat16\n"
        f"  score  {score}\n  mask   {mask}\n  norm   softmax (float32){more}"
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("channels", [64, 128])
def test_dense_and_causal_maps_are_recognised(causal: bool, channels: int) -> None:
    found = plain_map(spec("j ≤ i" if causal else "true", channels))
    assert found is not None and (found.causal, found.channels) == (causal, channels)


@pytest.mark.parametrize(
    ("other", "in_sdpa"),
    [
        (spec("j < i"), False),
        (spec("j ≤ i and j > i − 64"), False),
        (spec("j ≤ i", keys="J"), False),
        (spec(score="0.125·s + bias[h, i, j]", more="\n  given  bias[8,I,I]:bfloat16"), False),
        (spec("j ≤ i", score="0.125·s + (j − i)·exp(−(h + 1))"), False),
        (spec(score="0.125·s·log(i + 2)"), False),
        (spec("j ≤ i", score="10.0·tanh(0.0125·s)"), False),
        (spec(channels=96), True),
        (spec(channels=128, features=64), True),
    ],
    ids=["strict", "window", "not-square", "bias", "alibi", "scaled", "softcap", "channels", "features"],
)
def test_other_maps_are_not(other: Spec, in_sdpa: bool) -> None:
    assert plain_map(other) is None
    assert without_mask(other) == in_sdpa


def operands(length: int, channels: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [torch.empty(batch, 8, length, channels, device="meta", dtype=dtype) for _ in range(3)]


def test_sizes_decide_who_is_faster() -> None:
    wide, narrow = plain_map(spec()), plain_map(spec("j ≤ i", 64))
    assert wide is not None and narrow is not None
    assert wide.faster_in_sdpa(operands(256, 128))
    batch = int(WORTH // (4 * 8 * 256 * 256 * 128))
    assert wide.faster_in_sdpa(operands(256, 128, batch))
    assert not wide.faster_in_sdpa(operands(256, 128, batch + 1))
    assert wide.faster_in_sdpa(operands(16384, 128, dtype=torch.float32))
    assert narrow.faster_in_sdpa(operands(FEWEST[64, True] - 1, 64, 64))
    assert not narrow.faster_in_sdpa(operands(FEWEST[64, True], 64, 64))


def test_fixed_sizes_decide_at_once_and_gradients_go_to_sdpa() -> None:
    plain = plain_map(spec())
    assert plain is not None
    called: list[str] = []

    def named(name: str):  # type: ignore[no-untyped-def]
        return lambda *tensors: called.append(name) or tensors[0]

    run = _chosen_by_size(plain, named("sdpa"), named("generated"))
    run(*operands(256, 128))
    run(*operands(16384, 128))
    run(*(tensor.requires_grad_() for tensor in operands(16384, 128)))
    with torch.no_grad():
        run(*(tensor.requires_grad_() for tensor in operands(16384, 128)))
    assert called == ["sdpa", "generated", "sdpa", "generated"]


def test_a_symbolic_size_leaves_the_decision_to_the_run() -> None:
    plain = plain_map(spec())
    assert plain is not None
    called: list[str] = []

    def named(name: str):  # type: ignore[no-untyped-def]
        def run(*tensors: torch.Tensor) -> torch.Tensor:
            called.append(name)
            return tensors[0] * 1.0

        return run

    run = _chosen_by_size(plain, named("sdpa"), named("generated"))
    length = torch.export.Dim("length", min=2, max=65536)

    class Site(torch.nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return run(query, key, value)

    given = tuple(torch.zeros(1, 8, 16, 128, dtype=torch.bfloat16) for _ in range(3))
    torch.export.export(Site(), given, dynamic_shapes=[{2: length}] * 3)
    assert called == ["generated"]
