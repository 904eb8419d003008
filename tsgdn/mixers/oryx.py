"""Oryx as a mixer: one set of keys and values, kept in a decaying memory and in a window, read in one of two modes.

    k = SiLU(conv(Wk x)), v = SiLU(conv(Wv x))        shared by the modes
    S by Gated DeltaNet on (k / |k|, v) at every token;   a window of the last W (k, v) at every token
    linear mode:     o = S^T q / sqrt(Dk),   q = L2(SiLU(conv(Wq x)))
    attention mode:  o = softmax over the window of (qA · Rot k_s / sqrt(Dk)) v_s,   qA = WqA x
    y = Wo [RMSNorm(o) · SiLU(Wg x)]

The mode is that of a chunk of `mode_chunk` tokens, counted from the stream's first one, unwritten tokens included. It
is decided when the chunk's first token comes, from what was seen before it, and carried. By the policy "surprise":

    e_t = mean over heads of |rho_t| / (beta_t (|v_t| + eps)) for written tokens;   E_j = mean of e over chunk j
    chunk j + 1 attends if E_j > mean + threshold · deviation of all E before it, while the budget lasts:
    of the first n chunks of a stream at most ceil(budget · n) attend

Memory, window and statistics do not depend on the modes: a policy may be changed in the middle of a stream. So while
training, where windows are short and errors large, "surprise" gives way to "random": both ways of reading learn.

Source: Oryx, arXiv 2605.28769, known to us by summaries only: two modes over shared keys and values, both memories
updated at every token, queries of their own, a small share of attention. Inferred or ours: the forms of the queries and
keys, rotation in attention mode only, the window, the chunks, and all policies but the fixed ones.

A mode is a discrete choice: in float64 cutting a stream changes nothing; in float32 rounding may decide another way
where a chunk lies on the threshold.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64, Real, Shaped
from torch import Tensor

from tsgdn.kernels import readout, within
from tsgdn.mixers.attention import AttentionState, attend, empty_state, remember
from tsgdn.mixers.gated_deltanet import GatedDeltaNet, Pass
from tsgdn.mixers.layers import linear
from tsgdn.mixers.registry import register

POLICIES = ("surprise", "all_linear", "all_attention", "prefix_attention", "random")

_EPS = 1e-6
"""Added to the length of a value before dividing by it."""
_FEWEST = 3
"""Chunk means that must be known before their deviation is trusted."""


class Plan(NamedTuple):
    """The modes so far and what the next one is decided from; one number per row.

    Attributes:
        position: tokens seen.
        mode: of the last token's chunk; 1 = attention.
        budget: chunks that attended.
        surprise_count: chunks in the statistic; a chunk enters when the next one begins, if anything was written in it.
        surprise_mean: of their means.
        surprise_m2: sum of squared deviations from it.
        chunk_sum: surprise of the last token's chunk so far.
        chunk_count: written tokens in it.
    """

    position: Int64[Tensor, " R"]
    mode: Float[Tensor, " R"]
    budget: Float[Tensor, " R"]
    surprise_count: Float[Tensor, " R"]
    surprise_mean: Float[Tensor, " R"]
    surprise_m2: Float[Tensor, " R"]
    chunk_sum: Float[Tensor, " R"]
    chunk_count: Float[Tensor, " R"]


class OryxState(NamedTuple):
    """What is carried per row: Gated DeltaNet's state, the window (`attention.AttentionState`) and the `Plan`."""

    memory: Float[Tensor, "R H Dk Dv"]
    conv: Float[Tensor, "R W_minus_1 C"]
    keys: Float[Tensor, "R window_minus_1 H Dk"]
    values: Float[Tensor, "R window_minus_1 H Dv"]
    age: Float64[Tensor, "R window_minus_1"]
    position: Int64[Tensor, " R"]
    mode: Float[Tensor, " R"]
    budget: Float[Tensor, " R"]
    surprise_count: Float[Tensor, " R"]
    surprise_mean: Float[Tensor, " R"]
    surprise_m2: Float[Tensor, " R"]
    chunk_sum: Float[Tensor, " R"]
    chunk_count: Float[Tensor, " R"]


@register("oryx")
class Oryx(GatedDeltaNet):
    """Mixes tokens along time through a decaying memory, or by attention to the last tokens where that fails.

    With policy "all_linear" it is GatedDeltaNet. `policy`, `budget`, `threshold`, `prefix` and `seed` are plain
    attributes that may be set between calls.

    Args:
        width: of the tokens.
        heads: of queries, keys and values.
        key_dim: per head.
        value_dim: per head; None = key_dim.
        conv: width of the short causal convolution on q, k and v.
        beta_max: 1, or 2 to allow negative eigenvalues.
        window: reach of attention in tokens, the current one included.
        mode_chunk: tokens that share a mode.
        policy: "surprise"; "all_linear"; "all_attention"; "prefix_attention", the first `prefix` chunks attend;
            "random", each chunk attends with probability `budget`, drawn from its number and `seed`.
        budget: share of the chunks that may attend under "surprise", and that do on average under "random".
        train_share: share of the chunks that attend, at random, while a model with policy "surprise" is trained.
        threshold: deviations above the mean at which a chunk is a surprise.
        prefix: chunks that attend under "prefix_attention".
        seed: of the policy "random"; 31 bits.
        rope: share of the key channels that are rotated in attention mode; 0 = no positions.
        rope_base: sets the slowest rotation, see `attention.attend`.
        output_gate: "silu" or "sigmoid", the activation of the gate on what was read.
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
        conv: int = 4,
        beta_max: int | float = 1,
        window: int = 32,
        mode_chunk: int = 16,
        policy: str = "surprise",
        budget: int | float = 0.1,
        train_share: int | float = 0.5,
        threshold: int | float = 1.5,
        prefix: int = 4,
        seed: int = 0,
        rope: int | float = 1.0,
        rope_base: int | float = 10000.0,
        output_gate: str = "silu",
        decay_init: str = "horizon",
        horizon: Sequence[int | float] = (4.0, 1024.0),
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy is {policy!r}; expected one of {', '.join(POLICIES)}")
        if mode_chunk < 1 or window < 1:
            raise ValueError(f"mode_chunk {mode_chunk} and window {window}; expected at least 1 token each")
        for key, share in (("budget", budget), ("train_share", train_share)):
            if not 0 <= share <= 1:
                raise ValueError(f"{key} is {share}; expected a share of the chunks, from 0 to 1")
        if prefix < 0 or not 0 <= seed < 2**31:
            raise ValueError(f"prefix {prefix} and seed {seed}; expected at least 0, and the seed below 2**31")
        if not 0 <= rope <= 1 or rope_base <= 0:
            raise ValueError(f"rope {rope} and rope_base {rope_base}; expected a share in [0, 1] and a number above 0")
        self.window, self.mode_chunk, self.rope, self.rope_base = window, mode_chunk, rope, rope_base
        self.policy, self.budget, self.threshold, self.prefix, self.seed = policy, budget, threshold, prefix, seed
        self.train_share = train_share
        super().__init__(
            width,
            heads=heads,
            key_dim=key_dim,
            value_dim=value_dim,
            conv=conv,
            beta_max=beta_max,
            output_gate=output_gate,
            decay_init=decay_init,
            horizon=horizon,
        )

    def _extend(self, width: int, generator: torch.Generator) -> None:
        self.attention_query = linear(width, self.heads * self.key_dim, generator, width=width)

    def initial_state(self, rows: int, device: torch.device | str | None = None) -> OryxState:
        """Nothing seen yet: zeros."""
        memory, conv = super().initial_state(rows, device)
        sizes = (rows, self.heads, self.key_dim, self.value_dim)
        ring = empty_state(*sizes, window=self.window, dtype=memory.dtype, device=memory.device)
        position = torch.zeros(rows, dtype=torch.int64, device=memory.device)
        return OryxState(memory, conv, *ring, position, *(memory.new_zeros(rows) for _ in Plan._fields[1:]))

    def state_bytes(self, tokens: int = 0) -> int:
        """Bytes of a row's state in float32, the same after any number of tokens."""
        entry = 4 * self.heads * (self.key_dim + self.value_dim) + 8
        return super().state_bytes() + (self.window - 1) * entry + 8 + 4 * (len(Plan._fields) - 1)

    def forward(
        self,
        x: Float[Tensor, "R N D"],
        state: OryxState | None = None,
        *,
        write: Shaped[Tensor, "R N"] | None = None,
        gap: Real[Tensor, "R N"] | None = None,
        lengths: Int64[Tensor, " R"] | None = None,
    ) -> tuple[Float[Tensor, "R N D"], OryxState]:
        """Continues the streams of R rows by N >= 0 tokens; the arguments are those of `GatedDeltaNet.forward`.

        A token of `write` 0 counts in its chunk, has no say in its surprise, and is not stored in the window. A gap
        fades the memory and pushes entries out of the window; it is no part of a chunk.
        """
        memory, tail, *rest = self.initial_state(x.shape[0], x.device) if state is None else state
        ring, plan = AttentionState(*rest[:3]), Plan(*rest[3:])
        linear_only = self.policy == "all_linear"
        stream: dict[str, Any] = {"write": write, "gap": gap, "lengths": lengths}
        done = self._pass(x, memory, tail, **stream, residual=True, gated=linear_only)
        valid = x.new_ones(x.shape[:2], dtype=torch.bool) if lengths is None else within(lengths, x.shape[1])
        written = valid if write is None else valid & (write > 0)
        attends, plan = self._decide(_surprise(done), written, valid, plan)
        read, key, value = done.read, done.key.to(memory.dtype), done.value.to(memory.dtype)
        if linear_only:
            ring = remember(key, value, ring, window=self.window, **stream)
        else:
            query = self.attention_query(x).unflatten(-1, (self.heads, self.key_dim)).to(memory.dtype)
            looked, ring = attend(
                query, key, value, ring, window=self.window, **stream, rope=self.rope, rope_base=self.rope_base
            )
            read = torch.where(attends[..., None, None], looked.to(read.dtype), read)
            with torch.autocast(x.device.type, enabled=False):
                gate, weight, eps, activation, norm_first = self._readout(done.gate)
                read = readout(read, gate, weight, eps=eps, activation=activation, norm_first=norm_first)
        return self.output(read.flatten(-2)), OryxState(done.memory, done.conv, *ring, *plan)

    def _decide(
        self,
        surprise: Float[Tensor, "R N"],
        written: Bool[Tensor, "R N"],
        valid: Bool[Tensor, "R N"],
        plan: Plan,
    ) -> tuple[Bool[Tensor, "R N"], Plan]:
        """Which tokens attend, and the plan after the last. Chunk k is the k-th that a row touches in this call."""
        (R, N), size, wide = surprise.shape, self.mode_chunk, plan.mode.dtype
        if N == 0:
            return valid, plan
        position, mode, spent, *carried = (leaf if leaf.dtype == torch.int64 else leaf.double() for leaf in plan)
        count, mean, m2, chunk_sum, chunk_count = (leaf[:, None] for leaf in carried)
        tokens, offset = valid.sum(1)[:, None], (position % size)[:, None]
        chunks = (N + size - 2) // size + 1  # touched at most, wherever a row stands in its chunk
        chunk = torch.arange(chunks, device=surprise.device)
        number = (position // size)[:, None] + chunk  # in the stream
        begins = (chunk * size >= offset) & (chunk * size < offset + tokens)

        # Tokens laid out by chunk; the first one may go on from the call before.
        place = torch.arange(chunks * size, device=surprise.device) - offset
        inside = (place >= 0) & (place < tokens)
        place = place.clamp(0, N - 1)
        inside = inside & written.gather(1, place)
        laid = torch.where(inside, surprise.double().gather(1, place), 0.0)
        goes_on = torch.where(offset > 0, 1.0, 0.0)
        sums, counts = laid.view(R, chunks, size).sum(2), inside.view(R, chunks, size).sum(2).double()
        sums = torch.cat([sums[:, :1] + goes_on * chunk_sum, sums[:, 1:]], 1)
        counts = torch.cat([counts[:, :1] + goes_on * chunk_count, counts[:, 1:]], 1)

        # A chunk that begins closes the one before: first it is judged by the chunks before it, then it joins them.
        closed_sum, closed_count = _before(sums, chunk_sum), _before(counts, chunk_count)
        closes = begins & (closed_count > 0)
        error = closed_sum / closed_count.clamp_min(1) - mean
        joins = torch.where(closes, error, 0.0)
        total, squares = joins.cumsum(1), joins.square().cumsum(1)
        counted = count + closes.cumsum(1)
        centre = total / counted.clamp_min(1)  # relative to the carried mean: no digits are lost
        spread = (m2 + squares - total * centre).clamp_min(0)
        before = _before(counted, count), _before(centre, torch.zeros_like(mean)), _before(spread, m2)
        deviation = (before[2] / (before[0] - 1).clamp_min(1)).sqrt()
        surprised = closes & (before[0] >= _FEWEST) & (error > before[1] + self.threshold * deviation)

        on = self._modes(number, surprised, begins, spent[:, None])
        if not self.policy.startswith("all_"):
            on = torch.where(begins, on, mode[:, None] > 0)  # only the first can be one that has begun before
        last = (offset + tokens - 1).clamp_min(0) // size
        some = tokens[:, 0] > 0

        def at_last(leaf: Tensor, old: Tensor) -> Tensor:
            return torch.where(some, leaf.gather(1, last)[:, 0], old)

        after = (
            at_last(on.double(), mode),
            spent + (on & begins).sum(1),
            counted[:, -1],
            (mean + centre)[:, -1],
            spread[:, -1],
            at_last(sums, chunk_sum[:, 0]),
            at_last(counts, chunk_count[:, 0]),
        )
        of_token = (torch.arange(N, device=surprise.device) + offset) // size
        return on.gather(1, of_token), Plan(position + tokens[:, 0], *(leaf.to(wide) for leaf in after))

    def _modes(self, number: Tensor, surprised: Tensor, begins: Tensor, spent: Tensor) -> Tensor:
        if self.policy in ("all_linear", "all_attention"):
            return torch.full_like(begins, self.policy == "all_attention")
        if self.policy == "prefix_attention":
            return number < self.prefix
        if self.policy == "random" or self.training:
            share = self.budget if self.policy == "random" else self.train_share
            return _hash(number, self.seed) < share * 2**31
        # spent_k = min(spent_{k-1} + wanted_k, most_k), where most never falls: as cumulative sums and minima. A row
        # that spent more under another policy waits.
        most = (self.budget * (number + 1).double() - 1e-9).ceil().maximum(spent)
        wanted = surprised.cumsum(1)
        after = wanted + (most - wanted).cummin(1).values.minimum(spent)
        return after > _before(after, spent)


def _surprise(done: Pass) -> Tensor:
    """How much of each value the memory did not know, (R, N); unwritten tokens get a number without meaning."""
    assert done.residual is not None
    with torch.no_grad():
        wide = done.memory.dtype
        missed, value = done.residual.to(wide).norm(dim=-1), done.value.to(wide).norm(dim=-1)
        return (missed / (done.beta.to(wide) * (value + _EPS)).clamp_min(1e-30)).mean(-1)


def _before(sums: Tensor, first: Tensor) -> Tensor:
    """The same one place later."""
    return torch.cat([first, sums[:, :-1]], 1)


def _hash(number: Tensor, seed: int) -> Tensor:
    """31 bits that look random, of a chunk's number and the seed; no product leaves the range of int64."""
    mask = 2**31 - 1
    h = (number & mask) ^ ((seed * 0x3C6EF372 + 0x5BD1E995) & mask)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x2C1B3C6D), (12, 0x297A2D39)):
        h = ((h ^ (h >> shift)) * factor) & mask
    return h ^ (h >> 15)
