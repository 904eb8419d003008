"""Several steps of the memory per token: tokens become n rows each for the op, and the last of them is the output."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor


def weave(parts: Sequence[Shaped[Tensor, "R N *any"]]) -> Shaped[Tensor, "R N_n *any"]:
    """One tensor per sub-step, interleaved: token 0 of each part, then token 1 of each, ..."""
    return torch.stack(list(parts), 2).flatten(1, 2)


def place(x: Shaped[Tensor, "R N *any"], substeps: int, at: int) -> Shaped[Tensor, "R N_n *any"]:
    """`x` on sub-step `at` of each token, zeros on the others."""
    around = [0, 0] * (x.dim() - 2) + [at, substeps - 1 - at]
    return F.pad(x[:, :, None], around).flatten(1, 2)


def last(x: Shaped[Tensor, "R N_n *any"], substeps: int) -> Shaped[Tensor, "R N *any"]:
    """What each token's last sub-step gave."""
    return x[:, substeps - 1 :: substeps]
