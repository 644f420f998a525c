"""Who else multiplies queries, keys and values in 8 bits: cuDNN's FP8 attention, and SageAttention 1.

``nvidia-cudnn-frontend`` and ``sageattention`` 1.0.6 are only needed for these measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LARGEST = 448.0
"""The largest number of float8 e4m3."""

Run = Callable[[], torch.Tensor]


class CudnnFp8:
    """cuDNN's attention in float8 e4m3, on codes that are made beforehand.

    Each tensor has one scale. With ``fitted`` scales the largest element becomes 448, that of the result is told in
    advance, and weights are multiplied by 256 before they are rounded; otherwise all scales are 1.

    Attributes:
        output: the result in e4m3, ``[b,h,i,e]``.
        descale: what its codes are multiplied by.

    Raises:
        ImportError: when ``nvidia-cudnn-frontend`` is not installed.
    """

    def __init__(self, tensors: list[torch.Tensor], scale: float, causal: bool, largest: float, fitted: bool) -> None:
        import cudnn

        self._cudnn = cudnn
        self._handle = cudnn.create_handle()
        self._stream()
        self.descale = largest / LARGEST if fitted else 1.0
        sizes = [float(tensor.abs().max()) / LARGEST if fitted else 1.0 for tensor in tensors]
        codes = [
            (tensor.float() / size).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).contiguous()
            for tensor, size in zip(tensors, sizes, strict=True)
        ]
        weight = 256.0 if fitted else 1.0
        factors = [*sizes, 1 / weight, weight, 1 / self.descale]
        given = [torch.full((1, 1, 1, 1), factor, device="cuda") for factor in factors]
        self.output = torch.empty_like(codes[0])
        found = [torch.zeros(1, 1, 1, 1, device="cuda") for _ in range(2)]
        graph = cudnn.pygraph(
            io_data_type=cudnn.data_type.FP8_E4M3,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=self._handle,
        )

        def named(tensor: torch.Tensor, dtype: Any) -> Any:
            return graph.tensor(dim=list(tensor.shape), stride=list(tensor.stride()), data_type=dtype)

        operands = [named(tensor, cudnn.data_type.FP8_E4M3) for tensor in codes]
        scalars = [named(tensor, cudnn.data_type.FLOAT) for tensor in given]
        roles = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
        out, _, *largest_found = graph.sdpa_fp8(
            **dict(zip("qkv", operands, strict=True)),
            **dict(zip(roles, scalars, strict=True)),
            is_inference=True,
            attn_scale=scale,
            use_causal_mask=causal,
        )
        shape, stride = list(self.output.shape), list(self.output.stride())
        out.set_output(True).set_dim(shape).set_stride(stride).set_data_type(cudnn.data_type.FP8_E4M3)
        for tensor in largest_found:
            tensor.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(cudnn.data_type.FLOAT)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        self._graph = graph
        self._pack = dict(zip([*operands, *scalars, out, *largest_found], [*codes, *given, self.output, *found],
                              strict=True))  # fmt: skip
        self._space = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device="cuda")

    def _stream(self) -> None:
        self._cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream().cuda_stream)

    def __call__(self) -> torch.Tensor:
        self._stream()
        self._graph.execute(self._pack, self._space, handle=self._handle)
        return self.output

    def result(self) -> torch.Tensor:
        """The result in float32."""
        return self().float() * self.descale


def sage(tensors: list[torch.Tensor], scale: float, causal: bool) -> Run:
    """SageAttention 1: INT8 for scores, float16 for values, its rounding included.

    Raises:
        ImportError: when ``sageattention`` is not installed.
    """
    from sageattention import sageattn

    query, key, value = (tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors)
    return lambda: sageattn(query, key, value, is_causal=causal, sm_scale=scale)


def sage_alone(tensors: list[torch.Tensor], scale: float, causal: bool) -> Run:
    """The same on operands that are rounded beforehand.

    Raises:
        ImportError: when ``sageattention`` is not installed.
    """
    from sageattention import core

    query, key, value = (tensor.contiguous() for tensor in tensors)
    key = key - key.mean(dim=2, keepdim=True)
    codes = core.per_block_int8(query, key, sm_scale=scale)
    value = value.to(torch.float16)
    attend = core.attn_true if causal else core.attn_false
    return lambda: attend(codes[0], codes[2], value, codes[1], codes[3], output_dtype=query.dtype)


__all__ = ["CudnnFp8", "sage", "sage_alone"]
