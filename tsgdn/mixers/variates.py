"""Mixes the variates of a series among the tokens of one time index; carries nothing along time."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tsgdn.mixers.layers import draws, linear, scale_output, uniform


class VariateMixer(nn.Module):
    """Attention without positions among the variates: permuting them permutes the outputs.

    It has no state, since a token sees only tokens of its own time index; so cutting the stream changes nothing.
    Beyond `full_up_to` variates the keys and values are pooled by learned queries into `latents` of each, which the
    variates then attend to: cost and memory grow with V, not with V².

    Args:
        width: of the tokens.
        heads: of the attention; divides `width`.
        latents: pooled keys and values per head.
        full_up_to: largest V that is attended in full.
    """

    def __init__(self, width: int, *, heads: int = 2, latents: int = 16, full_up_to: int = 32) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"variate mixer: width {width} is not a multiple of heads {heads}")
        self.heads, self.full_up_to = heads, full_up_to
        generator = draws()
        self.project = linear(width, 3 * width, generator, width=width)
        self.output = linear(width, width, generator, width=width)
        self.latents = uniform((heads, latents, width // heads), 1.0, generator)

    def scale_output(self, depth: int) -> None:
        """Divides the output projection by sqrt(2·depth)."""
        scale_output(self.output, depth)

    def forward(
        self, x: Float[Tensor, "B V N D"], *, present: Bool[Tensor, "B V N"] | None = None
    ) -> Float[Tensor, "B V N D"]:
        """What is to be added to each token; zeros where there is one variate alone, or none present.

        Args:
            x: tokens.
            present: False where a variate's token must not be read by the others (nor by itself).
        """
        B, V, N, D = x.shape
        if V == 1 or x.numel() == 0:
            return torch.zeros_like(x)
        # (B, V, N, 3 D) -> 3 x (B N, heads, V, D / heads)
        joint = self.project(x).view(B, V, N, 3, self.heads, D // self.heads)
        query, key, value = joint.permute(3, 0, 2, 4, 1, 5).reshape(3, B * N, self.heads, V, D // self.heads)
        mask, anyone = None, None
        if present is not None:
            seen = present.permute(0, 2, 1).reshape(B * N, 1, 1, V)
            anyone = seen.any(-1, keepdim=True)
            mask = seen | ~anyone  # a row without any key would be 0 / 0
        if self.full_up_to < V:
            latents = self.latents.to(query.dtype).expand(B * N, -1, -1, -1)
            pooled = F.scaled_dot_product_attention(latents, key, torch.cat([key, value], dim=-1), attn_mask=mask)
            key, value = pooled.chunk(2, dim=-1)
            mask = None
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        if anyone is not None:
            read = read * anyone
        read = read.reshape(B, N, self.heads, V, D // self.heads).permute(0, 3, 1, 2, 4).reshape(B, V, N, D)
        return self.output(read)
