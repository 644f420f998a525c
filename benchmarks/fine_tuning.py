"""Loss curves of SmolLM2-135M fine-tuned with and without attncompile, beside what rounding alone does to them.

    python -m benchmarks.fine_tuning results.json [--steps 50] [--batch 2] [--length 64] [--rest eager]

Every run starts from the checkpoint's weights in float32 and takes the same batches of running text (the second half
of the last row is padding) with AdamW at one constant rate. ``eager`` is the model uncompiled, with its attention
spelled out; ``compiled`` is the same through ``attncompile.compile``. Two correct programs round differently, and
training lets their losses drift apart. How far is measured: ``moved-N`` is ``eager`` from weights moved by up to a unit
in the last place, ``sdpa`` is the model with its other attention. A curve is within noise when its distance to
``eager`` (root mean square over the steps) is at most twice the largest of theirs. Nothing is timed.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers

import attncompile
from benchmarks.checkpoints import checkpoint_folder
from benchmarks.report import Report, arguments

RATE = 2e-5
"""Learning rate of AdamW; its other settings are PyTorch's."""

FACTOR = 2.0
"""How many times the distance of the farthest run of pure rounding is still within noise."""

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """One way to train.

    Attributes:
        name: in the results.
        attention: implementation that the model is asked for.
        compiled: whether it runs through ``attncompile.compile``.
        moved: seed with which weights are moved by up to a unit in the last place; 0 leaves them.
    """

    name: str
    attention: Literal["eager", "sdpa"] = "eager"
    compiled: bool = False
    moved: int = 0


EAGER = Run("eager")
COMPILED = Run("compiled", compiled=True)
NOISE = (Run("moved-1", moved=1), Run("moved-2", moved=2), Run("sdpa", "sdpa"))


def batches(steps: int, batch: int, length: int) -> Iterator[Batch]:
    """Running text in random pieces, the same for each call."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint_folder("smollm2"))
    text = (checkpoint_folder("texts") / "kjv.txt").read_text(encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    characters = 8 * length  # more than so many tokens have
    for _ in range(steps):
        places = torch.randint(len(text) - characters, (batch,), generator=generator).tolist()
        rows = [tokenizer(text[place : place + characters])["input_ids"][:length] for place in places]
        ids = torch.tensor(rows)
        mask = torch.ones_like(ids)
        mask[-1, length // 2 :] = 0
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def move(model: torch.nn.Module, seed: int) -> None:
    """Move every weight by up to a unit in the last place, at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            shift = torch.rand(weight.shape, generator=generator) * 2 - 1
            weight.mul_(1 + torch.finfo(weight.dtype).eps * shift)


def losses(run: Run, given: list[Batch], rest: Literal["eager", "inductor"]) -> tuple[list[float], dict[str, int]]:
    """The loss before each step, and how many attention sites each operator computes."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint_folder("smollm2"), attn_implementation=run.attention, dtype=torch.float32, use_cache=False
    ).train()
    if run.moved:
        move(model, run.moved)
    call: Callable[..., Any] = attncompile.compile(model, rest=rest) if run.compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    found = []
    for batch in given:
        optimizer.zero_grad()
        loss = call(**batch).loss
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    operators: dict[str, int] = {}
    for site in attncompile.explain(call).sites if run.compiled else ():
        operators[site.operator] = operators.get(site.operator, 0) + 1
    return found, operators


def distance(curve: list[float], other: list[float]) -> float:
    """Root mean square of the differences of two curves."""
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(curve, other, strict=True)) / len(curve))


def main() -> None:
    """Train once in each way and write the curves."""
    parser: argparse.ArgumentParser = arguments(__doc__, rows=False)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=2, help="rows of a batch (default 2)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row (default 64)")
    parser.add_argument("--rest", choices=("eager", "inductor"), default="eager")
    options = parser.parse_args()
    given = list(batches(options.steps, options.batch, options.length))
    facts = {"transformers": transformers.__version__, "threads": torch.get_num_threads(), "rate": RATE}
    report = Report(options.output, {**facts, **{n: getattr(options, n) for n in ("batch", "length", "rest")}})
    curves: dict[str, list[float]] = {}
    for run in (EAGER, COMPILED, *NOISE):
        curve, operators = losses(run, given, options.rest)
        gc.collect()
        curves[run.name] = curve
        away = distance(curve, curves["eager"])
        most = max(abs(a - b) for a, b in zip(curve, curves["eager"], strict=True))
        report.add({"name": run.name, "sites": operators, "distance": away, "largest": most, "losses": curve})
        learnt = f"loss {curve[0]:.4f} to {curve[-1]:.4f}"
        print(f"{run.name:10} {learnt}, from eager {away:.3g}, at most {most:.3g}", flush=True)
    noise = max(distance(curves[run.name], curves["eager"]) for run in NOISE)
    found = distance(curves["compiled"], curves["eager"])
    report.add({"name": "verdict", "noise": noise, "compiled": found, "within": found <= FACTOR * noise})
    print(f"compiled {found:.3g}, noise {noise:.3g}: {'within' if found <= FACTOR * noise else 'beyond'} noise")


if __name__ == "__main__":
    main()
