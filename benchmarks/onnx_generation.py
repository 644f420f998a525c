"""Prompts and steps of generation in onnxruntime-genai: our model beside others of the same checkpoint.

    python benchmarks/onnx_generation.py OUT.json [--lengths 512 2048] ours=FOLDER builder=FOLDER plain=FOLDER
    python benchmarks/onnx_generation.py OUT.json --sound FILE.wav ours=FOLDER builder=FOLDER plain=FOLDER

A folder holds a model and its ``genai_config.json``: ``attncompile convert`` writes one,
``python -m onnxruntime_genai.models.builder -m CHECKPOINT -o FOLDER -p fp32 -e cpu`` another, and
``python -m benchmarks.onnx_plain`` the export that a conversion was made from. The models take turns, round after round
and load after load, each with one thread; what counts is the processor time of the process, which other programs on the
machine do not lengthen much. Prompts are the fastest of the rounds, steps the median. Greedy tokens are compared too.
With a sound the models are such as Whisper, and the prompt is the encoder and two tokens behind it. Needs
onnxruntime-genai alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

LENGTHS = (64, 512, 2048)
ROUNDS, STEPS = 3, 12
LOADS, TEXT_LOADS = 8, 3
"""How often models that listen, and models that read, are loaded anew in another order: where their weights come to lie
in memory moves steps by 5 to 10 %."""


def single_threaded(og: Any, folder: Path, scratch: Path) -> Any:
    """The model of a folder with one thread, whatever its configuration says."""
    scratch.mkdir()
    for file in folder.iterdir():
        if file.name != "genai_config.json":
            (scratch / file.name).symlink_to(file.resolve())
    settings = json.loads((folder / "genai_config.json").read_text())
    for part in ("encoder", "decoder"):
        if part in settings["model"]:
            settings["model"][part].setdefault("session_options", {})["intra_op_num_threads"] = 1
    (scratch / "genai_config.json").write_text(json.dumps(settings))
    return og.Model(str(scratch))


Give = Callable[[Any], None]
"""Gives a generator what it generates from."""


def generated(og: Any, model: Any, prepare: Callable[[], Give], length: int) -> tuple[float, list[float], list[int]]:
    """Seconds of the prompt, seconds of each step, and the tokens.

    Args:
        og: onnxruntime-genai; model: in it.
        prepare: what is done before the clock starts; length: tokens of the prompt.
    """
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=length + STEPS + 2, do_sample=False)
    generator, give = og.Generator(model, settings), prepare()
    start = time.process_time()
    give(generator)
    generator.generate_next_token()
    prompt, steps = time.process_time() - start, []
    while len(steps) < STEPS and not generator.is_done():
        start = time.process_time()
        generator.generate_next_token()
        steps.append(time.process_time() - start)
    return prompt, steps, [int(token) for token in generator.get_sequence(0)[length:]]


def in_turns(
    og: Any, models: Mapping[str, Any], prepare: Mapping[str, Callable[[], Give]], length: int, rounds: int
) -> dict[str, Any]:
    """Every model in turn, each from what is given to it."""
    prompts: dict[str, list[float]] = {name: [] for name in models}
    steps: dict[str, list[float]] = {name: [] for name in models}
    tokens: dict[str, list[int]] = {}
    for number in range(rounds):
        for name in sorted(models, reverse=bool(number % 2)):
            prompt, found, tokens[name] = generated(og, models[name], prepare[name], length)
            prompts[name].append(prompt)
            steps[name] += found
    return {
        "prompt_ms": {name: round(1e3 * min(times), 1) for name, times in prompts.items()},
        "step_ms": {name: round(1e3 * statistics.median(times), 2) for name, times in steps.items()},
        "same_tokens": len({tuple(found) for found in tokens.values()}) == 1,
    }


def measure(og: Any, models: Mapping[str, Any], length: int) -> dict[str, Any]:
    """A prompt of one length."""
    ids = (np.arange(length) * 7919 % 40_000 + 100).astype(np.int32)
    prepare = dict.fromkeys(models, lambda: lambda generator: generator.append_tokens(ids))
    return in_turns(og, models, prepare, length, ROUNDS)


SPOKEN = "<|startoftranscript|><|notimestamps|>"
"""How a transcription begins: two tokens."""


def measure_sound(og: Any, models: Mapping[str, Any], sound: Path) -> dict[str, Any]:
    """A sound: features are made before the clock starts."""

    def preparing(model: Any) -> Callable[[], Give]:
        processor, audios = model.create_multimodal_processor(), og.Audios.open(str(sound))

        def prepare() -> Give:
            inputs = processor([SPOKEN], audios=audios)
            return lambda generator: generator.set_inputs(inputs)

        return prepare

    prepare = {name: preparing(model) for name, model in models.items()}
    return in_turns(og, models, prepare, 2, ROUNDS)


Measure = Callable[[Any, Mapping[str, Any]], dict[str, Any]]
"""Measures loaded models in turns."""


def loaded_often(og: Any, folders: Mapping[str, Path], measure: Measure, loads: int) -> dict[str, Any]:
    """The medians over several loads."""
    found: list[dict[str, Any]] = []
    for number in range(loads):
        names = list(folders)[number % len(folders) :] + list(folders)[: number % len(folders)]
        with tempfile.TemporaryDirectory() as scratch:
            models = {name: single_threaded(og, folders[name], Path(scratch) / name) for name in names}
            found.append(measure(og, models))
            print(found[-1], flush=True)
    middle = {
        what: {name: round(statistics.median(one[what][name] for one in found), 2) for name in folders}
        for what in ("prompt_ms", "step_ms")
    }
    return {"loads": loads, **middle, "same_tokens": all(one["same_tokens"] for one in found)}


def main(out: Path, folders: Mapping[str, Path], sound: Path | None, lengths: Sequence[int], loads: int) -> None:
    """Measure every length, loaded so often, or the sound, and write the results."""
    import onnxruntime_genai as og

    rows = []
    if sound is not None:
        heard = loaded_often(og, folders, partial(measure_sound, sound=sound), LOADS)
        rows.append({"sound": sound.name, **heard})
    else:
        for length in lengths:
            read = loaded_often(og, folders, partial(measure, length=length), loads)
            rows.append({"prompt": length, **read})
    record = {"onnxruntime-genai": og.__version__, "threads": 1, "load_average": list(os.getloadavg()), "rows": rows}
    out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT.json", help="where the results go")
    parser.add_argument("folders", nargs="+", metavar="NAME=FOLDER", help="models that take turns")
    parser.add_argument("--sound", type=Path, metavar="FILE.wav", help="what models such as Whisper listen to")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="N", help="tokens of the prompts")
    parser.add_argument("--loads", type=int, default=TEXT_LOADS, metavar="N", help="loads of models that read")
    chosen = parser.parse_args()
    named = {name: Path(folder) for name, _, folder in (word.partition("=") for word in chosen.folders)}
    main(chosen.out, named, chosen.sound, chosen.lengths, chosen.loads)
