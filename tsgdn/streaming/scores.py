"""What a value says about the forecast that was issued before it: PIT, log score, CRPS, and their running summaries.

A forecast is a set of quantiles. Its distribution function is linear between them on the normal scale (so it is exact
for a normal forecast) and exponential beyond them, with a density that goes on from the outermost pair.
"""

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64

BINS = 20  # of the PIT histogram
HALF = 2.0**-10  # twice the rounding of half precision, in which pending quantiles are kept
WIDTH_FLOOR = 1e-6  # in units of the scale: values nearer than this count as equal, so no density exceeds its inverse
DENSITY_FLOOR = 1e-9  # in units of 1 / scale: a value that was thought impossible costs 20.7 nats, not infinity
TAIL_FLOOR = 1e-15  # of a probability; |z| stays below 8


class Grid:
    """Quantile levels with what scores need of them.

    Args:
        levels: increasing, within (0, 1), at least two.

    Raises:
        ValueError: they are not.
    """

    def __init__(self, levels: Sequence[float]) -> None:
        p = np.asarray(levels, np.float64)
        if p.ndim != 1 or len(p) < 2 or not (np.diff(p) > 0).all() or not 0 < p[0] <= p[-1] < 1:
            raise ValueError(f"quantile levels are {tuple(levels)}, expected two or more, increasing, between 0 and 1")
        normal = NormalDist()
        self.levels = p
        self.z = np.array([normal.inv_cdf(float(x)) for x in p])
        # the share of (0, 1) that is nearest to each level: integrates the pinball loss over uneven levels
        self.shares = np.diff(np.concatenate([[0.0], (p[1:] + p[:-1]) / 2, [1.0]]))
        # scale of each exponential tail per width of the outermost pair: its density goes on where the normal one ends
        ends = np.array([normal.pdf(float(x)) for x in self.z[[0, -1]]])
        self.tail = p[[0, -1]] * [1, -1] + [0, 1]
        self.reach = self.tail / (ends * np.diff(self.z)[[0, -1]])


class Scores(NamedTuple):
    """Scores of values, one per series and variate; NaN where there was no value or no forecast of it.

    Attributes:
        pit: probability that the forecast gave to smaller values, ties halved: uniform if forecasts are right.
        z: the PIT as a normal score, within +-8.
        log_score: minus the log of the forecast's density at the value, in nats and the unit of the series; small is
            good.
        crps: continuous ranked probability score in the unit of the series.
        error: value minus median.
    """

    pit: Float64[np.ndarray, "B V"]
    z: Float64[np.ndarray, "B V"]
    log_score: Float64[np.ndarray, "B V"]
    crps: Float64[np.ndarray, "B V"]
    error: Float64[np.ndarray, "B V"]


class ScoreState(NamedTuple):
    """Running summaries; zeros are "nothing scored yet".

    Attributes:
        count: int64 (S, V), values scored.
        weight: of the decayed sums.
        sums: float64 (S, V, 3), decayed sums of log score, CRPS and absolute error.
        histogram: float32 (S, V, 20), decayed counts of PITs.
    """

    count: np.ndarray
    weight: np.ndarray
    sums: np.ndarray
    histogram: np.ndarray


def empty(slots: int, variates: int) -> ScoreState:
    """Nothing scored yet."""
    shape = (slots, variates)
    return ScoreState(
        np.zeros(shape, np.int64), np.zeros(shape), np.zeros((*shape, 3)), np.zeros((*shape, BINS), np.float32)
    )


def score(
    values: Float64[np.ndarray, "B V"],
    quantiles: Float64[np.ndarray, "B V Q"],
    median: Float64[np.ndarray, "B V"],
    scale: Float64[np.ndarray, "B V"],
    grid: Grid,
    seen: Bool[np.ndarray, "B V"],
) -> Scores:
    """Scores values against quantiles that were issued before them.

    Args:
        values: in the unit of the series; anything where not `seen`.
        quantiles: increasing along Q; anything where not `seen`.
        median: of the forecast.
        scale: positive size of the series; sets the floors.
        grid: of Q levels.
        seen: where there is a value and a forecast.
    """
    y = np.where(seen, values, 0.0)
    q = np.where(seen[..., None], quantiles, 0.0)
    middle = np.where(seen, median, 0.0)
    size = np.where(seen, scale, 1.0)
    # A value within half a `window` of several equal quantiles is tied with them: the mean over the window is mid-PIT,
    # and its slope the density, finite at atoms too.
    window = HALF * np.abs(y - middle) + WIDTH_FLOOR * size
    (low, high), (low_rest, high_rest) = _distribution(np.stack([y - window, y + window]), q, grid)
    pit, rest = (low + high) / 2, (low_rest + high_rest) / 2
    lower = pit < 0.5
    z = _ndtri(np.maximum(np.where(lower, pit, rest), TAIL_FLOOR)) * np.where(lower, 1.0, -1.0)
    mass = np.where(lower, high - low, low_rest - high_rest)
    density = np.maximum(mass / (2 * window / size), DENSITY_FLOOR)
    log_score = np.log(size) - np.log(density)
    above = y[..., None] - q
    crps = 2 * (np.where(above >= 0, grid.levels, grid.levels - 1) * above * grid.shares).sum(-1)
    return Scores(*(np.where(seen, x, np.nan) for x in (pit, z, log_score, crps, y - middle)))


def update(state: ScoreState, scores: Scores, *, decay: float) -> ScoreState:
    """The summaries (rows of them) after these scores; NaN changes nothing. `decay` per value, below 1."""
    seen = ~np.isnan(scores.pit)
    keep = np.where(seen, decay, 1.0)
    new = np.stack([scores.log_score, scores.crps, np.abs(scores.error)], -1)
    place = np.minimum((np.where(seen, scores.pit, 0.0) * BINS).astype(np.int64), BINS - 1)
    hit = (place[..., None] == np.arange(BINS)) & seen[..., None]
    return ScoreState(
        state.count + seen,
        state.weight * keep + seen,
        state.sums * keep[..., None] + np.where(seen[..., None], new, 0.0),
        (state.histogram * keep[..., None].astype(np.float32) + hit).astype(np.float32),
    )


def means(state: ScoreState) -> Float64[np.ndarray, "B V 3"]:
    """Decayed means of log score, CRPS and absolute error; NaN where nothing was scored."""
    weight = np.where(state.weight > 0, state.weight, np.nan)
    return state.sums / weight[..., None]


def _distribution(
    y: Float64[np.ndarray, "2 B V"], q: Float64[np.ndarray, "B V Q"], grid: Grid
) -> tuple[Float64[np.ndarray, "2 B V"], Float64[np.ndarray, "2 B V"]]:
    """The probability of values up to `y`, and of those beyond, each exact where it is small."""
    _, B, V = y.shape
    Q = len(grid.levels)
    index = (q <= y[..., None]).sum(-1)
    right = np.minimum(np.maximum(index, 1), Q - 1)
    rows, columns = np.arange(B)[:, None], np.arange(V)
    left_q, right_q = q[rows, columns, right - 1], q[rows, columns, right]
    width = right_q - left_q
    share = np.divide(y - left_q, width, out=np.zeros_like(y), where=width > 0)
    z = grid.z[right - 1] + np.minimum(np.maximum(share, 0.0), 1.0) * (grid.z[right] - grid.z[right - 1])
    p, rest = _ndtr(z), _ndtr(-z)
    below, above = index == 0, index == Q
    distance = np.where(below, q[..., 0] - y, y - q[..., -1])
    reach = width * np.where(below, grid.reach[0], grid.reach[1])
    # a tail without width holds nothing: the outermost level is an atom
    far = np.divide(np.maximum(distance, 0.0), reach, out=np.full_like(y, np.inf), where=reach > 0)
    gone = np.exp(-np.minimum(far, 700.0)) * (far < 700.0)
    p = np.where(below, grid.tail[0] * gone, np.where(above, 1 - grid.tail[1] * gone, p))
    rest = np.where(above, grid.tail[1] * gone, np.where(below, 1 - grid.tail[0] * gone, rest))
    return p, rest


def _ndtr(z: np.ndarray) -> np.ndarray:
    return torch.special.ndtr(torch.from_numpy(np.ascontiguousarray(z))).numpy()


def _ndtri(p: np.ndarray) -> np.ndarray:
    return torch.special.ndtri(torch.from_numpy(np.ascontiguousarray(p))).numpy()
