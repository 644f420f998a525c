"""How many positions a model has, where its configuration says so."""

from __future__ import annotations

from typing import Any

import torch

from attncompile.frontends.errors import InputError

STATED_FOR = 2048
"""Positions that densities and pictures are stated for where nobody asks for another number."""


def check_length(config: Any, length: int) -> None:
    """Raises InputError for more positions than a model has."""
    known = _positions(config)
    if known is not None and known[1] < length:
        name, limit = known
        raise InputError(
            f"length {length} is more than the {limit} positions ({name}) of the model",
            type(config).__name__,
            f"use at most {limit}",
        )


def positions_of(config: Any) -> int | None:
    """How many positions a model has at most, that of its decoder where it has one; ``None`` where it does not say."""
    known = _positions(config)
    return known[1] if known is not None else None


def _positions(config: Any) -> tuple[str, int] | None:
    """The number of positions, and what the configuration calls it."""
    text = text_config(config)
    names = ["max_position_embeddings", "max_seq_len"]
    if getattr(config, "is_encoder_decoder", False):
        names = ["max_target_positions", "max_decoder_position_embeddings", *names]
    numbers = ((name, getattr(text, name, None)) for name in names)
    return next(((name, number) for name, number in numbers if isinstance(number, int) and number > 0), None)


def rows_of_positions(model: torch.nn.Module) -> int | None:
    """The rows of the table of positions that a model looks up: none of its sequences is longer, if there is a table.

    It has as many rows as the configuration says positions, where there are not as many words. Of an encoder and a
    decoder nothing is said, which may have sequences of different bounds.
    """
    configs = (getattr(module, "config", None) for module in model.modules())
    config = next((found for found in configs if found is not None), None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return None
    known = positions_of(config)
    if known is None or known == getattr(text_config(config), "vocab_size", None):
        return None
    tables = (module for module in model.modules() if isinstance(module, torch.nn.Embedding))
    return known if any(table.num_embeddings == known for table in tables) else None


def text_config(config: Any) -> Any:
    """The configuration of a model's language part."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def stated_length(config: Any, asked: int | None) -> int:
    """How many positions densities are stated for: as many as asked, else :data:`STATED_FOR` or what there are.

    Where a model has another sequence than its text (that of an encoder, of sound or pictures above all), the positions
    of its text do not bound that.

    Raises:
        InputError: when the model has fewer positions than are asked for.
    """
    alone = not getattr(config, "is_encoder_decoder", False) and text_config(config) is config
    known = positions_of(config) if config is not None and alone else None
    if asked is None:
        return STATED_FOR if known is None else min(STATED_FOR, known)
    if known is not None:
        check_length(config, asked)
    return asked


__all__ = ["STATED_FOR", "check_length", "positions_of", "rows_of_positions", "stated_length", "text_config"]
