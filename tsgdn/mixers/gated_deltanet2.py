"""Gated DeltaNet-2 as a mixer: a token erases by key channel and writes by value channel.

    q, k, v and log_decay (per key channel) as in `tsgdn.mixers.kda`
    b = beta_max sigmoid(Wb x)  [Dk per head];   w = sigmoid(Ww x)  [Dv per head]
    S <- Diag(exp(log_decay)) S;   S <- S + k (w · v - S^T (b · k))^T;   o = S^T q
    y = Wo [RMSNorm(o) · SiLU(Wg x)]

With b = w = beta this is KDA's memory. Where b is not constant over the channels, I - k (b · k)^T is not symmetric:
its eigenvalues lie in [0, 1] (beta_max 1), but it can lengthen a vector by up to 2 / sqrt(3), and a product of such
factors can do so without end. Two keys of two channels that take turns, each erasing by its small channel alone, make
the memory grow by sqrt(5) / 2 per token, which only a decay as strong undoes. So watch the memory of long streams.
Source: arXiv 2605.22791; gaps, skipped writes, the horizon initialisation and the remark on products are ours.
"""

from collections.abc import Sequence

from torch import Tensor

from tsgdn.mixers.kda import ChannelwiseMixer
from tsgdn.mixers.registry import register


@register("gated_deltanet2")
class GatedDeltaNet2(ChannelwiseMixer):
    """Mixes tokens along time through a memory whose channels are forgotten, erased and written each on its own.

    Args:
        width: of the tokens.
        heads: of queries and keys.
        key_dim: per head.
        value_dim: per value head, and the rank of the decay; None = key_dim.
        value_heads: a multiple of `heads`; value heads of a group share queries and keys. None = heads.
        conv: width of the short causal convolution on q, k and v.
        beta_max: largest erase strength: 1, or 2 to allow negative eigenvalues. Writes stay within 1.
        output_gate: "silu" or "sigmoid", the activation of the gate on what was read.
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
        output_gate: str = "silu",
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
            low_rank_gate=False,
            norm_before_gate=norm_before_gate,
            decay_init=decay_init,
            horizon=horizon,
        )

    def _strengths(self) -> int:
        return self.value_heads * (self.key_dim + self.value_dim)

    def _erase_and_write(self, strengths: Tensor) -> tuple[Tensor | None, Tensor]:
        keys = self.value_heads * self.key_dim
        erase = strengths[..., :keys].unflatten(-1, (self.value_heads, self.key_dim))
        erase = erase if self.beta_max == 1 else erase * self.beta_max
        return erase, strengths[..., keys:].unflatten(-1, (self.value_heads, self.value_dim))
