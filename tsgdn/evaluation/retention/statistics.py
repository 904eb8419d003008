"""Intervals over paired seeds, the pre-registered claim rule, and equivalence."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from tsgdn.evaluation.retention.scores import aurc, failed, retention

MARGIN = 0.05
"""Of the claim, of harm and of equivalence, in AURC."""
NMSE_MARGIN = 0.05
"""Relative: how much worse the common regimes may be served."""
DRAWS, RESAMPLES = 10_000, 500

Verdict = Literal["better", "equivalent", "inconclusive", "worse"]


class Difference(NamedTuple):
    """A paired difference, its bootstrap draws and what else the claim rule asks for.

    Attributes:
        estimate: mean over seeds of AURC(ours) - AURC(theirs).
        draws: bootstrap distribution of it.
        failure: share of failed seeds, ours and theirs.
        nmse_ratio: common NMSE of ours over that of theirs; NaN where it was not measured.
    """

    estimate: float
    draws: Float[np.ndarray, " draws"]
    failure: tuple[float, float] = (0.0, 0.0)
    nmse_ratio: float = float("nan")

    def interval(self, level: int | float = 0.95) -> tuple[float, float]:
        """Percentile interval."""
        tail = (1 - level) / 2
        low, high = np.quantile(self.draws, [tail, 1 - tail])
        return float(low), float(high)


class Bound(NamedTuple):
    """An interval after Holm's correction over its family, and the level it was taken at."""

    low: float
    high: float
    level: float


def paired_difference(
    ours: Float[np.ndarray, "S G N"],
    theirs: Float[np.ndarray, "S G N"],
    memoryless: Float[np.ndarray, "S G N"],
    *,
    common: tuple[Float[np.ndarray, "S G N"], Float[np.ndarray, "S G N"]] | None = None,
    use: Bool[np.ndarray, " S"] | None = None,
    draws: int = DRAWS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Difference in AURC of two mixers on the same seeds and test sequences, by hierarchical bootstrap.

    Each draw takes S seeds with replacement and, for every seed and gap, N sequences with replacement; both mixers get
    the same ones. Per seed, Ret is pooled over sequences, AURC is its mean over gaps; then the mean over seeds. Sums of
    resampled sequences come from a pool of `resamples` per seed and gap, since fresh ones for each of 10 000 draws cost
    much and change the interval by less than its Monte-Carlo error.

    All seeds count, failed ones too, so that nothing is selected by outcome; for the sensitivity analysis among the
    seeds that both learned pass `use`.

    Args:
        ours: sums of squared errors over the rare probes of a sequence.
        theirs: the same of the other mixer.
        memoryless: the same of the memoryless reference.
        common: (ours, theirs) over the common probes, for the ratio of NMSE.
        use: seeds to use; None: all.
        draws: of the bootstrap.
        resamples: distinct resamplings of the sequences.
        seed: of the bootstrap.

    Raises:
        ValueError: fewer than two seeds are left.
    """
    kept = np.ones(len(ours), bool) if use is None else use
    own, other, base = (x[kept].astype(float) for x in (ours, theirs, memoryless))
    S, G, N = own.shape
    if S < 2:
        raise ValueError(f"{S} seed(s) are left, expected at least 2 (the protocol asks for 10)")
    curves = retention(own, base), retention(other, base)
    rng = np.random.default_rng(seed)
    # The difference per seed, gap and resample: (sum theirs - sum ours) / sum memoryless, for the oracle's error is 0.
    pool = np.empty((S, G, resamples))
    for s in range(S):
        for g in range(G):
            pick = rng.integers(0, N, (resamples, N))
            pool[s, g] = (other[s, g] - own[s, g])[pick].sum(1) / base[s, g][pick].sum(1)
    seeds = rng.integers(0, S, (draws, S))
    total = np.zeros((draws, S))
    for g in range(G):
        total += pool[seeds, g, rng.integers(0, resamples, (draws, S))]
    ratio = float("nan")
    if common is not None:
        # Both are divided by the same memoryless error.
        ratio = float(np.mean(common[0][kept].sum(-1)) / np.mean(common[1][kept].sum(-1)))
    return Difference(
        estimate=float(np.mean(aurc(curves[0]) - aurc(curves[1]))),
        draws=total.mean(1) / G,
        failure=(float(failed(curves[0]).mean()), float(failed(curves[1]).mean())),
        nmse_ratio=ratio,
    )


def mean_interval(
    error: Float[np.ndarray, "S N"],
    memoryless: Float[np.ndarray, "S N"],
    *,
    level: int | float = 0.95,
    draws: int = DRAWS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Ret of one cell, mean over seeds, with its interval (seeds, then sequences): (value, low, high)."""
    rng = np.random.default_rng(seed)
    S, N = error.shape
    pool = np.empty((S, resamples))
    for s in range(S):
        pick = rng.integers(0, N, (resamples, N))
        pool[s] = retention(error[s][pick], memoryless[s][pick])
    seeds = rng.integers(0, S, (draws, S))
    drawn = pool[seeds, rng.integers(0, resamples, (draws, S))].mean(1)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(np.mean(retention(error, memoryless))), float(low), float(high)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p-values: at most as many false rejections in the family as each level says."""
    order = np.argsort(p)
    adjusted, running = np.empty(len(p)), 0.0
    for rank, i in enumerate(order):
        running = max(running, (len(p) - rank) * p[i])
        adjusted[i] = min(1.0, running)
    return adjusted.tolist()


def holm_bounds(
    family: Mapping[str, Difference], *, alpha: int | float = 0.05, margin: int | float = MARGIN
) -> dict[str, Bound]:
    """Intervals that hold for the whole family: the level of each follows Holm's order.

    Sorted by the one-sided p-value of "the difference is at most `margin`", the k-th of m is judged at 1 - alpha/(m-k),
    k from 0; from the first one that does not exceed the margin on, the level stays.
    """
    p = {name: (1 + int((d.draws <= margin).sum())) / (1 + len(d.draws)) for name, d in family.items()}
    bounds, level, stopped = {}, 1.0, False
    for rank, name in enumerate(sorted(p, key=lambda n: p[n])):
        if not stopped:
            level = 1 - alpha / (len(p) - rank)
        low, high = family[name].interval(level)
        stopped = stopped or low <= margin
        bounds[name] = Bound(low, high, level)
    return {name: bounds[name] for name in family}


def equivalent(difference: Difference, *, margin: int | float = MARGIN, alpha: int | float = 0.05) -> bool:
    """Two one-sided tests: both "at least margin" and "at most -margin" are refused at `alpha`.

    The same as: the interval at level 1 - 2 alpha lies within the margins.
    """
    low, high = difference.interval(1 - 2 * alpha)
    return -margin < low and high < margin


def verdict(
    differences: Sequence[Difference],
    bounds: Sequence[Bound],
    *,
    margin: int | float = MARGIN,
    nmse_margin: int | float = NMSE_MARGIN,
) -> Verdict:
    """The pre-registered rule for one contrast at one size, over its tasks (T2, T3, T5b).

    Better: lower bounds above `margin` on at least two tasks, none below -`margin`, and the common NMSE of none worse
    by more than 5 % (unknown ratios count as worse). Equivalent: by `equivalent` on every task. Worse: the mirror image
    of better without the condition on NMSE. Otherwise inconclusive.

    Args:
        differences: one per task.
        bounds: theirs, corrected over the primary family.
        margin: in AURC.
        nmse_margin: relative.

    Raises:
        ValueError: fewer than two tasks, or not one bound per difference.
    """
    if len(differences) < 2 or len(differences) != len(bounds):
        raise ValueError(f"{len(differences)} differences, {len(bounds)} bounds: expected one each for 2 or more tasks")
    served = all(d.nmse_ratio <= 1 + nmse_margin for d in differences)
    if served and sum(b.low > margin for b in bounds) >= 2 and all(b.low >= -margin for b in bounds):
        return "better"
    if all(equivalent(d, margin=margin) for d in differences):
        return "equivalent"
    if sum(b.high < -margin for b in bounds) >= 2 and all(b.high <= margin for b in bounds):
        return "worse"
    return "inconclusive"
