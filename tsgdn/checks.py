"""The laws as functions, for our tests and for anyone who writes a part of their own.

Each raises AssertionError with the cut, the leaf or the row that broke the law. `dim` is the time dimension: -2 for
tokens (R, N, D), -1 for values.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from tsgdn.streamable import fork, map_state, reset, same_sizes, state_leaves, take_rows

CUTS: tuple[tuple[int, ...], ...] = ((1,), (3,), (7,), (5, 0, 1))


def split(x: Tensor, pattern: Sequence[int], dim: int) -> Iterator[Tensor]:
    """Pieces of the given lengths, repeated along `dim` until `x` is used up."""
    at = 0
    while at < x.shape[dim]:
        for length in pattern:
            length = min(length, x.shape[dim] - at)
            yield x.narrow(dim, at, length)
            at += length


def assert_states_close(got: Any, want: Any, **tolerance: Any) -> None:
    """Compares states leaf by leaf and names the leaf that differs; a leaf that grows may have room to spare."""
    got, want = same_sizes(got, want)
    pairs = zip(state_leaves(got), state_leaves(want), strict=True)
    for (name, a), (_, b) in pairs:
        assert_close(a, b, **tolerance, msg=lambda text, name=name: f"state leaf {name}: {text}")


def check_streaming(
    part: Callable[..., tuple[Tensor, Any]],
    x: Tensor,
    *,
    cuts: Sequence[Sequence[int]] = CUTS,
    dim: int = -2,
    **tolerance: Any,
) -> None:
    """Cutting the input anywhere changes neither the outputs nor the end state."""
    whole, end = part(x, None)
    for pattern in cuts:
        outputs, state = [], None
        for piece in split(x, pattern, dim):
            y, state = part(piece, state)
            outputs.append(y)
        got = torch.cat(outputs, dim)
        assert_close(got, whole, **tolerance, msg=lambda text, cut=pattern: f"outputs, cut {cut}: {text}")
        assert_states_close(state, end, **tolerance)


def check_step(part: Callable[..., tuple[Tensor, Any]], x: Tensor, *, dim: int = -2, **tolerance: Any) -> None:
    """One token at a time gives what the whole gives."""
    check_streaming(part, x, cuts=((1,),), dim=dim, **tolerance)


def check_causal(part: Callable[..., tuple[Tensor, Any]], x: Tensor, *, dim: int = -2) -> None:
    """Another future leaves the past bitwise as it was.

    The other future is finite noise: 0 · NaN is NaN, and inside a chunk the mask is a multiplication.
    """
    n = x.shape[dim]
    whole, _ = part(x, None)
    for at in sorted({1, n // 3, n // 2, n - 1} & set(range(1, n))):
        future = torch.randn_like(x.narrow(dim, at, n - at)) * 3
        changed, _ = part(torch.cat([x.narrow(dim, 0, at), future], dim), None)
        same = torch.equal(changed.narrow(dim, 0, at), whole.narrow(dim, 0, at))
        assert same, f"the outputs before {at} depend on the inputs from {at} on"


def check_state_is_a_value(part: Callable[..., tuple[Tensor, Any]], x: Tensor, *, dim: int = -2) -> None:
    """`part` never writes into the state it is given, and asking twice answers the same."""
    _, state = part(x, None)
    before = fork(state)
    first, _ = part(x, state)
    second, _ = part(x, state)
    assert torch.equal(first, second), "the same input on the same state gave two answers"
    for (name, a), (_, b) in zip(state_leaves(state), state_leaves(before), strict=True):
        assert torch.equal(a, b), f"state leaf {name} was changed in place"


def check_rows_independent(part: Callable[..., tuple[Tensor, Any]], x: Tensor, **tolerance: Any) -> None:
    """Permuting or dropping rows permutes or drops outputs and states; nothing else changes."""
    whole, end = part(x, None)
    rows = torch.randperm(x.shape[0])[: max(1, x.shape[0] - 1)]
    got, state = part(x[rows], None)
    assert_close(got, whole[rows], **tolerance)
    assert_states_close(state, take_rows(end, rows), **tolerance)


def check_reset(part: Callable[..., tuple[Tensor, Any]], x: Tensor) -> None:
    """Zeros mean nothing seen yet: a reset row continues as a new stream, bitwise."""
    whole, state = part(x, None)
    everything = torch.arange(x.shape[0])
    again, _ = part(x, reset(state, everything))
    assert torch.equal(again, whole), "a state of zeros is not the same as None"


def check_gradients_streaming(
    part: Callable[..., tuple[Tensor, Any]], x: Tensor, *, cut: int = 3, dim: int = -2, **tolerance: Any
) -> None:
    """Gradients flow through the state: those of a cut stream equal those of the whole."""
    x = x.detach().requires_grad_()
    whole, end = part(x, None)
    weight = torch.randn_like(whole)
    leaves = [leaf for _, leaf in state_leaves(end) if leaf.is_floating_point() and leaf.requires_grad]
    weights = [torch.randn_like(leaf) for leaf in leaves]

    def objective(y: Tensor, last: list[Tensor]) -> Tensor:
        return (y * weight).sum() + sum(((a * b).sum() for a, b in zip(last, weights, strict=True)), y.new_zeros(()))

    (want,) = torch.autograd.grad(objective(whole, leaves), x)
    outputs, state = [], None
    for piece in split(x, (cut,), dim):
        y, state = part(piece, state)
        outputs.append(y)
    last = [leaf for _, leaf in state_leaves(state) if leaf.is_floating_point() and leaf.requires_grad]
    (got,) = torch.autograd.grad(objective(torch.cat(outputs, dim), last), x)
    assert_close(got, want, **tolerance)


def check_snapshot(part: Callable[..., tuple[Tensor, Any]], x: Tensor, *, dim: int = -2) -> None:
    """A state that went through bytes continues bitwise as the original does."""
    half = x.shape[dim] // 2
    _, state = part(x.narrow(dim, 0, half), None)

    def through_bytes(leaf: Tensor) -> Tensor:
        raw = bytearray(leaf.detach().contiguous().view(torch.uint8).numpy().tobytes()) if leaf.numel() else bytearray()
        return torch.frombuffer(raw, dtype=leaf.dtype).reshape(leaf.shape) if raw else torch.empty_like(leaf)

    rest = x.narrow(dim, half, x.shape[dim] - half)
    assert torch.equal(part(rest, map_state(through_bytes, state))[0], part(rest, state)[0])
