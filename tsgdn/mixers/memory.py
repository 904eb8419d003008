"""What the mixers with a key-value memory share: the state, its size, and how long the memory lasts at first."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tsgdn.mixers.layers import scale_output

DECAY_INITS = ("paper", "shared", "horizon", "horizon_a")


class MemoryState(NamedTuple):
    """What is carried per row.

    Attributes:
        memory: key-value memory of each value head.
        conv: the last inputs of the short convolution, oldest first.
    """

    memory: Float[Tensor, "R H Dk Dv"]
    conv: Float[Tensor, "R W_minus_1 C"]


class MemoryMixer(nn.Module):
    """A mixer whose state is a `MemoryState`; subclasses set what is declared here and offer `forward`."""

    value_heads: int
    key_dim: int
    value_dim: int
    channels: int
    conv_weight: nn.Parameter
    rate_log: nn.Parameter
    output: nn.Linear

    def scale_output(self, depth: int) -> None:
        """Divides the output projection by sqrt(2·depth)."""
        scale_output(self.output, depth)

    @property
    def rate(self) -> Float[Tensor, " H"] | Float[Tensor, "H Dk"]:
        """Log decay per patch of silence, at most 0; starts at the initial log decay per token of the same shape."""
        return -self.rate_log.exp()

    def initial_state(self, rows: int, device: torch.device | str | None = None) -> MemoryState:
        """Nothing seen yet: zeros."""
        weight = self.conv_weight
        options = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": device or weight.device}
        return MemoryState(
            torch.zeros(rows, self.value_heads, self.key_dim, self.value_dim, **options),
            torch.zeros(rows, weight.shape[1] - 1, self.channels, **options),
        )

    def state_bytes(self, tokens: int = 0) -> int:
        """Bytes of a row's state in float32, the same after any number of tokens."""
        memory = self.value_heads * self.key_dim * self.value_dim
        return 4 * (memory + (self.conv_weight.shape[1] - 1) * self.channels)


def draw_decay(
    heads: int,
    generator: torch.Generator,
    init: str,
    horizon: Sequence[int | float],
    *,
    lowest: float = 1.0,
    dt_writes: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Initial A_log, dt_bias and log of the rate of silence, per head; the decay starts at exp(-A·dt) per token.

    Each of A, dt and the horizon is a function of its own uniform draws, which come first from `generator`: mixers
    with one seed and one number of heads share them, whatever `init` is.

    Args:
        heads: decays to draw.
        generator: see `layers.draws`.
        init: "paper" A ~ U(lowest, 16), dt log-uniform in [1e-3, 1e-1]; "shared" the same with A ~ U(1, 16) for every
            mixer; "horizon" tau log-uniform in `horizon` tokens and A·dt = 1 / tau, through dt with A ~ U(1, 16) where
            dt is no write strength (a long horizon can then still be cut short by the input), else through A;
            "horizon_a" always through A.
        horizon: shortest and longest tau.
        lowest: of A in the paper's initialisation.
        dt_writes: dt is also the strength of the write (Mamba-2).
    """
    of_a, of_dt, of_tau = _uniforms(heads, generator, init, horizon)
    low = lowest if init == "paper" else 1.0
    a, dt = (low + (16 - low) * of_a).clamp_min(1e-4), _between((1e-3, 1e-1), of_dt)
    if init.startswith("horizon"):
        tau = _between(horizon, of_tau)
        if init == "horizon_a" or dt_writes:
            a = 1 / (tau * dt)
        else:
            dt = 1 / (tau * a)
    return _parameters(a, dt)


def draw_channel_decay(
    heads: int,
    key_dim: int,
    generator: torch.Generator,
    init: str,
    horizon: Sequence[int | float],
) -> tuple[Float[Tensor, " H"], Float[Tensor, "H Dk"], Float[Tensor, "H Dk"]]:
    """Initial A_log per head, dt_bias and log of the rate of silence per key channel.

    From the same uniform draws as `draw_decay`, and no others: channel c of a head has its u moved on by c / key_dim,
    round the end of the range to its beginning. So every channel's dt or horizon is log-uniform, those of one head lie
    evenly over the whole range whatever was drawn, and channel 0 decays as the same head of the other mixers.

    Args:
        heads: each with its own A.
        key_dim: channels per head.
        generator: see `layers.draws`.
        init: "paper" and "shared" A ~ U(1, 16), dt log-uniform in [1e-3, 1e-1]; "horizon" tau log-uniform in `horizon`
            tokens, the same A and dt = 1 / (A tau); "horizon_a" that tau with the A that `draw_decay` gives the head.
        horizon: shortest and longest tau.

    Raises:
        ValueError: another `init`, or a horizon that is no range.
    """
    of_a, of_dt, of_tau = _uniforms(heads, generator, init, horizon)
    moved = torch.arange(key_dim, dtype=torch.float64, device="cpu") / key_dim
    a, dt = 1 + 15 * of_a, _between((1e-3, 1e-1), (of_dt[:, None] + moved) % 1)
    if init.startswith("horizon"):
        tau = _between(horizon, (of_tau[:, None] + moved) % 1)
        if init == "horizon_a":
            a = 1 / (tau[:, 0] * dt[:, 0])
        dt = 1 / (tau * a[:, None])
    return _parameters(a, dt)


def _uniforms(heads: int, generator: torch.Generator, init: str, horizon: Sequence[int | float]) -> Tensor:
    if init not in DECAY_INITS:
        raise ValueError(f"decay_init is {init!r}; expected one of {', '.join(DECAY_INITS)}")
    if len(horizon) != 2 or not 0 < horizon[0] <= horizon[1]:
        raise ValueError(f"horizon is {tuple(horizon)}; expected (shortest, longest) in tokens, both above 0")
    return torch.rand(3, heads, generator=generator, dtype=torch.float64, device="cpu")


def _between(ends: Sequence[int | float], uniform: Tensor) -> Tensor:
    return torch.exp(math.log(ends[0]) + math.log(ends[1] / ends[0]) * uniform)


def _parameters(a: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wanted = torch.get_default_dtype()
    dt_bias = dt + torch.log(-torch.expm1(-dt))  # softplus of it is dt
    rate_log = (a if dt.dim() == a.dim() else a[:, None]) * dt
    return a.log().to(wanted), dt_bias.to(wanted), rate_log.log().to(wanted)
