"""Mixers by name, and what each of them offers."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor

C = TypeVar("C", bound=type)

MIXERS: dict[str, Callable[..., Any]] = {}
"""Constructors; called with the width and keyword arguments. What a name pins (delta, decay, groups) is not open."""


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

    def state_bytes(self, tokens: int = 0) -> int:
        """Bytes of a row's state in float32 after so many tokens; a constant where the state is bounded."""
        ...

    def scale_output(self, depth: int) -> None:
        """Divides the output projection by sqrt(2·depth)."""
        ...


def register(name: str, **pinned: Any) -> Callable[[C], C]:
    """Enters a class under `name`; arguments given here are fixed by the name.

    Raises:
        ValueError: the name is taken.
    """

    def enter(cls: C) -> C:
        if name in MIXERS:
            raise ValueError(f"there is a mixer {name!r} already; choose another name")
        MIXERS[name] = partial(cls, **pinned) if pinned else cls
        return cls

    return enter


def build(name: str, width: int, args: Mapping[str, Any] | None = None) -> Mixer:
    """The mixer of that name.

    Raises:
        ValueError: no such mixer, or no such argument of it; one line that names the nearest.
    """
    if name not in MIXERS:
        raise ValueError(f"no mixer {name!r}{nearest(name, MIXERS)}; there are {', '.join(MIXERS)}")
    make = MIXERS[name]
    pinned = make.keywords if isinstance(make, partial) else {}
    known = arguments(name)
    for key in args or {}:
        if key in pinned:
            raise ValueError(f"mixer {name} fixes {key}={pinned[key]!r}; leave it out or choose another mixer")
        if key not in known:
            raise ValueError(f"mixer {name} has no argument {key!r}{nearest(key, known)}; it has {', '.join(known)}")
    return cast(Mixer, make(width, **(args or {})))


def arguments(name: str) -> list[str]:
    """The arguments that the mixer of that name leaves open, besides the width."""
    make = MIXERS[name]
    pinned = make.keywords if isinstance(make, partial) else {}
    return [key for key in inspect.signature(make).parameters if key not in pinned and key != "width"]


def nearest(word: str, words: Any) -> str:
    """A hint at the word that was probably meant, or nothing."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f", did you mean {close[0]!r}" if close else ""
