"""Numbers from forecasts of the retention tasks: pooled over sequences, against the noise-free mean."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

FAILURE = 0.1
"""Ret at the shortest gap below which a model counts as one that never learned the task."""


class Crossing(NamedTuple):
    """Where a curve crosses its level; `censored` says that it lies beyond that end of the grid, which `at` then is."""

    at: float
    censored: Literal["below", "above"] | None


class CrossTalk(NamedTuple):
    """T6: what a target's forecast is made of.

    Attributes:
        coefficients: of each target on own rare value, own parked value, other channels' current values in their order.
        standard_errors: of these.
        score: mean over all but the first column of coefficient^2 - standard error^2; 0 expected without cross-talk.
    """

    coefficients: Float[np.ndarray, "targets C_and_1"]
    standard_errors: Float[np.ndarray, "targets C_and_1"]
    score: float


class Binding(NamedTuple):
    """T8: retention of the topology, share of channels with the right driver, share bound to another topology's."""

    ret: float
    driver_accuracy: float
    swap_rate: float


def squared_errors(
    forecast: Float[np.ndarray, "B P C"], truth: Float[np.ndarray, "B P C"], use: Bool[np.ndarray, "B P *C"]
) -> Float[np.ndarray, " B"]:
    """Sum of squared errors of each sequence over the probes (and channels) in `use`: what is pooled and resampled.

    Raises:
        ValueError: a forecast that counts is not finite.
    """
    where = np.broadcast_to(use if use.ndim == 3 else use[..., None], truth.shape)
    if not np.isfinite(forecast[where]).all():
        raise ValueError(f"{int((~np.isfinite(forecast[where])).sum())} forecasts are not finite; forecast all probes")
    return np.where(where, (forecast - truth) ** 2, 0.0).sum((1, 2))


def retention(
    error: Float[np.ndarray, "*lead N"],
    memoryless: Float[np.ndarray, "*lead N"],
    oracle: Float[np.ndarray, "*lead N"] | int | float = 0.0,
) -> Float[np.ndarray, "*lead"]:
    """Ret = 1 - (MSE - MSE_oracle) / (MSE_memoryless - MSE_oracle), pooled over the sequences of the last axis.

    Against the noise-free mean the oracle's error is 0. Below 0 where the forecast is worse than no memory; NaN where
    there is nothing to remember.
    """
    best = np.sum(np.broadcast_to(oracle, np.shape(error)), -1)
    span = np.sum(memoryless, -1) - best
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(span > 0, 1 - (np.sum(error, -1) - best) / span, np.nan))


def nmse(error: Float[np.ndarray, "*lead N"], memoryless: Float[np.ndarray, "*lead N"]) -> Float[np.ndarray, "*lead"]:
    """Pooled squared error as a share of the memoryless one: 1 - Ret against a perfect oracle."""
    return np.asarray(1 - retention(error, memoryless))


def aurc(ret: Float[np.ndarray, "*lead G"]) -> Float[np.ndarray, "*lead"]:
    """Area under the retention curve: the mean of Ret over the test gaps."""
    return np.asarray(np.mean(ret, -1))


def failed(ret: Float[np.ndarray, "*lead G"]) -> Bool[np.ndarray, "*lead"]:
    """True for models whose Ret at the shortest gap (the first) is below 0.1 or not a number.

    They never learned the task, which says nothing about memory: their share is reported apart.
    """
    return ~np.asarray(ret[..., 0] >= FAILURE)


def half_life(
    grid: Float[np.ndarray, " G"] | Int[np.ndarray, " G"], ret: Float[np.ndarray, " G"], *, level: int | float = 0.5
) -> Crossing:
    """G50 (over gaps) or M50 (over loads): where a non-increasing fit crosses `level`, linear in ln of the grid.

    The fit is the least-squares isotonic one (pool adjacent violators).

    Raises:
        ValueError: the grid does not increase, is not positive, or has another length than `ret`.
    """
    x = np.asarray(grid, float)
    if x.shape != ret.shape or x.size < 2 or x[0] <= 0 or (np.diff(x) <= 0).any():
        raise ValueError(f"grid {x.tolist()} must be positive and increasing, one point per Ret ({ret.shape})")
    fit = non_increasing(ret)
    if fit[0] < level:
        return Crossing(float(x[0]), "below")
    if fit[-1] > level:
        return Crossing(float(x[-1]), "above")
    after = int(np.argmax(fit <= level))
    if after == 0 or fit[after] == fit[after - 1]:
        return Crossing(float(x[after]), None)
    share = (fit[after - 1] - level) / (fit[after - 1] - fit[after])
    return Crossing(float(np.exp(np.log(x[after - 1]) + share * np.log(x[after] / x[after - 1]))), None)


def non_increasing(y: Float[np.ndarray, " G"]) -> Float[np.ndarray, " G"]:
    """The non-increasing sequence nearest to `y` in squares."""
    pools: list[tuple[float, int]] = []
    for value in np.asarray(y, float).tolist():
        mean, size = value, 1
        while pools and pools[-1][0] < mean:
            left, count = pools.pop()
            mean, size = (left * count + mean * size) / (count + size), count + size
        pools.append((mean, size))
    return np.repeat([mean for mean, _ in pools], [size for _, size in pools])


def recalled_bits(ret: int | float, *, channels: int, filter_ret: int | float) -> float:
    """Dense numeric fidelity, -(C/2) log2(1 - Ret): at least 0, at most what the filter-oracle's Ret gives."""
    return float(-channels / 2 * np.log2(1 - np.clip(ret, 0.0, min(max(filter_ret, 0.0), 1 - 1e-15))))


def written_bits(*, channels: int, visible: int, noise: int | float) -> float:
    """Bits that n visible steps of noise sv tell about a value N(0, I): C/2 log2(1 + n / sv^2)."""
    return channels / 2 * float(np.log2(1 + visible / noise**2))


def stale_intrusion(
    forecast: Float[np.ndarray, "n C"], new: Float[np.ndarray, "n C"], old: Float[np.ndarray, "n C"]
) -> tuple[float, float]:
    """Coefficients of the current and of the replaced value in the pooled regression of the forecast on both (T5).

    Take the probes of revised regimes only: `old` is the value of the version before.
    """
    design = np.stack([new.ravel(), old.ravel()], 1).astype(float)
    current, stale = np.linalg.lstsq(design, forecast.ravel().astype(float), rcond=None)[0]
    return float(current), float(stale)


def cross_talk(
    forecast: Float[np.ndarray, "N C"],
    theta: Float[np.ndarray, "N C regimes"],
    parked: Int[np.ndarray, "N C"],
    *,
    targets: int,
) -> CrossTalk:
    """Regresses each target's forecast at the probe of T6 on what could have reached it, over N sequences.

    Args:
        forecast: for the probe step.
        theta: values of every channel's regimes, the rare one last.
        parked: each channel's regime before the probe.
        targets: the first so many channels jump to their rare regime.

    Raises:
        ValueError: not more sequences than coefficients.
    """
    N, C = forecast.shape
    if N <= C + 1:
        raise ValueError(f"{N} sequences do not determine {C + 1} coefficients; take more")
    rare = theta[..., -1].astype(float)
    before = np.take_along_axis(theta, parked[..., None], -1)[..., 0].astype(float)
    current = np.concatenate([rare[:, :targets], before[:, targets:]], 1)
    coefficients, errors = np.empty((targets, C + 1)), np.empty((targets, C + 1))
    for i in range(targets):
        design = np.column_stack([rare[:, i], before[:, i], np.delete(current, i, 1)])
        gram = np.linalg.inv(design.T @ design)
        coefficients[i] = gram @ design.T @ forecast[:, i]
        left = forecast[:, i] - design @ coefficients[i]
        errors[i] = np.sqrt(np.diag(gram) * (left @ left) / (N - C - 1))
    off = (coefficients**2 - errors**2)[:, 1:]
    return CrossTalk(coefficients, errors, float(off.mean()))


def effect_retention(estimate: Float[np.ndarray, "*shape C"], truth: Float[np.ndarray, "*shape C"]) -> float:
    """T7: 1 - sum |dhat - b|^2 / sum |b|^2, dhat = forecast after do(a) - forecast after do(nothing), at the lag."""
    return float(1 - np.sum((estimate - truth) ** 2) / np.sum(np.asarray(truth, float) ** 2))


def control_regret(
    estimate: Float[np.ndarray, "B A C"], truth: Float[np.ndarray, "B A C"], goal: Float[np.ndarray, "B C"]
) -> float:
    """T7: what choosing the action with the largest goal . dhat_a loses, as a share of what a random choice loses.

    Args:
        estimate: dhat of every action.
        truth: b of every action.
        goal: a random unit vector per sequence.
    """
    gain = np.einsum("bac,bc->ba", truth, goal)
    chosen = np.einsum("bac,bc->ba", estimate, goal).argmax(1)
    best = gain.max(1)
    lost = best - np.take_along_axis(gain, chosen[:, None], 1)[:, 0]
    return float(lost.sum() / (best - gain.mean(1)).sum())


def binding(estimate: Float[np.ndarray, "B C C"], topology: Float[np.ndarray, "B regimes C C"]) -> Binding:
    """T8: scores of an estimate of 0.9 P of the rare topology (the last), whose columns are answers to impulses.

    ret = 1 - sum |What - 0.9 P|^2 / sum |W0 - 0.9 P|^2, W0 = 0.9 (1 - I) / (C - 1). A column counts as swapped when its
    largest entry belongs to another stored topology and not to P.
    """
    C = estimate.shape[-1]
    law, ignorant = 0.9 * topology[:, -1], 0.9 * (1 - np.eye(C)) / (C - 1)
    ret = 1 - np.sum((estimate - law) ** 2) / np.sum((ignorant - law) ** 2)
    largest = estimate.argmax(1)[:, None]  # per column: the channel that it says is driven
    hit = np.take_along_axis(topology[:, -1], largest, 1)[:, 0] > 0
    elsewhere = (np.take_along_axis(topology[:, :-1], largest[:, None], 2)[:, :, 0] > 0).any(1)
    return Binding(float(ret), float(hit.mean()), float((elsewhere & ~hit).mean()))
