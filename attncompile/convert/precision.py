"""``--precision``: element types of an ONNX model's weights and states, and how far each may move its outputs.

A precision is made of the float32 model after its attention was rewritten and compared, so whatever differs afterwards
is due to rounding alone. ``int4(symmetric=false)`` is read as a pass is.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir
from pydantic import Field

from attncompile.codegen.onnx.narrow import CACHE, Narrow, narrowed
from attncompile.codegen.onnx.quantize import (
    Calibration,
    Feed,
    block_weights,
    dynamic_int8,
    plain_projections,
    static_rounding,
)
from attncompile.codegen.onnx.stored import Bits, store_narrow, why_not_stored
from attncompile.codegen.onnx.widen import without_kernels
from attncompile.convert.providers import kernels_of, named_provider, session_providers
from attncompile.convert.runtime import CACHED, save
from attncompile.frontends.errors import InputError
from attncompile.passes import Options
from attncompile.passes.registry import nearest
from attncompile.passes.text import make_options, read_arguments, read_calls

COSINE_995, COSINE_95 = 0.1, 0.32
"""Relative changes at which two vectors of one length have cosines of 0.995 and 0.95."""


class CacheOptions(Options):
    """Options of every precision."""

    cache: Literal["float", "int8", "int4"] = Field("float", description="how keys and values are cached")


class Int8Options(CacheOptions):
    """Options of ``int8``."""

    per_channel: bool = Field(True, description="one scale for each output channel of a weight")


class StaticOptions(Int8Options):
    """Options of ``int8-static``."""

    calibration: Calibration = Field("minmax", description="how ranges are taken: minmax, entropy or percentile")


class BlockOptions(CacheOptions):
    """Options of ``int8-weights`` and ``int4``."""

    block: Literal[16, 32, 64, 128, 256] = Field(32, description="weights that share one scale")
    symmetric: bool = Field(True, description="without a zero point for each block")
    states: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="everything else: fp32, fp16 or bf16")


class Int4Options(BlockOptions):
    """Options of ``int4``."""

    symmetric: bool = Field(False, description="without a zero point for each block")


@dataclass(frozen=True)
class Kind:
    """One precision that can be asked for.

    Attributes:
        name, summary: how it is called, and what is made.
        budget: the largest relative change of an output unless the user gives another; none where nothing is rounded.
        options: their class.
        projections: it rounds projections, which can be left out one by one.
        calibrated: it needs inputs to take ranges from.
        states: the element type that states are rounded to between operators, where that is not float32.
    """

    name: str
    summary: str
    budget: float | None
    options: type[CacheOptions] = CacheOptions
    projections: bool = False
    calibrated: bool = False
    states: Narrow | None = None


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("fp32", "float32 throughout", None),
        Kind("fp16", "float16; positions, masks, softmax and long sums in float32", 0.01, states="float16"),
        Kind("bf16", "bfloat16, with the same exceptions", 0.05, states="bfloat16"),
        Kind("int8", "projections: INT8 weights, states rounded to UINT8 in each call", COSINE_995, Int8Options, True),
        Kind("int8-static", "projections: the same, ranges from calibration", COSINE_995, StaticOptions, True, True),
        Kind("int8-weights", "projections: weights of 8 bits in blocks (MatMulNBits)", COSINE_995, BlockOptions, True),
        Kind("int4", "projections: weights of 4 bits in blocks (MatMulNBits)", COSINE_95, Int4Options, True),
        Kind("fp8", "projections: weights and states in float8 e4m3, for GPUs", COSINE_995, CacheOptions, True, True),
    )
}


@dataclass(frozen=True)
class Precision:
    """A precision with its options; prints as :func:`parse_precision` reads it."""

    kind: Kind
    options: CacheOptions

    def __str__(self) -> str:
        given = self.options.model_dump(exclude_defaults=True)
        listed = ", ".join(f"{name}={str(value).lower()}" for name, value in given.items())
        return f"{self.kind.name}({listed})" if listed else self.kind.name

    @property
    def states(self) -> Narrow | None:
        """The narrow dtype of everything that is no weight of a projection, the cache too; ``None`` for float32."""
        return _NARROW.get(getattr(self.options, "states", ""), self.kind.states)


    @property
    def cache(self) -> Bits | None:
        """Bits of an element of the cache; ``None`` where that is kept in the states' own dtype."""
        return _BITS.get(self.options.cache)

    def without_cache(self) -> Precision:
        """The same, with keys and values cached in the states' own dtype."""
        return replace(self, options=self.options.model_copy(update={"cache": "float"}))

    @property
    def budget(self) -> float | None:
        """The largest relative change of an output unless the user gives another; none where nothing is rounded."""
        budgets = [self.kind.budget, _CACHE_BUDGETS[self.cache] if self.cache is not None else None]
        return max((budget for budget in budgets if budget is not None), default=None)


_NARROW: Mapping[str, Narrow] = {"fp16": "float16", "bf16": "bfloat16"}
_BITS: Mapping[str, Bits] = {"int8": 8, "int4": 4}
_CACHE_BUDGETS: Mapping[Bits, float] = {8: COSINE_995, 4: COSINE_95}


def parse_precision(text: str) -> Precision:
    """Read a precision, such as ``int4(block=64)``.

    Raises:
        ValueError: in one sentence, for an unknown one or its options.
    """
    calls = read_calls(text, "the precision")
    if len(calls) != 1:
        raise ValueError(f"give one precision, not {text!r}; there are {', '.join(KINDS)}")
    (name, given), known = calls[0], list(KINDS)
    if name not in KINDS:
        raise ValueError(f"there is no precision {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    kind = KINDS[name]
    options = make_options(name, kind.options, read_arguments(name, given))
    assert isinstance(options, CacheOptions)  # as every kind's are
    return Precision(kind, options)


def require_possible(
    precision: Precision, provider: str, where: object, *, shared: bool, version: str | None = None
) -> None:
    """Raises InputError where a provider cannot run what a precision makes, whatever the model.

    Args:
        precision: what is asked for; provider: where it runs; where: the model, for errors.
        shared: whether past and present are to be one buffer.
        version: of ONNX Runtime, the installed one if none.
    """
    if precision.cache is not None:
        if not shared:
            what = f"--precision {precision} keeps the cache in integers, which takes one buffer for past and present"
            raise InputError(what, where, "give --shared-buffer (in Python shared_buffer=True) too")
        dtype = precision.states or "float32"
        reason = why_not_stored(precision.cache, kernels_of(provider), version, dtype)
        if reason is not None:
            raise InputError(f"--precision {precision}: {reason}", where, f"leave cache={precision.options.cache} out")
    if precision.kind.name == "fp8" and named_provider(provider) == "CPUExecutionProvider":
        raise InputError(
            "--precision fp8 is for GPUs: ONNX Runtime's CPU provider loads no products of float8",
            where,
            "give --provider cuda, or take int8",
        )


def prepared(model: onnx_ir.Model, precision: Precision, where: object) -> tuple[str, ...]:
    """Bring a float32 model to the form that a precision starts from, in place; the names of its projections.

    Raises:
        InputError: when there is nothing to round.
    """
    weights = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    if not any(weight.dtype is onnx_ir.DataType.FLOAT for weight in weights):
        raise InputError(
            f"--precision {precision} starts from float32, and this model holds no weights in it",
            where,
            "give the original checkpoint or its float32 export",
        )
    if not precision.kind.projections:
        return ()
    names = plain_projections(model)
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model)
    if not names:
        raise InputError(
            "it has no projection (a product with a fixed weight), so there is nothing to quantise", where, "use fp16"
        )
    return names


def write_precise(
    source: Path,
    target: Path,
    precision: Precision,
    names: Collection[str],
    calibration: Iterable[Feed],
    provider: str,
    where: object,
    ranges: Mapping[str, np.ndarray] | None = None,
) -> int:
    """Write the model of a file in another precision; how many projections were rounded, or nodes narrowed.

    Args:
        source: a float32 model that was :func:`prepared`; target: where it goes.
        precision: what to make.
        names: the projections to round.
        calibration: inputs to take ranges from, where the precision needs them.
        provider: where it will run.
        where: the model, for errors.
        ranges: of what is cached, where that is kept in integers
            (:func:`attncompile.convert.cached_ranges.cached_ranges`).

    Raises:
        InputError: when the provider has no kernels for the precision; a NotStoredError when a cache cannot be kept in
            integers.
    """
    if precision.cache is None or ranges is None:
        return _write_rounded(source, target, precision, names, calibration, provider, where)
    with tempfile.TemporaryDirectory(prefix="attncompile-") as scratch:
        made, done = source, 0
        if precision.kind.budget is not None:
            made = Path(scratch) / target.name
            done = _write_rounded(source, made, precision, names, calibration, provider, where)
        model = onnx_ir.load(made)
        try:
            done = max(done, store_narrow(model, ranges, precision.cache))
        except ValueError as error:
            raise NotStoredError(f"--precision {precision}: {error}", where, _IN_FLOATS) from error
        _require_stored(model, precision, where)
        save(model, target)
    return done


_CODES = (onnx_ir.DataType.INT8, onnx_ir.DataType.UINT8)
_IN_FLOATS = "leave cache= of --precision out"


class NotStoredError(InputError):
    """Keys or values of a layer cannot be cached in integers."""


def _require_stored(model: onnx_ir.Model, precision: Precision, where: object) -> None:
    """Raises NotStoredError where a layer's keys or values are still cached in floats."""
    caches = [value for value in model.graph.inputs if (value.name or "").startswith(CACHED)]
    floats = [str(value.name) for value in caches if value.dtype not in _CODES]
    if floats:
        what = f"--precision {precision} left {floats[0]} in floats, {len(floats)} of {len(caches)} caches are"
        raise NotStoredError(f"{what} not read by GroupQueryAttention alone", where, _IN_FLOATS)


def _write_rounded(
    source: Path,
    target: Path,
    precision: Precision,
    names: Collection[str],
    calibration: Iterable[Feed],
    provider: str,
    where: object,
) -> int:
    """What :func:`write_precise` does to weights and states."""
    options: Any = precision.options
    with _quietly():
        if precision.states is not None and not precision.kind.projections:
            return _write_narrow(source, target, precision.states, provider, precision, where)
        if precision.kind.name == "int8":
            dynamic_int8(source, target, names, per_channel=options.per_channel)
        elif precision.kind.name == "int8-static":
            method, channels = options.calibration, options.per_channel
            static_rounding(source, target, names, calibration, kind="int8", method=method, per_channel=channels)
        elif precision.kind.name == "fp8":
            static_rounding(source, target, names, calibration, kind="float8_e4m3")
        else:
            bits: Literal[4, 8] = 4 if precision.kind.name == "int4" else 8
            with tempfile.TemporaryDirectory(prefix="attncompile-") as scratch:
                made = target if precision.states is None else Path(scratch) / target.name
                block_weights(source, made, names, bits=bits, block=options.block, symmetric=options.symmetric)
                if precision.states is not None:
                    _write_narrow(made, target, precision.states, provider, precision, where)
    return len(names)


def _write_narrow(
    source: Path, target: Path, narrow: Narrow, provider: str, precision: Precision, where: object
) -> int:
    model = onnx_ir.load(source)
    cached = any((value.name or "").startswith(CACHE) for value in model.graph.inputs)
    # the logits of 8192 positions over Llama's vocabulary are 4.2 GB in float32
    count = narrowed(model, narrow, keep=("logits",) if cached and kernels_of(provider) == "cuda" else ())
    if narrow == "bfloat16":  # float16 is cast where a kernel is missing
        names = session_providers(provider)
        missing = without_kernels(model, narrow, names)
        if missing:
            raise InputError(
                f"--precision {precision}: {names[0]} has no bfloat16 kernel for {', '.join(missing)}",
                where,
                "use fp16 in its place, or another --provider",
            )
    save(model, target)
    return count


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what quantisers print and log."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)


__all__ = [
    "KINDS",
    "Kind",
    "NotStoredError",
    "Precision",
    "parse_precision",
    "prepared",
    "require_possible",
    "write_precise",
]
