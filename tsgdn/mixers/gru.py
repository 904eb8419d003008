"""A gated recurrent unit as a mixer: the humble control, serial in time.

The cell is that of torch.nn.GRU and takes its parameters by the same names; a hidden vector is all that is carried.
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


class GRUState(NamedTuple):
    """What is carried per row: the hidden vector."""

    hidden: Float[Tensor, "R H"]


@register("gru")
class GRU(nn.Module):
    """Mixes tokens along time through one hidden vector.

    Args:
        width: of the tokens.
        hidden: size of the hidden vector; None = width.
        decay_init: of the rates at which silence fades the hidden vector; see `memory.draw_decay`.
        horizon: shortest and longest initial horizon of these rates, in patches of silence.
    """

    def __init__(
        self,
        width: int,
        *,
        hidden: int | None = None,
        decay_init: str = "horizon",
        horizon: Sequence[int | float] = (4.0, 1024.0),
    ) -> None:
        super().__init__()
        hidden = hidden or width
        self.hidden = hidden
        generator = draws()
        _, _, rate_log = draw_decay(hidden, generator, decay_init, horizon)
        self.weight_ih = uniform((3 * hidden, width), hidden**-0.5, generator)
        self.weight_hh = uniform((3 * hidden, hidden), hidden**-0.5, generator)
        self.bias_ih = uniform((3 * hidden,), hidden**-0.5, generator)
        self.bias_hh = uniform((3 * hidden,), hidden**-0.5, generator)
        self.output = linear(hidden, width, generator, width=width)
        self.rate_log = undecayed(rate_log)

    def scale_output(self, depth: int) -> None:
        """Divides the output projection by sqrt(2·depth)."""
        scale_output(self.output, depth)

    @property
    def rate(self) -> Float[Tensor, " H"]:
        """Log decay of each hidden unit per patch of silence, at most 0."""
        return -self.rate_log.exp()

    def initial_state(self, rows: int, device: torch.device | str | None = None) -> GRUState:
        """Nothing seen yet: zeros."""
        weight = self.weight_hh
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return GRUState(torch.zeros(rows, self.hidden, dtype=dtype, device=device or weight.device))

    def state_bytes(self, tokens: int = 0) -> int:
        """Bytes of a row's state in float32."""
        return 4 * self.hidden

    def forward(
        self,
        x: Float[Tensor, "R N D"],
        state: GRUState | None = None,
        *,
        write: Shaped[Tensor, "R N"] | None = None,
        gap: Real[Tensor, "R N"] | None = None,
        lengths: Int64[Tensor, " R"] | None = None,
    ) -> tuple[Float[Tensor, "R N D"], GRUState]:
        """Continues the streams of R rows by N >= 0 tokens; the arguments are those of `GatedDeltaNet.forward`.

        `write` is taken and ignored: an unobserved token updates as any other, since the cell has no write of its own.
        A gap fades the hidden vector by exp(gap·rate) before the token enters.
        """
        N = x.shape[1]
        hidden = (self.initial_state(x.shape[0], x.device) if state is None else state).hidden
        fade = None if gap is None else torch.exp(gap.to(hidden.dtype)[..., None] * self.rate)
        valid = None if lengths is None else within(lengths, N)[..., None]
        raw = F.linear(x, self.weight_ih, self.bias_ih).to(hidden.dtype)  # every token's share in one product
        outputs = []
        with torch.autocast(x.device.type, enabled=False):
            for n in range(N):
                before = hidden if fade is None else hidden * fade[:, n]
                reset_in, update_in, new_in = raw[:, n].chunk(3, dim=-1)
                own = F.linear(before, self.weight_hh, self.bias_hh)
                reset_own, update_own, new_own = own.chunk(3, dim=-1)
                update = torch.sigmoid(update_in + update_own)
                new = torch.tanh(new_in + torch.sigmoid(reset_in + reset_own) * new_own)
                after = torch.lerp(new, before, update)
                hidden = after if valid is None else torch.where(valid[:, n], after, hidden)
                outputs.append(after)
        read = torch.stack(outputs, dim=1) if outputs else raw[..., : self.hidden]
        return self.output(read), GRUState(hidden)
