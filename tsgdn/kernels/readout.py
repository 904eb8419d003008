"""The gated RMSNorm between a layer's memory and its output projection."""

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tsgdn.kernels.choice import kernel_for
from tsgdn.kernels.replicas import rowwise


def readout(
    o: Float[Tensor, "R N H Dv"],
    gate: Float[Tensor, "R N H Dv"],
    weight: Float[Tensor, " Dv"],
    *,
    eps: float = 1e-5,
    activation: Literal["silu", "sigmoid"] = "silu",
    norm_first: bool = True,
) -> Float[Tensor, "R N H Dv"]:
    """RMSNorm(o) · act(gate), or RMSNorm(o · act(gate)), normalised over Dv; float32 or wider inside.

        RMSNorm(x) = weight · x / sqrt(mean(x²) + eps)

    Source: Gated Delta Networks, arXiv 2412.06464 (norm first); Mamba-2, arXiv 2405.21060 (gate first).

    Args:
        o: what was read from the memory.
        gate: before its activation.
        weight: gain of the norm, shared by the heads.
        eps: added to the mean square.
        activation: of the gate.
        norm_first: False gates before the norm.

    Returns:
        The result in `o`'s number format.

    Raises:
        ValueError: another activation; with Triton also Dv above 512 and float64.
        RuntimeError: `TSGDN_KERNEL=triton` without Triton.
    """
    if activation not in ("silu", "sigmoid"):
        raise ValueError(f"activation is {activation!r}; expected silu or sigmoid")
    wide = torch.promote_types(o.dtype, torch.float32)
    if o.numel() and kernel_for(o.device, wide) == "triton":
        from tsgdn.kernels.readout_fused import fused_readout

        return rowwise(
            partial(fused_readout, eps=eps, sigmoid=activation == "sigmoid", norm_first=norm_first),
            (o, gate),
            (weight,),
        )

    opened = F.silu(gate) if activation == "silu" else torch.sigmoid(gate)
    x = (o if norm_first else o * opened).to(wide)
    x = (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(o.dtype)
    return (x * opened).to(o.dtype) if norm_first else x
