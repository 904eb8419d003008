"""A correction of the head per series, learned from forecasts whose targets have been seen. Off unless asked for.

The residual of a frozen forecast, in units of the series' scale, is regressed on features x of the moment of issue:
x = (1) is a bias, further features are a projection of what the head read. With forgetting f per value and a ridge of
`prior` imagined values without error this is recursive least squares in its information form,

    G <- f G + x xᵀ,   m <- f m + x e,   w = (G + prior I)^-1 m,

per series, variate and range of leads. Shared weights never change. Collecting residuals is bookkeeping: a residual
exists only once its target has come, and none of it has an effect until `consume` is called.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64

CONTESTANTS = ("frozen", "adapted", "persistence")  # along the last axis of `Contest.sums`
MOST = 16  # features, the constant included


class Learning(NamedTuple):
    """How a correction learns.

    Attributes:
        features: beside the constant.
        forget: weight that a value keeps when the next has come.
        prior: imagined values without error.
        limit: residuals are cut off at so many scales.
    """

    features: int = 0
    forget: float = 0.995
    prior: float = 20.0
    limit: float = 8.0


class AdaptState(NamedTuple):
    """Sufficient statistics; N ranges of leads, D features with the constant. Zeros are "no correction".

    Attributes:
        new_gram: float64 (S, V, N, D, D), of the residuals that nobody has consumed yet.
        new_moment: float64 (S, V, N, D), likewise.
        new_count: int64 (S, V, N), how many they are.
        gram: float64 (S, V, N, D, D), consumed.
        moment: float64 (S, V, N, D), consumed.
        weights: float64 (S, V, N, D), the correction.
    """

    new_gram: np.ndarray
    new_moment: np.ndarray
    new_count: np.ndarray
    gram: np.ndarray
    moment: np.ndarray
    weights: np.ndarray


class Contest(NamedTuple):
    """Decayed absolute errors of the frozen forecast, the corrected one and persistence, in units of the scale.

    Attributes:
        weight: float64 (S, V, N).
        sums: float64 (S, V, N, 3).
    """

    weight: np.ndarray
    sums: np.ndarray


def empty(slots: int, variates: int, ranges: int, features: int) -> AdaptState:
    """No correction, nothing collected; `features` counts the constant."""
    shape = (slots, variates, ranges)
    gram, moment = (*shape, features, features), (*shape, features)
    return AdaptState(
        np.zeros(gram), np.zeros(moment), np.zeros(shape, np.int64), np.zeros(gram), np.zeros(moment), np.zeros(moment)
    )


def empty_contest(slots: int, variates: int, ranges: int) -> Contest:
    """No error seen yet."""
    return Contest(np.zeros((slots, variates, ranges)), np.zeros((slots, variates, ranges, 3)))


def check_learning(learning: Learning) -> Learning:
    """The settings themselves.

    Raises:
        ValueError: one of them is out of range.
    """
    if not 0 <= learning.features < MOST:
        raise ValueError(f"features is {learning.features}, expected 0 to {MOST - 1} beside the constant")
    if not 0 < learning.forget <= 1:
        raise ValueError(f"forget is {learning.forget}, expected a number above 0 and at most 1")
    if not learning.prior > 0 or not learning.limit > 0:
        raise ValueError(f"prior {learning.prior}, limit {learning.limit}: expected positive numbers")
    return learning


def collect(
    state: AdaptState,
    residual: Float64[np.ndarray, "B V N"],
    features: Float[np.ndarray, "B V N D"],
    seen: Bool[np.ndarray, "B V N"],
    learning: Learning,
) -> AdaptState:
    """Notes residuals whose targets have come; the correction stays what it is.

    Args:
        state: rows of it.
        residual: value less the frozen median, in units of the scale; anything where not `seen`.
        features: of the moment of issue, the constant first.
        seen: where there is a value and a forecast of it.
        learning: how much of the notes a new value leaves.
    """
    e = np.clip(np.where(seen, residual, 0.0), -learning.limit, learning.limit)[..., None]
    x = np.where(seen[..., None], features, 0.0)
    keep = np.where(seen, learning.forget, 1.0)[..., None]
    return state._replace(
        new_gram=state.new_gram * keep[..., None] + x[..., :, None] * x[..., None, :],
        new_moment=state.new_moment * keep + x * e,
        new_count=state.new_count + seen,
    )


def consume(state: AdaptState, learning: Learning) -> AdaptState:
    """Learns from everything collected: the same correction whether this is called once or after each value."""
    keep = (learning.forget**state.new_count)[..., None]
    gram = state.gram * keep[..., None] + state.new_gram
    moment = state.moment * keep + state.new_moment
    D = moment.shape[-1]
    solved = np.linalg.solve(gram + learning.prior * np.eye(D), moment[..., None])[..., 0]
    fresh = (state.new_count > 0)[..., None]
    return AdaptState(
        np.zeros_like(state.new_gram),
        np.zeros_like(state.new_moment),
        np.zeros_like(state.new_count),
        gram,
        moment,
        np.where(fresh, solved, state.weights),
    )


def shift(state: AdaptState, features: Float[np.ndarray, "B V D"]) -> Float64[np.ndarray, "B V N"]:
    """What to add to forecasts, in units of the scale, per range of leads."""
    return (state.weights * features[:, :, None]).sum(-1)


def compare(
    contest: Contest, errors: Float64[np.ndarray, "B V N 3"], seen: Bool[np.ndarray, "B V N"], *, decay: float
) -> Contest:
    """The rows of a contest after one value each; `errors` as `CONTESTANTS`, in units of the scale."""
    keep = np.where(seen, decay, 1.0)
    fresh = np.where(seen[..., None], np.abs(errors), 0.0)
    return Contest(contest.weight * keep + seen, contest.sums * keep[..., None] + fresh)


def standings(contest: Contest) -> Float64[np.ndarray, "B V N 3"]:
    """Decayed mean absolute errors as `CONTESTANTS`; NaN where nothing was seen."""
    return contest.sums / np.where(contest.weight > 0, contest.weight, np.nan)[..., None]
