"""Gated DeltaNet as a mixer, with its controls: GatedLinear (no delta rule) and DeltaNet (no decay), one switch each.

    q = L2(SiLU(conv(Wq x))) / sqrt(Dk);   k = L2(SiLU(conv(Wk x)));   v = SiLU(conv(Wv x))
    beta = beta_max sigmoid(Wb x);   log_decay = -exp(A_log) softplus(Wa x + dt_bias) + gap · rate
    S <- exp(log_decay) S;   S <- S + beta k (v - S^T k)^T;   o = S^T q
    y = Wo [RMSNorm(o) · SiLU(Wg x)]

Source: Gated Delta Networks, arXiv 2412.06464; gaps, skipped writes and the horizon initialisation are ours.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int64, Real, Shaped
from torch import Tensor

from tsgdn.kernels import Readout, gated_delta_rule, prologue, without_autocast
from tsgdn.mixers.layers import RMSNorm, draws, linear, undecayed, uniform
from tsgdn.mixers.memory import MemoryMixer, MemoryState, draw_decay
from tsgdn.mixers.registry import register


class Pass(NamedTuple):
    """What the layer computes for N tokens before its output projection; queries and keys are not normalised yet.

    Attributes:
        query: after convolution and activation.
        key: likewise.
        value: likewise.
        beta: write strength, 0 where nothing is written.
        gate: of what is read, before its activation.
        read: from the memory; normalised and gated, or bare if so asked.
        residual: what the memory could not predict, times beta; None where nobody asked.
        memory: after the last token.
        conv: the tail of the convolution after the last token.
    """

    query: Float[Tensor, "R N H Dk"]
    key: Float[Tensor, "R N H Dk"]
    value: Float[Tensor, "R N Hv Dv"]
    beta: Float[Tensor, "R N Hv"]
    gate: Float[Tensor, "R N Hv Dv"]
    read: Float[Tensor, "R N Hv Dv"]
    residual: Float[Tensor, "R N Hv Dv"] | None
    memory: Float[Tensor, "R Hv Dk Dv"]
    conv: Float[Tensor, "R W_minus_1 C"]


@register("deltanet", decay="none")
@register("gated_linear", delta=False)
@register("gated_deltanet")
class GatedDeltaNet(MemoryMixer):
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
        decay_init: "paper", "shared", "horizon" or "horizon_a"; see `memory.draw_decay`.
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
        self.activation: Literal["silu", "sigmoid"] = "silu" if output_gate == "silu" else "sigmoid"
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
        self._extend(width, generator)

    def _extend(self, width: int, generator: torch.Generator) -> None:
        """Further parameters of a subclass, drawn after those of the layer: copies of the layer start the same."""

    def forward(
        self,
        x: Float[Tensor, "R N D"],
        state: MemoryState | None = None,
        *,
        write: Shaped[Tensor, "R N"] | None = None,
        gap: Real[Tensor, "R N"] | None = None,
        lengths: Int64[Tensor, " R"] | None = None,
    ) -> tuple[Float[Tensor, "R N D"], MemoryState]:
        """Continues the streams of R rows by N >= 0 tokens.

        Args:
            x: tokens.
            state: after the tokens before; None = nothing seen yet.
            write: in [0, 1], multiplies beta; 0 = the token is read for, time passes, nothing is stored.
            gap: patches of silence before the token, >= 0; the old memory decays by gap·rate first, and a gap above 0
                clears the tails of the convolution.
            lengths: tokens of each row; those beyond are padding, touch no state, and their outputs mean nothing.
        """
        memory, tail = (None, None) if state is None else state
        done = self._pass(x, memory, tail, write=write, gap=gap, lengths=lengths)
        return self.output(done.read.flatten(-2)), MemoryState(done.memory, done.conv)

    def _pass(
        self,
        x: Tensor,
        memory: Tensor | None,
        tail: Tensor | None,
        *,
        write: Tensor | None,
        gap: Tensor | None,
        lengths: Tensor | None,
        residual: bool = False,
        gated: bool = True,
    ) -> Pass:
        """All but the output projection; `residual` asks for what was not predicted, `gated=False` for bare reads."""
        inputs, gate = self.project(x).split([self.channels, self.value_heads * self.value_dim], dim=-1)
        gate = gate.unflatten(-1, (self.value_heads, self.value_dim))
        with without_autocast(x.device.type):  # gates, norms and the memory stay in float32
            mixed, beta, log_decay, tail = prologue(
                inputs,
                self.gates(x.to(self.gates.weight.dtype)),
                conv_weight=self.conv_weight,
                **self._forgetting(gap),
                beta_max=self.beta_max,
                tail=tail,
                write=write,
                gap=gap,
                lengths=lengths,
            )
            q, k, v = mixed.split([self.heads * self.key_dim] * 2 + [self.value_heads * self.value_dim], dim=-1)
            q, k = (z.unflatten(-1, (self.heads, self.key_dim)) for z in (q, k))
            v = v.unflatten(-1, (self.value_heads, self.value_dim))
            read, end, *rho = gated_delta_rule(
                q,
                k,
                v,
                log_decay=log_decay,
                beta=beta,
                delta=self.delta,
                state=memory,
                norm=True,
                scale=self.key_dim**-0.5,
                readout=self._readout(gate) if gated else None,
                residual=residual,
            )
        return Pass(q, k, v, beta, gate, read, rho[0] if rho else None, end, tail)

    def _readout(self, gate: Tensor) -> Readout:
        return Readout(gate, self.norm.weight, self.norm.eps, self.activation, self.norm_before_gate)

    def _forgetting(self, gap: Tensor | None) -> dict[str, Any]:
        if self.decay == "none":
            return {"decay": False}
        return {"A_log": self.A_log, "dt_bias": self.dt_bias, "rate": None if gap is None else self.rate}
