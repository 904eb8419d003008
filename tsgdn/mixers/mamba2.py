"""Mamba-2 as a mixer: the baseline without a delta rule, whose dt is both the decay and the strength of the write.

    [z, x, B, C] = W x;  x, B, C through SiLU(conv + bias);  dt = softplus(Wdt x + dt_bias);  A = -exp(A_log)
    h <- exp(dt A + gap · rate) h + dt B x^T;   o = h^T C + D x;   y = Wo RMSNorm(o · SiLU(z))

Key and value sizes are named as in the other mixers: key_dim is the paper's state size N, value_dim its head size P.
Source: arXiv 2405.21060; gaps, skipped writes and the horizon initialisation are ours.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Real, Shaped
from torch import Tensor

from tsgdn.kernels import causal_conv, silence, ssd, within
from tsgdn.mixers.layers import RMSNorm, draws, linear, undecayed, uniform
from tsgdn.mixers.memory import MemoryMixer, MemoryState, draw_decay
from tsgdn.mixers.registry import register


@register("mamba2_heads", groups=None)
@register("mamba2", groups=1)
class Mamba2(MemoryMixer):
    """Mixes tokens along time through decaying sums of key-value products.

    Args:
        width: of the tokens.
        heads: each with a decay of its own.
        key_dim: rows of a head's memory.
        value_dim: columns of a head's memory; None = key_dim.
        groups: sets of keys and queries. 1 = one for all heads, as published; `heads` = one each, which makes the
            state as large as Gated DeltaNet's. None = heads.
        conv: width of the short causal convolution on x, B and C.
        decay_init: see `memory.draw_decay`.
        horizon: shortest and longest initial memory in tokens, for the horizon initialisations.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int = 2,
        key_dim: int = 32,
        value_dim: int | None = None,
        groups: int | None = 1,
        conv: int = 4,
        decay_init: str = "horizon",
        horizon: Sequence[int | float] = (4.0, 1024.0),
    ) -> None:
        super().__init__()
        value_dim, groups = value_dim or key_dim, groups or heads
        if heads % groups:
            raise ValueError(f"heads {heads} is not a multiple of groups {groups}")
        self.heads, self.value_heads, self.key_dim, self.value_dim, self.groups = (
            heads,
            heads,
            key_dim,
            value_dim,
            groups,
        )
        self.channels = heads * value_dim + 2 * groups * key_dim

        generator = draws()
        a_log, dt_bias, rate_log = draw_decay(heads, generator, decay_init, horizon, dt_writes=True)
        # One product for z, x, B and C; dt is a second one, kept out of bfloat16.
        self.project = linear(width, self.channels + heads * value_dim, generator, width=width)
        self.conv_weight = uniform((self.channels, conv), conv**-0.5, generator)
        self.conv_bias = uniform((self.channels,), conv**-0.5, generator)
        self.output = linear(heads * value_dim, width, generator, width=width)
        self.norm = RMSNorm(heads * value_dim, groups=groups)
        self.gates = linear(width, heads, generator, width=width)
        self.A_log, self.dt_bias, self.rate_log = undecayed(a_log), undecayed(dt_bias), undecayed(rate_log)
        self.D = undecayed(torch.ones(heads))

    def forward(
        self,
        x: Float[Tensor, "R N D"],
        state: MemoryState | None = None,
        *,
        write: Shaped[Tensor, "R N"] | None = None,
        gap: Real[Tensor, "R N"] | None = None,
        lengths: Int64[Tensor, " R"] | None = None,
    ) -> tuple[Float[Tensor, "R N D"], MemoryState]:
        """Continues the streams of R rows by N >= 0 tokens; the arguments are those of `GatedDeltaNet.forward`.

        Silence enters the decay only, never the dt of the write.
        """
        R, N, _ = x.shape
        memory, tail = (None, None) if state is None else state
        inputs, gate = self.project(x).split([self.channels, self.heads * self.value_dim], dim=-1)
        with torch.autocast(x.device.type, enabled=False):  # gates, norms and the memory stay in float32
            dt = F.softplus(self.gates(x.to(self.gates.weight.dtype)) + self.dt_bias)
            restart, quiet = None, None
            if gap is not None:
                restart, quiet = gap > 0, silence(gap, self.rate)
            if lengths is not None:
                valid = within(lengths, N)
                dt = dt * valid[..., None]
                if restart is not None and quiet is not None:
                    restart, quiet = restart & valid, torch.where(valid[..., None], quiet, 0.0)
            mixed, tail = causal_conv(
                inputs, self.conv_weight, self.conv_bias, state=tail, lengths=lengths, restart=restart
            )
            keys = self.groups * self.key_dim
            values, key, query = F.silu(mixed).split([self.heads * self.value_dim, keys, keys], dim=-1)
            values = values.unflatten(-1, (self.heads, self.value_dim))
            stored = values if write is None else values * write.to(values.dtype)[..., None, None]
            read, memory = ssd(
                stored,
                dt,
                -self.A_log.exp(),
                key.unflatten(-1, (self.groups, self.key_dim)),
                query.unflatten(-1, (self.groups, self.key_dim)),
                state=memory,
                log_decay_extra=quiet,
            )
            read = (read + self.D[:, None] * values).reshape(R, N, self.heads * self.value_dim)
            read = self.norm(read * F.silu(gate))
        return self.output(read.to(inputs.dtype)), MemoryState(memory, tail)
