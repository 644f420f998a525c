"""Small sizes for a transformers configuration, by what its fields mean.

Only sizes shrink: switches, kinds of layers, windows, soft caps and rotary types keep their defaults, so that the
tiny model computes attention in the way of the large one. Fields are read by their names; a row of `ROLES` says
which names mean the same thing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

WIDTH, HEADS, KEY_VALUE_HEADS, HEAD, FEED_FORWARD = 64, 4, 2, 16, 96
VOCABULARY, EXPERTS, QUERIES, PATCHES = 300, 4, 12, 6
LAYERS, MOST_LAYERS = 2, 6
HIERARCHICAL_IMAGE = 64

Config = dict[str, Any]


@dataclass(frozen=True)
class Ladder:
    """How much to shrink. The first steps make the smallest models; later ones keep what some models tie together.

    Attributes:
        widths: whether widths, heads and feed-forward sizes shrink, or only depth, experts and vocabulary.
        grouped: whether models that repeat key/value heads keep fewer of them than query heads.
        sections: whether rotary sections are said where the configuration leaves them to the modelling code, whose
            defaults are for large heads.
    """

    widths: bool = True
    grouped: bool = True
    sections: bool = False


STEPS = (
    Ladder(),
    Ladder(sections=True),
    Ladder(grouped=False),
    Ladder(grouped=False, sections=True),
    Ladder(widths=False),
)


@dataclass
class Scale:
    """What is known about the (sub-)configuration whose fields are being shrunk."""

    given: Config
    step: Ladder
    layers: int | None
    depth: int
    hierarchical: bool
    tokens: dict[int, int] = field(default_factory=dict)


# --- what an integer field means ----------------------------------------------------------------------------------


def _key_value_heads(scale: Scale, name: str, value: int) -> int:
    """One stays one and all stay all; in between there are fewer than query heads."""
    beside = re.sub(r"key_value_heads|kv_heads|kv_n_heads", "attention_heads", name)
    queries = scale.given.get(beside) or first_integer(scale.given, "num_attention_heads", "num_heads", "n_head")
    if value == 1:
        return 1
    return HEADS if value == queries or not scale.step.grouped or _latent(scale) else KEY_VALUE_HEADS


def _latent(scale: Scale) -> bool:
    return "qk_rope_head_dim" in scale.given


def _head(scale: Scale, name: str, value: int) -> int:
    """Latent attention splits its heads in a rotated and a plain part."""
    if not isinstance(scale.given.get("qk_rope_head_dim"), int):
        return HEAD
    if name == "qk_head_dim":
        return HEAD + HEAD // 2
    if name == "head_dim":
        return HEAD // 2 if value == scale.given["qk_rope_head_dim"] else HEAD + HEAD // 2
    return HEAD


def _width(scale: Scale, name: str, value: int) -> int:
    return value if scale.hierarchical else WIDTH


def _depth(scale: Scale, name: str, value: int) -> int:
    return scale.depth if value == scale.layers else LAYERS


def _image(scale: Scale, name: str, value: int) -> int:
    if scale.hierarchical:
        return HIERARCHICAL_IMAGE
    patch = scale.given.get("patch_size", 16)
    while isinstance(patch, list | tuple) and patch:
        patch = patch[-1]
    return PATCHES * patch if isinstance(patch, int) else value


def _fixed(size: int) -> Callable[[Scale, str, int], int]:
    return lambda scale, name, value: size


@dataclass(frozen=True)
class Role:
    """Names that mean one thing, and the small size for it. ``grows``: the size need not be below the default."""

    names: re.Pattern[str]
    size: Callable[[Scale, str, int], int]
    width: bool = False
    grows: bool = False


def _role(names: str, size: Callable[[Scale, str, int], int] | int, **options: bool) -> Role:
    return Role(re.compile(names), _fixed(size) if isinstance(size, int) else size, **options)


ROLES = (
    # fields that look like another role and are none
    _role(
        r"num_feat_extract_layers|max_window_layers|num_hidden_groups|xpath_unit_hidden_size|num_channels",
        lambda s, n, v: v,
    ),
    _role(r"num_nextn_predict_layers|num_mtp_layers|mtp_num_hidden_layers", 0),
    _role(
        r"(.*_)?(num_)?(hidden_|n_)?layers?|n_layers?|depth|(.*_)?depth|num_blocks|n_blocks|.*_num_layers"
        r"|num_layers_per_stack|num_self_attends_per_block",
        _depth,
    ),
    _role(r".*(key_value|kv)_(n_)?heads|multi_query_group_num", _key_value_heads, width=True),
    _role(r"qk_rope_head_dim|rotary_dim", HEAD // 2, width=True),
    _role(r"mamba_d_head|mamba_head_dim|mamba_d_state|ssm_state_size|state_size", HEAD, width=True),
    _role(r".*head_dim|.*head_size|d_kv|d_head|kv_channels|.*dim_head|key_dim", _head, width=True),
    _role(r"linear_(num_)?(key_|value_)?(num_)?heads|index_n_heads", HEADS, width=True),
    _role(r"mamba_n_heads|mamba_num_heads", 8, width=True),
    _role(r"(.*_)?(n_|num_)?heads?|nhead", HEADS, width=True),
    _role(r".*_lora_rank", WIDTH // 2, width=True),
    _role(
        r"(.*_)?(intermediate_(size|dim)|ffn_dim|ffn_hidden_size|mlp_dim|feed_?forward_(hidden_)?(size|dim))"
        r"|d_ff|dff|dim_ff|d_inner|n_inner|inner_dim|dim_feedforward|intermediate_size_mlp|(.*_)?linear_units"
        r"|moe_(latent|hidden)_size",
        FEED_FORWARD,
        width=True,
    ),
    _role(r"(num_|n_)?(local_|routed_|moe_)?experts|moe_num_experts", EXPERTS),
    _role(r"n_group|topk_group", 1),
    _role(r"(num_|n_)?experts_per_tok(en)?|moe_(top_?)?k|top_k_experts|num_experts_per_token", 2),
    _role(r"index_topk", 16),
    _role(r"(.*_)?vocab_size(_per_layer_input)?", VOCABULARY),
    _role(r"image_size|img_size|crop_size|input_size|max_img_size|pretrain(ing)?_image_size", _image, grows=True),
    _role(r"num_queries|num_query|num_query_tokens|num_latents|(.*_)?n(um)?_latents", QUERIES),
    _role(r"max_source_positions", 48),
    _role(
        r"(.*_)?(hidden_size|hidden_dim|d_model|embed_dim|embedding_dim|embedding_size|n_embd|emb_dim|model_dim"
        r"|projection_dim|projection_size|output_dim|codevector_dim|attention_dim|embed_size)|dim|dim_model|d_embed"
        r"|word_embed_proj_dim|d_latents|out_hidden_size|entity_emb_size|hidden_size_per_layer_input|output_channels"
        r"|text_hidden_size|input_dim|max_relative_positions|mask_feature_size",
        _width,
        width=True,
    ),
)


def _role_of(name: str) -> Role | None:
    return next((role for role in ROLES if role.names.fullmatch(name)), None)


# --- other kinds of fields ----------------------------------------------------------------------------------------

TOKENS = re.compile(
    r".*(token_ids?|token_index|_token|start_id|end_id|bos_id|eos_id|pad_id)|(bos|eos|pad|sep|cls|mask)_id"
)
NO_TOKENS = re.compile(r"tag_pad_id|subs_pad_id|.*xpath.*|default_prompt_id")
STAGES = ("depths", "num_block_repeats", "blocks_per_stage", "encoder_layers_list")
STAGE_SIZES = ("num_heads", "num_attention_heads", "hidden_sizes", "embed_dims", "embed_dim")
STAGE_NAMES = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers")


def first_integer(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of the named fields that is an integer."""
    return next((config[name] for name in names if type(config.get(name)) is int), None)


def _small_depth(given: Mapping[str, Any], layers: int | None) -> int:
    """Two layers, or the first few that show every kind of layer."""
    depth = LAYERS
    for value in given.values():
        if isinstance(value, list | tuple) and layers and len(value) == layers:
            kinds = {str(kind) for kind in value}
            if 1 < len(kinds) <= 4 and all(isinstance(kind, str | int) for kind in value):
                named = [str(kind) for kind in value]
                depth = max(depth, min(MOST_LAYERS, 1 + max(named.index(kind) for kind in kinds)))
    return min(depth, layers) if layers else depth


def _small_token(scale: Scale, value: Any) -> Any:
    """Special tokens beyond the small vocabulary become its last ones; equal ones stay equal."""
    if isinstance(value, list | tuple):
        return [_small_token(scale, one) for one in value]
    if type(value) is not int or value < VOCABULARY - 80:
        return value
    return scale.tokens.setdefault(value, VOCABULARY - 1 - len(scale.tokens))


def _rotary(config: Any, step: Ladder) -> Any:
    """Sections of a rotary position map share out half a head."""
    if not isinstance(config, dict):
        return config
    small = {name: _rotary(value, step) for name, value in config.items()}
    sections = config.get("mrope_section")
    if (isinstance(sections, list) and len(sections) == 3) or (step.sections and "rope_type" in config):
        small["mrope_section"] = [2, 3, 3] if config.get("partial_rotary_factor", 1) == 1 else [1, 1, 2]
    return small


def _small_list(scale: Scale, name: str, value: list[Any] | tuple[Any, ...]) -> Any:
    if scale.layers and len(value) == scale.layers and not scale.hierarchical:
        return list(value)[: scale.depth]
    if name in STAGES and all(type(one) is int for one in value):
        return [min(one, LAYERS) for one in value]
    role = _role_of(name)
    if role is not None and role.size is _image:
        return type(value)(_image(scale, name, one) for one in value)
    if role is not None and role.size is _width and name == "conv_dim":
        return [WIDTH // 2 for _ in value]
    if name in ("decoder_in_channels", "feat_channels") and scale.step.widths:
        return [WIDTH for _ in value]
    return value


def small_config(given: Mapping[str, Any], step: Ladder, tokens: dict[int, int] | None = None) -> Config:
    """A copy of a configuration dictionary with small sizes.

    Args:
        given: the default configuration, as ``to_dict`` gives it.
        step: how much to shrink.
        tokens: special tokens that were renumbered already, shared by all parts of a configuration.
    """
    tokens = {} if tokens is None else tokens
    config = {name: value for name, value in given.items() if isinstance(name, str)}
    layers = first_integer(config, *DEPTHS)
    hierarchical = any(isinstance(config.get(name), list | tuple) for name in (*STAGES, *STAGE_SIZES))
    scale = Scale(config, step, layers, _small_depth(config, layers), hierarchical, tokens)
    small: Config = {}
    for name, value in config.items():
        if name in STAGE_NAMES and "stage_names" in config and not hierarchical:
            continue  # follows the number of layers
        if isinstance(value, dict):
            if name == "per_layer_config":
                small[name] = {key: part for key, part in value.items() if int(key) < scale.depth}
            elif name.startswith("rope_"):
                small[name] = _rotary(value, step)
            elif not all(isinstance(key, str) for key in value) or name in (
                "id2label",
                "label2id",
                "quantization_config",
                "task_specific_params",
            ):
                small[name] = value
            else:
                small[name] = small_config(value, step, tokens)
        elif TOKENS.fullmatch(name) and not NO_TOKENS.fullmatch(name):
            small[name] = _small_token(scale, value)
        elif isinstance(value, list | tuple):
            small[name] = _small_list(scale, name, value)
        elif type(value) is int:
            small[name] = _small_integer(scale, name, value)
        else:
            small[name] = value
    return small


def _small_integer(scale: Scale, name: str, value: int) -> int:
    role = _role_of(name)
    if role is None or (role.width and not scale.step.widths):
        return value
    size = role.size(scale, name, value)
    return size if role.grows else min(value, size)
