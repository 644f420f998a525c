"""Measure ONNX Runtime's attention operators against the plain decomposition; write the table that chooses.

    python -m benchmarks.onnx_operators codegen/onnx/measured.tsv [--provider cuda] [--only cached|scan]

Every operator that can compute a Spec runs in turn, round after round, in one session each with one thread;
what counts is the processor time of the calling thread, which other programs on the machine do not lengthen
much. A row is the median of the decomposition over the median of the operator. Operands are flat ``[B, S,
H*D]``, as projections give them; a cache has heads ``[B, H, S, D]`` and is measured in a prompt, where it is empty, and
in a step, of one query behind so many keys.

On a CPU it is float32. On a GPU it is float16, everything stays in the device's memory, and what counts is the time
until the device is done. Rows of the other provider stay as they are.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from attncompile.codegen.onnx.capabilities import Provider, rows_for
from attncompile.codegen.onnx.choose import CACHED, STEP, mask_class
from attncompile.codegen.onnx.emit import alone
from attncompile.codegen.onnx.narrow import Narrow, narrowed
from attncompile.codegen.onnx.reading import group_size
from attncompile.convert.providers import session_providers
from attncompile.ir import Spec, parse_spec

WARM_UP = 4
"""Runs before timing: ONNX Runtime plans its memory anew in the second run of a shape."""

SHAPES = (("q,k,v[B,12,I,32]", ""), ("q[B,9,I,64]  k,v[B,3,I,64]", "  kv_head h // 3\n"))
MASKS = (
    ("true", ""),
    ("attention_mask[b, j] ≠ 0", "  given  attention_mask[B,I]:int64\n"),
    ("j ≤ i", ""),
    ("j ≤ i and attention_mask[b, j] ≠ 0", "  given  attention_mask[B,I]:int64\n"),
)
LENGTHS = (64, 128, 384, 1024, 2048)

NARROW: Narrow = "float16"
"""What states are rounded to on a GPU, as ``--precision fp16`` does."""

Feed = dict[str, np.ndarray]

PAST = "past_"
CACHES = (
    ("past_{side}[B,12,P,32]  {side}[B,12,I,32]", "q[B,12,I,32]", ""),
    ("past_{side}[B,3,P,64]  {side}[B,3,I,64]", "q[B,9,I,64]", "    kv_head h // 3\n"),
)
"""Past and new keys or values, and queries."""

SCAN = "site   scan  q,k,v[B,8,I,64]  float32\n  decay  −exp2(−h − 5) + 1.0\n  scale  0.125\n"
"""Linear attention with a decay of each head, as retention has it."""

PROMPTS = (128, 512, 768, 1024, 2048)
"""Lengths at which a cache is measured, of a prompt and of what is cached before a step."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    mask: str
    grouped: bool
    length: int
    operator: str
    speed: float


def specs() -> list[Spec]:
    """The Specs that are measured: as Hugging Face's eager attention has them, masked logits finite."""
    found = []
    for operands, heads in SHAPES:
        for mask, given in MASKS:
            fill = "" if mask == "true" else "  fill   −3.4028234663852886e+38\n"
            found.append(
                parse_spec(
                    f"site   attend  {operands}  float32\n  score  0.125·s\n  mask   {mask}\n{fill}{heads}"
                    f"  norm   softmax (float32)\n{given}"
                )
            )
    return found + [cached(*row) for row in CACHES] + [parse_spec(SCAN)]


def cached(keys: str, queries: str, heads: str) -> Spec:
    """Attention behind a cache, with padding in its mask, as an exported decoder has it."""
    caches = "".join(f"  cache  {keys.format(side=side)}  float32\n    out    all_{side}\n" for side in "kv")
    return parse_spec(
        f"site\n{caches}  attend  {queries}  all_k  all_v  float32\n    score  0.125·s\n"
        f"    mask   j ≤ i + P and attention_mask[b, j] ≠ 0\n    fill   −3.4028234663852886e+38\n{heads}"
        "    norm   softmax (float32)\n  given  attention_mask[B,I+P]:int64\n"
    )


def session(spec: Spec, operator: str, provider: Provider) -> onnxruntime.InferenceSession:
    """One operator for the Spec, alone in a model."""
    row = next(row for row in rows_for(spec) if row.operator == operator)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    model = alone(spec, row, flat=True)
    RemoveUnusedNodesPass()(model)  # as a conversion does: a past that an operator joins itself is joined once
    if provider == "cuda":
        narrowed(model, NARROW)
    proto = ir.to_proto(model)
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=list(session_providers(provider)))


def on_processor(running: onnxruntime.InferenceSession, feed: Feed) -> Callable[[], float]:
    """A call on a CPU, which gives its processor time in seconds."""

    def call() -> float:
        start = time.thread_time()
        running.run(None, feed)
        return time.thread_time() - start

    return call


def on_device(running: onnxruntime.InferenceSession, feed: Feed) -> Callable[[], float]:
    """A call on a GPU with all tensors there, which gives the seconds until it is done."""
    binding = running.io_binding()
    kinds = {entry.name: entry.type for entry in running.get_inputs()}
    for name, array in feed.items():
        if kinds[name] == "tensor(float16)":
            array = array.astype(np.float16)
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
    for entry in running.get_outputs():
        binding.bind_output(entry.name, "cuda", 0)
    binding.synchronize_inputs()

    def call() -> float:
        start = time.perf_counter()
        running.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return time.perf_counter() - start

    return call


def measure(spec: Spec, length: int, provider: Provider = "cpu", *, step: bool = False) -> list[Row]:
    """Every capable operator at one length, of the prompt or of what is cached before a step."""
    rng = np.random.default_rng(0)
    feed: Feed = {}
    lengths = {"B": 1, "I": 1, "P": length} if step else {"B": 1, "I": length, "P": 0}
    for value in spec.inputs:
        sizes = [getattr(size, "value", lengths.get(str(size), length)) for size in value.type.sizes]
        if value.name == "attention_mask":
            feed[value.name] = np.ones((1, lengths["I"] + lengths["P"]), dtype=np.int64)
        else:
            heads, rows, channels = sizes[1:]
            shape = (1, heads, rows, channels) if value.name.startswith(PAST) else (1, rows, heads * channels)
            feed[value.name] = rng.standard_normal(shape).astype(np.float32)
    dtype = NARROW if provider == "cuda" else None
    names = [row.operator for row in rows_for(spec) if row.why_not(spec, provider, dtype=dtype) is None]
    way = on_device if provider == "cuda" else on_processor
    calls = {name: way(session(spec, name, provider), feed) for name in names}
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    rounds = max(5, min(60, 20_000 // length))
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 else names[::-1]:
            times[name].append(calls[name]())
    plain = statistics.median(times["decomposition"])
    attend = spec.attend()
    grouped = attend is not None and group_size(attend, spec.types()) != 1
    return [
        Row(STEP if step else mask_class(spec), grouped, length, name, plain / statistics.median(times[name]))
        for name in names
        if name != "decomposition"
    ]


def device(provider: Provider = "cpu") -> str:
    """The name of the processor, or of the GPU, as the system gives it."""
    if provider == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [
            line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")
        ]
        if lines:
            return lines[0].partition(":")[2].strip()
    return platform.processor() or platform.machine()


def part_of(spec: Spec) -> str:
    """What of the table a Spec is measured for: ``cached``, ``scan``, or ``plain``."""
    return "scan" if spec.scan() is not None else "cached" if mask_class(spec) == CACHED else "plain"


def part_of_line(line: str) -> str:
    """The same of a line of the table."""
    mask, operator = line.split("\t")[4], line.split("\t")[7]
    return "scan" if operator == "LinearAttention" else "cached" if mask in (CACHED, STEP) else "plain"


def main(target: Path, provider: Provider, only: str | None = None) -> None:
    """Measure everything on a provider, or a part of it, and put it into the table."""
    head = ("provider", "device", "onnxruntime", "date", "mask", "grouped", "length", "operator", "speed")
    fixed = (provider, device(provider), onnxruntime.__version__, datetime.date.today().isoformat())
    first = ["# written by benchmarks/onnx_operators.py: speed relative to the plain decomposition", "\t".join(head)]
    known = target.read_text(encoding="utf-8").splitlines()[len(first) :] if target.exists() else []
    lines: list[str] = []
    for spec in specs():
        behind = part_of(spec) == "cached"
        if only not in (None, part_of(spec)):
            continue
        cases = [(length, step) for step in (False, True) for length in PROMPTS] if behind else [
            (length, False) for length in LENGTHS
        ]
        for length, step in cases:
            for row in measure(spec, length, provider, step=step):
                cells = (*fixed, row.mask, "yes" if row.grouped else "no", row.length, row.operator)
                lines.append("\t".join(map(str, (*cells, f"{row.speed:.2f}"))))
                print(lines[-1], flush=True)
    kept = [line for line in known if not line.startswith(f"{provider}\t")]
    same = [line for line in known if line not in kept and only not in (None, part_of_line(line))]
    whole = [*same, *lines, *kept] if provider == "cpu" else [*kept, *same, *lines]
    target.write_text("\n".join([*first, *whole]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("table", type=Path, help="where the results go")
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", choices=("plain", "cached", "scan"), help="these rows; the others stay")
    given = parser.parse_args()
    main(given.table, given.provider, given.only)
