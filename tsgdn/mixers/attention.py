"""Softmax attention along time as a mixer: over a sliding window, or over all that was seen and gated.

    q_n = norm(Wq x_n);   k_n = norm(Wk x_n);   v_n = Wv x_n;   t_n = t_{n-1} + 1 + gap_n
    o_n = sum_s p_ns v_s,   p_ns = softmax over s of  q_n · Rot(t_n - t_s) k_s / sqrt(Dk),
        over s <= n that were written and lie within reach: t_n - t_s < window
    sliding_window_attention:  y = Wo o          gated_attention:  y = Wo [o · sigmoid(Wg x)], no end to its reach

What is carried are the keys, unrotated, the values, and how long ago each was written. Positions enter as differences
of time alone, so a stream of any length is exact, and silence takes time like tokens do: it pushes entries out of
reach. Unwritten tokens take time and read; they are never read.

Sources: rotary positions arXiv 2104.09864; the gated form is that of Qwen3-Next, the ungated one that of Olmo Hybrid
(arXiv 2604.03444). Real-valued time, gaps and unwritten tokens are ours.

`attend`, `remember`, `read` and `rotate` are functions of tensors: other mixers are built on them.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64, Real, Shaped
from torch import Tensor, nn

from tsgdn.kernels import within
from tsgdn.kernels.replicas import rowwise
from tsgdn.mixers.layers import RMSNorm, draws, linear, scale_output
from tsgdn.mixers.registry import register

_TICK = 2.0**20
"""Gaps are rounded to 1 / _TICK of a patch: sums of times are then exact, so no cut can move an entry over the edge."""
_LONGEST = 2.0**32
"""A longer silence counts as this one: up to here float64 holds every multiple of a tick."""
_BLOCK = 64
"""Queries that share their candidates, at least; a window's cost per token is that of window + block candidates."""
_FULL_BLOCK = 512
"""The same without a window: bounds the memory of the mask."""
_LAUNCH = 65535
"""More in one batch than this CUDA's kernels refuse to start (pytorch/pytorch #142228)."""


class AttentionState(NamedTuple):
    """What is carried per row: n entries, oldest first; those a row has not filled come last and are zero.

    Attributes:
        keys: as written, unrotated.
        values: as written.
        age: time from the entry to the last token seen, plus 1: its distance to the next token if no silence comes
            between. 0 = empty.
    """

    keys: Float[Tensor, "R n Hkv D"]
    values: Float[Tensor, "R n Hkv Dv"]
    age: Float64[Tensor, "R n"]


def empty_state(
    rows: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    *,
    window: int | None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> AttentionState:
    """Nothing seen yet: zeros, window - 1 empty entries; without a window no entries."""
    n = 0 if window is None else window - 1
    return AttentionState(
        torch.zeros(rows, n, kv_heads, key_dim, dtype=dtype, device=device),
        torch.zeros(rows, n, kv_heads, value_dim, dtype=dtype, device=device),
        torch.zeros(rows, n, dtype=torch.float64, device=device),
    )


def attend(
    q: Float[Tensor, "R N H D"],
    k: Float[Tensor, "R N Hkv D"],
    v: Float[Tensor, "R N Hkv Dv"],
    state: AttentionState | None = None,
    *,
    window: int | None,
    write: Shaped[Tensor, "R N"] | None = None,
    gap: Real[Tensor, "R N"] | None = None,
    lengths: Int64[Tensor, " R"] | None = None,
    rope: int | float = 0.0,
    rope_base: int | float = 10000.0,
    scale: float | None = None,
) -> tuple[Float[Tensor, "R N H Dv"], AttentionState]:
    """Causal softmax attention of N >= 0 tokens to themselves and to the entries of `state`; see the module's text.

    Work is linear in N under a window. Autocast is off inside.

    Args:
        q: queries; head h reads key head h // (H / Hkv).
        k: keys, unrotated.
        v: values.
        state: after the tokens before, never changed; None = nothing seen yet.
        window: reach in tokens, the current one included; None = everything.
        write: above 0 the token is stored, at 0 it takes time and reads, but nobody reads it, itself included.
        gap: patches of silence before the token, >= 0, rounded to 2**-20.
        lengths: tokens of each row; those beyond take no time, are not stored, and their outputs mean nothing.
        rope: share of the key channels that are rotated, 0 = no positions; rounded down to an even number of channels.
        rope_base: the slowest rotation takes 2π·rope_base patches, nearly.
        scale: of the scores; None = D**-0.5.

    Returns:
        What was read, zero where nothing could be, in float32 or wider; and the state after the last token, see
        `remember`.

    Raises:
        ValueError: sizes that do not fit.
    """
    H, kv_heads = q.shape[2], k.shape[2]
    if H % kv_heads:
        raise ValueError(f"{H} heads of queries over {kv_heads} of keys; the first must be a multiple of the second")

    fn = partial(_attend, window=window, rope=rope, rope_base=rope_base, scale=scale)
    return rowwise(fn, (q, k, v, state, write, gap, lengths))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: AttentionState | None,
    *stream: Tensor | None,
    window: int | None,
    rope: int | float,
    rope_base: int | float,
    scale: float | None,
) -> tuple[Tensor, AttentionState]:
    state = _checked(k, v, state, window)
    if q.shape[1] == 0:
        return state.values.new_zeros(q.shape[0], 0, q.shape[2], v.shape[3]), state
    with torch.autocast(q.device.type, enabled=False):
        entries = _candidates(k, v, state, window, *stream)
        return _look_up(q, entries, window, rope, rope_base, scale), _kept(entries, window)


def remember(
    k: Float[Tensor, "R N Hkv D"],
    v: Float[Tensor, "R N Hkv Dv"],
    state: AttentionState | None = None,
    *,
    window: int | None,
    write: Shaped[Tensor, "R N"] | None = None,
    gap: Real[Tensor, "R N"] | None = None,
    lengths: Int64[Tensor, " R"] | None = None,
) -> AttentionState:
    """The state that `attend` returns with the same arguments, without reading.

    It holds the written entries that a next token without silence before it would reach (age < window): at most
    window - 1, of which there is always room for all. Without a window it has as many entries as the fullest row.
    """
    return rowwise(partial(_remember, window=window), (k, v, state, write, gap, lengths))


def _remember(
    k: Tensor, v: Tensor, state: AttentionState | None, *stream: Tensor | None, window: int | None
) -> AttentionState:
    state = _checked(k, v, state, window)
    return _kept(_candidates(k, v, state, window, *stream), window) if k.shape[1] else state


def read(
    q: Float[Tensor, "B L H D"],
    k: Float[Tensor, "B S Hkv D"],
    v: Float[Tensor, "B S Hkv Dv"],
    visible: Bool[Tensor, "B L S"],
    *,
    scale: float | None = None,
    bias: Float[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B L H Dv"]:
    """Softmax attention of L queries to those of S candidates that each may see; zero where that is none.

    Args:
        q: queries; head h reads key head h // (H / Hkv).
        k: keys.
        v: values.
        visible: which query sees which candidate, the same in all heads.
        scale: of the scores; None = D**-0.5.
        bias: added to every score of a candidate.
    """
    B, L, H, D = q.shape
    S, kv_heads, values = v.shape[1:]
    wide = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
    if 0 in (B, L, S):
        return torch.zeros(B, L, H, values, dtype=wide, device=q.device)
    group = H // kv_heads  # the heads of a group are further queries to one key head
    q = q.to(wide).view(B, L, kv_heads, group, D).permute(0, 2, 3, 1, 4).reshape(B, kv_heads, group * L, D)
    k, v = k.to(wide).transpose(1, 2), v.to(wide).transpose(1, 2)
    sees = visible.any(-1, keepdim=True)
    mask = visible | ~sees  # a softmax over nothing is 0 / 0: such a query reads everything, and that is thrown away
    if bias is not None:
        mask = bias.to(wide)[:, None].masked_fill(~mask, -torch.inf)
    mask = mask[:, None, None].expand(B, 1, group, L, S).reshape(B, 1, group * L, S)
    with torch.autocast(q.device.type, enabled=False):
        parts = zip(*(x.split(_LAUNCH) for x in (q, k, v, mask)), strict=True)
        outs = [F.scaled_dot_product_attention(*part[:3], attn_mask=part[3], scale=scale) for part in parts]
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    out = out.view(B, kv_heads, group, L, values).permute(0, 3, 1, 2, 4).reshape(B, L, H, values)
    return out * sees[..., None]


def rotate(
    x: Float[Tensor, "R N H D"],
    times: Float64[Tensor, "R N"],
    *,
    fraction: int | float = 1.0,
    base: int | float = 10000.0,
) -> Float[Tensor, "R N H D"]:
    """Rotary positions at real-valued times: products of rotated vectors depend on the difference of their times.

    Channel i of the first `fraction`·D and channel i + half of them turn by times · base^(-i / half). The angles are
    formed in float64: a late time costs no digits.
    """
    half = int(fraction * x.shape[-1] / 2)
    if half == 0:
        return x
    speed = float(base) ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = times[..., None, None] * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)


class _Entries(NamedTuple):
    """Those of the state, then the tokens of the call. Times count from the last token before the call, at 0."""

    keys: Tensor
    values: Tensor
    times: Tensor
    alive: Tensor
    tokens: int


def _candidates(
    k: Tensor,
    v: Tensor,
    state: AttentionState,
    window: int | None,
    write: Tensor | None,
    gap: Tensor | None,
    lengths: Tensor | None,
) -> _Entries:
    rows, tokens = k.shape[:2]
    step = torch.ones(rows, tokens, dtype=torch.float64, device=k.device)
    written = torch.ones_like(step, dtype=torch.bool) if write is None else write > 0
    if gap is not None:
        # Beyond the window nothing is left to be told apart; the bound keeps times small, hence angles exact.
        longest = _LONGEST if window is None else float(window)
        step = step + (gap.double().clamp(0.0, longest) * _TICK).round() / _TICK
    if lengths is not None:
        valid = within(lengths, tokens)
        step, written = step * valid, written & valid
    return _Entries(
        torch.cat([state.keys, k.to(state.keys.dtype)], 1),
        torch.cat([state.values, v.to(state.values.dtype)], 1),
        torch.cat([1 - state.age, step.cumsum(1)], 1),
        torch.cat([state.age > 0, written], 1),
        tokens,
    )


def _look_up(
    q: Tensor,
    entries: _Entries,
    window: int | None,
    rope: int | float,
    rope_base: int | float,
    scale: float | None,
) -> Tensor:
    keys, values, times, alive, N = entries
    stored = keys.shape[1] - N
    now = times[:, stored:]
    q = rotate(q.to(keys.dtype), now, fraction=rope, base=rope_base)
    keys = rotate(keys, times, fraction=rope, base=rope_base)
    if window is None:
        reads = []
        for start in range(0, N, _FULL_BLOCK):
            stop = min(start + _FULL_BLOCK, N)
            earlier = torch.ones(stop - start, stored + stop, dtype=torch.bool, device=q.device).tril(stored + start)
            visible = alive[:, None, : stored + stop] & earlier
            block = (q[:, start:stop], keys[:, : stored + stop], values[:, : stored + stop])
            reads.append(read(*block, visible, scale=scale))
        return torch.cat(reads, 1)

    # Tokens are at least 1 apart, so a query's reach ends within the window - 1 places before its own. Block j of
    # queries therefore needs the places of its own tokens and the `stored` before them, and the blocks go in one call.
    size = min(N, max(window, _BLOCK))
    blocks = -(-N // size)
    rest = blocks * size - N
    earlier = torch.ones(size, stored + size, dtype=torch.bool, device=q.device).tril(stored)

    def own(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0) * (x.dim() - 2) + (0, rest)).reshape(-1, size, *x.shape[2:])

    def near(x: Tensor) -> Tensor:
        if blocks == 1:
            return x
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, rest)).unfold(1, stored + size, size)
        return x.movedim(-1, 2).flatten(0, 1)

    reach = near(times)[:, None] > (own(now) - window)[..., None]
    visible = near(alive)[:, None] & earlier & reach
    out = read(own(q), near(keys), near(values), visible, scale=scale)
    return out.unflatten(0, (q.shape[0], blocks)).flatten(1, 2)[:, :N]


def _kept(entries: _Entries, window: int | None) -> AttentionState:
    keys, values, times, alive, _ = entries
    age = times[:, -1:] - times + 1
    if window is None:
        if keys.is_cuda and torch.cuda.is_current_stream_capturing():
            count = [0, keys.shape[1]]  # room for all: a graph cannot ask
        else:  # the size of the state is the one thing that must be known on the host
            count = alive.sum(1).tolist() or [0]
        n = max(count)
        if min(count) == keys.shape[1]:
            return AttentionState(keys, values, age)
    else:
        alive = alive & (age < window)
        n = window - 1
    # Stable: those that stay come first, in their order.
    alive, order = torch.sort(alive, dim=1, descending=True, stable=True)
    alive, order = alive[:, :n], order[:, :n]
    row = torch.arange(keys.shape[0], device=keys.device)[:, None] * keys.shape[1]

    def chosen(x: Tensor) -> Tensor:
        x = x.flatten(0, 1).index_select(0, (row + order).flatten()).unflatten(0, order.shape)
        return torch.where(alive.view(*order.shape, *(1,) * (x.dim() - 2)), x, 0.0)

    return AttentionState(chosen(keys), chosen(values), chosen(age))


def _checked(k: Tensor, v: Tensor, state: AttentionState | None, window: int | None) -> AttentionState:
    rows, _, kv_heads, key_dim = k.shape
    wide = torch.promote_types(torch.promote_types(k.dtype, v.dtype), torch.float32)
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; expected at least 1, the token itself, or None for no end")
    start = empty_state(rows, kv_heads, key_dim, v.shape[3], window=window, dtype=wide, device=k.device)
    if state is None:
        return start
    n = state.age.shape[1] if window is None else window - 1
    want = (rows, n, kv_heads, key_dim), (rows, n, kv_heads, v.shape[3]), (rows, n)
    got = tuple(tuple(leaf.shape) for leaf in state)
    if got != want:
        raise ValueError(f"the state's keys, values and age are {got}; window {window} and these tokens need {want}")
    if window is None and n:
        # A state may have room to spare (a reset row was the longest); what is computed must not depend on it.
        filled = max((state.age > 0).sum(1).tolist() or [0])
        state = AttentionState(*(leaf[:, :filled] for leaf in state))
    wide = torch.promote_types(wide, state.keys.dtype)
    return AttentionState(state.keys.to(wide), state.values.to(wide), state.age)


class _ZeroCentredRMSNorm(nn.Module):
    """Division by the root mean square over the last dimension, then a gain of 1 + weight.

    The weight is open to weight decay, which draws the gain to 1: that is what the centring is for.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*any D"]) -> Float[Tensor, "*any D"]:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (1 + self.weight)


class _AttentionMixer(nn.Module):
    """Projections, state and sizes of the two mixers."""

    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None,
        key_dim: int,
        value_dim: int | None,
        window: int | None,
        rope: int | float,
        rope_base: int | float,
        *,
        gate: bool,
    ) -> None:
        super().__init__()
        kv_heads, value_dim = kv_heads or heads, value_dim or key_dim
        if heads % kv_heads:
            raise ValueError(f"heads {heads} is not a multiple of kv_heads {kv_heads}")
        if window is not None and window < 1:
            raise ValueError(f"window is {window}; expected at least 1, the token itself")
        if not 0 <= rope <= 1 or rope_base <= 0:
            raise ValueError(f"rope {rope} and rope_base {rope_base}; expected a share in [0, 1] and a number above 0")
        self.heads, self.kv_heads, self.key_dim, self.value_dim = heads, kv_heads, key_dim, value_dim
        self.window, self.rope, self.rope_base = window, rope, rope_base
        self.sizes = [heads * key_dim, kv_heads * key_dim, kv_heads * value_dim, heads * value_dim if gate else 0]
        generator = draws()
        self.project = linear(width, sum(self.sizes), generator, width=width)
        self.output = linear(heads * value_dim, width, generator, width=width)

    def scale_output(self, depth: int) -> None:
        """Divides the output projection by sqrt(2·depth)."""
        scale_output(self.output, depth)

    def initial_state(self, rows: int, device: torch.device | str | None = None) -> AttentionState:
        """Nothing seen yet: zeros."""
        weight = self.output.weight
        return empty_state(
            rows,
            self.kv_heads,
            self.key_dim,
            self.value_dim,
            window=self.window,
            dtype=torch.promote_types(weight.dtype, torch.float32),
            device=device or weight.device,
        )

    def state_bytes(self, tokens: int = 0) -> int:
        """Bytes of a row's state in float32 after so many written tokens; ages take 8 bytes each."""
        entries = tokens if self.window is None else self.window - 1
        return entries * (4 * self.kv_heads * (self.key_dim + self.value_dim) + 8)

    def forward(
        self,
        x: Float[Tensor, "R N D"],
        state: AttentionState | None = None,
        *,
        write: Shaped[Tensor, "R N"] | None = None,
        gap: Real[Tensor, "R N"] | None = None,
        lengths: Int64[Tensor, " R"] | None = None,
    ) -> tuple[Float[Tensor, "R N D"], AttentionState]:
        """Continues the streams of R rows by N >= 0 tokens; the arguments are those of `GatedDeltaNet.forward`.

        A token of `write` 0 takes time and reads, and is not stored; any `write` above 0 stores it. A gap adds to the
        distance of all that came before.
        """
        projected = self.project(x)
        with torch.autocast(x.device.type, enabled=False):  # norms, softmax and the state stay in float32
            wide = projected.to(torch.promote_types(projected.dtype, torch.float32))
            q, k, v, gate = wide.split(self.sizes, dim=-1)
            q, k = self._normed(q, k)
            o, state = attend(
                q,
                k,
                v.unflatten(-1, (self.kv_heads, self.value_dim)),
                state,
                window=self.window,
                write=write,
                gap=gap,
                lengths=lengths,
                rope=self.rope,
                rope_base=self.rope_base,
            )
            o = o.flatten(-2)
            if self.sizes[-1]:
                o = o * torch.sigmoid(gate)
        return self.output(o.to(projected.dtype)), state

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = q.unflatten(-1, (self.heads, self.key_dim)), k.unflatten(-1, (self.kv_heads, self.key_dim))
        return self.q_norm(q), self.k_norm(k)


@register("sliding_window_attention")
class SlidingWindowAttention(_AttentionMixer):
    """Mixes tokens along time by softmax attention to the last few of them; exact memory, and none beyond.

    Args:
        width: of the tokens.
        heads: of queries.
        kv_heads: of keys and values, a divisor of `heads`; groups of heads share them. None = heads.
        key_dim: per head.
        value_dim: per head; None = key_dim.
        window: reach in tokens, the current one included.
        rope: share of the key channels that carry positions; 0 = none.
        rope_base: sets the slowest rotation, see `attend`.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int = 2,
        kv_heads: int | None = None,
        key_dim: int = 32,
        value_dim: int | None = None,
        window: int = 32,
        rope: int | float = 1.0,
        rope_base: int | float = 10000.0,
    ) -> None:
        super().__init__(width, heads, kv_heads, key_dim, value_dim, window, rope, rope_base, gate=False)
        self.q_norm, self.k_norm = RMSNorm(key_dim), RMSNorm(key_dim)


@register("gated_attention")
class GatedAttention(_AttentionMixer):
    """Mixes tokens along time by softmax attention to all of them. Forgets nothing: its state grows with the stream.

    Args:
        width: of the tokens.
        heads: of queries.
        kv_heads: of keys and values, a divisor of `heads`; groups of heads share them. None = heads.
        key_dim: per head.
        value_dim: per head; None = key_dim.
        style: "qwen": what was read is multiplied by sigmoid(Wg x), queries and keys are normed per head with gains
            1 + w. "olmo": no gate, queries and keys are normed over all heads at once.
        rope: share of the key channels that carry positions (upstream: 0.25 in Qwen3-Next); 0 = none, which any length
            of stream leaves in the range that was trained.
        rope_base: sets the slowest rotation, see `attend`.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int = 2,
        kv_heads: int | None = None,
        key_dim: int = 32,
        value_dim: int | None = None,
        style: str = "qwen",
        rope: int | float = 0.0,
        rope_base: int | float = 10000.0,
    ) -> None:
        if style not in ("qwen", "olmo"):
            raise ValueError(f"style is {style!r}; expected qwen or olmo")
        super().__init__(width, heads, kv_heads, key_dim, value_dim, None, rope, rope_base, gate=style == "qwen")
        self.style = style
        if style == "qwen":
            self.q_norm, self.k_norm = _ZeroCentredRMSNorm(key_dim), _ZeroCentredRMSNorm(key_dim)
        else:
            self.q_norm, self.k_norm = RMSNorm(self.sizes[0]), RMSNorm(self.sizes[1])

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.style == "qwen":
            return super()._normed(q, k)
        q, k = self.q_norm(q), self.k_norm(k)
        return q.unflatten(-1, (self.heads, self.key_dim)), k.unflatten(-1, (self.kv_heads, self.key_dim))
