"""Pictures of committed results, for the README and the documents.

    pip install -e ".[pictures]" && python -m benchmarks.pictures docs/pictures

Every number is read from a file under ``benchmarks/results``; nothing is measured. Bars show how many times as fast as
the best of the others ours is, or rates, as each title says.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"

COLOURS = {
    "ours": "#0b6e4f", "plain Triton": "#73a790", "cuDNN": "#3b6fb6", "FlexAttention": "#d98032",
    "FlashAttention-2": "#a9a9a9", "FlashAttention-4": "#c2453c", "Inductor": "#7b5ea7", "SDPA": "#8fb4e3",
    "eager": "#c9c9c9", "bound": "#222222",
}  # fmt: skip


def rows_of(file: str) -> dict[str, Mapping[str, Any]]:
    """The rows of a result by name."""
    found = json.loads((RESULTS / file).read_text(encoding="utf-8"))["rows"]
    return {row["name"]: row["results"] for row in found}


def bars(
    title: str,
    unit: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    file: Path,
    *,
    logarithmic: bool = False,
) -> None:
    """Groups of horizontal bars, with their numbers; a missing one is said to be missing.

    Args:
        title: above the picture.
        unit: of the numbers.
        groups: names, from top to bottom.
        series: numbers of each group by who they belong to, a key of :data:`COLOURS`.
        file: SVG to write.
        logarithmic: whether bars grow with the logarithm.
    """
    height = 0.8 / len(series)
    figure, axes = plt.subplots(figsize=(8, 0.5 + 0.2 * len(series) * len(groups)), layout="constrained")
    for number, (name, values) in enumerate(series.items()):
        places = [-(group + height * number) for group in range(len(groups))]
        drawn = [value if value is not None else 0.0 for value in values]
        axes.barh(places, drawn, height * 0.9, label=name, color=COLOURS[name])
        for place, value in zip(places, values, strict=True):
            text = " out of memory" if value is None else f" {value:.3g}"
            start = axes.get_xlim()[0] if logarithmic and value is None else value or 0.0
            axes.text(start, place, text, va="center", fontsize=7, color="#333333")
    middle = height * (len(series) - 1) / 2
    axes.set_yticks([-(group + middle) for group in range(len(groups))], groups, fontsize=8)
    if logarithmic:
        axes.set_xscale("log")
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(unit, fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.margins(x=0.12)
    axes.legend(fontsize=7, frameon=False, loc="best")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def number(results: Mapping[str, Any], *names: str, key: str = "ms") -> float | None:
    """The best of some contenders: the least time, or the highest rate."""
    found = [results[name][key] for name in names if key in results.get(name, {})]
    if not found:
        return None
    return float(min(found) if key == "ms" else max(found))


def models(folder: Path) -> None:
    """Whole models."""
    rows = rows_of("backend_h200.json")
    groups = {
        "llama-prefill-2048": "Llama-3.2-1B, prefill 2k", "llama-prefill-8192": "prefill 8k",
        "llama-prefill-32768": "prefill 32k", "llama-training-8192": "training step 8k",
        "llama-decode-1": "step at 8k, batch 1", "llama-decode-32": "step at 8k, batch 32",
        "gemma2-prefill-8192": "Gemma-2-2B, prefill 8k", "gemma2-prefill-32768": "prefill 32k",
        "bloom-prefill-8192": "BLOOM-1b7, prefill 8k", "bloom-prefill-32768": "prefill 32k",
    }  # fmt: skip
    who = {
        "ours": ("attncompile", "attncompile (eager)"),  # the second where there is no other
        "Inductor": ("inductor", "inductor static", "inductor static (eager)"),
        "FlexAttention": ("flex",),
        "SDPA": ("sdpa", "sdpa cuDNN"),
    }
    ours = {name: next(filter(None, (number(rows[name], each) for each in who["ours"]))) for name in groups}
    series: dict[str, list[float | None]] = {}
    for label, names in who.items():
        times = [(number(rows[name], *names), ours[name]) for name in groups]
        series[label] = [time / own if time is not None else float("nan") for time, own in times]
    series["ours"] = [1.0 for _ in groups]
    bars("Whole models on an H200, bf16: time over ours", "times", list(groups.values()), series,
         folder / "models.svg", logarithmic=True)  # fmt: skip


def forward(folder: Path) -> None:
    """Forward kernels."""
    rows = rows_of("kernels_peers_h200.json")
    groups = {
        "d128-n16384-full": "full", "d128-n16384-causal": "causal", "d128-n16384-window": "window of 1024",
        "d128-n16384-alibi": "ALiBi", "d128-n16384-relative": "relative bias", "d128-n16384-sinks": "sinks",
        "d128-n16384-softcap": "softcap", "d128-n16384-documents": "documents of 2048",
        "d64-n16384-full": "64 channels, full", "d64-n16384-causal": "64 channels, causal",
    }  # fmt: skip
    who = {"ours": "gluon", "plain Triton": "triton", "cuDNN": "cudnn", "FlexAttention": "flex",
           "FlashAttention-2": "flash2", "FlashAttention-4": "flash4"}  # fmt: skip
    title = "Forward kernels on an H200, 128 channels unless said, 16k tokens, bf16"
    rates(rows, groups, who, title, folder, "forward.svg")


def backward(folder: Path) -> None:
    """Backward kernels."""
    groups = {
        "d128-n16384-full": "full", "d128-n16384-causal": "causal", "d128-n16384-window": "window of 1024",
        "d128-n16384-alibi": "ALiBi", "d128-n16384-softcap": "softcap", "d64-n16384-full": "64 channels, full",
        "d64-n16384-causal": "64 channels, causal",
    }  # fmt: skip
    who = {"ours": "hopper", "plain Triton": "ours", "cuDNN": "cudnn", "FlexAttention": "flex",
           "FlashAttention-2": "flash2"}  # fmt: skip
    title = "Backward kernels on an H200, 128 channels unless said, 16k tokens, bf16"
    rates(rows_of("backward_h200.json"), groups, who, title, folder, "backward.svg")


def rates(
    rows: Mapping[str, Mapping[str, Any]],
    groups: Mapping[str, str],
    who: Mapping[str, str],
    title: str,
    folder: Path,
    file: str,
) -> None:
    """Rates of kernels, counted for visible pairs."""
    series = {
        label: [number(rows[name], contender, key="tflops") or float("nan") for name in groups]
        for label, contender in who.items()
    }
    bars(title, "TFLOP/s of visible pairs", list(groups.values()), series, folder / file)


def sparse(folder: Path) -> None:
    """Block masks and neighbourhoods."""
    rows = rows_of("sparse_h200.json")
    groups = {
        **{f"random-{n}%-d128": f"{n} % of blocks, 128 channels" for n in (5, 10, 20, 50)},
        **{f"random-{n}%-d64": f"{n} % of blocks, 64 channels" for n in (5, 10, 20, 50)},
        "plane-128x128-window-16x16": "plane 128×128, window 16×16",
        "volume-30x48x80-window-18x24x24": "volume 30×48×80, window 18×24×24",
    }
    series = {
        label: [100 * (number(rows[name], contender, key="share") or float("nan")) for name in groups]
        for label, contender in (("ours", "gluon"), ("FlexAttention", "flex"))
    }
    bars("Sparse maps on an H200: share of the dense kernel's rate for what has to be visited", "%",
         list(groups.values()), series, folder / "sparse.svg")  # fmt: skip


def main() -> None:
    """Draw all pictures into a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where SVG files are written")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams.update({"svg.hashsalt": "attncompile", "svg.fonttype": "none", "font.family": "sans-serif"})
    for draw in (models, forward, backward, sparse):
        draw(folder)


if __name__ == "__main__":
    main()
