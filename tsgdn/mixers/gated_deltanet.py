"""Gated DeltaNet as a mixer, with its controls: GatedLinear (no delta rule) and DeltaNet (no decay), one switch each.

    q = L2(SiLU(conv(Wq x))) / sqrt(Dk);   k = L2(SiLU(conv(Wk x)));   v = SiLU(conv(Wv x))
    beta = beta_max sigmoid(Wb x);   log_decay = -exp(A_log) softplus(Wa x + dt_bias) + gap · rate
    S <- exp(log_decay) S;   S <- S + beta k (v - S^T k)^T;   o = S^T q
    y = Wo [RMSNorm(o) · SiLU(Wg x)]

Source: Gated Delta Networks, arXiv 2412.06464; gaps, skipped writes and the horizon initialisation are ours.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Real, Shaped
from torch import Tensor, nn

from tsgdn.kernels import causal_conv, gated_delta_rule
from tsgdn.mixers.layers import RMSNorm, draws, linear, scale_output, silence, undecayed, uniform, unit_length, within

DECAY_INITS = ("paper", "shared", "horizon", "horizon_a")


class GatedDeltaNetState(NamedTuple):
    """What is carried per row.

    Attributes:
        memory: key-value memory S of each value head.
        conv: the last inputs of the short convolution, oldest first.
    """

    memory: Float[Tensor, "R H Dk Dv"]
    conv: Float[Tensor, "R W_minus_1 C"]


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
    if init not in DECAY_INITS:
        raise ValueError(f"decay_init is {init!r}; expected one of {', '.join(DECAY_INITS)}")
    if len(horizon) != 2 or not 0 < horizon[0] <= horizon[1]:
        raise ValueError(f"horizon is {tuple(horizon)}; expected (shortest, longest) in tokens, both above 0")
    of_a, of_dt, of_tau = torch.rand(3, heads, generator=generator, dtype=torch.float64, device="cpu")
    low = lowest if init == "paper" else 1.0
    a = (low + (16 - low) * of_a).clamp_min(1e-4)
    dt = torch.exp(math.log(1e-3) + math.log(1e2) * of_dt)
    if init.startswith("horizon"):
        tau = torch.exp(math.log(horizon[0]) + math.log(horizon[1] / horizon[0]) * of_tau)
        if init == "horizon_a" or dt_writes:
            a = 1 / (tau * dt)
        else:
            dt = 1 / (tau * a)
    wanted = torch.get_default_dtype()
    dt_bias = dt + torch.log(-torch.expm1(-dt))  # softplus of it is dt
    return a.log().to(wanted), dt_bias.to(wanted), (a * dt).log().to(wanted)


class GatedDeltaNet(nn.Module):
    """Mixes tokens along time through a memory that forgets by gates and corrects itself by the delta rule.

    Args:
        width: of the tokens.
        heads: of queries and keys.
        key_dim: per head.
        value_dim: per value head; None = key_dim.
        value_heads: a multiple of `heads`; value heads of a group share queries and keys. None = heads.
        conv: width of the short causal convolution on q, k and v.
        beta_max: 1, or 2 to allow negative eigenvalues (erase more than was stored).
        delta: False adds beta v without looking what is stored; same parameters, same state.
        decay: "scalar", or "none", which never forgets and is untouched by silence.
        output_gate: "silu" or "sigmoid", the activation of the gate on what was read.
        norm_before_gate: norm, then gate; False = the other order.
        decay_init: "paper", "shared", "horizon" or "horizon_a"; see `draw_decay`.
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
        delta: bool = True,
        decay: str = "scalar",
        output_gate: str = "silu",
        norm_before_gate: bool = True,
        decay_init: str = "horizon",
        horizon: Sequence[int | float] = (4.0, 1024.0),
    ) -> None:
        super().__init__()
        value_dim, value_heads = value_dim or key_dim, value_heads or heads
        if value_heads % heads:
            raise ValueError(f"value_heads {value_heads} is not a multiple of heads {heads}")
        if decay not in ("scalar", "none") or output_gate not in ("silu", "sigmoid"):
            raise ValueError(f"decay {decay!r} or output_gate {output_gate!r}; expected scalar|none and silu|sigmoid")
        if not 0 < beta_max <= 2:
            raise ValueError(f"beta_max is {beta_max}; expected 1, or 2 for negative eigenvalues")
        self.heads, self.key_dim, self.value_dim, self.value_heads = heads, key_dim, value_dim, value_heads
        self.beta_max, self.delta, self.decay = beta_max, delta, decay
        self.activation = F.silu if output_gate == "silu" else torch.sigmoid
        self.norm_before_gate = norm_before_gate
        self.channels = 2 * heads * key_dim + value_heads * value_dim

        generator = draws()
        a_log, dt_bias, rate_log = draw_decay(value_heads, generator, decay_init, horizon, lowest=0.0)
        # One product for q, k, v and the output gate; the gates of the memory are a second one, kept out of bfloat16.
        self.project = linear(width, self.channels + value_heads * value_dim, generator, width=width)
        self.conv_weight = uniform((self.channels, conv), conv**-0.5, generator)
        self.output = linear(value_heads * value_dim, width, generator, width=width)
        self.norm = RMSNorm(value_dim)
        self.gates = linear(width, value_heads * (1 if decay == "none" else 2), generator, width=width)
        if decay != "none":
            self.A_log, self.dt_bias, self.rate_log = undecayed(a_log), undecayed(dt_bias), undecayed(rate_log)

    def scale_output(self, depth: int) -> None:
        """Divides the output projection by sqrt(2·depth)."""
        scale_output(self.output, depth)

    @property
    def rate(self) -> Float[Tensor, " H"]:
        """Log decay per patch of silence, at most 0; starts at the head's initial log decay per token."""
        return -self.rate_log.exp()

    def initial_state(self, rows: int, device: torch.device | str | None = None) -> GatedDeltaNetState:
        """Nothing seen yet: zeros."""
        weight = self.conv_weight
        options = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": device or weight.device}
        return GatedDeltaNetState(
            torch.zeros(rows, self.value_heads, self.key_dim, self.value_dim, **options),
            torch.zeros(rows, weight.shape[1] - 1, self.channels, **options),
        )

    def state_bytes(self) -> int:
        """Bytes of a row's state in float32."""
        memory = self.value_heads * self.key_dim * self.value_dim
        return 4 * (memory + (self.conv_weight.shape[1] - 1) * self.channels)

    def forward(
        self,
        x: Float[Tensor, "R N D"],
        state: GatedDeltaNetState | None = None,
        *,
        write: Shaped[Tensor, "R N"] | None = None,
        gap: Real[Tensor, "R N"] | None = None,
        lengths: Int64[Tensor, " R"] | None = None,
    ) -> tuple[Float[Tensor, "R N D"], GatedDeltaNetState]:
        """Continues the streams of R rows by N >= 0 tokens.

        Args:
            x: tokens.
            state: after the tokens before; None = nothing seen yet.
            write: in [0, 1], multiplies beta; 0 = the token is read for, time passes, nothing is stored.
            gap: patches of silence before the token, >= 0; the old memory decays by gap·rate first, and a gap above 0
                clears the tails of the convolution.
            lengths: tokens of each row; those beyond are padding, touch no state, and their outputs mean nothing.
        """
        R, N, _ = x.shape
        memory, tail = (None, None) if state is None else state
        inputs, gate = self.project(x).split([self.channels, self.value_heads * self.value_dim], dim=-1)
        with torch.autocast(x.device.type, enabled=False):  # gates, norms and the memory stay in float32
            beta, log_decay = self._gates(x, gap)
            restart = None if gap is None else gap > 0
            if write is not None:
                beta = beta * write.to(beta.dtype)[..., None]
            if lengths is not None:
                valid = within(lengths, N)
                beta, log_decay = beta * valid[..., None], torch.where(valid[..., None], log_decay, 0.0)
                restart = None if restart is None else restart & valid
            mixed, tail = causal_conv(inputs, self.conv_weight, state=tail, lengths=lengths, restart=restart)
            mixed = F.silu(mixed)
            qk, v = mixed.split([2 * self.heads * self.key_dim, self.value_heads * self.value_dim], dim=-1)
            qk = unit_length(qk.unflatten(-1, (2 * self.heads, self.key_dim)))
            if self.value_heads != self.heads:
                qk = qk.repeat_interleave(self.value_heads // self.heads, dim=2)
            q, k = qk.to(v.dtype).chunk(2, dim=2)
            read, memory = gated_delta_rule(
                q * self.key_dim**-0.5,
                k,
                v.unflatten(-1, (self.value_heads, self.value_dim)),
                log_decay=log_decay,
                beta=beta,
                delta=self.delta,
                state=memory,
            )[:2]
            gate = self.activation(gate).view(R, N, self.value_heads, self.value_dim)
            read = self.norm(read) * gate if self.norm_before_gate else self.norm(read * gate)
        return self.output(read.flatten(-2)), GatedDeltaNetState(memory, tail)

    def _gates(self, x: Tensor, gap: Tensor | None) -> tuple[Float[Tensor, "R N H"], Float[Tensor, "R N H"]]:
        """Beta and log decay of each token, the silence before it included."""
        raw = self.gates(x.to(self.gates.weight.dtype))
        if self.decay == "none":
            beta = torch.sigmoid(raw) * self.beta_max
            return beta, torch.zeros_like(beta)
        raw_beta, raw_dt = raw.chunk(2, dim=-1)
        log_decay = -self.A_log.exp() * F.softplus(raw_dt + self.dt_bias)
        if gap is not None:
            log_decay = log_decay + silence(gap, self.rate)
        return torch.sigmoid(raw_beta) * self.beta_max, log_decay
