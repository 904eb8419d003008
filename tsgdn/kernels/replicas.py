"""Replicas are rows: how the ops run under `torch.vmap`, where R copies of a model work side by side.

Every op treats its rows independently, so R calls of B rows each are one call of R·B rows: the kernels, their launches
and their gradients stay what they are. Parameters that differ from copy to copy (taps, gains, rates) come as sets,
(R, ...), which an op shares out evenly over its rows.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.utils import _pytree as pytree


def rowwise(
    fn: Callable[..., Any], rows: Sequence[Any], sets: Sequence[Tensor | None] = (), *, foldable: bool = True
) -> Any:
    """`fn(*rows, *sets)`; under `torch.vmap` one call for all copies.

    Outside of vmap nothing happens but this call. Under it `fn` gets the copies' rows one after the other, R·B of them;
    and where any of `sets` differs from copy to copy, each of them with a leading dimension R.

    Args:
        fn: gives tensors with the rows first, in any structure; it sees plain tensors, and all that vmap forbids is
            allowed in it.
        rows: tensors (B, ...), None, or tuples of them.
        sets: parameters without rows.
        foldable: False = the copies' rows cannot be put one after the other.

    Raises:
        RuntimeError: under vmap what cannot be folded.
    """
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return fn(*rows, *sets)
    if not any(isinstance(x, Tensor) and is_batchedtensor(x) for x in pytree.tree_leaves((rows, sets))):
        return fn(*rows, *sets)
    if not foldable:
        raise RuntimeError("packed sequences (cu_seqlens) came under torch.vmap, which needs rows; pass them as rows")
    return _Rowwise.apply(fn, tuple(rows), tuple(sets))


class _Rowwise(torch.autograd.Function):
    # A vehicle for its rule alone: what the rule calls is recorded by autograd outside of vmap, as on any rows.
    @staticmethod
    def forward(fn: Callable[..., Any], rows: Any, sets: Any) -> Any:  # pyright: ignore
        raise AssertionError("rowwise was called outside of vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, fn: Callable[..., Any], rows: Any, sets: Any) -> Any:  # pyright: ignore
        _, of_rows, of_sets = in_dims
        copies = info.batch_size

        def lead(x: Tensor, dim: int | None) -> Tensor:
            return x.expand(copies, *x.shape) if dim is None else x.movedim(dim, 0)

        def fold(x: Any, dim: int | None) -> Any:
            return lead(x, dim).flatten(0, 1) if isinstance(x, Tensor) else x

        flat, form = pytree.tree_flatten(rows)
        rows = pytree.tree_unflatten(
            [fold(*each) for each in zip(flat, pytree.tree_leaves(of_rows), strict=True)], form
        )
        if any(dim is not None for dim in of_sets):
            sets = [x if x is None else lead(x, dim) for x, dim in zip(sets, of_sets, strict=True)]
        out, form = pytree.tree_flatten(rowwise(fn, rows, sets))
        out = [x.unflatten(0, (copies, x.shape[0] // copies)) if isinstance(x, Tensor) else x for x in out]
        dims = [0 if isinstance(x, Tensor) else None for x in out]
        return pytree.tree_unflatten(out, form), pytree.tree_unflatten(dims, form)


def per_row(parameter: Tensor, rows: int, plain: int) -> Tensor:
    """A parameter of `plain` dimensions as it is, or one in sets (P, ...) for each of the rows, (rows, ...)."""
    return parameter if parameter.dim() == plain else parameter.repeat_interleave(rows // parameter.shape[0], 0)


def shares(
    rows: Sequence[Tensor | None], sets: Sequence[Tensor | None], plain: int
) -> Iterator[tuple[list[Tensor | None], list[Tensor | None]]]:
    """The rows that each set of parameters serves, and that set; all at once where there are no sets.

    Args:
        rows: tensors (R, ...) or None.
        sets: parameters, or sets (P, ...) of them.
        plain: dimensions of the first parameter where it is one for all rows.
    """
    first, leader = sets[0], rows[0]
    assert first is not None
    assert leader is not None
    if first.dim() == plain:
        yield list(rows), list(sets)
        return
    each = leader.shape[0] // first.shape[0]
    for p in range(first.shape[0]):
        here = slice(p * each, (p + 1) * each)
        yield [None if x is None else x[here] for x in rows], [None if x is None else x[p] for x in sets]
