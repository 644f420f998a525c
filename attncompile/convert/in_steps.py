"""Encoder and decoder of a conversion behind each other, as a generation runs them, against the original.

Each part is compared by itself on what the original gives it. That both fit together, and that errors do not grow from
step to step through the cache, is seen here: a prompt, then one token at a time behind what the calls before have left,
against one call of the original without any cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import onnxruntime
import torch

from attncompile.convert.calibration import Call
from attncompile.convert.comparison import Compared, Outputs, Run, Runs, compare_runs, outputs_of
from attncompile.convert.runtime import run
from attncompile.frontends.cached import empty_past
from attncompile.frontends.checkpoint import OpenedModel
from attncompile.frontends.encoder_decoder import DecoderModel, decoder_call, grown, of_encoder

STEPS = 5
"""Tokens at the end of a sequence that are decoded one at a time."""

LOGITS = "logits"


def compare_in_steps(
    opened: OpenedModel,
    decoder: DecoderModel,
    before: Sequence[onnxruntime.InferenceSession],
    after: Sequence[onnxruntime.InferenceSession],
    exact: Run,
    *,
    lossy: bool,
    shift: int = 0,
) -> Compared:
    """The logits of every token.

    Args:
        opened: the original; exact: the same in float64.
        decoder: how its second part is called.
        before, after: encoder and decoder, unrewritten and as they were converted.
        lossy, shift: as in :func:`attncompile.convert.comparison.compare_runs`.

    Raises:
        DoesNotRunError: when the parts do not fit together.
    """

    def original(call: Call) -> Outputs:
        return {LOGITS: outputs_of(opened.model(*call.args, **call.kwargs))[LOGITS]}

    runs = Runs(
        original,
        partial(decoded_in_steps, decoder, *after),
        partial(decoded_in_steps, decoder, *before),
        exact,
        "ONNX Runtime",
    )
    return compare_runs(opened, runs, lossy=lossy, shift=shift, part=f"encoder and decoder, {STEPS} steps")


def decoded_in_steps(
    decoder: DecoderModel, encoding: onnxruntime.InferenceSession, decoding: onnxruntime.InferenceSession, call: Call
) -> Outputs:
    """The logits ``[B, N, vocabulary]`` of a call of the whole model, from its two parts.

    Args:
        decoder: how the second part is called.
        encoding, decoding: the parts; call: with the arguments of the whole model.
    """
    inputs, ids = of_encoder(call.kwargs), call.kwargs["decoder_input_ids"]
    cross = run(encoding, Call((), inputs, call.what))
    past = empty_past(decoder.widths, ids.shape[0], decoder.dtype)
    prompt = max(1, ids.shape[1] - STEPS)
    found = []
    for tokens in (ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)):
        results = run(decoding, Call((), decoder_call(tokens, inputs, past, cross), call.what))
        past = grown(results, len(decoder.widths))
        found.append(results[LOGITS])
    return {LOGITS: torch.cat(found, dim=1)}


__all__ = ["STEPS", "compare_in_steps", "decoded_in_steps"]
