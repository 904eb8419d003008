"""What is odd about a stream: anomalies, drifts of level and spread, and surprise of the memory itself.

All are read off z, the normal score of each value under the forecast issued before it, so one threshold serves every
series. A drift is found by cumulative sums (Page 1954): S <- max(0, S + x - k), alarm and start anew at S >= h, the
change having begun after S was last zero.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64

KINDS = ("anomaly", "level", "spread")  # along the last axis of `Signals`
SLACK = 0.5  # k: half the shift that is found fastest
CLIP = 4.0  # one wild value is an anomaly, not a drift
FAST, SLOW = 0.1, 0.005  # rates of the two means of surprise


class Thresholds(NamedTuple):
    """When to speak.

    Attributes:
        anomaly: of |z|; 3.89 is once in 10,000 independent values.
        level: of the sums of z; 8 is about once in 10,000.
        spread: of the sums of (z² - 1) / √2; 12 is about once in 45,000.
        surprise: of the fast mean of the memory's residual over the slow one.
        warm: tokens before surprise speaks.
    """

    anomaly: float = 3.89
    level: float = 8.0
    spread: float = 12.0
    surprise: float = 3.0
    warm: int = 100


class SignalState(NamedTuple):
    """Cumulative sums and means; zeros are "nothing seen yet".

    Attributes:
        sums: float64 (S, V, 4): level up, level down, spread up, spread down.
        begin: int64 (S, V, 4): first step of the excursion that each sum is in; of no meaning where it is zero.
        alarms: int64 (S, V, 3), how often each kind spoke.
        surprise: float64 (S, V, 2), fast and slow sums of the memory's residual.
        tokens: int64 (S, V), residuals seen.
        surprised: int64 (S, V), the step after which surprise has been high, plus one; 0 where it is not.
    """

    sums: np.ndarray
    begin: np.ndarray
    alarms: np.ndarray
    surprise: np.ndarray
    tokens: np.ndarray
    surprised: np.ndarray


class Signals(NamedTuple):
    """What was heard; the last axis is `KINDS`.

    Attributes:
        score: z; then the larger of the two sums, negative if it is the one downwards. NaN where nothing was scored.
        alarm: whether it reached its threshold.
        since: step at which the anomaly lies or the drift is thought to have begun; -1 where there is none.
    """

    score: Float64[np.ndarray, "B V 3"]
    alarm: Bool[np.ndarray, "B V 3"]
    since: Int64[np.ndarray, "B V 3"]


class Events(NamedTuple):
    """Alarms alone, one entry each.

    Attributes:
        row: place of the series in the call.
        variate: place along V.
        kind: place in `KINDS`.
        score: see `Signals`.
        since: see `Signals`.
    """

    row: Int64[np.ndarray, " n"]
    variate: Int64[np.ndarray, " n"]
    kind: Int64[np.ndarray, " n"]
    score: Float64[np.ndarray, " n"]
    since: Int64[np.ndarray, " n"]


def empty(slots: int, variates: int) -> SignalState:
    """Nothing seen yet."""
    shape = (slots, variates)
    return SignalState(
        np.zeros((*shape, 4)),
        np.zeros((*shape, 4), np.int64),
        np.zeros((*shape, 3), np.int64),
        np.zeros((*shape, 2)),
        np.zeros(shape, np.int64),
        np.zeros(shape, np.int64),
    )


def check_thresholds(thresholds: Thresholds) -> Thresholds:
    """The thresholds themselves.

    Raises:
        ValueError: one is not positive.
    """
    for name, value in zip(Thresholds._fields, thresholds, strict=True):
        if not value > 0:
            raise ValueError(f"threshold {name} is {value}, expected a positive number")
    return thresholds


def update(
    state: SignalState, steps: Int64[np.ndarray, " B"], z: Float64[np.ndarray, "B V"], thresholds: Thresholds
) -> tuple[SignalState, Signals]:
    """The rows of a state after one value each, and what was heard.

    Args:
        state: rows of it.
        steps: of the values.
        z: normal scores; NaN changes nothing.
        thresholds: when to speak.
    """
    seen = ~np.isnan(z)
    z = np.where(seen, z, 0.0)
    after = np.maximum(0.0, state.sums + _increments(z))
    begin = np.where(state.sums > 0, state.begin, steps[:, None, None])
    after, begin = (
        np.where(seen[..., None], after, state.sums),
        np.where(seen[..., None], begin, state.begin),
    )
    pairs = after.reshape(*z.shape, 2, 2)
    down = pairs[..., 1] > pairs[..., 0]
    peak = pairs.max(-1)
    alarm = np.concatenate(
        [
            (np.abs(z) >= thresholds.anomaly)[..., None],
            peak >= np.array([thresholds.level, thresholds.spread]),
        ],
        -1,
    )
    alarm &= seen[..., None]
    score = np.concatenate([z[..., None], np.where(down, -peak, peak)], -1)
    began = np.take_along_axis(begin.reshape(*z.shape, 2, 2), down[..., None].astype(np.int64), -1)[..., 0]
    since = np.concatenate([np.broadcast_to(steps[:, None, None], (*z.shape, 1)), began], -1)
    after = np.where(np.repeat(alarm[..., 1:], 2, -1), 0.0, after)
    return (
        state._replace(sums=after, begin=begin, alarms=state.alarms + alarm),
        Signals(np.where(seen[..., None], score, np.nan), alarm, np.where(alarm, since, -1)),
    )


def surprise(
    state: SignalState,
    steps: Int64[np.ndarray, " B"],
    residual: Float64[np.ndarray, "B V"],
    thresholds: Thresholds,
) -> tuple[SignalState, Float64[np.ndarray, "B V"], Bool[np.ndarray, "B V"]]:
    """Takes in the memory's own relative residual |v - Sᵀk| / |v| of one token each.

    Args:
        state: rows of it.
        steps: of the tokens.
        residual: at least 0; NaN changes nothing.
        thresholds: when to speak.

    Returns:
        The rows of the state, the fast mean over the slow one (NaN where unseen), and whether it is high.
    """
    seen = np.isfinite(residual)
    rates = np.array([FAST, SLOW])
    x = np.where(seen, residual, 0.0)[..., None]
    sums = np.where(seen[..., None], state.surprise * (1 - rates) + rates * x, state.surprise)
    tokens = state.tokens + seen
    mean = sums / np.maximum(1 - (1 - rates) ** tokens[..., None], SLOW)
    ratio = np.divide(mean[..., 0], mean[..., 1], out=np.ones_like(mean[..., 0]), where=mean[..., 1] > 0)
    high = seen & (tokens > thresholds.warm) & (ratio >= thresholds.surprise)
    began = np.where(high, np.where(state.surprised > 0, state.surprised, steps[:, None] + 1), 0)
    return (
        state._replace(surprise=sums, tokens=tokens, surprised=np.where(seen, began, state.surprised)),
        np.where(seen, ratio, np.nan),
        high,
    )


def events(signals: Signals) -> Events:
    """The alarms among signals, in the order of their rows."""
    row, variate, kind = np.nonzero(signals.alarm)
    at = (row, variate, kind)
    return Events(row, variate, kind, signals.score[at], signals.since[at])


def fit_thresholds(z: Float64[np.ndarray, "R T"], *, arl: int | float = 10_000) -> Thresholds:
    """Thresholds at which each kind speaks once in `arl` values of a stretch without change.

    z of one patch share an origin and are dependent, and a model's forecasts are not quite right: so the rate is
    measured by replay. Where the stretch is too short for it, the log of the number of alarms, which is nearly linear
    in the threshold, is extended.

    Args:
        z: normal scores of R series, as `update` would see them; NaN is left out.
        arl: values per false alarm.

    Raises:
        ValueError: fewer than 1,000 values, or arl below 10.
    """
    values = int((~np.isnan(z)).sum())
    if values < 1000:
        raise ValueError(f"{values} scored values, expected at least 1000 to measure a rate of false alarms")
    if not arl >= 10:
        raise ValueError(f"arl is {arl}, expected at least 10 values per false alarm")
    heights = np.geomspace(1.0, 200.0, 80)
    sums = np.zeros((len(z), 4, len(heights)))
    counts = np.zeros((2, len(heights)), np.int64)
    for column in z.T:
        seen = ~np.isnan(column)
        step = _increments(np.where(seen, column, 0.0))[..., None]
        sums = np.where(seen[:, None, None], np.maximum(0.0, sums + step), sums)
        alarm = (sums >= heights).reshape(len(z), 2, 2, -1).any(2)
        counts += alarm.sum(0)
        sums = np.where(np.repeat(alarm, 2, 1), 0.0, sums)
    size = np.abs(z[~np.isnan(z)])
    tails = np.geomspace(0.5, 50.0, 400)
    beyond = len(size) - np.searchsorted(np.sort(size), tails)
    # the log of a normal tail is nearly linear in its square
    anomaly = np.sqrt(_height(tails**2, beyond, values / arl))
    level, spread = (_height(heights, c, values / arl) for c in counts)
    return Thresholds(anomaly=float(anomaly), level=float(level), spread=float(spread))


def fit_surprise(ratios: Float64[np.ndarray, "..."], *, arl: int | float = 10_000) -> float:
    """The ratio of fast to slow mean that one token in `arl` of a stretch without change exceeds, at least 1.

    Raises:
        ValueError: fewer tokens than `arl`.
    """
    known = ratios[~np.isnan(ratios)]
    if len(known) < arl:
        raise ValueError(f"{len(known)} tokens, expected at least arl = {arl}")
    return max(1.0, float(np.quantile(known, 1 - 1 / arl)))


def simulate(
    thresholds: Thresholds,
    *,
    shift: float = 0.0,
    spread: float = 1.0,
    streams: int = 2000,
    steps: int = 1000,
    seed: int = 0,
) -> Int64[np.ndarray, "streams 2"]:
    """First alarm of level and of spread on independent normal z that have changed from the first step on.

    Args:
        thresholds: when to speak.
        shift: mean of z.
        spread: standard deviation of z.
        streams: simulated.
        steps: of each at most.
        seed: of the random numbers.

    Returns:
        Values until the first alarm, that one included; `steps` + 1 where none came.
    """
    draws = np.random.default_rng(seed)
    first = np.full((streams, 2), steps + 1, np.int64)
    state = empty(streams, 1)
    for step in range(steps):
        z = shift + spread * draws.standard_normal((streams, 1))
        state, heard = update(state, np.full(streams, step), z, thresholds)
        first = np.where((first > steps) & heard.alarm[:, 0, 1:], step + 1, first)
    return first


def normal_anomaly(arl: int | float) -> float:
    """The |z| that one independent normal value in `arl` exceeds."""
    return float(-torch.special.ndtri(torch.tensor(0.5 / arl, dtype=torch.float64)))


def _increments(z: np.ndarray) -> np.ndarray:
    """What a value adds to the four sums (..., 4)."""
    level = np.clip(z, -CLIP, CLIP)
    spread = np.minimum((np.square(z) - 1) / np.sqrt(2), CLIP)
    return np.stack([level, -level, spread, -spread], -1) - SLACK


def _height(heights: np.ndarray, counts: np.ndarray, allowed: float) -> float:
    """The smallest height with at most `allowed` alarms; extended where fewer than ten would have to be counted."""
    if allowed >= 10:
        enough = np.flatnonzero(counts <= allowed)
        if len(enough):
            i = int(enough[0])
            if i == 0:
                return float(heights[0])
            a, b = np.log(counts[i - 1]), np.log(max(counts[i], 0.5))
            share = (a - np.log(allowed)) / (a - b)
            return float(heights[i - 1] + share * (heights[i] - heights[i - 1]))
    known = (counts >= 10) & (counts <= 0.2 * counts[0])
    if known.sum() < 2:
        raise ValueError(
            f"the stretch has {int(counts[0])} alarms at the lowest threshold, too few to extend: give more values"
        )
    slope, base = np.polyfit(heights[known], np.log(counts[known]), 1)
    return float(max(heights[known][-1], (np.log(allowed) - base) / slope))
