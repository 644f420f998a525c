"""Inputs to try a model on, derived from its signature and configuration. No model has a case of its own
here.

A call without randomness of its own: the same sizes give the same inputs.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import onnx
import torch
import transformers

from attncompile.frontends import torch_internals
from attncompile.frontends.capture import dynamic_axes_of
from attncompile.frontends.encoder_inputs import Steps, convolved_stride, encoder_input, steps_of
from attncompile.frontends.errors import InputError
from attncompile.frontends.positions import check_length, text_config
from attncompile.frontends.several_inputs import with_others

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Padding = Literal["left", "right", "none"]

_TEXT = (
    "The ship had left the harbour before anybody noticed that the old clock on the tower had stopped. "
    "People asked one another what time it was, and 17 of them gave 17 different answers; only the baker, "
    "who had been up since three, was sure. He wrote it down, put the paper in a drawer and went back to his "
    "bread. Years later somebody found the note and wondered why he had kept it, but nobody was left to say. "
)


@dataclass(frozen=True)
class _Request:
    """What is asked for: ``length`` counts tokens; ``config`` is the model's own, ``text`` its language
    part's."""

    model: Any
    config: Any
    text: Any
    batch: int
    length: int
    padding: Padding
    tokenizer: Any


def model_arguments(
    model: Any, config: Any, batch: int, length: int, padding: Padding | None, tokenizer: Any
) -> Arguments:
    """Keyword arguments for one call of a transformers model.

    ``padding`` None means left for a model that generates from its own input, right otherwise. Raises
    LookupError when the model needs an input that no row of the table knows, InputError when ``length``
    exceeds its positions.
    """
    if config is None:
        raise LookupError(f"{type(model).__name__} has no configuration")
    text = text_config(config)
    encodes_and_decodes = bool(getattr(config, "is_encoder_decoder", False))
    main = encoder_input(model) if encodes_and_decodes else getattr(model, "main_input_name", "input_ids")
    check_length(config, length)
    if padding is None:
        generates = bool(model.can_generate()) if hasattr(model, "can_generate") else False
        padding = "left" if generates and not encodes_and_decodes else "right"
    request = _Request(model, config, text, batch, length, padding, tokenizer)

    signature = inspect.signature(model.forward).parameters
    names = [main]
    if main == "input_ids":
        names += [name for name in ("attention_mask", "token_type_ids") if name in signature]
    elif encodes_and_decodes and "attention_mask" in signature and _varies(main, config):
        names.append("attention_mask")
    if encodes_and_decodes:  # of a decoder that reads no tokens, too: a row that is missing is told
        names += [name for name in signature if name.startswith("decoder_input_")]
    if "use_cache" in signature:
        names.append("use_cache")
    required = [
        name
        for name, parameter in signature.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    names += [name for name in required if name not in names]
    unknown = [name for name in names if name not in _INPUTS]
    if unknown:
        raise LookupError(f"{type(model).__name__} takes {', '.join(unknown)}, which is not known here")
    made = {name: _INPUTS[name](request) for name in names}
    if main in _IN_STEPS and "attention_mask" in made:
        made["attention_mask"] = _padding_mask(replace(request, length=made[main].shape[1]))
    return (), made if encodes_and_decodes else with_others(model, made, lambda name: _INPUTS[name](request))


def resized_arguments(given: Arguments, batch: int, length: int) -> Arguments:
    """The arguments of a user's function, repeated or cut along their batch and sequence axes
    (`dynamic_axes_of`).

    Values are repeated in order, so indices stay in range. Axes that have a second size of the same kind
    (``length_2``) keep it.
    """
    leaves, structure = torch_internals.flatten(given)
    axes = iter(dynamic_axes_of(*given))
    sizes = {"batch": batch, "length": length}

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        for axis, name in next(axes).items():
            if name in sizes:
                leaf = leaf.index_select(
                    axis, torch.arange(sizes[name], device=leaf.device) % leaf.shape[axis]
                )
        return leaf

    args, kwargs = torch_internals.unflatten([resized(leaf) for leaf in leaves], structure)
    return tuple(args), dict(kwargs)


# --- one row per input name ---------------------------------------------------------------------------------


def _input_ids(request: _Request) -> torch.Tensor:
    tokens = _tokens(request)
    padded = _token_id(request, "pad_token_id", 0)
    return torch.where(_padding_mask(request).bool(), tokens, padded)


def _decoder_input_ids(request: _Request) -> torch.Tensor:
    tokens = _tokens(request)
    tokens[:, 0] = _token_id(request, "decoder_start_token_id", _token_id(request, "bos_token_id", 0))
    return tokens


def _padding_mask(request: _Request) -> torch.Tensor:
    """``[B, N]`` int64, 1 for a token. The last of several rows lacks a quarter of its tokens, at least
    one."""
    mask = torch.ones(request.batch, request.length, dtype=torch.int64)
    missing = max(1, request.length // 4)
    if request.batch > 1 and request.length > 1 and request.padding != "none":
        mask[-1, slice(None, missing) if request.padding == "left" else slice(-missing, None)] = 0
    return mask


def _token_type_ids(request: _Request) -> torch.Tensor:
    """Second half of each row is the second segment, where the model knows two."""
    kinds = torch.zeros(request.batch, request.length, dtype=torch.int64)
    if getattr(request.text, "type_vocab_size", 1) > 1:
        kinds[:, request.length // 2 :] = 1
    return kinds


def _input_features(request: _Request) -> torch.Tensor:
    """``[B, mels, frames]`` log-mel features for an encoder with a fixed number of positions; for one that takes any
    number ``[B, frames, features]``, as many frames as make ``length`` positions.
    """
    encoder = _encoder_config(request.config)
    if not _varies("input_features", request.config):
        frames = encoder.max_source_positions * convolved_stride(request.model)
        return _smooth(request.batch, encoder.num_mel_bins, frames)
    return _in_steps(request, "input_features", _frame_width(encoder))


def _input_values(request: _Request) -> torch.Tensor:
    """``[B, samples]`` raw audio, as long as makes ``length`` positions; ``[B, frames, mels]`` for an encoder that cuts
    a spectrogram of fixed size into patches.
    """
    encoder = _encoder_config(request.config)
    if not any(isinstance(module, torch.nn.Conv1d) for module in request.model.modules()):
        return _smooth(request.batch, _first(encoder, "max_length"), _first(encoder, "num_mel_bins"))
    return _in_steps(request, "input_values")


def _flattened_patches(request: _Request) -> torch.Tensor:
    """``[B, patches, 2 + values]``: row and column of each patch, from 1, and its values."""
    vision = _modality_config(request.config, "vision_config")
    values = _smooth(request.batch, request.length, _first(vision, "patch_embed_hidden_size"))
    numbers = torch.arange(request.length)
    columns = max(1, math.isqrt(request.length))
    places = torch.stack([numbers // columns + 1, numbers % columns + 1], dim=-1).to(values.dtype)
    return torch.cat([places.expand(request.batch, -1, -1), values], dim=-1)


def _pixel_values(request: _Request) -> torch.Tensor:
    """``[B, channels, height, width]``."""
    vision = _modality_config(request.config, "vision_config")
    size = _first(vision, "image_size")
    height, width = size if isinstance(size, Sequence) else (size, size)
    return _smooth(request.batch, getattr(vision, "num_channels", 3), height, width)


_INPUTS: Mapping[str, Callable[[_Request], Any]] = {
    "input_ids": _input_ids,
    "attention_mask": _padding_mask,
    "token_type_ids": _token_type_ids,
    "decoder_input_ids": _decoder_input_ids,
    "input_features": _input_features,
    "input_values": _input_values,
    "pixel_values": _pixel_values,
    "flattened_patches": _flattened_patches,
    # A captured graph is a function: what a cache holds goes in and out of it as tensors or not at all.
    "use_cache": lambda request: False,
}

_IN_STEPS = ("input_features", "input_values", "flattened_patches")
"""Inputs of any number of steps along their axis 1, of which a mask says what is padding."""


def _tokens(request: _Request) -> torch.Tensor:
    """``[B, N]`` int64: English text where there is a tokenizer, otherwise ids as skewed as those of text."""
    if request.tokenizer is not None:
        ids = list(request.tokenizer(_TEXT, add_special_tokens=False)["input_ids"])
    else:
        ids = _skewed_ids(_first(request.text, "vocab_size")).tolist()
    # Rows start at different words, so that no two are alike.
    rows = [
        [ids[(11 * row + position) % len(ids)] for position in range(request.length)]
        for row in range(request.batch)
    ]
    return torch.tensor(rows, dtype=torch.int64)


def _skewed_ids(vocabulary: int, count: int = 256) -> torch.Tensor:
    """``[count]`` ids below ``vocabulary``, small ones more often (log-uniform, as word frequencies are)."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.rand(count, generator=generator, dtype=torch.float64)
    return (vocabulary**exponents).long().clamp(max=vocabulary - 1)


def _smooth(*shape: int) -> torch.Tensor:
    """Unit-scale float32 values that vary slowly along the last axis, as features and audio do."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(*shape, generator=generator)
    phase = torch.linspace(0, 8 * math.pi, shape[-1])
    return 0.7 * torch.sin(phase) + 0.3 * noise


def _token_id(request: _Request, name: str, default: int) -> int:
    value = getattr(request.config, name, None)
    value = value[0] if isinstance(value, Sequence) and value else value
    return value if isinstance(value, int) else default


def _modality_config(config: Any, *names: str) -> Any:
    """The first of a configuration's parts with these names, or that of its encoder; where it has none, itself."""
    parts = (getattr(config, name, None) for name in (*names, "encoder"))
    return next((part for part in parts if isinstance(part, transformers.PretrainedConfig)), config)


def _encoder_config(config: Any) -> Any:
    """The configuration of the part that listens: the audio one, else that of an encoder with a name of its own."""
    return _modality_config(config, "audio_config", "encoder_config")


def _first(config: Any, *names: str) -> Any:
    """The first of several names for the same number that a configuration has."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    raise LookupError(f"{type(config).__name__} has no {' or '.join(names)}")


def _varies(main: str, config: Any) -> bool:
    """Whether an encoder takes any number of steps of an input; one with positions for a whole recording does not."""
    encoder = _encoder_config(config)
    whole = all(getattr(encoder, name, None) is not None for name in ("num_mel_bins", "max_source_positions"))
    return main in _IN_STEPS and not (main == "input_features" and whole)


def _frame_width(encoder: Any) -> int:
    """Features of a frame; those of a frame that is embedded already are the channels of the encoder."""
    width = _first(
        encoder, "input_feat_per_channel", "feature_projection_input_dim", "num_mel_bins", "feature_size", "hidden_size"
    )
    return int(width * getattr(encoder, "input_channels", 1))


def _in_steps(request: _Request, main: str, *shape: int) -> torch.Tensor:
    """``[B, steps, ...]`` of an input of any number of steps, as many as make ``length`` positions."""
    if getattr(request.config, "is_encoder_decoder", False):
        steps = steps_of(request.model, main, lambda number: _smooth(1, number, *shape).to(request.model.dtype))
    else:
        stride = convolved_stride(request.model)
        steps = Steps(stride, stride if main == "input_values" else 0)
    return _smooth(request.batch, steps.of(request.length), *shape)


# --- ONNX ---------------------------------------------------------------------------------------------------

_INTEGERS = {onnx.TensorProto.INT32: torch.int32, onnx.TensorProto.INT64: torch.int64}
_FLOATS = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.DOUBLE: torch.float64,
}


EXAMPLE_PAST = 5
"""Cached positions in made-up inputs of an ONNX model that takes a cache."""


def onnx_arguments(
    model: onnx.ModelProto, batch: int, length: int, padding: Padding, past: int = EXAMPLE_PAST
) -> Arguments:
    """A tensor for each input of an ONNX model, by name.

    A first axis without a fixed size is the batch, any other the sequence; one whose name says that it counts what is
    cached has `past` positions, and one that counts both has them together. An integer input that indexes a
    table gets ids within it; one whose name ends in ``mask`` is a padding mask; others are zeros. Raises
    InputError for an input of a type that is not supported.
    """
    initialised = {tensor.name for tensor in model.graph.initializer}
    request = _Request(None, None, None, batch, length, padding, None)
    inputs: dict[str, torch.Tensor] = {}
    for value in model.graph.input:
        if value.name in initialised:
            continue
        kind = value.type.tensor_type
        shape = [
            dim.dim_value if dim.HasField("dim_value") else _axis_size(dim.dim_param, length, past) if axis else batch
            for axis, dim in enumerate(kind.shape.dim)
        ]
        if kind.elem_type in _FLOATS:
            inputs[value.name] = _smooth(*shape).to(_FLOATS[kind.elem_type])
        elif kind.elem_type in _INTEGERS or kind.elem_type == onnx.TensorProto.BOOL:
            dtype = _INTEGERS.get(kind.elem_type, torch.bool)
            inputs[value.name] = _onnx_integers(model, value.name, shape, request).to(dtype)
        else:
            raise InputError(
                f"input {value.name!r} has the type {onnx.TensorProto.DataType.Name(kind.elem_type)}",
                model.graph.name or "the model",
                "only float, integer and boolean inputs can be made up",
            )
    return (), inputs


def has_cache(model: onnx.ModelProto) -> bool:
    """Whether an input has an axis whose name says that it counts what is cached."""
    names = [dim.dim_param for value in model.graph.input for dim in value.type.tensor_type.shape.dim]
    return any(_axis_size(name, 0, 1) for name in names)


def _axis_size(name: str, length: int, past: int) -> int:
    """Size of an axis by its name, as exporters call them: ``past``, ``past_sequence_length``, ``past + length``; of a
    buffer for all of them ``capacity``.
    """
    both = "total" in name or name == "capacity" or ("past" in name and "+" in name)
    return past + length if both else past if "past" in name else length


def _onnx_integers(
    model: onnx.ModelProto, name: str, shape: Sequence[int], request: _Request
) -> torch.Tensor:
    if name.endswith("mask") and list(shape) == [request.batch, request.length]:
        return _padding_mask(request)
    if name == "position_ids" and len(shape) == 2:
        return torch.arange(shape[1]).expand(*shape).contiguous()
    rows = _table_rows(model, name)
    if rows is None or rows <= 2:
        return (
            torch.ones(tuple(shape), dtype=torch.int64)
            if name.endswith("mask")
            else torch.zeros(tuple(shape), dtype=torch.int64)
        )
    ids = _skewed_ids(rows)
    return ids[torch.arange(math.prod(shape)) % len(ids)].reshape(*shape)


# Operators that give a row of the table for each row: how quantised tables are spelled out before they are
# indexed.
_ROW_BY_ROW = ("Cast", "Identity", "Mul", "Sub", "Add", "DequantizeLinear")


def _table_rows(model: onnx.ModelProto, name: str) -> int | None:
    """Rows of the smallest stored table that an input indexes by Gather; None if it indexes none."""
    rows = {tensor.name: tensor.dims[0] if tensor.dims else 1 for tensor in model.graph.initializer}
    indices = {name}
    tables: list[int] = []
    for node in model.graph.node:
        if node.op_type in ("Cast", "Identity") and node.input[0] in indices:
            indices.add(node.output[0])
        elif node.op_type in _ROW_BY_ROW and all(source in rows for source in node.input):
            rows[node.output[0]] = max(rows[source] for source in node.input)
        elif node.op_type == "Gather" and node.input[1] in indices and node.input[0] in rows:
            tables.append(rows[node.input[0]])
    return min(tables, default=None)
