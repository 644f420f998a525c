"""Keys that are hidden by what is added to their scores, row after row, up to rows that see nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attncompile.ir import Spec, parse_spec
from tests.kernels.comparison import distance, slack

NUMBERS = ("-1e9", "-1e10", "-3e20", "-1e30", "-3.4028234663852886e38", "-inf")
"""What models add to hide a key: where arithmetic ends, a kernel must not."""

BY_KEY = "bias[b, j]", "bias[B,J]:float32"
BY_PAIR = "bias[b, 0, i, j]", "bias[B,1,I,J]:float32"
QUERIES, KEYS = 70, 90


def hiding_spec(added: tuple[str, str], scale: str = "0.125·s + {0}", channels: int = 32) -> Spec:
    """A causal map of two heads under a mask that is added.

    Args:
        added: the element that is added, and its tensor.
        scale: the score.
        channels: of queries, keys and values.
    """
    return parse_spec(
        f"hiding   attend  q[B,2,I,{channels}]  k,v[B,2,J,{channels}]  float32\n  score  {scale.format(added[0])}\n"
        f"  mask   j ≤ i + 20\n  norm   softmax (float32), empty rows zero\n  lse    lse\n  given  {added[1]}\n"
        "  gives  out, lse"
    )


def errors(
    spec: Spec,
    run: Callable[..., Any],
    number: float,
    dtype: torch.dtype,
    device: str = "cpu",
    queries: int = QUERIES,
) -> list[str]:
    """What is wrong with a kernel's results, batch row for batch row; nothing where they are right.

    In the first batch row no query of the first ten sees a key that is not hidden, in the second none at all, in the
    third the last keys are hidden. Hidden by −∞, such a query gives zeros; by a finite number, the mean of the values
    that the mask leaves to it, since any score is lost beside that number.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = {"q": queries, "k": KEYS, "v": KEYS}
    channels = int(str(spec.types()["q"].sizes[3]))
    tensors = {
        name: torch.randn(3, 2, length, channels, generator=generator).to(device, dtype)
        for name, length in lengths.items()
    }
    hidden = torch.zeros(3, KEYS, dtype=torch.bool, device=device)
    hidden[0, :30], hidden[1], hidden[2, 60:] = True, True, True
    by_pair = len(spec.types()["bias"].sizes) == 4
    shape = (3, 1, queries, KEYS) if by_pair else (3, KEYS)
    hides = hidden[:, None, None].expand(shape) if by_pair else hidden
    added = {value: torch.zeros(shape, device=device).masked_fill(hides, value) for value in (number, -torch.inf)}
    with_infinity = {**tensors, "bias": added[-torch.inf]}
    exact, exact_lse = spec.interpret(with_infinity, torch.float64)
    eager, _ = spec.interpret(with_infinity, dtype)
    allowed = distance(eager, exact) + slack(spec, {"I": queries, "J": KEYS}, dtype, dtype, exact)
    out, lse = run(*({**tensors, "bias": added[number]}[value.name] for value in spec.inputs))
    seen = torch.arange(KEYS, device=device) <= torch.arange(queries, device=device)[:, None] + 20
    low = ~(seen & ~hidden[:, None, None]).any(-1)  # [b,1,i]
    if number > -torch.inf:
        weights = seen.double() / seen.double().sum(-1, keepdim=True)
        exact = torch.where(low[..., None], weights @ tensors["v"].double(), exact)
    wrong = [
        f"batch row {row} is off by {error:.3g}, allowed is {allowed:.3g}"
        for row in range(3)
        if not (error := distance(out[row], exact[row])) <= allowed
    ]
    apart = torch.where(low.expand_as(lse), 0.0, (lse.double() - exact_lse).abs())
    room = slack(spec, {"J": KEYS}, dtype, torch.float32, exact_lse)
    if not float(apart.nan_to_num(torch.inf).max()) <= room:
        wrong.append("the log-sum-exp of rows that see a key is wrong")
    expected = lse == -torch.inf if number == -torch.inf else lse < -1e5
    if not bool(expected[low.expand_as(lse)].all()):
        wrong.append(f"the log-sum-exp of hidden rows is {lse[low.expand_as(lse)].max()}")
    return wrong


__all__ = ["BY_KEY", "BY_PAIR", "NUMBERS", "errors", "hiding_spec"]
