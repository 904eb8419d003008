"""Scores of quantile forecasts, aggregated as GluonTS 0.17 does (`evaluate_model(axis=None, mask_invalid_label=True)`).

Every score is one number over all n windows (or variates of windows) and all H steps. Labels that are NaN are left out;
a forecast that is NaN is refused, since leaving it out would reward silence.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

WQL_LEVELS: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""The levels of the published WQL (the "CRPS" of GIFT-Eval and ProbTS)."""


def level_index(levels: Sequence[float], level: float) -> int:
    """Where `level` lies in `levels`.

    Raises:
        ValueError: it is not there.
    """
    distance = np.abs(np.asarray(levels, float) - level)
    if not distance.size or distance.min() > 1e-9:
        raise ValueError(f"the forecast has no level {level}, only {tuple(levels)}; forecast it too")
    return int(distance.argmin())


def level_weights(levels: Sequence[float]) -> Float[np.ndarray, " Q"]:
    """The share of (0, 1) that is nearest to each level; sums to one, so that uneven grids integrate evenly."""
    grid = np.asarray(levels, float)
    edges = np.concatenate([[0.0], (grid[1:] + grid[:-1]) / 2, [1.0]])
    return np.diff(edges)


def seasonal_error(*, past: Float[np.ndarray, "... T"], seasonality: int) -> Float[np.ndarray, "..."]:
    """Mean absolute difference of the past from itself `seasonality` steps before; 1 step where the past is shorter.

    Differences with a missing end are left out. 0 where there is no difference at all, as in GluonTS: such windows have
    no MASE and are left out of it.
    """
    past = np.asarray(past, float)
    length = past.shape[-1]
    m = 1 if seasonality > length else seasonality
    steps = np.abs(past[..., m:] - past[..., : length - m])
    seen = np.isfinite(steps)
    return np.asarray(np.where(seen, steps, 0.0).sum(-1) / np.maximum(seen.sum(-1), 1))


def quantile_loss(
    *,
    target: Float[np.ndarray, "*shape"],
    quantiles: Float[np.ndarray, "*shape Q"],
    levels: Sequence[float],
) -> Float[np.ndarray, "*shape Q"]:
    """2 |(y - f_q)(1[y <= f_q] - q)|: twice the pinball loss; NaN where the target is."""
    y = np.asarray(target, float)[..., None]
    return 2 * np.abs((y - quantiles) * ((quantiles >= y) - np.asarray(levels, float)))


def _checked(target: np.ndarray, quantiles: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """True where the target is there; refuses what cannot be scored."""
    if quantiles.shape != (*target.shape, len(levels)):
        raise ValueError(
            f"target {target.shape} with {len(levels)} levels needs quantiles {(*target.shape, len(levels))}, "
            f"not {quantiles.shape}"
        )
    if np.isnan(quantiles).any():
        raise ValueError(f"{int(np.isnan(quantiles).sum())} of {quantiles.size} forecast values are NaN; forecast all")
    return np.isfinite(target)


def _mean(values: np.ndarray, where: np.ndarray) -> float:
    return float(values[where].mean()) if where.any() else float("nan")


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else float("nan")


def wql(
    *,
    target: Float[np.ndarray, "n H"],
    quantiles: Float[np.ndarray, "n H Q"],
    levels: Sequence[float],
    over: Sequence[float] = WQL_LEVELS,
) -> float:
    """Weighted quantile loss: mean over the levels `over` of (sum of quantile losses / sum of |target|)."""
    seen = _checked(target, quantiles, levels)
    pick = [level_index(levels, q) for q in over]
    loss = quantile_loss(target=target, quantiles=quantiles[..., pick], levels=over)
    return _ratio(float(loss[seen].sum(0).mean()), float(np.abs(target[seen]).sum()))


def nd(*, target: Float[np.ndarray, "n H"], quantiles: Float[np.ndarray, "n H Q"], levels: Sequence[float]) -> float:
    """Normalised deviation: sum of |target - median| / sum of |target|; the WQL of the median alone."""
    return wql(target=target, quantiles=quantiles, levels=levels, over=(0.5,))


def mase(
    *,
    target: Float[np.ndarray, "n H"],
    quantiles: Float[np.ndarray, "n H Q"],
    levels: Sequence[float],
    past_error: Float[np.ndarray, " n"],
) -> float:
    """Mean of |target - median| / the window's past seasonal error; windows without one (0) are left out."""
    seen = _checked(target, quantiles, levels)
    error = np.abs(target - quantiles[..., level_index(levels, 0.5)])
    return _mean(*_scaled(error, past_error, seen))


def sql(
    *,
    target: Float[np.ndarray, "n H"],
    quantiles: Float[np.ndarray, "n H Q"],
    levels: Sequence[float],
    past_error: Float[np.ndarray, " n"],
    over: Sequence[float] = WQL_LEVELS,
) -> float:
    """Scaled quantile loss: mean over levels of the mean of (quantile loss / past seasonal error)."""
    seen = _checked(target, quantiles, levels)
    pick = [level_index(levels, q) for q in over]
    loss = quantile_loss(target=target, quantiles=quantiles[..., pick], levels=over).mean(-1)
    return _mean(*_scaled(loss, past_error, seen))


def _scaled(values: np.ndarray, past_error: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`values` over their window's past error, and where that exists."""
    scale = np.asarray(past_error, float).reshape(-1, 1)
    there = scale > np.finfo(float).tiny
    return values / np.where(there, scale, 1.0), seen & there


def coverage(
    *,
    target: Float[np.ndarray, "n H"],
    quantiles: Float[np.ndarray, "n H Q"],
    levels: Sequence[float],
    level: float,
) -> float:
    """Share of targets at or below the forecast of `level`; calibrated forecasts give `level`."""
    seen = _checked(target, quantiles, levels)
    return _mean((target <= quantiles[..., level_index(levels, level)]).astype(float), seen)


def interval_coverage(
    *,
    target: Float[np.ndarray, "n H"],
    quantiles: Float[np.ndarray, "n H Q"],
    levels: Sequence[float],
    share: float,
) -> float:
    """Share of targets within the central interval that promises `share` (0.8: from .1 to .9), its ends included."""
    seen = _checked(target, quantiles, levels)
    low, high = (quantiles[..., level_index(levels, q)] for q in (0.5 - share / 2, 0.5 + share / 2))
    return _mean(((low <= target) & (target <= high)).astype(float), seen)


def crps(*, target: Float[np.ndarray, "n H"], quantiles: Float[np.ndarray, "n H Q"], levels: Sequence[float]) -> float:
    """Mean continuous ranked probability score, in the unit of the data: the quantile loss integrated over all levels.

    The published tables print WQL under this name; see `wql`.
    """
    seen = _checked(target, quantiles, levels)
    loss = quantile_loss(target=target, quantiles=quantiles, levels=levels) @ level_weights(levels)
    return _mean(loss, seen)
