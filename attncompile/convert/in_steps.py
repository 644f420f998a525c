"""Encoder and decoder of a conversion behind each other, as a generation runs them, against the original.

Each part is compared by itself on what the original gives it. That both fit together, and that errors do not grow from
step to step through the cache, is seen here: a prompt, then one token at a time behind what the calls before have left,
against one call of the original without any cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnxruntime
import torch

from attncompile.convert.artifact import Progress, silent
from attncompile.convert.calibration import Call
from attncompile.convert.comparison import Compared, Inputs, Outputs, Run, Runs, compare_on, inputs_of
from attncompile.convert.memory import read_by_modules, release
from attncompile.convert.onnx_runs import running
from attncompile.convert.recorded import recorded
from attncompile.convert.runtime import run, session
from attncompile.convert.widened import Widened, outputs_of
from attncompile.frontends.cached import empty_past
from attncompile.frontends.encoder_decoder import DecoderModel, decoder_call, grown, of_encoder

STEPS = 5
"""Tokens at the end of a sequence that are decoded one at a time."""

LOGITS = "logits"


@dataclass(frozen=True)
class KnownInSteps:
    """What a result in steps is compared with; all that was run is in files.

    Attributes:
        decoder: how the second part is called; inputs: calls of the whole model.
        runs: what the original and the unrewritten parts gave; the place of the result is still the latter's.
    """

    decoder: DecoderModel
    inputs: Inputs
    runs: Runs


def known_in_steps(
    decoder: DecoderModel,
    before: Sequence[Path],
    provider: str,
    scratch: Path,
    *,
    lossy: bool,
    shift: int = 0,
    progress: Progress = silent,
) -> KnownInSteps:
    """Run the original, in float64 too, and the unrewritten parts: once for all results that are compared with them.

    Args:
        decoder: how the second part of the original is called.
        before: encoder and decoder, unrewritten; provider: where they run.
        scratch: a folder to make for results, which must outlive what is returned.
        lossy, shift: as in :func:`attncompile.convert.comparison.inputs_of`.
        progress: told each call.
    """

    opened = decoder.opened
    assert opened is not None

    def original(call: Call) -> Outputs:
        return {LOGITS: outputs_of(opened.model(*call.args, **call.kwargs))[LOGITS]}

    inputs = inputs_of(opened, lossy=lossy, shift=shift, part=f"encoder and decoder, {STEPS} steps")
    scratch.mkdir()
    told = {what: running(progress, f"{what} in steps") for what in ("the export", "the original")}
    wide = running(progress, "the original in steps in float64")
    plain = _results(decoder, before, provider, inputs.every, scratch / "plain", told["the export"])
    with torch.no_grad():
        with read_by_modules(opened.model):
            given = recorded(original, inputs.every, scratch / "original", told["the original"])
        exact = recorded(Widened(opened.model), inputs.calls, scratch / "exact", wide)
    release()
    return KnownInSteps(decoder, inputs, Runs(given, plain, plain, exact, "ONNX Runtime"))


def compare_in_steps(
    known: KnownInSteps,
    after: Sequence[Path],
    provider: str,
    scratch: Path,
    *,
    lossy: bool,
    budget: float | None = None,
    progress: Progress = silent,
) -> Compared:
    """The logits of every token. Two sessions are open at a time, encoder and decoder of one form.

    Args:
        known: what it is compared with.
        after: encoder and decoder as they were converted; provider: where they run.
        scratch: a folder to make for results.
        lossy: whether these may compute something else; known must hold the texts for that.
        budget: of what is lossy, as in :func:`attncompile.convert.comparison.compare_on`.
        progress: told each call.

    Raises:
        DoesNotRunError: when the parts do not fit together.
    """
    inputs = known.inputs if lossy else Inputs(known.inputs.calls)
    told = running(progress, "the result in steps")
    converted = _results(known.decoder, after, provider, inputs.every, scratch, told)
    return compare_on(inputs, replace(known.runs, converted=converted), budget)


def _results(
    decoder: DecoderModel, files: Sequence[Path], provider: str, calls: Sequence[Call], folder: Path, told: Progress
) -> Run:
    """What encoder and decoder in two files give; the sessions have ended by then."""
    decoded = partial(decoded_in_steps, decoder, *(session(file, provider, lean=True) for file in files))
    found = recorded(decoded, calls, folder, told)
    del decoded
    release()
    return found


def decoded_in_steps(
    decoder: DecoderModel, encoding: onnxruntime.InferenceSession, decoding: onnxruntime.InferenceSession, call: Call
) -> Outputs:
    """The logits ``[B, N, vocabulary]`` of a call of the whole model, from its two parts.

    Args:
        decoder: how the second part is called.
        encoding, decoding: the parts; call: with the arguments of the whole model.
    """
    inputs, ids = of_encoder(call.kwargs), call.kwargs["decoder_input_ids"]
    cross = run(encoding, Call((), inputs, call.what), integers=True)
    past = empty_past(decoder.widths, ids.shape[0], decoder.dtype)
    prompt = max(1, ids.shape[1] - STEPS)
    found = []
    for tokens in (ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)):
        results = run(decoding, Call((), decoder_call(tokens, inputs, past, cross), call.what))
        past = grown(results, len(decoder.widths))
        found.append(results[LOGITS])
    return {LOGITS: torch.cat(found, dim=1)}


__all__ = ["STEPS", "KnownInSteps", "compare_in_steps", "decoded_in_steps", "known_in_steps"]
