"""Mixers along time, (R, N, D) -> (R, N, D), by name. One may be put in the place of another.

A mixer takes the tokens of R rows and the state after the tokens before, and gives what is to be added to each token
and the state after the last. The laws of `tsgdn.streamable` hold.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from tsgdn.mixers.gated_deltanet import GatedDeltaNet
from tsgdn.mixers.gru import GRU, GRUState
from tsgdn.mixers.mamba2 import Mamba2
from tsgdn.mixers.memory import MemoryState
from tsgdn.mixers.variates import VariateMixer

__all__ = [
    "GRU",
    "MIXERS",
    "GRUState",
    "GatedDeltaNet",
    "Mamba2",
    "MemoryState",
    "Mixer",
    "VariateMixer",
    "build",
]


@runtime_checkable
class Mixer(Protocol):
    """What a mixer along time offers; the arguments are explained at `GatedDeltaNet.forward`."""

    def __call__(
        self,
        x: Tensor,
        state: Any = None,
        /,
        *,
        write: Tensor | None = None,
        gap: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Continues the streams by some tokens."""
        ...

    def initial_state(self, rows: int, device: torch.device | str | None = None) -> Any:
        """Nothing seen yet: zeros."""
        ...

    def state_bytes(self) -> int:
        """Bytes of a row's state in float32."""
        ...

    def scale_output(self, depth: int) -> None:
        """Divides the output projection by sqrt(2·depth)."""
        ...


MIXERS: dict[str, Callable[..., Any]] = {
    "gated_deltanet": GatedDeltaNet,
    "gated_linear": partial(GatedDeltaNet, delta=False),
    "deltanet": partial(GatedDeltaNet, decay="none"),
    "mamba2": partial(Mamba2, groups=1),
    "mamba2_heads": partial(Mamba2, groups=None),
    "gru": GRU,
}
"""Constructors; called with the width and keyword arguments. What a name pins (delta, decay, groups) is not open."""


def build(name: str, width: int, args: Mapping[str, Any] | None = None) -> Mixer:
    """The mixer of that name.

    Raises:
        ValueError: no such mixer, or no such argument of it; one line that names the nearest.
    """
    if name not in MIXERS:
        raise ValueError(f"no mixer {name!r}{_nearest(name, MIXERS)}; there are {', '.join(MIXERS)}")
    make = MIXERS[name]
    pinned = make.keywords if isinstance(make, partial) else {}
    parameters = inspect.signature(make).parameters
    known = [key for key in parameters if key not in pinned and key != "width"]
    for key in args or {}:
        if key in pinned:
            raise ValueError(f"mixer {name} fixes {key}={pinned[key]!r}; leave it out or choose another mixer")
        if key not in known:
            raise ValueError(f"mixer {name} has no argument {key!r}{_nearest(key, known)}; it has {', '.join(known)}")
    return cast(Mixer, make(width, **(args or {})))


def _nearest(word: str, words: Any) -> str:
    """A hint at the word that was probably meant, or nothing."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f", did you mean {close[0]!r}" if close else ""
