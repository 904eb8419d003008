"""Interval widths that learn from their own misses, one number per series, coverage and range of leads.

For coverage c the interval is median - e^θ·below .. median + e^θ·above, where below and above are the distances to the
model's quantiles (1 - c) / 2 and (1 + c) / 2. When the truth has come, θ += γ (err - (1 - c)) with err = 1 outside. The
sum of this over n updates is an identity, whatever the data: mean err - (1 - c) = (θ_end - θ_start) / (γ n).

Adaptive conformal inference (Gibbs and Candès, arXiv 2106.00170) moves the level instead, which ends where the model's
levels do; a width has no such end.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from tsgdn.streaming.scores import HALF

COVERAGES = (0.5, 0.8, 0.9, 0.98)


class Rules(NamedTuple):
    """How widths learn.

    Attributes:
        coverages: increasing.
        gamma: step of θ per value.
        warm: values of a range of leads that a series must have scored before its θ leaves the common start.
        decay: of live coverage, per value.
        lowest: of θ; e^-3 is a twentieth of the model's width.
        highest: of θ; e^5 is 148 times the model's width.
    """

    coverages: tuple[float, ...] = COVERAGES
    gamma: float = 0.05
    warm: int = 50
    decay: float = 0.998
    lowest: float = -3.0
    highest: float = 5.0


class ConformalState(NamedTuple):
    """Widths and live coverage; N ranges of leads, C coverages. Zeros are "nothing scored yet".

    Attributes:
        theta: float64 (S, V, N, C), θ less its common start.
        scored: int64 (S, V, N), values scored.
        misses: int64 (S, V, N, C), sum of err over the values that moved θ.
        weight: float64 (S, V, N), of the decayed sums.
        raw: float64 (S, V, N, C), decayed count of values within the model's own interval.
        calibrated: likewise within the interval that was issued.
    """

    theta: np.ndarray
    scored: np.ndarray
    misses: np.ndarray
    weight: np.ndarray
    raw: np.ndarray
    calibrated: np.ndarray


def empty(slots: int, variates: int, ranges: int, coverages: int) -> ConformalState:
    """Nothing scored yet."""
    shape = (slots, variates, ranges)
    wide = (*shape, coverages)
    return ConformalState(
        np.zeros(wide),
        np.zeros(shape, np.int64),
        np.zeros(wide, np.int64),
        np.zeros(shape),
        np.zeros(wide),
        np.zeros(wide),
    )


def check_rules(rules: Rules) -> Rules:
    """The rules themselves.

    Raises:
        ValueError: one of them is out of range.
    """
    c = np.asarray(rules.coverages, np.float64)
    if not len(c) or not (np.diff(c) > 0).all() or not 0 < c[0] <= c[-1] < 1:
        raise ValueError(f"coverages are {rules.coverages}, expected increasing numbers between 0 and 1")
    if not 0 < rules.gamma <= 1:
        raise ValueError(f"gamma is {rules.gamma}, expected a step above 0 and at most 1")
    if not 0 < rules.decay < 1:
        raise ValueError(f"decay is {rules.decay}, expected a number between 0 and 1")
    if rules.warm < 0 or not rules.lowest < 0 < rules.highest:
        raise ValueError(f"warm {rules.warm}, lowest {rules.lowest}, highest {rules.highest}: expected >= 0, < 0, > 0")
    return rules


def shown(
    theta: Float[np.ndarray, "*rest C"],
    below: Float64[np.ndarray, "*rest C"],
    above: Float64[np.ndarray, "*rest C"],
) -> tuple[np.ndarray, np.ndarray]:
    """Distances from the median to the ends of the intervals as they are issued: wider for a larger coverage."""
    stretch = np.exp(theta.astype(np.float64))
    return np.maximum.accumulate(stretch * below, -1), np.maximum.accumulate(stretch * above, -1)


def update(
    state: ConformalState,
    deviation: Float64[np.ndarray, "B V N"],
    below: Float64[np.ndarray, "B V N C"],
    above: Float64[np.ndarray, "B V N C"],
    theta: Float[np.ndarray, "B V N C"],
    seen: Bool[np.ndarray, "B V N"],
    start: Float64[np.ndarray, "N C"],
    rules: Rules,
) -> ConformalState:
    """The rows of a state after one value each.

    Args:
        state: rows of it.
        deviation: value less the median that was issued for it, per range of leads; anything where not `seen`.
        below: distances from the median to the model's lower quantiles.
        above: to its upper ones.
        theta: what was in force when the forecast was issued.
        seen: where there is a value and a forecast of it.
        start: common start of θ.
        rules: how widths learn.
    """
    miss = 1 - np.asarray(rules.coverages)
    where = seen[..., None]
    d = np.where(seen, deviation, 0.0)[..., None]
    inside_raw = where & _inside(d, below, above)
    inside = where & _inside(d, *shown(theta, below, above))
    moving = where & (state.scored >= rules.warm)[..., None]
    err = moving & ~inside
    moved = np.clip(state.theta + rules.gamma * (err - miss), rules.lowest - start, rules.highest - start)
    keep = np.where(seen, rules.decay, 1.0)
    return ConformalState(
        np.where(moving, moved, state.theta),
        state.scored + seen,
        state.misses + err,
        state.weight * keep + seen,
        state.raw * keep[..., None] + inside_raw,
        state.calibrated * keep[..., None] + inside,
    )


def coverage(state: ConformalState) -> tuple[np.ndarray, np.ndarray]:
    """Live coverage (B, V, N, C) of the model's own intervals and of the issued ones; NaN where nothing was scored."""
    weight = np.where(state.weight > 0, state.weight, np.nan)[..., None]
    return state.raw / weight, state.calibrated / weight


def widen(
    quantiles: Float64[np.ndarray, "B V H Q"],
    levels: Sequence[float],
    theta: Float64[np.ndarray, "B V N C"],
    coverages: Sequence[float],
    ranges: Int64[np.ndarray, " H"],
) -> Float64[np.ndarray, "B V H Q"]:
    """Quantiles whose distance from the median is stretched by e^θ, increasing along Q.

    Args:
        quantiles: in any unit.
        levels: increasing, 0.5 among them.
        theta: per range of leads and coverage; between coverages it is interpolated, beyond them kept.
        coverages: increasing.
        ranges: that the steps belong to.

    Raises:
        ValueError: the median is not among the levels.
    """
    p = np.asarray(levels, np.float64)
    middle = int(np.abs(p - 0.5).argmin()) if len(p) else 0
    if not len(p) or abs(p[middle] - 0.5) > 1e-9:
        raise ValueError(f"levels are {tuple(levels)}, expected 0.5 among them: widths are measured from the median")
    c, wanted = np.asarray(coverages, np.float64), np.abs(2 * p - 1)
    place = np.interp(wanted, c, np.arange(len(c)))
    left = np.floor(place).astype(np.int64)
    share = place - left
    stretch = np.exp((1 - share) * theta[..., left] + share * theta[..., np.minimum(left + 1, len(c) - 1)])
    median = quantiles[..., middle, None]
    out = quantiles - median
    out *= stretch[:, :, ranges]
    for q in range(middle + 1, len(p)):
        np.maximum(out[..., q], out[..., q - 1], out=out[..., q])
    for q in range(middle - 1, -1, -1):
        np.minimum(out[..., q], out[..., q + 1], out=out[..., q])
    out += median
    return out


def starting_theta(
    deviation: Float64[np.ndarray, "N n"],
    below: Float64[np.ndarray, "N n C"],
    above: Float64[np.ndarray, "N n C"],
    rules: Rules,
) -> Float64[np.ndarray, "N C"]:
    """The θ with which intervals would have had their coverage on a validation part.

    Args:
        deviation: values less the median of their forecast, n per range of leads; NaN is left out.
        below: distances from the median to the model's lower quantiles.
        above: to its upper ones.
        rules: coverages and bounds.
    """
    N, _, C = below.shape
    out = np.zeros((N, C))
    for i in range(N):
        seen = ~np.isnan(deviation[i])
        d = deviation[i][seen, None]
        if not len(d):
            continue
        edge = np.where(d < 0, below[i][seen], above[i][seen])
        size = np.abs(d)
        ratio = np.divide(size, edge, out=np.where(size > 0, np.inf, 0.0) * np.ones_like(edge), where=edge > 0)
        for k, share in enumerate(rules.coverages):
            rank = min(len(d) - 1, int(np.ceil(share * (len(d) + 1))) - 1)
            out[i, k] = np.log(max(np.partition(ratio[:, k], rank)[rank], 1e-300))
    return np.clip(out, rules.lowest, rules.highest)


def _inside(deviation: np.ndarray, below: np.ndarray, above: np.ndarray) -> np.ndarray:
    # pending edges are rounded to half precision: a value that lies on one counts as inside
    edge = np.where(deviation < 0, below, above)
    return np.abs(deviation) <= edge * (1 + HALF)
