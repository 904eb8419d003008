"""Blocks along time: norm, mixer, norm, MLP; every few of them a mixer among variates.

The blocks of a hybrid take their mixers from a cycle in turn. GatedDeltaNet-H1 and -H2 are those of arXiv 2412.06464,
three gated delta rules to one gated attention is the layout of Qwen3-Next and Olmo Hybrid (arXiv 2604.03444); that each
mixer is followed by an MLP of its own, in H2 too, is our reading.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from tsgdn.mixers import MIXERS, build
from tsgdn.mixers.layers import RMSNorm, SwiGLU
from tsgdn.mixers.registry import nearest
from tsgdn.mixers.variates import VariateMixer

BACKBONES: dict[str, tuple[str, ...]] = {
    "h1": ("gated_deltanet", "sliding_window_attention"),
    "h2": ("mamba2", "gated_deltanet", "sliding_window_attention"),
    "hybrid_3to1": ("gated_deltanet", "gated_deltanet", "gated_deltanet", "gated_attention"),
}
"""Cycles of mixers by name; a list of mixers in the place of a name is a cycle too."""


def cycle(mixer: str | Sequence[str]) -> tuple[str, ...]:
    """The mixers that the blocks take in turn: those of a hybrid or of a list, or the one of that name.

    Raises:
        ValueError: an unknown name; one line that names the nearest.
    """
    if isinstance(mixer, str):
        names = BACKBONES.get(mixer, (mixer,))
        if names[0] not in MIXERS:
            known = [*MIXERS, *BACKBONES]
            raise ValueError(f"no mixer or hybrid {mixer!r}{nearest(mixer, known)}; there are {', '.join(known)}")
        return names
    for name in mixer:
        if name not in MIXERS:
            raise ValueError(f"no mixer {name!r}{nearest(name, MIXERS)}; there are {', '.join(MIXERS)}")
    if not mixer:
        raise ValueError("mixer is an empty list; expected a name or at least one mixer")
    return tuple(mixer)


def arguments_by_mixer(mixer: str | Sequence[str], args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The arguments of each mixer of a cycle: of a single one they stand alone, of several under their names.

    Raises:
        ValueError: arguments of a mixer that is not in the cycle.
    """
    names = cycle(mixer)
    if isinstance(mixer, str) and names == (mixer,):
        return {mixer: dict(args)}
    for key, value in args.items():
        if key not in names or not isinstance(value, Mapping):
            expected = ", ".join(f"{name}: {{...}}" for name in dict.fromkeys(names))
            raise ValueError(f"mixer_args has {key!r}; of a hybrid it takes arguments under its mixers: {expected}")
    return {name: dict(args.get(name, {})) for name in names}


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
        self.mlp = SwiGLU(width, round(mlp_ratio * width), dropout=dropout)
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
        drop = self.dropout if self.training and self.dropout.p else _same
        y, state = self.mixer(self.norm_mixer(x).flatten(0, 1), state, write=write, gap=gap, lengths=lengths)
        x = x + drop(y.unflatten(0, shape[:2]))
        if self.variates is not None and self.norm_variates is not None and shape[1] > 1:
            x = x + drop(self.variates(self.norm_variates(x)))
        return x + drop(self.mlp(self.norm_mlp(x))), state


def _same(x: Tensor) -> Tensor:
    return x


class Backbone(nn.Module):
    """A stack of blocks; its state is the tuple of the mixers' states.

    Raises:
        ValueError: an unknown mixer or argument, or too few blocks for one round of the hybrid.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        mixer: str | Sequence[str],
        mixer_args: dict[str, Any],
        mlp_ratio: float = 2.0,
        variate_every: int = 2,
        dropout: float = 0.0,
    ):
        super().__init__()
        names, args = cycle(mixer), arguments_by_mixer(mixer, mixer_args)
        if depth < len(names):
            raise ValueError(f"depth is {depth}; one round of {', '.join(names)} takes at least {len(names)} blocks")
        blocks = []
        for i in range(depth):
            name, variates = names[i % len(names)], variate_every > 0 and (i + 1) % variate_every == 0
            blocks.append(Block(width, depth, name, args[name], mlp_ratio, variates, dropout))
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(width)

    def state_bytes(self, tokens: int = 0) -> int:
        """Bytes of a row's state in float32 after so many tokens."""
        return sum(block.mixer.state_bytes(tokens) for block in self.blocks)  # pyright: ignore

    @property
    def bounded(self) -> bool:
        """Whether the state has one size however long the stream."""
        return self.state_bytes(1 << 20) == self.state_bytes(0)

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
