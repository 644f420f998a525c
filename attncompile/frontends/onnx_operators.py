"""Operators of ONNX whose reference implementation is not good enough for a proof in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_attention import Attention_1 as ReferenceAttention


class Erf(OpRun):
    """``Erf`` in the dtype of its input; ONNX's reference rounds it to float32."""

    op_domain = ""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        return (torch.erf(torch.from_numpy(np.ascontiguousarray(x))).numpy(),)


class GatherElements(OpRun):
    """``GatherElements``; ONNX's reference fails where an axis is longer than 64."""

    op_domain = ""

    def _run(self, data: np.ndarray, indices: np.ndarray, axis: int | None = None) -> tuple[np.ndarray]:
        return (np.take_along_axis(data, indices, axis or 0),)


class Attention(ReferenceAttention):
    """``Attention`` with its scale as a Python float; ONNX's reference takes the root of it in float32."""

    def _run(self, *inputs: Any, **attributes: Any) -> Any:
        scale = attributes.pop("scale", None)
        return super()._run(*inputs, **{**attributes, "scale": scale and float(scale)})


class LinearAttention(OpRun):
    """``LinearAttention`` in the dtype of its input, one step after the other; ONNX's reference rounds to float32."""

    op_domain = ""

    def _run(
        self,
        query: np.ndarray,
        key: np.ndarray,
        value: np.ndarray,
        past_state: np.ndarray | None = None,
        decay: np.ndarray | None = None,
        beta: np.ndarray | None = None,
        chunk_size: int | None = None,
        kv_num_heads: int = 1,
        q_num_heads: int = 1,
        scale: float | None = None,
        update_rule: str | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        rows, steps, _ = query.shape
        q = query.reshape(rows, steps, q_num_heads, -1)
        k, v = (x.reshape(rows, steps, kv_num_heads, -1) for x in (key, value))
        state = np.zeros((rows, kv_num_heads, k.shape[3], v.shape[3]), query.dtype)
        state = state if past_state is None else past_state.astype(query.dtype)
        made = []
        for step in range(steps):
            if decay is not None:
                state = state * np.exp(decay[:, step].reshape(rows, kv_num_heads, -1, 1))
            row = v[:, step]
            if beta is not None:
                row = beta[:, step, :, None] * (row - np.einsum("bgde,bgd->bge", state, k[:, step]))
            state = state + k[:, step, :, :, None] * row[:, :, None]
            read = np.repeat(state, q_num_heads // kv_num_heads, axis=1)
            made.append(np.einsum("bhd,bhde->bhe", q[:, step], read) * (float(scale or 0.0) or q.shape[3] ** -0.5))
        return np.stack(made, 1).reshape(rows, steps, -1), state


class Softmax(OpRun):
    """``Softmax`` before opset 13: over all axes from one on; ONNX's reference knows the later form only."""

    op_domain = ""

    def _run(self, x: np.ndarray, axis: int | None = None) -> tuple[np.ndarray]:
        first = 1 if axis is None else axis % max(x.ndim, 1)
        flat = torch.from_numpy(np.ascontiguousarray(x)).reshape(math.prod(x.shape[:first]), -1)
        return (torch.softmax(flat, dim=1).reshape(x.shape).numpy(),)


def better_operators(opset: int) -> list[type[OpRun]]:
    """Operators whose reference implementation is not good enough."""
    return [
        *(Erf, GatherElements, LinearAttention),
        *([Attention] if opset >= 23 else []),
        *([Softmax] if opset < 13 else []),
    ]
