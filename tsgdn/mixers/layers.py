"""What the mixers are made of: norms, the gated MLP, and draws that do not depend on the mixer.

Every part takes its initial values from one generator that `draws()` seeds with a single number of torch's global one.
So two models that differ in the mixer alone start from the same global sequence, layer by layer, and mixers that draw
their horizons first get the same horizons: a comparison at one seed compares the mixers.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def draws() -> torch.Generator:
    """A generator for the initial values of one part; takes exactly one number from torch's global generator."""
    return torch.Generator("cpu").manual_seed(int(torch.randint(2**62, (), device="cpu")))


def linear(inputs: int, outputs: int, generator: torch.Generator, *, width: int) -> nn.Linear:
    """A linear map without bias, drawn from N(0, 0.02·sqrt(1024 / width))."""
    layer = nn.Linear(inputs, outputs, bias=False, device="meta").to_empty(device="cpu")  # draws nothing
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, inputs, generator=generator, device="cpu"))
        layer.weight.mul_(0.02 * math.sqrt(1024 / width))
    return layer


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> nn.Parameter:
    """A parameter drawn from U(-bound, bound)."""
    return nn.Parameter((2 * torch.rand(shape, generator=generator, device="cpu") - 1) * bound)


def undecayed(values: Tensor) -> nn.Parameter:
    """A parameter that weight decay must leave alone; optimisers group by its attribute `no_weight_decay`."""
    parameter = nn.Parameter(values)
    parameter.no_weight_decay = True  # pyright: ignore[reportAttributeAccessIssue]
    return parameter


class RMSNorm(nn.Module):
    """Division by the root mean square over the last dimension, then a learned gain; float32 or wider inside."""

    def __init__(self, width: int, *, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        if width % groups:
            raise ValueError(f"RMSNorm: width {width} is not a multiple of groups {groups}")
        self.weight = undecayed(torch.ones(width))
        self.groups, self.eps = groups, eps

    def forward(self, x: Float[Tensor, "*any D"]) -> Float[Tensor, "*any D"]:
        """The normalised vectors, in the dtype of `x`; each of `groups` equal parts is normalised on its own."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.groups > 1:
            wide = wide.unflatten(-1, (self.groups, -1))
        wide = wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        if self.groups > 1:
            wide = wide.flatten(-2)
        return (wide * self.weight).to(x.dtype)


class SwiGLU(nn.Module):
    """The gated MLP: down(SiLU(gate(x)) · up(x)); gate and up are one product."""

    def __init__(self, width: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        generator = draws()
        self.up = linear(width, 2 * hidden, generator, width=width)
        self.down = linear(hidden, width, generator, width=width)
        self.dropout = dropout

    def scale_output(self, depth: int) -> None:
        """Divides the last weights by sqrt(2·depth), so that `depth` residual blocks start at the size of one."""
        scale_output(self.down, depth)

    def forward(self, x: Float[Tensor, "*any D"]) -> Float[Tensor, "*any D"]:
        """Acts on each token alone."""
        gate, up = self.up(x).chunk(2, dim=-1)
        hidden = F.silu(gate) * up
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout, self.training)
        return self.down(hidden)


def scale_output(layer: nn.Linear, depth: int) -> None:
    """Divides the weights of an output projection by sqrt(2·depth): two residual branches per block."""
    with torch.no_grad():
        layer.weight.div_(math.sqrt(2 * depth))
