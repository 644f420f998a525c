"""Containers of tensors that torch does not know by itself, such as the caches that Hugging Face models return."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import torch

REGISTRARS = (
    ("transformers.exporters.exporter_dynamo", "register_cache_pytrees_for_model", True),
    ("transformers.integrations.executorch", "register_dynamic_cache_export_support", False),
)
"""Where transformers registers its caches as pytrees, newest first: module, function, whether it takes the model."""


def register_containers(model: torch.nn.Module) -> bool:
    """Tell torch how to take the caches of a model's library apart, for tracing with them as arguments or results.

    Returns:
        Whether there was anything to register: the model, or a part of it, comes from transformers.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return False
    parts = [part for part in model.modules() if isinstance(part, transformers.PreTrainedModel)]
    if not parts:
        return False
    for module, name, takes_model in REGISTRARS:
        try:
            register: Callable[..., None] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
        for part in parts if takes_model else parts[:1]:
            register(*((part,) if takes_model else ()))
        return True
    return False
