"""The pinball loss, masked and measured in the unit of the series.

MASE weighs every series alike, WQL by its magnitude. `magnitude_weight` goes from the one (0) to the other (1).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from tsgdn.types import Quantiles

UNIT_FLOOR = 1e-3  # of scale: a series that repeats its season exactly must not outweigh all others
WEIGHT_CAP = 100.0


def gather_targets(
    target: Float64[Tensor, "B V T"], tokens: Int64[Tensor, " N"], patch_size: int, span: int
) -> Float64[Tensor, "B V N S"]:
    """What each token forecasts, NaN beyond the end of `target`."""
    index = tokens[:, None] * patch_size + torch.arange(span, device=target.device)
    inside = index < target.shape[-1]
    found = target[..., index.clamp(max=max(target.shape[-1] - 1, 0))]
    return torch.where(inside, found, torch.nan)


def hidden_cells(
    observed: Bool[Tensor, "B V T"], tokens: Int64[Tensor, " N"], patch_size: int, span: int
) -> Bool[Tensor, "B V N S"]:
    """Cells that a token may be scored on: all of the next K patches, and those of its own that it has not seen."""
    own = tokens[:, None] * patch_size + torch.arange(patch_size, device=observed.device)
    unseen = ~observed[..., own]
    ahead = unseen.new_ones(*unseen.shape[:-1], span - patch_size)
    return torch.cat([unseen, ahead], -1)


def pinball_loss(
    quantiles: Quantiles,
    target: Float64[Tensor, "B V N S"],
    levels: Sequence[float],
    *,
    mask: Bool[Tensor, "B V N S"] | None = None,
    magnitude_weight: float = 0.5,
) -> Float[Tensor, ""]:
    """Mean over cells and levels of twice the pinball loss, in units of the series' main-season difference.

    Args:
        quantiles: of the tokens.
        target: in the unit of the series; NaN = no loss.
        levels: of the quantiles.
        mask: further cells without loss (False).
        magnitude_weight: exponent of a series' size in its weight.

    Returns:
        A scalar; 0 (with zero gradients) where no cell has a target.

    Source: Koenker and Bassett 1978; WQL and MASE as in GluonTS.
    """
    values = quantiles.values
    scored = target.isfinite() & quantiles.valid[:, None, :, None]
    if mask is not None:
        scored = scored & mask
    truth = (target.nan_to_num() - quantiles.loc[..., None]) / quantiles.scale[..., None]
    error = torch.where(scored, truth.to(values.dtype), values.detach()[..., 0])[..., None] - values
    level = torch.tensor(levels, dtype=values.dtype, device=values.device)
    loss = 2 * torch.maximum(level * error, (level - 1) * error).mean(-1)

    unit = quantiles.unit.clamp(min=UNIT_FLOOR)
    size = (unit * quantiles.scale).expand(scored.shape[:3])
    share = scored.any(-1)
    typical = (size * share).sum() / share.sum().clamp(min=1)
    weight = ((size / typical.clamp(min=1e-300)) ** magnitude_weight).clamp(max=WEIGHT_CAP) / unit
    weight = torch.where(scored, weight[..., None], 0.0).to(values.dtype)
    return (torch.where(scored, loss, 0.0) * weight).sum() / scored.sum().clamp(min=1)
