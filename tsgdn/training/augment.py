"""What training hides: ends of patches, as a forecast in the middle of a patch does, and whole runs of patches.

Pure functions of a batch and a generator. Hidden cells become unobserved in the raw values, before anything is scaled;
the target keeps them, so they are learned from.
"""

import math

import torch
from jaxtyping import Bool
from torch import Tensor

from tsgdn.types import Batch


def close_patches(
    batch: Batch, patch_size: int, generator: torch.Generator, *, share: float = 0.15, windows: float = 0.5
) -> Batch:
    """Hides the last r cells of random patches, r uniform in 1..P, for all variates alike.

    Args:
        batch: windows whose patch grid starts at their first step.
        patch_size: P.
        generator: on the CPU; the same one gives the same cells on any device.
        share: of all patches.
        windows: share of windows that are touched at all; within them `share / windows` of the patches are closed.
    """
    B, _, T = batch.observed.shape
    if share <= 0 or T == 0:
        return batch
    N = -(-T // patch_size)
    touched = torch.rand(B, 1, generator=generator) < windows
    closed = touched & (torch.rand(B, N, generator=generator) < share / windows)
    hidden = torch.randint(1, patch_size + 1, (B, N), generator=generator) * closed
    cells = torch.arange(patch_size) >= patch_size - hidden[..., None]
    return _hide(batch, cells.flatten(1)[:, :T])


def mask_patches(
    batch: Batch, patch_size: int, generator: torch.Generator, *, windows: float = 0.1, longest: int = 8
) -> Batch:
    """Hides one run of whole patches in some windows: what a forecast beyond the direct steps walks through.

    Args:
        batch: as in `close_patches`.
        patch_size: P.
        generator: on the CPU.
        windows: share of windows.
        longest: patches; lengths are log-uniform from 1.
    """
    B, _, T = batch.observed.shape
    N = T // patch_size
    if windows <= 0 or N < 2:
        return batch
    longest = min(longest, N - 1)
    touched = torch.rand(B, generator=generator) < windows
    length = (torch.rand(B, generator=generator) * math.log(longest + 1)).exp().floor().clamp(max=longest).long()
    first = 1 + (torch.rand(B, generator=generator) * (N - length)).long()  # the first patch stays
    step = torch.arange(T) // patch_size
    cells = touched[:, None] & (step >= first[:, None]) & (step < (first + length)[:, None])
    return _hide(batch, cells)


def _hide(batch: Batch, cells: Bool[Tensor, "B T"]) -> Batch:
    return batch._replace(observed=batch.observed & ~cells[:, None].to(batch.observed.device))
