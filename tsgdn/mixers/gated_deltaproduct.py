"""Gated DeltaProduct as a mixer: several steps of the delta rule per token, each with its own key, value and strength.

    q = L2(SiLU(conv(Wq x))) / sqrt(Dk);   k_j = L2(SiLU(conv(Wk_j x)));   v_j = SiLU(conv(Wv_j x)),   j = 1 .. n
    beta_j = beta_max sigmoid(Wb_j x);   log_decay = -exp(A_log) softplus(Wa x + dt_bias) + gap · rate
    S <- exp(log_decay) S;   then for each j   S <- S + beta_j k_j (v_j - S^T k_j)^T;   o = S^T q
    y = Wo [RMSNorm(o) · SiLU(Wg x)]

One sub-step is Gated DeltaNet. With n of them and beta up to 2 a token may turn the memory by a product of n
reflections, where a single step can only shrink or mirror it along one key.

Source: DeltaProduct, arXiv 2502.10297; gaps, skipped writes and the horizon initialisation are ours.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Real, Shaped
from torch import Tensor

from tsgdn.kernels import gated_delta_rule, prologue, readout, silence, within
from tsgdn.mixers.layers import RMSNorm, draws, linear, undecayed, uniform
from tsgdn.mixers.memory import MemoryMixer, MemoryState, draw_decay
from tsgdn.mixers.registry import register
from tsgdn.mixers.substeps import last, place


@register("gated_deltaproduct")
class GatedDeltaProduct(MemoryMixer):
    """Mixes tokens along time through a memory that each token corrects several times.

    Args:
        width: of the tokens.
        substeps: corrections per token, each with its own key, value and beta; the token decays and is read for once.
        heads: of queries and keys.
        key_dim: per head.
        value_dim: per value head; None = key_dim.
        value_heads: a multiple of `heads`; value heads of a group share queries and keys. None = heads.
        conv: width of the short causal convolution on the query and on every sub-step's keys and values.
        beta_max: 2 allows negative eigenvalues, as published; 1 does not.
        delta: False adds beta_j v_j without looking what is stored; same parameters, same state.
        decay: "scalar", or "none", which never forgets and is untouched by silence.
        output_gate: "silu" or "sigmoid", the activation of the gate on what was read.
        norm_before_gate: norm, then gate; False = the other order.
        decay_init: "paper", "shared", "horizon" or "horizon_a"; see `memory.draw_decay`.
        horizon: shortest and longest initial memory in tokens, for the horizon initialisations.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        width: int,
        *,
        substeps: int = 2,
        heads: int = 2,
        key_dim: int = 32,
        value_dim: int | None = None,
        value_heads: int | None = None,
        conv: int = 4,
        beta_max: int | float = 2,
        delta: bool = True,
        decay: str = "scalar",
        output_gate: str = "silu",
        norm_before_gate: bool = True,
        decay_init: str = "horizon",
        horizon: Sequence[int | float] = (4.0, 1024.0),
    ) -> None:
        super().__init__()
        value_dim, value_heads = value_dim or key_dim, value_heads or heads
        if substeps < 1:
            raise ValueError(f"substeps is {substeps}; expected at least 1, which is gated_deltanet")
        if value_heads % heads:
            raise ValueError(f"value_heads {value_heads} is not a multiple of heads {heads}")
        if decay not in ("scalar", "none") or output_gate not in ("silu", "sigmoid"):
            raise ValueError(f"decay {decay!r} or output_gate {output_gate!r}; expected scalar|none and silu|sigmoid")
        if not 0 < beta_max <= 2:
            raise ValueError(f"beta_max is {beta_max}; expected 1, or 2 for negative eigenvalues")
        self.substeps = substeps
        self.heads, self.key_dim, self.value_dim, self.value_heads = heads, key_dim, value_dim, value_heads
        self.beta_max, self.delta, self.decay = beta_max, delta, decay
        self.activation: Literal["silu", "sigmoid"] = "silu" if output_gate == "silu" else "sigmoid"
        self.norm_before_gate = norm_before_gate
        # q, then the keys of all sub-steps, then their values; for one sub-step the layout of Gated DeltaNet.
        self.parts = [heads * key_dim, substeps * heads * key_dim, substeps * value_heads * value_dim]
        self.channels = sum(self.parts)

        generator = draws()
        a_log, dt_bias, rate_log = draw_decay(value_heads, generator, decay_init, horizon, lowest=0.0)
        self.project = linear(width, self.channels + value_heads * value_dim, generator, width=width)
        self.conv_weight = uniform((self.channels, conv), conv**-0.5, generator)
        self.output = linear(value_heads * value_dim, width, generator, width=width)
        self.norm = RMSNorm(value_dim)
        self.gates = linear(width, value_heads * (substeps + (decay != "none")), generator, width=width)
        if decay != "none":
            self.A_log, self.dt_bias, self.rate_log = undecayed(a_log), undecayed(dt_bias), undecayed(rate_log)

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

        `write` multiplies the beta of every sub-step.
        """
        n, key, value = self.substeps, (self.heads, self.key_dim), (self.value_heads, self.value_dim)
        memory, tail = (None, None) if state is None else state
        inputs, gate = self.project(x).split([self.channels, self.value_heads * self.value_dim], dim=-1)
        with torch.autocast(x.device.type, enabled=False):  # gates, norms and the memory stay in float32
            raw = self.gates(x.to(self.gates.weight.dtype))
            strengths = n * self.value_heads
            # One decay stands beside n strengths, which the prologue does not know: it makes the strengths alone.
            mixed, beta, _, tail = prologue(
                inputs,
                raw[..., :strengths],
                conv_weight=self.conv_weight,
                beta_max=self.beta_max,
                decay=False,
                tail=tail,
                write=write,
                gap=gap,
                lengths=lengths,
            )
            q, k, v = mixed.split(self.parts, dim=-1)
            read, memory = gated_delta_rule(
                place(q.unflatten(-1, key), n, n - 1),
                k.unflatten(-1, (n, *key)).flatten(1, 2),
                v.unflatten(-1, (n, *value)).flatten(1, 2),
                log_decay=place(self._log_decay(raw[..., strengths:], gap, lengths), n, 0),
                beta=beta.unflatten(-1, (n, self.value_heads)).flatten(1, 2),
                delta=self.delta,
                state=memory,
                norm=True,
                scale=self.key_dim**-0.5,
            )
            read = readout(
                last(read, n),
                gate.unflatten(-1, value),
                self.norm.weight,
                eps=self.norm.eps,
                activation=self.activation,
                norm_first=self.norm_before_gate,
            )
        return self.output(read.flatten(-2)), MemoryState(memory, tail)

    def _log_decay(self, raw: Tensor, gap: Tensor | None, lengths: Tensor | None) -> Tensor:
        if self.decay == "none":
            return raw.new_zeros(*raw.shape[:2], self.value_heads)
        log_decay = -self.A_log.exp() * F.softplus(raw + self.dt_bias)
        if gap is not None:
            log_decay = log_decay + silence(gap, self.rate)
        if lengths is not None:
            log_decay = torch.where(within(lengths, raw.shape[1])[..., None], log_decay, 0.0)
        return log_decay
