"""Kimi Delta Attention as a mixer: Gated DeltaNet with a decay of its own for every key channel.

    q = L2(SiLU(conv(Wq x))) / sqrt(Dk);   k = L2(SiLU(conv(Wk x)));   v = SiLU(conv(Wv x))
    beta = beta_max sigmoid(Wb x);   log_decay = -exp(A_log) softplus(Wu Wd x + dt_bias) + gap · rate     [Dk per head]
    S <- Diag(exp(log_decay)) S;   S <- S + beta k (v - S^T k)^T;   o = S^T q
    y = Wo [RMSNorm(o) · sigmoid(Vu Vd x + c)]

Wd and Vd map to value_dim numbers, so the gates cost less than the values. With one decay for all channels of a head
this is Gated DeltaNet. Source: Kimi Linear, arXiv 2510.26692; gaps, skipped writes and the horizon initialisation are
ours.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Real, Shaped
from torch import Tensor, nn

from tsgdn.kernels import Readout, gated_delta_rule, prologue, silence, within
from tsgdn.mixers.layers import RMSNorm, draws, linear, undecayed, uniform
from tsgdn.mixers.memory import MemoryMixer, MemoryState, draw_channel_decay
from tsgdn.mixers.registry import register


class ChannelwiseMixer(MemoryMixer):
    """What the mixers with a decay per key channel share; a subclass says how a token erases and writes."""

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        key_dim: int,
        value_dim: int | None,
        value_heads: int | None,
        conv: int,
        beta_max: int | float,
        output_gate: str,
        low_rank_gate: bool,
        norm_before_gate: bool,
        decay_init: str,
        horizon: Sequence[int | float],
    ) -> None:
        super().__init__()
        value_dim, value_heads = value_dim or key_dim, value_heads or heads
        if value_heads % heads:
            raise ValueError(f"value_heads {value_heads} is not a multiple of heads {heads}")
        if output_gate not in ("silu", "sigmoid"):
            raise ValueError(f"output_gate is {output_gate!r}; expected silu or sigmoid")
        if not 0 < beta_max <= 2:
            raise ValueError(f"beta_max is {beta_max}; expected 1, or 2 for negative eigenvalues")
        self.heads, self.key_dim, self.value_dim, self.value_heads = heads, key_dim, value_dim, value_heads
        self.beta_max, self.norm_before_gate, self.low_rank_gate = beta_max, norm_before_gate, low_rank_gate
        self.activation: Literal["silu", "sigmoid"] = "silu" if output_gate == "silu" else "sigmoid"
        self.channels = 2 * heads * key_dim + value_heads * value_dim

        generator = draws()
        a_log, dt_bias, rate_log = draw_channel_decay(value_heads, key_dim, generator, decay_init, horizon)
        # One product for q, k, v and the output gate (or the way down to it); the gates of the memory and the way down
        # to its decay are a second one, kept out of bfloat16.
        read = value_heads * value_dim
        self.project = linear(width, self.channels + (value_dim if low_rank_gate else read), generator, width=width)
        self.conv_weight = uniform((self.channels, conv), conv**-0.5, generator)
        self.output = linear(read, width, generator, width=width)
        self.norm = RMSNorm(value_dim)
        self.gates = linear(width, self._strengths() + value_dim, generator, width=width)
        self.decay_up = linear(value_dim, value_heads * key_dim, generator, width=value_dim)
        self.A_log, self.dt_bias, self.rate_log = undecayed(a_log), undecayed(dt_bias), undecayed(rate_log)
        if low_rank_gate:
            self.gate_up = linear(value_dim, read, generator, width=value_dim)
            self.gate_bias = nn.Parameter(torch.zeros(read))

    def _strengths(self) -> int:
        """How many numbers in [0, 1] say what a token erases and writes."""
        raise NotImplementedError

    def _erase_and_write(self, strengths: Tensor) -> tuple[Tensor | None, Tensor]:
        """`erase` and `beta` of the delta rule from these numbers, already times `write`; None ties erase to beta."""
        raise NotImplementedError

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

        `write` multiplies what is erased and what is written; silence fades every key channel at its own rate.
        """
        memory, tail = (None, None) if state is None else state
        inputs, gate = self.project(x).split([self.channels, self.project.out_features - self.channels], dim=-1)
        if self.low_rank_gate:
            gate = F.linear(gate, self.gate_up.weight, self.gate_bias)
        with torch.autocast(x.device.type, enabled=False):  # gates, norms and the memory stay in float32
            raw, low = self.gates(x.to(self.gates.weight.dtype)).split([self._strengths(), self.value_dim], dim=-1)
            log_decay = self._log_decay(low, gap, lengths)
            mixed, strengths, _, tail = prologue(
                inputs,
                raw,
                conv_weight=self.conv_weight,
                decay=False,
                tail=tail,
                write=write,
                gap=gap,
                lengths=lengths,
            )
            erase, beta = self._erase_and_write(strengths)
            q, k, v = mixed.split([self.heads * self.key_dim] * 2 + [self.value_heads * self.value_dim], dim=-1)
            read, memory = gated_delta_rule(
                q.unflatten(-1, (self.heads, self.key_dim)),
                k.unflatten(-1, (self.heads, self.key_dim)),
                v.unflatten(-1, (self.value_heads, self.value_dim)),
                log_decay=log_decay,
                beta=beta,
                erase=erase,
                state=memory,
                norm=True,
                scale=self.key_dim**-0.5,
                readout=Readout(
                    gate.unflatten(-1, (self.value_heads, self.value_dim)),
                    self.norm.weight,
                    self.norm.eps,
                    self.activation,
                    self.norm_before_gate,
                ),
            )
        return self.output(read.flatten(-2)), MemoryState(memory, tail)

    def _log_decay(self, low: Tensor, gap: Tensor | None, lengths: Tensor | None) -> Tensor:
        """Per key channel (R, N, H, Dk), from the way down; zero beyond the lengths."""
        each = (self.value_heads, self.key_dim)
        dt = F.softplus(self.decay_up(low).unflatten(-1, each) + self.dt_bias)
        log_decay = -self.A_log.exp()[:, None] * dt
        if gap is not None:
            log_decay = log_decay + silence(gap, self.rate.flatten()).unflatten(-1, each)
        if lengths is not None:
            log_decay = torch.where(within(lengths, low.shape[1])[..., None, None], log_decay, 0.0)
        return log_decay


@register("kda")
class KDA(ChannelwiseMixer):
    """Mixes tokens along time through a memory that forgets each key channel at its own pace.

    Args:
        width: of the tokens.
        heads: of queries and keys.
        key_dim: per head.
        value_dim: per value head, and the rank of the decay and of the output gate; None = key_dim.
        value_heads: a multiple of `heads`; value heads of a group share queries and keys. None = heads.
        conv: width of the short causal convolution on q, k and v.
        beta_max: 1, or 2 to allow negative eigenvalues (erase more than was stored).
        output_gate: "sigmoid" or "silu", the activation of the gate on what was read; the gate is of low rank.
        norm_before_gate: norm, then gate; False = the other order.
        decay_init: "paper", "shared", "horizon" or "horizon_a"; see `memory.draw_channel_decay`.
        horizon: shortest and longest initial memory in tokens, for the horizon initialisations.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int = 2,
        key_dim: int = 32,
        value_dim: int | None = None,
        value_heads: int | None = None,
        conv: int = 4,
        beta_max: int | float = 1,
        output_gate: str = "sigmoid",
        norm_before_gate: bool = True,
        decay_init: str = "horizon",
        horizon: Sequence[int | float] = (4.0, 1024.0),
    ) -> None:
        super().__init__(
            width,
            heads=heads,
            key_dim=key_dim,
            value_dim=value_dim,
            value_heads=value_heads,
            conv=conv,
            beta_max=beta_max,
            output_gate=output_gate,
            low_rank_gate=True,
            norm_before_gate=norm_before_gate,
            decay_init=decay_init,
            horizon=horizon,
        )

    def _strengths(self) -> int:
        return self.value_heads

    def _erase_and_write(self, strengths: Tensor) -> tuple[Tensor | None, Tensor]:
        return None, strengths * self.beta_max
