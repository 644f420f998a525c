"""Generated kernels under NVIDIA's compute-sanitizer, each once at awkward small sizes.

    python -m benchmarks.sanitize benchmarks/results/sanitizer_h200.json [--tools memcheck,racecheck,synccheck]

Every tensor is an allocation of its own and just as large as it needs to be (PyTorch's caching of memory is off), so
that the first element past an end is a fault that ``memcheck`` sees; ``racecheck`` looks for hazards in shared memory,
``synccheck`` for barriers that not all threads reach. The kernels first run alone, which compiles them and compares
the forward ones with their reference in float64 (backward ones: gradients are finite); then once under each tool, in
several processes at the same time.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from attncompile.codegen import gluon
from attncompile.codegen.triton import generate, load
from attncompile.codegen.triton.backward import generate_backward
from attncompile.codegen.triton.cache import load_module
from attncompile.codegen.triton.generate import GeneratedModule
from attncompile.ir import Spec, parse_spec
from attncompile.kernels.operators import with_log_sum_exp
from attncompile.passes import parse_passes, run_passes
from benchmarks.report import Report, add_processes, arguments, chosen, parse
from benchmarks.sanitizer_controls import CONTROLS

TOOLS = ("memcheck", "racecheck", "synccheck")
LIMIT = 100
"""Seconds that a tool may take."""

_FOUND = re.compile(r"^=+ (?!.*SUMMARY)(Invalid|Error|Warning|Race|Potential|Barrier|Divergent|Program hit|Uninit).*")
_SUMMARY = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (.*)")


@dataclass(frozen=True)
class Sample:
    """A kernel and what it is run on.

    Attributes:
        name: ``kind/row``.
        kind: ``dense``, ``decode``, ``hopper``, ``hopper-8-bit`` (operands rounded to float8), ``backward``,
            ``hopper-backward`` or ``control``, a kernel that is none of ours and known to be right.
        row: of the table of this kind's tests.
        sizes: other ones than the row's; empty for those.
    """

    kind: str
    row: str
    sizes: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        """Kind, row and sizes."""
        return "/".join([self.kind, self.row, *(f"{letter}{size}" for letter, size in self.sizes)])


def _sizes(batch: int, queries: int, keys: int) -> tuple[tuple[str, int], ...]:
    return (("B", batch), ("I", queries), ("J", keys))


SAMPLES: tuple[Sample, ...] = (
    *(
        Sample("dense", row)
        for row in ("one-token", "five-keys", "causal-long", "channels-72-40", "channels-3-7", "grouped-everything",
                    "three-ranges", "lengths", "int8", "scan-padding")
    ),
    *(
        Sample("decode", row)
        for row in ("keys-1", "keys-17", "heads-apart", "sinks-and-window", "channels-192-128", "paged",
                    "paged-narrow", "float8", "int4-channels-80", "int4-groups")
    ),
    *(
        Sample("hopper", row, _sizes(*sizes))
        for row, sizes in (
            ("full-64", (1, 7, 13)), ("full-128", (1, 130, 257)), ("causal-64", (2, 191, 191)),
            ("causal-128", (1, 129, 128)), ("sink-window-64", (1, 300, 300)), ("alibi-128", (1, 130, 130)),
            ("bias-128", (1, 70, 200)), ("documents-64", (1, 300, 300)), ("sinks-128", (2, 64, 65)),
            ("mla-192-128", (1, 65, 65)), ("narrow-16", (1, 33, 190)), ("blocks-128", (1, 300, 300)),
            ("blocks-causal-64", (2, 191, 191)), ("blocks-of-64-128", (1, 130, 257)),
            ("sigmoid-128", (1, 129, 128)), ("sigmoid-documents-128", (1, 191, 191)),
            # More tiles than twice a card's processors, so that thread blocks claim tiles.
            ("documents-64", (4, 1100, 1100)), ("sigmoid-documents-128", (4, 1100, 1100)),
        )
    ),
    *(
        Sample("hopper-8-bit", row, _sizes(*sizes))
        for row, sizes in (("full-64", (1, 130, 257)), ("causal-128", (2, 191, 191)))
    ),
    *(
        Sample("backward", row)
        for row in ("tail-1", "tail-33", "gqa", "sink-logits", "bias-everything", "channels-72-40", "window-documents",
                    "edit-by-pair")
    ),
    *(
        Sample("hopper-backward", row, _sizes(*sizes))
        for row, sizes in (
            ("full", (1, 7, 13)), ("causal", (1, 130, 257)), ("causal-tail", (2, 191, 191)), ("window", (1, 300, 300)),
            ("softcap-64", (1, 129, 128)), ("values-of-their-own", (1, 65, 65)),
        )
    ),
    *(Sample("control", name) for name in CONTROLS),
)  # fmt: skip


def case_of(sample: Sample) -> Any:
    """The row of the tests' tables, with the sample's sizes."""
    from tests.kernels.backward_cases import BACKWARD_BY_NAME
    from tests.kernels.cases import ALL_BY_NAME
    from tests.kernels.decode_cases import DECODE_BY_NAME

    if sample.kind.startswith("hopper"):
        if sample.kind == "hopper-backward":
            from tests.kernels.hopper_backward_cases import ROWS
        else:
            from tests.codegen.test_gluon_gpu import ROWS

        case = next(row for row in ROWS if row.name == sample.row)
        if sample.kind == "hopper-8-bit":
            plain = case.text.replace("\n  lse    lse", "").replace("\n  gives  out, lse", "")
            case = replace(case, text=str(run_passes(parse_spec(plain), parse_passes("quantize.fp8")).spec))
    else:
        table: Any = {"dense": ALL_BY_NAME, "decode": DECODE_BY_NAME, "backward": BACKWARD_BY_NAME}[sample.kind]
        case = table[sample.row]
    return replace(case, sizes=dict(sample.sizes), ranges={"document": (0, 3)}) if sample.sizes else case


def placed(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors on the device, each alone in its memory; those of rank 4 stored as ``[b,i,h,d]``."""
    return [
        tensor.transpose(1, 2).contiguous().cuda().transpose(1, 2) if tensor.dim() == 4 else tensor.contiguous().cuda()
        for tensor in tensors
    ]


def _tuple(found: Any) -> tuple[torch.Tensor, ...]:
    return (found,) if isinstance(found, torch.Tensor) else tuple(found)


def _forward(spec: Spec, tensors: dict[str, torch.Tensor], attend: Callable[..., Any], dtype: torch.dtype) -> bool:
    """Run a kernel; whether its results are within the limits of the tests."""
    from tests.kernels.comparison import measured

    stored = {v.name for v in spec.inputs if v.type.axes and tensors[v.name].element_size() == 1}
    inputs = [
        tensors[v.name].cuda() if v.name in stored or "pages" in v.name else placed([tensors[v.name]])[0]
        for v in spec.inputs
    ]
    found = _tuple(attend(*inputs))
    torch.cuda.synchronize()
    return all(outcome.passed for outcome in measured(spec, tensors, [each.cpu() for each in found], dtype))


def _backward(
    spec: Spec, tensors: dict[str, torch.Tensor], dtype: torch.dtype, make: Callable[[Spec], GeneratedModule]
) -> bool:
    """Run a forward pass and backward kernels; whether all gradients are finite."""
    from tests.kernels.backward import arguments as before

    training = with_log_sum_exp(spec)
    inputs = placed(tensors[value.name] for value in spec.inputs)
    made = _tuple(load(generate(training))(*inputs))
    given = placed(torch.randn(each.shape, dtype=dtype).cpu() for each in made[: len(spec.outputs)])
    results = dict(zip(training.outputs, made, strict=True))
    found = load_module(make(spec)).attend_backward(*before(training, spec, given, results), *inputs)
    torch.cuda.synchronize()
    return all(bool(each.cpu().isfinite().all()) for each in found if each is not None)


def run(sample: Sample) -> bool:
    """Run a sample once; whether its results are right."""
    if sample.kind == "control":
        return CONTROLS[sample.row]()
    case = case_of(sample)
    spec, dtype = case.spec, torch.bfloat16
    tensors = case.tensors(0, dtype)
    if "backward" in sample.kind:
        make = gluon.generate_backward if sample.kind.startswith("hopper") else generate_backward
        return _backward(spec, tensors, dtype, make)
    on_hopper = sample.kind.startswith("hopper")
    module = gluon.generate(spec, queries=dict(sample.sizes)["I"]) if on_hopper else generate(spec)
    return _forward(spec, tensors, load(module), dtype)


def run_all(names: set[str]) -> None:
    """What happens under a tool: a line before and after each sample."""
    for sample in SAMPLES:
        if sample.name in names:
            print(f"begin {sample.name}", flush=True)
            try:
                said = "right" if run(sample) else "WRONG"
            except Exception as error:
                said = f"failed {type(error).__name__}: {error}".splitlines()[0][:300]
            with contextlib.suppress(Exception):  # a fault of one kernel is told by each call after it
                torch.cuda.synchronize()
            print(f"end {sample.name} {said}", flush=True)


def sanitizer() -> str | None:
    """Path of compute-sanitizer."""
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def under(tool: str | None, names: list[str]) -> dict[str, Any]:
    """Run the samples in a process of their own, under a tool or alone; what was said of each."""
    command = [sys.executable, "-m", "benchmarks.sanitize", "-", "--rows", ",".join(names), "--inside"]
    path = sanitizer()
    if tool is not None and path is not None:
        options = ["--report-api-errors", "no", "--print-limit", "200"]
        command = [path, "--tool", tool, *options, *command]
    started = time.perf_counter()
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=LIMIT, env=environment, check=False
        )
        output, ending = done.stdout + done.stderr, f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout or b""
        output, ending = said.decode(errors="replace") if isinstance(said, bytes) else said, f"stopped after {LIMIT} s"
    return {**read(output), "ending": ending, "seconds": time.perf_counter() - started}


def read(output: str) -> dict[str, Any]:
    """What a tool said: of each sample whether results were right, and the first reports; and its summary."""
    samples: dict[str, dict[str, Any]] = {}
    current: dict[str, Any] = {"reports": 0, "first": []}
    outside = current
    summary, following, last = "", 0, []
    for line in output.splitlines():
        begun, ended = re.match(r"begin (\S+)$", line), re.match(r"end (\S+) (.*)$", line)
        if begun:
            current = samples.setdefault(begun[1], {"results": "no result", "reports": 0, "first": []})
        elif ended:
            samples[ended[1]]["results"] = ended[2]
            current = outside
        elif found := _SUMMARY.match(line):
            summary = found[1]
        elif _FOUND.match(line):
            current["reports"] += 1
            following = 6 if current["reports"] <= 2 else 0
            current["first"] += [line.lstrip("= ")] if following else []
        elif line.startswith("=") and following and len(line.strip("= ")) > 0:
            following -= 1
            current["first"].append(line.lstrip("= "))
        elif line.strip() and not line.startswith("="):
            last = [*last[-5:], line]
    return {"summary": summary, "samples": samples, "outside": outside, "last_lines": last}


def _parts(samples: tuple[Sample, ...], count: int) -> list[list[str]]:
    """The samples dealt out to so many processes."""
    parts = [[sample.name for sample in samples[number::count]] for number in range(count)]
    return [part for part in parts if part]


def merged(tool: str, parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One row of what several processes found."""
    rows = list(parts)
    return {
        "tool": tool,
        "summaries": sorted({row["summary"] for row in rows}),
        "endings": sorted({row["ending"] for row in rows}),
        "seconds": max(row["seconds"] for row in rows),
        "samples": {name: found for row in rows for name, found in row["samples"].items()},
        "outside": [row["outside"] for row in rows if row["outside"]["reports"]],
        "last_lines": [row["last_lines"] for row in rows if row["ending"] != "exit code 0"],
    }


def said(row: dict[str, Any]) -> str:
    """A row as a line."""
    unclean = [f"{name}: {s['results']}, {s['reports']}" for name, s in row["samples"].items() if not _clean(s)]
    counted = f"{len(row['samples'])} samples, not clean: {'; '.join(unclean) or 'none'}"
    return f"{row['tool']}: {row['summaries']} {row['endings']} {row['seconds']:.0f} s; {counted}"


def _clean(sample: dict[str, Any]) -> bool:
    return bool(sample["results"] == "right" and not sample["reports"])


def main() -> None:
    """Run everything, print a line for each tool, write JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--tools", default=",".join(TOOLS), help=f"tools of compute-sanitizer ({', '.join(TOOLS)})")
    add_processes(parser, 13)
    parser.add_argument("--inside", action="store_true", help="only run the samples; this is what runs under a tool")
    options = parse(parser)
    samples = chosen(SAMPLES, options.rows)
    if options.inside:
        run_all({sample.name for sample in samples})
        return
    path = sanitizer()
    if path is None:
        parser.error("compute-sanitizer is not on the path; it comes with the CUDA toolkit")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    told = re.search(r"Version (\S+)", version)
    report = Report(options.output, {"compute_sanitizer": told[1] if told else version.strip()[-80:]})
    with ThreadPoolExecutor(options.processes) as pool:
        alone = pool.map(lambda part: under(None, part), _parts(samples, options.processes))
        report.add(row := merged("none", alone))
    print(said(row), flush=True)
    jobs = [(tool, part) for tool in options.tools.split(",") for part in _parts(samples, 4)]
    with ThreadPoolExecutor(options.processes) as pool:
        found = [(tool, pool.submit(under, tool, part)) for tool, part in jobs]
        for tool in options.tools.split(","):
            report.add(row := merged(tool, (each.result() for name, each in found if name == tool)))
            print(said(row), flush=True)


if __name__ == "__main__":
    main()
