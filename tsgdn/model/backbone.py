"""Blocks along time: norm, mixer, norm, MLP; every few of them a mixer among variates."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from tsgdn.mixers import build
from tsgdn.mixers.layers import RMSNorm, SwiGLU
from tsgdn.mixers.variates import VariateMixer


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), between them optionally the variates of each time index."""

    def __init__(
        self,
        width: int,
        depth: int,
        mixer: str,
        mixer_args: dict[str, Any],
        mlp_ratio: float,
        variates: bool,
        dropout: float,
    ):
        super().__init__()
        self.norm_mixer = RMSNorm(width)
        self.mixer = build(mixer, width, mixer_args)
        self.norm_variates = RMSNorm(width) if variates else None
        self.variates = VariateMixer(width) if variates else None
        self.norm_mlp = RMSNorm(width)
        self.mlp = SwiGLU(width, int(mlp_ratio * width), dropout=dropout)
        for part in (self.mixer, self.variates, self.mlp):
            if part is not None:
                part.scale_output(depth)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "B V N D"],
        state: Any = None,
        *,
        write: Float[Tensor, "R N"] | None = None,
        gap: Float[Tensor, "R N"] | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B V N D"], Any]:
        """Continues every row (series x variate) by its tokens."""
        shape = x.shape
        y, state = self.mixer(self.norm_mixer(x).flatten(0, 1), state, write=write, gap=gap, lengths=lengths)
        x = x + self.dropout(y.unflatten(0, shape[:2]))
        if self.variates is not None and self.norm_variates is not None and shape[1] > 1:
            x = x + self.dropout(self.variates(self.norm_variates(x)))
        return x + self.dropout(self.mlp(self.norm_mlp(x))), state


class Backbone(nn.Module):
    """A stack of blocks; its state is the tuple of the mixers' states."""

    def __init__(
        self,
        width: int,
        depth: int,
        mixer: str,
        mixer_args: dict[str, Any],
        mlp_ratio: float = 2.0,
        variate_every: int = 2,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(
                width, depth, mixer, mixer_args, mlp_ratio, variate_every > 0 and (i + 1) % variate_every == 0, dropout
            )
            for i in range(depth)
        )
        self.norm = RMSNorm(width)

    def initial_state(self, rows: int, device: Any = None) -> tuple[Any, ...]:
        """Nothing seen yet."""
        return tuple(block.mixer.initial_state(rows, device) for block in self.blocks)  # pyright: ignore

    def forward(
        self, x: Float[Tensor, "B V N D"], state: tuple[Any, ...] | None = None, **time: Tensor | None
    ) -> tuple[Float[Tensor, "B V N D"], tuple[Any, ...]]:
        """Continues the stream; `time` holds write, gap and lengths, see `Block`."""
        states = []
        for i, block in enumerate(self.blocks):
            x, after = block(x, None if state is None else state[i], **time)
            states.append(after)
        return self.norm(x), tuple(states)
