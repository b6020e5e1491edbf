"""Gated activations, `act(gate) * up`, also with the result quantised.

SiLU is `x * sigmoid(x)`, GELU `x * Phi(x)` (Hendrycks and Gimpel, arXiv:1606.08415) or its
approximation by tanh; as gates they are those of Shazeer, "GLU Variants Improve Transformer"
(arXiv:2002.05202).

In all ops here `gate` and `up` are `[..., H]`, of any one floating dtype up to float32 and any
strides (such as the halves of one tensor). The product is computed in float32 and rounded once, to
that dtype. Results are contiguous, of the same shape; there may be no rows. What is quantised is
the rounded product: the same numbers as those of the activation followed by an op of
`kernels/quant.py`, which says what quantised tensors are. Nothing is mutated.
"""

from __future__ import annotations

import torch
from torch.nn.functional import gelu, silu

from vllmc.kernels.library import define_op
from vllmc.kernels.quant import (
    dynamic_scaled_quant,
    fake_dense,
    fake_dynamic,
    fake_static,
    static_scaled_quant,
)


def silu_and_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`."""
    wide = gate.to(torch.float32)
    return silu(wide, inplace=wide is not gate).mul_(up).to(gate.dtype).contiguous()


def gelu_and_mul(gate: torch.Tensor, up: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """`gelu(gate) * up`, where `approximate` is "none" or "tanh"."""
    activated = gelu(gate.to(torch.float32), approximate=approximate)
    return activated.mul_(up).to(gate.dtype).contiguous()


def silu_and_mul_static_quant(
    gate: torch.Tensor, up: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`silu_and_mul`, as `dtype` by the given scale. Raises `VllmcError` (`bad-quant-dtype`)."""
    return static_scaled_quant(silu_and_mul(gate, up), scale, dtype)


def silu_and_mul_dynamic_quant(
    gate: torch.Tensor, up: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`silu_and_mul` as `dtype`, and the scale. Raises `VllmcError` (`bad-quant-dtype`)."""
    return dynamic_scaled_quant(silu_and_mul(gate, up), dtype)


def gelu_and_mul_static_quant(
    gate: torch.Tensor,
    up: torch.Tensor,
    approximate: str,
    scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`gelu_and_mul`, as `dtype` by the given scale. Raises `VllmcError` (`bad-quant-dtype`)."""
    return static_scaled_quant(gelu_and_mul(gate, up, approximate), scale, dtype)


def gelu_and_mul_dynamic_quant(
    gate: torch.Tensor, up: torch.Tensor, approximate: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gelu_and_mul` as `dtype`, and the scale. Raises `VllmcError` (`bad-quant-dtype`)."""
    return dynamic_scaled_quant(gelu_and_mul(gate, up, approximate), dtype)


define_op(
    "silu_and_mul(Tensor gate, Tensor up) -> Tensor",
    cpu=silu_and_mul,
    fake=fake_dense,
    cuda="vllmc.kernels.triton.activation:silu_and_mul",
)
define_op(
    'gelu_and_mul(Tensor gate, Tensor up, str approximate="none") -> Tensor',
    cpu=gelu_and_mul,
    fake=fake_dense,
    cuda="vllmc.kernels.triton.activation:gelu_and_mul",
)
define_op(
    "silu_and_mul_static_quant(Tensor gate, Tensor up, Tensor scale, ScalarType dtype) -> Tensor",
    cpu=silu_and_mul_static_quant,
    fake=fake_static,
    cuda="vllmc.kernels.triton.activation:silu_and_mul_static_quant",
)
define_op(
    "silu_and_mul_dynamic_quant(Tensor gate, Tensor up, ScalarType dtype) -> (Tensor, Tensor)",
    cpu=silu_and_mul_dynamic_quant,
    fake=fake_dynamic,
    cuda="vllmc.kernels.triton.activation:silu_and_mul_dynamic_quant",
)
define_op(
    "gelu_and_mul_static_quant(Tensor gate, Tensor up, str approximate, Tensor scale, "
    "ScalarType dtype) -> Tensor",
    cpu=gelu_and_mul_static_quant,
    fake=fake_static,
    cuda="vllmc.kernels.triton.activation:gelu_and_mul_static_quant",
)
define_op(
    "gelu_and_mul_dynamic_quant(Tensor gate, Tensor up, str approximate, ScalarType dtype) "
    "-> (Tensor, Tensor)",
    cpu=gelu_and_mul_dynamic_quant,
    fake=fake_dynamic,
    cuda="vllmc.kernels.triton.activation:gelu_and_mul_dynamic_quant",
)
