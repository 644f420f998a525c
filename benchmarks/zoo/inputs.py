"""Example inputs of a transformers model, by the names of its forward arguments.

`ARGUMENTS` has one row per argument name; `proposals` says which arguments to try together, the fullest first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

BATCH, LENGTH, PADDED = 2, 48, 8
PATCH_ROWS, PATCH_COLUMNS = 6, 6

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """A model whose arguments are wanted, and those made so far."""

    model: torch.nn.Module
    config: Any
    made: Inputs = field(default_factory=dict)

    @property
    def text(self) -> Any:
        """The configuration of the language part, or the whole."""
        return self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config

    @property
    def sight(self) -> Any:
        """The configuration of the vision part, or the whole."""
        for name in ("vision_config", "encoder", "image_config", "vit_config"):
            part = getattr(self.config, name, None)
            if hasattr(part, "to_dict"):
                return part
        return self.config

    def number(self, *names: str, default: int, of: Any = None) -> int:
        """The first of the named fields that is an integer, in a configuration or in its parts, breadth first."""
        value = self.value(*names, of=of)
        while isinstance(value, list | tuple) and value:
            value = value[-1]
        return value if type(value) is int else default

    def value(self, *names: str, of: Any = None) -> Any:
        """The first of the named fields that is an integer or a list, breadth first; None when there is none."""
        waiting = [self.config if of is None else of]
        seen: list[Any] = []
        while waiting:
            part = waiting.pop(0)
            seen.append(part)
            for name in names:
                found = getattr(part, name, None)
                if type(found) is int or (isinstance(found, list | tuple) and found and type(found[0]) is int):
                    return found
            parts = [one for one in vars(part).values() if hasattr(one, "to_dict")]
            waiting += [one for one in parts if not any(one is other for other in seen)]
        return None


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def _special(config: Mapping[str, Any]) -> Iterator[int]:
    """Every number that a configuration uses as a token with a meaning."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special(value)
        elif isinstance(name, str) and any(mark in name for mark in ("token", "_id", "_index")):
            yield from (one for one in (value if isinstance(value, list | tuple) else [value]) if type(one) is int)


def _tokens(request: Request, length: int) -> torch.Tensor:
    vocabulary = request.number("vocab_size", "src_vocab_size", default=300, of=request.text)
    special = set(_special(request.config.to_dict()))
    plain = torch.tensor([one for one in range(5, vocabulary) if one not in special] or [1])
    return plain[torch.randint(len(plain), (BATCH, length))]


def _input_ids(request: Request) -> torch.Tensor:
    positions = getattr(request.text, "max_position_embeddings", None)
    # some models count positions from behind the padding token
    room = positions - 4 if type(positions) is int and 8 <= positions < LENGTH + 4 else LENGTH
    return _tokens(request, min(LENGTH, room))


def _decoder_input_ids(request: Request) -> torch.Tensor:
    return _tokens(request, LENGTH // 2)


def _length(request: Request) -> int:
    """Positions of the main input: tokens, samples or frames."""
    for name, axis in (("input_ids", 1), ("inputs_embeds", 1), ("input_values", -1), ("input_features", 1)):
        if name in request.made:
            return int(request.made[name].shape[axis])
    return LENGTH


def _padding(request: Request) -> torch.Tensor:
    """Everything of row 0, and row 1 without its last sixth."""
    length = _length(request)
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[1, length - max(1, length * PADDED // LENGTH) :] = 0
    return mask


def _channels(request: Request) -> int:
    return request.number("num_channels", "in_channels", "in_chans", default=3, of=request.sight)


def _picture_size(request: Request) -> tuple[int, int]:
    size = request.value("image_size", "img_size", "input_size", of=request.sight)
    if type(size) is int:
        return size, size
    return (int(size[-2]), int(size[-1])) if isinstance(size, list | tuple) and len(size) >= 2 else (64, 64)


def _flat_patches(request: Request) -> torch.Tensor:
    """Patches of all images in one row, for models that take a grid per image."""
    time = request.number("temporal_patch_size", default=1, of=request.sight)
    patch = request.number("patch_size", default=14, of=request.sight)
    return _noise(int(_grid(request).prod(-1).sum()), _channels(request) * patch * patch * time)


def _grid(request: Request) -> torch.Tensor:
    """Two images of 4 x 4 and 4 x 8 patches."""
    return torch.tensor([[1, 4, 4], [1, 4, 8]])


def _pixel_values(request: Request) -> torch.Tensor:
    if "grid_thw" in request.made or "image_grid_thw" in request.made:
        return _flat_patches(request)
    if "spatial_shapes" in request.made:
        patch = request.number("patch_size", default=16, of=request.sight)
        return _noise(BATCH, PATCH_ROWS * PATCH_COLUMNS, _channels(request) * patch * patch)
    frames = getattr(request.sight, "num_frames", None)
    if type(frames) is int and request.model.__class__.__name__.lower().startswith(MOVIES):
        return _noise(BATCH, frames, _channels(request), *_picture_size(request))
    return _noise(BATCH, _channels(request), *_picture_size(request))


MOVIES = ("timesformer", "vivit", "videomae", "xclipmodel")


def _movie(request: Request) -> torch.Tensor:
    frames = request.number("num_frames", "frames_per_clip", default=8)
    return _noise(BATCH, frames, _channels(request), *_picture_size(request))


def _sound(request: Request) -> torch.Tensor:
    """A second of samples; spectrograms for models whose configuration speaks of mel bins and length."""
    config = request.config
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length") and hasattr(config, "time_stride"):
        return _noise(BATCH, config.max_length, config.num_mel_bins)
    if hasattr(config, "num_mel_bins") and not hasattr(config, "conv_dim"):
        return _noise(BATCH, LENGTH, config.num_mel_bins)
    if request.value("audio_channels", "hop_length", "codebook_size") is not None and not hasattr(config, "conv_dim"):
        return _noise(BATCH, 1, 4000)
    return _noise(BATCH, 16000)


def _speech_features(request: Request) -> torch.Tensor:
    mels = request.number(
        "num_mel_bins", "n_mels", "feature_projection_input_dim", "input_feat_per_channel", "input_dim", default=80
    )
    if hasattr(request.config, "feature_projection_input_dim"):
        return _noise(BATCH, LENGTH, mels)
    if request.value("spec_size") is not None:  # CLAP: a spectrogram of fixed length, as an image
        return _noise(BATCH, 1, 1001, 64)
    if request.value("max_source_positions") is not None and not hasattr(request.config, "conv_kernel_sizes"):
        return _noise(BATCH, mels, 2 * request.number("max_source_positions", default=LENGTH))
    return _noise(BATCH, 2 * LENGTH, mels)


def _features_mask(request: Request) -> torch.Tensor:
    features = request.made.get("input_features")
    mask = torch.ones(BATCH, features.shape[1] if features is not None else LENGTH, dtype=torch.long)
    mask[1, -mask.shape[1] * PADDED // LENGTH :] = 0
    return mask


def _states(request: Request) -> torch.Tensor:
    if "grid_thw" in request.made:
        return _flat_patches(request)
    width = request.number("d_model", "hidden_size", "n_embd", "embed_dim", default=64)
    return _noise(BATCH, LENGTH, width)


def _series(request: Request, name: str) -> torch.Tensor:
    config = request.config
    lags = getattr(config, "lags_sequence", None)
    past = getattr(config, "context_length", 32) + (max(lags) if lags and not hasattr(config, "patch_length") else 0)
    length = past if name == "past_values" else config.prediction_length
    variables = getattr(config, "num_input_channels", None)
    return _noise(BATCH, length, variables) if variables and not lags else _noise(BATCH, length)


def _time_features(request: Request, beside: str) -> torch.Tensor:
    return _noise(BATCH, request.made[beside].shape[1], request.number("num_time_features", default=0))


def _boxes(request: Request) -> torch.Tensor:
    """Boxes [left, top, right, bottom] in order."""
    return torch.randint(0, 100, (BATCH, _length(request), 2)).repeat(1, 1, 2) + torch.tensor([0, 0, 20, 20])


def _patches_with_places(request: Request) -> torch.Tensor:
    """Flattened patches with row and column in front, as Pix2Struct takes them."""
    size = request.number("patch_embed_hidden_size", default=768, of=request.sight)
    patches = _noise(BATCH, LENGTH, 2 + size)
    place = torch.arange(LENGTH)
    patches[..., :2] = torch.stack([place // 8 + 1, place % 8 + 1], -1).float()
    return patches


def _patch_mask(request: Request) -> torch.Tensor:
    mask = torch.ones(BATCH, PATCH_ROWS * PATCH_COLUMNS, dtype=torch.int32)
    mask[1, -PATCH_COLUMNS:] = 0
    return mask


def _field(*shape: int, last: str) -> Callable[[Request], torch.Tensor]:
    return lambda request: _noise(BATCH, *shape, request.number(last, default=1))


STEPS = 10
ARGUMENTS: dict[str, Callable[[Request], Any]] = {
    "input_ids": _input_ids,
    "decoder_input_ids": _decoder_input_ids,
    "attention_mask": _padding,
    "padding_mask": _padding,
    "feature_attention_mask": _features_mask,
    "input_features_mask": _features_mask,
    "token_type_ids": lambda request: torch.zeros(BATCH, _length(request), dtype=torch.long),
    "position_ids": lambda request: torch.arange(_length(request)).expand(BATCH, -1),
    "inputs_embeds": _states,
    "hidden_states": _states,
    "encoder_hidden_states": _states,
    "query_embeds": lambda request: _noise(BATCH, 12, request.number("hidden_size", default=64)),
    "inputs": _states,
    "pixel_values": _pixel_values,
    "pixel_values_videos": _movie,
    "pixel_mask": lambda request: torch.ones(BATCH, *_picture_size(request), dtype=torch.long),
    "pixel_attention_mask": _patch_mask,
    "spatial_shapes": lambda request: torch.tensor([[PATCH_ROWS, PATCH_COLUMNS], [PATCH_ROWS - 1, PATCH_COLUMNS]]),
    "grid_thw": _grid,
    "image_grid_thw": _grid,
    "flattened_patches": _patches_with_places,
    "input_values": _sound,
    "audio_values": _sound,
    "input_features": _speech_features,
    "past_values": lambda request: _series(request, "past_values"),
    "future_values": lambda request: _series(request, "future_values"),
    "past_observed_mask": lambda request: torch.ones_like(request.made["past_values"]),
    "past_time_features": lambda request: _time_features(request, "past_values"),
    "future_time_features": lambda request: _time_features(request, "future_values"),
    "past_values_padding": lambda request: torch.zeros(BATCH, request.made["past_values"].shape[1], dtype=torch.long),
    "freq": lambda request: torch.zeros(BATCH, 1, dtype=torch.long),
    "bbox": _boxes,
    "image": lambda request: _noise(BATCH, 3, 224, 224),
    "visual_feats": _field(STEPS, last="visual_feat_dim"),
    "visual_pos": lambda request: torch.rand(BATCH, STEPS, 4),
    "visual_embeds": _field(STEPS, last="visual_embedding_dim"),
    "input_points": lambda request: torch.rand(BATCH, 1, 2, 2) * 30,
    "states": _field(STEPS, last="state_dim"),
    "actions": _field(STEPS, last="act_dim"),
    "rewards": lambda request: _noise(BATCH, STEPS, 1),
    "returns_to_go": lambda request: _noise(BATCH, STEPS, 1),
    "timesteps": lambda request: torch.arange(STEPS).repeat(BATCH, 1),
}

MAIN = (
    "input_ids", "pixel_values", "input_values", "input_features", "past_values", "pixel_values_videos",
    "flattened_patches", "inputs", "hidden_states", "inputs_embeds",
)  # fmt: skip
BESIDE_TEXT = ("pixel_values", "pixel_values_videos", "input_features", "input_values")
FIRST = ("grid_thw", "spatial_shapes", "past_values", "input_ids", "input_values", "input_features")
"""Arguments that others take their sizes from."""


def proposals(model: torch.nn.Module, extra: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Which arguments to give together, the fullest set first.

    Args:
        model: the model.
        extra: arguments that must be given though the signature calls them optional.
    """
    signature = inspect.signature(model.forward).parameters
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in signature.values())
    required = [name for name, one in signature.items() if one.default is one.empty and one.kind in named]
    decoder = ["decoder_input_ids"] if "decoder_input_ids" in signature else []
    mains = [name for name in dict.fromkeys((getattr(model, "main_input_name", ""), *MAIN)) if name in signature]
    bases = [["input_ids", other, *decoder] for other in BESIDE_TEXT if {"input_ids", other} <= signature.keys()]
    bases += [base for name in mains for base in (([name, *decoder], [name]) if decoder else ([name],))]
    given: list[tuple[str, ...]] = []
    for base in bases or [[]]:
        names = [*base, *extra, *required]
        if "hidden_states" in names and "grid_thw" in signature:
            names.append("grid_thw")
        sequence = {"input_ids", "input_values", "inputs_embeds", "input_features"} & set(names)
        plain = [name for name in names if name != "attention_mask"]
        masked = sequence and ("attention_mask" in signature or (open_ended and "input_ids" in names))
        for chosen in ([[*plain, "attention_mask"]] if masked else []) + [names if not masked else plain]:
            ordered = tuple(dict.fromkeys([name for name in FIRST if name in chosen] + chosen))
            if ordered not in given:
                given.append(ordered)
                yield ordered


def arguments(
    model: torch.nn.Module, config: Any, names: tuple[str, ...], seed: int, channels_first: bool = False
) -> Inputs:
    """The named arguments of one call.

    ``channels_first`` turns speech features from [batch, frames, bins] to [batch, bins, frames] or back.
    Raises LookupError for a name that no row of `ARGUMENTS` knows.
    """
    torch.manual_seed(seed)
    made: Inputs = {}
    for name in names:
        if name not in ARGUMENTS:
            raise LookupError(f"{type(model).__name__} takes {name}, which no row of ARGUMENTS makes")
        made[name] = ARGUMENTS[name](Request(model, config, made))
    if channels_first and "input_features" in made:
        made["input_features"] = made["input_features"].transpose(-1, -2).contiguous()
    if "use_cache" in inspect.signature(model.forward).parameters:
        made["use_cache"] = False
    return made
