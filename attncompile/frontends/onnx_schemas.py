"""Operators that ONNX Runtime has in the standard's own domain, and the standard has not.

Its optimiser, and the model builder of onnxruntime-genai, write norms by the root mean square as
``SimplifiedLayerNormalization`` without a domain. ONNX's check calls such a file no valid model; it runs all the same.
"""

from __future__ import annotations

import onnx
from onnx.defs import OpSchema

RMS_NORM = "SimplifiedLayerNormalization"
_FLOATS = ["tensor(float16)", "tensor(float)", "tensor(double)", "tensor(bfloat16)"]


def register() -> None:
    """Tell ONNX of them, once in a process, as ONNX Runtime states them (core/graph/contrib_ops/contrib_defs.cc)."""
    if onnx.defs.has(RMS_NORM):
        return
    parameter, optional = OpSchema.FormalParameter, OpSchema.FormalParameterOption.Optional
    settings = {"axis": OpSchema.AttrType.INT, "epsilon": OpSchema.AttrType.FLOAT, "stash_type": OpSchema.AttrType.INT}
    onnx.defs.register_schema(
        OpSchema(
            RMS_NORM, "", 1,
            inputs=[parameter("X", "T"), parameter("scale", "V")],
            outputs=[parameter("Y", "V"), parameter("inv_std_var", "U", param_option=optional)],
            type_constraints=[(name, _FLOATS, "floats") for name in ("T", "V", "U")],
            attributes=[OpSchema.Attribute(name, kind, required=False) for name, kind in settings.items()],
        )
    )  # fmt: skip


__all__ = ["RMS_NORM", "register"]
