"""Converted models in ONNX Runtime's CPU beside torch's own exports and what other tools make of them.

    python -m benchmarks.onnx_cpu results.json [--models minilm smollm2 whisper] [--rounds N] [--precisions int8 int4]

Peers are `torch.onnx.export(dynamo=True)` with eager and with sdpa attention, ONNX Runtime's transformer optimizer and
onnxscript's fusions (`onnx_fusers.py`); ours is `attncompile.convert` of the eager model with default options, which
compares before it writes. Every round runs
each of them once, in alternating order, and a ratio is median over median. Two readings are given: wall time
with two threads that do not spin, and processor time of one thread, which other programs on the machine
disturb less. Ratios above 1 mean that ours is faster.

With `--precisions` the same is measured of conversions with `--precision`, each a case of its own beside the float32
exports, `ours` being the rounded model. What rounding costs in quality is measured in the same run (`onnx_quality.py`).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir
import onnxruntime
import torch
import transformers

import attncompile
from attncompile.convert.export import export_onnx
from attncompile.frontends.checkpoint import open_model
from attncompile.plan.schema import load_plan
from benchmarks.checkpoints import checkpoint_folder
from benchmarks.onnx_fusers import Shape, fused_peers
from benchmarks.onnx_operators import WARM_UP, device
from benchmarks.onnx_quality import QUALITY

Implementation = Literal["eager", "sdpa"]
Arguments = tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]
Feed = dict[str, np.ndarray]
THREADS = 2
LONG, LONG_ROUNDS = 4096, 3
"""Tokens from which on a call takes so long, and so much memory, that one session is open at a time, for so many rounds
with two threads alone."""

KIB = 1024
"""Bytes in the unit of `/proc/self/status`, whose high-water mark a process does not inherit, as it does that of
`getrusage`."""


class Encoder(torch.nn.Module):
    """Whisper's encoder on `[batch, 1, mels, frames]`: so that only the batch varies."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The last hidden state."""
        return self.encoder(features.squeeze(1)).last_hidden_state


def _whisper_encoder(implementation: Implementation) -> Arguments:
    model = transformers.WhisperModel.from_pretrained(
        checkpoint_folder("whisper"), attn_implementation=implementation, dtype=torch.float32
    )
    return Encoder(model.get_encoder()).eval(), (), {"features": torch.randn(2, 1, 80, 3000)}


def whisper_encoder_eager() -> Arguments:
    """Whisper's encoder with eager attention, for `file.py:function`."""
    return _whisper_encoder("eager")


def whisper_encoder_sdpa() -> Arguments:
    """Whisper's encoder with sdpa attention, for `file.py:function`."""
    return _whisper_encoder("sdpa")


@dataclass(frozen=True)
class Subject:
    """A model with the calls it is timed on.

    Attributes:
        name: what it is called in the results.
        target: what `attncompile` opens, for an implementation of attention.
        shapes: batch and tokens of each call.
        feed: inputs of a call of that shape.
        names: the model's inputs.
        optimizer: what ONNX Runtime's optimizer has to be told of it.
    """

    name: str
    target: Callable[[Implementation], str]
    shapes: tuple[tuple[int, int], ...]
    feed: Callable[[int, int], Feed]
    names: tuple[str, ...]
    optimizer: Shape


def _tokens(batch: int, tokens: int) -> Feed:
    ids = np.random.default_rng(0).integers(5, 20_000, (batch, tokens))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def _sound(batch: int, tokens: int) -> Feed:
    features = np.random.default_rng(0).standard_normal((batch, 1, 80, 2 * tokens))
    return {"features": features.astype(np.float32)}


SUBJECTS: Mapping[str, Subject] = {
    subject.name: subject
    for subject in (
        Subject(
            "minilm", lambda _: str(checkpoint_folder("minilm")), ((1, 128), (16, 128), (1, 384), (16, 384)), _tokens,
            ("input_ids", "attention_mask", "token_type_ids"), Shape("bert", 12, 384),
        ),
        Subject(
            "smollm2", lambda _: str(checkpoint_folder("smollm2")), ((1, 512), (1, 2048), (1, 6144)), _tokens,
            ("input_ids", "attention_mask"), Shape("gpt2", 9, 576),
        ),
        Subject(
            "whisper", lambda kind: f"{Path(__file__)}:whisper_encoder_{kind}", ((1, 1500),), _sound,
            ("features",), Shape("bart", 6, 384),
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One line of the results; times in milliseconds by competitor, ratios over ours.

    Attributes:
        model, batch, tokens: what ran.
        rounds: interleaved rounds behind each median.
        largest_difference: of our first output to the eager export's.
        wall, work: median wall time with two threads, median processor time with one.
        wall_ratio, work_ratio: a peer's time over ours.
        operators: what `attncompile.convert` put at how many sites.
        precision: of ours; empty for float32.
        megabytes: sizes with weights.
        quality: of ours against the eager export's answers, where a precision was asked for.
        kept: projections that the precision's budget left in float32.
        peak_mb: most memory of a process that loads the model and calls it twice, above what it held before.
    """

    model: str
    batch: int
    tokens: int
    rounds: int
    largest_difference: float
    wall: dict[str, float]
    work: dict[str, float]
    wall_ratio: dict[str, float]
    work_ratio: dict[str, float]
    operators: dict[str, int]
    precision: str = ""
    megabytes: dict[str, float] = field(default_factory=dict)
    quality: dict[str, float] = field(default_factory=dict)
    kept: int = 0
    peak_mb: dict[str, float] = field(default_factory=dict)


def _session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # idle threads of one session would otherwise spin on the cores that the next one is timed on
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _fed(session: onnxruntime.InferenceSession, feed: Feed) -> Feed:
    return {entry.name: feed[entry.name] for entry in session.get_inputs()}


def _interleaved(
    paths: Mapping[str, Path], feed: Feed, rounds: int, threads: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median milliseconds of every model, each run once a round."""
    sessions = {name: _session(path, threads) for name, path in paths.items()}
    for session in sessions.values():
        for _ in range(WARM_UP if rounds >= WARM_UP else 1):
            session.run(None, _fed(session, feed))
    return _medians(list(paths), rounds, lambda name: _timed(sessions[name], feed, clock))


def _one_at_a_time(paths: Mapping[str, Path], feed: Feed, rounds: int, threads: int) -> dict[str, float]:
    """The same by wall time with one session open at a time, whose second call counts: long calls need the memory."""

    def called(name: str) -> float:
        session = _session(paths[name], threads)
        session.run(None, _fed(session, feed))
        return _timed(session, feed, time.perf_counter)

    return _medians(list(paths), rounds, called)


def _medians(names: Sequence[str], rounds: int, timed: Callable[[str], float]) -> dict[str, float]:
    """Median of what each gave, asked once a round, in alternating order."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[:: 1 if number % 2 else -1]:
            times[name].append(timed(name))
    return {name: round(statistics.median(found), 3) for name, found in times.items()}


def _timed(session: onnxruntime.InferenceSession, feed: Feed, clock: Callable[[], float]) -> float:
    """Milliseconds of a call."""
    fed = _fed(session, feed)
    start = clock()
    session.run(None, fed)
    return 1e3 * (clock() - start)


def _difference(one: Path, other: Path, feed: Feed) -> float:
    """Largest absolute difference of the first outputs."""
    first, second = (_first_output(path, feed) for path in (one, other))
    return float(np.abs(np.subtract(first, second, out=first), out=first).max())


def _first_output(path: Path, feed: Feed) -> np.ndarray:
    session = _session(path, THREADS)  # closed before the next is opened: long calls need the memory
    found: np.ndarray = session.run([session.get_outputs()[0].name], _fed(session, feed))[0]
    return found


def peak_memory(path: Path, subject: str, batch: int, tokens: int) -> float:
    """Megabytes that a process of its own holds at most with the model, after two calls."""
    program = (
        "import re, sys, pathlib; from benchmarks.onnx_cpu import SUBJECTS, _fed, _session\n"
        "most = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
        "path, subject, batch, tokens = sys.argv[1:]; begun = most()\n"
        "session = _session(pathlib.Path(path), 2); feed = SUBJECTS[subject].feed(int(batch), int(tokens))\n"
        "for _ in range(2): session.run(None, _fed(session, feed))\n"
        "print(most(), begun)"
    )
    command = [sys.executable, "-c", program, str(path), subject, str(batch), str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    most, begun = map(int, done.stdout.split())
    return round((most - begun) * KIB / 1e6, 1)


def measure(subject: Subject, folder: Path, rounds: int, precisions: Sequence[str] = ()) -> Iterator[Case]:
    """Export the peers, convert ours, compare, and time every shape; then again for each precision."""
    paths: dict[str, Path] = {}
    kinds: tuple[Implementation, ...] = ("eager", "sdpa")
    for kind in kinds:
        opened = open_model(subject.target(kind), attn_implementation=kind)
        opened.model.eval()
        paths[kind] = folder / f"{kind}.onnx"
        onnx_ir.save(export_onnx(opened)[0], paths[kind], external_data=f"{kind}.onnx.data")
    paths |= fused_peers(subject.target("eager"), paths["eager"], subject.names, subject.optimizer, folder)
    for precision in precisions or ("",):
        yield from _measured(subject, paths, folder / f"ours-{precision}", rounds, precision)


def _measured(subject: Subject, peers: Mapping[str, Path], out: Path, rounds: int, precision: str) -> Iterator[Case]:
    """Every shape with ours in one precision."""
    kinds = list(peers)
    conversion = attncompile.convert(
        subject.target("eager"), out, to="onnx", cache=False, precision=precision or None
    )
    paths = {**peers, "ours": out / "model.onnx"}
    quality: dict[str, float] = {}
    if precision and subject.name in QUALITY:
        quality = dict(QUALITY[subject.name](_session(paths["eager"], THREADS), _session(paths["ours"], THREADS)))
        print(f"{subject.name} {precision}: {quality}", flush=True)
    chosen = [site.operator for site in conversion.report.sites]
    operators = {operator: chosen.count(operator) for operator in dict.fromkeys(chosen)}
    for batch, tokens in subject.shapes:
        feed = subject.feed(batch, tokens)
        difference = _difference(paths["eager"], paths["ours"], feed)
        wall, work, count = _readings(paths, feed, batch * tokens, rounds)
        peak = {name: peak_memory(path, subject.name, batch, tokens) for name, path in paths.items()}
        case = Case(
            model=subject.name,
            batch=batch,
            tokens=tokens,
            rounds=count,
            largest_difference=difference,
            wall=wall,
            work=work,
            wall_ratio={kind: round(wall[kind] / wall["ours"], 3) for kind in kinds},
            work_ratio={kind: round(work[kind] / work["ours"], 3) for kind in kinds if work},
            operators=operators,
            precision=precision,
            megabytes={name: round(_size(path), 1) for name, path in paths.items()},
            quality=quality,
            kept=len(load_plan(out / "plan.json").kept),
            peak_mb=peak,
        )
        print(f"{case.model} {precision} {batch}x{tokens}: {case.wall_ratio} wall, {case.work_ratio} work", flush=True)
        yield case


def _readings(
    paths: Mapping[str, Path], feed: Feed, tokens: int, rounds: int
) -> tuple[dict[str, float], dict[str, float], int]:
    """Wall time with two threads, processor time with one where calls are short, and the rounds behind them."""
    if tokens >= LONG:
        return _one_at_a_time(paths, feed, LONG_ROUNDS, THREADS), {}, LONG_ROUNDS
    count = max(5, min(rounds, rounds * 512 // tokens))
    wall = _interleaved(paths, feed, count, THREADS, time.perf_counter)
    return wall, _interleaved(paths, feed, count, 1, time.thread_time), count


def _size(path: Path) -> float:
    """Megabytes of a model and the file of its weights."""
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*")) / 1e6


def main() -> None:
    """Measure the chosen models and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, help="where the JSON goes")
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument(
        "--rounds", type=int, default=40, help="rounds at 512 tokens or fewer; longer calls get fewer"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=(), help="only calls of these lengths")
    parser.add_argument("--precisions", nargs="+", default=(), help="as attncompile convert --precision takes them")
    chosen = parser.parse_args()
    cases: list[Case] = []
    for name in chosen.models:
        with tempfile.TemporaryDirectory() as folder:
            subject = SUBJECTS[name]
            if chosen.tokens:
                subject = replace(subject, shapes=tuple(each for each in subject.shapes if each[1] in chosen.tokens))
            for case in measure(subject, Path(folder), chosen.rounds, chosen.precisions):
                cases.append(case)
                _write(chosen.results, cases)  # a long call may need more memory than there is


def _write(results: Path, cases: Sequence[Case]) -> None:
    """What has been measured so far, and where."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, onnxruntime, onnx_ir)}
    record = {
        "device": device(),
        "cores": os.cpu_count(),
        "threads": THREADS,
        "system": platform.platform(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "cases": [asdict(case) for case in cases],
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
