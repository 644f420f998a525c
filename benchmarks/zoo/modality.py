"""Which kind of data a model type takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

Modality = Literal["text", "vision", "audio", "multimodal", "other"]

KINDS: tuple[tuple[Modality, frozenset[str]], ...] = (
    ("text", frozenset({"input_ids", "decoder_input_ids"})),
    (
        "vision",
        frozenset(
            {"pixel_values", "pixel_values_videos", "flattened_patches", "grid_thw", "visual_feats", "visual_embeds"}
        ),
    ),
    ("audio", frozenset({"input_values", "input_features", "audio_values"})),
)
PARTS = ("vision_config", "audio_config", "speech_config", "image_config")
TRANSCRIBE = frozenset({"input_features", "input_values"})


def _has_part(config: Any) -> bool:
    """Whether a configuration holds one of sight or sound, at any depth."""
    parts = {name: part for name, part in vars(config).items() if hasattr(part, "to_dict") and part is not config}
    return any(name in PARTS or _has_part(part) for name, part in parts.items())


def modality_of(config: Any, inputs: Iterable[str]) -> Modality:
    """The modality of a model from the parts of its configuration and the inputs that it was given.

    A model of sound that writes text is audio; one with a language part and another part is multimodal, even when
    it was given text alone.
    """
    given = set(inputs)
    found = [kind for kind, names in KINDS if names & given]
    if _has_part(config) and "text" in found:
        return "multimodal"
    if given & TRANSCRIBE and "input_ids" not in given:
        return "audio"
    if len(found) > 1:
        return "multimodal" if "input_ids" in given else found[1]
    if found:
        return found[0]
    if given & {"past_values"}:
        return "other"
    if hasattr(config, "image_size") or hasattr(config, "patch_size"):
        return "vision"
    return "text" if hasattr(config, "vocab_size") else "other"
