"""Build a tiny, randomly initialised model of any transformers model type, with inputs, without downloads.

    model, args, kwargs = build("llama", attention="eager")

Two layers (more where a type has several kinds of layers), width 64, 4 heads, vocabulary 300; batch 2, 48 positions,
the second row padded; float32, evaluation mode. The same call gives the same numbers.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import itertools
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from benchmarks.zoo.exceptions import BACKBONE, Need, need_of
from benchmarks.zoo.inputs import Inputs, arguments, proposals
from benchmarks.zoo.sizes import STEPS, Config, Ladder, small_config

Attention = Literal["eager", "sdpa"]
Built = tuple[torch.nn.Module, tuple[Any, ...], Inputs]
MOST_PARAMETERS = 150_000_000
MOST_CLASSES = 4


class BuildError(ValueError):
    """No tiny model of a type runs; says what each attempt met."""


def model_types() -> tuple[str, ...]:
    """Every model type that the installed transformers knows, in its order."""
    return tuple(transformers.CONFIG_MAPPING.keys())


def build(model_type: str, attention: Attention = "eager", seed: int = 0) -> Built:
    """A tiny model of a type and the arguments of one call that runs.

    Args:
        model_type: a key of transformers' configuration mapping.
        attention: the implementation that the model is asked for.
        seed: of weights and inputs.

    Raises:
        BuildError: when no combination of sizes, classes and arguments runs.
    """
    if model_type not in transformers.CONFIG_MAPPING:
        raise BuildError(f"transformers {transformers.__version__} has no model type {model_type!r}")
    need, met = need_of(model_type), list[str]()
    with _quiet(), torch.no_grad():
        configs = list(_configs(model_type, need, met))
        for kind in _classes(transformers.CONFIG_MAPPING[model_type], need):
            for config in configs:
                model = _model(kind, config, attention, seed, met)
                inputs = None if model is None else _inputs_that_run(model, need, seed, met)
                if model is not None and inputs is not None:
                    return model, (), inputs
    raise BuildError(f"{model_type}: " + " | ".join(dict.fromkeys(met)))


def _inputs_that_run(model: torch.nn.Module, need: Need, seed: int, met: list[str]) -> Inputs | None:
    """The fullest inputs that the model takes; what stood in the way of others goes to ``met``."""
    for names, turned in itertools.product(proposals(model, need.inputs), (False, True)):
        if turned and "input_features" not in names:
            continue
        try:
            inputs = arguments(model, model.config, names, seed, turned)
            model(**copy.deepcopy(inputs))
            return inputs
        except Exception as error:
            met.append(f"{type(model).__name__}({', '.join(names)}): {_said(error)}")
    return None


def _said(error: Exception) -> str:
    """An error in one short line, with the line of code that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = ""
    if trace is not None:
        place = f" ({os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno})"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}{place}"


# --- configurations -----------------------------------------------------------------------------------------------


def _merged(config: Config, over: Mapping[str, Any]) -> Config:
    merged = dict(config)
    for name, value in over.items():
        old = merged.get(name)
        merged[name] = _merged(old, value) if isinstance(value, Mapping) and isinstance(old, dict) else value
    return merged


def _configs(model_type: str, need: Need, met: list[str]) -> Iterator[Any]:
    """Small configurations of a type, the smallest first."""
    for step in STEPS[:1] if need.afresh else STEPS:
        try:
            yield _config(model_type, need, step)
        except Exception as error:
            met.append(f"configuration: {_said(error)}")


def _config(model_type: str, need: Need, step: Ladder) -> Any:
    """The small configuration of a type. Raises whatever its class does when the sizes do not fit together."""
    kind = transformers.CONFIG_MAPPING[model_type]
    if need.afresh:
        config = kind(**copy.deepcopy(dict(need.config)))
    else:
        small = _merged(small_config(kind().to_dict(), step), need.config)
        small = _without_downloads(small)
        try:
            config = kind.from_dict(copy.deepcopy(small))
        except Exception:
            plain = {key: value for key, value in small.items() if key not in ("model_type", "transformers_version")}
            config = kind(**copy.deepcopy(plain))
    _without_cache(config)
    return config


def _without_cache(config: Any) -> None:
    """One forward pass needs no cache, and torch.export knows none as a result."""
    config.use_cache = False
    for part in vars(config).values():
        if isinstance(part, transformers.PretrainedConfig) and part is not config:
            _without_cache(part)


def _without_downloads(config: Config) -> Config:
    """Backbones that another library or a download would give become small random ones."""
    changed = {key: _without_downloads(value) if isinstance(value, dict) else value for key, value in config.items()}
    backbone = config.get("backbone_config")
    kind = backbone.get("model_type") if isinstance(backbone, dict) else None
    if config.get("use_timm_backbone") or kind in ("timm_backbone", "resnet"):
        stages = backbone.get("out_features") if isinstance(backbone, dict) else None
        named = isinstance(stages, list) and all(str(stage).startswith("stage") for stage in stages)
        changed |= {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": {**BACKBONE, "out_features": stages if named and stages else ["stage4"]},
        }
    return changed


# --- models -------------------------------------------------------------------------------------------------------


def _classes(config_kind: type[Any], need: Need) -> list[Any]:
    """Model classes of a configuration: the base model, then others of its file, those that generate first."""
    name = config_kind.__module__.replace(".configuration_", ".modeling_")
    found: list[Any] = []
    with contextlib.suppress(Exception):
        base = transformers.MODEL_MAPPING[config_kind]
        found += list(base) if isinstance(base, list | tuple) else [base]
    with contextlib.suppress(Exception):
        module = importlib.import_module(name)
        if need.model:
            return [getattr(module, need.model)]
        beside = [
            kind
            for kind in vars(module).values()
            if inspect.isclass(kind)
            and issubclass(kind, transformers.PreTrainedModel)
            and kind.__module__ == name
            and kind.config_class is config_kind
            and not kind.__name__.endswith("PreTrainedModel")
        ]
        beside.sort(
            key=lambda kind: ("Generation" not in kind.__name__, "CausalLM" not in kind.__name__, len(kind.__name__))
        )
        found += [kind for kind in beside if kind not in found]
    return found[:MOST_CLASSES]


def _model(kind: Any, config: Any, attention: Attention, seed: int, met: list[str]) -> torch.nn.Module | None:
    """A model of a class, or None and a line in ``met`` that says why not."""
    try:
        with torch.device("meta"):
            sketch = _made(kind, config, attention)
        size = sum(parameter.numel() for parameter in sketch.parameters())
    except Exception:
        size = 0  # some models compute while they are made, which "meta" cannot
    if size > MOST_PARAMETERS:
        met.append(f"{kind.__name__}: {size / 1e6:.0f} million parameters")
        return None
    try:
        torch.manual_seed(seed)
        model: Any = _made(kind, config, attention).eval()
    except Exception as error:
        met.append(f"{kind.__name__}: {_said(error)}")
        return None
    with contextlib.suppress(Exception):  # the default kernel of experts has no ONNX form
        model.set_experts_implementation("batched_mm")
    _make_different(model)
    return cast(torch.nn.Module, model)


def _made(kind: Any, config: Any, attention: Attention) -> torch.nn.Module:
    """The model with an implementation of attention: sdpa also in part, where a part of the model has no sdpa."""
    try:
        model = kind._from_config(copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32)
    except ValueError as error:
        if attention != "sdpa" or "does not support an attention implementation" not in str(error):
            raise
        # without a wish every part takes sdpa if it has it, and is eager otherwise
        model = kind._from_config(copy.deepcopy(config), dtype=torch.float32)
    return cast(torch.nn.Module, model)


def _make_different(model: torch.nn.Module) -> None:
    """Give parameters that start constant (norms, biases, scales, bias tables) values that show in the result."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of transformers and torch about what it means to be tiny."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(level)


__all__ = ["Attention", "BuildError", "Built", "build", "model_types"]
