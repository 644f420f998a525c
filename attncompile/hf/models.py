"""What a model's own code does with masks, read in its source, as transformers does to see who uses its interface.

A stated mask is no tensor. Code that hands it on to the attention interface does not notice, and code that computes
with it gets a tensor; but that tensor must be the one the code expects, and code that asks for the class of its mask
must not be misled.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from typing import Any

import torch
from transformers import PreTrainedModel

_ASKS = re.compile(r"\bBlockMask\b|isinstance\(\s*\w*mask\w*\s*,\s*(torch\.)?Tensor\s*\)")
_INTERFACE = "ALL_ATTENTION_FUNCTIONS.get_interface("

OWN, TENSOR, STATED = "own", "tensor", "stated"
"""The model spells out its attention; asks for the class of its mask; takes any mask."""

NUMBERS = "numbers"
"""Behind one of the above: the model adds masks to scores. Otherwise it knows truth values too, as SDPA takes."""


@torch.compiler.assume_constant_result
def handling(module: str) -> str:
    """What the models of a configuration do with masks: one of the words above, and perhaps ``numbers``.

    Args:
        module: name of the module that defines the configuration's class. Dynamo takes the answer as a constant.
    """
    return _handling(module)


@functools.lru_cache(maxsize=1024)
def _handling(module: str) -> str:
    found = sys.modules.get(module.replace(".configuration_", ".modeling_"))
    try:
        source = inspect.getsource(found) if found is not None else ""
    except (OSError, TypeError):
        source = ""
    if found is None or not source:
        return TENSOR  # nobody knows: a tensor as SDPA takes it is what most models expect
    models = [value for value in vars(found).values() if _is_model(value) and value.__module__ == found.__name__]
    numbers = bool(models) and not any(model._supports_sdpa for model in models)
    if _INTERFACE not in source and any(re.match(r"class \w*Attention", line) for line in source.splitlines()):
        return f"{OWN} {NUMBERS}" if numbers else OWN
    how = TENSOR if _ASKS.search(source) else STATED
    return f"{how} {NUMBERS}" if numbers else how


_KNOWN_OPTIONS = (
    "dropout",
    "head_mask",
    "is_causal",
    "output_attentions",
    "position_bias",
    "s_aux",
    "scaling",
    "sliding_window",
    "softcap",
)
_KNOWN_ATTRIBUTES = ("attention_dropout", "dropout", "head_dim", "num_key_value_groups", "scaling", "training")
_SINKS = "sinks"


@torch.compiler.assume_constant_result
def unknown_options(module: str) -> str:
    """What the attention that a file spells out reads beyond what the interface says, as words with spaces around.

    Args:
        module: name of the module that defines the layer's class. Dynamo takes the answer as a constant.

    Returns:
        Names of parameters, and ``module.name`` for attributes of the layer.
    """
    return _unknown_options(module)


@functools.lru_cache(maxsize=1024)
def _unknown_options(module: str) -> str:
    eager = getattr(sys.modules.get(module), "eager_attention_forward", None)
    if eager is None:
        return " "
    try:
        source, parameters = inspect.getsource(eager), list(inspect.signature(eager).parameters)
    except (OSError, TypeError, ValueError):
        return " "
    named = [name for name in parameters[5:] if name not in (*_KNOWN_OPTIONS, "kwargs")]
    read = dict.fromkeys(re.findall(r"\bmodule\.(\w+)", source))
    return f" {' '.join([*named, *(f'module.{name}' for name in read if name not in _KNOWN_ATTRIBUTES)])} "


def reads_beyond(layer: torch.nn.Module, options: dict[str, Any]) -> str:
    """What a layer's own attention would read in a call that a Spec of the call does not say, or nothing."""
    for name in unknown_options(type(layer).__module__).split():
        if name == f"module.{_SINKS}":
            if options.get("s_aux") is None and getattr(layer, _SINKS, None) is not None:
                return "the sinks of the layer"
        elif name.startswith("module."):
            return f"{name.removeprefix('module.')} of the layer"
        elif options.get(name) is not None:
            return name
    return ""


def _is_model(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, PreTrainedModel)
