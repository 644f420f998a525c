"""What generated kernels take of GPUs that need not be there: registers, spills, shared memory, by release of Triton.

    python -m benchmarks.ahead_of_time results/ahead_of_time.json [--rows causal,int4]

One run is of the installed release; the file keeps those of others. Nothing is run, and nothing is timed. A kernel that
does not compile for a target is a row with its error.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from attncompile.codegen import gluon
from attncompile.codegen.gluon.ahead import compile_ahead as compile_hopper
from attncompile.codegen.gluon.ahead import compile_gradients_ahead
from attncompile.codegen.triton import generate
from attncompile.codegen.triton.ahead import TARGETS, Compiled, Target, compile_ahead
from attncompile.codegen.triton.backward import generate_backward
from attncompile.codegen.triton.cache import write_whole
from attncompile.codegen.triton.rounding import why_no_e4m3
from attncompile.ir import Spec, parse_spec
from attncompile.ir.neighbourhood import neighbourhood
from attncompile.passes import parse_passes, run_passes

HOPPER = next(target for target in TARGETS if target.arch == 90)


@dataclass(frozen=True)
class Work:
    """A Spec and what is compiled for it.

    Attributes:
        name: of the row.
        spec: what is computed.
        hopper: whether the kernel for Hopper GPUs is compiled; those in plain Triton are, for every target.
        gradients: whether kernels for gradients are.
    """

    name: str
    spec: Spec
    hopper: bool = True
    gradients: bool = False


def _attend(
    score: str = "0.09·s",
    mask: str = "j ≤ i",
    given: str = "",
    more: str = "",
    channels: int = 128,
    heads: tuple[int, int] = (16, 16),
    length: str = "I",
    passes: str = "",
) -> Spec:
    query, key = heads
    lines = [
        f"work   attend  q[B,{query},{length},{channels}]  k,v[B,{key},{length},{channels}]  bfloat16",
        f"score  {score}",
        f"mask   {mask}",
        *([f"kv_head h // {query // key}"] if query != key else []),
        *([more] if more else []),
        "norm   softmax (float32)",
        *([f"given  {given}"] if given else []),
    ]
    spec = parse_spec("\n  ".join(lines))
    return run_passes(spec, parse_passes(passes)).spec if passes else spec


def _step(codes: str = "") -> Spec:
    """One query over a long cache, as it is or in codes."""
    if not codes:
        return parse_spec(
            "work   attend  q[B,32,I,128]  k,v[B,8,J,128]  bfloat16\n  score  0.09·s\n  mask   j ≤ i + J − I\n"
            "  kv_head h // 4\n  norm   softmax (float32)"
        )
    dtype, stored, bits = {
        "fp8": ("float8_e4m3", 128, ""),
        "int8": ("int8", 128, ""),
        "int4": ("uint8", 64, "    bits   4\n"),
    }[codes]
    stores = "".join(
        f"  dequantize  {name}_codes[B,8,J,{stored}]:{dtype}\n    scale  {name}_scale[{place}]\n{bits}"
        f"    dtype  bfloat16\n    out    {name}\n"
        for name, place in (("k", "b, g, d"), ("v", "b, g, j"))
    )
    return parse_spec(
        f"work\n{stores}  attend  q[B,32,I,128]  k  v  bfloat16\n    score  0.09·s\n    mask   j ≤ i + J − I\n"
        "    kv_head h // 4\n    norm   softmax (float32)\n"
        "  given  k_scale[B,8,128]:float32\n  given  v_scale[B,8,J]:float32"
    )


def _latent() -> Spec:
    return parse_spec(
        "work   attend  q[B,128,I,576]  k[B,1,J,576]  v[B,1,J,512]  bfloat16\n  score  0.04·s\n  mask   j < length[b]\n"
        "  kv_head 0\n  norm   softmax (float32)\n  given  length[B]:int32"
    )


def works() -> tuple[Work, ...]:
    """The rows."""
    plane = str(neighbourhood((128, 128), (16, 16)))
    scan = "work   scan  q,k,v[B,16,I,128]  bfloat16\n  decay  sigmoid(decays[h])\n  given  decays[16]:float32"
    return (
        *(
            Work(f"{name}-{channels}", _attend(mask=mask, channels=channels), gradients=True)
            for channels in (64, 128)
            for name, mask in (("full", "true"), ("causal", "j ≤ i"), ("window", "j ≤ i and j > i − 1024"))
        ),
        *(Work(f"causal-{channels}", _attend(channels=channels)) for channels in (72, 80, 96, 112, 160, 256)),
        Work("alibi", _attend("0.09·s + exp2(−0.5·h)·float(j − i)")),
        Work("softcap", _attend("30.0·tanh(0.003·s)")),
        Work("sinks", _attend(more="sink   sinks[h]", given="sinks[16]:float32")),
        Work("documents", _attend(mask="j ≤ i and document[b, j] = document[b, i]", given="document[B,I]:int32")),
        Work("key-bias", _attend("0.09·s + bias[b, j]", given="bias[B,I]:float32")),
        Work("pair-bias", _attend("0.09·s + bias[h, i, j]", given="bias[16,I,I]:bfloat16"), hopper=False),
        Work("blocks", _attend(mask="shown[h, i // 128, j // 128]", given="shown[16,(I+127)//128,(I+127)//128]:bool")),
        Work("plane", _attend(mask=plane, length="16384")),
        Work("int8", _attend(passes="quantize.int8")),
        Work("fp8", _attend(passes="quantize.fp8")),
        Work("step", _step(), hopper=False),
        *(Work(f"step-{codes}", _step(codes), hopper=False) for codes in ("fp8", "int8", "int4")),
        Work("latent-step", _latent(), hopper=False),
        Work("scan", parse_spec(scan), hopper=False),
    )


def jobs(work: Work) -> Iterator[tuple[str, Target, Callable[[], tuple[Compiled, ...]]]]:
    """What is compiled for a row: the language and whether it is for gradients, the target, and what compiles it.

    GPUs without e4m3 are left out where a Spec needs it.
    """
    spec = work.spec
    if work.hopper:
        yield "gluon", HOPPER, partial(compile_hopper, gluon.generate(spec, queries=16384), "bfloat16")
    if work.gradients and gluon.why_not_backward(spec) is None:
        yield "gluon, gradients", HOPPER, partial(_hopper_gradients, spec)
    for target in TARGETS:
        capability = divmod(int(target.arch), 10) if target.backend == "cuda" else None
        if why_no_e4m3(spec, capability) is not None:
            continue
        yield "triton", target, partial(compile_ahead, generate(spec), target, "bfloat16")
        if work.gradients:
            yield "triton, gradients", target, partial(compile_ahead, generate_backward(spec), target, "bfloat16")


def _hopper_gradients(spec: Spec) -> tuple[Compiled, ...]:
    return (compile_gradients_ahead(gluon.generate_backward(spec), "bfloat16"),)


def rows(work: Work) -> list[dict[str, Any]]:
    """One for each compiled kernel, or for what does not compile."""
    made: list[dict[str, Any]] = []
    for language, target, compiled in jobs(work):
        where = {"work": work.name, "language": language, "target": str(target)}
        try:
            made += [
                {**where, "kernel": k.kernel, "registers": k.registers, "spills": k.spills, "shared": k.shared}
                for k in compiled()
            ]
        except Exception as error:  # whatever a compiler says is the result
            made.append({**where, "failure": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"})
    return made


def main() -> None:
    """Compile every row with the installed release of Triton and write what it takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", default="", help="parts of names, by commas")
    options = parser.parse_args()
    import triton

    known = json.loads(options.out.read_text()) if options.out.exists() else {"releases": {}}
    wanted = [part for part in options.rows.split(",") if part]
    found: list[dict[str, Any]] = []
    for work in works():
        if not wanted or any(part in work.name for part in wanted):
            found += rows(work)
            print(f"{work.name}: {sum('failure' in row for row in found)} failures so far", flush=True)
            release = {"torch": importlib.metadata.version("torch"), "rows": found}
            known["releases"] = dict(sorted({**known["releases"], triton.__version__: release}.items()))
            write_whole(options.out, (json.dumps(known, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
