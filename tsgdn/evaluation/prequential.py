"""Running scores of a live stream, and those of the online protocol: forecast, score, observe."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from tsgdn.evaluation.metrics import WQL_LEVELS, level_index, level_weights, quantile_loss


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


class StreamScores:
    """Scores of the forecasts made at every step of a stream, per horizon: those of the online protocol.

    A window is an origin with all H steps after it; windows that do not fit are not scored. Errors are those of the
    mean, in units of `scale`; WQL and coverage are those of the quantiles, in the unit of the series.

    Args:
        truth: the whole stream; only what is scored is read, NaN is not scored.
        scale: per variate, the standard deviation of the training rows.
        levels: of the quantiles; must hold .1, ..., .9.
        horizons: increasing.
        first: step of the first target of the first window.
    """

    def __init__(
        self,
        truth: Float[np.ndarray, "V T"],
        *,
        scale: Float[np.ndarray, " V"],
        levels: Sequence[float],
        horizons: Sequence[int],
        first: int,
    ) -> None:
        self.truth, self.scale = np.asarray(truth, float), np.asarray(scale, float)[:, None]
        self.levels, self.horizons, self.first = tuple(levels), tuple(horizons), first
        self._wql = [level_index(levels, q) for q in WQL_LEVELS]
        self._ends = level_index(levels, 0.1), level_index(levels, 0.9)
        self._mean = level_weights(levels)
        # Per horizon: square, absolute error, pinball loss, |label|, covered, labels.
        self._sums = np.zeros((6, len(self.horizons)))
        self.windows = np.zeros(len(self.horizons), int)
        T = self.truth.shape[1]
        self.by_origin = np.full((len(self.horizons), T), np.nan)
        """Mean squared error of the windows that begin at each step."""

    def update(
        self,
        origins: Int[np.ndarray, " n"],
        quantiles: Float[np.ndarray, "n V H Q"],
        mean: Float[np.ndarray, "n V H"] | None = None,
    ) -> None:
        """Scores forecasts, of which step 0 is the step `origin`; each origin comes once.

        Args:
            origins: steps seen when they were made.
            quantiles: in the unit of the series, of the longest horizon.
            mean: what squared errors are taken of; default the quantile function, integrated.

        Raises:
            ValueError: a forecast is NaN, or has other levels or fewer steps.
        """
        V, T = self.truth.shape
        H = self.horizons[-1]
        if quantiles.shape[1:] != (V, H, len(self.levels)):
            raise ValueError(f"forecasts are {quantiles.shape[1:]}, expected {(V, H, len(self.levels))}")
        kept = (origins >= self.first) & (origins < T)
        origins, quantiles = origins[kept], quantiles[kept]
        if not len(origins):
            return
        mean = quantiles @ self._mean if mean is None else mean[kept]
        if np.isnan(quantiles).any() or np.isnan(mean).any():
            raise ValueError(f"a forecast between the origins {origins[0]} and {origins[-1]} holds NaN")
        steps = origins[:, None] + np.arange(H)
        truth = np.where(steps < T, self.truth[:, np.minimum(steps, T - 1)], np.nan).transpose(1, 0, 2)
        error = (truth - mean) / self.scale
        loss = quantile_loss(target=truth, quantiles=quantiles[..., self._wql], levels=WQL_LEVELS).mean(-1)
        low, high = (quantiles[..., i] for i in self._ends)
        parts = np.stack([error**2, np.abs(error), loss, np.abs(truth), (low <= truth) & (truth <= high)])
        seen = np.isfinite(truth)
        parts = np.where(seen, parts, 0.0)
        for i, horizon in enumerate(self.horizons):
            fits = origins + horizon <= T
            inside, labels = parts[:, fits, :, :horizon], seen[fits, :, :horizon]
            self._sums[:5, i] += inside.sum((1, 2, 3))
            self._sums[5, i] += labels.sum()
            self.windows[i] += fits.sum()
            count = labels.sum((1, 2))
            self.by_origin[i, origins[fits]] = np.where(count > 0, inside[0].sum((1, 2)) / np.maximum(count, 1), np.nan)

    @property
    def table(self) -> list[dict[str, float | int]]:
        """A row per horizon: mse, mae, wql, coverage80, windows; NaN where nothing was scored."""
        square, absolute, loss, label, covered, labels = self._sums
        with np.errstate(invalid="ignore", divide="ignore"):
            columns = {
                "mse": square / labels,
                "mae": absolute / labels,
                "wql": loss / label,
                "coverage80": covered / labels,
            }
        return [
            {
                "horizon": horizon,
                **{name: float(values[i]) for name, values in columns.items()},
                "windows": int(self.windows[i]),
            }
            for i, horizon in enumerate(self.horizons)
        ]


def rolling_mean(values: Float[np.ndarray, " T"], window: int) -> Float[np.ndarray, " T"]:
    """The mean of the last `window` values at each step, NaN left out; NaN before the first."""
    seen = np.isfinite(values)
    total = np.concatenate([np.zeros(window), np.cumsum(np.where(seen, values, 0.0))])
    count = np.concatenate([np.zeros(window), np.cumsum(seen)])
    with np.errstate(invalid="ignore", divide="ignore"):
        return (total[window:] - total[:-window]) / (count[window:] - count[:-window])
