"""Open what the user points at: a Hugging Face folder, ``file.py:function`` or an ``.onnx`` file. Save a
checkpoint.

Nothing here touches the network or runs code that a checkpoint brings: only ``file.py:function`` runs the
user's own.
"""

import hashlib
import importlib.util
import inspect
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from attncompile.frontends.capture import dynamic_axes_of
from attncompile.frontends.errors import InputError, first_line, given_path, unreadable
from attncompile.frontends.example_inputs import (
    Arguments,
    model_arguments,
    onnx_arguments,
    resized_arguments,
)
from attncompile.frontends.onnx_file import read_onnx_file
from attncompile.frontends.positions import positions_of

AttentionImplementation = Literal["sdpa", "eager"]

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
)
EXAMPLE_LENGTH = 37
"""Tokens of example inputs where nothing else is asked for: no power of two, nor next to one."""

FUNCTION_ADVICE = "write a function that returns (model, args, kwargs) and give file.py:function instead"


@dataclass(frozen=True)
class OpenedModel:
    """A model that is ready to be captured, and a way to make inputs for it.

    ``model`` is in evaluation mode for the kind "torch" and an `onnx.ModelProto` without its external data
    for the kind "onnx". ``path`` is the folder or file it came from. ``given`` are the arguments that
    ``file.py:function`` returned. ``without`` are arguments that examples leave out.
    """

    kind: Literal["torch", "onnx"]
    name: str
    path: Path
    model: Any
    config: Any = None
    given: Arguments | None = None
    notes: tuple[str, ...] = ()
    without: frozenset[str] = frozenset()

    @property
    def scope(self) -> str:
        """Path in ``model`` of what was opened, with a dot behind it; "" where they are one."""
        return ""

    def axes(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[int, str], ...]:
        """Names of the axes that should vary, for each tensor of a call in order (`dynamic_axes_of`)."""
        return dynamic_axes_of(args, kwargs)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer in the folder, loaded on first use; None when there is none that loads."""
        folder = self.path if self.path.is_dir() else self.path.parent
        if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
            return None
        try:
            return transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, ImportError):
            return None

    def usual_length(self, past: int = 0) -> int:
        """Tokens of example inputs where nothing else is asked for, behind ``past`` ones."""
        positions = positions_of(self.config)
        return EXAMPLE_LENGTH if positions is None else max(1, min(EXAMPLE_LENGTH, positions - past))

    def example(
        self,
        batch: int = 2,
        length: int | None = None,
        *,
        padding: Literal["left", "right", "none"] | None = None,
    ) -> Arguments:
        """Arguments ``(args, kwargs)`` for one call, always the same for the same sizes.

        ``length`` counts tokens, in the decoder for a model that has one; without one it is 37, or as many as the model
        has positions. With ``batch`` > 1 the last row is
        padded where the model takes an attention mask: on the left for decoders and on the right for encoders
        unless ``padding`` says otherwise. Raises InputError for a size the model cannot take, or a model for
        which no inputs can be derived.
        """
        length = self.usual_length() if length is None else length
        if batch < 1 or length < 1:
            raise InputError(
                f"batch {batch} and length {length} must be at least 1", self.name, "give larger sizes"
            )
        if self.given is not None:
            return resized_arguments(self.given, batch, length)
        if self.kind == "onnx":
            return onnx_arguments(self.model, batch, length, padding or "right")
        try:
            args, kwargs = model_arguments(self.model, self.config, batch, length, padding, self.tokenizer)
            return args, {name: value for name, value in kwargs.items() if name not in self.without}
        except LookupError as error:
            reason = f"no example inputs can be derived: {error.args[0]}"
            raise InputError(reason, self.name, FUNCTION_ADVICE) from error


def open_model(
    target: str | Path,
    *,
    attn_implementation: AttentionImplementation = "sdpa",
    allow_pickle: bool = False,
    dtype: torch.dtype | None = None,
) -> OpenedModel:
    """Open a Hugging Face folder, ``file.py:function`` or an ``.onnx`` file.

    ``attn_implementation`` and ``allow_pickle`` only concern folders; a model without SDPA (GPT-OSS, BLOOM) is loaded
    with its eager attention whichever is named. ``dtype`` None keeps the checkpoint's own.

    Raises InputError, one clear sentence, for everything that can be wrong with ``target``.
    """
    if attn_implementation not in ("sdpa", "eager"):
        reason = f"unknown attention implementation {attn_implementation!r}"
        raise InputError(reason, target, "use 'sdpa' or 'eager'")
    file, colon, function = str(target).rpartition(":")
    if colon and file.endswith(".py"):
        return _open_function(Path(file).expanduser(), function)
    path = given_path(target)
    _check_readable(path)
    if path.is_dir():
        return _open_folder(path, attn_implementation, allow_pickle, dtype)
    if path.suffix == ".onnx":
        return OpenedModel("onnx", path.stem, path, read_onnx_file(path))
    advice = {
        ".py": f"name the function that returns (model, args, kwargs), as in {path.name}:build",
        ".safetensors": "give the folder that holds it together with config.json",
        ".bin": "give the folder that holds it together with config.json",
        ".pt": "give the folder that holds it together with config.json",
    }.get(path.suffix, "give a Hugging Face folder, an .onnx file or file.py:function")
    raise InputError("not a model that can be opened", path, advice)


def save_checkpoint(model: torch.nn.Module, folder: Path, *, tokenizer_from: Path | None = None) -> None:
    """Write safetensors, the configuration if the model has one, and copies of the tokenizer files of another
    folder.

    Weights that share memory are written once. ``folder`` is made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, transformers.PreTrainedModel):
        with _quiet_transformers():
            model.save_pretrained(folder)
    else:
        safetensors.torch.save_model(model, str(folder / "model.safetensors"))
    if tokenizer_from is not None:
        for pattern in _TOKENIZER_FILES:
            for file in tokenizer_from.glob(pattern):
                if file.is_file():
                    shutil.copy2(file, folder / file.name)


# --- folders ------------------------------------------------------------------------------------------------


def _open_folder(
    folder: Path, attention: AttentionImplementation, allow_pickle: bool, dtype: torch.dtype | None
) -> OpenedModel:
    description = _read_config(folder)
    model_class = _model_class(folder, description)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    options: dict[str, Any] = {
        # asked for nothing, transformers takes SDPA where a model has it, and its eager attention otherwise
        "attn_implementation": "eager" if attention == "eager" else None,
        "dtype": dtype or "auto",
        "output_loading_info": True,
        **local,
    }
    try:
        with _quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(folder, **local)
            if _safetensors_files(folder):
                options["use_safetensors"] = True
                model, loading = model_class.from_pretrained(folder, config=config, **options)
            else:
                weights = _pickled_weights(folder, allow_pickle)
                model, loading = model_class.from_pretrained(
                    None, config=config, state_dict=weights, **options
                )
    except InputError:
        raise
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise InputError(
            f"{model_class.__name__} does not load: {first_line(error)}",
            folder,
            "check that config.json and the weights belong together, or try attn_implementation='eager'",
        ) from error
    missing = sorted(loading["missing_keys"])
    wanted = len(model.state_dict())
    if len(missing) >= wanted:
        raise InputError(
            f"the weights hold none of the {wanted} tensors of {model_class.__name__}",
            folder,
            "check that config.json and the weights belong together",
        )
    notes = (
        (f"{len(missing)} tensors are not in the checkpoint and are random: {', '.join(missing[:5])}",)
        if missing
        else ()
    )
    name = folder.resolve().name
    return OpenedModel("torch", name, folder, model.eval(), config=model.config, notes=notes)


def _onnx_file_in(folder: Path) -> str:
    """What else to give where a folder holds ONNX files, such as one that was converted; empty where it holds none."""
    files = sorted(path.name for path in folder.glob("*.onnx"))
    return f", or give a file in this one, such as {files[0]}" if files else ""


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        advice = f"give the folder of a Hugging Face checkpoint{_onnx_file_in(folder)}"
        raise InputError("no config.json in this folder", folder, advice)
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise unreadable(file) from error
    except ValueError as error:
        raise InputError(f"not valid JSON ({error})", file, "download it again") from error
    if not isinstance(description, dict) or not isinstance(description.get("model_type"), str):
        raise InputError(
            "this configuration has no model_type",
            file,
            f"add the one that transformers knows, or {FUNCTION_ADVICE}",
        )
    return description


def _model_class(folder: Path, description: Mapping[str, Any]) -> Any:
    """The transformers class that the configuration names. Nothing but model classes is ever looked up."""
    kind = description["model_type"]
    if kind not in CONFIG_MAPPING:
        own_code = "; the code that the folder brings is not run" if "auto_map" in description else ""
        raise InputError(
            f"unknown architecture: transformers {transformers.__version__} has no model_type {kind!r}"
            f"{own_code}",
            folder,
            f"update transformers, or {FUNCTION_ADVICE}",
        )
    architectures = description.get("architectures") or ["AutoModel"]
    name = architectures[0] if isinstance(architectures, list) else architectures
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if found is transformers.AutoModel:
        return found
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise InputError(
            f"unknown architecture: {name!r} is no model class of transformers {transformers.__version__}",
            folder,
            f"correct `architectures` in config.json, or {FUNCTION_ADVICE}",
        )
    return found


def _safetensors_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, each checked to be whole; [] when there are none."""
    index = folder / "model.safetensors.index.json"
    files = _indexed_files(index) if index.is_file() else sorted(folder.glob("*.safetensors"))
    for file in files:
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                opened.keys()
        except PermissionError as error:
            raise unreadable(file) from error
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(
                f"not a whole safetensors file ({first_line(error)})", file, "download it again"
            ) from error
    return files


def _indexed_files(index: Path) -> list[Path]:
    """The shards that an index names, which must lie beside it."""
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(table.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError("this index of shards is damaged", index, "download it again") from error
    files = []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(
                f"this index names the shard {name!r}, outside its folder",
                index,
                "only use shards that lie beside it",
            )
        file = index.parent / name
        if not file.is_file():
            raise InputError(f"the shard {name} is missing", index, "download the rest of the checkpoint")
        files.append(file)
    return files


def _pickled_weights(folder: Path, allowed: bool) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint without safetensors. Pickles can run code, so they are read only on request and
    then only as tensors."""
    found = {file for pattern in _PICKLES for file in folder.glob(pattern)}
    pickles = sorted(file for file in found if file.name != "training_args.bin")
    if not pickles:
        advice = f"download its *.safetensors files{_onnx_file_in(folder)}"
        raise InputError("no weights in this folder", folder, advice)
    if not allowed:
        raise InputError(
            f"the weights are only there as pickle ({pickles[0].name}), which can run code",
            folder,
            "get the safetensors version, or pass --allow-pickle to read the pickle as plain tensors",
        )
    weights: dict[str, torch.Tensor] = {}
    for file in pickles:
        try:
            part = torch.load(file, map_location="cpu", weights_only=True)
        except PermissionError as error:
            raise unreadable(file) from error
        except Exception as error:
            raise InputError(
                f"this pickle is damaged or holds more than tensors ({first_line(error)})",
                file,
                "get the safetensors version",
            ) from error
        if not isinstance(part, dict) or not all(isinstance(value, torch.Tensor) for value in part.values()):
            raise InputError("this pickle is no table of tensors", file, "get the safetensors version")
        weights.update(part)
    return weights


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings of transformers: what matters is said in our own words."""
    bars = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


# --- file.py:function ---------------------------------------------------------------------------------------


def _open_function(file: Path, name: str) -> OpenedModel:
    _check_readable(file)
    module = _import_file(file)
    function = getattr(module, name, None)
    if not callable(function):
        functions = [
            other
            for other, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        raise InputError(
            f"no function {name!r} in this file", file, f"it has: {', '.join(functions) or 'none'}"
        )
    try:
        with _importable(file.parent):
            result = function()
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise InputError(
            f"{name}() raised {type(error).__name__}: {first_line(error)}",
            file,
            "make it return (model, args, kwargs)",
        ) from error
    match result:
        case (torch.nn.Module() as model, tuple() | list() as args, dict() as kwargs):
            given = (tuple(args), kwargs)
        case _:
            raise InputError(
                f"{name}() returned {_shape_of(result)}",
                file,
                "return a tuple (torch.nn.Module, tuple, dict)",
            )
    config = getattr(model, "config", None)
    return OpenedModel("torch", f"{file.stem}:{name}", file, model.eval(), config, given)


def _import_file(file: Path) -> Any:
    # A name of our own, so that a file called `json.py` hides nothing.
    private = f"_attncompile_target_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}"
    specification = importlib.util.spec_from_file_location(private, file)
    if specification is None or specification.loader is None:
        raise InputError("not a Python file", file, "give file.py:function")
    module = importlib.util.module_from_spec(specification)
    sys.modules[private] = module
    try:
        with _importable(file.parent):
            specification.loader.exec_module(module)
    except (MemoryError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a script may well call sys.exit()
        del sys.modules[private]
        raise InputError(
            f"importing it raised {type(error).__name__}: {first_line(error)}",
            file,
            "make the file importable",
        ) from error
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let a file import its neighbours, as it can when it is run as a script."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _shape_of(result: Any) -> str:
    if isinstance(result, Sequence) and not isinstance(result, str):
        return f"a {type(result).__name__} of ({', '.join(type(item).__name__ for item in result)})"
    return f"a {type(result).__name__}"


# --- all kinds ----------------------------------------------------------------------------------------------


def _check_readable(path: Path) -> None:
    """Raise InputError for a path that does not exist or may not be read."""
    try:
        if path.is_dir():
            next(path.iterdir(), None)
            return
        with path.open("rb"):
            return
    except FileNotFoundError as error:
        raise InputError("no such file or folder", path, "check the spelling") from error
    except PermissionError as error:
        raise unreadable(path) from error
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path, "check the path") from error
