"""Mamba-3 (one input, one output) as a mixer: a trapezoid rule for the write and keys that turn with the input.

    [z, v, B, C] = W x;   dt = softplus(Wdt x + dt_bias);   A = min(-softplus(Wa x + A_bias), -1e-4)
    lam = sigmoid(Wl x);  angle <- angle + pi tanh(Wt x) dt;   alpha = exp(dt A)
    k = turn(angle) (RMSNorm(B) + key_bias);   q = turn(angle) (RMSNorm(C) + query_bias)
    S <- alpha exp(gap · rate) S + (1 - lam) dt alpha k_last v_last^T
    S <- S + lam dt k v^T;   o = S^T q + D v;   y = Wo [o · SiLU(z)];   k_last, v_last <- k, write · v

The two lines for S are two sub-steps of the gated delta rule without the delta; what is read after the first is thrown
away. Turning keys and queries by a cumulative angle is a memory with complex eigenvalues. There is no convolution.
Key and value sizes are named as in the other mixers: key_dim is the paper's state size N, value_dim its head size P.

Source: Mamba-3 as given in arXiv 2605.22791, eq. 16; the bound pi tanh of the turn is that of the published
implementation. Gaps, skipped writes, A_bias and its horizon initialisation are ours.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64, Real, Shaped
from torch import Tensor, nn

from tsgdn.kernels import gated_delta_rule, silence, within
from tsgdn.mixers.layers import RMSNorm, draws, linear, scale_output, undecayed
from tsgdn.mixers.memory import draw_decay
from tsgdn.mixers.registry import register
from tsgdn.mixers.substeps import last, place, weave

SLOWEST = 1e-4
"""Smallest -A: no head keeps more than exp(-SLOWEST · dt) per token, however its inputs push it."""


class Mamba3State(NamedTuple):
    """What is carried per row.

    Attributes:
        memory: key-value memory of each head.
        last_key: key of the last token, turned.
        last_value: its value times its `write`.
        angle: sum of all turns, in [-pi, pi]: the seam lies opposite of where a stream begins.
    """

    memory: Float[Tensor, "R H Dk Dv"]
    last_key: Float[Tensor, "R H Dk"]
    last_value: Float[Tensor, "R H Dv"]
    angle: Float64[Tensor, "R H pairs"]


@register("mamba3")
class Mamba3(nn.Module):
    """Mixes tokens along time through decaying sums of key-value products whose keys turn.

    Args:
        width: of the tokens.
        heads: each with a decay of its own.
        key_dim: rows of a head's memory.
        value_dim: columns of a head's memory; None = key_dim.
        groups: sets of keys and queries before the biases of the heads; None = heads.
        rope_fraction: share of the key channels, the first ones, that turn; channel i turns with channel i + pairs.
        output_norm: RMSNorm over each head's values before the gate.
        decay_init: see `memory.draw_decay`; A is set where dt and the horizon are given, as dt is a write strength.
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
        rope_fraction: int | float = 0.5,
        output_norm: bool = False,
        decay_init: str = "horizon",
        horizon: Sequence[int | float] = (4.0, 1024.0),
    ) -> None:
        super().__init__()
        value_dim, groups = value_dim or key_dim, groups or heads
        if heads % groups:
            raise ValueError(f"heads {heads} is not a multiple of groups {groups}")
        if not 0 <= rope_fraction <= 1:
            raise ValueError(f"rope_fraction is {rope_fraction}; expected a share of the key channels, 0 to 1")
        self.heads, self.key_dim, self.value_dim, self.groups = heads, key_dim, value_dim, groups
        self.pairs = int(key_dim * rope_fraction) // 2

        generator = draws()
        a_log, dt_bias, rate_log = draw_decay(heads, generator, decay_init, horizon, dt_writes=True)
        a = a_log.double().exp()
        # One product for z, v, B and C; dt, A, lam and the turns are a second one, kept out of bfloat16.
        self.project = linear(width, 2 * heads * value_dim + 2 * groups * key_dim, generator, width=width)
        self.output = linear(heads * value_dim, width, generator, width=width)
        self.gates = linear(width, 3 * heads + self.pairs, generator, width=width)
        self.key_norm, self.query_norm = RMSNorm(key_dim), RMSNorm(key_dim)
        self.norm = RMSNorm(value_dim) if output_norm else None
        self.key_bias, self.query_bias = (undecayed(torch.ones(heads, key_dim)) for _ in range(2))
        self.A_bias = undecayed((a + torch.log(-torch.expm1(-a))).to(a_log.dtype))  # softplus of it is -A
        self.dt_bias, self.rate_log = undecayed(dt_bias), undecayed(rate_log)
        self.D = undecayed(torch.ones(heads))

    def scale_output(self, depth: int) -> None:
        """Divides the output projection by sqrt(2·depth)."""
        scale_output(self.output, depth)

    @property
    def rate(self) -> Float[Tensor, " H"]:
        """Log decay per patch of silence, at most 0; starts at the head's initial log decay per token."""
        return -self.rate_log.exp()

    def initial_state(self, rows: int, device: torch.device | str | None = None) -> Mamba3State:
        """Nothing seen yet: zeros."""
        weight, heads = self.dt_bias, (rows, self.heads)
        options = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": device or weight.device}
        return Mamba3State(
            torch.zeros(*heads, self.key_dim, self.value_dim, **options),
            torch.zeros(*heads, self.key_dim, **options),
            torch.zeros(*heads, self.value_dim, **options),
            torch.zeros(*heads, self.pairs, dtype=torch.float64, device=options["device"]),
        )

    def state_bytes(self, tokens: int = 0) -> int:
        """Bytes of a row's state with parameters in float32, the same after any number of tokens."""
        return self.heads * (4 * (self.key_dim * self.value_dim + self.key_dim + self.value_dim) + 8 * self.pairs)

    def forward(
        self,
        x: Float[Tensor, "R N D"],
        state: Mamba3State | None = None,
        *,
        write: Shaped[Tensor, "R N"] | None = None,
        gap: Real[Tensor, "R N"] | None = None,
        lengths: Int64[Tensor, " R"] | None = None,
    ) -> tuple[Float[Tensor, "R N D"], Mamba3State]:
        """Continues the streams of R rows by N >= 0 tokens; the arguments are those of `GatedDeltaNet.forward`.

        A token whose `write` is 0 enters the memory neither now nor as the last token of the next step; its own last
        token still does. Silence enters the decay only: not the dt of the write, nor the angle. It clears the last
        token, so the step after it writes its own share alone.
        """
        R, N, _ = x.shape
        state = self.initial_state(R, x.device) if state is None else state
        H, keys, values = self.heads, self.groups * self.key_dim, self.heads * self.value_dim
        inputs = self.project(x)
        with torch.autocast(x.device.type, enabled=False):  # gates, norms and the memory stay in float32
            wide = torch.promote_types(inputs.dtype, state.last_key.dtype)
            gate, value, key, query = inputs.to(wide).split([values, values, keys, keys], dim=-1)
            dt, a, lam, turn = self.gates(x.to(self.gates.weight.dtype)).split([H, H, H, self.pairs], dim=-1)
            dt, lam = F.softplus(dt + self.dt_bias), torch.sigmoid(lam)
            a = -F.softplus(a + self.A_bias).clamp_min(SLOWEST)
            valid = None if lengths is None else within(lengths, N)[..., None]
            if valid is not None:
                dt = dt * valid  # padding: no decay, no write, no turn
            log_decay, now = dt * a, dt * lam
            before = (dt - now) * log_decay.exp()
            if gap is not None:
                quiet = silence(gap, self.rate)
                log_decay = log_decay + (quiet if valid is None else torch.where(valid, quiet, 0.0))
                before = before.masked_fill(gap[..., None] > 0, 0.0)

            # Turns are summed in float64 and wrapped, so a stream may be of any length.
            turns = (math.pi * torch.tanh(turn)).double()[:, :, None] * dt.double()[..., None]
            angles = _wrapped(torch.cat([state.angle[:, None], turns], 1).cumsum(1))
            cos, sin = (part.to(wide) for part in (angles[:, 1:].cos(), angles[:, 1:].sin()))
            key = self._turned(key, self.key_norm, self.key_bias, cos, sin)
            query = self._turned(query, self.query_norm, self.query_bias, cos, sin)
            value = value.unflatten(-1, (H, self.value_dim))
            stored = value if write is None else value * write.to(wide)[..., None, None]
            # Entry n is token n - 1, entry 0 the one that the state remembers.
            all_keys = torch.cat([state.last_key[:, None], key], 1)
            all_values = torch.cat([state.last_value[:, None], stored], 1)
            read, memory = gated_delta_rule(
                place(query.to(inputs.dtype), 2, 1),
                weave([all_keys[:, :N], key]).to(inputs.dtype),
                weave([all_values[:, :N], stored]).to(inputs.dtype),
                log_decay=place(log_decay, 2, 0),
                beta=weave([before, now]),
                delta=False,
                state=state.memory,
            )
            read = last(read, 2).to(wide) + self.D[:, None] * value
            if self.norm is not None:
                read = self.norm(read)
            read = read.reshape(R, N, values) * F.silu(gate)
            tail = (_at_end(leaf, lengths) for leaf in (all_keys, all_values, angles))
        return self.output(read.to(inputs.dtype)), Mamba3State(memory, *tail)

    def _turned(self, x: Tensor, norm: RMSNorm, bias: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Keys or queries (R, N, G · Dk) as they meet the memory, (R, N, H, Dk)."""
        x = norm(x.unflatten(-1, (self.groups, self.key_dim)))
        x = x.repeat_interleave(self.heads // self.groups, 2) + bias
        one, other, rest = x.split([self.pairs, self.pairs, self.key_dim - 2 * self.pairs], dim=-1)
        return torch.cat([one * cos - other * sin, one * sin + other * cos, rest], -1)


def _wrapped(angle: Tensor) -> Tensor:
    """The same angle in [-pi, pi]; one that lies there already is left as it is."""
    return angle - 2 * math.pi * torch.round(angle.detach() / (2 * math.pi))


def _at_end(entries: Tensor, lengths: Tensor | None) -> Tensor:
    """Of entries (R, N + 1, ...) that of each row's last token, a copy."""
    if lengths is None:
        return entries[:, -1].clone()
    return entries[torch.arange(entries.shape[0], device=entries.device), lengths]
