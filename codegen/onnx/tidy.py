"""The exact rewrites of an exported graph that are worth it, in order: what surrounds attention."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxruntime.capi.onnxruntime_pybind11_state as runtime
from onnxscript import version_converter

from attncompile.codegen.onnx.cached import hand_over
from attncompile.codegen.onnx.capabilities import Provider
from attncompile.codegen.onnx.layouts import drop_double_turns
from attncompile.codegen.onnx.normalisation import OPSET, fuse_root_mean_square
from attncompile.codegen.onnx.packing import Begins, pack
from attncompile.codegen.onnx.residuals import sum_residuals
from attncompile.codegen.onnx.rotary import fuse_rotary
from attncompile.codegen.onnx.skips import fuse_skips
from attncompile.codegen.onnx.tried import newest_opset


@dataclass(frozen=True)
class Tidied:
    """What was rewritten around the attention sites, for the report.

    Attributes:
        normalisations: spelled-out root-mean-square normalisations that became one operator.
        rotary: spelled-out rotary maps that became one operator.
        residuals: residual sums kept apart from the LayerNormalization behind them.
        turns: pairs of head transposes that cancelled.
        packed: projections that became one product for each attention.
        skips: sums that the normalisation behind them computes.
    """

    normalisations: int
    rotary: int
    residuals: int
    turns: int
    packed: int = 0
    skips: int = 0

    def __str__(self) -> str:
        told = (
            f"{self.normalisations} RMS normalisations and {self.rotary} rotary maps became operators, "
            f"{self.residuals} residual sums rewritten, {self.turns} double transposes removed"
        )
        told += f", {self.packed} projections packed by three" if self.packed else ""
        return told + (f", {self.skips} sums joined with their normalisation" if self.skips else "")


def wanted_opset(version: str | None = None, provider: Provider = "cpu") -> int:
    """The lowest standard opset to write for a version of ONNX Runtime (the installed one): the first that has all
    operators that are used, or where that version does not run it the first that plain operators need.
    """
    return OPSET if newest_opset(version, provider) >= OPSET else PLAIN


PLAIN = 18
"""The opset that the plain operators are written in."""


def suited_opset(model: ir.Model, version: str | None = None, provider: Provider = "cpu") -> int:
    """The opset to bring a model to: :func:`wanted_opset`, but no further than its operators have kernels and its codes
    a type that ONNX Runtime keeps.
    """
    wanted = wanted_opset(version, provider)
    short = without_kernel(model, wanted) or loses_types(model)
    return min(wanted, max(PLAIN, model.opset_imports.get("", 0))) if short else wanted


def loses_types(model: ir.Model) -> bool:
    """Whether a model rounds to INT8 below opset 21, which the installed ONNX Runtime fails to load from there on: its
    optimiser states the type of pairs that it adds, makes the codes UINT8, and leaves the type (1.31).
    """
    pairs = (node for node in model.graph.all_nodes() if node.op_type in ("QuantizeLinear", "DequantizeLinear"))
    zeros = (node.inputs[2] for node in pairs if len(node.inputs) > 2 and not _is_stored(node.inputs[0]))
    signed = any(zero is not None and zero.dtype == ir.DataType.INT8 for zero in zeros)
    return signed and model.opset_imports.get("", 0) < TYPED_OPSET and _loses_types()


TYPED_OPSET = 21
"""The opset from which on ``QuantizeLinear`` may state the type that it gives."""
_MOVED_CODES = """<ir_version: 9, opset_import: ["" : 21]>
    g (float[2,3] x) => (float[3,2] y) <float scale = {0.1}, int8 zero = {3}> {
        c = QuantizeLinear(x, scale, zero)  d = DequantizeLinear(c, scale, zero)  t = Transpose(d)  y = Neg(t) }"""


@functools.cache
def _loses_types() -> bool:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    written = onnx.parser.parse_model(_MOVED_CODES).SerializeToString()
    try:
        onnxruntime.InferenceSession(written, options, providers=["CPUExecutionProvider"])
    except Exception:  # its errors have no base of their own
        return True
    return False


def _is_stored(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


def without_kernel(model: ir.Model, opset: int) -> list[str]:
    """Standard operators of a model that the installed ONNX Runtime's CPU runs in the model's own opset, and has no
    kernel for in this one (1.31: ``RoiAlign`` and what draws random numbers, from opset 22 on).
    """
    before = model.opset_imports.get("", 0)
    names = {node.op_type for node in model.graph.all_nodes() if node.domain in ("", "ai.onnx")}
    return sorted(name for name in names if _has_kernel(name, before) and not _has_kernel(name, opset))


def _has_kernel(operator: str, opset: int) -> bool:
    """A kernel runs the version that it was registered for, and others only where its range has an end."""
    try:
        since = onnx.defs.get_schema(operator, opset, "").since_version
    except onnx.defs.SchemaError:
        return False
    return any(low == since or low <= since <= high < _ENDLESS for low, high in _kernels().get(operator, ()))


_ENDLESS = 2**31 - 1


@functools.cache
def _kernels() -> Mapping[str, list[tuple[int, int]]]:
    """Versions of the standard operators that have a kernel on the CPU, by name."""
    found: dict[str, list[tuple[int, int]]] = {}
    for kernel in runtime.get_all_opkernel_def():
        if kernel.provider == "CPUExecutionProvider" and kernel.domain == "":
            low, high = kernel.version_range
            found.setdefault(kernel.op_name, []).append((low, high))
    return found


def raise_opset(model: ir.Model, opset: int = OPSET) -> bool:
    """Bring the model to at least this standard opset; whether it is there now.

    From opset 18 on onnxscript converts, below it ONNX itself (onnxscript would raise the number and leave the
    nodes as they are). A converter that cannot convert some node leaves the model at its old opset; then the
    operators that need the newer one are not used.
    """
    if model.opset_imports.get("", 0) >= opset:
        return True
    said, version_converter.logger.disabled = version_converter.logger.disabled, True  # we say what came of it
    try:
        version_converter.convert_version(model, opset, fallback=True)
    finally:
        version_converter.logger.disabled = said
    return model.opset_imports.get("", 0) >= opset


def tidy(
    model: ir.Model,
    provider: Provider = "cpu",
    version: str | None = None,
    longest: int | None = None,
    dtype: str | None = None,
    begins: Begins | None = None,
) -> Tidied:
    """Rewrite the model in place, after its attention sites have been replaced; exact up to rounding.

    Args:
        model: the model; provider: where it will run; version: of ONNX Runtime, the installed one where it is left out.
        longest: positions that the model has at most, where it says so.
        dtype: what its states are rounded to afterwards; float32 where it is left out.
        begins: what is known of the first positions of calls.

    Projections of query, key and value become one where the attention takes them side by side. A split behind
    them is not written: on ONNX Runtime's CPU its copies cost more than the larger product saves (0.75 to 1.02x).
    """
    hand_over(model)
    passes.RemoveUnusedNodesPass()(model)
    normalisations = fuse_root_mean_square(model, provider, version)
    rotary = fuse_rotary(model, provider, version)
    passes.RemoveUnusedNodesPass()(model)
    # the slow kernel that this avoids is the CPU's
    residuals = sum_residuals(model) if provider == "cpu" else 0
    # a launch fewer is worth nothing on a CPU
    skips = fuse_skips(model, provider, version, dtype or "float32") if provider == "cuda" else 0
    turns = drop_double_turns(model)
    passes.RemoveUnusedNodesPass()(model)
    packed = pack(model, provider, version, longest, dtype or "float32", begins)
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    for node in model.graph.all_nodes():  # that pass does not look into bodies
        model.opset_imports.setdefault(node.domain, 1)
    return Tidied(normalisations, rotary, residuals, turns, packed.projections, skips)
