"""Vectors of length one, as the delta rule wants its keys."""

import torch
from jaxtyping import Float
from torch import Tensor


def unit_length(x: Float[Tensor, "*any D"]) -> Float[Tensor, "*any D"]:
    """Vectors divided by their length, sqrt(sum of squares + 1e-6); float32 or wider inside and out."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
