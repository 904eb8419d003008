"""Hybrid Associative Memory as a mixer: Gated DeltaNet for everything, a bounded store for what it predicts badly.

    q, k, v, S, rho (what S could not predict, times beta) and oR as in Gated DeltaNet
    c_t = mean over heads of |rho_t| / (|v_t| + eps)          router "error"
    c_t = sigmoid(wr · x_t + br)                              router "learned"
    the store keeps the `slots` tokens with the largest c_s gamma^(t - s), the current one among them
    oA = softmax over the store of (RMSNorm(q_t) · k_s / |k_s| [+ ln c_s if learned]) v_s
    y = Wo [RMSNorm(oR) · sigmoid(Wg x) + RMSNorm(oA) · sigmoid(Ws x)], each norm with a gain of its own

Sources: Hybrid Associative Memories, arXiv 2603.22325 (a recurrence for all tokens, attention for those it predicts
badly, two routers, gated and normed branches); the bounded store and its sharp read through a norm of its own after
HOLA, arXiv 2607.02303. Both papers are known to us by summaries: the equations are inferred from them. The discount
(where it is below 1, ln c_s is the aged one), silence, the router's bias and the chunk form are ours.

Entering the store is a discrete choice. In float64 cutting a stream changes nothing; in float32 rounding may decide
another way between two tokens whose scores nearly agree. What was decided is carried, never decided again.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Real, Shaped
from torch import Tensor

from tsgdn.kernels import readout, unit_length, within
from tsgdn.mixers.associative_cache import Store, look_up
from tsgdn.mixers.gated_deltanet import GatedDeltaNet, Pass
from tsgdn.mixers.layers import RMSNorm, linear, undecayed
from tsgdn.mixers.registry import register

_LOWEST = 1e-12
"""Scores are at least this, so that their logarithm is finite."""
_EPS = 1e-6
"""Added to the length of a value before dividing by it."""


class HAMState(NamedTuple):
    """What is carried per row: Gated DeltaNet's state, the store (see `associative_cache.Store`), tokens seen."""

    memory: Float[Tensor, "R Hv Dk Dv"]
    conv: Float[Tensor, "R W_minus_1 C"]
    keys: Float[Tensor, "R slots H Dk"]
    values: Float[Tensor, "R slots Hv Dv"]
    score: Float[Tensor, "R slots"]
    slot_position: Int64[Tensor, "R slots"]
    position: Int64[Tensor, " R"]


@register("ham")
class HAM(GatedDeltaNet):
    """Mixes tokens along time through a decaying memory, and through a few tokens kept as they were.

    With `slots=0` it has the parameters and outputs of GatedDeltaNet(output_gate="sigmoid"), and starts the same.

    Args:
        width: of the tokens.
        heads: of queries and keys.
        key_dim: per head.
        value_dim: per value head; None = key_dim.
        value_heads: a multiple of `heads`; value heads of a group share queries and keys. None = heads.
        conv: width of the short causal convolution on q, k and v.
        beta_max: 1, or 2 to allow negative eigenvalues.
        slots: tokens that the store holds.
        router: "error", or "learned", whose training needs `budget_loss` besides the task's loss.
        share: of the tokens that a learned router is to let in, aimed at by `budget_loss`.
        discount: gamma in (0, 1]; below 1 a score fades with every token and patch of silence.
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
        value_heads: int | None = None,
        conv: int = 4,
        beta_max: int | float = 1,
        slots: int = 16,
        router: str = "error",
        share: int | float = 0.1,
        discount: int | float = 1.0,
        decay_init: str = "horizon",
        horizon: Sequence[int | float] = (4.0, 1024.0),
    ) -> None:
        if slots < 0:
            raise ValueError(f"slots is {slots}; expected 0 (no store) or more")
        if router not in ("error", "learned"):
            raise ValueError(f"router is {router!r}; expected error or learned")
        if not 0 < share < 1:
            raise ValueError(f"share is {share}; expected a share of the tokens, between 0 and 1")
        if not 0 < discount <= 1:
            raise ValueError(f"discount is {discount}; expected above 0 and at most 1 (scores do not fade)")
        self.slots, self.learned, self.share, self.discount = slots, router == "learned" and slots > 0, share, discount
        super().__init__(
            width,
            heads=heads,
            key_dim=key_dim,
            value_dim=value_dim,
            value_heads=value_heads,
            conv=conv,
            beta_max=beta_max,
            output_gate="sigmoid",
            decay_init=decay_init,
            horizon=horizon,
        )

    def _extend(self, width: int, generator: torch.Generator) -> None:
        if self.slots:
            self.store_gate = linear(width, self.value_heads * self.value_dim, generator, width=width)
            self.store_norm = RMSNorm(self.value_dim)
            self.query_norm = RMSNorm(self.key_dim)
            if self.learned:
                self.router = linear(width, 1, generator, width=width)
                # Tokens are centred: without a bias the mean score could not leave 1/2.
                self.router_bias = undecayed(torch.tensor([math.log(self.share / (1 - self.share))]))

    def initial_state(self, rows: int, device: torch.device | str | None = None) -> HAMState:
        """Nothing seen yet: zeros."""
        memory, conv = super().initial_state(rows, device)
        return HAMState(
            memory,
            conv,
            memory.new_zeros(rows, self.slots, self.heads, self.key_dim),
            memory.new_zeros(rows, self.slots, self.value_heads, self.value_dim),
            memory.new_zeros(rows, self.slots),
            torch.zeros(rows, self.slots, dtype=torch.int64, device=memory.device),
            torch.zeros(rows, dtype=torch.int64, device=memory.device),
        )

    def state_bytes(self, tokens: int = 0) -> int:
        """Bytes of a row's state in float32, the same after any number of tokens."""
        entry = 4 * (self.heads * self.key_dim + self.value_heads * self.value_dim) + 12
        return super().state_bytes() + self.slots * entry + 8

    def forward(
        self,
        x: Float[Tensor, "R N D"],
        state: HAMState | None = None,
        *,
        write: Shaped[Tensor, "R N"] | None = None,
        gap: Real[Tensor, "R N"] | None = None,
        lengths: Int64[Tensor, " R"] | None = None,
    ) -> tuple[Float[Tensor, "R N D"], HAMState]:
        """Continues the streams of R rows by N >= 0 tokens; the arguments are those of `GatedDeltaNet.forward`.

        A token of `write` 0 reads the store and never enters it. A gap ages the scores and takes nothing out.
        """
        R, N, _ = x.shape
        memory, tail, *store, seen = self.initial_state(R, x.device) if state is None else state
        done = self._pass(x, memory, tail, write=write, gap=gap, lengths=lengths, residual=self.slots > 0)
        valid = x.new_ones(R, N, dtype=torch.bool) if lengths is None else within(lengths, N)
        both, store = done.read, Store(*store)
        if self.slots:
            gate = self.store_gate(x).unflatten(-1, (self.value_heads, self.value_dim))
            with torch.autocast(x.device.type, enabled=False):
                elapsed = valid.double() if gap is None else (1 + gap.double()) * valid
                read, store = look_up(
                    self.query_norm(done.query.to(done.memory.dtype)),
                    unit_length(done.key),
                    done.value,
                    self._log_score(x, done),
                    store,
                    stored=valid if write is None else valid & (write > 0),
                    elapsed=elapsed,
                    position=seen[:, None] + torch.arange(N, device=x.device),
                    log_discount=math.log(self.discount),
                    weighed=self.learned,
                    scale=1.0,
                )
                read = readout(read, gate, self.store_norm.weight, eps=self.store_norm.eps, activation="sigmoid")
                both = both + read.to(both.dtype)
        return self.output(both.flatten(-2)), HAMState(done.memory, done.conv, *store, seen + valid.sum(1))

    def budget_loss(
        self,
        x: Float[Tensor, "R N D"],
        *,
        lengths: Int64[Tensor, " R"] | None = None,
    ) -> Float[Tensor, ""]:
        """(mean c - share)², to be added to the loss of the task where the router is learned.

        A function of the tokens alone: `forward` keeps nothing. Training gives it what the mixer was given, see
        `tsgdn.training.module.budget_losses`.

        Raises:
            ValueError: the router is not learned.
        """
        if not self.learned:
            raise ValueError("this mixer has no learned router to hold to a budget; build it with router='learned'")
        with torch.autocast(x.device.type, enabled=False):
            c = self._routed(x).sigmoid()
            valid = torch.ones_like(c) if lengths is None else within(lengths, x.shape[1]).to(c.dtype)
            return ((c * valid).sum() / valid.sum().clamp_min(1) - self.share).square()

    def _log_score(self, x: Tensor, done: Pass) -> Tensor:
        if self.learned:
            return F.logsigmoid(self._routed(x)).clamp_min(math.log(_LOWEST))
        assert done.residual is not None
        with torch.no_grad():
            wide = done.memory.dtype
            missed, value = done.residual.to(wide).norm(dim=-1), done.value.to(wide).norm(dim=-1)
            return (missed / (value + _EPS)).mean(-1).clamp_min(_LOWEST).log()

    def _routed(self, x: Tensor) -> Tensor:
        return (self.router(x.to(self.router.weight.dtype)) + self.router_bias).squeeze(-1)
