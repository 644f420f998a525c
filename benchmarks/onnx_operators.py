"""Measure ONNX Runtime's attention operators against the plain decomposition; write the table that chooses.

    python benchmarks/onnx_operators.py codegen/onnx/measured.tsv

Every operator that can compute a Spec runs in turn, round after round, in one session each with one thread;
what counts is the processor time of the calling thread, which other programs on the machine do not lengthen
much. A row is the median of the decomposition over the median of the operator. Operands are flat ``[B, S,
H*D]``, as projections give them; a cache has heads ``[B, H, S, D]`` and is measured in a prompt, where it is empty, and
in a step, of one query behind so many keys.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import RemoveUnusedNodesPass

from attncompile.codegen.onnx.capabilities import rows_for
from attncompile.codegen.onnx.choose import CACHED, STEP, mask_class
from attncompile.codegen.onnx.emit import alone
from attncompile.codegen.onnx.reading import group_size
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

PAST = "past_"
CACHES = (
    ("past_{side}[B,12,P,32]  {side}[B,12,I,32]", "q[B,12,I,32]", ""),
    ("past_{side}[B,3,P,64]  {side}[B,3,I,64]", "q[B,9,I,64]", "    kv_head h // 3\n"),
)
"""Past and new keys or values, and queries."""

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
    return found + [cached(*row) for row in CACHES]


def cached(keys: str, queries: str, heads: str) -> Spec:
    """Attention behind a cache, with padding in its mask, as an exported decoder has it."""
    caches = "".join(f"  cache  {keys.format(side=side)}  float32\n    out    all_{side}\n" for side in "kv")
    return parse_spec(
        f"site\n{caches}  attend  {queries}  all_k  all_v  float32\n    score  0.125·s\n"
        f"    mask   j ≤ i + P and attention_mask[b, j] ≠ 0\n    fill   −3.4028234663852886e+38\n{heads}"
        "    norm   softmax (float32)\n  given  attention_mask[B,I+P]:int64\n"
    )


def session(spec: Spec, operator: str) -> onnxruntime.InferenceSession:
    """One operator for the Spec, alone in a model."""
    row = next(row for row in rows_for(spec) if row.operator == operator)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    model = alone(spec, row, flat=True)
    RemoveUnusedNodesPass()(model)  # as a conversion does: a past that an operator joins itself is joined once
    proto = ir.to_proto(model)
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def measure(spec: Spec, length: int, *, step: bool = False) -> list[Row]:
    """Every capable operator at one length, of the prompt or of what is cached before a step."""
    rng = np.random.default_rng(0)
    feed = {}
    lengths = {"B": 1, "I": 1, "P": length} if step else {"B": 1, "I": length, "P": 0}
    for value in spec.inputs:
        sizes = [getattr(size, "value", lengths.get(str(size), length)) for size in value.type.sizes]
        if value.name == "attention_mask":
            feed[value.name] = np.ones((1, lengths["I"] + lengths["P"]), dtype=np.int64)
        else:
            heads, rows, channels = sizes[1:]
            shape = (1, heads, rows, channels) if value.name.startswith(PAST) else (1, rows, heads * channels)
            feed[value.name] = rng.standard_normal(shape).astype(np.float32)
    names = [row.operator for row in rows_for(spec) if row.why_not(spec) is None]
    sessions = {name: session(spec, name) for name in names}
    for running in sessions.values():
        for _ in range(WARM_UP):
            running.run(None, feed)
    rounds = max(5, min(60, 20_000 // length))
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 else names[::-1]:
            start = time.thread_time()
            sessions[name].run(None, feed)
            times[name].append(time.thread_time() - start)
    plain = statistics.median(times["decomposition"])
    attend = spec.attend()
    grouped = attend is not None and group_size(attend, spec.types()) != 1
    return [
        Row(STEP if step else mask_class(spec), grouped, length, name, plain / statistics.median(times[name]))
        for name in names
        if name != "decomposition"
    ]


def device() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [
            line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")
        ]
        if lines:
            return lines[0].partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main(target: Path) -> None:
    """Measure everything and write the table."""
    head = ("provider", "device", "onnxruntime", "date", "mask", "grouped", "length", "operator", "speed")
    fixed = ("cpu", device(), onnxruntime.__version__, datetime.date.today().isoformat())
    lines = [
        "# written by benchmarks/onnx_operators.py: speed relative to the plain decomposition",
        "\t".join(head),
    ]
    for spec in specs():
        behind = mask_class(spec) == CACHED
        cases = [(length, step) for step in (False, True) for length in PROMPTS] if behind else [
            (length, False) for length in LENGTHS
        ]
        for length, step in cases:
            for row in measure(spec, length, step=step):
                cells = (*fixed, row.mask, "yes" if row.grouped else "no", row.length, row.operator)
                lines.append("\t".join(map(str, (*cells, f"{row.speed:.2f}"))))
                print(lines[-1], flush=True)
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python benchmarks/onnx_operators.py TABLE.tsv")
    main(Path(sys.argv[1]))
