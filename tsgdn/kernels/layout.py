"""How tensors are laid out for a launch: sizes of tiles, and copies only where a kernel cannot read the strides."""

from torch import Tensor


def power_of_two(size: int, least: int = 16) -> int:
    """The power of two, at least `least`, that a tile gives to a dimension of this size; 16 suits the tensor cores."""
    return max(least, 1 << (size - 1).bit_length())


def dense_last(x: Tensor) -> Tensor:
    """`x` itself if its last dimension is dense, so that a slice of a projection needs no copy; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
