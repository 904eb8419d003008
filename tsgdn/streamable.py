"""The contract of every causal part, and what can be done with its state.

    y, state = part(x, state=None)      # any length >= 0; None: the stream starts here

Cutting the input anywhere changes neither the outputs nor the end state. State is a value: a NamedTuple (or tuple) of
tensors and of such tuples, never changed in place by `part`; zeros mean "nothing seen yet", so None and zeros are the
same. Every leaf has the rows (or series) as its first dimension.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

S = TypeVar("S")


class Streamable(Protocol):
    """A causal part; see the module's text."""

    def __call__(self, x: Any, state: Any = None, /) -> tuple[Any, Any]:
        """Continues the stream from `state` by `x`."""
        ...


def map_state(fn: Callable[..., Any], state: S, *others: S) -> S:
    """A state of the same structure, `fn` applied to each leaf (and to the leaves of `others` in step)."""
    if isinstance(state, Tensor):
        return fn(state, *others)
    if isinstance(state, tuple):
        parts = [map_state(fn, *leaves) for leaves in zip(state, *others, strict=True)]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)  # pyright: ignore
    raise TypeError(f"a state is made of tuples and tensors, not of {type(state).__name__}")


def state_leaves(state: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The leaves with their dotted names, in a fixed order."""
    if isinstance(state, Tensor):
        yield prefix, state
        return
    names = state._fields if hasattr(state, "_fields") else range(len(state))
    for name, part in zip(names, state, strict=True):
        yield from state_leaves(part, f"{prefix}.{name}" if prefix else str(name))


def fork(state: S) -> S:
    """A copy that shares no memory."""
    return map_state(torch.clone, state)


def detach(state: S) -> S:
    """The same values, cut off from the gradient: truncated back-propagation through time."""
    return map_state(Tensor.detach, state)


def reset(state: S, rows: Tensor) -> S:
    """A state in which the given rows have seen nothing."""
    return map_state(lambda leaf: leaf.index_fill(0, rows, 0), state)


def take_rows(state: S, rows: Tensor) -> S:
    """The state of some rows, in the given order."""
    return map_state(lambda leaf: leaf.index_select(0, rows), state)


def join_rows(states: Sequence[S]) -> S:
    """The states of several groups of rows as one; the shorter of leaves that grow are padded by zeros."""

    def join(*leaves: Tensor) -> Tensor:
        shape = [max(sizes) for sizes in zip(*(leaf.shape[1:] for leaf in leaves), strict=True)]
        return torch.cat([_padded(leaf, shape) for leaf in leaves])

    return map_state(join, *states)


def same_sizes(state: S, other: S) -> tuple[S, S]:
    """Both states, leaves that grow with the stream padded by zeros ("nothing seen") to the longer of the two."""

    def pad(a: Tensor, b: Tensor) -> Tensor:
        return _padded(a, [max(sizes) for sizes in zip(a.shape[1:], b.shape[1:], strict=True)])

    return map_state(pad, state, other), map_state(pad, other, state)


def _padded(leaf: Tensor, shape: Sequence[int]) -> Tensor:
    if list(leaf.shape[1:]) == list(shape):
        return leaf
    out = leaf.new_zeros(leaf.shape[0], *shape)
    out[(slice(None), *(slice(0, size) for size in leaf.shape[1:]))] = leaf
    return out


def state_bytes(state: Any) -> int:
    """Bytes per row of all leaves together."""
    return sum(leaf[:1].numel() * leaf.element_size() for _, leaf in state_leaves(state))
