"""A process in which Triton interprets kernels on the CPU, asked for one row at a time.

Triton decides when it is imported whether kernels are compiled or interpreted, so the interpreter needs a
process of its own. ``python -m tests.kernels.interpreter`` reads one JSON request a line and answers each
with one line.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

from tests.cases import Case
from tests.kernels.backward_cases import BACKWARD_BY_NAME
from tests.kernels.decode_cases import DECODE_BY_NAME
from tests.kernels.neighbourhood_cases import NEIGHBOURHOODS_BY_NAME
from tests.kernels.taps_cases import TAPS_BY_NAME

BY_NAME: dict[str, Case] = {**BACKWARD_BY_NAME, **DECODE_BY_NAME, **TAPS_BY_NAME}

ROOT = Path(__file__).resolve().parents[2]


def small_tile(longest: int) -> int:
    """A block size that cuts a map into a few blocks: the interpreter takes milliseconds for each."""
    return 16 if longest < 60 else 32


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Generate, load, run and compare one row."""
    import torch

    from attncompile.codegen.triton import generate
    from attncompile.codegen.triton.cache import load_module
    from tests.kernels.comparison import compare, poisoned_inputs
    from tests.kernels.decode_cases import stored_inputs
    from tests.kernels.narrow import ZeroCase

    if request.get("hopper_backward"):
        return {"passed": around_hopper_backward(request["hopper_backward"])}
    if request.get("hiding"):
        from tests.kernels.hiding import errors, hiding_spec

        spec = hiding_spec(tuple(request["hiding"]), *([request["score"]] if request.get("score") else []))
        module, dtype = load_module(generate(spec)), getattr(torch, request["dtype"])
        blocks = {"TILES": {dtype: (32, 32, 4, 1)}, "DECODE_TILES": {dtype: (32, 4, 1)}}
        with mock.patch.multiple(module, LONG_CACHE=0, LEAST_TILES=1, **blocks):
            return {"wrong": errors(spec, module.attend, float(request["number"]), dtype, queries=request["queries"])}
    if request.get("boxes"):
        return {"outcomes": moved(request["case"], tuple(request["boxes"]), getattr(torch, request["dtype"]))}
    if request.get("text"):
        given = Case("given", request["text"], request["sizes"])
        found = compare(given, load_module(generate(given.spec)).attend, getattr(torch, request["dtype"]))
        return {"outcomes": [[o.output, o.error, o.limit, o.passed] for o in found]}
    if request.get("codes"):
        from tests.kernels.rotary import wrong_codes

        return {"codes": wrong_codes(BY_NAME[request["case"]], getattr(torch, request["dtype"]))}
    case = BY_NAME[request["case"]]
    if request.get("zeros"):
        case = ZeroCase(**vars(case))
    dtype = getattr(torch, request["dtype"])
    if request.get("gradients"):
        from tests.kernels.backward import compare_backward, compare_operator

        side = small_tile(max(case.sizes.values()))
        torch.use_deterministic_algorithms(bool(request.get("deterministic")))
        if request["gradients"] == "operator":
            found = compare_operator(case, dtype)
        else:
            found = compare_backward(case, dtype, tiles=(side, side, 4, 1) if request["small"] else None)
        return {"outcomes": [[o.output, o.error, o.limit, o.passed] for o in found]}
    module = load_module(generate(case.spec))
    side = small_tile(max(case.sizes.values()))
    place = poisoned_inputs
    small: dict[str, Any] = {"TILES": {dtype: (side, side, 4, 1)}} if request["small"] else {}
    if request["case"] in DECODE_BY_NAME:
        place = stored_inputs
        # the decode kernel however short the cache is, in several parts
        small = {"DECODE_TILES": {dtype: (side, 4, 1)}, "LONG_CACHE": 0, "LEAST_TILES": 1}
    with contextlib.ExitStack() as changes:
        for name, value in small.items():
            if hasattr(module, name):
                changes.enter_context(mock.patch.object(module, name, value))
        outcomes = compare(case, module.attend, dtype, place=place)
    return {"outcomes": [[o.output, o.error, o.limit, o.passed] for o in outcomes]}


def around_hopper_backward(name: str) -> list[bool]:
    """Run the kernels before and after the backward kernel for Hopper GPUs.

    Returns:
        Whether the row values are right, whether the sums begin with zeros, and whether sums in the order of a
        warpgroup's registers become the gradient.
    """
    import math

    import torch

    from attncompile.codegen.gluon import generate_backward
    from attncompile.codegen.triton.cache import load_module
    from tests.kernels.hopper_backward_cases import ROWS

    module = load_module(generate_backward(next(row for row in ROWS if row.name == name).spec))
    skeleton = generate_backward(next(row for row in ROWS if row.name == name).spec).skeleton
    width, channels = skeleton.tile.queries, skeleton.tile.channels
    batch, heads, queries, blocks = 2, 3, width + 6, 2
    shape = (batch, heads, queries)
    out, grad_out = (torch.randn(*shape, skeleton.features) for _ in range(2))
    lse, grad_lse = torch.randn(shape), torch.randn(shape)
    lse[0, 1, 5] = -math.inf
    given = [lse, grad_lse] if skeleton.lse_gradient else [lse]
    row_values = torch.full((batch, heads, blocks, width // 64, 2, 64), math.nan)
    sums = torch.full((batch, heads, blocks, width * channels), math.nan)
    sizes = {"CHANNELS": channels, "BLOCK_I": width}
    grid = (batch * heads * blocks,)
    strides = (*out.stride(), *grad_out.stride())
    module.prepare[grid](
        out, grad_out, *given, row_values, sums, heads, queries, blocks, *strides, EXTENT=skeleton.features, **sizes
    )
    delta = (out.double() * grad_out.double()).sum(-1) - (grad_lse.double() if skeleton.lse_gradient else 0.0)
    seen = lse > -math.inf
    wanted = torch.stack(
        [torch.where(seen, lse.double() / math.log(2), math.inf), torch.where(seen, delta, 0.0)], -2
    )
    room = torch.tensor([math.inf, 0.0], dtype=torch.float64)[:, None].expand(batch, heads, 2, blocks * width).clone()
    room[..., :queries] = wanted
    found = row_values.movedim(4, 2).reshape(room.shape).double()
    slack = math.sqrt(skeleton.features) * torch.finfo(torch.float32).eps * (1.0 + room.nan_to_num(0, 0, 0).abs().max())
    right = bool(((found == room) | ((found - room).abs() <= slack)).all())
    cleared = bool((sums == 0.0).all())
    best = torch.randn(batch, heads, blocks * width, channels)
    # accumulators of wgmma m64nNk16, PTX ISA: a warp has 16 rows, a thread two of them and pairs of columns
    part, thread, register = torch.meshgrid(*map(torch.arange, (2, 128, 32)), indexing="ij")
    lane = thread % 32
    channel = part * 64 + thread // 32 * 16 + lane // 4 + register // 2 % 2 * 8
    query = register // 4 * 8 + lane % 4 * 2 + register % 2
    if not skeleton.tile.by_channels:  # the product is not transposed
        channel, query = query, channel
    place = part * 4096 + register // 4 * 512 + thread * 4 + register % 4
    tiles = best.reshape(batch, heads, blocks, width, channels)
    sums[..., place] = tiles[..., query, channel]
    gradient = torch.full((*shape, skeleton.channels), math.nan)
    module.finish[grid](
        sums, gradient, heads, queries, blocks, *gradient.stride()[:3], EXTENT=skeleton.channels, **sizes
    )
    scaled = best[:, :, :queries, : skeleton.channels] * skeleton.gain
    return [right, cleared, bool(torch.allclose(gradient, scaled, rtol=torch.finfo(torch.float32).eps, atol=0.0))]


def moved(name: str, places: tuple[int, int], dtype: Any) -> list[Any]:
    """Run a row of neighbourhood attention with its tokens in boxes of so many queries and keys."""
    from attncompile.codegen.triton import generate
    from attncompile.codegen.triton.cache import load_module
    from tests.kernels.comparison import compare

    row = NEIGHBOURHOODS_BY_NAME[name]
    module = load_module(generate(row.moved(*places)))
    with mock.patch.object(module, "TILES", {dtype: (*places, 4, 1)}):
        outcomes = compare(row.case, module.attend, dtype)
    return [[o.output, o.error, o.limit, o.passed] for o in outcomes]


class Interpreter:
    """The process, from the side of the tests."""

    def __init__(self, cache: Path) -> None:
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "1",
            "ATTNCOMPILE_CACHE": str(cache),
            "PYTHONPATH": str(ROOT),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.interpreter"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request; the answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the interpreter process ended with code {self._process.wait()}"
        return json.loads(line)  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def main() -> None:
    """Answer requests until the input ends."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # nothing else may write into the answers
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception:
            reply = {"failure": traceback.format_exc()}
        out.write(json.dumps(reply) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
