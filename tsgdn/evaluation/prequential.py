"""Running scores of a live stream: forecast, score, observe. Constant time and memory per scored forecast."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from tsgdn.evaluation.metrics import WQL_LEVELS, level_index, quantile_loss


class RunningSeasonalError:
    """The seasonal error of everything seen so far, per variate, from a ring of the last `seasonality` values.

    Equals `metrics.seasonal_error` of the past at any time: as long as less than a season was seen, the mean difference
    of neighbours.
    """

    def __init__(self, *, variates: int, seasonality: int) -> None:
        self.seasonality = seasonality
        self._ring = np.full((variates, seasonality), np.nan)
        self._last = np.full(variates, np.nan)
        self._steps = 0
        self._total = np.zeros((2, variates))
        self._count = np.zeros((2, variates))

    def observe(self, values: Float[np.ndarray, "V T"]) -> None:
        """Takes in the next steps; NaN = missing."""
        for value in np.asarray(values, float).T:
            cell = self._steps % self.seasonality
            steps = np.abs(np.stack([value - self._last, value - self._ring[:, cell]]))
            self._total += np.where(np.isfinite(steps), steps, 0.0)
            self._count += np.isfinite(steps)
            self._ring[:, cell] = self._last = value
            self._steps += 1

    @property
    def value(self) -> Float[np.ndarray, " V"]:
        """Per variate; 0 where no difference was seen."""
        which = int(self._steps >= self.seasonality)
        return self._total[which] / np.maximum(self._count[which], 1)


class RunningScores:
    """WQL, MASE and coverage of (origin, forecast, truth) triples, by lead and overall.

    Args:
        levels: of the forecasts; must hold .1, ..., .9.
        horizon: longest forecast.
        share: the central interval whose coverage is followed, .8 = from .1 to .9.
        half_life: in triples; what was scored that long ago counts half. None = all count the same.
    """

    def __init__(
        self, *, levels: Sequence[float], horizon: int, share: float = 0.8, half_life: float | int | None = None
    ) -> None:
        self.levels, self.horizon, self.share = tuple(levels), horizon, share
        self._keep = 1.0 if half_life is None else 0.5 ** (1.0 / half_life)
        self._wql = [level_index(levels, q) for q in WQL_LEVELS]
        self._median = level_index(levels, 0.5)
        self._ends = level_index(levels, 0.5 - share / 2), level_index(levels, 0.5 + share / 2)
        # Per lead: loss, |label|, covered, labels, scaled error, labels that have a scale.
        self._sums = np.zeros((6, horizon))
        self.n = 0
        self.last_origin: Any = None

    def update(
        self,
        origin: Any,
        forecast: Float[np.ndarray, "V H Q"],
        truth: Float[np.ndarray, "V H_seen"],
        *,
        past_error: Float[np.ndarray, " V"] | None = None,
    ) -> None:
        """Scores one forecast against what came of it.

        Args:
            origin: when it was made; kept as `last_origin`.
            forecast: made before any of `truth` was seen.
            truth: the first steps that came, at most H; NaN is not scored.
            past_error: the scale of MASE, from before the origin; without it the triple adds nothing to MASE.

        Raises:
            ValueError: shapes that do not agree, or NaN in the forecast.
        """
        truth = np.asarray(truth, float)
        V, H = truth.shape
        if forecast.shape[0] != V or forecast.shape[1] < H or forecast.shape[2] != len(self.levels) or self.horizon < H:
            raise ValueError(
                f"forecast {forecast.shape} and truth {truth.shape} do not agree with horizon {self.horizon} and "
                f"{len(self.levels)} levels"
            )
        quantiles = forecast[:, :H]
        if np.isnan(quantiles).any():
            raise ValueError(f"the forecast made at {origin} holds NaN; it cannot be scored")
        seen = np.isfinite(truth)
        loss = quantile_loss(target=truth, quantiles=quantiles[..., self._wql], levels=WQL_LEVELS).mean(-1)
        low, high = (quantiles[..., i] for i in self._ends)
        covered = (low <= truth) & (truth <= high)
        scale = np.zeros((V, 1)) if past_error is None else np.asarray(past_error, float)[:, None]
        scaled = seen & (scale > np.finfo(float).tiny)
        error = np.abs(truth - quantiles[..., self._median]) / np.where(scaled, scale, 1.0)
        sums = [(loss, seen), (np.abs(truth), seen), (covered, seen), (seen, seen), (error, scaled), (scaled, scaled)]
        self._sums *= self._keep
        self._sums[:, :H] += np.stack([np.where(where, x, 0.0).sum(0) for x, where in sums])
        self.n += 1
        self.last_origin = origin

    @staticmethod
    def _scores(sums: np.ndarray) -> dict[str, Any]:
        loss, label, covered, labels, error, scaled = sums
        with np.errstate(invalid="ignore", divide="ignore"):
            return {"wql": loss / label, "mase": error / scaled, "coverage": covered / labels}

    @property
    def overall(self) -> dict[str, float]:
        """Over all leads; NaN before anything was scored."""
        return {name: float(value) for name, value in self._scores(self._sums.sum(1)).items()}

    @property
    def by_lead(self) -> dict[str, Float[np.ndarray, " H"]]:
        """Per step ahead."""
        return self._scores(self._sums)
