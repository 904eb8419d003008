"""sLSTM as a mixer: exponential gates, a normaliser, and hidden units that hear each other within a head.

Serial in time. Per token:

    i, f, z, o = W x + U h + b                        U block-diagonal: one block per head
    m' = max(i, m + log sigmoid(f))
    c' = exp(m + log sigmoid(f) - m') c + exp(i - m') tanh(z)
    n' = exp(m + log sigmoid(f) - m') n + exp(i - m');    h' = sigmoid(o) c' / n';    y = Wo h'

The true cell is exp(m) c and the true normaliser exp(m) n; the stabiliser m keeps both in range and cancels in h. Where
n = 0 nothing was seen, and m' = i: zeros are the state before the first token. After it n >= 1.

Silence of `gap` patches fades the hidden vector and the true cell by exp(gap · rate), and the true normaliser with the
cell, as a forget gate would: m <- m + gap · rate, c and n stay. So two silences add up, nothing underflows, what was
stored is not diluted with zeros but gives way to what comes next, and after an endless silence the stream begins anew.

Source: sLSTM as in TiRex, arXiv 2505.23719; gaps and the horizon initialisation of the forget gates are ours.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Real, Shaped
from torch import Tensor, nn

from tsgdn.kernels import within
from tsgdn.mixers.layers import draws, linear, scale_output, undecayed, uniform
from tsgdn.mixers.memory import draw_decay
from tsgdn.mixers.registry import register


class SLSTMState(NamedTuple):
    """What is carried per row: four vectors, named as in the equations h, c, n, m; n = 0 where nothing was seen."""

    hidden: Float[Tensor, "R H"]
    cell: Float[Tensor, "R H"]
    normaliser: Float[Tensor, "R H"]
    stabiliser: Float[Tensor, "R H"]


@register("slstm")
class SLSTM(nn.Module):
    """Mixes tokens along time through one hidden vector and weighted means of what entered.

    Args:
        width: of the tokens.
        heads: blocks of hidden units; units of different heads do not hear each other.
        hidden: size of the hidden vector, a multiple of `heads`; None = width.
        decay_init: of the forget gates and of the rates of silence, which start equal; see `memory.draw_decay`.
        horizon: shortest and longest initial memory in tokens, for the horizon initialisations.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int = 2,
        hidden: int | None = None,
        decay_init: str = "horizon",
        horizon: Sequence[int | float] = (4.0, 1024.0),
    ) -> None:
        super().__init__()
        hidden = hidden or width
        if hidden % heads:
            raise ValueError(f"hidden {hidden} is not a multiple of heads {heads}")
        self.hidden, self.heads, each = hidden, heads, hidden // heads
        generator = draws()
        _, _, rate_log = draw_decay(hidden, generator, decay_init, horizon)
        # Rows of the weights: head by head its units' input, forget, cell and output gates.
        self.weight_ih = uniform((4 * hidden, width), hidden**-0.5, generator)
        self.weight_hh = uniform((heads, each, 4 * each), each**-0.5, generator)
        self.bias = undecayed(uniform((4 * hidden,), hidden**-0.5, generator).data)
        self.output = linear(hidden, width, generator, width=width)
        self.rate_log = undecayed(rate_log)
        with torch.no_grad():
            rate = rate_log.double().exp()
            forget = -torch.log(torch.expm1(rate))  # log sigmoid of it is -rate
            self.bias.view(heads, 4, each)[:, 1] = forget.view(heads, each).to(self.bias.dtype)

    def scale_output(self, depth: int) -> None:
        """Divides the output projection by sqrt(2·depth)."""
        scale_output(self.output, depth)

    @property
    def rate(self) -> Float[Tensor, " H"]:
        """Log decay of each hidden unit per patch of silence, at most 0."""
        return -self.rate_log.exp()

    def initial_state(self, rows: int, device: torch.device | str | None = None) -> SLSTMState:
        """Nothing seen yet: zeros."""
        weight = self.weight_hh
        dtype = torch.promote_types(weight.dtype, torch.float32)
        leaves = (torch.zeros(rows, self.hidden, dtype=dtype, device=device or weight.device) for _ in range(4))
        return SLSTMState(*leaves)

    def state_bytes(self, tokens: int = 0) -> int:
        """Bytes of a row's state in float32, the same after any number of tokens."""
        return 16 * self.hidden

    def forward(
        self,
        x: Float[Tensor, "R N D"],
        state: SLSTMState | None = None,
        *,
        write: Shaped[Tensor, "R N"] | None = None,
        gap: Real[Tensor, "R N"] | None = None,
        lengths: Int64[Tensor, " R"] | None = None,
    ) -> tuple[Float[Tensor, "R N D"], SLSTMState]:
        """Continues the streams of R rows by N >= 0 tokens; the arguments are those of `GatedDeltaNet.forward`.

        `write` is taken and ignored, as by the GRU: an unobserved token updates as any other. A gap fades what the
        module's text says before the token enters. The stabiliser is handed on without a gradient: in the outputs it
        cancels.
        """
        N = x.shape[1]
        state = self.initial_state(x.shape[0], x.device) if state is None else state
        hidden, cell, norm, top = (self._by_head(leaf) for leaf in state)
        # Every token's share in one product; the bias apart, as bfloat16 would round long horizons.
        raw = self._by_head(F.linear(x, self.weight_ih).to(hidden.dtype) + self.bias).contiguous().unbind(0)
        fade = quiet = valid = None
        if gap is not None:
            patches = gap.to(hidden.dtype)[..., None] * self.rate
            fade, quiet = self._by_head(patches.exp()), self._by_head(patches)
        if lengths is not None:
            valid = within(lengths, N).t()[:, None, :, None]
        # Minus infinity says once what n = 0 would have to say at every step: nothing is kept, and m' = i.
        top = top.masked_fill(norm == 0, -torch.inf)
        outputs = []
        with torch.autocast(x.device.type, enabled=False):
            for n in range(N):
                before = hidden if fade is None else hidden * fade[n]
                enter, forget, new, out = torch.baddbmm(raw[n], before, self.weight_hh).chunk(4, dim=-1)
                kept = top + F.logsigmoid(forget)
                if quiet is not None:
                    kept = kept + quiet[n]
                highest = torch.maximum(enter.detach(), kept.detach())
                keep, add = torch.exp(kept - highest), torch.exp(enter - highest)
                after = torch.addcmul(keep * cell, add, torch.tanh(new)), torch.addcmul(add, keep, norm)
                said = torch.sigmoid(out) * after[0] / after[1]
                outputs.append(said)
                if valid is None:
                    hidden, (cell, norm), top = said, after, highest
                else:
                    ends = zip((said, *after, highest), (hidden, cell, norm, top), strict=True)
                    hidden, cell, norm, top = (torch.where(valid[n], a, b) for a, b in ends)
        top = top.masked_fill(norm == 0, 0.0)
        read = torch.stack(outputs).permute(2, 0, 1, 3).flatten(-2) if outputs else x.new_zeros(len(x), 0, self.hidden)
        return self.output(read), SLSTMState(*(leaf.transpose(0, 1).flatten(-2) for leaf in (hidden, cell, norm, top)))

    def _by_head(self, x: Tensor) -> Tensor:
        """(R, [N,] H · each) as ([N,] H, R, each), as the loop over time reads it."""
        x = x.unflatten(-1, (self.heads, -1))
        return x.transpose(0, 1) if x.dim() == 3 else x.permute(1, 2, 0, 3)
