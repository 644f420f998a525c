"""Trying one kernel in the place of another: whether it gives the same, and how long a call takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

CODES = 0.0625
"""Half the distance of two neighbouring numbers at 1 in e4m3, which weights may be rounded to."""

_LONG = 10.0
"""Milliseconds from which on a call is timed a few times, as it is."""


def apart(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], codes: bool) -> str | None:
    """Why results are not those of the default, or ``None``.

    Both lie within their own rounding of the true ones: weights and results are rounded to the element type, or weights
    to a narrower one (``codes``). In the norm of a row each of these errors is below one distance of neighbouring
    numbers at 1. Rows are compared one by one, a row smaller than most at the scale of those: it is a sum of values
    that cancel.
    """
    for ours, theirs in zip(found, wanted, strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"gives {tuple(ours.shape)} {ours.dtype} for {tuple(theirs.shape)} {theirs.dtype}"
        if not theirs.numel():
            continue
        finite = torch.isfinite(theirs)
        same = (ours == theirs) | (torch.isnan(ours) & torch.isnan(theirs))
        if not bool((same | finite).all()) or not bool((torch.isfinite(ours) | ~finite).all()):
            return "gives infinities or NaN in other places"
        bound = 4 * max(torch.finfo(theirs.dtype).eps, CODES if codes else 0.0)
        shown = torch.where(finite, theirs, 0).float()
        rows = torch.linalg.vector_norm(torch.where(finite, ours, 0).float() - shown, dim=-1)
        sizes = torch.linalg.vector_norm(shown, dim=-1)
        beyond = rows - bound * torch.maximum(sizes, sizes.mean())
        if bool((beyond > 0).any()):
            worst = int(beyond.argmax())
            return (
                f"has a row {float(rows.flatten()[worst]):.2g} apart in norm, "
                f"more than {bound:.2g} of {float(sizes.flatten()[worst]):.2g} or of the mean row"
            )
    return None


def milliseconds(call: Callable[[], object]) -> float:
    """Time of a call on the GPU, the median of replayed CUDA graphs; or what the host takes for it, if that is more.

    On the device that is current. What cannot be captured, and what takes long, is timed as plain calls.
    """
    from triton.testing import do_bench, do_bench_cudagraph

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    begin.record()
    call()
    host = 1e3 * (time.perf_counter() - start)
    end.record()
    end.synchronize()
    once = float(begin.elapsed_time(end))
    if once > _LONG:
        return once
    for _ in range(4):
        start = time.perf_counter()
        call()
        host = min(host, 1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    try:
        return max(host, float(do_bench_cudagraph(call, rep=20, return_mode="median")))
    except RuntimeError:  # what asks the device something while it is captured
        torch.cuda.synchronize()
        return max(host, float(do_bench(call, warmup=5, rep=20, return_mode="median")))


__all__ = ["apart", "milliseconds"]
