"""A bounded store of the tokens that scored best, read by softmax attention: functions of tensors.

    an entry s scores c_s gamma^(age) at time t; age = t - s, silence between them included
    token t: insert it, drop the lowest while there are more than `slots` (of equals the oldest), then read

All scores age alike, so ln c_s - s ln gamma ranks the entries at every time: what was dropped never returns, and s is
in the store at t if s <= t and fewer than `slots` of the tokens up to t rank above it. A block of tokens therefore
needs one comparison of every pair of its candidates, those stored and its own, and no loop over tokens.

Source: the bounded cache of HOLA, arXiv 2607.02303; the age discount, silence and this form are ours.
"""

from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from tsgdn.kernels.replicas import rowwise
from tsgdn.mixers.attention import read


class Store(NamedTuple):
    """What is carried per row: the entries, oldest first; slots not filled come last and are zero.

    Attributes:
        keys: of the entries.
        values: of the entries.
        score: ln c, aged to the last token seen.
        slot_position: the token's position in the stream, plus 1. 0 = empty.
    """

    keys: Float[Tensor, "R slots H Dk"]
    values: Float[Tensor, "R slots Hv Dv"]
    score: Float[Tensor, "R slots"]
    slot_position: Int64[Tensor, "R slots"]


def visible(rank: Float64[Tensor, "R M"], candidate: Bool[Tensor, "R M"], tokens: int, slots: int) -> Tensor:
    """Which of M candidates is in the store after each of the last `tokens` of them has entered: (R, tokens, M).

    The first M - tokens were there before, at most `slots` of them. Of equal rank the later one stays.

    Args:
        rank: what the candidates are ordered by.
        candidate: False = this one is no entry: an empty slot, a token that is not stored.
        tokens: candidates that enter one by one.
        slots: entries that the store holds.
    """
    stored = rank.shape[1] - tokens
    order = torch.arange(rank.shape[1], device=rank.device)
    equal_later = (rank[:, :, None] == rank[:, None]) & (order[:, None] > order)
    above = candidate[:, :, None] & ((rank[:, :, None] > rank[:, None]) | equal_later)  # (R, of, than)
    count = above[:, :stored].sum(1)[:, None] + above[:, stored:].cumsum(1)
    entered = order <= order[stored:, None]
    return (count < slots) & entered & candidate[:, None]


def look_up(
    q: Float[Tensor, "R N H Dk"],
    k: Float[Tensor, "R N H Dk"],
    v: Float[Tensor, "R N Hv Dv"],
    score: Float[Tensor, "R N"],
    store: Store,
    *,
    stored: Bool[Tensor, "R N"],
    elapsed: Float64[Tensor, "R N"],
    position: Int64[Tensor, "R N"],
    log_discount: float = 0.0,
    weighed: bool = False,
    scale: float | None = None,
    block: int = 64,
) -> tuple[Float[Tensor, "R N Hv Dv"], Store]:
    """Each of N >= 0 tokens enters the store, then reads it.

        o_t = softmax over entries s of (scale q_t · k_s [+ aged ln c_s]) v_s, zero while the store is empty

    The choice of the entries carries no gradient; their keys, values and, if `weighed`, scores do.

    Args:
        q: queries.
        k: keys.
        v: values; value head h uses query and key head h // (Hv // H).
        score: ln c of the tokens.
        store: before the first token, never changed.
        stored: False = the token reads, but is not inserted.
        elapsed: time from the token before to this one, which ages all entries before it; 0 for padding.
        position: of the tokens in their streams.
        log_discount: ln gamma, at most 0.
        weighed: add the aged score to the logits.
        scale: of the logits; None = Dk**-0.5.
        block: tokens whose candidates are compared at once; changes rounding and speed only.

    Returns:
        What was read, in the store's dtype, and the store after the last token.
    """
    fn = partial(_look_up, log_discount=log_discount, weighed=weighed, scale=scale, block=block)
    return rowwise(fn, (q, k, v, score, store, stored, elapsed, position))


def _look_up(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Tensor,
    store: Store,
    stored: Tensor,
    elapsed: Tensor,
    position: Tensor,
    *,
    log_discount: float,
    weighed: bool,
    scale: float | None,
    block: int,
) -> tuple[Tensor, Store]:
    heads, slots = k.shape[2], store.score.shape[1]
    wide = store.keys.dtype
    reads = [v.new_zeros(v.shape[0], 0, *v.shape[2:], dtype=wide)]
    for start in range(0, k.shape[1], block):
        part = slice(start, start + block)
        clock = elapsed[:, part].cumsum(1)  # 0 at the last token before the block
        born = torch.cat([torch.zeros_like(store.score, dtype=clock.dtype), clock], 1)
        fresh = torch.cat([store.score, score[:, part].to(wide)], 1)
        keys = torch.cat([store.keys, k[:, part].to(wide)], 1)
        values = torch.cat([store.values, v[:, part].to(wide)], 1)
        places = torch.cat([store.slot_position, position[:, part] + 1], 1)
        candidate = torch.cat([store.slot_position > 0, stored[:, part]], 1)

        rank = fresh.double() - born * log_discount
        seen = visible(rank.detach(), candidate, clock.shape[1], slots)
        # A query's own time shifts all its logits alike, so ranks may stand for the aged scores.
        bias = rank.to(wide) if weighed else None
        # Value heads of a group share weights: they are further channels to one key head.
        out = read(
            q[:, part].to(wide), keys, values.unflatten(2, (heads, -1)).flatten(-2), seen, scale=scale, bias=bias
        )
        reads.append(out.unflatten(-1, (-1, v.shape[3])).flatten(2, 3))

        kept, order = torch.sort(seen[:, -1], dim=1, descending=True, stable=True)  # those that stay first, in order
        kept, order = kept[:, :slots], order[:, :slots]
        aged = (rank + clock[:, -1:] * log_discount).to(wide)
        deep, index = kept[..., None, None], order[..., None, None]
        store = Store(
            torch.where(deep, keys.take_along_dim(index, 1), 0.0),
            torch.where(deep, values.take_along_dim(index, 1), 0.0),
            torch.where(kept, aged.take_along_dim(order, 1), 0.0),
            torch.where(kept, places.take_along_dim(order, 1), 0),
        )
    return torch.cat(reads, 1), store
