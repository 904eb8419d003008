"""RWKV-7's time mixing: a memory with channel-wise decay whose removal key and strength are learned apart.

    s_n = x_n + mix_s (x_{n-1} - x_n)   for s in r, w, k, v, a, g
    r = Wr s_r;   k = Wk s_k;   v = Wv s_v;   log w = -e^(-1/2) sigmoid(lora_w(s_w));   a = sigmoid(lora_a(s_a))
    kap = L2(k · k_k);   p = kap · a;   k~ = k · (1 + (a - 1) · k_a)
    S <- Diag(exp(gap · rate)) S;   S <- Diag(w) S - p (S^T kap)^T + k~ v^T;   o = S^T r
    y = Wo [(GroupNorm(o) + (r · k~ · r_k summed over the head) v) · lora_g(s_g)]

The removal reads the memory before the token's own decay. Our op reads after it, so a token is two sub-steps: decay by
w, read with kap / w and write along p; then write v along k~. A decay never falls below exp(-e^(-1/2)) = 0.545, which
makes the division by it harmless.

Source: RWKV-7 "Goose", arXiv 2503.14456. Gaps, skipped writes and the horizon initialisation are ours. Left out: the
mix of every layer's values with the first layer's, which would be a second input. The channel mixing is the MLP of the
block, as for every mixer here.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Real, Shaped
from torch import Tensor, nn

from tsgdn.kernels import causal_conv, gated_delta_rule, silence, unit_length, within
from tsgdn.mixers.layers import draws, linear, scale_output, undecayed
from tsgdn.mixers.memory import draw_decay
from tsgdn.mixers.registry import register
from tsgdn.mixers.substeps import last, place, weave

STEEPEST = math.exp(-0.5)
"""Bound of the decay per token, in nats: a memory lasts at least e^(1/2) = 1.65 tokens."""

MIX_POWERS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
"""The token shift starts at 1 - (channel / width)^power, as published for the first layer."""

SMALLEST_REMOVAL = 1e-15
"""Floor of `a` where the op's keys are made: it forms kap as erase · p, so a may not vanish.

About a float64's resolution of what p is added to; its square, which the gradient meets, is still a float32.
"""


class RWKV7State(NamedTuple):
    """What is carried per row.

    Attributes:
        memory: key-value memory of each head.
        shift: the last token.
    """

    memory: Float[Tensor, "R H Dk Dv"]
    shift: Float[Tensor, "R D"]


@register("rwkv7")
class RWKV7(nn.Module):
    """Mixes tokens along time as RWKV-7 does.

    Args:
        width: of the tokens.
        heads: each with its own memory.
        key_dim: per head.
        value_dim: per head; None = key_dim.
        lora_rank: of the low-rank maps that give decay, removal strength and output gate; None = 16 up to width 128,
            else 32.
        decay_init: "horizon" (and "horizon_a", the same here): every channel's memory lasts tau tokens, log-uniform in
            `horizon`; "paper" (and "shared"): the spread published for the first layer, from 1100 tokens in the first
            channel to 9 in the last, whatever the seed.
        horizon: shortest and longest initial memory in tokens; a tau below 1.74 becomes 1.74, since no decay of this
            mixer is faster than 1.65.

    Raises:
        ValueError: an argument out of range.
    """

    difference: Tensor

    def __init__(
        self,
        width: int,
        *,
        heads: int = 2,
        key_dim: int = 32,
        value_dim: int | None = None,
        lora_rank: int | None = None,
        decay_init: str = "horizon",
        horizon: Sequence[int | float] = (4.0, 1024.0),
    ) -> None:
        super().__init__()
        value_dim = value_dim or key_dim
        rank = (16 if width <= 128 else 32) if lora_rank is None else lora_rank
        if min(heads, key_dim, value_dim, rank) < 1:
            raise ValueError(
                f"heads {heads}, key_dim {key_dim}, value_dim {value_dim}, lora_rank {rank}; expected all at least 1"
            )
        self.width, self.heads, self.key_dim, self.value_dim = width, heads, key_dim, value_dim
        keys, values = heads * key_dim, heads * value_dim

        generator = draws()
        _, _, rate_log = draw_decay(keys, generator, decay_init, horizon)
        bias, rate_log = _decay_bias(rate_log, decay_init)
        self.receptance = linear(width, keys, generator, width=width)
        self.key = linear(width, keys, generator, width=width)
        self.value = linear(width, values, generator, width=width)
        self.output = linear(values, width, generator, width=width)
        self.lora_w = _LowRank(width, rank, keys, generator, torch.tanh, bias)
        self.lora_a = _LowRank(width, rank, keys, generator, nn.Identity(), torch.zeros(keys))
        self.lora_g = _LowRank(width, rank, values, generator, torch.sigmoid, None)
        ramp = torch.arange(width) / width
        self.mix = undecayed(torch.stack([1 - ramp**power for power in MIX_POWERS.values()]))
        self.k_k = undecayed(torch.full((heads, key_dim), 0.85))
        self.k_a = undecayed(torch.ones(heads, key_dim))
        self.r_k = undecayed(torch.zeros(heads, key_dim))
        self.norm = _HeadNorm(heads, value_dim)
        self.rate_log = undecayed(rate_log.view(heads, key_dim))
        self.register_buffer("difference", torch.tensor([1.0, -1.0]).repeat(width, 1), persistent=False)

    def scale_output(self, depth: int) -> None:
        """Divides the output projection by sqrt(2·depth)."""
        scale_output(self.output, depth)

    @property
    def rate(self) -> Float[Tensor, "H Dk"]:
        """Log decay per patch of silence, at most 0; starts at the channel's initial log decay per token."""
        return -self.rate_log.exp()

    def initial_state(self, rows: int, device: torch.device | str | None = None) -> RWKV7State:
        """Nothing seen yet: zeros."""
        options = {
            "dtype": torch.promote_types(self.mix.dtype, torch.float32),
            "device": device or self.mix.device,
        }
        return RWKV7State(
            torch.zeros(rows, self.heads, self.key_dim, self.value_dim, **options),
            torch.zeros(rows, self.width, **options),
        )

    def state_bytes(self, tokens: int = 0) -> int:
        """Bytes of a row's state in float32, the same after any number of tokens."""
        return 4 * (self.heads * self.key_dim * self.value_dim + self.width)

    def forward(
        self,
        x: Float[Tensor, "R N D"],
        state: RWKV7State | None = None,
        *,
        write: Shaped[Tensor, "R N"] | None = None,
        gap: Real[Tensor, "R N"] | None = None,
        lengths: Int64[Tensor, " R"] | None = None,
    ) -> tuple[Float[Tensor, "R N D"], RWKV7State]:
        """Continues the streams of R rows by N >= 0 tokens; the arguments are those of `GatedDeltaNet.forward`.

        `write` multiplies the removal along p and the write of v alike. A gap fades each channel of the memory by
        exp(gap·rate) before the token, and the token then has no predecessor to be mixed with.
        """
        memory, shift = (None, None) if state is None else state
        by_key, by_value = (self.heads, self.key_dim), (self.heads, self.value_dim)
        valid = None if lengths is None else within(lengths, x.shape[1])
        with torch.autocast(x.device.type, enabled=False):
            restart = None if gap is None else gap > 0
            if restart is not None and valid is not None:
                restart = restart & valid
            back, tail = causal_conv(
                x,
                self.difference,
                state=None if shift is None else shift[:, None],
                lengths=lengths,
                restart=restart,
            )
            s = {name: x + mix * back for name, mix in zip(MIX_POWERS, self.mix, strict=True)}
        receptance = self.receptance(s["r"].to(x.dtype)).unflatten(-1, by_key)
        key = self.key(s["k"].to(x.dtype)).unflatten(-1, by_key)
        value = self.value(s["v"].to(x.dtype)).unflatten(-1, by_value)

        with torch.autocast(x.device.type, enabled=False):  # gates, norms and the memory stay in float32
            log_w = -STEEPEST * torch.sigmoid(self.lora_w(s["w"])).unflatten(-1, by_key)
            a = torch.sigmoid(self.lora_a(s["a"])).unflatten(-1, by_key)
            k = key.to(a.dtype)
            written = k * (1 + (a - 1) * self.k_a)
            strength = a.clamp_min(SMALLEST_REMOVAL)
            removed = unit_length(k * self.k_k) * strength
            erase = torch.exp(-log_w) / strength
            beta = a.new_ones(a.shape[:3])
            if write is not None:
                share = write.to(a.dtype)[..., None]
                erase, beta = erase * share[..., None], beta * share
            log_decay = log_w
            if gap is not None:
                log_decay = log_w + silence(gap, self.rate.flatten()).unflatten(-1, by_key)
            if valid is not None:
                erase, beta = erase * valid[..., None, None], beta * valid[..., None]
                log_decay = torch.where(valid[..., None, None], log_decay, 0.0)
            read, memory = gated_delta_rule(
                place(receptance, 2, 1),
                weave([removed, written]).to(value.dtype),
                place(value, 2, 1),
                log_decay=place(log_decay, 2, 0),
                beta=place(beta, 2, 1),
                erase=place(erase, 2, 0),
                state=memory,
            )
            bonus = (receptance * written * self.r_k).sum(-1, keepdim=True)
            read = (self.norm(last(read, 2)) + bonus * value).flatten(-2) * self.lora_g(s["g"])
        return self.output(read.to(value.dtype)), RWKV7State(memory, tail[:, 0])


class _LowRank(nn.Module):
    def __init__(
        self,
        width: int,
        rank: int,
        outputs: int,
        generator: torch.Generator,
        activation: Callable[[Tensor], Tensor],
        bias: Tensor | None,
    ) -> None:
        super().__init__()
        self.down = linear(width, rank, generator, width=width)
        self.up = linear(rank, outputs, generator, width=width)
        self.bias = None if bias is None else undecayed(bias)
        self.activation = activation

    def forward(self, x: Float[Tensor, "R N D"]) -> Float[Tensor, "R N C"]:
        y = self.up(self.activation(self.down(x.to(self.down.weight.dtype))))
        return y if self.bias is None else y + self.bias


class _HeadNorm(nn.Module):
    # Each head is one group; eps grows with the head as in the source, where it is 64e-5 for 64 channels.
    def __init__(self, heads: int, value_dim: int) -> None:
        super().__init__()
        self.weight = undecayed(torch.ones(heads, value_dim))
        self.bias = undecayed(torch.zeros(heads, value_dim))
        self.eps = 1e-5 * value_dim

    def forward(self, x: Float[Tensor, "R N H Dv"]) -> Float[Tensor, "R N H Dv"]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.layer_norm(wide, wide.shape[-1:], eps=self.eps) * self.weight + self.bias


def _decay_bias(rate_log: Tensor, init: str) -> tuple[Tensor, Tensor]:
    """Bias of lora_w, and the log of the rate of silence that fits it, per channel."""
    if init.startswith("horizon"):
        share = (rate_log.exp() / STEEPEST).clamp_max(0.95)
        bias = share.logit()
    else:
        channel = torch.linspace(0, 1, len(rate_log), dtype=rate_log.dtype)
        bias = -6.5 + 5 * channel**0.85
    return bias, F.logsigmoid(bias) - 0.5
